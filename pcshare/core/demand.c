/* demand: what helpers' faults ask of sources: so many pages of one helper at once, the rest in its own queue.
 *
 * A source answers in turn. Were everything handed on to it, a helper with a thousand threads in faults would have
 * filled its queue, and another's one page would wait behind a thousand. So each helper has a few pages at a source and
 * keeps the rest to itself: whoever else faults waits behind a few. Asks in the order of the helper's faults; what has
 * come by another way meanwhile is not asked for. What is late gives its place up: a few pages that hang keep no other
 * page of the helper's from coming.
 */
#include "fault_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct demand {
    struct demand *next; /* of those that have a place, in the order of asking */
    struct demand *before;
    int has_place;
    uint64_t asked_ns;
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

/* What is late is no reason to wait, until there is so much of it that asking for more would only cost memory. */
static int has_room(const struct demand_queue *queue, uint32_t share)
{
    return queue->at_source < share && queue->n_late < FAULT_DEMANDS_IN_FLIGHT_MAX;
}

int demand_reserve(struct fault_threads *ft, struct remote_fd *remote)
{
    struct demand_queue *queue = &remote->demands;
    uint32_t share = share_of(ft, remote);

    pthread_mutex_lock(&ft->demands_lock);
    int is_free = !queue->head && has_room(queue, share); /* who came before goes first */
    queue->at_source += (uint32_t)is_free;
    pthread_mutex_unlock(&ft->demands_lock);
    return is_free;
}

static int take_queued(struct fault_threads *ft, struct remote_fd *remote, uint64_t *pagep)
{
    struct demand_queue *queue = &remote->demands;
    uint32_t share = share_of(ft, remote);

    pthread_mutex_lock(&ft->demands_lock);
    struct queued_page *first = has_room(queue, share) ? queue->head : NULL;
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
            if (waiters_claim_queued(&ft->waiters, remote->block, page, clock_ns()))
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

/* What came by another way, or nobody waits for, stands in a queue until its turn, which may be long in coming. */
void demand_drop_stale(struct fault_threads *ft, struct remote_fd *remote)
{
    struct demand_queue *queue = &remote->demands;
    struct queued_page **linkp = &queue->head, *kept = NULL;

    pthread_mutex_lock(&ft->demands_lock);
    while (*linkp) {
        struct queued_page *queued = *linkp;
        if (waiters_is_queued(&ft->waiters, remote->block, queued->page)) {
            kept = queued;
            linkp = &queued->next;
            continue;
        }
        *linkp = queued->next;
        queue->n_queued--;
        free(queued);
    }
    queue->tail = kept;
    pthread_mutex_unlock(&ft->demands_lock);
}

/* ---- what is late ---- */

static void link_demand(struct fault_threads *ft, struct demand *demand)
{
    pthread_mutex_lock(&ft->demands_lock);
    demand->has_place = 1;
    demand->asked_ns = clock_ns();
    demand->next = NULL;
    demand->before = ft->demands_tail;
    if (demand->before)
        demand->before->next = demand;
    else
        ft->demands_head = demand;
    ft->demands_tail = demand;
    pthread_mutex_unlock(&ft->demands_lock);
}

/* With the lock held. Whether the demand had its place until now. */
static int unlink_demand(struct fault_threads *ft, struct demand *demand)
{
    if (!demand->has_place)
        return 0;
    demand->has_place = 0;
    *(demand->before ? &demand->before->next : &ft->demands_head) = demand->next;
    *(demand->next ? &demand->next->before : &ft->demands_tail) = demand->before;
    return 1;
}

/* With the lock held: the oldest, if it was asked before then_ns. */
static struct demand *oldest(struct fault_threads *ft, uint64_t then_ns)
{
    struct demand *demand = ft->demands_head;

    return demand && demand->asked_ns <= then_ns ? demand : NULL;
}

static int find_late(struct fault_threads *ft, uint64_t then_ns, uint32_t *askerp)
{
    pthread_mutex_lock(&ft->demands_lock);
    struct demand *demand = oldest(ft, then_ns);
    if (demand)
        *askerp = demand->asker;
    pthread_mutex_unlock(&ft->demands_lock);
    return demand != NULL;
}

void demand_give_up_late(struct fault_threads *ft, uint64_t then_ns)
{
    uint32_t asker;

    while (find_late(ft, then_ns, &asker)) {
        struct remote_fd *remote = remote_by_id(ft, asker); /* not under the lock */

        pthread_mutex_lock(&ft->demands_lock);
        struct demand *demand = oldest(ft, then_ns);
        /* It may have been answered meanwhile: then the oldest may be another's. */
        if (demand && demand->asker == asker && unlink_demand(ft, demand) && remote) {
            remote->demands.at_source--;
            remote->demands.n_late++;
        }
        pthread_mutex_unlock(&ft->demands_lock);
        if (!remote)
            continue;
        ask_queued(ft, remote);
        remote_fd_put(remote);
    }
}

/* ---- asking ---- */

/* Whoever asked may be gone by now, and its place with it. */
static void demand_ended(struct fault_threads *ft, uint32_t asker, int had_place, int is_over)
{
    struct remote_fd *remote = remote_by_id(ft, asker);

    if (!remote)
        return;
    pthread_mutex_lock(&ft->demands_lock);
    (*(had_place ? &remote->demands.at_source : &remote->demands.n_late))--;
    pthread_mutex_unlock(&ft->demands_lock);
    if (!is_over)
        ask_queued(ft, remote);
    remote_fd_put(remote);
}

static void demand_done(struct page_request *request, int result)
{
    struct demand *demand = request->owner;
    struct fault_threads *ft = demand->ft;
    uint32_t asker = demand->asker;

    pthread_mutex_lock(&ft->demands_lock);
    int had_place = unlink_demand(ft, demand); /* no longer, if it was late */
    pthread_mutex_unlock(&ft->demands_lock);
    page_answered(ft, demand->served, request, asker, result);
    free(demand);
    if (__atomic_sub_fetch(&ft->demand_in_flight, 1, __ATOMIC_ACQ_REL) == 0)
        stream_note_no_demand(ft);
    demand_ended(ft, asker, had_place, result == -ECANCELED); /* then its channel goes away: nothing more is asked */
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
    link_demand(ft, demand);
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
