#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include "status_segment.h"

uint32_t status_histogram_bucket(uint64_t us)
{
    uint32_t bucket = us ? 64 - (uint32_t)__builtin_clzll(us) : 0;

    return bucket < STATUS_BUCKETS ? bucket : STATUS_BUCKETS - 1;
}

void status_histogram_add(struct status_histogram *histogram, uint64_t us)
{
    uint64_t max = __atomic_load_n(&histogram->max_us, __ATOMIC_RELAXED);

    __atomic_fetch_add(&histogram->count[status_histogram_bucket(us)], 1, __ATOMIC_RELAXED);
    __atomic_fetch_add(&histogram->total_us, us, __ATOMIC_RELAXED);
    while (us > max &&
           !__atomic_compare_exchange_n(&histogram->max_us, &max, us, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
        ;
}

static struct timespec deadline_after(int64_t timeout_ms)
{
    struct timespec deadline;

    clock_gettime(CLOCK_MONOTONIC, &deadline);
    deadline.tv_sec += timeout_ms / 1000;
    deadline.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
    if (deadline.tv_nsec >= 1000000000) {
        deadline.tv_sec++;
        deadline.tv_nsec -= 1000000000;
    }
    return deadline;
}

/* Not FUTEX_PRIVATE: waker and waiters are different processes, and the waiters' mappings are read-only. */
int status_block_wait(const struct status_block *status, uint32_t seen, int64_t timeout_ms)
{
    struct timespec deadline = deadline_after(timeout_ms < 0 ? 0 : timeout_ms);

    while (__atomic_load_n(&status->progress_seq, __ATOMIC_ACQUIRE) == seen) {
        if (syscall(SYS_futex, &status->progress_seq, FUTEX_WAIT_BITSET, seen, timeout_ms < 0 ? NULL : &deadline, NULL,
                    FUTEX_BITSET_MATCH_ANY) < 0 &&
            errno != EAGAIN)
            return -errno;
    }
    return 0;
}

void status_block_notify(struct status_block *status)
{
    __atomic_fetch_add(&status->progress_seq, 1, __ATOMIC_RELEASE);
    syscall(SYS_futex, &status->progress_seq, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}
