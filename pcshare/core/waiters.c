/* waiters: see waiters.h. */
#include "waiters.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

void waiters_init(struct waiters *w)
{
    memset(w, 0, sizeof(*w));
    pthread_mutex_init(&w->lock, NULL);
}

static struct wait_entry **bucket_of(struct waiters *w, const struct ramblock *block, uint64_t page)
{
    uint64_t hash = (page + ((uint64_t)block->index << 40)) * 0x9E3779B97F4A7C15ull;

    return &w->buckets[hash >> 52 & (WAITERS_BUCKETS - 1)];
}

static struct wait_entry **find(struct waiters *w, const struct ramblock *block, uint64_t page)
{
    struct wait_entry **entryp = bucket_of(w, block, page);

    while (*entryp && ((*entryp)->block != block || (*entryp)->page != page))
        entryp = &(*entryp)->next;
    return entryp;
}

static void unlink_entry(struct waiters *w, struct wait_entry **entryp)
{
    struct wait_entry *entry = *entryp;

    *entryp = entry->next;
    free(entry);
    __atomic_fetch_sub(&w->entry_count, 1, __ATOMIC_SEQ_CST);
}

static struct wait_entry *find_or_add(struct waiters *w, struct ramblock *block, uint64_t page)
{
    struct wait_entry **entryp = find(w, block, page);

    if (!*entryp) {
        struct wait_entry *entry = calloc(1, sizeof(*entry));
        if (!entry)
            return NULL;
        entry->block = block;
        entry->page = page;
        *entryp = entry;
        __atomic_fetch_add(&w->entry_count, 1, __ATOMIC_SEQ_CST);
    }
    return *entryp;
}

static int add_waiter(struct wait_entry *entry, struct remote_fd *remote, uint32_t tid, uint64_t now_ns)
{
    for (struct waiter *waiter = entry->waiters; waiter; waiter = waiter->next)
        if (waiter->remote == remote && waiter->tid == tid)
            return 0;
    struct waiter *waiter = calloc(1, sizeof(*waiter));
    if (!waiter)
        return -ENOMEM;
    waiter->remote = remote_fd_get(remote);
    waiter->page = entry->page;
    waiter->tid = tid;
    waiter->start_ns = now_ns;
    waiter->next = entry->waiters;
    entry->waiters = waiter;
    if (remote->status)
        __atomic_fetch_add(&remote->status->waiting, 1, __ATOMIC_RELAXED);
    return 0;
}

static int has_waiter_of(const struct wait_entry *entry, const struct remote_fd *remote)
{
    for (const struct waiter *waiter = entry->waiters; waiter; waiter = waiter->next)
        if (waiter->remote == remote)
            return 1;
    return 0;
}

static void mark_asked(struct wait_entry *entry, int asked, uint64_t now_ns)
{
    entry->asked_ns = now_ns;
    entry->late = 0;
    entry->asked = asked;
}

int waiters_add(struct waiters *w, struct ramblock *block, uint64_t page, struct remote_fd *remote, uint32_t tid,
                uint64_t now_ns, int ask)
{
    int rc = -ENOMEM, is_in_hand = 0;

    pthread_mutex_lock(&w->lock);
    struct wait_entry *entry = find_or_add(w, block, page);
    if (entry) {
        is_in_hand = entry->asked == WAITERS_ASKED || (entry->asked == WAITERS_QUEUED && has_waiter_of(entry, remote));
        rc = add_waiter(entry, remote, tid, now_ns);
    }
    if (rc == 0) {
        rc = is_in_hand ? WAITERS_JOINED : WAITERS_ASK;
        if (!is_in_hand && ask)
            mark_asked(entry, ask, now_ns);
    }
    pthread_mutex_unlock(&w->lock);
    return rc;
}

/* Moves the waiters that match to *listp; with them goes their share of the gauge. */
static void move_waiters(struct wait_entry *entry, int keep_own, struct waiter **listp)
{
    struct waiter **waiterp = &entry->waiters;

    while (*waiterp) {
        struct waiter *waiter = *waiterp;
        if (keep_own && waiter->remote->is_own) {
            waiterp = &waiter->next;
            continue;
        }
        *waiterp = waiter->next;
        waiter->next = *listp;
        *listp = waiter;
        if (waiter->remote->status)
            __atomic_fetch_sub(&waiter->remote->status->waiting, 1, __ATOMIC_RELAXED);
    }
}

/* Whether the entry is gone. */
static int take_entry(struct waiters *w, struct wait_entry **entryp, int keep_own, struct waiter **listp)
{
    move_waiters(*entryp, keep_own, listp);
    if ((*entryp)->waiters) {
        (*entryp)->asked = WAITERS_UNASKED;
        return 0;
    }
    unlink_entry(w, entryp);
    return 1;
}

/* For more pages than there are buckets: all that wait, instead of all pages. */
static void take_from_buckets(struct waiters *w, const struct ramblock *block, uint64_t page, uint64_t n, int keep_own,
                              struct waiter **listp)
{
    for (uint32_t i = 0; i < WAITERS_BUCKETS; i++) {
        struct wait_entry **entryp = &w->buckets[i];
        while (*entryp) {
            struct wait_entry *entry = *entryp;
            int wanted = entry->block == block && entry->page >= page && entry->page - page < n;
            if (!wanted || !take_entry(w, entryp, keep_own, listp))
                entryp = &entry->next;
        }
    }
}

static struct waiter *take(struct waiters *w, struct ramblock *block, uint64_t page, uint64_t n, int keep_own)
{
    struct waiter *list = NULL;

    if (__atomic_load_n(&w->entry_count, __ATOMIC_SEQ_CST) == 0)
        return NULL;
    pthread_mutex_lock(&w->lock);
    if (n > WAITERS_BUCKETS)
        take_from_buckets(w, block, page, n, keep_own, &list);
    for (uint64_t i = page; n <= WAITERS_BUCKETS && i < page + n; i++) {
        struct wait_entry **entryp = find(w, block, i);
        if (*entryp)
            (void)take_entry(w, entryp, keep_own, &list);
    }
    pthread_mutex_unlock(&w->lock);
    return list;
}

struct waiter *waiters_take(struct waiters *w, struct ramblock *block, uint64_t page, uint64_t n)
{
    return take(w, block, page, n, 0);
}

struct waiter *waiters_take_remote(struct waiters *w, struct ramblock *block, uint64_t page)
{
    return take(w, block, page, 1, 1);
}

void waiters_free_list(struct waiter *list)
{
    while (list) {
        struct waiter *next = list->next;
        remote_fd_put(list->remote);
        free(list);
        list = next;
    }
}

void waiters_unask(struct waiters *w, struct ramblock *block, uint64_t page)
{
    pthread_mutex_lock(&w->lock);
    struct wait_entry **entryp = find(w, block, page);
    if (*entryp) {
        (*entryp)->asked = WAITERS_UNASKED;
        if (!(*entryp)->waiters)
            unlink_entry(w, entryp);
    }
    pthread_mutex_unlock(&w->lock);
}

typedef int entry_test(const struct wait_entry *entry, const struct ramblock *block, uint64_t then_ns);

/* With the lock held: the next entry that passes, from bucket *bucketp on; that bucket may hold more. */
static struct wait_entry *next_entry(struct waiters *w, uint32_t *bucketp, entry_test *passes,
                                     const struct ramblock *block, uint64_t then_ns)
{
    for (; w->entry_count && *bucketp < WAITERS_BUCKETS; (*bucketp)++)
        for (struct wait_entry *entry = w->buckets[*bucketp]; entry; entry = entry->next)
            if (passes(entry, block, then_ns))
                return entry;
    return NULL;
}

/* One without waiters has nobody to ask for it. */
static int is_unasked(const struct wait_entry *entry, const struct ramblock *block, uint64_t then_ns)
{
    (void)then_ns;
    return entry->block == block && !entry->asked && entry->waiters;
}

int waiters_next_unasked(struct waiters *w, struct ramblock *block, uint64_t now_ns, uint32_t *bucketp, uint64_t *pagep,
                         struct remote_fd **remotep)
{
    pthread_mutex_lock(&w->lock);
    struct wait_entry *entry = next_entry(w, bucketp, is_unasked, block, 0);
    if (entry) {
        mark_asked(entry, WAITERS_QUEUED, now_ns);
        *pagep = entry->page;
        *remotep = remote_fd_get(entry->waiters->remote);
    }
    pthread_mutex_unlock(&w->lock);
    return entry != NULL;
}

int waiters_is_queued(struct waiters *w, struct ramblock *block, uint64_t page)
{
    pthread_mutex_lock(&w->lock);
    const struct wait_entry *entry = *find(w, block, page);
    int is_queued = entry && entry->asked == WAITERS_QUEUED;
    pthread_mutex_unlock(&w->lock);
    return is_queued;
}

int waiters_claim_queued(struct waiters *w, struct ramblock *block, uint64_t page, uint64_t now_ns)
{
    pthread_mutex_lock(&w->lock);
    struct wait_entry *entry = *find(w, block, page);
    int is_claimed = entry && entry->asked == WAITERS_QUEUED;
    if (is_claimed)
        mark_asked(entry, WAITERS_ASKED, now_ns);
    pthread_mutex_unlock(&w->lock);
    return is_claimed;
}

/* ---- what takes too long ---- */

static int is_newly_late(const struct wait_entry *entry, const struct ramblock *block, uint64_t then_ns)
{
    (void)block;
    return entry->asked == WAITERS_ASKED && !entry->late && entry->waiters && entry->asked_ns <= then_ns;
}

int waiters_next_late(struct waiters *w, uint64_t then_ns, uint32_t *bucketp, struct ramblock **blockp, uint64_t *pagep)
{
    pthread_mutex_lock(&w->lock);
    struct wait_entry *entry = next_entry(w, bucketp, is_newly_late, NULL, then_ns);
    if (entry) {
        entry->late = 1;
        *blockp = entry->block;
        *pagep = entry->page;
    }
    pthread_mutex_unlock(&w->lock);
    return entry != NULL;
}

static int is_late_of(const struct wait_entry *entry, const struct ramblock *block, uint64_t then_ns)
{
    (void)then_ns;
    return entry->block == block && entry->asked && entry->late && entry->waiters;
}

int waiters_has_late(struct waiters *w, const struct ramblock *block)
{
    uint32_t bucket = 0;

    pthread_mutex_lock(&w->lock);
    int found = next_entry(w, &bucket, is_late_of, block, 0) != NULL;
    pthread_mutex_unlock(&w->lock);
    return found;
}

void waiters_unask_late(struct waiters *w, const struct ramblock *block)
{
    struct wait_entry *entry;
    uint32_t bucket = 0;

    pthread_mutex_lock(&w->lock);
    while ((entry = next_entry(w, &bucket, is_late_of, block, 0)))
        entry->asked = WAITERS_UNASKED;
    pthread_mutex_unlock(&w->lock);
}

/* ---- who goes ---- */

/* Takes the waiters of one remote fd out of one entry. */
static uint64_t drop_from_entry(struct wait_entry *entry, const struct remote_fd *remote, struct waiter **listp)
{
    struct waiter **waiterp = &entry->waiters;
    uint64_t dropped = 0;

    while (*waiterp) {
        struct waiter *waiter = *waiterp;
        if (waiter->remote != remote) {
            waiterp = &waiter->next;
            continue;
        }
        *waiterp = waiter->next;
        waiter->next = *listp;
        *listp = waiter;
        dropped++;
    }
    return dropped;
}

uint64_t waiters_drop_remote(struct waiters *w, const struct remote_fd *remote)
{
    struct waiter *list = NULL;
    uint64_t dropped = 0;

    pthread_mutex_lock(&w->lock);
    for (uint32_t i = 0; i < WAITERS_BUCKETS && w->entry_count; i++) {
        struct wait_entry **entryp = &w->buckets[i];
        while (*entryp) {
            uint64_t dropped_here = drop_from_entry(*entryp, remote, &list);
            dropped += dropped_here;
            if (dropped_here && (*entryp)->asked == WAITERS_QUEUED)
                (*entryp)->asked = WAITERS_UNASKED; /* it may have been in its queue alone */
            if (!(*entryp)->waiters && !(*entryp)->asked)
                unlink_entry(w, entryp);
            else
                entryp = &(*entryp)->next;
        }
    }
    pthread_mutex_unlock(&w->lock);
    if (remote->status)
        __atomic_fetch_sub(&remote->status->waiting, dropped, __ATOMIC_RELAXED);
    waiters_free_list(list);
    return dropped;
}

void waiters_drop_block(struct waiters *w, const struct ramblock *block)
{
    struct waiter *list = NULL;

    pthread_mutex_lock(&w->lock);
    for (uint32_t i = 0; i < WAITERS_BUCKETS; i++) {
        struct wait_entry **entryp = &w->buckets[i];
        while (*entryp) {
            if ((*entryp)->block != block) {
                entryp = &(*entryp)->next;
                continue;
            }
            move_waiters(*entryp, 0, &list);
            unlink_entry(w, entryp);
        }
    }
    pthread_mutex_unlock(&w->lock);
    waiters_free_list(list);
}

void waiters_deinit(struct waiters *w)
{
    for (uint32_t i = 0; i < WAITERS_BUCKETS; i++) {
        while (w->buckets[i]) {
            struct waiter *list = NULL;
            move_waiters(w->buckets[i], 0, &list);
            unlink_entry(w, &w->buckets[i]);
            waiters_free_list(list);
        }
    }
    pthread_mutex_destroy(&w->lock);
}
