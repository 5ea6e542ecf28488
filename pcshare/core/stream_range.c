/* stream_range: the ranges that helpers asked for: added, told when they are complete or lost, dropped. See stream.h.
 */
#include "fault_internal.h"

#include <errno.h>
#include <stdlib.h>

#include "bitmap.h"
#include "stream_range.h"
#include "trace.h"

enum { AHEAD_RANGES_MAX = 32 }; /* of one attachment: a window for each of as many threads */

/* Changed under the lock; who has placed a page looks without it whether there is any range at all. */
static void set_link(struct stream_range **rangep, struct stream_range *range)
{
    __atomic_store_n(rangep, range, __ATOMIC_RELAXED);
}

static void append(struct stream *s, struct stream_range *range)
{
    range->next = NULL;
    set_link(s->ranges_tail, range);
    s->ranges_tail = &range->next;
}

void stream_range_push(struct stream *s, struct stream_range *range)
{
    range->next = s->ranges;
    set_link(&s->ranges, range);
    if (s->ranges_tail == &s->ranges)
        s->ranges_tail = &range->next;
}

struct stream_range *stream_range_unlink(struct stream *s, struct stream_range **rangep)
{
    struct stream_range *range = *rangep;

    set_link(rangep, range->next);
    if (s->ranges_tail == &range->next)
        s->ranges_tail = rangep;
    return range;
}

/* Tells the helper, if one is owed an answer, and frees. Not under the lock. */
void stream_range_end(struct fault_threads *ft, struct stream_range *range, int status, uint64_t offset,
                      uint64_t length)
{
    if (range->remote) {
        __atomic_sub_fetch(range->counted, 1, __ATOMIC_RELAXED); /* first: the answer may bring the next REQUEST */
        if (range->wait && status == 0)
            lift_before_told(range->remote, range->start, range->end);
        if (range->wait)
            send_done(ft, range->remote, range->cookie, status, offset, length);
        remote_fd_put(range->remote);
    }
    free(range);
}

void stream_range_end_list(struct fault_threads *ft, struct stream_range *list, int status, uint64_t page, uint64_t n)
{
    while (list) {
        struct stream_range *range = list;
        list = range->next;
        stream_range_end(ft, range, status, page * range->block->page_size, n * range->block->page_size);
    }
}

struct stream_range *stream_range_new(struct ramblock *block, uint64_t start, uint64_t end)
{
    struct stream_range *range = calloc(1, sizeof(*range));

    if (range) {
        range->block = block;
        range->start = range->issue = range->cursor = start;
        range->end = end;
    }
    return range;
}

static void count_for(struct stream_range *range, struct remote_fd *remote)
{
    range->remote = remote_fd_get(remote);
    range->counted = range->wait ? &remote->requests_in_flight : &remote->hints_in_flight;
    __atomic_add_fetch(range->counted, 1, __ATOMIC_RELAXED);
}

static void add(struct fault_threads *ft, struct stream_range *range)
{
    struct stream *s = &ft->stream;
    struct ramblock *block = range->block;
    struct remote_fd *remote = range->remote;
    uint64_t start = range->start, end = range->end;

    trace_point(TRACE_RANGE_REQUEST, block->index, remote ? remote->id : 0, start, end - start);
    pthread_mutex_lock(&s->lock);
    /* Under the lock: a page that is placed or lost from now on finds the range. */
    uint64_t lost = range->wait ? bitmap_next_set(block->failed, start, end) : end;
    uint64_t lost_end = bitmap_next_clear(block->failed, lost, end);
    struct stream_range **rangep = s->ranges_tail;
    append(s, range); /* before the look: who places a page looks for ranges after it has set the bit */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    range->cursor = ramblock_next_missing(block, start, end);
    int cut_off = remote && __atomic_load_n(&remote->disabled, __ATOMIC_ACQUIRE); /* its ranges have been dropped */
    int over = lost < end || range->cursor == end || cut_off;
    if (over)
        stream_range_unlink(s, rangep);
    else
        pthread_cond_broadcast(&s->wake);
    pthread_mutex_unlock(&s->lock);
    if (lost < end)
        stream_range_end(ft, range, -EIO, lost * block->page_size, (lost_end - lost) * block->page_size);
    else if (over)
        stream_range_end(ft, range, 0, 0, 0);
}

int stream_add_range(struct fault_threads *ft, struct ramblock *block, uint64_t start, uint64_t end,
                     struct remote_fd *remote, uint32_t cookie, int wait)
{
    struct stream_range *range = stream_range_new(block, start, end);

    if (!range)
        return -ENOMEM;
    range->cookie = cookie;
    range->wait = wait;
    if (remote)
        count_for(range, remote);
    add(ft, range);
    return 0;
}

/* A hint among the helper's own: who has as many under way as it may gets no more. */
void stream_add_ahead(struct fault_threads *ft, struct remote_fd *remote, uint64_t start, uint64_t end)
{
    struct stream_range *range = NULL;

    if (__atomic_load_n(&remote->hints_in_flight, __ATOMIC_RELAXED) < AHEAD_RANGES_MAX)
        range = stream_range_new(remote->block, start, end);
    if (!range)
        return;
    range->is_ahead = 1;
    count_for(range, remote);
    add(ft, range);
}

/* But for what is lost, which is asked for again when the block is resumed. */
static void clear_requested(struct ramblock *block, uint64_t page, uint64_t end)
{
    while (page < end) {
        uint64_t lost = bitmap_next_set(block->failed, page, end);

        bitmap_clear_range(block->requested, page, lost);
        page = bitmap_next_clear(block->failed, lost, end);
    }
}

/* A range has passed by what was on its way for somebody else. */
void stream_give_back(struct fault_threads *ft, struct ramblock *block, uint64_t page, uint64_t n)
{
    struct stream *s = &ft->stream;

    clear_requested(block, page, page + n);
    if (ramblock_next_missing(block, page, page + n) == page + n)
        return;
    pthread_mutex_lock(&s->lock);
    for (struct stream_range *range = s->ranges; range; range = range->next)
        if (range->block == block && !range->is_ahead && range->start < page + n && range->issue > page)
            range->issue = page > range->start ? page : range->start;
    pthread_cond_broadcast(&s->wake);
    pthread_mutex_unlock(&s->lock);
}

/* Takes out the ranges for which decide says so; the caller ends them. */
static struct stream_range *take(struct stream *s, int (*decide)(struct stream_range *range, const void *argument),
                                 const void *argument)
{
    struct stream_range *list = NULL, **rangep = &s->ranges;

    while (*rangep) {
        if (!decide(*rangep, argument)) {
            rangep = &(*rangep)->next;
            continue;
        }
        struct stream_range *range = stream_range_unlink(s, rangep);
        range->next = list;
        list = range;
    }
    return list;
}

struct page_span {
    const struct ramblock *block;
    uint64_t page, n;
};

static int is_complete_now(struct stream_range *range, const void *argument)
{
    const struct page_span *span = argument;

    if (range->block != span->block || range->cursor < span->page || range->cursor >= span->page + span->n)
        return 0;
    range->cursor = ramblock_next_missing(range->block, range->cursor, range->end);
    return range->cursor == range->end;
}

void stream_note_received(struct fault_threads *ft, struct ramblock *block, uint64_t page, uint64_t n)
{
    struct stream *s = &ft->stream;
    struct page_span span = {.block = block, .page = page, .n = n};

    if (!__atomic_load_n(&s->ranges, __ATOMIC_SEQ_CST))
        return;
    pthread_mutex_lock(&s->lock);
    struct stream_range *list = take(s, is_complete_now, &span);
    pthread_mutex_unlock(&s->lock);
    stream_range_end_list(ft, list, 0, 0, 0);
}

static int waits_for_lost(struct stream_range *range, const void *argument)
{
    const struct page_span *span = argument;

    return range->block == span->block && range->wait && range->start <= span->page && span->page < range->end;
}

/* The first part of the range that is lost; the page itself may have come meanwhile. */
static void tell_loss(struct fault_threads *ft, struct stream_range *range, uint64_t page)
{
    const struct ramblock *block = range->block;
    uint64_t first = bitmap_next_set(block->failed, range->start, range->end);
    uint64_t end = bitmap_next_clear(block->failed, first, range->end);

    if (first == range->end) {
        first = page;
        end = page + 1;
    }
    stream_range_end(ft, range, -EIO, first * block->page_size, (end - first) * block->page_size);
}

void stream_note_lost(struct fault_threads *ft, struct ramblock *block, uint64_t page)
{
    struct stream *s = &ft->stream;
    struct page_span span = {.block = block, .page = page, .n = 1};

    pthread_mutex_lock(&s->lock);
    struct stream_range *list = take(s, waits_for_lost, &span);
    pthread_mutex_unlock(&s->lock);
    while (list) {
        struct stream_range *range = list;

        list = range->next;
        tell_loss(ft, range, page);
    }
}

static int is_of_remote(struct stream_range *range, const void *argument)
{
    return range->remote == argument;
}

void stream_drop_remote(struct fault_threads *ft, const struct remote_fd *remote)
{
    struct stream *s = &ft->stream;

    pthread_mutex_lock(&s->lock);
    struct stream_range *list = take(s, is_of_remote, remote);
    pthread_mutex_unlock(&s->lock);
    for (struct stream_range *range = list; range; range = range->next)
        range->wait = 0;
    stream_range_end_list(ft, list, 0, 0, 0);
}

static int is_of_block(struct stream_range *range, const void *argument)
{
    return range->block == argument;
}

struct stream_range *stream_range_take_block(struct stream *s, const struct ramblock *block)
{
    return take(s, is_of_block, block);
}
