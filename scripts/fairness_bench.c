/* fairness_bench: one helper that touches now and then, and one that faults as fast as it can.
 *
 *   fairness_bench victim COUNT PAUSE_US SEED SOCKET   COUNT touches of random missing pages, a pause after each, fewer
 *                                                      where the block is complete; prints how many, and p50, p99,
 *                                                      p99.9 and the longest, us
 *   fairness_bench flood THREADS SOCKET                each thread touches its share of the pages, one after the other,
 *                                                      until SIGTERM; prints how many faults a second
 *   fairness_bench range SOCKET                        asks for the whole block at once, then waits for SIGTERM
 *
 * SOCKET is a coordinator's, of one block that nothing streams. Every touch is of a page that nobody has brought yet.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#include "helper.h"

enum { PAGE = 4096, ATTACH_TIMEOUT_MS = 10000, THREADS_MAX = 4096, STACK_BYTES = 64 << 10, DRAWS_MAX = 1000 };

static struct pcshare_attachment *attachment;
static const volatile uint8_t *data;
static uint64_t page_count;
static volatile sig_atomic_t over;

struct flooder {
    uint64_t first, step, faults;
};

static double now_us(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static void attach(const char *socket_path)
{
    struct pcshare_info info;

    if (pcshare_attach(&attachment, socket_path, NULL, PCSHARE_RO, ATTACH_TIMEOUT_MS, NULL, 0) < 0) {
        fprintf(stderr, "fairness_bench: %s\n", pcshare_error_text());
        exit(EXIT_FAILURE);
    }
    pcshare_get_info(attachment, &info);
    data = pcshare_data(attachment);
    page_count = info.used_length / PAGE;
}

static int compare_doubles(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

/* A random page that is not here; UINT64_MAX when next to nothing is missing any more. */
static uint64_t missing_page(uint64_t *state)
{
    for (int i = 0; i < DRAWS_MAX; i++) {
        uint64_t page = next_random(state) % page_count;

        if (!pcshare_is_received(attachment, page * PAGE, PAGE))
            return page;
    }
    return UINT64_MAX;
}

static void touch_now_and_then(uint64_t count, long pause_us, uint64_t seed)
{
    struct timespec pause = {.tv_sec = pause_us / 1000000, .tv_nsec = pause_us % 1000000 * 1000};
    uint64_t state = seed * 2654435761u + 88172645463325252ull;
    double *us = calloc(count, sizeof(*us));

    if (!us)
        exit(EXIT_FAILURE);
    uint64_t n = 0;
    for (uint64_t page; n < count && (page = missing_page(&state)) != UINT64_MAX; n++) {
        double start = now_us();

        (void)data[page * PAGE];
        us[n] = now_us() - start;
        nanosleep(&pause, NULL);
    }
    if (n == 0) {
        fprintf(stderr, "fairness_bench: nothing was missing: take a larger source\n");
        exit(EXIT_FAILURE);
    }
    qsort(us, n, sizeof(*us), compare_doubles);
    printf("%llu %.1f %.1f %.1f %.1f\n", (unsigned long long)n, us[n / 2], us[n * 99 / 100], us[n * 999 / 1000],
           us[n - 1]);
    free(us);
}

static void *flood_run(void *argument)
{
    struct flooder *flooder = argument;

    for (uint64_t page = flooder->first; !over && page < page_count; page += flooder->step) {
        (void)data[page * PAGE];
        __atomic_store_n(&flooder->faults, flooder->faults + 1, __ATOMIC_RELAXED);
    }
    return NULL;
}

static void flood(uint64_t n_threads, const sigset_t *signals)
{
    static struct flooder flooders[THREADS_MAX];
    pthread_attr_t attributes;
    uint64_t faults = 0;
    int number;

    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    for (uint64_t i = 0; i < n_threads; i++) {
        pthread_t thread;

        flooders[i] = (struct flooder){.first = i, .step = n_threads};
        if ((errno = pthread_create(&thread, &attributes, flood_run, &flooders[i]))) {
            perror("fairness_bench: a thread");
            exit(EXIT_FAILURE);
        }
    }
    double begin = now_us();
    sigwait(signals, &number);
    over = 1;
    for (uint64_t i = 0; i < n_threads; i++)
        faults += __atomic_load_n(&flooders[i].faults, __ATOMIC_RELAXED);
    printf("%.0f\n", (double)faults / (now_us() - begin) * 1e6);
}

static void *range_run(void *argument)
{
    (void)argument;
    (void)pcshare_ensure(attachment, 0, page_count * PAGE, -1, NULL, NULL);
    return NULL;
}

static void range(const sigset_t *signals)
{
    pthread_t thread;
    int number;

    if ((errno = pthread_create(&thread, NULL, range_run, NULL))) {
        perror("fairness_bench: a thread");
        exit(EXIT_FAILURE);
    }
    sigwait(signals, &number);
    printf("0\n");
}

int main(int argc, char **argv)
{
    const char *mode = argc > 1 ? argv[1] : "";
    sigset_t signals;

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &signals, NULL);
    if (strcmp(mode, "victim") == 0 && argc == 6) {
        attach(argv[5]);
        touch_now_and_then(strtoull(argv[2], NULL, 10), strtol(argv[3], NULL, 10), strtoull(argv[4], NULL, 10));
    } else if (strcmp(mode, "flood") == 0 && argc == 4 && strtoull(argv[2], NULL, 10) <= THREADS_MAX) {
        attach(argv[3]);
        flood(strtoull(argv[2], NULL, 10), &signals);
    } else if (strcmp(mode, "range") == 0 && argc == 3) {
        attach(argv[2]);
        range(&signals);
    } else {
        fprintf(stderr, "usage: fairness_bench victim COUNT PAUSE_US SEED SOCKET | flood THREADS SOCKET | range SOCKET\n");
        return 2;
    }
    fflush(stdout);
    _exit(EXIT_SUCCESS); /* threads may wait for pages */
}
