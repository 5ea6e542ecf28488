/* channel_meter: how fast a page channel answers, asked as the fault threads and the stream ask: pages one by one, then
 * large pieces many at a time.
 *
 * For looking at a source before anything depends on it. Keeps no bytes and judges nothing.
 */
#ifndef PCSHARE_CHANNEL_METER_H
#define PCSHARE_CHANNEL_METER_H

#include <stdint.h>
#include "page_channel.h"

enum {
    CHANNEL_METER_ROUND_TRIPS = 16,
    CHANNEL_METER_PIECES_MAX = 16,
};

struct channel_meter_report {
    uint32_t n_round_trips;
    uint64_t round_trip_ns[CHANNEL_METER_ROUND_TRIPS]; /* of one page each, one after the other */
    uint64_t stream_bytes;
    uint64_t stream_ns;
    int32_t error; /* a positive errno: a read failed and the rest was not tried; 0: none */
    uint64_t error_offset;
};

/* channel is consumed. size: bytes of the source. Takes duration_ms for the large pieces, unless the source ends first;
 * a read that takes longer than timeout_ms is given up (ETIMEDOUT). -ENOMEM. */
int channel_meter_run(struct page_channel *channel, uint64_t size, uint32_t duration_ms, uint32_t timeout_ms,
                      struct channel_meter_report *report);

#endif
