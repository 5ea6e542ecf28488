/* fault_timeout: what somebody waits for and the source does not bring in time.
 *
 * The stream's thread looks now and then at the pages that faults wait for, and at the pieces that ranges wait for: no
 * timer a fault, and no Python. What is late is told, with SOURCE_LOSS_POISON also lost; the source still owes it, and
 * it may come after all. Asks for nothing again: that is resume's. What is not asked for yet, because others of its
 * helper are before it, is not late: that is no source's fault.
 */
#include "fault_internal.h"

#include <errno.h>

#include "stream_range.h"
#include "trace.h"

enum {
    LOOKS_A_TIMEOUT = 8, /* a page is found late at most this part of the timeout too late */
};
static const uint64_t look_ns_min = 5000000, look_ns_max = 500000000;
static const uint64_t ns_per_ms = 1000000;

void fault_threads_set_fault_timeout(struct fault_threads *ft, uint64_t timeout_ms)
{
    ft->fault_timeout_ns = timeout_ms < UINT64_MAX / ns_per_ms ? timeout_ms * ns_per_ms : UINT64_MAX;
}

/* ---- late pages ---- */

static void lose_missing(struct fault_threads *ft, struct served_block *served, uint64_t page, uint64_t end)
{
    page = ramblock_next_missing(served->block, page, end);
    for (; page < end; page = ramblock_next_missing(served->block, page + 1, end))
        lose_page(ft, served, page);
}

/* Pages [page, end) were demanded long ago. */
static void pages_are_late(struct fault_threads *ft, struct ramblock *block, uint64_t page, uint64_t end)
{
    struct served_block *served = served_block_of(ft, block);

    page = ramblock_next_missing(block, page, end);
    if (page == end)
        return; /* at this moment they came */
    trace_point(TRACE_SOURCE_ERROR, block->index, 0, page, ETIMEDOUT);
    served->late = 1;
    if (served->on_source_loss == SOURCE_LOSS_POISON)
        lose_missing(ft, served, page, end);
    tell_late(ft, served, ETIMEDOUT, page * block->page_size);
}

static void look_at_waiters(struct fault_threads *ft, uint64_t then_ns)
{
    struct ramblock *block;
    uint32_t bucket = 0;
    uint64_t page;

    while (waiters_next_late(&ft->waiters, then_ns, &bucket, &block, &page))
        pages_are_late(ft, block, page, page + 1);
}

struct page_span {
    uint64_t start, end;
};

/* What of it somebody waits for: all that was asked for because of that; else what ranges cannot ask for themselves,
 * because it is under way, with what lies between them. */
static struct page_span waited_part(const struct stream *s, const struct stream_piece *piece)
{
    uint64_t first = piece->request.page, end = first + piece->request.n_pages;
    struct page_span part = {.start = end, .end = first};

    if (piece->kind == PLACED_DEMAND)
        return (struct page_span){.start = first, .end = end};
    for (const struct stream_range *range = s->ranges; range; range = range->next) {
        if (!range->wait || range->block != piece->block || range->start >= end || range->end <= first)
            continue;
        part.start = range->start < part.start ? range->start : part.start;
        part.end = range->end > part.end ? range->end : part.end;
    }
    return (struct page_span){.start = part.start > first ? part.start : first, .end = part.end < end ? part.end : end};
}

/* Under the stream's lock: whether somebody waits too long for a part of it that has not been told. */
static int is_newly_late(const struct stream *s, struct stream_piece *piece, uint64_t then_ns, struct page_span *partp)
{
    if (!piece->block || piece->is_answered || piece->asked_ns > then_ns)
        return 0;
    piece->is_old = 1;
    *partp = waited_part(s, piece);
    if (partp->start >= partp->end || (piece->late_start <= partp->start && partp->end <= piece->late_end))
        return 0;
    piece->late_start = partp->start;
    piece->late_end = partp->end;
    return 1;
}

/* Pieces begin and end in this thread alone. */
static void look_at_pieces(struct fault_threads *ft, uint64_t then_ns)
{
    struct stream *s = &ft->stream;
    struct page_span part;

    for (uint32_t i = 0; i < STREAM_WINDOW; i++) {
        pthread_mutex_lock(&s->lock);
        int is_late = is_newly_late(s, &s->pieces[i], then_ns, &part);
        pthread_mutex_unlock(&s->lock);
        if (is_late)
            pages_are_late(ft, s->pieces[i].block, part.start, part.end);
    }
}

static int has_late_piece(const struct stream *s, const struct ramblock *block)
{
    for (uint32_t i = 0; i < STREAM_WINDOW; i++)
        if (s->pieces[i].block == block && s->pieces[i].late_end)
            return 1;
    return 0;
}

static int is_on_time(struct fault_threads *ft, const struct served_block *served)
{
    if (served->on_source_loss == SOURCE_LOSS_POISON)
        return !__atomic_load_n(&served->block->status->lost_pages, __ATOMIC_RELAXED);
    return !waiters_has_late(&ft->waiters, served->block) && !has_late_piece(&ft->stream, served->block);
}

/* A block that waits for nothing late any more says so, and goes on by itself. */
static void look_at_blocks(struct fault_threads *ft)
{
    for (uint32_t i = 0; i < STATUS_BLOCKS_MAX; i++) {
        struct served_block *served = __atomic_load_n(&ft->blocks[i], __ATOMIC_ACQUIRE);

        if (!served || !served->late || !is_on_time(ft, served))
            continue;
        served->late = 0;
        tell_late(ft, served, 0, 0);
    }
}

static void look(struct fault_threads *ft, uint64_t now_ns)
{
    uint64_t then_ns = now_ns - ft->fault_timeout_ns;

    if (now_ns > ft->fault_timeout_ns) {
        look_at_waiters(ft, then_ns);
        demand_give_up_late(ft, then_ns);
        look_at_pieces(ft, then_ns);
        look_at_blocks(ft);
    }
}

static uint64_t clamp(uint64_t value, uint64_t least, uint64_t most)
{
    return value < least ? least : value > most ? most : value;
}

uint64_t timeout_look(struct fault_threads *ft)
{
    struct stream *s = &ft->stream;
    uint64_t now_ns;

    if (!ft->fault_timeout_ns || s->quit)
        return UINT64_MAX;
    now_ns = clock_ns();
    if (now_ns < ft->next_look_ns)
        return ft->next_look_ns - now_ns;
    uint64_t pause_ns = clamp(ft->fault_timeout_ns / LOOKS_A_TIMEOUT, look_ns_min, look_ns_max);
    ft->next_look_ns = now_ns + pause_ns;
    s->submitting = 1; /* who removes a block waits for this */
    pthread_mutex_unlock(&s->lock);
    look(ft, now_ns);
    pthread_mutex_lock(&s->lock);
    s->submitting = 0;
    pthread_cond_broadcast(&s->wake);
    return pause_ns;
}

/* The clock of what is late starts anew with the next question. */
void timeout_forget(struct fault_threads *ft, struct served_block *served)
{
    struct stream *s = &ft->stream;

    waiters_unask_late(&ft->waiters, served->block);
    pthread_mutex_lock(&s->lock);
    for (uint32_t i = 0; i < STREAM_WINDOW; i++) {
        if (s->pieces[i].block == served->block && s->pieces[i].late_end) {
            s->pieces[i].is_old = 0;
            s->pieces[i].late_start = s->pieces[i].late_end = 0;
            s->pieces[i].asked_ns = clock_ns();
        }
    }
    pthread_mutex_unlock(&s->lock);
}
