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
    int asked; /* the source was asked and has not answered */
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
/* Notes that a thread waits; with ask, that the caller asks the source unless somebody has. WAITERS_ASK,
 * WAITERS_JOINED, or -ENOMEM. */
int waiters_add(struct waiters *w, struct ramblock *block, uint64_t page, struct remote_fd *remote, uint32_t tid,
                uint64_t now_ns, int ask);
/* Takes out everybody who waits for [page, page + n): the caller wakes and frees them. NULL: nobody. */
struct waiter *waiters_take(struct waiters *w, struct ramblock *block, uint64_t page, uint64_t n);
/* As take, but leaves the coordinator's own waiters, who cannot be given an error. */
struct waiter *waiters_take_remote(struct waiters *w, struct ramblock *block, uint64_t page);
void waiters_free_list(struct waiter *list);
/* The source answered with an error: it may be asked again. */
void waiters_unask(struct waiters *w, struct ramblock *block, uint64_t page);
/* Some entry of the block that is not asked, now marked asked: 1 and *pagep, or 0. *bucketp is where to go on, from 0.
 */
int waiters_next_unasked(struct waiters *w, struct ramblock *block, uint32_t *bucketp, uint64_t *pagep);
/* Forgets a remote fd's waits; returns how many there were. */
uint64_t waiters_drop_remote(struct waiters *w, const struct remote_fd *remote);
void waiters_drop_block(struct waiters *w, const struct ramblock *block);

#endif
