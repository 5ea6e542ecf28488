/* helper: the helper's side, for C programs and for pcshare's own Python: attach to a block, ask for ranges, leave.
 *
 * Attaching maps the block, opens a uffd, registers the mapping and hands the uffd to the coordinator; the memory is
 * given out only after the coordinator has said that it serves. One thread a process, the sentinel, answers the
 * coordinator and reacts when it goes away: it runs no Python, because a thread that waits for a page may hold the GIL.
 * fork is safe: the child gets the same addresses, mapped and registered anew before any other code of it runs.
 *
 * All functions may be called from any thread. None may be called from a signal handler. Return values: see error.h.
 */
#ifndef PCSHARE_HELPER_H
#define PCSHARE_HELPER_H

#include <stdint.h>

enum {
    PCSHARE_RO = 1,  /* private mapping of the sealed block: reads only */
    PCSHARE_RW = 2,  /* shared mapping of a writable block */
    PCSHARE_COW = 3, /* private, writable: what is written stays here */
};

/* What a touch of a missing page meets now. */
enum {
    PCSHARE_ATTACHED = 1, /* the coordinator serves */
    PCSHARE_COMPLETE = 2, /* every page is here; plain memory */
    PCSHARE_ORPHANED = 3, /* the coordinator went away: a missing page waits for the orphan timeout */
    PCSHARE_LOST = 4,     /* it will not come back: a missing page is SIGBUS, a page that is here stays readable */
};

struct pcshare_attachment;

struct pcshare_info {
    uint64_t used_length; /* bytes the source holds */
    uint64_t map_length;  /* bytes mapped: used_length rounded up to the page size */
    uint64_t page_size;
    uint64_t data_offset; /* of the array in the block, bytes; 0 without one */
    uint64_t dims[32];
    uint32_t ndim;
    uint32_t has_array;
    uint32_t fortran;
    uint32_t mode;         /* PCSHARE_RO, _RW or _COW */
    uint32_t writable;     /* the block may be attached PCSHARE_RW */
    uint32_t helper_index; /* in the status segment */
    uint32_t block_index;
    char idstr[64];
    char dtype[1024];
};

struct pcshare_progress {
    uint64_t received_pages;
    uint64_t hole_pages;
    uint64_t page_count;
    uint64_t lost_pages;
    uint32_t state;       /* STATUS_STATE_* of the block */
    uint32_t stream_mode; /* STATUS_STREAM_* */
    uint32_t seq;         /* changes whenever progress does; for pcshare_wait_progress */
};

/* Attaches once, without waiting for a coordinator to appear. idstr NULL or "": the only block. mode 0: what the block
 * is. map_at NULL, or an existing mapping of the caller's of map_at_length bytes to be replaced (aligned to the block's
 * page size, its map_length long; pcshare_detach gives it back as an inaccessible mapping): pcshare_peek tells these
 * first. -ESTALE: the block has another length by now. -ENOENT, -ECONNREFUSED: nobody listens (yet); -EAGAIN: too many
 * helpers wait for the coordinator to accept them; -ETIMEDOUT; -EINTR; else see pcshare_error_text(). */
int pcshare_attach(struct pcshare_attachment **ap, const char *socket_path, const char *idstr, uint32_t mode,
                   int64_t timeout_ms, void *map_at, uint64_t map_at_length);
/* What attaching would find; keeps nothing. */
int pcshare_peek(struct pcshare_info *info, const char *socket_path, const char *idstr, uint32_t mode,
                 int64_t timeout_ms);
/* Unregisters, unmaps, tells the coordinator, frees. Disturbs nobody; works whatever became of the coordinator. With
 * keep_reserved the addresses stay reserved as an inaccessible mapping that the caller unmaps. */
void pcshare_detach(struct pcshare_attachment *a, int keep_reserved);

void *pcshare_data(const struct pcshare_attachment *a);
void pcshare_get_info(const struct pcshare_attachment *a, struct pcshare_info *info);
int pcshare_state(const struct pcshare_attachment *a);

/* One request for the whole range; returns when all of it is here. -EIO: the source lost [*lost_offsetp, +
 * *lost_lengthp); -ETIMEDOUT; -ECONNRESET: the coordinator is gone; -EINTR; -EINVAL: outside the block. timeout_ms < 0:
 * for ever. */
int pcshare_ensure(struct pcshare_attachment *a, uint64_t offset, uint64_t length, int64_t timeout_ms,
                   uint64_t *lost_offsetp, uint64_t *lost_lengthp);
/* The same without waiting. A hint: it is dropped while the coordinator is away or does not keep up. */
int pcshare_prefetch(struct pcshare_attachment *a, uint64_t offset, uint64_t length);
/* 1: every page of the range is here; 0; -EINVAL: outside the block. */
int pcshare_is_received(const struct pcshare_attachment *a, uint64_t offset, uint64_t length);
void pcshare_get_progress(const struct pcshare_attachment *a, struct pcshare_progress *progress);
/* Waits until the progress is no longer the one of seq, or the attachment's state changes. 0, at once if it is complete
 * or lost; -ETIMEDOUT; -EINTR. */
int pcshare_wait_progress(const struct pcshare_attachment *a, uint32_t seq, int64_t timeout_ms);

/* What went wrong in this thread's last failed call, with the cure where there is one. Never NULL. */
const char *pcshare_error_text(void);

#endif
