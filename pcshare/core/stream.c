/* stream: see stream.h. */
#include "fault_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

#include "bitmap.h"
#include "stream_range.h"
#include "stream_replay.h"
#include "thread.h"
#include "trace.h"

enum { HINT_BLOCK_SHIFT = 48 };
/* Small pieces of one block that its source owes; and with those that are answered and not placed, so that buffers are
 * left for what else is to be asked for. */
enum { SMALL_PIECES = 48, SMALL_PIECES_ALL = 56 };
enum { ISSUED = 0, NOTHING_TO_ASK = 1 };
static const uint64_t look_again_ns = 1; /* the lock is opened, and no more */
static const uint64_t forever_ns = UINT64_MAX;
static const uint64_t second_ns = 1000000000ull;

/* ---- life ---- */

int stream_init(struct fault_threads *ft)
{
    struct stream *s = &ft->stream;
    pthread_condattr_t monotonic;

    pthread_mutex_init(&s->lock, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&s->wake, &monotonic);
    pthread_condattr_destroy(&monotonic);
    s->ranges_tail = &s->ranges;
    s->completed_tail = &s->completed;
    uint8_t *buffers = mmap(NULL, (size_t)STREAM_BUFFER_BYTES * STREAM_WINDOW, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (buffers == MAP_FAILED)
        return -errno;
    (void)madvise(buffers, (size_t)STREAM_BUFFER_BYTES * STREAM_WINDOW, MADV_NOHUGEPAGE); /* many hold a few pages */
    for (uint32_t i = 0; i < STREAM_WINDOW; i++) {
        s->pieces[i].ft = ft;
        s->pieces[i].request.bytes = buffers + (size_t)i * STREAM_BUFFER_BYTES;
        s->pieces[i].request.owner = &s->pieces[i];
    }
    return 0;
}

void stream_deinit(struct fault_threads *ft)
{
    struct stream *s = &ft->stream;

    if (s->pieces[0].request.bytes)
        munmap(s->pieces[0].request.bytes, (size_t)STREAM_BUFFER_BYTES * STREAM_WINDOW);
    pthread_cond_destroy(&s->wake);
    pthread_mutex_destroy(&s->lock);
}

static int has_background(uint32_t mode)
{
    return mode != STATUS_STREAM_LAZY && mode != STATUS_STREAM_PAUSED;
}

void stream_poke(struct fault_threads *ft)
{
    struct stream *s = &ft->stream;

    pthread_mutex_lock(&s->lock);
    pthread_cond_broadcast(&s->wake);
    pthread_mutex_unlock(&s->lock);
}

/* Waking the thread for nothing costs a fault on the same CPU as much as its own two switches. Who turns the background
 * on, or adds a range or a replay, wakes it himself. */
void stream_note_no_demand(struct fault_threads *ft)
{
    const struct stream *s = &ft->stream;

    if (has_background(__atomic_load_n(&s->mode, __ATOMIC_SEQ_CST)) || __atomic_load_n(&s->ranges, __ATOMIC_SEQ_CST) ||
        __atomic_load_n(&s->replays, __ATOMIC_SEQ_CST))
        stream_poke(ft);
}

void stream_set(struct fault_threads *ft, uint32_t mode, uint64_t rate)
{
    struct stream *s = &ft->stream;

    pthread_mutex_lock(&s->lock);
    __atomic_store_n(&s->mode, mode, __ATOMIC_SEQ_CST);
    s->rate = rate;
    s->next_allowed_ns = 0;
    pthread_cond_broadcast(&s->wake);
    pthread_mutex_unlock(&s->lock);
}

void stream_follow(struct fault_threads *ft, const struct ramblock *block, uint64_t page)
{
    uint64_t hint = ((uint64_t)block->index << HINT_BLOCK_SHIFT | page) + 1;

    __atomic_store_n(&ft->stream.hint, hint, __ATOMIC_RELAXED);
}

/* Pieces of a block: all, and their pages; without those that are old, which hang and keep nobody waiting for others,
 * of those the ones of a replay; those that its source still owes, and their pages. */
struct piece_counts {
    uint32_t n_all, n_young, n_young_replay, n_owed;
    uint64_t pages, owed_pages;
};

static struct piece_counts count_pieces(const struct stream *s, const struct ramblock *block)
{
    struct piece_counts counts = {0};

    for (uint32_t i = 0; i < STREAM_WINDOW; i++) {
        const struct stream_piece *piece = &s->pieces[i];

        if (piece->block != block)
            continue;
        counts.n_all++;
        counts.pages += piece->request.n_pages;
        counts.n_young += !piece->is_old;
        counts.n_young_replay += !piece->is_old && piece->is_replay;
        counts.n_owed += !piece->is_answered;
        counts.owed_pages += piece->is_answered ? 0 : piece->request.n_pages;
    }
    return counts;
}

void stream_drop_block(struct fault_threads *ft, const struct ramblock *block)
{
    struct stream *s = &ft->stream;

    pthread_mutex_lock(&s->lock);
    while (s->running && count_pieces(s, block).n_all) /* first: a piece that fails may leave two ranges */
        pthread_cond_wait(&s->wake, &s->lock);
    struct stream_range *list = stream_range_take_block(s, block);
    stream_replay_drop(ft, served_block_of(ft, block));
    pthread_mutex_unlock(&s->lock);
    stream_range_end_list(ft, list, -ECANCELED, 0, 0);
}

/* ---- what to ask for next ---- */

static uint64_t pages_of_piece(struct fault_threads *ft, const struct ramblock *block, int background)
{
    const struct stream *s = &ft->stream;
    uint64_t bytes = served_block_of(ft, block)->channel->stream_piece_bytes;

    if (background && s->mode == STATUS_STREAM_RATE && s->rate / STREAM_RATE_PIECES < bytes)
        bytes = s->rate / STREAM_RATE_PIECES;
    return bytes > block->page_size ? bytes / block->page_size : 1;
}

/* Whether nothing is to be asked of the block's source now: it is paused, or has as much to do as it takes at once.
 * n_young: its pieces that count. */
static int is_busy(struct fault_threads *ft, struct served_block *served, uint32_t n_young)
{
    const struct page_channel *channel = served->channel;

    if (__atomic_load_n(&served->paused, __ATOMIC_ACQUIRE))
        return 1;
    if (__atomic_load_n(&ft->demand_in_flight, __ATOMIC_ACQUIRE))
        served->stream_window = __atomic_load_n(&channel->stream_piece_count_demand, __ATOMIC_RELAXED);
    return n_young >= served->stream_window;
}

/* What helpers asked for comes first, also where its larger pieces do not fit yet. */
static int has_range(const struct stream *s, const struct ramblock *block)
{
    for (const struct stream_range *range = s->ranges; range; range = range->next)
        if (range->block == block && range->issue < range->end)
            return 1;
    return 0;
}

uint64_t stream_room_for_small(struct fault_threads *ft, struct served_block *served)
{
    const struct stream *s = &ft->stream;
    uint64_t most = pages_of_piece(ft, served->block, 0);
    struct piece_counts counts = count_pieces(s, served->block);

    if (!is_busy(ft, served, counts.n_young))
        return most;
    if (has_range(s, served->block))
        return 0;
    uint64_t limit = served->stream_window * most;
    if (__atomic_load_n(&served->paused, __ATOMIC_ACQUIRE) || counts.n_owed >= SMALL_PIECES ||
        counts.n_all >= SMALL_PIECES_ALL || counts.pages >= 2 * limit)
        return 0;
    uint64_t room = counts.owed_pages < limit ? limit - counts.owed_pages : 0;
    return room < most ? room : most;
}

/* Beside a demand few pieces are under way, and after it one more with each that came: demands seldom come alone. */
static void widen_window(struct served_block *served)
{
    if (served->stream_window < served->stream_window_max)
        served->stream_window++;
}

/* Hints of which all is under way leave the list; the caller ends them. */
static void unlink_over(struct stream *s, struct stream_range **overp)
{
    struct stream_range **rangep = &s->ranges;

    while (*rangep) {
        struct stream_range *range = *rangep;

        if (range->wait || range->issue < range->end) {
            rangep = &range->next;
            continue;
        }
        stream_range_unlink(s, rangep);
        range->next = *overp;
        *overp = range;
    }
}

static uint64_t turn_of(const struct stream_range *range)
{
    return range->remote ? range->remote->range_turn : 0;
}

/* Helpers take turns, whatever each asks for: one that wants all of a large block keeps nobody else waiting. Ranges of
 * one helper go in order. What nobody asked for, and is only about to be touched, comes after that. */
static int comes_before(const struct stream_range *range, const struct stream_range *other)
{
    return range->is_ahead != other->is_ahead ? !range->is_ahead : turn_of(range) < turn_of(other);
}

/* What helpers asked for waits for no replay. */
static int is_busy_for_range(struct fault_threads *ft, const struct stream_range *range)
{
    struct piece_counts counts = count_pieces(&ft->stream, range->block);

    return is_busy(ft, served_block_of(ft, range->block), counts.n_young - counts.n_young_replay);
}

static struct stream_range *next_range(struct fault_threads *ft)
{
    struct stream_range *next = NULL;

    for (struct stream_range *range = ft->stream.ranges; range; range = range->next)
        if (range->issue < range->end && (!next || comes_before(range, next)) && !is_busy_for_range(ft, range))
            next = range;
    return next;
}

static int claim_for_range(struct fault_threads *ft, struct stream_piece *piece, struct stream_range **overp)
{
    struct stream *s = &ft->stream;
    struct stream_range *range;
    uint64_t n = 0, first = 0;

    while (!n && (range = next_range(ft))) {
        uint64_t most = range->piece_pages_max ? range->piece_pages_max : pages_of_piece(ft, range->block, 0);

        n = ramblock_claim_missing(range->block, range->issue, range->end, most, &first);
        range->issue = n ? first + n : range->end;
    }
    if (n) {
        piece->block = range->block;
        piece->request.page = first;
        piece->request.n_pages = n;
        piece->kind = range->wait ? PLACED_DEMAND : PLACED_STREAM;
        piece->asker = range->wait && range->remote ? range->remote->id : 0;
        piece->is_ahead = range->is_ahead;
        if (range->remote && !range->is_ahead)
            range->remote->range_turn = ++s->turn;
    }
    unlink_over(s, overp);
    return n ? ISSUED : NOTHING_TO_ASK;
}

static int claim_for_replay(struct fault_threads *ft, struct stream_piece *piece)
{
    struct served_block *served;
    int rc = stream_replay_claim(ft, &served, &piece->request.page, &piece->request.n_pages);

    if (rc == REPLAY_ISSUED) {
        piece->block = served->block;
        piece->kind = PLACED_STREAM;
        piece->asker = 0;
        piece->is_replay = 1;
    }
    return rc;
}

static void take_hint(struct fault_threads *ft)
{
    struct stream *s = &ft->stream;
    uint64_t hint = __atomic_exchange_n(&s->hint, 0, __ATOMIC_RELAXED);

    if (!hint)
        return;
    s->block_index = (uint32_t)((hint - 1) >> HINT_BLOCK_SHIFT);
    struct served_block *served = __atomic_load_n(&ft->blocks[s->block_index], __ATOMIC_ACQUIRE);
    if (served) /* that page itself is under way */
        served->stream_cursor = ((hint - 1) & ((1ull << HINT_BLOCK_SHIFT) - 1)) + 1;
}

/* After the cursor, then from the start of the same block. */
static uint64_t claim_in_block(struct fault_threads *ft, struct served_block *served, uint64_t *firstp)
{
    struct ramblock *block = served->block;
    uint64_t most = pages_of_piece(ft, block, 1), from = served->stream_cursor;
    uint64_t n = ramblock_claim_missing(block, from, block->page_count, most, firstp);

    if (!n && from)
        n = ramblock_claim_missing(block, 0, from < block->page_count ? from : block->page_count, most, firstp);
    if (n)
        served->stream_cursor = *firstp + n;
    return n;
}

static void tell_gaps(struct fault_threads *ft, struct served_block *served)
{
    if (served->gaps_told || count_pieces(&ft->stream, served->block).n_all ||
        !__atomic_load_n(&served->block->status->lost_pages, __ATOMIC_RELAXED))
        return;
    served->gaps_told = 1;
    tell_block(ft, served, EVENT_BLOCK_GAPS, 0, 0);
}

static int claim_for_background(struct fault_threads *ft, struct stream_piece *piece)
{
    struct stream *s = &ft->stream;

    take_hint(ft);
    for (uint32_t i = 0; i < STATUS_BLOCKS_MAX; i++) {
        struct served_block *served = __atomic_load_n(&ft->blocks[s->block_index], __ATOMIC_ACQUIRE);
        uint64_t first = 0, n = 0;

        /* What a source pushes comes by itself. */
        int over = !served || served->pushes || __atomic_load_n(&served->complete, __ATOMIC_ACQUIRE);
        if (!over && !is_busy(ft, served, count_pieces(&ft->stream, served->block).n_young))
            n = claim_in_block(ft, served, &first);
        if (n) {
            piece->block = served->block;
            piece->request.page = first;
            piece->request.n_pages = n;
            piece->kind = PLACED_STREAM;
            piece->asker = 0;
            return ISSUED;
        }
        if (!over)
            tell_gaps(ft, served);
        s->block_index = (s->block_index + 1) % STATUS_BLOCKS_MAX;
    }
    return NOTHING_TO_ASK;
}

/* Under a rate limit: how long the background has to wait before the next piece. */
static uint64_t background_wait_ns(const struct stream *s, uint64_t now_ns)
{
    if (!has_background(s->mode))
        return forever_ns;
    return s->mode == STATUS_STREAM_RATE && s->next_allowed_ns > now_ns ? s->next_allowed_ns - now_ns : 0;
}

static void charge_background(struct stream *s, const struct stream_piece *piece, uint64_t now_ns)
{
    if (s->mode != STATUS_STREAM_RATE)
        return;
    uint64_t bytes = piece->request.n_pages * piece->block->page_size;
    uint64_t from = s->next_allowed_ns > now_ns ? s->next_allowed_ns : now_ns;
    s->next_allowed_ns = from + (uint64_t)((double)bytes * (double)second_ns / (double)s->rate);
}

static struct stream_piece *free_piece(struct stream *s)
{
    for (uint32_t i = 0; i < STREAM_WINDOW; i++)
        if (!s->pieces[i].block)
            return &s->pieces[i];
    return NULL;
}

/* ---- pieces ---- */

static void piece_done(struct page_request *request, int result)
{
    struct stream_piece *piece = request->owner;
    struct stream *s = &piece->ft->stream;

    pthread_mutex_lock(&s->lock);
    piece->result = result;
    piece->is_answered = 1;
    piece->next = NULL;
    *s->completed_tail = piece;
    s->completed_tail = &piece->next;
    pthread_cond_broadcast(&s->wake);
    pthread_mutex_unlock(&s->lock);
}

static void submit_piece(struct fault_threads *ft, struct stream_piece *piece)
{
    struct ramblock *block = piece->block;
    struct page_request *request = &piece->request;

    request->next = NULL;
    request->offset = request->page * block->page_size;
    request->length = source_length(block, request->page, request->n_pages);
    request->is_demand = 0;
    request->block_index = block->index;
    request->done = piece_done;
    piece->asked_ns = clock_ns();
    piece->is_old = 0;
    piece->late_start = piece->late_end = 0;
    trace_point(TRACE_STREAM_REQUEST, block->index, 0, request->page, request->n_pages);
    page_channel_submit(served_block_of(ft, block)->channel, request);
}

/* The lost page is somewhere in here: ask again for each half. */
static void halve_piece(struct fault_threads *ft, const struct stream_piece *piece)
{
    struct stream *s = &ft->stream;
    uint64_t middle = piece->request.page + piece->request.n_pages / 2;
    struct stream_range *low = stream_range_new(piece->block, piece->request.page, middle);
    struct stream_range *high = stream_range_new(piece->block, middle, piece->request.page + piece->request.n_pages);

    if (!low || !high) { /* asked for again by the background, some time */
        free(low);
        free(high);
        return;
    }
    low->piece_pages_max = high->piece_pages_max = (piece->request.n_pages + 1) / 2;
    pthread_mutex_lock(&s->lock);
    stream_range_push(s, high);
    stream_range_push(s, low);
    pthread_mutex_unlock(&s->lock);
}

/* The range requests that covered it ask again when the block is resumed. */
static void pause_block(struct fault_threads *ft, struct served_block *served, int error, uint64_t page, uint32_t kind)
{
    __atomic_store_n(&served->paused, 1, __ATOMIC_RELEASE);
    tell_block(ft, served, kind, error, page * served->block->page_size);
}

static void piece_failed(struct fault_threads *ft, struct stream_piece *piece, int error, uint32_t kind)
{
    struct served_block *served = served_block_of(ft, piece->block);
    uint64_t page = piece->request.page, end = page + piece->request.n_pages;

    trace_point(TRACE_SOURCE_ERROR, piece->block->index, 0, page, (uint64_t)error);
    if (piece->is_ahead) { /* a touch that comes all the same asks, and is told */
        stream_give_back(ft, piece->block, page, end - page);
        return;
    }
    bitmap_clear_range(piece->block->requested, page, end);
    if (ramblock_next_missing(piece->block, page, end) == end)
        return; /* all of it came by another way */
    if (kind == EVENT_BLOCK_PLACE_ERROR || served->on_source_loss == SOURCE_LOSS_PAUSE) {
        pause_block(ft, served, error, page, kind);
    } else if (end - page > 1) {
        halve_piece(ft, piece);
    } else {
        lose_page(ft, served, page);
        tell_block(ft, served, kind, error, page * piece->block->page_size);
    }
}

static void finish_piece(struct fault_threads *ft, struct stream_piece *piece)
{
    struct ramblock *block = piece->block;
    struct page_request *request = &piece->request;
    uint64_t placed = 0;
    int rc = checked_result(block, request, piece->result);

    if (rc < 0) {
        if (rc != -ECANCELED)
            piece_failed(ft, piece, -rc, EVENT_BLOCK_SOURCE_ERROR);
        return;
    }
    if (rc == PAGE_CHANNEL_ARRIVED) {
        bitmap_clear_range(block->requested, request->page, request->page + request->n_pages);
        credit_helper(ft, piece->asker, request->n_pages);
        return;
    }
    page_channel_zero_tail(request->bytes, request->length, request->n_pages * block->page_size);
    rc = ramblock_place(block, request->page, request->n_pages, request->bytes, &placed);
    if (rc >= 0)
        bitmap_clear_range(block->requested, request->page, request->page + request->n_pages);
    credit_helper(ft, piece->asker, placed);
    after_placing(ft, served_block_of(ft, block), request->page, request->n_pages, placed, piece->kind);
    if (rc < 0)
        piece_failed(ft, piece, -rc, EVENT_BLOCK_PLACE_ERROR);
}

static void release_piece(struct fault_threads *ft, struct stream_piece *piece)
{
    struct stream *s = &ft->stream;
    struct served_block *served = served_block_of(ft, piece->block);

    widen_window(served);
    if (piece->is_replay)
        stream_replay_answered(served);
    piece->is_replay = piece->is_ahead = piece->is_answered = 0; /* whoever claims it next sets what it is */
    piece->block = NULL;
    s->in_flight--;
    pthread_cond_broadcast(&s->wake); /* for whoever drops its block */
}

/* ---- the thread ---- */

/* Finds something for a piece to ask for, or says how long there is nothing. */
static uint64_t claim(struct fault_threads *ft, struct stream_piece *piece, struct stream_range **overp)
{
    struct stream *s = &ft->stream;

    if (claim_for_range(ft, piece, overp) == ISSUED)
        return 0;
    int rc = claim_for_replay(ft, piece);
    if (rc != REPLAY_NOTHING)
        return rc == REPLAY_ISSUED ? 0 : look_again_ns;
    uint64_t now_ns = clock_ns(), wait_ns = background_wait_ns(s, now_ns);
    if (wait_ns)
        return wait_ns;
    if (claim_for_background(ft, piece) == NOTHING_TO_ASK)
        return forever_ns;
    charge_background(s, piece, now_ns);
    return 0;
}

/* Issues one piece, or says how long there is nothing to do. Called and returns with the lock held. */
static uint64_t issue_piece(struct fault_threads *ft)
{
    struct stream *s = &ft->stream;
    struct stream_range *over = NULL;
    struct stream_piece *piece = free_piece(s);

    if (!piece)
        return forever_ns;
    uint64_t wait_ns = claim(ft, piece, &over);
    if (wait_ns && !over)
        return wait_ns;
    s->in_flight += !wait_ns;
    s->submitting = 1;
    pthread_mutex_unlock(&s->lock);
    stream_range_end_list(ft, over, 0, 0, 0); /* not under the lock: the last reference closes fds */
    if (!wait_ns)
        submit_piece(ft, piece);
    pthread_mutex_lock(&s->lock);
    s->submitting = 0;
    pthread_cond_broadcast(&s->wake);
    return 0; /* look again: the lock was open */
}

static void wait_for_work(struct stream *s, uint64_t wait_ns)
{
    struct timespec until;

    if (wait_ns == forever_ns) {
        pthread_cond_wait(&s->wake, &s->lock);
        return;
    }
    uint64_t at = clock_ns() + wait_ns;
    until.tv_sec = (time_t)(at / second_ns);
    until.tv_nsec = (long)(at % second_ns);
    pthread_cond_timedwait(&s->wake, &s->lock, &until);
}

/* A replay's small pieces come many at a time: the next are under way before these are placed, else who reads what was
 * placed is through with it before. Not of a source that fails, and not so often that nothing is placed. */
static void refill(struct fault_threads *ft)
{
    struct stream *s = &ft->stream;

    for (uint32_t i = 0; i < STREAM_WINDOW && s->replays && !s->quit && s->completed->result >= 0; i++)
        if (issue_piece(ft))
            break;
}

static void *stream_run(void *argument)
{
    struct fault_threads *ft = argument;
    struct stream *s = &ft->stream;

    thread_step_back();
    pthread_mutex_lock(&s->lock);
    while (!s->quit || s->in_flight) {
        uint64_t look_ns = timeout_look(ft);
        if (s->completed)
            refill(ft);
        struct stream_piece *piece = s->completed;
        if (piece) {
            s->completed = piece->next;
            if (!s->completed)
                s->completed_tail = &s->completed;
            pthread_mutex_unlock(&s->lock);
            finish_piece(ft, piece);
            pthread_mutex_lock(&s->lock);
            release_piece(ft, piece);
            continue;
        }
        uint64_t wait_ns = s->quit ? forever_ns : issue_piece(ft);
        if (wait_ns && !s->completed)
            wait_for_work(s, wait_ns < look_ns ? wait_ns : look_ns);
    }
    pthread_mutex_unlock(&s->lock);
    return NULL;
}

int stream_start(struct fault_threads *ft)
{
    int rc = thread_new(&ft->stream.thread, "pcshare-stream", stream_run, ft);

    if (rc == 0)
        ft->stream.running = 1;
    return rc;
}

void stream_wait_submitted(struct fault_threads *ft)
{
    struct stream *s = &ft->stream;

    pthread_mutex_lock(&s->lock);
    while (s->submitting)
        pthread_cond_wait(&s->wake, &s->lock);
    pthread_mutex_unlock(&s->lock);
}

void stream_quiesce(struct fault_threads *ft)
{
    struct stream *s = &ft->stream;

    pthread_mutex_lock(&s->lock);
    s->quit = 1;
    pthread_cond_broadcast(&s->wake);
    pthread_mutex_unlock(&s->lock);
    stream_wait_submitted(ft);
}

void stream_stop(struct fault_threads *ft)
{
    struct stream *s = &ft->stream;

    if (!s->running)
        return;
    pthread_join(s->thread, NULL);
    s->running = 0;
    s->quit = 0;
}

void stream_resume_block(struct fault_threads *ft, struct ramblock *block)
{
    struct stream *s = &ft->stream;

    pthread_mutex_lock(&s->lock);
    for (struct stream_range *range = s->ranges; range; range = range->next)
        if (range->block == block)
            range->issue = range->cursor;
    stream_replay_resume(served_block_of(ft, block));
    served_block_of(ft, block)->gaps_told = 0;
    pthread_cond_broadcast(&s->wake);
    pthread_mutex_unlock(&s->lock);
}
