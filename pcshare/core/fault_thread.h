/* fault_thread: the threads that answer faults, and all that must make progress while a page is missing.
 *
 * Each fault thread has an epoll of its own over the quit eventfd, every remote fd and every helper's control socket,
 * level-triggered; several threads, each pinned to a CPU, serve the same remote fds, so that the one on the CPU that
 * faulted answers without waking another. Requests are deduplicated by block and page (waiters.h); no lock is held over
 * a system call. The stream is a thread of its own (stream.h). Policy, hand-over and states are Python's: it adds and
 * removes blocks and remote fds and reads events.
 */
#ifndef PCSHARE_FAULT_THREAD_H
#define PCSHARE_FAULT_THREAD_H

#include <stdint.h>
#include "page_channel.h"
#include "ramblock.h"
#include "remote_fd.h"
#include "status_segment.h"
#include "uffd.h"
#include "working_set.h"

enum {
    FAULT_THREADS_MAX = 64,
    FAULT_REQUESTS_IN_FLIGHT_MAX = 128, /* REQUESTs of one helper that are not answered yet; as many hints. A helper
                                         * keeps to half of it: until it is told of a takeover it asks as before, and
                                         * then for all of them again */
    FAULT_DEMANDS_IN_FLIGHT_MAX = 4096, /* pages that one helper's faults wait for: memory that it makes the
                                         * coordinator use. As many again may be late */
};

enum {
    EVENT_BLOCK_COMPLETE = 1,     /* every page is received or a hole */
    EVENT_BLOCK_SOURCE_ERROR = 2, /* error, offset */
    EVENT_BLOCK_PLACE_ERROR = 4,  /* error, offset */
    EVENT_BLOCK_FOREIGN = 8,      /* offset of one */
    EVENT_BLOCK_GAPS = 16,        /* the stream went through and lost pages remain */
    EVENT_REMOTE_LEFT = 32,       /* LEAVE */
    EVENT_REMOTE_HUNG_UP = 64,    /* the control socket closed without LEAVE */
    EVENT_REMOTE_DISABLED = 128,  /* cut off: error, addr */
    EVENT_BLOCK_LATE = 256,     /* pages take longer than the fault timeout: error, offset of one; error 0: no longer */
    EVENT_BLOCK_REPLAYED = 512, /* of what was to be replayed all is here that will come */
};

struct fault_event {
    uint32_t kind; /* one of EVENT_* */
    uint32_t block_index;
    uint32_t remote_id;
    int32_t error;   /* a positive errno */
    uint64_t offset; /* in the block, or the address */
};

enum {
    SOURCE_LOSS_PAUSE = 0,
    SOURCE_LOSS_POISON = 1,
};

/* What is kept of an attachment for the coordinator after this one, at its slot in a file of these. */
struct kept_maps {
    uint32_t block_index;
    uint32_t n_maps;
    uint32_t pid;
    uint32_t uid;
    struct wire_map maps[16];
    uint8_t reserved[112]; /* 512 bytes: none lies on two pages, so that none is half written by who is killed */
};

struct fault_threads;

/* status is the mapped status segment. */
int fault_threads_new(struct fault_threads **ftp, struct status_header *status);
/* Where a writable helper's maps are kept: written anew when it has moved or unmapped something. Copies the fd. */
int fault_threads_keep_maps(struct fault_threads *ft, int maps_fd);
/* Starts n threads, each pinned to one of the n cpus (-1: not pinned), and returns when all run. */
int fault_threads_start(struct fault_threads *ft, const int32_t *cpus, uint32_t n);
/* Quits and joins them and the stream. Twice is fine. */
void fault_threads_stop(struct fault_threads *ft);
/* Stops first; frees what is left: remote fds, channels, blocks. */
void fault_threads_free(struct fault_threads *ft);

/* The block and its channel belong to ft from here on; the coordinator's own mapping is served from now on. */
int fault_threads_add_block(struct fault_threads *ft, struct ramblock *block, struct page_channel *channel,
                            uint32_t on_source_loss);
/* No remote fd may be left on it (-EBUSY). */
int fault_threads_remove_block(struct fault_threads *ft, uint32_t block_index);
/* Every page is in: unregisters the coordinator's own mapping and the keeper's. */
int fault_threads_complete_block(struct fault_threads *ft, uint32_t block_index);
/* Places n_pages that a source pushed, and wakes who waits. bytes NULL: zeros. is_demand: somebody had asked for them.
 * *placed_pagesp counts those placed now. On a negative errno some pages are not received and who waits for them goes
 * on waiting: they must come again. Called by a page channel of the block, on any thread, and no more once that is
 * freed.
 */
int fault_threads_place(struct fault_threads *ft, uint32_t block_index, uint64_t page, uint64_t n_pages,
                        const void *bytes, int is_demand, uint64_t *placed_pagesp);
/* *idp names it in events. remote is consumed, also on failure. */
int fault_threads_add_remote(struct fault_threads *ft, struct remote_fd *remote, uint32_t *idp);
int fault_threads_remove_remote(struct fault_threads *ft, uint32_t id);
/* REQUESTs that it sent to another coordinator, which has not read them: who is told of this one asks for everything
 * again, and of how many coordinators there were nobody shall have asked too much. */
int fault_threads_forget_requests(struct fault_threads *ft, uint32_t id);
/* Everybody who waits there faults again: what another coordinator had read of its faults never comes by itself. */
int fault_threads_wake_remote(struct fault_threads *ft, uint32_t id);
/* Cuts it off: no longer polled, its waits forgotten; its uffd stays open until it is removed. */
int fault_threads_disable_remote(struct fault_threads *ft, uint32_t id, int error);
/* Does what the fault threads do when they read this REMOVE, UNMAP or REMAP on the remote fd's uffd: for those that
 * somebody else has read while no fault thread ran. Other messages are left alone: who waits in a fault is woken, and
 * faults again. Before anything is placed in the block: the threads may be started after it. */
void fault_threads_apply_event(struct fault_threads *ft, uint32_t id, const struct uffd_message *message);
/* -ESRCH: its address space is gone, or there is no such remote fd; 0: it lives; -EINVAL: the kernel does not tell. */
int fault_threads_probe_remote(struct fault_threads *ft, uint32_t id);

/* mode: STATUS_STREAM_*; rate in bytes a second for STATUS_STREAM_RATE. */
void fault_threads_set_stream(struct fault_threads *ft, uint32_t mode, uint64_t rate);
/* Nothing is streamed before fault_threads_set_stream; the status goes on saying what it says. */
void fault_threads_hold_stream(struct fault_threads *ft);
/* Asks for these pages, in this order, behind what helpers ask for and ahead of the background, in every mode: each run
 * in as few requests as the source's piece allows. EVENT_BLOCK_REPLAYED tells the end for each block that has one.
 * Copied. -EINVAL: pages that there are not; -EBUSY: a replay is under way. */
int fault_threads_replay(struct fault_threads *ft, const struct working_set_run *runs, uint64_t n_runs);
/* What the stream asks the block's source for at a time. */
uint32_t fault_threads_piece_bytes(const struct fault_threads *ft, uint32_t block_index);
/* How long a page that somebody waits for may take; 0: for ever. Then who waits goes on waiting and EVENT_BLOCK_LATE
 * tells; with SOURCE_LOSS_POISON the page is lost too, until it comes after all. Before the threads are started. */
void fault_threads_set_fault_timeout(struct fault_threads *ft, uint64_t timeout_ms);
/* How many bytes a thread that reads on is kept ahead of at most; 0: a fault brings its page alone, and not what lies
 * around it either. Before the threads are started. */
void fault_threads_set_read_ahead(struct fault_threads *ft, uint64_t bytes);
/* Asks a failed source again: outstanding pages, late pages, lost pages, the stream's gaps. */
int fault_threads_resume_block(struct fault_threads *ft, uint32_t block_index);

/* Readable when an event waits. */
int fault_threads_event_fd(const struct fault_threads *ft);
/* 1 and the event, or 0. */
int fault_threads_next_event(struct fault_threads *ft, struct fault_event *event);

#endif
