/* read_ahead: which threads of one remote fd read on from where they were, and how far ahead of each is worth bringing.
 *
 * A small table of streams: a thread, where it faulted last, up to where pages have been brought or asked for. Two
 * faults in a row that go on where the stream stands open it; then each time its thread comes near the end of what was
 * brought it gets twice as much, up to a limit. A fault elsewhere is a stream of its own that brings nothing yet, so
 * random access costs nothing. Forward only, no strides. Numbers only: brings nothing, knows no block and no source.
 * One short lock, no system call under it.
 */
#ifndef PCSHARE_READ_AHEAD_H
#define PCSHARE_READ_AHEAD_H

#include <stdint.h>

enum {
    READ_AHEAD_STREAMS = 32,          /* of one remote fd */
    READ_AHEAD_STREAMS_OF_THREAD = 2, /* two arrays walked in turns; and one that faults anywhere takes no more */
    READ_AHEAD_OPENING_HITS = 2,      /* what lies across two pages, and is touched at random, is no stream */
    READ_AHEAD_START_BYTES = 16 << 10,
};

struct read_ahead;

/* How much a stream may have, in pages; both at least 1. */
struct read_ahead_reach {
    uint64_t start_pages;
    uint64_t most_pages;
};

/* What a fault is to bring besides its page. */
struct read_ahead_plan {
    uint64_t near_end;   /* pages after it up to here are about to be touched: some may come with it */
    uint64_t start, end; /* pages to bring after that; none if they are the same */
};

int read_ahead_new(struct read_ahead **rp);
void read_ahead_free(struct read_ahead *r);
/* A thread has faulted on a page that is not received. All pages of [run_start, page) are: it may have passed them
 * without a fault. */
void read_ahead_note(struct read_ahead *r, uint32_t tid, uint64_t page, uint64_t run_start,
                     const struct read_ahead_reach *reach, struct read_ahead_plan *plan);

#endif
