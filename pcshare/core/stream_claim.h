/* stream_claim: what the stream asks for next: ranges that helpers asked for, behind them what is replayed, then the
 * rest of every block. Between stream.c, stream_claim.c and stream_replay.c alone; all of it under the stream's lock.
 */
#ifndef PCSHARE_STREAM_CLAIM_H
#define PCSHARE_STREAM_CLAIM_H

#include "fault_internal.h"

static const uint64_t stream_forever_ns = UINT64_MAX;

/* Finds something for a piece to ask for: 0, or how long there is nothing. Hints of which all is under way leave the
 * stream's list for *overp; the caller ends them. */
uint64_t stream_claim(struct fault_threads *ft, struct stream_piece *piece, struct stream_range **overp);
/* Whether its mode lets it bring what nobody asked for. Also without the lock. */
int stream_has_background(const struct stream *s);
/* How many pieces of the block are under way. */
uint32_t stream_n_pieces(const struct stream *s, const struct ramblock *block);
/* How many pages the block's source may be asked for now; 0: none, as it is paused or has enough to do. There may be
 * more small pieces at once than large ones, but no more bytes; and no more than twice as many with what is not placed
 * yet. */
uint64_t stream_room_for_small(struct fault_threads *ft, struct served_block *served);

#endif
