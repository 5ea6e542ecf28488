#define _GNU_SOURCE
#include <time.h>
#include <unistd.h>
#include "trace.h"

static struct trace_ring *trace_ring;

void trace_to(struct trace_ring *ring)
{
    __atomic_store_n(&trace_ring, ring, __ATOMIC_RELEASE);
}

/* event is 0 while a record is written and set last, so that a reader can tell a whole record. */
static void record_write(struct trace_record *record, const struct trace_record *value)
{
    __atomic_store_n(&record->event, 0, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_RELEASE);
    __atomic_store_n(&record->time_ns, value->time_ns, __ATOMIC_RELAXED);
    __atomic_store_n(&record->tid, value->tid, __ATOMIC_RELAXED);
    __atomic_store_n(&record->block_index, value->block_index, __ATOMIC_RELAXED);
    __atomic_store_n(&record->subject, value->subject, __ATOMIC_RELAXED);
    __atomic_store_n(&record->page, value->page, __ATOMIC_RELAXED);
    __atomic_store_n(&record->detail, value->detail, __ATOMIC_RELAXED);
    __atomic_store_n(&record->event, value->event, __ATOMIC_RELEASE);
}

void trace_point(uint32_t event, uint32_t block_index, uint32_t subject, uint64_t page, uint64_t detail)
{
    struct trace_ring *ring = __atomic_load_n(&trace_ring, __ATOMIC_ACQUIRE);
    struct timespec now;
    uint64_t slot;

    if (!ring)
        return;
    clock_gettime(CLOCK_MONOTONIC, &now);
    slot = __atomic_fetch_add(&ring->next, 1, __ATOMIC_RELAXED);
    record_write(&ring->records[slot % TRACE_RECORDS],
                 &(struct trace_record){
                     .time_ns = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec,
                     .event = event,
                     .tid = (uint32_t)gettid(),
                     .block_index = block_index,
                     .subject = subject,
                     .page = page,
                     .detail = detail,
                 });
}
