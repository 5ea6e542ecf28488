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

int waiters_add(struct waiters *w, struct ramblock *block, uint64_t page, struct remote_fd *remote, uint32_t tid,
                uint64_t now_ns, int ask)
{
    int rc = -ENOMEM;

    pthread_mutex_lock(&w->lock);
    struct wait_entry *entry = find_or_add(w, block, page);
    if (entry)
        rc = add_waiter(entry, remote, tid, now_ns);
    if (rc == 0) {
        rc = entry->asked ? WAITERS_JOINED : WAITERS_ASK;
        entry->asked |= ask;
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
        (*entryp)->asked = 0;
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
        (*entryp)->asked = 0;
        if (!(*entryp)->waiters)
            unlink_entry(w, entryp);
    }
    pthread_mutex_unlock(&w->lock);
}

int waiters_next_unasked(struct waiters *w, struct ramblock *block, uint32_t *bucketp, uint64_t *pagep)
{
    int found = 0;

    pthread_mutex_lock(&w->lock);
    for (; !found && *bucketp < WAITERS_BUCKETS; (*bucketp)++) {
        for (struct wait_entry *entry = w->buckets[*bucketp]; entry && !found; entry = entry->next) {
            if (entry->block != block || entry->asked)
                continue;
            entry->asked = 1;
            *pagep = entry->page;
            found = 1;
        }
        if (found)
            break; /* there may be more in this bucket */
    }
    pthread_mutex_unlock(&w->lock);
    return found;
}

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
            dropped += drop_from_entry(*entryp, remote, &list);
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
