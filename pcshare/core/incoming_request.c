/* incoming_request: what was asked of a source that pushes, by block and page, until it has come; and the page
 * channels that ask. See incoming.h.
 *
 * An entry is answered by the arrival of its pages, never by a message. Requests that have not left yet are kept apart
 * by is_demand: a fault overtakes ranges for as long as they are here.
 */
#define _GNU_SOURCE
#include "incoming_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "bitmap.h"

enum {
    PIECE_BYTES = 128 << 10, /* of a range: what a fault may have to wait behind once it has left */
    PIECES = 4,
    DEMANDS_OF_ONE = 16, /* requested pages of one helper: another's is asked for behind no more */
};

struct incoming_channel {
    struct page_channel channel;
    struct incoming_block *block;
    int poll_fd; /* a duplicate of the migration's epoll: one poller takes the same file once under each number */
};

/* ---- queues: with the lock held ---- */

static void link_before(struct queue *where, struct queue *link)
{
    link->next = where;
    link->prev = where->prev;
    where->prev->next = link;
    where->prev = link;
}

static void unlink_entry(struct outstanding *entry)
{
    entry->link.prev->next = entry->link.next;
    entry->link.next->prev = entry->link.prev;
}

static struct outstanding **bucket_of(struct incoming_block *block, uint64_t page)
{
    uint64_t mixed = (page ^ (uint64_t)block->index << 40) * 0x9e3779b97f4a7c15ull;

    return &block->in->buckets[mixed >> 32 & (INCOMING_BUCKETS - 1)];
}

static struct outstanding **chain_of(struct outstanding *entry)
{
    return entry->n_pages == 1 ? bucket_of(entry->block, entry->page) : &entry->block->ranges;
}

static void add(struct incoming *in, struct outstanding *entry)
{
    struct outstanding **chain = chain_of(entry);

    entry->chain = *chain;
    *chain = entry;
    link_before(&in->unsent[!!entry->request->is_demand], &entry->link);
    __atomic_fetch_add(&in->n_outstanding, 1, __ATOMIC_RELAXED);
    __atomic_fetch_add(&entry->block->n_outstanding, 1, __ATOMIC_SEQ_CST);
}

/* *at is in its chain; it goes to the list. */
static void take_out(struct outstanding **at, struct outstanding **listp)
{
    struct outstanding *entry = *at;

    *at = entry->chain;
    unlink_entry(entry);
    __atomic_fetch_sub(&entry->block->in->n_outstanding, 1, __ATOMIC_RELAXED);
    __atomic_fetch_sub(&entry->block->n_outstanding, 1, __ATOMIC_SEQ_CST);
    entry->chain = *listp;
    *listp = entry;
}

/* Those of one block, or, with NULL, all. */
static struct outstanding *take_all(struct incoming *in, const struct incoming_block *block)
{
    struct queue *queues[] = {&in->sent[1], &in->sent[0], &in->unsent[1], &in->unsent[0]};
    struct outstanding *list = NULL;

    for (size_t i = 0; i < sizeof(queues) / sizeof(*queues); i++) {
        struct queue *link = queues[i]->next;

        while (link != queues[i]) {
            struct outstanding *entry = (struct outstanding *)link, **at = chain_of(entry);

            link = link->next;
            if (block && entry->block != block)
                continue;
            while (*at != entry)
                at = &(*at)->chain;
            take_out(at, &list);
        }
    }
    return list;
}

void requests_end(struct outstanding *list, int result)
{
    while (list) {
        struct outstanding *entry = list;
        struct page_request *request = entry->request;

        list = entry->chain;
        free(entry);
        request->done(request, result);
    }
}

/* ---- what has come ---- */

int incoming_is_received(const struct incoming_block *block, uint64_t page, uint64_t n_pages)
{
    uint64_t start = page * block->target_per_page, end = (page + n_pages) * block->target_per_page;

    return bitmap_next_clear(block->received, start, end) == end;
}

int incoming_is_wanted(struct incoming_block *block, uint64_t page)
{
    struct incoming *in = block->in;
    int found = 0;

    if (!__atomic_load_n(&block->n_outstanding, __ATOMIC_SEQ_CST))
        return 0;
    pthread_mutex_lock(&in->lock);
    for (struct outstanding *entry = *bucket_of(block, page); entry && !found; entry = entry->chain)
        found = entry->block == block && entry->page == page && entry->request->is_demand;
    pthread_mutex_unlock(&in->lock);
    return found;
}

static void take_single(struct incoming_block *block, uint64_t page, struct outstanding **listp)
{
    struct outstanding **at = bucket_of(block, page);

    while (*at) {
        if ((*at)->block == block && (*at)->page == page)
            take_out(at, listp);
        else
            at = &(*at)->chain;
    }
}

struct outstanding *requests_take_arrived(struct incoming_block *block, uint64_t page, uint64_t n_pages)
{
    struct outstanding *list = NULL, **at = &block->ranges;

    if (!block->n_outstanding)
        return NULL;
    for (uint64_t i = page; i < page + n_pages; i++)
        take_single(block, i, &list);
    while (*at) {
        struct outstanding *entry = *at;

        if (entry->page < page + n_pages && page < entry->page + entry->n_pages &&
            incoming_is_received(block, entry->page, entry->n_pages))
            take_out(at, &list);
        else
            at = &entry->chain;
    }
    return list;
}

/* ---- what is to be asked ---- */

struct outstanding *requests_next_unsent(struct incoming *in)
{
    for (int is_demand = 1; is_demand >= 0; is_demand--)
        if (in->unsent[is_demand].next != &in->unsent[is_demand])
            return (struct outstanding *)in->unsent[is_demand].next;
    return NULL;
}

void requests_mark_sent(struct outstanding *entry)
{
    struct incoming *in = entry->block->in;

    entry->is_sent = 1;
    unlink_entry(entry);
    link_before(&in->sent[!!entry->request->is_demand], &entry->link);
}

/* A touch and a range may both want the same page. */
int requests_is_asked(const struct outstanding *entry)
{
    if (entry->n_pages > 1)
        return 0;
    for (const struct outstanding *other = *bucket_of(entry->block, entry->page); other; other = other->chain)
        if (other->block == entry->block && other->page == entry->page && other->is_sent)
            return 1;
    return 0;
}

void requests_unsend(struct incoming *in)
{
    for (int is_demand = 0; is_demand < 2; is_demand++) {
        struct queue *first_unsent = in->unsent[is_demand].next, *sent = &in->sent[is_demand];

        while (sent->next != sent) {
            struct outstanding *entry = (struct outstanding *)sent->next;

            entry->is_sent = 0;
            unlink_entry(entry);
            link_before(first_unsent, &entry->link);
        }
    }
}

/* ---- the page channel ---- */

static int channel_read_now(struct page_channel *channel, void *bytes, uint64_t length, uint64_t offset)
{
    (void)channel;
    (void)bytes;
    (void)length;
    (void)offset;
    return PAGE_CHANNEL_WOULD_BLOCK;
}

static int entry_new(struct outstanding **entryp, struct incoming_block *block, struct page_request *request)
{
    uint64_t end = request->offset + request->length;

    if (request->length == 0 || end < request->offset || end > block->used_length || request->offset % block->page_size)
        return -EINVAL;
    struct outstanding *entry = calloc(1, sizeof(*entry));
    if (!entry)
        return -ENOMEM;
    entry->block = block;
    entry->request = request;
    entry->page = request->offset / block->page_size;
    entry->n_pages = (request->length + block->page_size - 1) / block->page_size;
    *entryp = entry;
    return 0;
}

static void channel_submit(struct page_channel *channel, struct page_request *request)
{
    struct incoming_block *block = ((struct incoming_channel *)channel)->block;
    struct incoming *in = block->in;
    struct outstanding *entry;
    int result = entry_new(&entry, block, request);

    if (result < 0) {
        request->done(request, result);
        return;
    }
    pthread_mutex_lock(&in->lock);
    if (incoming_is_received(block, entry->page, entry->n_pages)) /* it came while it was being asked for */
        result = PAGE_CHANNEL_ARRIVED;
    else if (in->given_up)
        result = -in->given_up;
    if (!result) {
        add(in, entry); /* from here on it may be answered and gone at any time the lock is open */
        path_send(in);
    }
    pthread_mutex_unlock(&in->lock);
    if (result)
        requests_end(entry, result);
}

static int channel_poll_fd(struct page_channel *channel)
{
    return ((struct incoming_channel *)channel)->poll_fd;
}

static void channel_dispatch(struct page_channel *channel)
{
    struct incoming *in = ((struct incoming_channel *)channel)->block->in;
    struct epoll_event event;

    if (epoll_wait(in->epoll_fd, &event, 1, 0) != 1)
        return;
    pthread_mutex_lock(&in->lock);
    path_ready(in);
    pthread_mutex_unlock(&in->lock);
}

/* Nothing of the block is placed after this: streams that bring more are told. */
static void channel_free(struct page_channel *channel)
{
    struct incoming_channel *c = (struct incoming_channel *)channel;
    struct incoming_block *block = c->block;
    struct incoming *in = block->in;

    pthread_mutex_lock(&in->lock);
    __atomic_store_n(&block->state, BLOCK_GONE, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&in->changed);
    while (block->placing)
        pthread_cond_wait(&in->changed, &in->lock);
    struct outstanding *list = take_all(in, block);
    pthread_mutex_unlock(&in->lock);
    requests_end(list, -ECANCELED);
    close(c->poll_fd);
    free(c);
    incoming_put(in);
}

static const struct page_channel_ops channel_ops = {
    .read_now = channel_read_now,
    .submit = channel_submit,
    .free = channel_free,
    .poll_fd = channel_poll_fd,
    .dispatch = channel_dispatch,
};

static int claim_channel(struct incoming_block *block)
{
    pthread_mutex_lock(&block->in->lock);
    int rc = block->has_channel ? -EEXIST : block->state == BLOCK_UNMAPPED ? 0 : -EINVAL;
    if (rc == 0)
        block->has_channel = 1;
    pthread_mutex_unlock(&block->in->lock);
    return rc;
}

int incoming_page_channel(struct incoming *in, uint32_t index, struct page_channel **channelp)
{
    struct incoming_block *block = incoming_block_at(in, index);

    *channelp = NULL;
    if (!block)
        return -ENOENT;
    struct incoming_channel *c = calloc(1, sizeof(*c));
    if (!c)
        return -ENOMEM;
    c->channel = (struct page_channel){.ops = &channel_ops,
                                       .stream_piece_bytes = PIECE_BYTES,
                                       .stream_piece_count = PIECES,
                                       .stream_piece_count_demand = PIECES,
                                       .demands_of_one = DEMANDS_OF_ONE,
                                       .pushes = 1};
    c->block = block;
    c->poll_fd = fcntl(in->epoll_fd, F_DUPFD_CLOEXEC, 0);
    int rc = c->poll_fd < 0 ? -errno : claim_channel(block);
    if (rc < 0) {
        if (c->poll_fd >= 0)
            close(c->poll_fd);
        free(c);
        return rc;
    }
    incoming_get(in);
    *channelp = &c->channel;
    return 0;
}

/* ---- giving up ---- */

void incoming_give_up(struct incoming *in, int error)
{
    pthread_mutex_lock(&in->lock);
    in->given_up = error;
    struct outstanding *list = error ? take_all(in, NULL) : NULL;
    pthread_mutex_unlock(&in->lock);
    requests_end(list, -error);
}

uint64_t incoming_outstanding(struct incoming *in)
{
    pthread_mutex_lock(&in->lock);
    uint64_t n = in->n_outstanding;
    pthread_mutex_unlock(&in->lock);
    return n;
}
