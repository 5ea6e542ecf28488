/* trace: the steps of a process, by name: written as fixed-size records into a shared ring, decoded by
 * views/trace.py, and at one of them the process can be made to die.
 *
 * Costs one load and one test while nobody wants anything. Never blocks, never allocates; when the ring is full the
 * oldest records are overwritten.
 *
 * To die: PCSHARE_DIE_AT names a file that says "STEP N\n", STEP a number of the table below. It is read when the
 * library is loaded. At the N-th time that a thread of the process passes the step, the process removes the file and,
 * if it was the one that removed it, kills itself with SIGKILL; so one file is the death of one process, also where
 * those that follow it read the same variable.
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
    /* the coordinator's core */
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
    TRACE_PLACED = 20,         /* the memory has it, the bitmap not yet; detail: pages */
    TRACE_EVENT = 21,          /* subject: helper, page: the address; detail: UFFD_MESSAGE_* */
    TRACE_REMOVE = 22,         /* a helper removed pages; detail: how many */
    /* the coordinator's Python; subject: the helper's slot */
    TRACE_WELCOMED = 40,
    TRACE_KEPT = 41, /* its fds are, for the coordinator after this one */
    TRACE_REGISTERED = 42,
    TRACE_ACKED = 43,
    TRACE_LEFT = 44,
    TRACE_END_TOLD = 45,       /* to a block's helpers */
    TRACE_END_DONE = 46,       /* a block is plain memory */
    TRACE_TAKING_OVER = 47,    /* what was kept is here */
    TRACE_BLOCKS_TAKEN = 48,
    TRACE_HELPERS_TAKEN = 49,
    TRACE_HELPERS_TOLD = 50,
    TRACE_READY = 51,
    TRACE_MAKES_WAY = 52,
    /* a helper */
    TRACE_HELPER_HELLO = 60,  /* sent */
    TRACE_HELPER_MAPPED = 61, /* and registered */
    TRACE_HELPER_ATTACH = 62, /* sent */
    TRACE_HELPER_ACKED = 63,
    TRACE_HELPER_REQUEST = 64,     /* sent; page: where, in bytes */
    TRACE_HELPER_TAKEN_OVER = 65,  /* another coordinator serves it */
    TRACE_HELPER_COMPLETE = 66,
    TRACE_HELPER_LEAVE = 67,       /* its mapping is gone, the coordinator does not know */
    TRACE_HELPER_FORK_CHILD = 68,  /* in the child, which has its memory anew */
    /* a server of files or blocks */
    TRACE_SERVER_ACCEPTED = 80,
    TRACE_SERVER_AGREED = 81, /* the handshake is over */
    TRACE_SERVER_REQUEST = 82,
    TRACE_SERVER_ANSWERED = 83,
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
