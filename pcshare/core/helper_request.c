/* helper_request: asking the coordinator for ranges, and what the status segment says about the rest.
 *
 * A request waits in its attachment's list in the order it came; at most HELPER_REQUESTS_IN_FLIGHT_MAX are on their
 * way, the others wait for their turn, whoever calls. The sentinel brings the answers. Nothing here waits under the
 * lock, and what is known from the received bitmap needs no coordinator at all, so it works while that is stopped or
 * dead.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <linux/futex.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include "bitmap.h"
#include "helper_internal.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 /* Linux 5.14; older headers lack it */
#endif

enum { ERRNO_MAX = 4095 }; /* the kernel's own limit */

/* ---- the list of requests ---- */

static void request_append(struct pcshare_attachment *a, struct helper_request *request)
{
    struct helper_request **rp = &a->requests;

    while (*rp)
        rp = &(*rp)->next;
    request->next = NULL;
    request->cookie = ++a->next_cookie;
    if (request->cookie - a->first_cookie > INT32_MAX / 2) /* cookies wrap; so old an answer is none any more */
        a->first_cookie = request->cookie - INT32_MAX / 2;
    *rp = request;
}

static void request_unlink(struct pcshare_attachment *a, struct helper_request *request)
{
    struct helper_request **rp = &a->requests;

    while (*rp && *rp != request)
        rp = &(*rp)->next;
    if (*rp)
        *rp = request->next;
}

/* Its caller may return, and the request be gone, as soon as the lock is released. */
static void request_finish(struct pcshare_attachment *a, struct helper_request *request, int status)
{
    request_unlink(a, request);
    request->status = status;
    __atomic_store_n(&request->done, 1, __ATOMIC_RELEASE);
    syscall(SYS_futex, &request->done, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

void requests_finish_all(struct pcshare_attachment *a, int status)
{
    while (a->requests)
        request_finish(a, a->requests, status);
}

void requests_send(struct pcshare_attachment *a)
{
    for (struct helper_request *request = a->requests; request; request = request->next) {
        if (request->is_sent)
            continue;
        if (a->in_flight >= HELPER_REQUESTS_IN_FLIGHT_MAX)
            return;
        if (link_send_request(a, request, WIRE_REQUEST_WAIT) < 0)
            return;
        request->is_sent = 1;
        a->in_flight++;
    }
}

/* Under new cookies: what was asked of a coordinator that died may lie in the socket still, and be answered by the next
 * one as well. */
void requests_send_again(struct pcshare_attachment *a)
{
    a->first_cookie = a->next_cookie + 1;
    for (struct helper_request *request = a->requests; request; request = request->next) {
        request->cookie = ++a->next_cookie;
        request->is_sent = 0;
    }
    a->in_flight = 0;
    requests_send(a);
}

int requests_answer(struct pcshare_attachment *a, const struct wire_done *done)
{
    struct helper_request *request = a->requests;

    if ((int32_t)(done->header.cookie - a->first_cookie) < 0)
        return 0; /* asked of the coordinator before this one */
    if (a->in_flight == 0 || done->status > 0 || done->status < -ERRNO_MAX)
        return helper_fail(EPROTO, "the coordinator at %s broke the protocol: a DONE that answers nothing",
                           a->socket_path);
    a->in_flight--;
    while (request && !(request->is_sent && request->cookie == done->header.cookie))
        request = request->next;
    if (!request)
        return 0; /* its caller has given up meanwhile */
    request->lost_offset = done->offset;
    request->lost_length = done->length;
    request_finish(a, request, done->status);
    return 0;
}

/* ---- ensure ---- */

/* 0: in the block. */
static int check_range(const struct pcshare_attachment *a, uint64_t offset, uint64_t length)
{
    if (offset <= a->info.used_length && length <= a->info.used_length - offset)
        return 0;
    return helper_fail(EINVAL,
                       "block %s has %" PRIu64 " bytes: %" PRIu64 " bytes from %" PRIu64 " on are not all in it",
                       a->info.idstr, a->info.used_length, length, offset);
}

/* Of a sparse block the bitmap is sparse too, and to look into a hole of it with /dev/shm full would be SIGBUS: what
 * has no memory has no bit. (Linux before 5.14 does not know the question.) */
static int bits_are_there(const uint64_t *received, uint64_t page)
{
    uint64_t host_page = (uint64_t)sysconf(_SC_PAGESIZE), bits = host_page * 8;
    uint8_t *there = (uint8_t *)(uintptr_t)received + page / bits * host_page;

    return madvise(there, host_page, MADV_POPULATE_READ) == 0 || errno == EINVAL;
}

static int range_is_received(const struct pcshare_attachment *a, uint64_t offset, uint64_t length)
{
    uint64_t page = offset / a->info.page_size, end, stop, bits = (uint64_t)sysconf(_SC_PAGESIZE) * 8;
    int is_sparse = a->info.map_length / a->info.page_size > STATUS_BITMAP_EAGER_BYTES * 8ull;

    if (length == 0 || a->state == PCSHARE_COMPLETE)
        return 1;
    end = (offset + length - 1) / a->info.page_size + 1;
    for (; page < end; page = stop) {
        stop = (page / bits + 1) * bits < end ? (page / bits + 1) * bits : end;
        if ((is_sparse && !bits_are_there(a->view->received, page)) ||
            bitmap_next_clear(a->view->received, page, stop) < stop)
            return 0;
    }
    return 1;
}

static struct timespec timespec_of(int64_t ms)
{
    return (struct timespec){.tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * 1000000};
}

/* 0: answered; -ETIMEDOUT; -EINTR. Without the lock. */
static int request_wait(struct helper_request *request, int64_t deadline_ms)
{
    struct timespec deadline = timespec_of(deadline_ms);

    while (!__atomic_load_n(&request->done, __ATOMIC_ACQUIRE)) {
        if (syscall(SYS_futex, &request->done, FUTEX_WAIT_BITSET_PRIVATE, 0,
                    deadline_ms == INT64_MAX ? NULL : &deadline, NULL, FUTEX_BITSET_MATCH_ANY) < 0 &&
            errno != EAGAIN)
            return -errno;
    }
    return 0;
}

static int lost_connection(const struct pcshare_attachment *a)
{
    return helper_fail(ECONNRESET, "block %s: %s", a->info.idstr, a->why);
}

static int request_failed(const struct pcshare_attachment *a, const struct helper_request *request, int status)
{
    switch (status) {
    case 0:
        return 0;
    case -EINTR:
        return helper_fail(EINTR, "block %s: interrupted by a signal", a->info.idstr);
    case -ETIMEDOUT:
        return helper_fail(ETIMEDOUT, "block %s: %" PRIu64 " bytes from %" PRIu64 " on are not all here in time%s%s",
                           a->info.idstr, request->length, request->offset, a->why[0] ? ": " : "", a->why);
    case -ECONNRESET:
        return lost_connection(a);
    case -ECANCELED:
        return helper_fail(ECANCELED, "block %s: detached by another thread", a->info.idstr);
    case -EIO:
        return helper_fail(EIO, "block %s: the source lost %" PRIu64 " bytes from %" PRIu64 " on", a->info.idstr,
                           request->lost_length, request->lost_offset);
    default:
        return helper_fail(-status,
                           "block %s: the coordinator could not bring %" PRIu64 " bytes from %" PRIu64 " on: %s",
                           a->info.idstr, request->length, request->offset, strerror(-status));
    }
}

/* Puts the request on its way and waits; the lock is released meanwhile, so the caller counts itself. */
static int request_run(struct pcshare_attachment *a, struct helper_request *request, int64_t deadline_ms)
{
    int rc;

    request_append(a, request);
    if (a->state == PCSHARE_ATTACHED)
        requests_send(a);
    if (!request->is_sent)
        sentinel_wake(); /* it sends the rest when the socket takes more */
    library_unlock();
    rc = request_wait(request, deadline_ms);
    library_lock();
    if (request->done)
        rc = request->status;
    else
        request_unlink(a, request);
    return rc;
}

static uint64_t slice_of(uint64_t length)
{
    return length < MAP_SLICE_BYTES ? length : MAP_SLICE_BYTES;
}

/* The lock is given away now and then; who has it meanwhile may end the attachment. */
static void map_ensured(struct pcshare_attachment *a, uint64_t offset, uint64_t length)
{
    while (length > 0 && a->is_strict && a->uffd >= 0 && a->data) {
        memory_map_received(a, offset, slice_of(length));
        offset += slice_of(length);
        length -= slice_of(length);
        library_unlock();
        library_lock();
    }
}

/* Whether a received page may still have the mark that it was lost: the coordinator takes it away after it has set the
 * bit. It says DONE when it has. */
static int may_be_marked(const struct pcshare_attachment *a)
{
    return a->state == PCSHARE_ATTACHED && __atomic_load_n(&a->view->block->was_poisoned, __ATOMIC_ACQUIRE);
}

/* What ensure waits for; *requestp says what was lost. */
static int ensure_received(struct pcshare_attachment *a, struct helper_request *request, int64_t deadline_ms)
{
    if (range_is_received(a, request->offset, request->length) && (request->length == 0 || !may_be_marked(a)))
        return 0;
    if (a->state == PCSHARE_LOST)
        return lost_connection(a);
    return request_failed(a, request, request_run(a, request, deadline_ms));
}

int pcshare_ensure(struct pcshare_attachment *a, uint64_t offset, uint64_t length, int64_t timeout_ms,
                   uint64_t *lost_offsetp, uint64_t *lost_lengthp)
{
    struct helper_request request = {.offset = offset, .length = length};
    int64_t deadline_ms = helper_deadline_ms(timeout_ms);
    int rc;

    library_lock();
    rc = check_range(a, offset, length);
    if (rc == 0) {
        a->references++;
        rc = ensure_received(a, &request, deadline_ms);
        if (rc == 0)
            map_ensured(a, offset, length);
        attachment_put(a);
    }
    library_unlock();
    if (lost_offsetp)
        *lost_offsetp = request.lost_offset;
    if (lost_lengthp)
        *lost_lengthp = request.lost_length;
    return rc;
}

int pcshare_prefetch(struct pcshare_attachment *a, uint64_t offset, uint64_t length)
{
    struct helper_request request = {.offset = offset, .length = length};
    int rc;

    library_lock();
    rc = check_range(a, offset, length);
    if (rc == 0 && !range_is_received(a, offset, length)) {
        if (a->state == PCSHARE_ATTACHED)
            (void)link_send_request(a, &request, 0); /* a hint: dropped when the coordinator does not keep up */
        else if (a->state == PCSHARE_LOST)
            rc = lost_connection(a);
    }
    library_unlock();
    return rc;
}

/* ---- progress ---- */

int pcshare_is_received(const struct pcshare_attachment *a, uint64_t offset, uint64_t length)
{
    int rc;

    library_lock();
    rc = check_range(a, offset, length);
    if (rc == 0)
        rc = range_is_received(a, offset, length);
    library_unlock();
    return rc;
}

void pcshare_get_progress(const struct pcshare_attachment *a, struct pcshare_progress *progress)
{
    const struct status_block *block;
    struct pcshare_progress now;

    library_lock();
    block = a->view->block;
    /* First: what is counted after it is never missed. */
    now.seq = __atomic_load_n(&block->progress_seq, __ATOMIC_ACQUIRE);
    now.received_pages = __atomic_load_n(&block->received_pages, __ATOMIC_RELAXED);
    now.hole_pages = __atomic_load_n(&block->hole_pages, __ATOMIC_RELAXED);
    now.page_count = __atomic_load_n(&block->page_count, __ATOMIC_RELAXED);
    now.lost_pages = __atomic_load_n(&block->lost_pages, __ATOMIC_RELAXED);
    now.state = __atomic_load_n(&block->state, __ATOMIC_RELAXED);
    now.stream_mode = __atomic_load_n(&((const struct status_header *)a->view->base)->stream_mode, __ATOMIC_RELAXED);
    library_unlock();
    *progress = now;
}

/* One slice of waiting, on the segment as it is mapped now: a restarted coordinator may have brought another. */
static int wait_slice(struct pcshare_attachment *a, uint32_t seq, int64_t deadline_ms)
{
    int64_t left_ms = deadline_ms - helper_now_ms();
    struct status_view *view;
    int rc;

    if (left_ms < 0)
        left_ms = 0;
    library_lock();
    view = status_view_get(a);
    library_unlock();
    if (!view)
        return 0; /* detached meanwhile */
    rc = status_block_wait(view->block, seq, left_ms < PROGRESS_SLICE_MS ? left_ms : PROGRESS_SLICE_MS);
    library_lock();
    status_view_put(view);
    library_unlock();
    return rc == -ETIMEDOUT && left_ms > PROGRESS_SLICE_MS ? LINK_EMPTY : rc;
}

int pcshare_wait_progress(const struct pcshare_attachment *attachment, uint32_t seq, int64_t timeout_ms)
{
    struct pcshare_attachment *a = (struct pcshare_attachment *)attachment; /* counts this call */
    int64_t deadline_ms = helper_deadline_ms(timeout_ms);
    int rc = LINK_EMPTY, state = pcshare_state(a);

    if (state == PCSHARE_COMPLETE || state == PCSHARE_LOST)
        return 0; /* nothing will change any more */
    library_lock();
    a->references++;
    library_unlock();
    while (rc == LINK_EMPTY && pcshare_state(a) == state)
        rc = wait_slice(a, seq, deadline_ms);
    library_lock();
    attachment_put(a);
    library_unlock();
    if (rc == -ETIMEDOUT || rc == -EINTR)
        return helper_fail(-rc, "%s", rc == -EINTR ? "interrupted by a signal" : "no progress in time");
    return rc < 0 ? helper_fail(-rc, "waiting for progress: %s", strerror(-rc)) : 0;
}
