/* stream_claim: see stream_claim.h. */
#include "stream_claim.h"

#include "stream_range.h"
#include "stream_replay.h"
#include "thread.h"

enum { HINT_BLOCK_SHIFT = 48 };
/* Small pieces of one block that its source owes; and with those that are answered and not placed, so that buffers are
 * left for what else is to be asked for. */
enum { SMALL_PIECES = 48, SMALL_PIECES_ALL = 56 };
enum { ISSUED = 0, NOTHING_TO_ASK = 1 };
static const uint64_t look_again_ns = 1; /* the lock is opened, and no more */
static const uint64_t second_ns = 1000000000ull;

/* ---- how much a source is to do at once ---- */

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

uint32_t stream_n_pieces(const struct stream *s, const struct ramblock *block)
{
    return count_pieces(s, block).n_all;
}

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

/* ---- ranges, then what is replayed ---- */

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

/* ---- the background ---- */

void stream_follow(struct fault_threads *ft, const struct ramblock *block, uint64_t page)
{
    uint64_t hint = ((uint64_t)block->index << HINT_BLOCK_SHIFT | page) + 1;

    __atomic_store_n(&ft->stream.hint, hint, __ATOMIC_RELAXED);
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

int stream_has_background(const struct stream *s)
{
    uint32_t mode = __atomic_load_n(&s->mode, __ATOMIC_SEQ_CST);

    return mode != STATUS_STREAM_LAZY && mode != STATUS_STREAM_PAUSED;
}

/* Under a rate limit: how long the background has to wait before the next piece. */
static uint64_t background_wait_ns(const struct stream *s, uint64_t now_ns)
{
    if (!stream_has_background(s))
        return stream_forever_ns;
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

/* ---- what comes next ---- */

uint64_t stream_claim(struct fault_threads *ft, struct stream_piece *piece, struct stream_range **overp)
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
        return stream_forever_ns;
    charge_background(s, piece, now_ns);
    return 0;
}
