/* fault_event: what Python is told: bits on the object concerned and one eventfd, so that nothing is lost and nothing
 * grows. */
#include "fault_internal.h"

#include <sys/eventfd.h>
#include <unistd.h>

static void ring(struct fault_threads *ft)
{
    uint64_t one = 1;

    ssize_t written = write(ft->event_fd, &one, sizeof(one));
    (void)written; /* EAGAIN: it is readable already */
}

void tell_block(struct fault_threads *ft, struct served_block *served, uint32_t kind, int error, uint64_t offset)
{
    pthread_mutex_lock(&ft->events_lock);
    int fresh = !(served->events & kind);
    served->events |= kind;
    ft->events_pending += (uint64_t)fresh;
    if (kind == EVENT_BLOCK_FOREIGN)
        served->foreign_offset = offset;
    else if (error) {
        served->error = error;
        served->error_offset = offset;
    }
    pthread_mutex_unlock(&ft->events_lock);
    if (fresh)
        ring(ft);
}

/* Bits tell that something changed, this tells what holds now: a late page that came does not look late. */
void tell_late(struct fault_threads *ft, struct served_block *served, int error, uint64_t offset)
{
    pthread_mutex_lock(&ft->events_lock);
    int fresh = !(served->events & EVENT_BLOCK_LATE);
    served->events |= EVENT_BLOCK_LATE;
    ft->events_pending += (uint64_t)fresh;
    served->late_error = error;
    served->late_offset = offset;
    pthread_mutex_unlock(&ft->events_lock);
    if (fresh)
        ring(ft);
}

void tell_remote(struct fault_threads *ft, struct remote_fd *remote, uint32_t kind, int error, uint64_t addr)
{
    pthread_mutex_lock(&ft->events_lock);
    int fresh = !((uint32_t)remote->events & kind);
    remote->events |= (int32_t)kind;
    ft->events_pending += (uint64_t)fresh;
    if (error) {
        remote->error = error;
        remote->error_addr = addr;
    }
    pthread_mutex_unlock(&ft->events_lock);
    if (fresh)
        ring(ft);
}

int fault_threads_event_fd(const struct fault_threads *ft)
{
    return ft->event_fd;
}

static uint32_t lowest_bit(uint32_t bits)
{
    return bits & (~bits + 1);
}

static int next_block_event(struct fault_threads *ft, struct fault_event *event)
{
    for (uint32_t i = 0; i < STATUS_BLOCKS_MAX; i++) {
        struct served_block *served = ft->blocks[i];
        if (!served || !served->events)
            continue;
        event->kind = lowest_bit(served->events);
        event->block_index = i;
        event->error = event->kind == EVENT_BLOCK_LATE ? served->late_error : served->error;
        event->offset = event->kind == EVENT_BLOCK_FOREIGN ? served->foreign_offset
                        : event->kind == EVENT_BLOCK_LATE  ? served->late_offset
                                                           : served->error_offset;
        served->events &= ~event->kind;
        return 1;
    }
    return 0;
}

static int next_remote_event(struct fault_threads *ft, struct fault_event *event)
{
    int found = 0;

    pthread_mutex_lock(&ft->table_lock);
    for (uint32_t i = 0; i < REMOTES_MAX && !found; i++) {
        struct remote_fd *remote = ft->remotes[i];
        if (!remote || !remote->events)
            continue;
        event->kind = lowest_bit((uint32_t)remote->events);
        event->block_index = remote->block->index;
        event->remote_id = remote->id;
        event->error = remote->error;
        event->offset = remote->error_addr;
        remote->events &= (int32_t)~event->kind;
        found = 1;
    }
    pthread_mutex_unlock(&ft->table_lock);
    return found;
}

int fault_threads_next_event(struct fault_threads *ft, struct fault_event *event)
{
    uint64_t drained;
    int found = 0;
    /* Drained before the search: what is told after the search rings again. */
    ssize_t got = read(ft->event_fd, &drained, sizeof(drained));

    (void)got;
    *event = (struct fault_event){0};
    pthread_mutex_lock(&ft->events_lock);
    if (ft->events_pending)
        found = next_block_event(ft, event) || next_remote_event(ft, event);
    if (found)
        ft->events_pending--;
    else
        ft->events_pending = 0; /* what was pending went away with its object */
    pthread_mutex_unlock(&ft->events_lock);
    return found;
}
