/* waiters: who waits for which page, by block and page and by nobody's address.
 *
 * One entry a page however many wait for it; an entry lives from the first wait until the page is placed, so it is also
 * the record of what was asked of the source and must be asked again when the source comes back. One short lock; no
 * system call under it. A waiter is a thread of a remote fd: a thread that a signal makes fault again is not a second
 * waiter.
 */
#ifndef PCSHARE_WAITERS_H
#define PCSHARE_WAITERS_H

#include <pthread.h>
#include <stdint.h>

#include "remote_fd.h"

enum { WAITERS_BUCKETS = 4096 };

/* How far a page is on its way to the source. */
enum {
    WAITERS_UNASKED = 0,
    WAITERS_ASKED = 1,  /* the source was asked and has not answered */
    WAITERS_QUEUED = 2, /* it is in the queue of some helper that waits for it (demand.c) */
};

struct waiter {
    struct waiter *next;
    struct remote_fd *remote; /* counted */
    uint64_t page;
    uint32_t tid;
    uint64_t start_ns;
};

struct wait_entry {
    struct wait_entry *next;
    struct ramblock *block;
    uint64_t page;
    int asked;         /* WAITERS_UNASKED, _ASKED or _QUEUED */
    int late;          /* that took too long, which has been told */
    uint64_t asked_ns; /* when the source was asked: the time in a helper's queue does not count */
    struct waiter *waiters;
};

struct waiters {
    pthread_mutex_t lock;
    uint64_t entry_count; /* read without the lock, after a received bit was set */
    struct wait_entry *buckets[WAITERS_BUCKETS];
};

enum {
    WAITERS_ASK = 1,    /* nobody has asked the source: the caller must */
    WAITERS_JOINED = 2, /* somebody has */
};

void waiters_init(struct waiters *w);
void waiters_deinit(struct waiters *w);
/* Notes that a thread waits; ask: what the caller is going to do about it (WAITERS_ASKED, _QUEUED, or _UNASKED:
 * nothing) unless somebody has. WAITERS_ASK, WAITERS_JOINED, or -ENOMEM. A page that only others have in their queues
 * is not asked for: nobody waits behind what another helper wants. */
int waiters_add(struct waiters *w, struct ramblock *block, uint64_t page, struct remote_fd *remote, uint32_t tid,
                uint64_t now_ns, int ask);
/* Takes out everybody who waits for [page, page + n): the caller wakes and frees them. NULL: nobody. */
struct waiter *waiters_take(struct waiters *w, struct ramblock *block, uint64_t page, uint64_t n);
/* As take, but leaves the coordinator's own waiters, who cannot be given an error. */
struct waiter *waiters_take_remote(struct waiters *w, struct ramblock *block, uint64_t page);
void waiters_free_list(struct waiter *list);
/* The source answered with an error: it may be asked again. */
void waiters_unask(struct waiters *w, struct ramblock *block, uint64_t page);
/* Some entry of the block that is not asked, now marked queued: 1, *pagep and a helper that waits for it, counted, or
 * 0. *bucketp is where to go on, from 0. */
int waiters_next_unasked(struct waiters *w, struct ramblock *block, uint64_t now_ns, uint32_t *bucketp, uint64_t *pagep,
                         struct remote_fd **remotep);
/* 0: nobody waits any more, or somebody has asked. */
int waiters_is_queued(struct waiters *w, struct ramblock *block, uint64_t page);
/* The same; from here on it is asked. */
int waiters_claim_queued(struct waiters *w, struct ramblock *block, uint64_t page, uint64_t now_ns);
/* Some entry that was asked before then_ns and has not come, now marked late: 1, *blockp and *pagep, or 0. */
int waiters_next_late(struct waiters *w, uint64_t then_ns, uint32_t *bucketp, struct ramblock **blockp,
                      uint64_t *pagep);
int waiters_has_late(struct waiters *w, const struct ramblock *block);
/* What is late may be asked again. */
void waiters_unask_late(struct waiters *w, const struct ramblock *block);
/* Forgets a remote fd's waits; returns how many there were. What it had queued and others wait for is unasked from here
 * on. */
uint64_t waiters_drop_remote(struct waiters *w, const struct remote_fd *remote);
void waiters_drop_block(struct waiters *w, const struct ramblock *block);

#endif
