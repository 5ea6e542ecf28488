/* status_segment: the layout of the POSIX shared memory /pcshare-NAME. Only layout; no I/O.
 *
 * Written in place by the fault threads (counters, bitmaps, histograms) and by the coordinator's Python (states,
 * reasons); read by anybody who may open it, also while the coordinator is stopped or dead. Every counter is one
 * aligned 64-bit word. Texts are guarded by text_seq: odd while they are written. Order: header, blocks, helpers, then
 * one received bitmap a block, each on a page of its own at status_block.bitmap_offset. A change of layout is a new
 * STATUS_VERSION.
 */
#ifndef PCSHARE_STATUS_SEGMENT_H
#define PCSHARE_STATUS_SEGMENT_H

#include <stdint.h>

enum {
    STATUS_MAGIC = 0x54534350, /* "PCST" */
    STATUS_VERSION = 3,
    STATUS_NAME_MAX = 64,
    STATUS_REASON_MAX = 256,
    STATUS_MACHINE_MAX = 256,
    STATUS_BLOCKS_MAX = 1024,
    STATUS_HELPERS_MAX = 4096,
    STATUS_BITMAP_EAGER_BYTES = 1 << 20, /* has memory from the start: of a block of up to 32 GiB in 4 KiB pages */
    STATUS_BUCKETS = 32, /* bucket i counts waits of [2^(i-1), 2^i) us; bucket 0: under 1 us */
};

/* States of a block and, summed up, of the set. */
enum {
    STATUS_STATE_NONE = 0,
    STATUS_STATE_ADVISE = 1,
    STATUS_STATE_DISCARD = 2,
    STATUS_STATE_LISTENING = 3,
    STATUS_STATE_RUNNING = 4,
    STATUS_STATE_PAUSED = 5,
    STATUS_STATE_END = 6,
};

enum {
    STATUS_STREAM_EAGER = 0,
    STATUS_STREAM_LAZY = 1,
    STATUS_STREAM_RATE = 2,
    STATUS_STREAM_PAUSED = 3,
};

/* States of a helper's slot. */
enum {
    STATUS_HELPER_FREE = 0,
    STATUS_HELPER_ATTACHED = 1,
    STATUS_HELPER_DISABLED = 2, /* cut off; its uffd is kept open until the process ends */
    STATUS_HELPER_ORPHANED = 3, /* its control socket closed without LEAVE; still served until the process ends */
    STATUS_HELPER_LEFT = 4,     /* it said LEAVE: nothing of it is served, and nothing of it is taken over */
};

struct status_histogram {
    uint64_t count[32];
    uint64_t total_us;
    uint64_t max_us;
};

struct status_block {
    char idstr[64];
    uint32_t in_use;
    uint32_t state;
    uint32_t writable;
    uint32_t progress_seq; /* futex: bumped and woken at each 1/256 of the way, at END and at a change of state */
    uint64_t used_length;
    uint64_t page_size;
    uint64_t page_count;
    uint64_t bitmap_offset; /* bytes from the start of the segment */
    uint64_t received_pages;
    uint64_t hole_pages; /* holes of the source that nobody has touched: complete without being placed */
    uint64_t demand_pages;
    uint64_t stream_pages;
    uint64_t zero_pages;
    uint64_t foreign_pages;
    uint64_t lost_pages; /* asked for, failed for good, poisoned where touched */
    uint64_t removed_pages; /* a helper removed them before they were received: zeros, and they count as received */
    uint32_t text_seq;
    uint32_t was_poisoned; /* some page was lost and poisoned once: marks may be left in helpers */
    char reason[256];
};

struct status_helper {
    uint32_t state;
    uint32_t block_index;
    uint32_t pid;
    uint32_t uid;
    uint64_t faults;
    uint64_t waiting;      /* threads waiting for a page right now */
    uint64_t demand_pages; /* pages placed because this helper asked */
    struct status_histogram blocktime;
};

struct status_header {
    uint32_t magic;
    uint32_t version;
    uint64_t size; /* bytes of header, blocks and helpers */
    uint64_t blocks_offset;
    uint64_t helpers_offset;
    uint32_t blocks_max;
    uint32_t helpers_max;
    uint32_t pid; /* who serves */
    uint32_t keeper_pid;
    uint64_t pid_start_ticks; /* field 22 of /proc/PID/stat: tells a reused pid */
    uint32_t state;
    uint32_t stream_mode;
    uint64_t stream_rate; /* bytes a second; 0: none */
    uint64_t helpers_joined;
    uint64_t helpers_left;
    uint64_t fault_count;
    uint32_t text_seq;
    uint32_t restarts; /* how often another process has gone on serving */
    char name[64];
    char socket_path[128];
    char reason[256];
    struct status_histogram blocktime; /* all helpers, those that left included */
    char machine[256];                 /* what an incoming migration says of its source; guarded by text_seq */
    uint64_t target_page_size;         /* bytes; 0: no migration has announced its blocks */
    uint64_t source_page_sizes;        /* bytes, those of all its blocks ORed */
};

/* The bucket that a wait of so many microseconds counts in. */
uint32_t status_histogram_bucket(uint64_t us);
void status_histogram_add(struct status_histogram *histogram, uint64_t us);
/* Waits until *progress_seq differs from seen or the time is over. 0: differs; -ETIMEDOUT; -EINTR. timeout_ms < 0: for
 * ever. */
int status_block_wait(const struct status_block *status, uint32_t seen, int64_t timeout_ms);
void status_block_notify(struct status_block *status);

#endif
