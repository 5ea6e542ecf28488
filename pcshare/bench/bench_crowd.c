/* bench_crowd: many helper processes of one coordinator.
 *
 *   bench-crowd idle  N TARGET            N processes attach and do nothing, until standard input ends
 *   bench-crowd touch N TOUCHES TARGET    N processes attach; then, all at one moment, they touch the first TOUCHES
 *                                         pages together, each its share of them, in an order that no read-ahead guesses
 *
 * TARGET is pcshare:SOCKET (a coordinator's only block) or pcshare:SOCKET#BLOCK. idle prints {"attached": N} when all
 * are; touch prints the touches, and the seconds from the beginning until the last one is through. Whoever cannot attach
 * ends the whole crowd; nobody of it outlives this program. Nothing is pinned.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "bench_common.h"
#include "helper.h"

enum {
    ATTACH_TIMEOUT_MS = 60000, /* of one, while all the others want the same */
    ATTACH_AGAIN_US = 10000,   /* where too many wait to be accepted */
};

struct crowd {
    const char *socket_path, *block;
    uint64_t n, touches; /* no touches: idle */
    int told[2];         /* a pipe: each writes a byte when it is attached, and another when it has touched */
    int begin[2];        /* a pipe: at its end they begin, or leave */
};

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
        kill(getppid(), SIGTERM); /* and with it all the others */
        _exit(EXIT_FAILURE);
    }
    return a;
}

/* Its share lies together, so that all helpers need as many page tables as one would. */
static void touch(const struct crowd *crowd, const struct pcshare_attachment *a, uint64_t number)
{
    const volatile uint8_t *data = pcshare_data(a);
    struct pcshare_info info;

    pcshare_get_info(a, &info);
    uint64_t pages = info.used_length / BENCH_PAGE, n = crowd->touches < pages ? crowd->touches : pages;
    uint64_t first = n * number / crowd->n, count = n * (number + 1) / crowd->n - first;
    uint64_t step = count ? bench_stride(count) : 0;
    for (uint64_t i = 0; i < count; i++)
        (void)data[(first + i * step % count) * BENCH_PAGE];
}

static void be_helper(const struct crowd *crowd, uint64_t number)
{
    close(crowd->begin[1]); /* the program alone has it: a helper that it left before the next line sees its end */
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0)
        bench_fail("prctl");
    struct pcshare_attachment *a = attach(crowd);
    tell(crowd);
    wait_for_end_of(crowd->begin[0]);
    if (crowd->touches) {
        touch(crowd, a, number);
        tell(crowd);
    }
    pcshare_detach(a, 0);
    _exit(EXIT_SUCCESS);
}

static void start(struct crowd *crowd)
{
    if (pipe(crowd->told) < 0 || pipe(crowd->begin) < 0)
        bench_fail("pipe");
    for (uint64_t i = 0; i < crowd->n; i++) {
        pid_t pid = fork();
        if (pid < 0)
            bench_fail("fork");
        if (pid == 0)
            be_helper(crowd, i);
    }
    close(crowd->told[1]); /* so that a crowd that was killed is not waited for */
}

static void wait_for_all(const struct crowd *crowd)
{
    char byte;

    for (uint64_t i = 0; i < crowd->n; i++)
        if (read(crowd->told[0], &byte, 1) != 1)
            bench_fail("a helper of the crowd is gone");
}

static int run_idle(struct crowd *crowd)
{
    start(crowd);
    wait_for_all(crowd);
    printf("{\"attached\": %llu}\n", (unsigned long long)crowd->n);
    fflush(stdout);
    wait_for_end_of(STDIN_FILENO);
    close(crowd->begin[1]);
    while (wait(NULL) > 0)
        ;
    return EXIT_SUCCESS;
}

static int run_touch(struct crowd *crowd)
{
    start(crowd);
    wait_for_all(crowd);
    double begin_us = bench_now_us();
    close(crowd->begin[1]);
    wait_for_all(crowd);
    double seconds = (bench_now_us() - begin_us) / 1e6;
    while (wait(NULL) > 0)
        ;
    printf("{\"touches\": %llu, \"seconds\": %.6f}\n", (unsigned long long)crowd->touches, seconds);
    return EXIT_SUCCESS;
}

static int set_target(struct crowd *crowd, char *text)
{
    char *block = strchr(text, '#');

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
    struct crowd crowd = {.n = argc > 2 ? strtoull(argv[2], NULL, 10) : 0};

    if ((!is_idle && !is_touch) || !crowd.n || !set_target(&crowd, argv[argc - 1]))
        bench_refuse("usage: bench-crowd idle N TARGET | touch N TOUCHES TARGET");
    if (is_idle)
        return run_idle(&crowd);
    crowd.touches = strtoull(argv[3], NULL, 10);
    return run_touch(&crowd);
}
