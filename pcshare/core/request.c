/* request: a fault's way to its page: received, or a hole, or read at once, or asked of the source and waited for.
 *
 * A page that the source has at hand (page cache) is read and placed by the fault thread itself: handing it to another
 * thread would cost a wake-up, which is most of a fault's time. What would block is handed on. Every path ends in a
 * wake, a poison mark, or an entry in waiters that a later answer or resume finds.
 */
#include "fault_internal.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>

#include "bitmap.h"
#include "read_ahead.h"
#include "thread.h"
#include "trace.h"
#include "uffd.h"

enum { TOLD_RECEIVED = 1, TOLD_BEFORE = 2, TOLD_ASKED = 0 }; /* details of TRACE_REQUEST_SHARED */
enum { PROGRESS_STEPS = 256 };
enum { LIFT_TRIES_MAX = 1000 }; /* EAGAIN in a row: the helper's thread whose event was read has not run yet */
enum { LIFT_TRIES_MIN = 3 };    /* where that was so at an earlier page */
enum { LIFT_PAGES_MAX = 256 };
enum { GIVE_BYTES_MAX = 64 << 10 }; /* mapped at one fault of a strict helper: 16 pages cost little more than one */

uint64_t source_length(const struct ramblock *block, uint64_t page, uint64_t n)
{
    uint64_t offset = page * block->page_size, length = n * block->page_size;

    return offset + length > block->used_length ? block->used_length - offset : length;
}

/* ---- ends of a wait ---- */

static void record_blocktime(struct fault_threads *ft, const struct remote_fd *remote, uint64_t start_ns)
{
    uint64_t us = (clock_ns() - start_ns) / 1000;

    if (remote->status)
        status_histogram_add(&remote->status->blocktime, us);
    if (!remote->is_own)
        status_histogram_add(&ft->status->blocktime, us);
}

/* A strict helper is given a page that is received, and never one that is only there. */
static void wake_remote(const struct remote_fd *remote, uint64_t page)
{
    int gives = remote->is_strict && ramblock_is_received(remote->block, page);

    trace_point(TRACE_WAKE, remote->block->index, remote->id, page, (uint64_t)gives);
    /* One failing waker does not keep the others from being woken. Who cannot be given the page now faults again. */
    if (!gives || remote_fd_give(remote, page, page, page + 1) == -EAGAIN)
        (void)remote_fd_wake(remote, page);
}

/* One call wakes every thread of a remote fd that waits for the page. */
static int comes_earlier(const struct waiter *list, const struct waiter *waiter)
{
    for (; list != waiter; list = list->next)
        if (list->remote == waiter->remote && list->page == waiter->page)
            return 1;
    return 0;
}

static void wake_list(struct fault_threads *ft, struct waiter *list)
{
    for (struct waiter *waiter = list; waiter; waiter = waiter->next) {
        if (!comes_earlier(list, waiter))
            wake_remote(waiter->remote, waiter->page);
        record_blocktime(ft, waiter->remote, waiter->start_ns);
    }
    waiters_free_list(list);
}

/* A mark on a page that arrived while it was made must go again: a present page that nobody touched yet takes the mark.
 */
static int mark_poison(struct ramblock *block, struct remote_fd *remote, uint64_t page)
{
    bitmap_test_and_set(block->poisoned, page);
    __atomic_store_n(&block->status->was_poisoned, 1, __ATOMIC_RELEASE);
    trace_point(TRACE_POISON, block->index, remote->id, page, 0);
    int rc = remote_fd_poison(remote, page);
    if (ramblock_is_received(block, page))
        (void)remote_fd_unpoison(remote, page);
    return rc;
}

static void poison_remote(struct ramblock *block, struct remote_fd *remote, uint64_t page)
{
    (void)mark_poison(block, remote, page);
    wake_remote(remote, page);
}

static void forget_loss(struct ramblock *block, uint64_t page)
{
    if (ramblock_is_received(block, page) && bitmap_test_and_clear(block->failed, page))
        __atomic_fetch_sub(&block->status->lost_pages, 1, __ATOMIC_RELAXED);
}

void lose_page(struct fault_threads *ft, struct served_block *served, uint64_t page)
{
    struct ramblock *block = served->block;

    bitmap_test_and_set(block->requested, page);
    if (!bitmap_test_and_set(block->failed, page))
        __atomic_fetch_add(&block->status->lost_pages, 1, __ATOMIC_RELAXED);
    struct waiter *list = waiters_take_remote(&ft->waiters, block, page);
    for (struct waiter *waiter = list; waiter; waiter = waiter->next) {
        if (!comes_earlier(list, waiter))
            poison_remote(block, waiter->remote, page);
        record_blocktime(ft, waiter->remote, waiter->start_ns);
    }
    waiters_free_list(list);
    stream_note_lost(ft, block, page);
    forget_loss(block, page); /* it may have come, by another way, while it was being lost */
    status_block_notify(block->status);
}

/* ---- after placing ---- */

void credit_helper(struct fault_threads *ft, uint32_t remote_id, uint64_t placed)
{
    struct remote_fd *remote = placed ? remote_by_id(ft, remote_id) : NULL;

    if (!remote)
        return;
    if (remote->status)
        __atomic_fetch_add(&remote->status->demand_pages, placed, __ATOMIC_RELAXED);
    remote_fd_put(remote);
}

/* Pages whose marks go, so many at a time: looking through the table of remote fds costs more than some pages do. */
struct lift {
    uint64_t pages[LIFT_PAGES_MAX];
    uint32_t n;
};

static void lift_one(struct remote_fd *remote, uint64_t page)
{
    /* Whose address space was changing all the while may be stopped there: a few tries a page are enough. */
    int tries = __atomic_load_n(&remote->must_lift, __ATOMIC_ACQUIRE) ? LIFT_TRIES_MAX - LIFT_TRIES_MIN : 0;
    int rc;

    do {
        rc = remote_fd_unpoison(remote, page);
        if (rc == -EFAULT && remote->block->writable)
            (void)ramblock_revive(remote->block, page);
        else if (rc == -EAGAIN)
            sched_yield();
    } while ((rc == -EAGAIN || rc == -EFAULT) && ++tries < LIFT_TRIES_MAX);
    if (rc == -EAGAIN) { /* its next message is answered by another try, which looks for the bit */
        bitmap_test_and_set(remote->block->poisoned, page);
        __atomic_store_n(&remote->must_lift, 1, __ATOMIC_RELEASE);
    }
    (void)remote_fd_wake(remote, page);
}

static void lift_some(struct remote_fd *remote, void *argument)
{
    const struct lift *lift = argument;

    for (uint32_t i = 0; i < lift->n && !remote->is_own; i++)
        lift_one(remote, lift->pages[i]);
}

/* A mark goes when its page is mapped there. One that a helper removes must be in memory for that, and the helper may
 * be about to remove it. */
void lift_poison(struct fault_threads *ft, struct ramblock *block, uint64_t page, uint64_t n)
{
    uint64_t i = page, end = page + n;

    while ((i = bitmap_next_set(block->poisoned, i, end)) < end) {
        struct lift lift = {.n = 0};

        for (; i < end && lift.n < LIFT_PAGES_MAX; i = bitmap_next_set(block->poisoned, i + 1, end)) {
            if (!ramblock_is_received(block, i))
                continue;
            bitmap_test_and_clear(block->poisoned, i);
            bitmap_test_and_set(block->lifted, i); /* first: who is added from now on looks there, others are told */
            __atomic_fetch_add(&block->n_lifted, 1, __ATOMIC_SEQ_CST);
            lift.pages[lift.n++] = i;
        }
        if (lift.n)
            for_each_remote(ft, block, lift_some, &lift);
    }
    for (i = bitmap_next_set(block->failed, page, end); i < end; i = bitmap_next_set(block->failed, i + 1, end))
        forget_loss(block, i);
}

void lift_inherited(struct remote_fd *remote)
{
    struct ramblock *block = remote->block;

    if (remote->is_own || !__atomic_load_n(&block->n_lifted, __ATOMIC_SEQ_CST))
        return;
    for (uint64_t i = bitmap_next_set(block->lifted, 0, block->page_count); i < block->page_count;
         i = bitmap_next_set(block->lifted, i + 1, block->page_count))
        lift_one(remote, i);
}

static void lift_received(struct remote_fd *remote, const uint64_t *marks, uint64_t page, uint64_t end)
{
    for (uint64_t i = bitmap_next_set(marks, page, end); i < end; i = bitmap_next_set(marks, i + 1, end))
        if (ramblock_is_received(remote->block, i))
            lift_one(remote, i);
}

void lift_before_told(struct remote_fd *remote, uint64_t page, uint64_t end)
{
    struct ramblock *block = remote->block;

    if (remote->is_own || !__atomic_load_n(&block->status->was_poisoned, __ATOMIC_ACQUIRE))
        return;
    lift_received(remote, block->poisoned, page, end);
    lift_received(remote, block->lifted, page, end);
}

/* A received page never comes again, and its coordinator may have died before it lifted the marks there. */
void lift_what_is_kept(struct fault_threads *ft)
{
    for (uint32_t i = 0; i < STATUS_BLOCKS_MAX; i++) {
        struct ramblock *block = ft->blocks[i] ? ft->blocks[i]->block : NULL;

        if (block && __atomic_load_n(&block->status->was_poisoned, __ATOMIC_ACQUIRE))
            lift_poison(ft, block, 0, block->page_count);
    }
}

static void tell_progress(struct fault_threads *ft, struct served_block *served)
{
    struct status_block *status = served->block->status;
    uint64_t done = __atomic_load_n(&status->received_pages, __ATOMIC_RELAXED) +
                    __atomic_load_n(&status->hole_pages, __ATOMIC_RELAXED);
    uint64_t step = (uint64_t)((double)done * PROGRESS_STEPS / (double)status->page_count);

    if (__atomic_exchange_n(&served->progress_told, step, __ATOMIC_RELAXED) != step)
        status_block_notify(status);
    if (__atomic_load_n(&served->block->missing_pages, __ATOMIC_ACQUIRE) == 0 &&
        !__atomic_exchange_n(&served->complete, 1, __ATOMIC_ACQ_REL)) {
        trace_point(TRACE_BLOCK_COMPLETE, served->block->index, 0, 0, 0);
        status_block_notify(status);
        tell_block(ft, served, EVENT_BLOCK_COMPLETE, 0, 0);
    }
}

void after_placing(struct fault_threads *ft, struct served_block *served, uint64_t page, uint64_t n, uint64_t placed,
                   int kind)
{
    struct ramblock *block = served->block;

    if (kind == PLACED_DEMAND)
        __atomic_fetch_add(&block->status->demand_pages, placed, __ATOMIC_RELAXED);
    else if (kind == PLACED_STREAM)
        __atomic_fetch_add(&block->status->stream_pages, placed, __ATOMIC_RELAXED);
    wake_list(ft, waiters_take(&ft->waiters, block, page, n));
    lift_poison(ft, block, page, n);
    stream_note_received(ft, block, page, n);
    uint64_t foreign = __atomic_load_n(&block->foreign_pages, __ATOMIC_RELAXED);
    if (__atomic_exchange_n(&served->foreign_told, foreign, __ATOMIC_RELAXED) != foreign)
        tell_block(ft, served, EVENT_BLOCK_FOREIGN, 0, __atomic_load_n(&block->foreign_offset, __ATOMIC_RELAXED));
    tell_progress(ft, served);
}

/* Of pages that another thread is placing at this moment that thread tells. */
void after_placing_received(struct fault_threads *ft, struct served_block *served, uint64_t page, uint64_t end,
                            uint64_t placed, int kind)
{
    uint64_t *received = served->block->received;

    for (uint64_t at = bitmap_next_set(received, page, end); at < end;) {
        uint64_t stop = bitmap_next_clear(received, at, end);
        after_placing(ft, served, at, stop - at, placed, kind);
        placed = 0;
        at = bitmap_next_set(received, stop, end);
    }
}

/* Where placing failed, who waits for a page that is not here waits for a resume, and is not woken. */
void after_bringing(struct fault_threads *ft, struct served_block *served, uint64_t demanded, uint64_t first,
                    uint64_t n, uint64_t placed, int rc)
{
    int is_here = ramblock_is_received(served->block, demanded); /* else who is placing it tells */
    uint64_t placed_demand = is_here && placed;

    if (is_here)
        after_placing(ft, served, demanded, 1, placed_demand, PLACED_DEMAND);
    if (n > 1 && rc >= 0)
        after_placing(ft, served, first, n, placed - placed_demand, PLACED_STREAM);
    else if (n > 1)
        after_placing_received(ft, served, first, first + n, placed - placed_demand, PLACED_STREAM);
}

int fault_threads_place(struct fault_threads *ft, uint32_t block_index, uint64_t page, uint64_t n_pages,
                        const void *bytes, int is_demand, uint64_t *placed_pagesp)
{
    struct served_block *served = NULL;

    *placed_pagesp = 0;
    if (block_index < STATUS_BLOCKS_MAX)
        served = __atomic_load_n(&ft->blocks[block_index], __ATOMIC_ACQUIRE);
    if (!served)
        return -ENOENT;
    struct ramblock *block = served->block;
    if (page > block->page_count || n_pages > block->page_count - page)
        return -EINVAL;
    int rc = bytes ? ramblock_place(block, page, n_pages, bytes, placed_pagesp)
                   : ramblock_place_zeros(block, page, n_pages, placed_pagesp);
    after_placing_received(ft, served, page, page + n_pages, *placed_pagesp, is_demand ? PLACED_DEMAND : PLACED_STREAM);
    return rc < 0 ? rc : 0;
}

int checked_result(const struct ramblock *block, const struct page_request *request, int result)
{
    uint64_t end = request->page + request->n_pages;

    return result == PAGE_CHANNEL_ARRIVED && ramblock_next_missing(block, request->page, end) < end ? -EPROTO : result;
}

/* ---- a page that does not come ---- */

/* The page did not come: whoever waits goes on waiting, visibly, or is told by a poison mark. */
void page_failed(struct fault_threads *ft, struct served_block *served, uint64_t page, int error, uint32_t kind)
{
    if (ramblock_is_received(served->block, page))
        return; /* it came by another way: a touch and a range may both have asked */
    trace_point(TRACE_SOURCE_ERROR, served->block->index, 0, page, (uint64_t)error);
    if (kind == EVENT_BLOCK_SOURCE_ERROR && served->on_source_loss == SOURCE_LOSS_POISON) {
        lose_page(ft, served, page);
    } else {
        __atomic_store_n(&served->paused, 1, __ATOMIC_RELEASE);
        waiters_unask(&ft->waiters, served->block, page);
    }
    tell_block(ft, served, kind, error, page * served->block->page_size);
}

/* ---- a fault ---- */

int place_at_hand(struct fault_worker *worker, struct served_block *served, uint64_t page, uint64_t n,
                  uint64_t *placedp)
{
    struct ramblock *block = served->block;
    uint64_t length = source_length(block, page, n);

    *placedp = 0;
    int rc = page_channel_read_now(served->channel, worker->staging, length, page * block->page_size);
    if (rc != PAGE_CHANNEL_DONE)
        return NOT_AT_HAND; /* an error too: asked the slow way, it is told in one place */
    page_channel_zero_tail(worker->staging, length, n * block->page_size);
    return ramblock_place(block, page, n, worker->staging, placedp);
}

/* Places the page if that takes no waiting: a hole, or what the source can read at once. With it n pages in all, if
 * nothing is in the way of those. */
static int place_now(struct fault_worker *worker, struct served_block *served, uint64_t page, uint64_t n,
                     uint64_t *placedp)
{
    struct ramblock *block = served->block;
    uint64_t placed_alone;

    if (ramblock_is_hole(block, page)) {
        int rc = ramblock_place_zero(block, page);
        *placedp = rc == RAMBLOCK_PLACED;
        return rc;
    }
    int rc = place_at_hand(worker, served, page, n, placedp);
    if (n > 1 && (rc == NOT_AT_HAND || rc < 0)) {
        rc = place_at_hand(worker, served, page, 1, &placed_alone);
        *placedp += placed_alone;
    }
    return rc;
}

/* A helper that waits for more pages than it may is cut off, not one whose pages came by another way and only stand in
 * its queue; what it asked for last is asked in any case, as others may wait for it. */
static void check_demands(struct fault_threads *ft, struct remote_fd *remote)
{
    if (remote->is_own || demand_count(ft, remote) <= FAULT_DEMANDS_IN_FLIGHT_MAX)
        return;
    demand_drop_stale(ft, remote);
    if (demand_count(ft, remote) > FAULT_DEMANDS_IN_FLIGHT_MAX)
        disable_remote(ft, remote, EUSERS, 0);
}

/* Asks for a page because of a fault: at once, where the helper has a place reserved, or in its turn. */
static void ask_for(struct fault_threads *ft, struct remote_fd *remote, uint64_t page, int has_place)
{
    if (has_place)
        demand_ask(ft, remote, page);
    else
        demand_queue_page(ft, remote, page);
    check_demands(ft, remote);
}

/* What a fault waits for. */
enum {
    WAIT_ASKS = 1,    /* the source, asked unless somebody has */
    WAIT_JOINS = 2,   /* another thread, which is placing the page */
    WAIT_RESUMES = 3, /* placing failed: a resume */
};

static void wait_for_page(struct fault_threads *ft, struct served_block *served, struct remote_fd *remote,
                          uint64_t page, uint32_t tid, uint64_t now_ns, int what)
{
    struct ramblock *block = served->block;
    int asks = what == WAIT_ASKS, has_place = asks && demand_reserve(ft, remote);
    int asked = !asks ? WAITERS_UNASKED : has_place ? WAITERS_ASKED : WAITERS_QUEUED;
    int rc = waiters_add(&ft->waiters, block, page, remote, tid, now_ns, asked);
    int is_mine = asks && rc == WAITERS_ASK;

    if (rc > 0)
        trace_point(TRACE_REQUEST_SHARED, block->index, remote->id, page, is_mine ? TOLD_ASKED : TOLD_BEFORE);
    if (rc > 0 && ramblock_is_received(block, page)) { /* it came between the look at the bit and the note */
        wake_list(ft, waiters_take(&ft->waiters, block, page, 1));
        is_mine = 0;
    }
    if (is_mine)
        ask_for(ft, remote, page, has_place);
    else if (has_place)
        demand_release(ft, remote);
    if (rc < 0) { /* no memory for a note: let it fault again */
        sched_yield();
        wake_remote(remote, page);
    } else if (what == WAIT_JOINS && rc == WAITERS_ASK && !bitmap_test(block->placing, page)) {
        wake_list(ft, waiters_take(&ft->waiters, block, page, 1)); /* who was at it gave up: fault again */
    }
    if (__atomic_load_n(&remote->disabled, __ATOMIC_ACQUIRE))
        demand_drop_remote(ft, remote);
}

/* With the received neighbours in its window: a strict helper is likely to touch them next. As the kernel does it. */
static int give_window(const struct remote_fd *remote, uint64_t page)
{
    const struct ramblock *block = remote->block;
    uint64_t window = block->page_size < GIVE_BYTES_MAX ? GIVE_BYTES_MAX / block->page_size : 1;
    uint64_t first = page / window * window, start = page;
    uint64_t last = block->page_count - first < window ? block->page_count : first + window;

    while (start > first && ramblock_is_received(block, start - 1))
        start--;
    return remote_fd_give(remote, page, start, bitmap_next_clear(block->received, page, last));
}

/* Nothing can be mapped while the helper's address space is changing, which it does until its event is read. Woken now,
 * the thread would fault again at once, and faults are handed out before events: enough of them, and the event is never
 * read. follow_uffd wakes it. Only an address space that tells of its changes can be like that. */
static int put_off(struct fault_worker *worker, const struct remote_fd *remote, int rc)
{
    int puts_off = rc == -EAGAIN && remote->has_events;

    worker->n_put_off += (uint32_t)puts_off;
    worker->is_answered |= !puts_off;
    return puts_off;
}

/* A received page faults: the message is older than the page; or the helper is strict and touches it for the first
 * time; or, in a writable block, a helper has removed it. */
static void answer_received(struct fault_threads *ft, struct fault_worker *worker, struct remote_fd *remote,
                            uint64_t page, uint64_t now_ns)
{
    struct ramblock *block = remote->block;
    int rc = 0;

    trace_point(TRACE_REQUEST_SHARED, block->index, remote->id, page, TOLD_RECEIVED);
    if (remote->is_strict) {
        rc = give_window(remote, page);
        if (put_off(worker, remote, rc))
            return;
    }
    if (!remote->is_strict || rc < 0) {
        if (block->writable)
            (void)ramblock_revive(block, page);
        wake_remote(remote, page);
    }
    record_blocktime(ft, remote, now_ns);
}

static void count_fault(struct fault_threads *ft, struct remote_fd *remote)
{
    if (remote->is_own)
        return;
    __atomic_fetch_add(&ft->status->fault_count, 1, __ATOMIC_RELAXED);
    __atomic_fetch_add(&remote->status->faults, 1, __ATOMIC_RELAXED);
}

/* A page that nobody has received yet: at hand, or waited for; and what its thread will touch next. */
static void bring_page(struct fault_threads *ft, struct fault_worker *worker, struct served_block *served,
                       struct remote_fd *remote, uint64_t page, uint32_t tid, uint64_t now_ns)
{
    struct read_ahead_plan plan;
    uint64_t placed;

    ahead_plan(ft, remote, page, tid, &plan);
    uint64_t n = ahead_with(served->block, page, &plan);
    int rc = place_now(worker, served, page, n, &placed);
    int is_at_hand = rc != NOT_AT_HAND;

    credit_helper(ft, remote->id, placed > 0);
    if (rc == RAMBLOCK_PLACED && ramblock_is_received(served->block, page)) {
        uint64_t wake_ns = home_may_leave(worker, remote, tid, now_ns) ? clock_ns() : 0;
        wake_remote(remote, page);
        if (wake_ns)
            home_note_wake(worker, remote, wake_ns);
        record_blocktime(ft, remote, now_ns);
    } else {
        int what = !is_at_hand ? WAIT_ASKS : rc < 0 ? WAIT_RESUMES : WAIT_JOINS;
        wait_for_page(ft, served, remote, page, tid, now_ns, what);
    }
    if (rc < 0)
        page_failed(ft, served, page, -rc, EVENT_BLOCK_PLACE_ERROR);
    if (is_at_hand) /* placed, or met as a foreign page */
        after_bringing(ft, served, page, page, n, placed, rc);
    if (rc >= 0)
        ahead_begin(ft, worker, remote, &plan, is_at_hand);
}

void request_shared_page(struct fault_threads *ft, struct fault_worker *worker, struct remote_fd *remote, uint64_t page,
                         uint32_t tid)
{
    struct ramblock *block = remote->block;
    struct served_block *served = served_block_of(ft, block);
    uint64_t now_ns = clock_ns();

    trace_point(TRACE_FAULT, block->index, remote->id, page, tid);
    count_fault(ft, remote);
    if (!remote->is_own)
        working_set_note(ft, block, page, 1);
    if (ramblock_is_received(block, page)) {
        answer_received(ft, worker, remote, page, now_ns);
    } else if (bitmap_test(block->failed, page) && !remote->is_own) {
        if (!put_off(worker, remote, mark_poison(block, remote, page)))
            wake_remote(remote, page);
    } else {
        stream_follow(ft, block, page); /* before the wake: whoever then steers the stream finds it following */
        bring_page(ft, worker, served, remote, page, tid, now_ns);
    }
}
