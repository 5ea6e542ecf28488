/* demand: what helpers' faults ask of sources: so many pages of one helper at once, the rest in its own queue.
 *
 * A source answers in turn. Were everything handed on to it, a helper with a thousand threads in faults would have
 * filled its queue, and another's one page would wait behind a thousand. So each helper has a few pages at a source and
 * keeps the rest to itself: whoever else faults waits behind a few. Asks in the order of the helper's faults; what has
 * come by another way meanwhile is not asked for. What is late gives its place up: a few pages that hang keep no other
 * page of the helper's from coming. Where a source reads more than a page in any case, the pages around are asked for
 * with it, and forgotten if that fails or is late: then the page is asked for alone, or others ask for theirs.
 */
#include "fault_internal.h"

#include <errno.h>
#include <stdlib.h>

struct demand {
    struct demand *next; /* of those that have a place, in the order of asking */
    struct demand *before;
    int has_place;
    uint64_t asked_ns;
    struct page_request request;
    struct fault_threads *ft;
    struct served_block *served;
    uint32_t asker;            /* the remote fd whose fault it is */
    uint64_t page;             /* where it is; the request may be for more */
    uint64_t first, n_claimed; /* what was marked requested for it */
    int has_claim;             /* and still is, as far as it is not lost. Under demands_lock */
    uint8_t bytes[];
};

/* ---- a helper's share ---- */

static uint32_t share_of(struct fault_threads *ft, const struct remote_fd *remote)
{
    const struct page_channel *channel = served_block_of(ft, remote->block)->channel;
    uint32_t share = __atomic_load_n(&channel->demands_of_one, __ATOMIC_RELAXED);
    uint32_t crowds_share = __atomic_load_n(&channel->demands_of_crowd, __ATOMIC_RELAXED);

    if (crowds_share && is_crowd(remote, clock_ns()))
        share = crowds_share;
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

/* Pages that were marked requested. */
struct claim {
    struct ramblock *block; /* NULL: none */
    uint64_t first, n;
};

/* With the lock held: what is to be given back, once. */
static struct claim take_claim(struct demand *demand)
{
    struct claim claim = {
        .block = demand->has_claim ? demand->served->block : NULL, .first = demand->first, .n = demand->n_claimed};

    demand->has_claim = 0;
    return claim;
}

static void give_back(struct fault_threads *ft, const struct claim *claim)
{
    if (claim->block)
        stream_give_back(ft, claim->block, claim->first, claim->n);
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

/* With the lock held. remote NULL: it has gone. */
static struct claim give_up(struct demand *demand, struct remote_fd *remote)
{
    if (remote) {
        remote->demands.at_source--;
        remote->demands.n_late++;
    }
    return take_claim(demand);
}

void demand_give_up_late(struct fault_threads *ft, uint64_t then_ns)
{
    uint32_t asker;

    while (find_late(ft, then_ns, &asker)) {
        struct remote_fd *remote = remote_by_id(ft, asker); /* not under the lock */
        struct claim claim = {.block = NULL};

        pthread_mutex_lock(&ft->demands_lock);
        struct demand *demand = oldest(ft, then_ns);
        /* It may have been answered meanwhile: then the oldest may be another's. */
        if (demand && demand->asker == asker && unlink_demand(ft, demand))
            claim = give_up(demand, remote);
        pthread_mutex_unlock(&ft->demands_lock);
        give_back(ft, &claim); /* others may ask for all of it now */
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

/* The pages around it may not find room where it does. */
static int place_answer(struct demand *demand, uint64_t *placedp)
{
    struct page_request *request = &demand->request;
    struct ramblock *block = demand->served->block;
    uint64_t placed_alone;

    page_channel_zero_tail(request->bytes, request->length, request->n_pages * block->page_size);
    int rc = ramblock_place(block, request->page, request->n_pages, request->bytes, placedp);
    if (rc < 0 && request->n_pages > 1) {
        const uint8_t *bytes = request->bytes + (demand->page - request->page) * block->page_size;
        rc = ramblock_place(block, demand->page, 1, bytes, &placed_alone);
        *placedp += placed_alone;
    }
    return rc;
}

static void give_back_claim(struct demand *demand)
{
    struct fault_threads *ft = demand->ft;

    if (!demand->n_claimed)
        return;
    pthread_mutex_lock(&ft->demands_lock);
    struct claim claim = take_claim(demand);
    pthread_mutex_unlock(&ft->demands_lock);
    give_back(ft, &claim);
}

/* What became of a demand: the page is placed, or it failed. */
static void page_answered(struct demand *demand, int result)
{
    struct fault_threads *ft = demand->ft;
    struct page_request *request = &demand->request;
    uint64_t placed = 0;

    result = checked_result(demand->served->block, request, result);
    if (result == PAGE_CHANNEL_ARRIVED) {
        credit_helper(ft, demand->asker, 1);
    } else if (result == 0) {
        result = place_answer(demand, &placed);
        give_back_claim(demand);
        credit_helper(ft, demand->asker, placed > 0);
        if (result < 0)
            page_failed(ft, demand->served, demand->page, -result, EVENT_BLOCK_PLACE_ERROR);
        after_bringing(ft, demand->served, demand->page, request->page, request->n_pages, placed, result);
    } else if (result != -ECANCELED) {
        give_back_claim(demand);
        page_failed(ft, demand->served, demand->page, -result, EVENT_BLOCK_SOURCE_ERROR);
    }
}

static void demand_done(struct page_request *request, int result);

static void submit(struct demand *demand, uint64_t first, uint64_t n)
{
    struct ramblock *block = demand->served->block;

    demand->request = (struct page_request){.offset = first * block->page_size,
                                            .length = source_length(block, first, n),
                                            .bytes = demand->bytes,
                                            .is_demand = 1,
                                            .done = demand_done,
                                            .owner = demand,
                                            .block_index = block->index,
                                            .page = first,
                                            .n_pages = n};
    page_channel_submit(demand->served->channel, &demand->request);
}

static void demand_done(struct page_request *request, int result)
{
    struct demand *demand = request->owner;
    struct fault_threads *ft = demand->ft;
    uint32_t asker = demand->asker;

    if (result < 0 && result != -ECANCELED && request->n_pages > 1) { /* for a page, perhaps, that nobody waits for */
        give_back_claim(demand);
        submit(demand, demand->page, 1);
        return;
    }
    pthread_mutex_lock(&ft->demands_lock);
    int had_place = unlink_demand(ft, demand); /* no longer, if it was late */
    pthread_mutex_unlock(&ft->demands_lock);
    page_answered(demand, result);
    free(demand);
    if (__atomic_sub_fetch(&ft->demand_in_flight, 1, __ATOMIC_ACQ_REL) == 0)
        stream_note_no_demand(ft);
    demand_ended(ft, asker, had_place, result == -ECANCELED); /* then its channel goes away: nothing more is asked */
}

/* What is late may be long in coming: a helper that waits for that gets no more than it has touched. */
static int has_late(struct fault_threads *ft, const struct remote_fd *remote)
{
    pthread_mutex_lock(&ft->demands_lock);
    uint32_t n_late = remote->demands.n_late;
    pthread_mutex_unlock(&ft->demands_lock);
    return n_late > 0;
}

void demand_ask(struct fault_threads *ft, struct remote_fd *remote, uint64_t page)
{
    struct served_block *served = served_block_of(ft, remote->block);
    struct ramblock *block = remote->block;
    uint64_t first = page, n_claimed = has_late(ft, remote) ? 0 : ahead_claim_around(ft, block, page, &first);
    uint64_t n = n_claimed ? n_claimed : 1;
    struct demand *demand = malloc(sizeof(*demand) + n * block->page_size);

    if (!demand) {
        if (n_claimed)
            stream_give_back(ft, block, first, n_claimed);
        give_back_place(ft, remote);
        page_failed(ft, served, page, ENOMEM, EVENT_BLOCK_PLACE_ERROR);
        return;
    }
    demand->ft = ft;
    demand->served = served;
    demand->asker = remote->id;
    demand->page = page;
    demand->first = first;
    demand->n_claimed = n_claimed;
    demand->has_claim = n_claimed > 0;
    link_demand(ft, demand);
    __atomic_fetch_add(&ft->demand_in_flight, 1, __ATOMIC_ACQ_REL);
    submit(demand, first, n);
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
