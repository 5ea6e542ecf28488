/* bench_crowd: many helper processes of one coordinator, or of the smallest server.
 *
 *   bench-crowd idle  N TARGET            N processes attach and do nothing, until standard input ends
 *   bench-crowd touch N TOUCHES TARGET    N processes attach; then, all at one moment, they touch the first TOUCHES
 *                                         pages together, each its share, in an order that no read-ahead guesses
 *
 * TARGET is pcshare:SOCKET (a coordinator's only block), pcshare:SOCKET#BLOCK, or, to touch, server:FILE: the smallest
 * server of many, a thread on each CPU that serves the helpers pinned there: poll, read, pread, COPY. idle prints
 * {"attached": N} when all are; touch prints the touches, and the seconds from the beginning until the last one is
 * through. Whoever cannot attach ends the whole crowd; nobody of it outlives this program. A coordinator's helpers are
 * not pinned.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "bench_smallest.h"
#include "fd_message.h"
#include "helper.h"
#include "uffd.h"

enum {
    ATTACH_TIMEOUT_MS = 60000, /* of one, while all the others want the same */
    ATTACH_AGAIN_US = 10000,   /* where too many wait to be accepted */
    SERVED_MAX = 256,          /* by the smallest server, and its CPUs */
    EVENTS_MAX = 64,
};

struct crowd {
    const char *socket_path, *block; /* of a coordinator; NULL: the smallest server is it */
    uint64_t n, touches;             /* no touches: idle */
    int told[2];                     /* a pipe: each writes a byte when it is attached, another when it has touched */
    int begin[2];                    /* a pipe: at its end they begin, or leave */
    /* of the smallest server: */
    pid_t server_pid;
    int to_server[2]; /* a socket, and the server's end */
    int file, memfd;
    uint64_t length;
};

static int is_served(const struct crowd *crowd)
{
    return !crowd->socket_path;
}

static void tell(const struct crowd *crowd)
{
    if (write(crowd->told[1], "", 1) != 1)
        bench_fail("write");
}

static void wait_for_end_of(int fd)
{
    char byte;

    while (read(fd, &byte, 1) > 0)
        ;
}

static struct pcshare_attachment *attach(const struct crowd *crowd)
{
    struct pcshare_attachment *a;
    int rc;

    while ((rc = pcshare_attach(&a, crowd->socket_path, crowd->block, PCSHARE_RO, ATTACH_TIMEOUT_MS, NULL, 0)) ==
           -EAGAIN)
        usleep(ATTACH_AGAIN_US);
    if (rc < 0) {
        fprintf(stderr, "%s\n", pcshare_error_text());
        exit(EXIT_FAILURE);
    }
    return a;
}

/* Its share lies together, so that all helpers need as many page tables as one would. */
static void touch(const struct crowd *crowd, const volatile uint8_t *data, uint64_t length, uint64_t number)
{
    uint64_t pages = length / BENCH_PAGE, n = crowd->touches < pages ? crowd->touches : pages;
    uint64_t first = n * number / crowd->n, count = n * (number + 1) / crowd->n - first;
    uint64_t step = count ? bench_stride(count) : 0;
    for (uint64_t i = 0; i < count; i++)
        (void)data[(first + i * step % count) * BENCH_PAGE];
}

static void be_helper(const struct crowd *crowd, uint64_t number)
{
    struct pcshare_attachment *a = attach(crowd);
    struct pcshare_info info;

    pcshare_get_info(a, &info);
    tell(crowd);
    wait_for_end_of(crowd->begin[0]);
    if (crowd->touches) {
        touch(crowd, pcshare_data(a), info.used_length, number);
        tell(crowd);
    }
    pcshare_detach(a, 0);
}

/* ---- the smallest server ---- */

struct served {
    uint64_t number, addr; /* the helper's, and where its memory begins */
    int uffd;
};

struct server_thread {
    int poll_fd, file;
};

/* Those that this program may use, into cpus[0..SERVED_MAX); how many. */
static uint64_t list_cpus(int *cpus)
{
    cpu_set_t set;
    uint64_t n = 0;

    if (sched_getaffinity(0, sizeof(set), &set) < 0)
        bench_fail("sched_getaffinity");
    for (int cpu = 0; cpu < CPU_SETSIZE && n < SERVED_MAX; cpu++)
        if (CPU_ISSET((size_t)cpu, &set))
            cpus[n++] = cpu;
    return n;
}

static void serve(const struct server_thread *thread, const struct served *helper, uint8_t *bytes)
{
    uint64_t addr;

    if (!bench_next_fault(helper->uffd, &addr))
        return;
    if (pread(thread->file, bytes, BENCH_PAGE, (off_t)(addr - helper->addr)) != BENCH_PAGE)
        bench_fail("pread");
    bench_answer(helper->uffd, addr, bytes);
}

static void *server_run(void *argument)
{
    const struct server_thread *thread = argument;
    uint8_t bytes[BENCH_PAGE] __attribute__((aligned(BENCH_PAGE)));
    struct epoll_event events[EVENTS_MAX];

    for (;;) {
        int n = epoll_wait(thread->poll_fd, events, EVENTS_MAX, -1);
        if (n < 0 && errno != EINTR)
            bench_fail("epoll_wait");
        for (int i = 0; i < n; i++)
            serve(thread, events[i].data.ptr, bytes);
    }
    return NULL;
}

static void receive_helper(const struct crowd *crowd, const struct server_thread *threads, uint64_t n_threads,
                           struct served *helper)
{
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = helper};
    uint32_t n_fds = 1;
    int uffd = -1;

    if (fd_message_receive(crowd->to_server[1], helper, sizeof(*helper), &uffd, &n_fds, 0) <= 0)
        bench_fail("receive");
    helper->uffd = uffd;
    if (epoll_ctl(threads[helper->number % n_threads].poll_fd, EPOLL_CTL_ADD, uffd, &event) < 0)
        bench_fail("epoll_ctl");
}

static void be_server(const struct crowd *crowd, uint64_t number)
{
    static struct server_thread threads[SERVED_MAX];
    static struct served helpers[SERVED_MAX];
    int cpus[SERVED_MAX];
    uint64_t n_threads = list_cpus(cpus);
    pthread_t thread;

    (void)number; /* there is one */
    for (uint64_t i = 0; i < n_threads; i++) {
        threads[i] = (struct server_thread){.poll_fd = epoll_create1(EPOLL_CLOEXEC), .file = crowd->file};
        if (threads[i].poll_fd < 0)
            bench_fail("epoll_create1");
    }
    for (uint64_t i = 0; i < crowd->n; i++)
        receive_helper(crowd, threads, n_threads, &helpers[i]);
    for (uint64_t i = 0; i < n_threads; i++) {
        bench_pin(cpus[i]); /* which the new thread inherits */
        if (pthread_create(&thread, NULL, server_run, &threads[i]) != 0)
            bench_refuse("no thread for each CPU");
    }
    tell(crowd);
    close(crowd->told[1]); /* so that helpers that were killed are not waited for */
    pthread_join(thread, NULL); /* none ends */
}

/* Pinned to the CPU of the thread that answers it. */
static void be_served(const struct crowd *crowd, uint64_t number)
{
    struct served hello = {.number = number};
    int cpus[SERVED_MAX];
    uint8_t *data;

    bench_pin(cpus[number % list_cpus(cpus)]);
    int uffd = bench_map_registered(crowd->memfd, crowd->length, &data);
    hello.addr = (uint64_t)(uintptr_t)data;
    if (fd_message_send(crowd->to_server[0], &hello, sizeof(hello), &uffd, 1, 0) < 0)
        bench_fail("send");
    tell(crowd);
    wait_for_end_of(crowd->begin[0]);
    touch(crowd, data, crowd->length, number);
    tell(crowd);
}

static void open_server(struct crowd *crowd, const char *path)
{
    if (crowd->n > SERVED_MAX)
        bench_refuse("too many helpers for the smallest server");
    crowd->file = bench_open_file(path, BENCH_PAGE, &crowd->length);
    crowd->memfd = bench_make_memfd(crowd->length, BENCH_PAGE);
    if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, crowd->to_server) < 0)
        bench_fail("socketpair");
}

/* ---- the crowd ---- */

static pid_t program; /* whose children they all are */

static void end_crowd(void)
{
    if (getppid() == program)
        kill(program, SIGTERM); /* and with it all the others */
}

/* Runs in a process of its own; where it fails, all end. */
static pid_t spawn(const struct crowd *crowd, void (*run)(const struct crowd *, uint64_t), uint64_t number)
{
    pid_t pid = bench_fork_child();

    if (pid)
        return pid;
    atexit(end_crowd);
    close(crowd->begin[1]); /* the program alone has it */
    run(crowd, number);
    _exit(EXIT_SUCCESS);
}

static void start(struct crowd *crowd)
{
    program = getpid();
    if (pipe(crowd->told) < 0 || pipe(crowd->begin) < 0)
        bench_fail("pipe");
    if (is_served(crowd))
        crowd->server_pid = spawn(crowd, be_server, 0);
    for (uint64_t i = 0; i < crowd->n; i++)
        spawn(crowd, is_served(crowd) ? be_served : be_helper, i);
    close(crowd->told[1]); /* so that a crowd that was killed is not waited for */
}

static void wait_for(const struct crowd *crowd, uint64_t n)
{
    char byte;

    for (uint64_t i = 0; i < n; i++)
        if (read(crowd->told[0], &byte, 1) != 1)
            bench_fail("a helper of the crowd is gone");
}

static int run_idle(struct crowd *crowd)
{
    start(crowd);
    wait_for(crowd, crowd->n);
    printf("{\"attached\": %llu}\n", (unsigned long long)crowd->n);
    fflush(stdout);
    wait_for_end_of(STDIN_FILENO);
    close(crowd->begin[1]);
    while (wait(NULL) > 0)
        ;
    return EXIT_SUCCESS;
}

/* Else the figure is one of nothing. */
static void check_served(const struct crowd *crowd)
{
    uint64_t n = crowd->touches * BENCH_PAGE < crowd->length ? crowd->touches * BENCH_PAGE : crowd->length;
    void *wanted = mmap(NULL, n, PROT_READ, MAP_SHARED, crowd->file, 0);
    void *served = mmap(NULL, n, PROT_READ, MAP_SHARED, crowd->memfd, 0);

    if (wanted == MAP_FAILED || served == MAP_FAILED)
        bench_fail("mmap");
    if (memcmp(wanted, served, n) != 0)
        bench_refuse("the smallest server has brought other bytes than the file has");
}

static int run_touch(struct crowd *crowd)
{
    start(crowd);
    wait_for(crowd, crowd->n + (uint64_t)is_served(crowd));
    double begin_us = bench_now_us();
    close(crowd->begin[1]);
    wait_for(crowd, crowd->n);
    double seconds = (bench_now_us() - begin_us) / 1e6;
    if (is_served(crowd)) {
        check_served(crowd);
        kill(crowd->server_pid, SIGKILL);
    }
    while (wait(NULL) > 0)
        ;
    printf("{\"touches\": %llu, \"seconds\": %.6f}\n", (unsigned long long)crowd->touches, seconds);
    return EXIT_SUCCESS;
}

static int set_target(struct crowd *crowd, char *text)
{
    char *block = strchr(text, '#');

    if (strncmp(text, "server:", 7) == 0 && crowd->touches) {
        open_server(crowd, text + 7);
        return 1;
    }
    if (strncmp(text, "pcshare:", 8) != 0)
        return 0;
    if (block)
        *block++ = '\0';
    crowd->socket_path = text + 8;
    crowd->block = block;
    return 1;
}

int main(int argc, char **argv)
{
    int is_idle = argc == 4 && strcmp(argv[1], "idle") == 0, is_touch = argc == 5 && strcmp(argv[1], "touch") == 0;
    struct crowd crowd = {.n = argc > 2 ? strtoull(argv[2], NULL, 10) : 0,
                          .touches = is_touch ? strtoull(argv[3], NULL, 10) : 0};

    if ((!is_idle && !is_touch) || !crowd.n || (is_touch && !crowd.touches) || !set_target(&crowd, argv[argc - 1]))
        bench_refuse("usage: bench-crowd idle N TARGET | touch N TOUCHES TARGET");
    return is_idle ? run_idle(&crowd) : run_touch(&crowd);
}
