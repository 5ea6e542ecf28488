/* trace: see trace.h. */
#define _GNU_SOURCE
#include "trace.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { DEATH_PATH_MAX = 4096, DEATH_TEXT_MAX = 64 };
enum { WANTS_RECORDS = 1, WANTS_DEATH = 2 }; /* of a trace point */

/* What every trace point looks at first, and alone while it is 0. */
static uint32_t trace_wants;

static struct trace_ring *trace_ring;

static struct {
    char path[DEATH_PATH_MAX];
    uint32_t event;
    uint32_t left; /* passings until then */
} death;

static void want(uint32_t what, int is_wanted)
{
    if (is_wanted)
        __atomic_fetch_or(&trace_wants, what, __ATOMIC_RELEASE);
    else
        __atomic_fetch_and(&trace_wants, ~what, __ATOMIC_RELEASE);
}

void trace_to(struct trace_ring *ring)
{
    __atomic_store_n(&trace_ring, ring, __ATOMIC_RELEASE);
    want(WANTS_RECORDS, ring != NULL);
}

/* ---- dying ---- */

__attribute__((constructor)) static void read_death(void)
{
    const char *path = secure_getenv("PCSHARE_DIE_AT");
    char text[DEATH_TEXT_MAX] = "";
    ssize_t n = -1;

    if (!path || strlen(path) >= sizeof(death.path))
        return;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd >= 0) {
        n = read(fd, text, sizeof(text) - 1);
        close(fd);
    }
    if (n <= 0 || sscanf(text, "%u %u", &death.event, &death.left) != 2 || death.left == 0)
        return;
    strcpy(death.path, path);
    want(WANTS_DEATH, 1);
}

static void maybe_die(uint32_t event)
{
    if (event != death.event || __atomic_sub_fetch(&death.left, 1, __ATOMIC_RELAXED) != 0)
        return;
    if (unlink(death.path) == 0)
        kill(getpid(), SIGKILL);
}

/* ---- records ---- */

/* event is 0 while a record is written and set last, so that a reader can tell a whole record. */
static void record_write(struct trace_record *record, const struct trace_record *value)
{
    (void)__atomic_exchange_n(&record->event, 0, __ATOMIC_ACQUIRE); /* no store below comes before it */
    __atomic_store_n(&record->time_ns, value->time_ns, __ATOMIC_RELAXED);
    __atomic_store_n(&record->tid, value->tid, __ATOMIC_RELAXED);
    __atomic_store_n(&record->block_index, value->block_index, __ATOMIC_RELAXED);
    __atomic_store_n(&record->subject, value->subject, __ATOMIC_RELAXED);
    __atomic_store_n(&record->page, value->page, __ATOMIC_RELAXED);
    __atomic_store_n(&record->detail, value->detail, __ATOMIC_RELAXED);
    __atomic_store_n(&record->event, value->event, __ATOMIC_RELEASE);
}

static void write_down(struct trace_ring *ring, struct trace_record *value)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    value->time_ns = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    value->tid = (uint32_t)gettid();
    record_write(&ring->records[__atomic_fetch_add(&ring->next, 1, __ATOMIC_RELAXED) % TRACE_RECORDS], value);
}

void trace_point(uint32_t event, uint32_t block_index, uint32_t subject, uint64_t page, uint64_t detail)
{
    if (!__atomic_load_n(&trace_wants, __ATOMIC_RELAXED))
        return;
    struct trace_ring *ring = __atomic_load_n(&trace_ring, __ATOMIC_ACQUIRE);
    if (ring)
        write_down(ring, &(struct trace_record){
                             .event = event,
                             .block_index = block_index,
                             .subject = subject,
                             .page = page,
                             .detail = detail,
                         });
    if (__atomic_load_n(&trace_wants, __ATOMIC_RELAXED) & WANTS_DEATH)
        maybe_die(event);
}
