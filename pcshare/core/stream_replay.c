/* stream_replay: see stream_replay.h. Blocks that have a replay are a list; whose next run comes first in the order of
 * all of them is asked, but for those whose source is busy: one that is away keeps no other waiting.
 */
#include "stream_replay.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "bitmap.h"
#include "stream_claim.h"

/* ---- the list ---- */

static void unlink_replay(struct stream *s, struct served_block *served)
{
    struct served_block **linkp = &s->replays;

    while (*linkp && *linkp != served)
        linkp = &(*linkp)->replay.next_block;
    if (*linkp)
        *linkp = served->replay.next_block;
    free(served->replay.runs);
    served->replay = (struct stream_replay){0};
}

static void append_run(struct stream_replay *replay, const struct working_set_run *run, uint64_t order)
{
    replay->runs[replay->n_runs++] =
        (struct replay_run){.page = run->page, .n_pages = run->n_pages, .order = (uint32_t)order};
}

/* Each block its runs: made[i] for the i-th block, whose runs are NULL where it has none. */
static int make_replays(const struct fault_threads *ft, const struct working_set_run *runs, uint64_t n_runs,
                        struct stream_replay *made)
{
    if (n_runs > UINT32_MAX)
        return -EINVAL;
    for (uint64_t i = 0; i < n_runs; i++) {
        if (!working_set_block_of(ft, &runs[i]))
            return -EINVAL;
        made[runs[i].block_index].n_runs++;
    }
    for (uint32_t i = 0; i < STATUS_BLOCKS_MAX; i++) {
        if (!made[i].n_runs)
            continue;
        made[i].runs = malloc(made[i].n_runs * sizeof(*made[i].runs));
        if (!made[i].runs)
            return -ENOMEM;
        made[i].n_runs = 0;
    }
    for (uint64_t i = 0; i < n_runs; i++)
        append_run(&made[runs[i].block_index], &runs[i], i);
    return 0;
}

static void link_replays(struct fault_threads *ft, struct stream_replay *made)
{
    struct stream *s = &ft->stream;

    for (uint32_t i = 0; i < STATUS_BLOCKS_MAX; i++) {
        if (!made[i].runs)
            continue;
        made[i].issue = made[i].runs[0].page;
        made[i].next_block = s->replays;
        s->replays = ft->blocks[i];
        ft->blocks[i]->replay = made[i];
        made[i].runs = NULL;
    }
    pthread_cond_broadcast(&s->wake);
}

int fault_threads_replay(struct fault_threads *ft, const struct working_set_run *runs, uint64_t n_runs)
{
    struct stream_replay *made = calloc(STATUS_BLOCKS_MAX, sizeof(*made));
    int rc = made ? make_replays(ft, runs, n_runs, made) : -ENOMEM;

    pthread_mutex_lock(&ft->stream.lock);
    if (rc == 0 && ft->stream.replays)
        rc = -EBUSY;
    if (rc == 0)
        link_replays(ft, made); /* all at once: their order counts from the first on */
    pthread_mutex_unlock(&ft->stream.lock);
    for (uint32_t i = 0; made && i < STATUS_BLOCKS_MAX; i++)
        free(made[i].runs);
    free(made);
    return rc;
}

uint32_t fault_threads_piece_bytes(const struct fault_threads *ft, uint32_t block_index)
{
    const struct served_block *served = block_index < STATUS_BLOCKS_MAX ? ft->blocks[block_index] : NULL;

    return served && served->channel ? served->channel->stream_piece_bytes : 0;
}

void stream_replay_drop(struct fault_threads *ft, struct served_block *served)
{
    if (served && served->replay.runs)
        unlink_replay(&ft->stream, served);
}

/* ---- what to ask for next ---- */

static int is_over(struct served_block *served)
{
    const struct stream_replay *replay = &served->replay;

    if (__atomic_load_n(&served->complete, __ATOMIC_ACQUIRE))
        return !replay->in_flight;
    return replay->next == replay->n_runs && !replay->in_flight && !replay->has_failed;
}

static void end_those_over(struct fault_threads *ft)
{
    struct served_block *next;

    for (struct served_block *served = ft->stream.replays; served; served = next) {
        next = served->replay.next_block;
        if (!is_over(served))
            continue;
        unlink_replay(&ft->stream, served);
        tell_block(ft, served, EVENT_BLOCK_REPLAYED, 0, 0);
    }
}

static const struct replay_run *next_run(const struct served_block *served)
{
    return &served->replay.runs[served->replay.next];
}

static struct served_block *whose_turn(struct fault_threads *ft, uint64_t *roomp)
{
    struct served_block *first = NULL;

    for (struct served_block *served = ft->stream.replays; served; served = served->replay.next_block) {
        const struct stream_replay *replay = &served->replay;
        if (replay->next == replay->n_runs || __atomic_load_n(&served->complete, __ATOMIC_ACQUIRE) ||
            (first && next_run(first)->order < next_run(served)->order))
            continue;
        uint64_t room = stream_room_for_small(ft, served);
        if (!room)
            continue;
        first = served;
        *roomp = room;
    }
    return first;
}

static void pass_to(struct stream_replay *replay, uint64_t page)
{
    const struct replay_run *run = &replay->runs[replay->next];

    replay->issue = page;
    if (page < run->page + run->n_pages)
        return;
    if (++replay->next < replay->n_runs)
        replay->issue = replay->runs[replay->next].page;
}

int stream_replay_claim(struct fault_threads *ft, struct served_block **servedp, uint64_t *firstp, uint64_t *np)
{
    if (!ft->stream.replays)
        return REPLAY_NOTHING;
    end_those_over(ft);
    for (uint32_t looks = 0; looks < REPLAY_LOOKS_MAX; looks++) {
        uint64_t room;
        struct served_block *served = whose_turn(ft, &room);
        if (!served) {
            end_those_over(ft);
            return REPLAY_NOTHING;
        }
        const struct replay_run *run = next_run(served);
        uint64_t end = run->page + run->n_pages;
        *np = ramblock_claim_missing(served->block, served->replay.issue, end, room, firstp);
        pass_to(&served->replay, *np ? *firstp + *np : end);
        if (!*np)
            continue;
        served->replay.in_flight++;
        *servedp = served;
        return REPLAY_ISSUED;
    }
    return REPLAY_LOOK_AGAIN;
}

void stream_replay_answered(struct served_block *served)
{
    struct stream_replay *replay = &served->replay;

    replay->in_flight--;
    /* A source that failed is asked again when it is resumed, for what of all the runs is not here then. */
    replay->has_failed |= __atomic_load_n(&served->paused, __ATOMIC_ACQUIRE);
}

void stream_replay_resume(struct served_block *served)
{
    struct stream_replay *replay = &served->replay;

    if (!replay->runs)
        return;
    replay->has_failed = 0;
    replay->next = 0;
    replay->issue = replay->runs[0].page;
}
