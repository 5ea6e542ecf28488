/* incoming_path: the return path: messages in order, out of whoever's thread they come, and nobody waits for the peer.
 * See incoming.h.
 *
 * What the socket does not take stays here; its epoll, which is one-shot, tells the fault threads when it takes more.
 * Whoever sends does so with the lock open; what others add meanwhile goes with it.
 */
#define _GNU_SOURCE
#include "incoming_internal.h"

#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include "thread.h"

enum { REQUEST_FIXED_LENGTH = 12, WORD_BITS = 64 };
static const uint64_t bitmap_end_mark = 0x0123456789abcdefull;
static const uint64_t ns_per_ms = 1000000;

/* ---- output: with the lock held ---- */

/* Room for so many bytes in a row, which count as written. NULL: no memory, or the peer takes nothing. */
static uint8_t *output_room(struct incoming *in, size_t length)
{
    struct chunk *tail = in->output_tail;

    if (in->output_length + length > INCOMING_OUTPUT_MAX + in->bitmaps_length)
        return NULL;
    if (!tail || tail->capacity - tail->end < length) {
        size_t capacity = length > INCOMING_CHUNK_BYTES ? length : INCOMING_CHUNK_BYTES;
        struct chunk *chunk = malloc(sizeof(*chunk) + capacity);

        if (!chunk)
            return NULL;
        *chunk = (struct chunk){.capacity = capacity};
        if (tail)
            tail->next = chunk;
        else
            in->output = chunk;
        in->output_tail = tail = chunk;
    }
    uint8_t *room = tail->bytes + tail->end;
    tail->end += length;
    in->output_length += length;
    return room;
}

static void drop_first_chunk(struct incoming *in)
{
    struct chunk *chunk = in->output;

    in->output = chunk->next;
    if (!in->output)
        in->output_tail = NULL;
    in->output_length -= chunk->end - chunk->start;
    free(chunk);
}

void path_free(struct incoming *in)
{
    while (in->output)
        drop_first_chunk(in);
}

static uint8_t *put16(uint8_t *at, uint16_t value)
{
    value = htobe16(value);
    memcpy(at, &value, sizeof(value));
    return at + sizeof(value);
}

static uint8_t *put32(uint8_t *at, uint32_t value)
{
    value = htobe32(value);
    memcpy(at, &value, sizeof(value));
    return at + sizeof(value);
}

static uint8_t *put64(uint8_t *at, uint64_t value)
{
    value = htobe64(value);
    memcpy(at, &value, sizeof(value));
    return at + sizeof(value);
}

static uint8_t *put_header(uint8_t *at, uint16_t type, uint32_t length)
{
    return put16(put16(at, type), (uint16_t)length);
}

static uint8_t *put_name(uint8_t *at, const struct incoming_block *block)
{
    *at = (uint8_t)block->idstr_length;
    memcpy(at + 1, block->idstr, block->idstr_length);
    return at + 1 + block->idstr_length;
}

/* ---- requests ---- */

static int put_request(struct incoming *in, const struct outstanding *entry)
{
    const struct incoming_block *block = entry->block;
    int names = block != in->path_block;
    uint32_t length = REQUEST_FIXED_LENGTH + (names ? 1 + block->idstr_length : 0);
    uint8_t *at = output_room(in, RETURN_HEADER_LENGTH + length);

    if (!at)
        return -ENOMEM;
    at = put_header(at, names ? RETURN_REQ_PAGES_ID : RETURN_REQ_PAGES, length);
    at = put64(at, bytes_in_pages(block, entry->page));
    at = put32(at, (uint32_t)bytes_in_pages(block, entry->n_pages));
    if (names)
        put_name(at, block);
    in->path_block = block;
    return 0;
}

/* Few at a time: what has not left can be overtaken, and need not leave once it has come. */
static void put_requests(struct incoming *in)
{
    struct outstanding *entry;

    while (!in->held && in->output_length < INCOMING_REQUESTS_AHEAD && (entry = requests_next_unsent(in))) {
        if (!requests_is_asked(entry) && put_request(in, entry) < 0)
            return;
        requests_mark_sent(entry);
    }
}

/* ---- sending ---- */

static void arm(struct incoming *in)
{
    struct epoll_event event = {.events = EPOLLOUT | EPOLLONESHOT};

    in->path_blocked = 1;
    if (epoll_ctl(in->epoll_fd, in->path_polled ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, in->path->fd, &event) < 0)
        in->path_error = errno;
    else
        in->path_polled = 1;
}

static void note_sent(struct incoming *in, size_t n)
{
    struct chunk *chunk = in->output;

    chunk->start += n;
    in->output_length -= n;
    if (chunk->start == chunk->end)
        drop_first_chunk(in);
}

/* One send. 0: there may be more to do. */
static int send_some(struct incoming *in)
{
    struct chunk *chunk = in->output;
    size_t length = chunk->end - chunk->start;

    pthread_mutex_unlock(&in->lock);
    ssize_t n = send(in->path->fd, chunk->bytes + chunk->start, length, MSG_NOSIGNAL | MSG_DONTWAIT);
    int error = errno;
    pthread_mutex_lock(&in->lock);
    if (n >= 0)
        note_sent(in, (size_t)n);
    else if (error == EAGAIN)
        arm(in);
    else if (error != EINTR)
        in->path_error = error;
    return n < 0 && error != EINTR;
}

static int can_send(const struct incoming *in)
{
    return in->path && !in->path_error && !in->path_blocked;
}

void path_send(struct incoming *in)
{
    int over = 0;

    if (in->path_sending || !can_send(in))
        return;
    in->path_sending = 1;
    in->path_users++;
    while (!over) {
        put_requests(in);
        over = !in->output || send_some(in);
    }
    in->path_sending = 0;
    in->path_users--;
    pthread_cond_broadcast(&in->changed);
}

void path_ready(struct incoming *in)
{
    in->path_blocked = 0;
    path_send(in);
}

/* ---- which connection ---- */

static void change_path(struct incoming *in, struct incoming_stream *stream)
{
    if (in->path && in->path_polled)
        (void)epoll_ctl(in->epoll_fd, EPOLL_CTL_DEL, in->path->fd, NULL);
    if (in->path) {
        in->held = 1;
        requests_unsend(in);
    }
    path_free(in);
    in->path = stream;
    in->path_error = in->path_polled = in->path_blocked = 0;
    in->path_block = NULL;
    path_send(in);
}

/* Only if it is this one now, where that is said. */
static void set_path(struct incoming *in, const struct incoming_stream *only, struct incoming_stream *stream)
{
    pthread_mutex_lock(&in->lock);
    while (in->path_users)
        pthread_cond_wait(&in->changed, &in->lock);
    if (in->path != stream && (!only || in->path == only))
        change_path(in, stream);
    pthread_mutex_unlock(&in->lock);
}

void incoming_set_return_path(struct incoming *in, struct incoming_stream *stream)
{
    set_path(in, NULL, stream);
}

void path_forget(struct incoming *in, const struct incoming_stream *s)
{
    set_path(in, s, NULL);
}

void incoming_resend(struct incoming *in)
{
    pthread_mutex_lock(&in->lock);
    requests_unsend(in);
    in->held = 0;
    in->path_block = NULL;
    path_send(in);
    pthread_mutex_unlock(&in->lock);
}

/* ---- messages ---- */

static int is_open(const struct incoming *in)
{
    return in->path && !in->path_error;
}

int incoming_send(struct incoming *in, uint16_t type, const void *payload, uint32_t length)
{
    int rc = 0;

    if (length > INCOMING_PAYLOAD_MAX)
        return -EMSGSIZE;
    pthread_mutex_lock(&in->lock);
    uint8_t *at = is_open(in) ? output_room(in, RETURN_HEADER_LENGTH + length) : NULL;
    if (at) {
        at = put_header(at, type, length);
        if (length)
            memcpy(at, payload, length);
        path_send(in);
    } else {
        rc = is_open(in) ? -ENOBUFS : -ENOTCONN;
    }
    pthread_mutex_unlock(&in->lock);
    return rc;
}

static uint64_t bitmap_words(const struct incoming_block *block)
{
    return (block->page_count * block->target_per_page + WORD_BITS - 1) / WORD_BITS;
}

/* Message, size, bitmap, end mark. */
uint64_t path_bitmap_length(const struct incoming_block *block)
{
    return RETURN_HEADER_LENGTH + 1 + block->idstr_length + (bitmap_words(block) + 2) * sizeof(uint64_t);
}

/* Target pages received, bit by bit from the first, in whole words. */
static uint8_t *put_bitmap(uint8_t *at, const struct incoming_block *block, uint64_t words)
{
    for (uint64_t i = 0; i < words; i++) {
        uint64_t word = htole64(__atomic_load_n(&block->received[i], __ATOMIC_ACQUIRE));

        memcpy(at, &word, sizeof(word));
        at += sizeof(word);
    }
    return at;
}

int incoming_send_bitmap(struct incoming *in, const char *idstr)
{
    const struct incoming_block *block = incoming_find_block(in, idstr, (uint32_t)strlen(idstr));
    int rc = 0;

    if (!block)
        return -ENOENT;
    uint64_t words = bitmap_words(block);
    uint32_t length = 1 + block->idstr_length;
    pthread_mutex_lock(&in->lock);
    uint8_t *at = is_open(in) ? output_room(in, path_bitmap_length(block)) : NULL;
    if (at) {
        at = put_name(put_header(at, RETURN_RECV_BITMAP, length), block);
        at = put_bitmap(put64(at, words * sizeof(uint64_t)), block, words);
        put64(at, bitmap_end_mark);
        path_send(in);
    } else {
        rc = is_open(in) ? -ENOBUFS : -ENOTCONN;
    }
    pthread_mutex_unlock(&in->lock);
    return rc;
}

/* ---- waiting ---- */

/* With the lock held, which is open while it waits. */
static void wait_for_room(struct incoming *in, int timeout_ms)
{
    struct pollfd polled = {.fd = in->path->fd, .events = POLLOUT};

    in->path_users++;
    pthread_mutex_unlock(&in->lock);
    (void)poll(&polled, 1, timeout_ms);
    pthread_mutex_lock(&in->lock);
    in->path_users--;
    pthread_cond_broadcast(&in->changed);
}

int incoming_flush(struct incoming *in, int timeout_ms)
{
    uint64_t deadline_ns = timeout_ms < 0 ? UINT64_MAX : clock_ns() + (uint64_t)timeout_ms * ns_per_ms, now_ns;
    int rc = INCOMING_TIMED_OUT;

    pthread_mutex_lock(&in->lock);
    do {
        if (is_open(in))
            path_ready(in);
        now_ns = clock_ns();
        if (!is_open(in))
            rc = -ENOTCONN;
        else if (!in->output)
            rc = 0;
        else if (now_ns < deadline_ns)
            wait_for_room(in, timeout_ms < 0 ? INCOMING_FOREVER : (int)((deadline_ns - now_ns) / ns_per_ms) + 1);
    } while (rc == INCOMING_TIMED_OUT && now_ns < deadline_ns);
    pthread_mutex_unlock(&in->lock);
    return rc;
}
