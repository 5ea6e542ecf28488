/* fault_wait: how a fault thread waits for what happens next.
 *
 * To wake a sleeping CPU takes longer than a near server needs for its answer. So a thread that has asked one for a
 * page looks for the answer a while before it sleeps, if it polls for that, and for the rest when a part has come.
 * Where answers do not come meanwhile (from a far server, from one that would run on this very CPU, on a busy machine)
 * it looks more and more seldom, and at last hardly ever. While a crowd rests (fault_crowd.c) it sleeps until the rest
 * is over.
 */
#define _GNU_SOURCE
#include "fault_internal.h"

#include <poll.h>
#include <sched.h>
#include <time.h>

#include "thread.h"

enum {
    WAIT_LOOK_NS = 40000,    /* somewhat more than waking the server's CPU, and what it does then */
    WAIT_SKIPPED_MAX = 4096, /* waits without a look, after many looks in vain */
};

void wait_note_fault(struct fault_worker *worker, const struct remote_fd *remote)
{
    if (!__atomic_load_n(&worker->ft->demand_in_flight, __ATOMIC_RELAXED)) { /* the usual case: it was at hand */
        worker->awaits_answer = 0;
        return;
    }
    struct served_block *served = served_block_of(worker->ft, remote->block);
    int is_polled_for = served && !served->pushes && page_channel_poll_fd(served->channel) >= 0;
    worker->awaits_answer = is_polled_for && home_note_asked(worker, served);
}

/* A server may send the head of an answer and then its bytes. With more than one page in flight it was more likely all
 * of one, and while the others take their time the CPU is for whom it woke. */
void wait_note_answer(struct fault_worker *worker)
{
    if (__atomic_load_n(&worker->ft->demand_in_flight, __ATOMIC_RELAXED) == 1)
        worker->awaits_answer = 1;
}

static int has_answer(const struct epoll_event *events, int n)
{
    for (int i = 0; i < n; i++)
        if (events[i].data.u64 >> POLL_KIND_SHIFT == POLL_CHANNEL)
            return 1;
    return 0;
}

static int look(struct fault_worker *worker, struct epoll_event *events, int most)
{
    uint64_t end_ns = clock_ns() + WAIT_LOOK_NS;
    int n;

    do
        n = epoll_wait(worker->epoll_fd, events, most, 0);
    while (n == 0 && clock_ns() < end_ns);
    if (n == 0) {
        worker->skips = worker->skips ? 2 * worker->skips : 1;
        worker->skips = worker->skips < WAIT_SKIPPED_MAX ? worker->skips : WAIT_SKIPPED_MAX;
        worker->skips_left = worker->skips;
    } else if (has_answer(events, n)) {
        worker->skips /= 2;
    }
    return n;
}

static int sleep_until(struct fault_worker *worker, struct epoll_event *events, int most, uint64_t then_ns)
{
    struct pollfd polled = {.fd = worker->epoll_fd, .events = POLLIN};
    uint64_t now_ns = clock_ns();
    struct timespec left = {.tv_nsec = then_ns > now_ns ? (long)(then_ns - now_ns) : 0};

    (void)ppoll(&polled, 1, &left, NULL);
    return epoll_wait(worker->epoll_fd, events, most, 0);
}

/* A helper whose thread was woken on another CPU is followed there, and does not see this one idle for a while. What is
 * runnable here goes first. */
static int stay_awake(struct fault_worker *worker, struct epoll_event *events, int most)
{
    int n = epoll_wait(worker->epoll_fd, events, most, 0); /* it may have faulted again, here */
    struct remote_fd *remote = n == 0 ? home_follow(worker) : NULL;

    if (!remote)
        return n;
    uint64_t left_ns = clock_ns();
    while (n == 0 && home_keeps_awake(worker, remote, left_ns, clock_ns())) {
        sched_yield();
        n = epoll_wait(worker->epoll_fd, events, most, 0);
    }
    remote_fd_put(remote);
    return n;
}

int wait_for_events(struct fault_worker *worker, struct epoll_event *events, int most)
{
    int n = 0;

    if (worker->n_resting && clock_ns() >= worker->crowd_rest_end_ns)
        crowd_end_turn(worker);
    if (worker->n_resting) { /* no look for an answer: the CPU is for others now */
        worker->awaits_answer = 0;
        worker->left_id = 0;
        return sleep_until(worker, events, most, worker->crowd_rest_end_ns);
    }
    if (worker->awaits_answer && worker->skips_left == 0)
        n = look(worker, events, most);
    else if (worker->awaits_answer)
        worker->skips_left--;
    worker->awaits_answer = 0;
    if (n == 0 && worker->crowd_spent_ns) {
        n = epoll_wait(worker->epoll_fd, events, most, 0);
        if (n == 0)
            crowd_end_turn(worker); /* it is not too fast */
    }
    if (n == 0 && worker->left_id)
        n = stay_awake(worker, events, most);
    worker->left_id = 0;
    return n != 0 ? n : epoll_wait(worker->epoll_fd, events, most, -1);
}
