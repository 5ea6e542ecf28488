/* fault_crowd: a helper with more threads in faults than there are CPUs, beside others that fault.
 *
 * Each answer makes a thread runnable. Where answers come at once the threads of a crowd fill the run queues, and what
 * another helper waits for comes too late: the fault thread's turn, and then its own. So beside helpers that are no
 * crowds a fault thread answers crowds for a moment, and then lets them rest for a moment, in which the CPUs run whom
 * it woke. Whose threads cannot keep a fault thread busy never rest. What a resting crowd asks for waits on its uffd.
 *
 * Faults are read before events. A crowd that rests has always faults to be read, and one that is answered one by one
 * mostly has: the thread that unmaps or removes memory would wait until the others are done. So now and then all that
 * waits is read, and the faults among it are put off.
 */
#include "fault_internal.h"

enum {
    CROWD_TID_BITS = 64, /* threads are counted by so many numbers: with as many CPUs nobody is a crowd */
};
static const uint64_t window_ns = 10000000; /* in which they are counted */
static const uint64_t lasts_ns = 100000000; /* since so many were counted, or since one that is no crowd faulted */
static const uint64_t turn_ns = 30000;      /* two or three pages from the page cache, and their threads' turns */
static const uint64_t rest_ns = 40000;
static const uint64_t drain_ns = 10000000;        /* from one time to the next at least, */
static const uint64_t drain_a_fault_ns = 1000000; /* and so much for each thread that is woken, and faults again */

int is_crowd(const struct remote_fd *remote, uint64_t now_ns)
{
    return now_ns < __atomic_load_n(&remote->crowd_until_ns, __ATOMIC_RELAXED);
}

int has_crowd(const struct fault_threads *ft, uint64_t now_ns)
{
    return now_ns < __atomic_load_n(&ft->crowd_until_ns, __ATOMIC_RELAXED);
}

void crowd_note_fault(struct fault_threads *ft, struct remote_fd *remote, uint32_t tid, uint64_t now_ns)
{
    if (now_ns - __atomic_load_n(&remote->crowd_window_ns, __ATOMIC_RELAXED) > window_ns) {
        __atomic_store_n(&remote->crowd_window_ns, now_ns, __ATOMIC_RELAXED);
        __atomic_store_n(&remote->crowd_threads, 0, __ATOMIC_RELAXED);
    }
    uint64_t threads = __atomic_or_fetch(&remote->crowd_threads, 1ull << tid % CROWD_TID_BITS, __ATOMIC_RELAXED);
    if ((uint32_t)__builtin_popcountll(threads) > ft->n_cpus) {
        __atomic_store_n(&remote->crowd_until_ns, now_ns + lasts_ns, __ATOMIC_RELAXED);
        __atomic_store_n(&ft->crowd_until_ns, now_ns + lasts_ns, __ATOMIC_RELAXED);
    } else if (!is_crowd(remote, now_ns)) {
        __atomic_store_n(&ft->others_until_ns, now_ns + lasts_ns, __ATOMIC_RELAXED);
    }
}

int crowd_must_rest(struct fault_worker *worker, struct remote_fd *remote, uint64_t now_ns)
{
    if (!is_crowd(remote, now_ns) || worker->crowd_spent_ns < turn_ns || worker->n_resting == CROWDS_RESTING_MAX ||
        now_ns >= __atomic_load_n(&worker->ft->others_until_ns, __ATOMIC_RELAXED))
        return 0;
    if (!worker->n_resting)
        worker->crowd_rest_end_ns = now_ns + rest_ns;
    worker->resting[worker->n_resting++] = remote->id;
    change_polling(worker, remote, 0);
    return 1;
}

void crowd_note_answered(struct fault_worker *worker, const struct remote_fd *remote, uint64_t since_ns)
{
    if (is_crowd(remote, since_ns))
        worker->crowd_spent_ns += clock_ns() - since_ns;
}

void crowd_end_turn(struct fault_worker *worker)
{
    for (uint32_t i = 0; i < worker->n_resting; i++) {
        struct remote_fd *remote = remote_by_id(worker->ft, worker->resting[i]);

        if (!remote)
            continue;
        home_poll_again(worker, remote);
        remote_fd_put(remote);
    }
    worker->n_resting = 0;
    worker->crowd_spent_ns = 0;
}

int crowd_begin_drain(struct remote_fd *remote, uint64_t now_ns)
{
    uint64_t due_ns = __atomic_load_n(&remote->crowd_drain_ns, __ATOMIC_RELAXED);

    return is_crowd(remote, now_ns) && now_ns >= due_ns &&
           __atomic_compare_exchange_n(&remote->crowd_drain_ns, &due_ns, now_ns + drain_ns, 0, __ATOMIC_RELAXED,
                                       __ATOMIC_RELAXED);
}

void crowd_end_drain(struct remote_fd *remote, uint64_t now_ns, uint32_t n_woken)
{
    uint64_t pause_ns = n_woken * drain_a_fault_ns;

    __atomic_store_n(&remote->crowd_drain_ns, now_ns + (pause_ns > drain_ns ? pause_ns : drain_ns), __ATOMIC_RELAXED);
}
