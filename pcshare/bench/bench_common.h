/* bench_common: what the benchmark programs share: clock, pinning, quantiles, and how figures are printed.
 *
 * Each program prints one JSON object, all times in microseconds unless the name says seconds.
 */
#ifndef PCSHARE_BENCH_COMMON_H
#define PCSHARE_BENCH_COMMON_H

#include <errno.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { BENCH_PAGE = 4096 };

static inline _Noreturn void bench_fail(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(EXIT_FAILURE);
}

/* What the caller asked for makes no sense: exit status 2, as for wrong usage. */
static inline _Noreturn void bench_refuse(const char *text)
{
    fprintf(stderr, "%s\n", text);
    exit(2);
}

static inline double bench_now_us(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

/* cpu -1: wherever the scheduler likes. */
static inline void bench_pin(int cpu)
{
    cpu_set_t set;

    if (cpu < 0)
        return;
    CPU_ZERO(&set);
    CPU_SET((size_t)cpu, &set);
    if (sched_setaffinity(0, sizeof(set), &set) < 0)
        bench_fail("sched_setaffinity");
}

static inline uint64_t bench_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static inline uint64_t bench_random_state(uint64_t seed)
{
    return seed * 2654435761u + 88172645463325252ull;
}

/* A number that has no factor in common with the count: steps of it reach each page once, in an order that no
 * read-ahead guesses. */
static inline uint64_t bench_stride(uint64_t count)
{
    for (uint64_t step = count / 2 + count / 7;; step++) {
        uint64_t a = step, b = count;

        while (b) {
            uint64_t rest = a % b;
            a = b;
            b = rest;
        }
        if (a == 1)
            return step;
    }
}

static inline int bench_compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

/* Sorts them. touches: all of them, also those that are not among the n times. */
static inline void bench_print_times(uint64_t touches, double seconds, double *us, uint64_t n)
{
    qsort(us, n, sizeof(*us), bench_compare);
    printf("{\"touches\": %llu, \"timed\": %llu, \"seconds\": %.6f", (unsigned long long)touches,
           (unsigned long long)n, seconds);
    if (n)
        printf(", \"p50\": %.2f, \"p99\": %.2f, \"p99.9\": %.2f, \"max\": %.2f", us[n / 2], us[n * 99 / 100],
               us[n * 999 / 1000], us[n - 1]);
    printf("}\n");
}

static inline void bench_print_seconds(uint64_t bytes, double seconds)
{
    printf("{\"bytes\": %llu, \"seconds\": %.6f, \"bytes_per_s\": %.0f}\n", (unsigned long long)bytes, seconds,
           (double)bytes / seconds);
}

#endif
