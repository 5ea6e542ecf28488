/* trace: fixed-size records in a shared ring, written by whoever takes a step, decoded by views/trace.py.
 *
 * Costs one test of a pointer while nobody traces. Never blocks, never allocates; when the ring is full the oldest
 * records are overwritten.
 */
#ifndef PCSHARE_TRACE_H
#define PCSHARE_TRACE_H

#include <stdint.h>

enum {
    TRACE_MAGIC = 0x52544350, /* "PCTR" */
    TRACE_VERSION = 1,
    TRACE_RECORDS = 65536,
};

enum {
    TRACE_THREAD_START = 1,
    TRACE_THREAD_QUIT = 2,
    TRACE_BLOCK_ADD = 3,
    TRACE_BLOCK_DISCARD = 4,
    TRACE_BLOCK_COMPLETE = 5,
    TRACE_REMOTE_ADD = 6,
    TRACE_REMOTE_REMOVE = 7,
    TRACE_REMOTE_DISABLE = 8,
    TRACE_FAULT = 9,           /* subject: helper, page; detail: tid */
    TRACE_REQUEST_SHARED = 10, /* detail: 0 asked, 1 received already, 2 asked before */
    TRACE_PLACE = 11,          /* detail: pages */
    TRACE_PLACE_ZERO = 12,
    TRACE_PLACE_PRESENT = 13, /* EEXIST */
    TRACE_FOREIGN = 14,
    TRACE_WAKE = 15, /* subject: helper; detail: 0, or with --strict pages mapped there at most */
    TRACE_POISON = 16,
    TRACE_SOURCE_ERROR = 17,   /* detail: errno */
    TRACE_STREAM_REQUEST = 18, /* detail: pages */
    TRACE_RANGE_REQUEST = 19,  /* detail: pages */
    TRACE_EVENT = 20,          /* subject: helper, page: the address; detail: UFFD_MESSAGE_* */
    TRACE_REMOVE = 21,         /* a helper removed pages; detail: how many */
};

struct trace_record {
    uint64_t time_ns; /* CLOCK_MONOTONIC */
    uint32_t event;
    uint32_t tid;
    uint32_t block_index;
    uint32_t subject;
    uint64_t page;
    uint64_t detail;
};

struct trace_ring {
    uint32_t magic;
    uint32_t version;
    uint64_t next; /* records ever written; the slot is next modulo TRACE_RECORDS */
    struct trace_record records[65536];
};

/* From now on write to this ring (a shared mapping that outlives every thread), or, with NULL, no more. */
void trace_to(struct trace_ring *ring);
void trace_point(uint32_t event, uint32_t block_index, uint32_t subject, uint64_t page, uint64_t detail);

#endif
