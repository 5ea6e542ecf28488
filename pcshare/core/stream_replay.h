/* stream_replay: pages that are to be asked for in a given order, ahead of the background: however many runs of them,
 * to the stream they are one thing that it asks "what next?". Between stream.c, stream_claim.c and stream_replay.c
 * alone; all of it under the stream's lock.
 */
#ifndef PCSHARE_STREAM_REPLAY_H
#define PCSHARE_STREAM_REPLAY_H

#include "fault_internal.h"

enum {
    REPLAY_LOOKS_MAX = 128, /* runs whose pages are all here that are passed by before the lock is opened */
};

/* Claims pages for a piece. ISSUED: *servedp, *firstp and *np say which; LOOK_AGAIN: not yet. Blocks whose replay is
 * over are told of. */
enum { REPLAY_ISSUED = 0, REPLAY_NOTHING = 1, REPLAY_LOOK_AGAIN = 2 };
int stream_replay_claim(struct fault_threads *ft, struct served_block **servedp, uint64_t *firstp, uint64_t *np);
/* The answer to what was claimed has been dealt with. */
void stream_replay_answered(struct served_block *served);
/* The block's source may be asked again: from the start, since some that had been asked for may have failed. */
void stream_replay_resume(struct served_block *served);
void stream_replay_drop(struct fault_threads *ft, struct served_block *served);

#endif
