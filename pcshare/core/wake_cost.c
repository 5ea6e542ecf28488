/* wake_cost: see wake_cost.h. */
#define _GNU_SOURCE
#include "wake_cost.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "thread.h"

enum { WARM_UP_ROUNDS = 4 };

/* Two threads that wake each other in turns. */
struct ping {
    int there_fd;
    int back_fd;
    uint32_t rounds;
    int32_t cpu_a;
    int32_t cpu_b;
    int failed;
    uint64_t ns[WAKE_COST_ROUNDS_MAX];
};

static int pin_self(int32_t cpu)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    if (cpu < 0 || cpu >= CPU_SETSIZE)
        return -EINVAL;
    CPU_SET((size_t)cpu, &set);
    return sched_setaffinity(0, sizeof(set), &set) < 0 ? -errno : 0;
}

static void pass_on(int fd)
{
    uint64_t one = 1;
    ssize_t done = write(fd, &one, sizeof(one));

    (void)done;
}

static void await(int fd)
{
    uint64_t value;

    while (read(fd, &value, sizeof(value)) < 0 && errno == EINTR)
        ;
}

static void *answer(void *argument)
{
    struct ping *ping = argument;

    if (pin_self(ping->cpu_b) < 0)
        __atomic_store_n(&ping->failed, 1, __ATOMIC_RELEASE);
    for (uint32_t i = 0; i < WARM_UP_ROUNDS + ping->rounds; i++) {
        await(ping->there_fd);
        pass_on(ping->back_fd);
    }
    return NULL;
}

static void *ask(void *argument)
{
    struct ping *ping = argument;

    if (pin_self(ping->cpu_a) < 0)
        __atomic_store_n(&ping->failed, 1, __ATOMIC_RELEASE);
    for (uint32_t i = 0; i < WARM_UP_ROUNDS + ping->rounds; i++) {
        uint64_t begin_ns = clock_ns();
        pass_on(ping->there_fd);
        await(ping->back_fd);
        if (i >= WARM_UP_ROUNDS)
            ping->ns[i - WARM_UP_ROUNDS] = (clock_ns() - begin_ns) / 2;
    }
    return NULL;
}

/* One that was started alone would wait for ever. */
static int play(struct ping *ping)
{
    pthread_t answering, asking;
    int rc = thread_new(&answering, "pcshare-pong", answer, ping);

    if (rc < 0)
        return rc;
    rc = thread_new(&asking, "pcshare-ping", ask, ping);
    if (rc == 0)
        pthread_join(asking, NULL);
    for (uint32_t i = 0; rc < 0 && i < WARM_UP_ROUNDS + ping->rounds; i++) {
        pass_on(ping->there_fd);
        await(ping->back_fd);
    }
    pthread_join(answering, NULL);
    return rc < 0 ? rc : ping->failed ? -EINVAL : 0;
}

static int compare(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return (x > y) - (x < y);
}

int wake_cost_measure(int32_t cpu_a, int32_t cpu_b, uint32_t rounds, uint64_t *nsp)
{
    if (rounds == 0 || rounds > WAKE_COST_ROUNDS_MAX)
        return -EINVAL;
    struct ping *ping = calloc(1, sizeof(*ping));
    if (!ping)
        return -ENOMEM;
    ping->cpu_a = cpu_a;
    ping->cpu_b = cpu_b;
    ping->rounds = rounds;
    ping->there_fd = eventfd(0, EFD_CLOEXEC);
    ping->back_fd = eventfd(0, EFD_CLOEXEC);
    int rc = ping->there_fd < 0 || ping->back_fd < 0 ? -errno : play(ping);
    if (rc == 0) {
        qsort(ping->ns, rounds, sizeof(*ping->ns), compare);
        *nsp = ping->ns[rounds / 2];
    }
    if (ping->there_fd >= 0)
        close(ping->there_fd);
    if (ping->back_fd >= 0)
        close(ping->back_fd);
    free(ping);
    return rc;
}
