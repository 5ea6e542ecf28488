/* nbd_connection: see nbd_connection.h. */
#define _GNU_SOURCE
#include "nbd_connection.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "thread.h"

enum {
    NBD_REQUEST_MAGIC = 0x25609513,
    NBD_SIMPLE_REPLY_MAGIC = 0x67446698,
    NBD_STRUCTURED_REPLY_MAGIC = 0x668e33ef,
};
enum { NBD_CMD_READ = 0, NBD_CMD_DISC = 2 };
enum { NBD_CHUNK_DONE = 1 }; /* flag */
enum {
    NBD_CHUNK_NONE = 0,
    NBD_CHUNK_OFFSET_DATA = 1,
    NBD_CHUNK_OFFSET_HOLE = 2,
    NBD_CHUNK_IS_ERROR = 1 << 15,
};
enum {
    SIMPLE_REPLY_LENGTH = 16,
    CHUNK_LENGTH = 20,
    OFFSET_LENGTH = 8,
    HOLE_LENGTH = 12,
    ERROR_LENGTH_MIN = 6,
    ERROR_LENGTH_MAX = ERROR_LENGTH_MIN + 4096 + OFFSET_LENGTH,
};
enum { NEED_MORE = 0 }; /* beside lengths */

_Static_assert(CHUNK_LENGTH + OFFSET_LENGTH == NBD_HEADER_LENGTH, "a data chunk's header");

/* ---- fields of a message ---- */

static uint16_t get16(const uint8_t *at)
{
    uint16_t value;

    memcpy(&value, at, sizeof(value));
    return be16toh(value);
}

static uint32_t get32(const uint8_t *at)
{
    uint32_t value;

    memcpy(&value, at, sizeof(value));
    return be32toh(value);
}

static uint64_t get64(const uint8_t *at)
{
    uint64_t value;

    memcpy(&value, at, sizeof(value));
    return be64toh(value);
}

static int errno_of(uint32_t error)
{
    switch (error) {
    case EPERM:
    case EIO:
    case ENOMEM:
    case EINVAL:
    case ENOSPC:
    case EOVERFLOW:
    case ENOTSUP:
    case ESHUTDOWN:
        return (int)error;
    default:
        return EINVAL;
    }
}

/* ---- life ---- */

int nbd_connection_new(struct nbd_connection **connectionp, int fd, uint32_t kind, int structured_replies)
{
    struct nbd_connection *connection = calloc(1, sizeof(*connection));
    int flags = fcntl(fd, F_GETFL);

    *connectionp = NULL;
    if (!connection || flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0) {
        int rc = connection ? -errno : -ENOMEM;
        free(connection);
        close(fd);
        return rc;
    }
    connection->fd = fd;
    connection->kind = kind;
    connection->structured_replies = structured_replies;
    connection->users = 1;
    *connectionp = connection;
    return 0;
}

void nbd_connection_free(struct nbd_connection *connection)
{
    close(connection->fd);
    free(connection);
}

void nbd_connection_spoil(struct nbd_connection *connection, int error, const char *format, ...)
{
    va_list arguments;

    if (connection->error)
        return;
    connection->error = error;
    va_start(arguments, format);
    vsnprintf(connection->text, sizeof(connection->text), format, arguments);
    va_end(arguments);
}

/* ---- asking ---- */

static void put_request(struct nbd_connection *connection, uint16_t command, uint64_t cookie, uint64_t offset,
                        uint32_t length)
{
    struct __attribute__((packed)) {
        uint32_t magic;
        uint16_t flags;
        uint16_t command;
        uint64_t cookie;
        uint64_t offset;
        uint32_t length;
    } request = {htobe32(NBD_REQUEST_MAGIC), 0, htobe16(command), htobe64(cookie), htobe64(offset), htobe32(length)};

    _Static_assert(sizeof(request) == NBD_REQUEST_LENGTH, "as the protocol has it");
    memcpy(connection->output + connection->output_length, &request, sizeof(request));
    connection->output_length += sizeof(request);
}

/* A read that was answered before its request had left whole leaves its bytes in the output. */
int nbd_connection_has_room(const struct nbd_connection *connection)
{
    return !connection->error && connection->n_in_flight < NBD_IN_FLIGHT_MAX &&
           connection->output_length + 2 * NBD_REQUEST_LENGTH <= sizeof(connection->output);
}

void nbd_connection_ask(struct nbd_connection *connection, struct nbd_read *read, uint64_t now_ns)
{
    uint32_t slot = 0;

    while (connection->in_flight[slot])
        slot++;
    if (connection->n_in_flight++ == 0)
        __atomic_store_n(&connection->heard_ns, now_ns, __ATOMIC_RELAXED);
    connection->in_flight[slot] = read;
    read->asked_ns = now_ns;
    read->error = 0;
    read->n_spans = 0;
    uint64_t cookie = (uint64_t)++connection->generations[slot] << 32 | slot;
    put_request(connection, NBD_CMD_READ, cookie, read->offset, read->length);
}

void nbd_connection_say_goodbye(struct nbd_connection *connection)
{
    if (connection->output_length + NBD_REQUEST_LENGTH <= sizeof(connection->output))
        put_request(connection, NBD_CMD_DISC, 0, 0, 0);
}

struct nbd_read *nbd_connection_take_all(struct nbd_connection *connection)
{
    struct nbd_read *list = NULL;

    for (uint32_t slot = 0; slot < NBD_IN_FLIGHT_MAX; slot++) {
        struct nbd_read *read = connection->in_flight[slot];

        if (!read)
            continue;
        connection->in_flight[slot] = NULL;
        read->next = list;
        list = read;
    }
    connection->n_in_flight = 0;
    return list;
}

void nbd_connection_send(struct nbd_connection *connection, pthread_mutex_t *lock)
{
    if (connection->sending)
        return;
    connection->sending = 1;
    connection->users++;
    connection->blocked = 0;
    while (connection->output_length && !connection->error && !connection->blocked) {
        uint32_t length = connection->output_length;

        pthread_mutex_unlock(lock);
        ssize_t n = send(connection->fd, connection->output, length, MSG_NOSIGNAL | MSG_DONTWAIT);
        int error = errno;
        pthread_mutex_lock(lock);
        if (n > 0) {
            connection->output_length -= (uint32_t)n;
            memmove(connection->output, connection->output + n, connection->output_length);
        } else if (error == EAGAIN) {
            connection->blocked = 1;
        } else if (error != EINTR) {
            nbd_connection_spoil(connection, error, "sending a request: %s", strerror(error));
        }
    }
    connection->sending = 0;
    connection->users--;
}

/* ---- what a reply has brought ---- */

/* Notes that [start, end) of the read has come. -EPROTO: it came twice, or in too many pieces at once. */
static int note_span(struct nbd_read *read, uint32_t start, uint32_t end)
{
    struct nbd_span *spans = read->spans;
    uint32_t at = 0;

    while (at < read->n_spans && spans[at].end < start)
        at++;
    if (at < read->n_spans && spans[at].end == start) {
        if (at + 1 < read->n_spans && spans[at + 1].start < end)
            return -EPROTO;
        spans[at].end = end;
        if (at + 1 < read->n_spans && spans[at + 1].start == end) {
            spans[at].end = spans[at + 1].end;
            read->n_spans--;
            memmove(&spans[at + 1], &spans[at + 2], (read->n_spans - at - 1) * sizeof(*spans));
        }
        return 0;
    }
    if (at < read->n_spans && spans[at].start <= end) {
        if (spans[at].start < end)
            return -EPROTO;
        spans[at].start = start;
        return 0;
    }
    if (read->n_spans == NBD_REPLY_SPANS_MAX)
        return -EPROTO;
    memmove(&spans[at + 1], &spans[at], (read->n_spans - at) * sizeof(*spans));
    spans[at] = (struct nbd_span){start, end};
    read->n_spans++;
    return 0;
}

static int is_whole(const struct nbd_read *read)
{
    return read->n_spans == 1 && read->spans[0].start == 0 && read->spans[0].end == read->length;
}

/* ---- taking replies apart: called by who receives, without the lock ---- */

static int lose(struct nbd_connection *connection, pthread_mutex_t *lock, int error, const char *text)
{
    pthread_mutex_lock(lock);
    nbd_connection_spoil(connection, error, "%s", text);
    error = connection->error;
    pthread_mutex_unlock(lock);
    return -error;
}

static int garbled(struct nbd_connection *connection, pthread_mutex_t *lock, const char *text)
{
    return lose(connection, lock, EPROTO, text);
}

static struct nbd_read *read_of(struct nbd_connection *connection, pthread_mutex_t *lock, uint64_t cookie)
{
    uint32_t slot = (uint32_t)cookie;
    struct nbd_read *read = NULL;

    pthread_mutex_lock(lock);
    if (slot < NBD_IN_FLIGHT_MAX && connection->generations[slot] == cookie >> 32)
        read = connection->in_flight[slot];
    pthread_mutex_unlock(lock);
    return read;
}

/* The reply is whole: its read is no longer in flight. */
static int end_reply(struct nbd_connection *connection, pthread_mutex_t *lock, struct nbd_read *read,
                     struct nbd_read **readp)
{
    if (!read->error && !is_whole(read))
        return garbled(connection, lock, "a reply leaves out a part of what was asked");
    pthread_mutex_lock(lock);
    for (uint32_t slot = 0; slot < NBD_IN_FLIGHT_MAX; slot++) {
        if (connection->in_flight[slot] == read) {
            connection->in_flight[slot] = NULL;
            connection->n_in_flight--;
            *readp = read;
        }
    }
    pthread_mutex_unlock(lock);
    return NBD_RECEIVED_READ;
}

static int end_chunk(struct nbd_connection *connection, pthread_mutex_t *lock, struct nbd_read *read,
                     struct nbd_read **readp)
{
    return connection->ends_reply ? end_reply(connection, lock, read, readp) : NBD_RECEIVED_SOME;
}

static int begin_data(struct nbd_connection *connection, pthread_mutex_t *lock, struct nbd_read *read, uint64_t start,
                      uint32_t length)
{
    if (length == 0 || start > read->length || length > read->length - start)
        return garbled(connection, lock, "a reply brings bytes that were not asked for");
    if (note_span(read, (uint32_t)start, (uint32_t)start + length) < 0)
        return garbled(connection, lock, "a reply brings the same bytes twice, or too many pieces");
    connection->filling = read;
    connection->fill = read->bytes + start;
    connection->fill_left = length;
    return NBD_RECEIVED_SOME;
}

static const uint8_t *buffered(const struct nbd_connection *connection)
{
    return connection->input + connection->input_start;
}

static uint32_t buffered_length(const struct nbd_connection *connection)
{
    return connection->input_end - connection->input_start;
}

static int simple_reply(struct nbd_connection *connection, pthread_mutex_t *lock, struct nbd_read **readp)
{
    const uint8_t *at = buffered(connection);
    uint32_t error = get32(at + 4);
    struct nbd_read *read = read_of(connection, lock, get64(at + 8));

    if (!read)
        return garbled(connection, lock, "a reply to nothing that was asked");
    connection->input_start += SIMPLE_REPLY_LENGTH;
    connection->ends_reply = 1;
    if (error) {
        read->error = errno_of(error);
        return end_reply(connection, lock, read, readp);
    }
    if (connection->structured_replies)
        return garbled(connection, lock, "a simple reply where structured ones were agreed on");
    return begin_data(connection, lock, read, 0, read->length);
}

static int error_chunk(struct nbd_connection *connection, pthread_mutex_t *lock, struct nbd_read *read, uint32_t length,
                       struct nbd_read **readp)
{
    const uint8_t *at = buffered(connection);
    uint32_t text_length = get16(at + 4);

    if (get32(at) == 0 || text_length > length - ERROR_LENGTH_MIN)
        return garbled(connection, lock, "an error reply that cannot be read");
    read->error = errno_of(get32(at));
    connection->input_start += length;
    return end_chunk(connection, lock, read, readp);
}

static int hole_chunk(struct nbd_connection *connection, pthread_mutex_t *lock, struct nbd_read *read,
                      struct nbd_read **readp)
{
    const uint8_t *at = buffered(connection);
    uint64_t start = get64(at) - read->offset;
    uint32_t length = get32(at + OFFSET_LENGTH);
    int rc = begin_data(connection, lock, read, start, length);

    connection->fill_left = 0;
    if (rc < 0)
        return rc;
    memset(read->bytes + start, 0, length);
    connection->input_start += HOLE_LENGTH;
    return end_chunk(connection, lock, read, readp);
}

/* How many bytes of the chunk must have come before it can be looked at: all but the data. */
static int64_t chunk_head_length(uint16_t type, uint32_t length)
{
    if (type == NBD_CHUNK_NONE)
        return length == 0 ? 0 : -EPROTO;
    if (type == NBD_CHUNK_OFFSET_DATA)
        return length > OFFSET_LENGTH ? OFFSET_LENGTH : -EPROTO;
    if (type == NBD_CHUNK_OFFSET_HOLE)
        return length == HOLE_LENGTH ? HOLE_LENGTH : -EPROTO;
    if (type & NBD_CHUNK_IS_ERROR)
        return length >= ERROR_LENGTH_MIN && length <= ERROR_LENGTH_MAX ? (int64_t)length : -EPROTO;
    return -EPROTO;
}

static int chunk(struct nbd_connection *connection, pthread_mutex_t *lock, struct nbd_read **readp)
{
    const uint8_t *at = buffered(connection);
    uint16_t flags = get16(at + 4), type = get16(at + 6);
    uint32_t length = get32(at + 16);
    struct nbd_read *read = read_of(connection, lock, get64(at + 8));

    if (!read)
        return garbled(connection, lock, "a reply to nothing that was asked");
    connection->input_start += CHUNK_LENGTH;
    connection->ends_reply = flags & NBD_CHUNK_DONE;
    if (type == NBD_CHUNK_NONE && !connection->ends_reply)
        return garbled(connection, lock, "a part of a reply that brings nothing and ends nothing");
    if (type == NBD_CHUNK_NONE)
        return end_chunk(connection, lock, read, readp);
    if (type == NBD_CHUNK_OFFSET_HOLE)
        return hole_chunk(connection, lock, read, readp);
    if (type & NBD_CHUNK_IS_ERROR)
        return error_chunk(connection, lock, read, length, readp);
    uint64_t start = get64(buffered(connection)) - read->offset;
    connection->input_start += OFFSET_LENGTH;
    return begin_data(connection, lock, read, start, length - OFFSET_LENGTH);
}

/* How many bytes the next message needs in the input before it can be handled; the receiver's view of framing. */
static int64_t message_length(const struct nbd_connection *connection)
{
    const uint8_t *at = buffered(connection);
    uint32_t have = buffered_length(connection);

    if (have < SIMPLE_REPLY_LENGTH)
        return SIMPLE_REPLY_LENGTH;
    if (get32(at) == NBD_SIMPLE_REPLY_MAGIC)
        return SIMPLE_REPLY_LENGTH;
    if (get32(at) != NBD_STRUCTURED_REPLY_MAGIC || !connection->structured_replies)
        return -EPROTO;
    if (have < CHUNK_LENGTH)
        return CHUNK_LENGTH;
    int64_t head = chunk_head_length(get16(at + 6), get32(at + 16));
    return head < 0 ? head : CHUNK_LENGTH + head;
}

/* ---- receiving ---- */

/* Bytes received, or NEED_MORE: nothing there now. */
static ssize_t take_in(struct nbd_connection *connection, pthread_mutex_t *lock, void *bytes, size_t length)
{
    ssize_t n = recv(connection->fd, bytes, length, MSG_DONTWAIT);

    if (n > 0) {
        __atomic_store_n(&connection->heard_ns, clock_ns(), __ATOMIC_RELAXED);
        return n;
    }
    if (n == 0)
        return lose(connection, lock, ECONNRESET, "the server hung up");
    if (errno == EAGAIN || errno == EINTR)
        return NEED_MORE;
    int error = errno;
    return lose(connection, lock, error, strerror(error));
}

static int fill_read(struct nbd_connection *connection, pthread_mutex_t *lock, struct nbd_read **readp)
{
    uint32_t have = buffered_length(connection);
    ssize_t n = have < connection->fill_left ? have : connection->fill_left;

    if (n > 0) {
        memcpy(connection->fill, buffered(connection), (size_t)n);
        connection->input_start += (uint32_t)n;
    } else {
        n = take_in(connection, lock, connection->fill, connection->fill_left);
        if (n <= 0)
            return (int)n;
    }
    connection->fill += n;
    connection->fill_left -= (uint32_t)n;
    return connection->fill_left ? NBD_RECEIVED_SOME : end_chunk(connection, lock, connection->filling, readp);
}

/* Reads ahead what a page's reply has on the demand connection; of long replies the header alone, so that their data
 * goes where it belongs at once. */
static int fill_input(struct nbd_connection *connection, pthread_mutex_t *lock, uint32_t needed)
{
    uint32_t have = buffered_length(connection);
    uint32_t wanted = connection->kind == NBD_DEMAND ? NBD_INPUT_MAX : NBD_HEADER_LENGTH;

    memmove(connection->input, buffered(connection), have);
    connection->input_start = 0;
    connection->input_end = have;
    if (wanted < needed)
        wanted = needed;
    ssize_t n = take_in(connection, lock, connection->input + have, wanted - have);
    if (n <= 0)
        return (int)n;
    connection->input_end += (uint32_t)n;
    return NBD_RECEIVED_SOME;
}

int nbd_connection_has_input(const struct nbd_connection *connection)
{
    if (connection->fill_left)
        return buffered_length(connection) > 0;
    return message_length(connection) <= (int64_t)buffered_length(connection);
}

int nbd_connection_receive(struct nbd_connection *connection, pthread_mutex_t *lock, struct nbd_read **readp)
{
    if (connection->fill_left)
        return fill_read(connection, lock, readp);
    int64_t needed = message_length(connection);
    if (needed < 0)
        return garbled(connection, lock, "what came is no reply that the protocol knows");
    if (buffered_length(connection) < needed)
        return fill_input(connection, lock, (uint32_t)needed);
    if (get32(buffered(connection)) == NBD_SIMPLE_REPLY_MAGIC)
        return simple_reply(connection, lock, readp);
    return chunk(connection, lock, readp);
}
