/* demand: what helpers' faults ask of sources: so many pages of one helper at once, the rest in its own queue.
 *
 * A source answers in turn. Were everything handed on to it, a helper with a thousand threads in faults would have
 * filled its queue, and another's one page would wait behind a thousand. So each helper has a few pages at a source and
 * keeps the rest to itself: whoever else faults waits behind a few. Asks in the order of the helper's faults; what has
 * come by another way meanwhile is not asked for.
 */
#include "fault_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct demand {
    struct page_request request;
    struct fault_threads *ft;
    struct served_block *served;
    uint32_t asker; /* the remote fd whose fault it is */
    uint8_t bytes[];
};

/* ---- a helper's share ---- */

static uint32_t share_of(struct fault_threads *ft, const struct remote_fd *remote)
{
    const struct page_channel *channel = served_block_of(ft, remote->block)->channel;
    uint32_t share = __atomic_load_n(&channel->demands_of_one, __ATOMIC_RELAXED);

    return remote->is_own || !share ? UINT32_MAX : share;
}

int demand_reserve(struct fault_threads *ft, struct remote_fd *remote)
{
    struct demand_queue *queue = &remote->demands;
    uint32_t share = share_of(ft, remote);

    pthread_mutex_lock(&ft->demands_lock);
    int is_free = !queue->head && queue->at_source < share; /* who came before goes first */
    queue->at_source += (uint32_t)is_free;
    pthread_mutex_unlock(&ft->demands_lock);
    return is_free;
}

static int take_queued(struct fault_threads *ft, struct remote_fd *remote, uint64_t *pagep)
{
    struct demand_queue *queue = &remote->demands;
    uint32_t share = share_of(ft, remote);

    pthread_mutex_lock(&ft->demands_lock);
    struct queued_page *first = queue->at_source < share ? queue->head : NULL;
    if (first) {
        queue->head = first->next;
        if (!queue->head)
            queue->tail = NULL;
        queue->n_queued--;
        queue->at_source++;
    }
    pthread_mutex_unlock(&ft->demands_lock);
    if (!first)
        return 0;
    *pagep = first->page;
    free(first);
    return 1;
}

static void give_back_place(struct fault_threads *ft, struct remote_fd *remote)
{
    pthread_mutex_lock(&ft->demands_lock);
    remote->demands.at_source--;
    pthread_mutex_unlock(&ft->demands_lock);
}

/* An answer may come at once, and would ask for the next from within: only the outermost asks, and looks again. */
static void ask_queued(struct fault_threads *ft, struct remote_fd *remote)
{
    struct demand_queue *queue = &remote->demands;
    uint64_t page;

    if (__atomic_fetch_add(&queue->looks, 1, __ATOMIC_ACQ_REL) > 0)
        return;
    uint32_t seen;
    do {
        seen = __atomic_load_n(&queue->looks, __ATOMIC_ACQUIRE);
        while (!__atomic_load_n(&ft->quit, __ATOMIC_ACQUIRE) && take_queued(ft, remote, &page)) {
            if (waiters_claim_queued(&ft->waiters, remote->block, page))
                demand_ask(ft, remote, page);
            else
                give_back_place(ft, remote);
        }
    } while (__atomic_sub_fetch(&queue->looks, seen, __ATOMIC_ACQ_REL) > 0);
}

void demand_release(struct fault_threads *ft, struct remote_fd *remote)
{
    give_back_place(ft, remote);
    ask_queued(ft, remote);
}

uint32_t demand_count(struct fault_threads *ft, const struct remote_fd *remote)
{
    pthread_mutex_lock(&ft->demands_lock);
    uint32_t n = remote->demands.at_source + remote->demands.n_queued;
    pthread_mutex_unlock(&ft->demands_lock);
    return n;
}

/* ---- asking ---- */

/* Whoever asked may be gone by now, and its place with it. */
static void demand_ended(struct fault_threads *ft, uint32_t asker, int is_over)
{
    struct remote_fd *remote = remote_by_id(ft, asker);

    if (!remote)
        return;
    if (is_over)
        give_back_place(ft, remote);
    else
        demand_release(ft, remote);
    remote_fd_put(remote);
}

static void demand_done(struct page_request *request, int result)
{
    struct demand *demand = request->owner;
    struct fault_threads *ft = demand->ft;
    uint32_t asker = demand->asker;

    page_answered(ft, demand->served, request, asker, result);
    free(demand);
    if (__atomic_sub_fetch(&ft->demand_in_flight, 1, __ATOMIC_ACQ_REL) == 0)
        stream_poke(ft);
    demand_ended(ft, asker, result == -ECANCELED); /* then its channel goes away: it is asked for nothing more */
}

void demand_ask(struct fault_threads *ft, struct remote_fd *remote, uint64_t page)
{
    struct served_block *served = served_block_of(ft, remote->block);
    struct ramblock *block = remote->block;
    struct demand *demand = malloc(sizeof(*demand) + block->page_size);

    if (!demand) {
        give_back_place(ft, remote);
        page_failed(ft, served, page, ENOMEM, EVENT_BLOCK_PLACE_ERROR);
        return;
    }
    demand->ft = ft;
    demand->served = served;
    demand->asker = remote->id;
    demand->request = (struct page_request){.offset = page * block->page_size,
                                            .length = source_length(block, page, 1),
                                            .bytes = demand->bytes,
                                            .is_demand = 1,
                                            .done = demand_done,
                                            .owner = demand,
                                            .block_index = block->index,
                                            .page = page,
                                            .n_pages = 1};
    __atomic_fetch_add(&ft->demand_in_flight, 1, __ATOMIC_ACQ_REL);
    page_channel_submit(served->channel, &demand->request);
}

void demand_queue_page(struct fault_threads *ft, struct remote_fd *remote, uint64_t page)
{
    struct demand_queue *queue = &remote->demands;
    struct queued_page *last = malloc(sizeof(*last));

    if (!last) {
        page_failed(ft, served_block_of(ft, remote->block), page, ENOMEM, EVENT_BLOCK_PLACE_ERROR);
        return;
    }
    *last = (struct queued_page){.page = page};
    pthread_mutex_lock(&ft->demands_lock);
    if (queue->tail)
        queue->tail->next = last;
    else
        queue->head = last;
    queue->tail = last;
    queue->n_queued++;
    pthread_mutex_unlock(&ft->demands_lock);
    ask_queued(ft, remote); /* all that were at the source may have come since it was found full */
}

void demand_ask_again(struct fault_threads *ft, struct served_block *served)
{
    struct remote_fd *remote;
    uint32_t bucket = 0;
    uint64_t page;

    /* Until one fails at once: what is left waits for the next resume. */
    while (!__atomic_load_n(&served->paused, __ATOMIC_ACQUIRE) &&
           waiters_next_unasked(&ft->waiters, served->block, clock_ns(), &bucket, &page, &remote)) {
        demand_queue_page(ft, remote, page);
        remote_fd_put(remote);
    }
}

void demand_drop_remote(struct fault_threads *ft, struct remote_fd *remote)
{
    struct served_block *served = served_block_of(ft, remote->block);

    waiters_drop_remote(&ft->waiters, remote);
    if (served && !remote->is_own)
        demand_ask_again(ft, served);
}
