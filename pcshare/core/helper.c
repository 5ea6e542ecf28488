/* helper: attaching to a block, leaving it, and what is known about it. See helper.h; the rest is in helper_*.c.
 *
 * Attaching is a fixed row of steps, each of which can fail: connect, HELLO, WELCOME, map, ATTACH, ACK. Whatever has
 * been made is recorded in the attachment at once, so there is one way back, attachment_release, from every step and
 * from a whole life.
 */
#define _GNU_SOURCE
#include "helper.h"

#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "helper_internal.h"
#include "trace.h"

enum { CONNECT_AGAIN_MS = 10 }; /* a coordinator accepts some twenty helpers in that time */

/* ---- errors and time ---- */

static _Thread_local char error_text[HELPER_TEXT_MAX];

int helper_fail(int error, const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(error_text, sizeof(error_text), format, arguments);
    va_end(arguments);
    return -error;
}

const char *pcshare_error_text(void)
{
    return error_text;
}

int64_t helper_now_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

int64_t helper_deadline_ms(int64_t timeout_ms)
{
    int64_t now_ms = helper_now_ms();

    return timeout_ms < 0 || timeout_ms > INT64_MAX - now_ms ? INT64_MAX : now_ms + timeout_ms;
}

/* ---- the attachment ---- */

void attachment_set_state(struct pcshare_attachment *a, int state)
{
    __atomic_store_n(&a->state, state, __ATOMIC_RELEASE);
}

static int attachment_new(struct pcshare_attachment **ap, const char *socket_path, const char *idstr, uint32_t mode,
                          void *map_at, uint64_t map_at_length)
{
    struct pcshare_attachment *a;

    if (!socket_path || !socket_path[0] || strlen(socket_path) >= SOCKET_PATH_MAX)
        return helper_fail(ENAMETOOLONG, "a socket's path has 1 to %d bytes: %s", SOCKET_PATH_MAX - 1,
                           socket_path ? socket_path : "");
    if (idstr && strlen(idstr) >= WIRE_IDSTR_MAX)
        return helper_fail(EINVAL, "a block's name has at most %d bytes: %s", WIRE_IDSTR_MAX - 1, idstr);
    if (mode > PCSHARE_COW)
        return helper_fail(EINVAL, "mode %u is none of PCSHARE_RO, PCSHARE_RW, PCSHARE_COW, 0", mode);
    a = calloc(1, sizeof(*a));
    if (!a)
        return helper_fail(ENOMEM, "no memory for an attachment");
    a->references = 1;
    a->socket = a->memfd = a->device = a->uffd = -1;
    a->map_at = map_at;
    a->map_at_length = map_at_length;
    a->info.mode = mode;
    snprintf(a->info.idstr, sizeof(a->info.idstr), "%s", idstr ? idstr : "");
    snprintf(a->socket_path, sizeof(a->socket_path), "%s", socket_path);
    library_lock();
    library_add(a);
    library_unlock();
    *ap = a;
    return 0;
}

void attachment_put(struct pcshare_attachment *a)
{
    if (--a->references == 0)
        free(a);
}

void attachment_release(struct pcshare_attachment *a, int keep_reserved)
{
    attachment_set_state(a, ATTACHMENT_LIMBO);
    requests_finish_all(a, -ECANCELED);
    memory_release(a, keep_reserved);
    trace_point(TRACE_HELPER_LEAVE, 0, 0, 0, 0);
    link_send_leave(a);
    link_close(a);
    fd_close(&a->uffd); /* after the mapping: while that can be read, a uffd must be open */
    fd_close(&a->memfd);
    fd_close(&a->device);
    status_view_put(a->view);
    a->view = NULL;
}

/* Takes the lock itself. */
static void attachment_end(struct pcshare_attachment *a, int keep_reserved)
{
    library_lock();
    attachment_release(a, keep_reserved);
    library_remove(a);
    attachment_put(a);
    sentinel_wait_left();
    library_unlock();
}

/* ---- the steps of attaching; each takes the lock itself ---- */

static int wait_for_answer(const struct pcshare_attachment *a, int64_t deadline_ms)
{
    struct pollfd polled = {.fd = a->socket, .events = POLLIN};
    int64_t left_ms;
    int n;

    do {
        left_ms = deadline_ms - helper_now_ms();
        if (left_ms < 0)
            left_ms = 0;
        n = poll(&polled, 1, deadline_ms == INT64_MAX ? -1 : left_ms < INT32_MAX ? (int)left_ms : INT32_MAX);
    } while (n == 0 && left_ms > INT32_MAX);
    if (n > 0)
        return 0;
    if (n == 0)
        return helper_fail(ETIMEDOUT, "%s: the coordinator has accepted this helper but has not answered %s in time",
                           a->socket_path, a->link == LINK_HELLO ? "HELLO" : "ATTACH");
    return helper_fail(errno, "%s: waiting for the coordinator: %s", a->socket_path, strerror(errno));
}

/* Where as many wait to be accepted as the socket has room for, nothing says when there is room again. */
static int say_hello(struct pcshare_attachment *a, int64_t deadline_ms)
{
    int rc;

    for (;;) {
        library_lock();
        rc = link_connect(a);
        library_unlock();
        if (rc != -EAGAIN || helper_now_ms() >= deadline_ms)
            return rc;
        if (poll(NULL, 0, CONNECT_AGAIN_MS) < 0)
            return helper_fail(errno, "%s: waiting to be accepted: %s", a->socket_path, strerror(errno));
    }
}

/* Waits for the next message and takes it over, in one go: no fd may lie about when another thread forks. */
static int hear(struct pcshare_attachment *a, int64_t deadline_ms,
                int (*accept)(struct pcshare_attachment *, struct link_message *, int *), int *is_completep)
{
    struct link_message message;
    int rc;

    do {
        rc = wait_for_answer(a, deadline_ms);
        if (rc < 0)
            return rc;
        library_lock();
        rc = link_receive(a, &message);
        if (rc == 0)
            rc = accept(a, &message, is_completep);
        library_unlock();
    } while (rc == LINK_EMPTY);
    return rc;
}

/* The block is complete, before or after ATTACH: nobody is needed any more. */
static int settle_complete(struct pcshare_attachment *a)
{
    int rc = 0;

    library_lock();
    trace_point(TRACE_HELPER_COMPLETE, 0, 0, 0, 0);
    if (a->data)
        memory_complete(a);
    else
        rc = memory_map_plain(a);
    if (rc == 0) {
        link_send_leave(a);
        link_close(a);
        fd_close(&a->memfd);
        fd_close(&a->device);
        attachment_set_state(a, PCSHARE_COMPLETE);
        if (a->relock_offset < a->info.map_length)
            rc = sentinel_start();
    }
    library_unlock();
    return rc;
}

static int hand_over(struct pcshare_attachment *a)
{
    int rc;

    library_lock();
    rc = memory_map_guarded(a);
    if (rc == 0) {
        trace_point(TRACE_HELPER_MAPPED, 0, 0, 0, 0);
        rc = link_send_attach(a);
    }
    library_unlock();
    return rc;
}

static int settle_attached(struct pcshare_attachment *a)
{
    int rc;

    library_lock();
    attachment_set_state(a, PCSHARE_ATTACHED);
    trace_point(TRACE_HELPER_ACKED, 0, 0, 0, 0);
    rc = sentinel_start();
    library_unlock();
    return rc;
}

static int check_map_at(const struct pcshare_attachment *a)
{
    if (!a->map_at)
        return 0;
    if (a->map_at_length != a->info.map_length)
        return helper_fail(ESTALE, "block %s has %llu bytes, the mapping that it shall replace %llu", a->info.idstr,
                           (unsigned long long)a->info.map_length, (unsigned long long)a->map_at_length);
    if ((uintptr_t)a->map_at % a->info.page_size == 0)
        return 0;
    return helper_fail(EINVAL,
                       "block %s: the mapping at %p that it shall replace is not aligned to its page size, %llu",
                       a->info.idstr, a->map_at, (unsigned long long)a->info.page_size);
}

static int attach(struct pcshare_attachment *a, int64_t deadline_ms)
{
    int is_complete = 0;
    int rc = say_hello(a, deadline_ms);

    if (rc == 0)
        rc = hear(a, deadline_ms, link_accept_welcome, &is_complete);
    if (rc == 0)
        rc = check_map_at(a);
    if (rc < 0)
        return rc;
    if (is_complete)
        return settle_complete(a);
    rc = hand_over(a);
    if (rc == 0)
        rc = hear(a, deadline_ms, link_accept_ack, &is_complete);
    if (rc < 0)
        return rc;
    return is_complete ? settle_complete(a) : settle_attached(a);
}

/* ---- public ---- */

int pcshare_attach(struct pcshare_attachment **ap, const char *socket_path, const char *idstr, uint32_t mode,
                   int64_t timeout_ms, void *map_at, uint64_t map_at_length)
{
    int64_t deadline_ms = helper_deadline_ms(timeout_ms);
    struct pcshare_attachment *a;
    int rc = attachment_new(&a, socket_path, idstr, mode, map_at, map_at_length);

    if (rc < 0)
        return rc;
    rc = attach(a, deadline_ms);
    if (rc < 0)
        attachment_end(a, map_at != NULL);
    else
        *ap = a;
    return rc;
}

int pcshare_peek(struct pcshare_info *info, const char *socket_path, const char *idstr, uint32_t mode,
                 int64_t timeout_ms)
{
    int64_t deadline_ms = helper_deadline_ms(timeout_ms);
    struct pcshare_attachment *a;
    int is_complete = 0, rc = attachment_new(&a, socket_path, idstr, mode, NULL, 0);

    if (rc < 0)
        return rc;
    rc = say_hello(a, deadline_ms);
    if (rc == 0)
        rc = hear(a, deadline_ms, link_accept_welcome, &is_complete);
    if (rc == 0)
        *info = a->info;
    attachment_end(a, 0);
    return rc;
}

void pcshare_detach(struct pcshare_attachment *a, int keep_reserved)
{
    if (a)
        attachment_end(a, keep_reserved);
}

void *pcshare_data(const struct pcshare_attachment *a)
{
    return a->data;
}

void pcshare_get_info(const struct pcshare_attachment *a, struct pcshare_info *info)
{
    struct pcshare_info now;

    library_lock();
    now = a->info;
    library_unlock();
    *info = now; /* without the lock: it may lie in a page that has not arrived */
}

int pcshare_state(const struct pcshare_attachment *a)
{
    return __atomic_load_n(&a->state, __ATOMIC_ACQUIRE);
}
