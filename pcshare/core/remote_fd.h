/* remote_fd: the coordinator's record of one helper's uffd: the fd, the control socket, the map from client addresses
 * to a block (remote_maps.h), statistics. The coordinator's own uffd is one of these too.
 *
 * A pid is never a key: a process may attach as often as it likes. Counted references: the fds close with the last one.
 * Never places a page through a helper's uffd: its owner can make that hang or fail.
 */
#ifndef PCSHARE_REMOTE_FD_H
#define PCSHARE_REMOTE_FD_H

#include <stdint.h>
#include "ramblock.h"
#include "wire.h"

/* A page that is to be asked for when fewer are at the source. */
struct queued_page {
    struct queued_page *next;
    uint64_t page;
};

/* What its faults ask of the source; see demand.c, whose lock guards it. */
struct demand_queue {
    uint32_t at_source; /* asked for and not answered */
    uint32_t n_late;    /* these too, for so long that they count no more */
    uint32_t n_queued;
    uint32_t looks; /* how often the queue is to be looked at: who makes it 1 does */
    struct queued_page *head;
    struct queued_page *tail;
};

struct remote_map {
    uint64_t client_addr;
    uint64_t length;
    uint64_t page; /* the first page of the block that it shows */
};

struct remote_maps;
struct read_ahead;

struct remote_fd {
    int32_t references;
    uint32_t id;    /* slot and generation; what events name it by */
    int is_own;     /* the coordinator's: never poisoned, has no control socket */
    int has_events; /* a writable attachment: its uffd may send REMOVE, UNMAP and REMAP. Set before it is added */
    int is_strict;  /* registered for MINOR faults too: a page is mapped there when it is received. Set before */
    int uffd;
    int control; /* -1: none */
    int disabled;
    uint32_t requests_in_flight; /* ranges that it waits for */
    uint32_t hints_in_flight;    /* ranges that it prefetches */
    struct demand_queue demands; /* pages because it faulted */
    struct read_ahead *ahead;    /* where its threads read on */
    uint64_t range_turn;         /* the stream's: when a range of it had its last piece */
    struct ramblock *block;
    struct remote_maps *maps;
    uint32_t kept_slot;  /* its record among the kept maps */
    uint64_t probe_addr; /* somewhere in its address space */
    int must_lift;       /* a poison mark could not be lifted, since it was changing its address space */
    int32_t home_cpu;  /* the only CPU whose fault thread polls it; -1: a few do. The home_ fields are fault_home.c's */
    uint32_t home_tid; /* who faulted when somebody looked last */
    uint64_t home_look_ns;
    uint64_t home_fault_ns;   /* the last fault */
    uint32_t home_faults;     /* since the last look */
    int home_moves;           /* somebody is at it */
    uint64_t home_since_ns;   /* when it moved there; of whoever is at it */
    uint64_t home_far_ns;     /* the first wake-up since the last look that took long; 0: none yet */
    uint32_t home_in_vain;    /* how often it was followed so, in a row */
    uint64_t crowd_window_ns; /* the crowd_ fields are fault_crowd.c's */
    uint64_t crowd_threads;   /* that faulted since then, a bit each */
    uint64_t crowd_until_ns;
    uint64_t crowd_drain_ns; /* when all that waits is to be read next */
    struct status_helper *status;
    int32_t events; /* REMOTE_EVENT_* not yet told */
    int error;      /* the errno that goes with DISABLED */
    uint64_t error_addr;
};

/* uffd and control (or -1) are consumed, also on failure. */
int remote_fd_new(struct remote_fd **rp, struct ramblock *block, int uffd, int control, const struct remote_map *maps,
                  uint32_t n_maps, struct status_helper *status);
struct remote_fd *remote_fd_get(struct remote_fd *r);
void remote_fd_put(struct remote_fd *r);
/* 0 and the page that client_addr shows; -EFAULT: outside every map. */
int remote_fd_page(const struct remote_fd *r, uint64_t client_addr, uint64_t *pagep);
/* Wakes whoever waits for the page, in each map that shows it. */
int remote_fd_wake(const struct remote_fd *r, uint64_t page);
/* Maps a page and wakes who waits for it; then as many of its neighbours in [start, end) as come without trouble. All
 * of these must be received: what is mapped is read without a question. -EFAULT: the page is not in memory (a helper
 * removed it). -EAGAIN: not now, its address space is changing; who waits was not woken. Else he was, whatever came of
 * it. */
int remote_fd_give(const struct remote_fd *r, uint64_t page, uint64_t start, uint64_t end);
/* Makes a touch of the page SIGBUS, and takes that back. */
int remote_fd_poison(const struct remote_fd *r, uint64_t page);
/* -EAGAIN: not now, its address space is changing. -EFAULT: the page is not in memory. */
int remote_fd_unpoison(const struct remote_fd *r, uint64_t page);
/* What its address space became: REMAP, UNMAP. -ENOSPC: in more pieces than are followed. */
int remote_fd_move(struct remote_fd *r, uint64_t from_addr, uint64_t to_addr, uint64_t length);
int remote_fd_cut(struct remote_fd *r, uint64_t client_addr, uint64_t length);
/* -ESRCH: the address space is gone (exit or exec); 0: it lives; -EINVAL: not to be known, as of a 32-bit process. */
int remote_fd_probe(const struct remote_fd *r);

#endif
