/* stream: one thread that brings what nobody waits for in a fault: ranges that helpers asked for, then the rest of
 * every block.
 *
 * Asks in large pieces, a few in flight, fewer while somebody waits in a fault; goes on after the page that was last
 * demanded. Ranges are served in every mode, and behind them what is replayed (stream_replay.h); mode and rate bind the
 * background alone. Where the policy is poison a piece that fails is halved until the lost pages are known one by one.
 * Never answers a fault.
 *
 * Files: stream.c (its life, pieces, the thread), stream_claim.c (what it asks for next), stream_range.c (what helpers
 * asked for), stream_replay.c (what is asked for in a recorded order).
 */
#ifndef PCSHARE_STREAM_H
#define PCSHARE_STREAM_H

#include <pthread.h>
#include <stdint.h>

#include "page_channel.h"
#include "remote_fd.h"

enum {
    STREAM_BUFFER_BYTES = 2 << 20, /* a piece, or one page of the largest size */
    STREAM_WINDOW = 64,            /* pieces in flight, of all blocks; a channel says how many of one */
    STREAM_RATE_PIECES = 50,       /* under a rate limit a piece is this part of a second's bytes at most */
};

struct fault_threads;

struct stream_range;
struct served_block;

struct stream_piece {
    struct page_request request;
    struct fault_threads *ft;
    struct stream_piece *next; /* in completed */
    struct ramblock *block;    /* NULL: free */
    int result;
    int kind;       /* PLACED_DEMAND if somebody waits for a range, else PLACED_STREAM */
    uint32_t asker; /* the remote fd that waits; 0: nobody in particular */
    int is_ahead;   /* nobody asked for these pages: if they fail they are forgotten */
    uint64_t asked_ns;
    int is_old; /* with a fault timeout: longer under way than that; others are asked for beside it */
    uint64_t late_start, late_end; /* of its pages: somebody has waited too long, which has been told; 0, 0: none */
    int is_replay;
    int is_answered; /* in completed */
};

struct stream {
    pthread_t thread;
    int running;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    int quit;
    uint32_t mode; /* STATUS_STREAM_* */
    uint64_t rate;
    uint64_t next_allowed_ns;
    uint64_t hint;        /* written by fault threads: block and page last demanded, plus 1; 0: none */
    uint32_t block_index; /* where the background goes on */
    uint32_t in_flight;
    int submitting; /* outside the lock, on the way to a channel, or looking for what takes too long */
    struct stream_piece pieces[STREAM_WINDOW];
    struct stream_piece *completed; /* in the order of the answers: all before it, however fast they come */
    struct stream_piece **completed_tail;
    struct stream_range *ranges;
    struct stream_range **ranges_tail;
    uint64_t turn; /* counts pieces for ranges */
    struct served_block *replays; /* those that have one */
};

int stream_init(struct fault_threads *ft);
int stream_start(struct fault_threads *ft);
/* Asks for nothing more from here on, also not on its way: channels may be freed, then stream_stop joins. */
void stream_quiesce(struct fault_threads *ft);
void stream_stop(struct fault_threads *ft);
void stream_deinit(struct fault_threads *ft);
void stream_set(struct fault_threads *ft, uint32_t mode, uint64_t rate);
/* remote may be NULL. -ENOMEM. */
int stream_add_range(struct fault_threads *ft, struct ramblock *block, uint64_t start, uint64_t end,
                     struct remote_fd *remote, uint32_t cookie, int wait);
/* Pages that a thread of the remote fd will touch if it goes on as it does. Nobody hears if they do not come. */
void stream_add_ahead(struct fault_threads *ft, struct remote_fd *remote, uint64_t start, uint64_t end);
/* Pages that were marked requested are no longer: who waits in a range for those that have not come asks for them
 * itself. */
void stream_give_back(struct fault_threads *ft, struct ramblock *block, uint64_t page, uint64_t n);
/* The background goes on after this page. */
void stream_follow(struct fault_threads *ft, const struct ramblock *block, uint64_t page);
/* Pages were placed, by whomever: ranges that are complete now are told. */
void stream_note_received(struct fault_threads *ft, struct ramblock *block, uint64_t page, uint64_t n);
/* The source lost the page: ranges that wait for it are told so. */
void stream_note_lost(struct fault_threads *ft, struct ramblock *block, uint64_t page);
/* The block's source may be asked again. */
void stream_resume_block(struct fault_threads *ft, struct ramblock *block);
void stream_drop_remote(struct fault_threads *ft, const struct remote_fd *remote);
/* Of a paused block: nothing more is asked for it, also not on its way: its channel may be freed. */
void stream_wait_submitted(struct fault_threads *ft);
/* Returns when nothing of the block is in flight or wanted. */
void stream_drop_block(struct fault_threads *ft, const struct ramblock *block);
void stream_poke(struct fault_threads *ft);
/* The last page that was demanded of a source has come, or failed. */
void stream_note_no_demand(struct fault_threads *ft);

#endif
