/* incoming_stream: a connection's bytes, read ahead; see incoming.h. */
#define _GNU_SOURCE
#include "incoming_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

void count_up(uint64_t *counter, uint64_t n)
{
    __atomic_fetch_add(counter, n, __ATOMIC_RELAXED);
}

/* ---- life ---- */

/* Costs memory only where it is touched: few streams ever see a half page. */
static int map_buffer(uint8_t **bufferp, size_t length)
{
    void *mapped = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (mapped == MAP_FAILED)
        return -errno;
    *bufferp = mapped;
    return 0;
}

static void unmap_buffer(uint8_t *buffer, size_t length)
{
    if (buffer)
        munmap(buffer, length);
}

static int prepare_socket(int fd)
{
    int flags = fcntl(fd, F_GETFL), one = 1;

    if (flags < 0 || fcntl(fd, F_SETFL, flags & ~O_NONBLOCK) < 0)
        return -errno;
    (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)); /* no TCP: needs none */
    return 0;
}

int incoming_stream_new(struct incoming_stream **sp, struct incoming *in, int fd)
{
    struct incoming_stream *s = calloc(1, sizeof(*s));

    *sp = NULL;
    if (!s) {
        close(fd);
        return -ENOMEM;
    }
    s->in = incoming_get(in);
    s->fd = fd;
    int rc = prepare_socket(fd);
    if (rc == 0)
        rc = map_buffer(&s->input, INCOMING_INPUT_BYTES);
    if (rc == 0)
        rc = map_buffer(&s->run_bytes, INCOMING_RUN_BYTES);
    if (rc == 0)
        rc = map_buffer(&s->half_bytes, RAMBLOCK_PAGE_SIZE_MAX);
    if (rc == 0)
        rc = map_buffer(&s->fill_bytes, in->host_page_size);
    if (rc < 0) {
        incoming_stream_free(s);
        return rc;
    }
    *sp = s;
    return 0;
}

void incoming_stream_free(struct incoming_stream *s)
{
    if (!s)
        return;
    path_forget(s->in, s);
    close(s->fd);
    unmap_buffer(s->input, INCOMING_INPUT_BYTES);
    unmap_buffer(s->run_bytes, INCOMING_RUN_BYTES);
    unmap_buffer(s->half_bytes, RAMBLOCK_PAGE_SIZE_MAX);
    unmap_buffer(s->fill_bytes, s->in->host_page_size);
    incoming_put(s->in);
    free(s);
}

void incoming_stream_stop(struct incoming_stream *s)
{
    pthread_mutex_lock(&s->in->lock);
    __atomic_store_n(&s->stopped, 1, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&s->in->changed);
    pthread_mutex_unlock(&s->in->lock);
    (void)shutdown(s->fd, SHUT_RDWR);
}

uint64_t incoming_stream_offset(const struct incoming_stream *s)
{
    return __atomic_load_n(&s->offset, __ATOMIC_RELAXED);
}

void incoming_stream_counters(const struct incoming_stream *s, struct incoming_counters *counters)
{
    const uint64_t *from = (const uint64_t *)&s->counters;
    uint64_t *to = (uint64_t *)counters;

    for (size_t i = 0; i < sizeof(*counters) / sizeof(*to); i++)
        to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
}

/* ---- input ---- */

static uint32_t buffered(const struct incoming_stream *s)
{
    return s->input_end - s->input_start;
}

void input_consume(struct incoming_stream *s, uint32_t n)
{
    s->input_start += n;
    __atomic_store_n(&s->offset, s->offset + n, __ATOMIC_RELAXED);
}

static void make_room(struct incoming_stream *s)
{
    uint32_t have = buffered(s);

    memmove(s->input, s->input + s->input_start, have);
    s->input_start = 0;
    s->input_end = have;
}

/* Waits until there is something to read. INPUT_SILENT. */
static int wait_for_peer(struct incoming_stream *s, int timeout_ms)
{
    struct pollfd polled = {.fd = s->fd, .events = POLLIN};
    int rc = incoming_before_waiting(s);

    if (rc < 0)
        return rc;
    do
        rc = poll(&polled, 1, timeout_ms);
    while (rc < 0 && errno == EINTR);
    return rc < 0 ? -errno : rc == 0 ? INPUT_SILENT : 0;
}

/* How much to take in at once. */
static size_t room(const struct incoming_stream *s)
{
    size_t all = INCOMING_INPUT_BYTES - s->input_end;
    int is_wanted = __atomic_load_n(&s->in->n_outstanding, __ATOMIC_RELAXED) > 0;

    return is_wanted && all > INCOMING_WANTED_BYTES ? INCOMING_WANTED_BYTES : all;
}

/* Takes in what has come, waiting for the first of it. INPUT_EOF, INPUT_SILENT. */
static int take_in(struct incoming_stream *s, int timeout_ms)
{
    make_room(s);
    for (;;) {
        if (__atomic_load_n(&s->stopped, __ATOMIC_ACQUIRE))
            return -ECANCELED;
        ssize_t n = recv(s->fd, s->input + s->input_end, room(s), MSG_DONTWAIT);
        if (n > 0) {
            s->input_end += (uint32_t)n;
            count_up(&s->counters.bytes, (uint64_t)n);
            return 0;
        }
        if (n == 0)
            return __atomic_load_n(&s->stopped, __ATOMIC_ACQUIRE) ? -ECANCELED : INPUT_EOF;
        if (errno != EAGAIN && errno != EINTR)
            return -errno;
        int rc = wait_for_peer(s, timeout_ms);
        if (rc)
            return rc;
    }
}

int input_need(struct incoming_stream *s, uint32_t n, const uint8_t **bytesp)
{
    while (buffered(s) < n) {
        int rc = take_in(s, INCOMING_FOREVER);
        if (rc == INPUT_EOF && buffered(s))
            return -ECONNRESET;
        if (rc)
            return rc;
    }
    *bytesp = s->input + s->input_start;
    return 0;
}

static uint64_t hand_out(struct incoming_stream *s, void *bytes, uint64_t length)
{
    uint32_t have = buffered(s), n = length < have ? (uint32_t)length : have;

    memcpy(bytes, s->input + s->input_start, n);
    input_consume(s, n);
    return n;
}

int incoming_stream_read(struct incoming_stream *s, void *bytes, uint64_t length, int timeout_ms)
{
    uint64_t done = 0;

    while (done < length) {
        int rc = buffered(s) ? 0 : take_in(s, timeout_ms);
        if (rc == INPUT_EOF)
            return -ECONNRESET;
        if (rc == INPUT_SILENT)
            return -ETIMEDOUT;
        if (rc < 0)
            return rc;
        done += hand_out(s, (uint8_t *)bytes + done, length - done);
    }
    return 0;
}

int incoming_stream_read_some(struct incoming_stream *s, void *bytes, uint64_t length, int timeout_ms, uint64_t *np)
{
    int rc = buffered(s) ? 0 : take_in(s, timeout_ms);

    *np = 0;
    if (rc == INPUT_SILENT)
        return INCOMING_TIMED_OUT;
    if (rc == 0)
        *np = hand_out(s, bytes, length);
    return rc < 0 ? rc : 0;
}
