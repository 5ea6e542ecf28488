/* stream_range: one range of pages that somebody asked for, in the stream's list. Between stream.c, stream_claim.c and
 * stream_range.c alone.
 */
#ifndef PCSHARE_STREAM_RANGE_H
#define PCSHARE_STREAM_RANGE_H

#include "stream.h"

/* A range that a helper asked for, or pages to be asked for again (remote NULL). */
struct stream_range {
    struct stream_range *next;
    struct ramblock *block;
    struct remote_fd *remote; /* counted; NULL: nobody is told */
    uint32_t cookie;
    uint32_t *counted;        /* of the remote fd: requests or hints in flight */
    int wait;                 /* DONE is owed */
    int is_ahead;             /* nobody has asked for it */
    uint64_t start, end;      /* pages */
    uint64_t issue;           /* asked for up to here */
    uint64_t cursor;          /* received up to here */
    uint64_t piece_pages_max; /* 0: as large as any; smaller where a lost page is searched */
};

struct stream_range *stream_range_new(struct ramblock *block, uint64_t start, uint64_t end);
/* In front of all others. Under the stream's lock, as unlink and take_block. */
void stream_range_push(struct stream *s, struct stream_range *range);
struct stream_range *stream_range_unlink(struct stream *s, struct stream_range **rangep);
/* Takes out all ranges of the block; the caller ends them. */
struct stream_range *stream_range_take_block(struct stream *s, const struct ramblock *block);
/* Tells the helper, if one is owed an answer, and frees. With an answer owed, not under the lock. */
void stream_range_end(struct fault_threads *ft, struct stream_range *range, int status, uint64_t offset,
                      uint64_t length);
void stream_range_end_list(struct fault_threads *ft, struct stream_range *list, int status, uint64_t page, uint64_t n);

#endif
