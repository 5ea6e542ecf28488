/* stream: see stream.h. */
#include "fault_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

#include "bitmap.h"
#include "stream_claim.h"
#include "stream_range.h"
#include "stream_replay.h"
#include "thread.h"
#include "trace.h"

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

    if (stream_has_background(s) || __atomic_load_n(&s->ranges, __ATOMIC_SEQ_CST) ||
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

void stream_drop_block(struct fault_threads *ft, const struct ramblock *block)
{
    struct stream *s = &ft->stream;

    pthread_mutex_lock(&s->lock);
    while (s->running && stream_n_pieces(s, block)) /* first: a piece that fails may leave two ranges */
        pthread_cond_wait(&s->wake, &s->lock);
    struct stream_range *list = stream_range_take_block(s, block);
    stream_replay_drop(ft, served_block_of(ft, block));
    pthread_mutex_unlock(&s->lock);
    stream_range_end_list(ft, list, -ECANCELED, 0, 0);
}

/* ---- pieces ---- */

static struct stream_piece *free_piece(struct stream *s)
{
    for (uint32_t i = 0; i < STREAM_WINDOW; i++)
        if (!s->pieces[i].block)
            return &s->pieces[i];
    return NULL;
}

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

/* Beside a demand few pieces are under way, and after it one more with each that came: demands seldom come alone. */
static void widen_window(struct served_block *served)
{
    if (served->stream_window < served->stream_window_max)
        served->stream_window++;
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

/* Issues one piece, or says how long there is nothing to do. Called and returns with the lock held. */
static uint64_t issue_piece(struct fault_threads *ft)
{
    struct stream *s = &ft->stream;
    struct stream_range *over = NULL;
    struct stream_piece *piece = free_piece(s);

    if (!piece)
        return stream_forever_ns;
    uint64_t wait_ns = stream_claim(ft, piece, &over);
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

    if (wait_ns == stream_forever_ns) {
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
        uint64_t wait_ns = s->quit ? stream_forever_ns : issue_piece(ft);
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
