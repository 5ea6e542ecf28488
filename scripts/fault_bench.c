/* fault_bench: how long one touch of a missing page takes, once with the smallest possible server and once with
 * pcshare.
 *
 *   fault_bench minimal FILE SERVER_CPU HELPER_CPU   two processes, one uffd, poll, read, pread, COPY: nothing else
 *   fault_bench pcshare SOCKET HELPER_CPU            the helper of a coordinator that streams lazily
 *
 * A CPU of -1 is not pinned. Both touch the same number of pages in the same random order, one byte each, and print one
 * line: count, median, p99, p99.9 and maximum in microseconds. A measurement that is not run side by side with its
 * limit means nothing.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "fd_message.h"
#include "helper.h"
#include "uffd.h"

enum { PAGE = 4096, ATTACH_TIMEOUT_MS = 10000 };

static void fail(const char *what)
{
    fprintf(stderr, "fault_bench: %s: %s\n", what, strerror(errno));
    exit(EXIT_FAILURE);
}

static void pin(int cpu)
{
    cpu_set_t set;

    if (cpu < 0)
        return;
    CPU_ZERO(&set);
    CPU_SET((size_t)cpu, &set);
    if (sched_setaffinity(0, sizeof(set), &set) < 0)
        fail("sched_setaffinity");
}

static double now_us(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static int compare_doubles(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

/* Each page once, in an order that no read-ahead guesses: a walk by a number that has no factor in common with the
 * count. */
static void touch_all(const volatile uint8_t *data, uint64_t pages)
{
    double *us = malloc(pages * sizeof(*us));
    uint64_t step = pages / 2 + pages / 7, at = 0;

    for (;; step++) {
        uint64_t a = step, b = pages;
        while (b) {
            uint64_t r = a % b;
            a = b;
            b = r;
        }
        if (a == 1)
            break;
    }
    for (uint64_t i = 0; i < pages; i++, at = (at + step) % pages) {
        double start = now_us();
        (void)data[at * PAGE];
        us[i] = now_us() - start;
    }
    qsort(us, pages, sizeof(*us), compare_doubles);
    printf("%llu %.2f %.2f %.2f %.2f\n", (unsigned long long)pages, us[pages / 2], us[pages * 99 / 100],
           us[pages * 999 / 1000], us[pages - 1]);
    free(us);
}

/* ---- minimal: everything that is not needed is left out ---- */

static void serve(int uffd, uint64_t client_addr, int file)
{
    struct pollfd polled = {.fd = uffd, .events = POLLIN};
    struct uffd_message message;
    static uint8_t staging[PAGE] __attribute__((aligned(PAGE)));
    uint64_t done;

    for (;;) {
        if (poll(&polled, 1, -1) < 0)
            fail("poll");
        if (uffd_read(uffd, &message, 1) != 1)
            continue;
        uint64_t addr = message.fault_addr & ~(uint64_t)(PAGE - 1);
        if (pread(file, staging, PAGE, (off_t)(addr - client_addr)) < 0)
            fail("pread");
        uffd_copy(uffd, addr, staging, PAGE, &done);
        uffd_wake(uffd, addr, PAGE);
    }
}

static int be_minimal_helper(int socket_fd, uint64_t length, int cpu)
{
    int user_mode_only, memfd = memfd_create("fault-bench", MFD_CLOEXEC);

    pin(cpu);
    if (memfd < 0 || ftruncate(memfd, (off_t)length) < 0)
        fail("memfd");
    void *data = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
    int uffd = uffd_open(-1, &user_mode_only);
    if (data == MAP_FAILED || uffd < 0 || uffd_api(uffd, 0, NULL, NULL) < 0 ||
        uffd_register(uffd, (uint64_t)(uintptr_t)data, length, UFFD_MODE_MISSING, NULL) < 0)
        fail("userfaultfd");
    uint64_t addr = (uint64_t)(uintptr_t)data;
    if (fd_message_send(socket_fd, &addr, sizeof(addr), &uffd, 1, 0) < 0)
        fail("send");
    touch_all(data, length / PAGE);
    fflush(stdout);
    return EXIT_SUCCESS;
}

static int run_minimal(const char *path, int server_cpu, int helper_cpu)
{
    int pair[2], uffd = -1, status, file = open(path, O_RDONLY | O_CLOEXEC);
    struct stat info;
    uint64_t client_addr;
    uint32_t n_fds = 1;

    if (file < 0 || fstat(file, &info) < 0 || socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair) < 0)
        fail(path);
    pid_t helper = fork();
    if (helper == 0)
        _exit(be_minimal_helper(pair[0], (uint64_t)info.st_size / PAGE * PAGE, helper_cpu));
    pid_t server = fork();
    if (server == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        pin(server_cpu);
        if (fd_message_receive(pair[1], &client_addr, sizeof(client_addr), &uffd, &n_fds, 0) <= 0)
            fail("receive");
        serve(uffd, client_addr, file);
    }
    waitpid(helper, &status, 0);
    kill(server, SIGKILL);
    waitpid(server, NULL, 0);
    return WEXITSTATUS(status);
}

static int run_pcshare(const char *socket_path, int helper_cpu)
{
    struct pcshare_attachment *a;
    struct pcshare_info info;

    pin(helper_cpu);
    if (pcshare_attach(&a, socket_path, NULL, PCSHARE_RO, ATTACH_TIMEOUT_MS, NULL, 0) < 0) {
        fprintf(stderr, "fault_bench: %s\n", pcshare_error_text());
        return EXIT_FAILURE;
    }
    pcshare_get_info(a, &info);
    touch_all(pcshare_data(a), info.used_length / PAGE);
    pcshare_detach(a, 0);
    return EXIT_SUCCESS;
}

int main(int argc, char **argv)
{
    if (argc == 5 && strcmp(argv[1], "minimal") == 0)
        return run_minimal(argv[2], atoi(argv[3]), atoi(argv[4]));
    if (argc == 4 && strcmp(argv[1], "pcshare") == 0)
        return run_pcshare(argv[2], atoi(argv[3]));
    fprintf(stderr, "usage: fault_bench minimal FILE SERVER_CPU HELPER_CPU | fault_bench pcshare SOCKET HELPER_CPU\n");
    return 2;
}
