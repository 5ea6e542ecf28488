/* fault_ahead: what a fault brings besides its page: what its thread is about to touch (read_ahead.h says how much of
 * that), and what the source reads along with the page in any case.
 *
 * Where the source has its bytes at hand the fault thread brings them itself: a few with the faulted page, the rest
 * when everybody whose fault it has read is answered, and no more than others can wait for. What it cannot read at
 * once, or has no time for, the stream's thread asks for. What fails is forgotten: the block is paused, and a page is
 * lost, only for who has touched it. A source that pushes goes on by itself after the page that was asked for.
 */
#include "fault_internal.h"

#include <unistd.h>

#include "bitmap.h"
#include "read_ahead.h"
#include "thread.h"

enum {
    AHEAD_PIECE_BYTES = 64 << 10,   /* read and placed in a row; who waits for another fault waits for that */
    AHEAD_BYTES_MAX = 1 << 20,      /* what a fault thread brings after one batch of faults */
    AHEAD_BYTES_BESIDE = 256 << 10, /* while others fault too */
    AHEAD_RUN_PAGES = 256,          /* received pages before a fault that are looked at: a piece of the stream */
};

void fault_threads_set_read_ahead(struct fault_threads *ft, uint64_t bytes)
{
    ft->read_ahead_bytes = bytes;
}

static uint64_t at_least_one(uint64_t n)
{
    return n ? n : 1;
}

static uint64_t at_most(uint64_t n, uint64_t most)
{
    return n < most ? n : most;
}

/* ---- what is to be brought ---- */

/* A page of the received bitmap has so many bits; whether the next one has memory is found out by the fault there. */
static uint64_t bits_of_page(void)
{
    return (uint64_t)getpagesize() * 8;
}

/* Where the received pages before this one begin. */
static uint64_t run_start(const struct ramblock *block, uint64_t page)
{
    uint64_t start = page, first = page > AHEAD_RUN_PAGES ? page - AHEAD_RUN_PAGES : 0;

    while (start > first && ramblock_is_received(block, start - 1))
        start--;
    return start;
}

void ahead_plan(struct fault_threads *ft, struct remote_fd *remote, uint64_t page, uint32_t tid,
                struct read_ahead_plan *plan)
{
    const struct ramblock *block = remote->block;
    struct read_ahead_reach reach = {.start_pages = at_least_one(READ_AHEAD_START_BYTES / block->page_size),
                                     .most_pages = at_least_one(ft->read_ahead_bytes / block->page_size)};

    *plan = (struct read_ahead_plan){.near_end = page + 1, .start = page + 1, .end = page + 1};
    if (!ft->read_ahead_bytes || served_block_of(ft, block)->pushes)
        return;
    read_ahead_note(remote->ahead, tid, page, run_start(block, page), &reach, plan);
    uint64_t edge = at_most((page / bits_of_page() + 1) * bits_of_page(), block->page_count);
    plan->near_end = at_most(plan->near_end, edge);
    plan->end = at_most(plan->end, edge);
}

/* How many pages from this one on are missing and not under way, most and a piece at most; it itself is. */
static uint64_t piece_at(const struct ramblock *block, uint64_t page, uint64_t end)
{
    uint64_t n = 1, most = at_least_one(AHEAD_PIECE_BYTES / block->page_size);

    while (n < most && page + n < end && ramblock_next_missing(block, page + n, page + n + 1) == page + n &&
           !bitmap_test(block->requested, page + n))
        n++;
    return n;
}

uint64_t ahead_with(const struct ramblock *block, uint64_t page, const struct read_ahead_plan *plan)
{
    return ramblock_is_hole(block, page) ? 1 : piece_at(block, page, plan->near_end);
}

uint64_t ahead_claim_around(struct fault_threads *ft, struct ramblock *block, uint64_t page, uint64_t *firstp)
{
    const struct served_block *served = served_block_of(ft, block);
    uint64_t around = served->channel->around_bytes / block->page_size;

    *firstp = page;
    if (!ft->read_ahead_bytes || around <= 1)
        return 0;
    uint64_t start = page / around * around;
    return ramblock_claim_around(block, page, start, at_most(start + around, block->page_count), firstp);
}

/* ---- bringing it ---- */

static void ask(struct fault_threads *ft, struct remote_fd *remote, uint64_t start, uint64_t end)
{
    start = ramblock_next_missing(remote->block, start, end);
    if (start < end)
        stream_add_ahead(ft, remote, start, end);
}

void ahead_begin(struct fault_threads *ft, struct fault_worker *worker, struct remote_fd *remote,
                 const struct read_ahead_plan *plan, int is_at_hand)
{
    if (plan->start >= plan->end)
        return;
    if (!remote->is_own) /* it hides touches: what it brings is as good as touched */
        working_set_note(ft, remote->block, plan->start, plan->end - plan->start);
    if (!is_at_hand || worker->n_ahead == UFFD_READ_MAX) {
        ask(ft, remote, plan->start, plan->end);
        return;
    }
    stream_follow(ft, remote->block, plan->end - 1); /* the background is not to bring the same */
    worker->ahead[worker->n_ahead++] = (struct ahead_span){.start = plan->start, .end = plan->end};
}

/* The first page of [page, end) that is missing and not under way, or end. */
static uint64_t next_free(const struct ramblock *block, uint64_t page, uint64_t end)
{
    while (page < end) {
        uint64_t missing = ramblock_next_missing(block, page, end);

        page = bitmap_next_clear(block->requested, missing, end);
        if (page == missing)
            break;
    }
    return page;
}

static int bring_piece(struct fault_threads *ft, struct fault_worker *worker, struct served_block *served,
                       uint64_t page, uint64_t n)
{
    uint64_t placed;
    int rc = place_at_hand(worker, served, page, n, &placed);

    if (rc != NOT_AT_HAND && rc >= 0)
        after_placing(ft, served, page, n, placed, PLACED_STREAM);
    else if (rc < 0)
        after_placing_received(ft, served, page, page + n, placed, PLACED_STREAM);
    return rc;
}

/* Returns what is left of budget, in bytes. */
static uint64_t bring_span(struct fault_worker *worker, struct remote_fd *remote, struct ahead_span span,
                           uint64_t budget)
{
    struct fault_threads *ft = worker->ft;
    struct ramblock *block = remote->block;
    struct served_block *served = served_block_of(ft, block);
    uint64_t page = next_free(block, span.start, span.end);

    while (page < span.end) {
        uint64_t n = piece_at(block, page, span.end), bytes = n * block->page_size;
        int rc = NOT_AT_HAND;

        if (bytes > budget || worker_is_wanted(worker, remote))
            budget = 0;
        else
            rc = bring_piece(ft, worker, served, page, n);
        if (rc == NOT_AT_HAND)
            ask(ft, remote, page, span.end);
        if (rc == NOT_AT_HAND || rc < 0)
            break;
        budget -= bytes;
        page = next_free(block, page + n, span.end);
    }
    return budget;
}

void ahead_bring(struct fault_worker *worker, struct remote_fd *remote)
{
    if (!worker->n_ahead)
        return;
    uint64_t budget = is_beside_others(worker->ft, clock_ns()) ? AHEAD_BYTES_BESIDE : AHEAD_BYTES_MAX;
    for (uint32_t i = 0; i < worker->n_ahead; i++)
        budget = bring_span(worker, remote, worker->ahead[i], budget);
    worker->n_ahead = 0;
}
