/* fault_set: what the fault threads serve: adding, finding and removing remote fds and blocks while they run. */
#include "fault_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "bitmap.h"
#include "trace.h"
#include "uffd.h"

enum { SLOT_BITS = 16, SLOT_MASK = (1 << SLOT_BITS) - 1 };

/* ---- the table of remote fds ---- */

struct remote_fd *remote_by_id(struct fault_threads *ft, uint32_t id)
{
    struct remote_fd *remote = NULL;
    uint32_t slot = id & SLOT_MASK;

    pthread_mutex_lock(&ft->table_lock);
    if (slot < REMOTES_MAX && ft->remotes[slot] && ft->remotes[slot]->id == id)
        remote = remote_fd_get(ft->remotes[slot]);
    pthread_mutex_unlock(&ft->table_lock);
    return remote;
}

void for_each_remote(struct fault_threads *ft, const struct ramblock *block,
                     void (*call)(struct remote_fd *remote, void *argument), void *argument)
{
    for (uint32_t slot = 0; slot < REMOTES_MAX; slot++) {
        struct remote_fd *remote = NULL;

        pthread_mutex_lock(&ft->table_lock);
        if (ft->remotes[slot] && ft->remotes[slot]->block == block)
            remote = remote_fd_get(ft->remotes[slot]);
        pthread_mutex_unlock(&ft->table_lock);
        if (!remote)
            continue;
        call(remote, argument);
        remote_fd_put(remote);
    }
}

struct served_block *served_block_of(struct fault_threads *ft, const struct ramblock *block)
{
    return __atomic_load_n(&ft->blocks[block->index], __ATOMIC_ACQUIRE);
}

static int table_insert(struct fault_threads *ft, struct remote_fd *remote)
{
    int rc = -EUSERS;

    pthread_mutex_lock(&ft->table_lock);
    for (uint32_t slot = 0; slot < REMOTES_MAX && rc < 0; slot++) {
        if (ft->remotes[slot])
            continue;
        remote->id = (uint32_t)++ft->generations[slot] << SLOT_BITS | slot;
        ft->remotes[slot] = remote;
        rc = 0;
    }
    pthread_mutex_unlock(&ft->table_lock);
    return rc;
}

static struct remote_fd *table_remove(struct fault_threads *ft, uint32_t id)
{
    struct remote_fd *remote = NULL;
    uint32_t slot = id & SLOT_MASK;

    pthread_mutex_lock(&ft->table_lock);
    if (slot < REMOTES_MAX && ft->remotes[slot] && ft->remotes[slot]->id == id) {
        remote = ft->remotes[slot];
        ft->remotes[slot] = NULL;
    }
    pthread_mutex_unlock(&ft->table_lock);
    return remote;
}

int fault_threads_add_remote(struct fault_threads *ft, struct remote_fd *remote, uint32_t *idp)
{
    int rc = table_insert(ft, remote);

    if (rc == 0) {
        *idp = remote->id;
        rc = start_polling(ft, remote);
        if (rc < 0) {
            stop_polling(ft, remote->uffd);
            stop_polling(ft, remote->control);
            table_remove(ft, remote->id);
        }
    }
    if (rc < 0) {
        remote_fd_put(remote);
        return rc;
    }
    trace_point(TRACE_REMOTE_ADD, remote->block->index, remote->id, 0, 0);
    lift_inherited(remote);
    return 0;
}

int fault_threads_remove_remote(struct fault_threads *ft, uint32_t id)
{
    struct remote_fd *remote = table_remove(ft, id);

    if (!remote)
        return -ENOENT;
    __atomic_store_n(&remote->disabled, 1, __ATOMIC_RELEASE);
    stop_polling(ft, remote->uffd);
    stop_polling(ft, remote->control);
    demand_drop_remote(ft, remote);
    stream_drop_remote(ft, remote);
    trace_point(TRACE_REMOTE_REMOVE, remote->block->index, id, 0, 0);
    remote_fd_put(remote);
    return 0;
}

int fault_threads_wake_remote(struct fault_threads *ft, uint32_t id)
{
    struct remote_fd *remote = remote_by_id(ft, id);

    if (!remote)
        return -ENOENT;
    int rc = uffd_wake_all(remote->uffd);
    remote_fd_put(remote);
    return rc;
}

int fault_threads_disable_remote(struct fault_threads *ft, uint32_t id, int error)
{
    struct remote_fd *remote = remote_by_id(ft, id);

    if (!remote)
        return -ENOENT;
    disable_remote(ft, remote, error, 0);
    remote_fd_put(remote);
    return 0;
}

int fault_threads_probe_remote(struct fault_threads *ft, uint32_t id)
{
    struct remote_fd *remote = remote_by_id(ft, id);

    if (!remote)
        return -ESRCH;
    int rc = remote_fd_probe(remote);
    remote_fd_put(remote);
    return rc;
}

/* ---- blocks ---- */

static int add_own_remote(struct fault_threads *ft, struct served_block *served)
{
    struct ramblock *block = served->block;
    struct remote_map whole = {
        .client_addr = (uint64_t)(uintptr_t)block->host_addr, .length = block->map_length, .page = 0};
    struct remote_fd *remote;
    int uffd = dup(block->own_uffd);

    if (uffd < 0)
        return -errno;
    int rc = remote_fd_new(&remote, block, uffd, -1, &whole, 1, NULL);
    if (rc < 0)
        return rc;
    remote->is_own = 1;
    return fault_threads_add_remote(ft, remote, &served->own_remote_id);
}

static int refuse_block(struct ramblock *block, struct page_channel *channel, int rc)
{
    page_channel_free(channel);
    ramblock_free(block);
    return rc;
}

int fault_threads_add_block(struct fault_threads *ft, struct ramblock *block, struct page_channel *channel,
                            uint32_t on_source_loss)
{
    struct served_block *served = calloc(1, sizeof(*served));

    if (!served || block->index >= STATUS_BLOCKS_MAX || ft->blocks[block->index]) {
        free(served);
        return refuse_block(block, channel, -EINVAL);
    }
    served->block = block;
    served->channel = channel;
    served->pushes = channel->pushes;
    served->taker = TAKER_ANY;
    served->taker_moves = 1; /* until it is polled */
    served->on_source_loss = on_source_loss;
    served->stream_window = served->stream_window_max = channel->stream_piece_count;
    int rc = working_set_add_block(ft, block);
    if (rc == 0)
        rc = add_own_remote(ft, served);
    if (rc < 0) {
        working_set_drop_block(ft, block);
        free(served);
        return refuse_block(block, channel, rc);
    }
    __atomic_store_n(&ft->blocks[block->index], served, __ATOMIC_RELEASE); /* the stream may take it up from here on */
    rc = start_polling_channel(ft, served);
    if (rc < 0) {
        (void)fault_threads_remove_block(ft, block->index);
        return rc;
    }
    trace_point(TRACE_BLOCK_ADD, block->index, 0, 0, block->page_count);
    /* Nothing but holes and what it held before, or it all came meanwhile: told once. */
    if (__atomic_load_n(&block->missing_pages, __ATOMIC_ACQUIRE) == 0 &&
        !__atomic_exchange_n(&served->complete, 1, __ATOMIC_ACQ_REL))
        tell_block(ft, served, EVENT_BLOCK_COMPLETE, 0, 0);
    stream_poke(ft);
    return 0;
}

static void count_remote(struct remote_fd *remote, void *argument)
{
    *(int *)argument += !remote->is_own;
}

int fault_threads_remove_block(struct fault_threads *ft, uint32_t block_index)
{
    struct served_block *served = block_index < STATUS_BLOCKS_MAX ? ft->blocks[block_index] : NULL;
    int helpers = 0;

    if (!served)
        return -ENOENT;
    for_each_remote(ft, served->block, count_remote, &helpers);
    if (helpers)
        return -EBUSY;
    fault_threads_remove_remote(ft, served->own_remote_id);
    __atomic_store_n(&served->paused, 1, __ATOMIC_RELEASE);
    stream_wait_submitted(ft);
    if (served->channel)
        stop_polling(ft, page_channel_poll_fd(served->channel));
    wait_for_workers(ft);
    if (served->channel)
        page_channel_free(served->channel);
    stream_drop_block(ft, served->block);
    waiters_drop_block(&ft->waiters, served->block);
    __atomic_store_n(&ft->blocks[block_index], NULL, __ATOMIC_RELEASE);
    wait_for_workers(ft);
    stream_wait_submitted(ft);
    working_set_drop_block(ft, served->block);
    ramblock_free(served->block);
    free(served);
    return 0;
}

int fault_threads_complete_block(struct fault_threads *ft, uint32_t block_index)
{
    struct served_block *served = block_index < STATUS_BLOCKS_MAX ? ft->blocks[block_index] : NULL;

    if (!served)
        return -ENOENT;
    if (!__atomic_load_n(&served->complete, __ATOMIC_ACQUIRE))
        return -EBUSY;
    fault_threads_remove_remote(ft, served->own_remote_id);
    ramblock_complete(served->block);
    return 0;
}

void fault_threads_set_stream(struct fault_threads *ft, uint32_t mode, uint64_t rate)
{
    __atomic_store_n(&ft->status->stream_mode, mode, __ATOMIC_RELAXED);
    __atomic_store_n(&ft->status->stream_rate, rate, __ATOMIC_RELAXED);
    stream_set(ft, mode, rate);
    for (uint32_t i = 0; i < STATUS_BLOCKS_MAX; i++) /* who waits for progress may wait in vain from now on */
        if (ft->blocks[i])
            status_block_notify(ft->blocks[i]->block->status);
}

void fault_threads_hold_stream(struct fault_threads *ft)
{
    stream_set(ft, STATUS_STREAM_LAZY, 0);
}

/* Lost pages are asked for again here: poisoned ones fault no more. */
static void clear_lost(struct fault_threads *ft, struct ramblock *block)
{
    uint64_t page = bitmap_next_set(block->failed, 0, block->page_count);

    while (page < block->page_count) {
        uint64_t end = bitmap_next_clear(block->failed, page, block->page_count), cleared = 0;

        for (uint64_t i = page; i < end; i++)
            cleared += (uint64_t)bitmap_test_and_clear(block->failed, i);
        __atomic_fetch_sub(&block->status->lost_pages, cleared, __ATOMIC_RELAXED);
        bitmap_clear_range(block->requested, page, end);
        (void)stream_add_range(ft, block, page, end, NULL, 0, 0);
        page = bitmap_next_set(block->failed, end, block->page_count);
    }
}

int fault_threads_resume_block(struct fault_threads *ft, uint32_t block_index)
{
    struct served_block *served = block_index < STATUS_BLOCKS_MAX ? ft->blocks[block_index] : NULL;

    if (!served)
        return -ENOENT;
    __atomic_store_n(&served->paused, 0, __ATOMIC_RELEASE);
    clear_lost(ft, served->block);
    timeout_forget(ft, served);
    stream_resume_block(ft, served->block);
    demand_ask_again(ft, served);
    return 0;
}
