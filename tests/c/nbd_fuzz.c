/* nbd_fuzz: replies of an NBD server with mutations, through a connection and through a page channel, beside a plain
 * second parser over the same bytes: the same reads must be answered with the same bytes or errors, the same be left
 * owed, and the connection be lost at the same reply for the same reason, or live on.
 *
 * nbd_fuzz COUNT SEED. An input is a server's replies to some reads of which at least one is mutated; it arrives in
 * pieces, cut anywhere. Every read's bytes lie in memory of exactly their length, for the address sanitizer. stdout:
 * how much was done. Threads, timeouts and lost connections at any time are nbd_stress's.
 */
#define _GNU_SOURCE
#include "fuzz.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sys/socket.h>

#include "nbd_connection.h"
#include "page_channel_nbd.h"

enum {
    READS_MAX = 24,        /* under way at once */
    READ_BYTES_MAX = 3000, /* mostly far fewer; more than the receiver reads ahead of a reply now and then */
    STREAM_MAX = 160000,
    MESSAGES_MAX = 512,
    PIECES_MAX = 24, /* of one reply; more than NBD_REPLY_SPANS_MAX */
    ZONE = 65536,    /* of a request to the channel: no two share one */
    CHANNEL_LENGTH_MAX = 2048,
    JOB_READS_MAX = 4,
    ROUNDS_PER_CHANNEL = 200,
    CHANNEL_TIMEOUT_MS = 1000000, /* the clock plays no part here */
};
enum { REQUEST_MAGIC = 0x25609513, SIMPLE_MAGIC = 0x67446698, CHUNK_MAGIC = 0x668e33ef };
enum { NONE = 0, DATA = 1, HOLE = 2, ERROR = (1 << 15) + 1, ERROR_OFFSET = (1 << 15) + 2 };
enum { OPEN, ANSWERED, REFUSED };
/* When a server is left that refuses a read: never; when it says that it closes; always, since others have the same. */
enum { LEAVE_NEVER, LEAVE_CLOSING, LEAVE_REFUSING };

/* A read as the server knows it, and what the second parser makes of its reply. */
struct server_read {
    uint64_t cookie;
    uint64_t offset;
    uint32_t length;
    int state;
    int error;   /* also of a reply that has not ended */
    int is_over; /* it was told to whoever asked */
    uint8_t expected[READ_BYTES_MAX];
    uint8_t is_there[READ_BYTES_MAX];
};

struct message {
    uint32_t start;
    uint32_t head; /* bytes that are no data */
    uint32_t length;
};

struct second_parser {
    uint64_t at;
    int structured;
    int error; /* positive: lost, and why */
    int leaving;
};

static struct server_read reads[READS_MAX];
static uint32_t n_reads;
static uint8_t stream[STREAM_MAX];
static uint32_t stream_length;
static struct message messages[MESSAGES_MAX];
static uint32_t n_messages;
static uint64_t n_answered, n_refused, n_lost;

/* ---- the second parser ---- */

static uint64_t get(const uint8_t *at, int size)
{
    uint64_t value = 0;

    for (int i = 0; i < size; i++)
        value = value << 8 | at[i];
    return value;
}

static int known_error(uint32_t error)
{
    static const int known[] = {1, 5, 12, 22, 28, 75, 95, 108};

    for (size_t i = 0; i < sizeof(known) / sizeof(*known); i++)
        if ((uint32_t)known[i] == error)
            return known[i];
    return EINVAL;
}

static struct server_read *second_find(uint64_t cookie)
{
    for (uint32_t i = 0; i < n_reads; i++)
        if (reads[i].state == OPEN && reads[i].cookie == cookie)
            return &reads[i];
    return NULL;
}

static uint32_t count_runs(const struct server_read *read)
{
    uint32_t n = 0;

    for (uint32_t i = 0; i < read->length; i++)
        n += read->is_there[i] && (i == 0 || !read->is_there[i - 1]);
    return n;
}

/* 0, or EPROTO: outside the read, there already, or one piece too many at once. */
static int second_place(struct server_read *read, uint64_t start, uint64_t length, const uint8_t *bytes)
{
    if (length == 0 || start > read->length || length > read->length - start)
        return EPROTO;
    for (uint64_t i = start; i < start + length; i++) {
        if (read->is_there[i])
            return EPROTO;
        read->is_there[i] = 1;
        read->expected[i] = bytes ? bytes[i - start] : 0;
    }
    return count_runs(read) > NBD_REPLY_SPANS_MAX ? EPROTO : 0;
}

static int second_end(struct second_parser *p, struct server_read *read)
{
    for (uint32_t i = 0; i < read->length && !read->error; i++)
        if (!read->is_there[i])
            return EPROTO;
    read->state = read->error ? REFUSED : ANSWERED;
    int leaves = p->leaving == LEAVE_REFUSING || (p->leaving == LEAVE_CLOSING && read->error == ESHUTDOWN);
    return leaves ? read->error : 0;
}

enum { SECOND_NEEDS_MORE = -1 };

/* A positive error, 0: goes on, or SECOND_NEEDS_MORE. */
static int second_simple(struct second_parser *p, const uint8_t *at, uint64_t have)
{
    struct server_read *read = second_find(get(at + 8, 8));

    if (!read)
        return EPROTO;
    if (get(at + 4, 4)) {
        read->error = known_error((uint32_t)get(at + 4, 4));
        p->at += 16;
        return second_end(p, read);
    }
    if (p->structured)
        return EPROTO;
    if (have < 16 + (uint64_t)read->length)
        return SECOND_NEEDS_MORE;
    p->at += 16 + read->length;
    int rc = second_place(read, 0, read->length, at + 16);
    return rc ? rc : second_end(p, read);
}

static int64_t second_head(uint32_t type, uint32_t length)
{
    switch (type) {
    case NONE:
        return length == 0 ? 0 : -1;
    case DATA:
        return length > 8 ? 8 : -1;
    case HOLE:
        return length == 12 ? 12 : -1;
    default:
        return type >= 0x8000 && length >= 6 && length <= 6 + 4096 + 8 ? (int64_t)length : -1;
    }
}

static int second_body(struct server_read *read, uint32_t type, uint32_t length, const uint8_t *body, uint64_t have)
{
    if (type == NONE)
        return 0;
    if (type == HOLE)
        return second_place(read, get(body, 8) - read->offset, get(body + 8, 4), NULL);
    if (type == DATA) {
        uint64_t start = get(body, 8) - read->offset, n = length - 8;
        if (have < length) { /* it is refused before its bytes have come, or waits for them */
            struct server_read tried = *read;
            int rc = start > read->length || n > read->length - start ? EPROTO : 0;
            return rc ? rc : (rc = second_place(&tried, start, n, NULL)) ? rc : SECOND_NEEDS_MORE;
        }
        return second_place(read, start, n, body + 8);
    }
    if (get(body, 4) == 0 || get(body + 4, 2) > length - 6)
        return EPROTO;
    read->error = known_error((uint32_t)get(body, 4));
    return 0;
}

static int second_chunk(struct second_parser *p, const uint8_t *at, uint64_t have)
{
    if (have < 20)
        return SECOND_NEEDS_MORE;
    uint32_t flags = (uint32_t)get(at + 4, 2), type = (uint32_t)get(at + 6, 2), length = (uint32_t)get(at + 16, 4);
    int64_t head = second_head(type, length);
    if (head < 0)
        return EPROTO;
    if (have < 20 + (uint64_t)head)
        return SECOND_NEEDS_MORE;
    struct server_read *read = second_find(get(at + 8, 8));
    if (!read || (type == NONE && !(flags & 1)))
        return EPROTO;
    int rc = second_body(read, type, length, at + 20, have - 20);
    if (rc)
        return rc;
    p->at += 20 + (uint64_t)length;
    return flags & 1 ? second_end(p, read) : 0;
}

static void second_parse(struct second_parser *p)
{
    int rc = 0;

    while (rc == 0) {
        const uint8_t *at = stream + p->at;
        uint64_t have = stream_length - p->at;

        if (have < 16)
            return;
        uint32_t magic = (uint32_t)get(at, 4);
        if (magic == SIMPLE_MAGIC)
            rc = second_simple(p, at, have);
        else
            rc = magic == CHUNK_MAGIC && p->structured ? second_chunk(p, at, have) : EPROTO;
    }
    p->error = rc > 0 ? rc : 0;
}

/* ---- replies ---- */

static void put(const void *bytes, uint64_t length)
{
    REQUIRE(stream_length + length <= STREAM_MAX);
    memcpy(stream + stream_length, bytes, length);
    stream_length += (uint32_t)length;
}

static void put_number(uint64_t value, int size)
{
    value = htobe64(value << (64 - 8 * size));
    put(&value, (uint64_t)size);
}

static void begin_message(void)
{
    REQUIRE(n_messages < MESSAGES_MAX);
    messages[n_messages].start = stream_length;
}

static void end_message(uint32_t n_data)
{
    struct message *message = &messages[n_messages++];

    message->length = stream_length - message->start;
    message->head = message->length - n_data;
}

static void put_data(uint64_t length)
{
    static uint8_t bytes[READ_BYTES_MAX];

    memset(bytes, (int)random_below(256), length);
    memcpy(bytes, &fuzz_random, length < 8 ? length : 8);
    put(bytes, length);
}

static uint32_t random_error(void)
{
    static const uint32_t errors[] = {1, 5, 12, 22, 28, 75, 95, 108, 2, 0xffffffff};

    return errors[random_below(sizeof(errors) / sizeof(*errors))];
}

static void put_simple(const struct server_read *read, uint32_t error)
{
    begin_message();
    put_number(SIMPLE_MAGIC, 4);
    put_number(error, 4);
    put_number(read->cookie, 8);
    if (!error)
        put_data(read->length);
    end_message(error ? 0 : read->length);
}

static void put_chunk_head(const struct server_read *read, int type, int is_last, uint64_t length)
{
    begin_message();
    put_number(CHUNK_MAGIC, 4);
    put_number(is_last ? 1 : 0, 2);
    put_number((uint64_t)type, 2);
    put_number(read->cookie, 8);
    put_number(length, 4);
}

static void put_error_chunk(const struct server_read *read, int is_last)
{
    int with_offset = one_in(2);
    uint64_t text = one_in(8) ? random_below(4096) : random_below(20);

    put_chunk_head(read, with_offset ? ERROR_OFFSET : ERROR, is_last, 6 + text + (with_offset ? 8 : 0));
    put_number(random_error(), 4);
    put_number(text, 2);
    while (text--)
        put_number('e', 1);
    if (with_offset)
        put_number(read->offset, 8);
    end_message(0);
}

static void put_piece(const struct server_read *read, uint32_t start, uint32_t end, int is_last)
{
    int is_hole = one_in(4);

    put_chunk_head(read, is_hole ? HOLE : DATA, is_last, is_hole ? 12 : 8 + (uint64_t)(end - start));
    put_number(read->offset + start, 8);
    if (is_hole)
        put_number(end - start, 4);
    else
        put_data(end - start);
    end_message(is_hole ? 0 : end - start);
}

/* [0, length) cut into at most PIECES_MAX pieces, told by where each ends. */
static uint32_t cut_up(uint32_t *ends, uint32_t length)
{
    uint32_t n = 0, at = 0, most = one_in(2) ? 1 : 1 + (uint32_t)random_below(PIECES_MAX);

    while (at < length && n + 1 < most) {
        at += 1 + (uint32_t)random_below(1 + 2 * length / most);
        ends[n++] = at < length ? at : length;
    }
    if (at < length)
        ends[n++] = length;
    return n;
}

static void put_structured(const struct server_read *read)
{
    uint32_t ends[PIECES_MAX + 1], order[PIECES_MAX + 1], n = cut_up(ends, read->length);
    int closes_apart = one_in(2);

    for (uint32_t i = 0; i < n; i++) { /* any order */
        uint32_t other = (uint32_t)random_below(i + 1);
        order[i] = order[other];
        order[other] = i;
    }
    for (uint32_t i = 0; i < n; i++) {
        uint32_t at = order[i];
        put_piece(read, at ? ends[at - 1] : 0, ends[at], !closes_apart && i == n - 1);
    }
    if (closes_apart && one_in(12)) {
        put_error_chunk(read, 1);
    } else if (closes_apart) {
        put_chunk_head(read, NONE, 1, 0);
        end_message(0);
    }
}

static void put_reply(const struct server_read *read, int structured)
{
    if (one_in(128)) /* not what was agreed on */
        structured = !structured;
    if (one_in(12) && !structured)
        put_simple(read, random_error());
    else if (!structured)
        put_simple(read, 0);
    else if (one_in(16))
        put_error_chunk(read, 1);
    else
        put_structured(read);
}

/* ---- mutations ---- */

static void cut_out(uint32_t start, uint32_t length)
{
    if (length > stream_length - start)
        length = stream_length - start;
    memmove(stream + start, stream + start + length, stream_length - start - length);
    stream_length -= length;
}

static void double_up(uint32_t start, uint32_t length)
{
    if (stream_length + length > STREAM_MAX)
        return;
    memmove(stream + start + length, stream + start, stream_length - start);
    stream_length += length;
}

/* A field of a header takes a value that another message has there, or that is close to its own, or an edge. */
static void change_field(const struct message *message)
{
    static const struct {
        uint32_t at;
        uint32_t size;
    } fields[] = {{4, 2}, {6, 2}, {4, 4}, {8, 8}, {8, 4}, {12, 4}, {16, 4}, {20, 8}, {28, 4}, {20, 4}, {24, 2}};
    uint64_t which = random_below(sizeof(fields) / sizeof(*fields)), value;
    const struct message *other = &messages[random_below(n_messages)];
    uint8_t *at = stream + message->start + fields[which].at;

    if (fields[which].at + fields[which].size > message->head)
        return;
    value = get(at, (int)fields[which].size);
    switch (random_below(4)) {
    case 0:
        value = random_edge();
        break;
    case 1:
        if (fields[which].at + fields[which].size <= other->head)
            value = get(stream + other->start + fields[which].at, (int)fields[which].size);
        break;
    default:
        value += random_below(5) - 2;
    }
    for (uint32_t i = fields[which].size; i > 0; i--, value >>= 8)
        at[i - 1] = (uint8_t)value;
}

/* Changes no message's place but by the last step, so that the table of messages holds until then. */
static void mutate(void)
{
    const struct message *message = &messages[random_below(n_messages)];

    for (uint64_t n = random_below(3); n > 0; n--)
        change_field(&messages[random_below(n_messages)]);
    switch (random_below(8)) {
    case 0:
        mutate_bytes(stream + message->start, message->head);
        break;
    case 1:
        cut_out(message->start + (uint32_t)random_below(message->head), 1 + (uint32_t)random_below(message->head / 2));
        break;
    case 2:
        cut_out(message->start, message->length);
        break;
    case 3:
        double_up(message->start, message->length);
        break;
    case 4:
        stream_length = message->start + (uint32_t)random_below(message->length);
        break;
    case 5:
        random_fill(stream + message->start, message->head);
        break;
    default:
        change_field(message);
    }
}

/* Replies to some of the reads; returns whether they are mutated. */
static int make_stream(int structured)
{
    stream_length = n_messages = 0;
    if (one_in(64)) {
        stream_length = 1 + (uint32_t)random_below(300);
        random_fill(stream, stream_length);
        return 1;
    }
    for (uint32_t i = 0, first = (uint32_t)random_below(n_reads); i < n_reads; i++) {
        const struct server_read *read = &reads[(first + i) % n_reads];
        if (read->state == OPEN && n_messages < MESSAGES_MAX - PIECES_MAX - 2 && (n_messages == 0 || one_in(2)))
            put_reply(read, structured);
    }
    if (n_messages == 0 || one_in(16))
        return 0;
    mutate();
    return 1;
}

/* ---- the server's end ---- */

/* The requests that have come become reads. Returns how many. */
static uint32_t take_requests(int fd)
{
    uint8_t request[28];
    uint32_t n = 0;

    while (recv(fd, request, sizeof(request), MSG_DONTWAIT) == (ssize_t)sizeof(request)) {
        if (get(request + 6, 2) == 2) /* a farewell */
            continue;
        REQUIRE(get(request, 4) == REQUEST_MAGIC && get(request + 4, 4) == 0 && n_reads < READS_MAX);
        struct server_read *read = &reads[n_reads++];
        memset(read, 0, sizeof(*read));
        read->cookie = get(request + 8, 8);
        read->offset = get(request + 16, 8);
        read->length = (uint32_t)get(request + 24, 4);
        REQUIRE(read->length && read->length <= READ_BYTES_MAX);
        n++;
    }
    return n;
}

static void forget_read(uint32_t i)
{
    reads[i] = reads[--n_reads];
}

/* Sends in pieces, step is called after each. Stops where nobody listens any more. */
static void send_stream(int fd, int (*step)(void *argument), void *argument)
{
    uint32_t at = 0;

    while (at < stream_length) {
        uint32_t left = stream_length - at, most = 1 + (uint32_t)random_below(one_in(2) ? 40 : left);
        ssize_t n = send(fd, stream + at, most > left || one_in(3) ? left : most, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n > 0)
            at += (uint32_t)n;
        else if (errno != EAGAIN)
            return;
        if (step(argument))
            return;
    }
}

/* ---- one connection, without a channel ---- */

struct client_read {
    struct nbd_read read;
    int is_over;
};

struct client {
    pthread_mutex_t lock;
    struct nbd_connection *connection;
    int structured;
    int server;
    int error;
    struct client_read *reads[READS_MAX]; /* beside the server's */
};

static void client_connect(struct client *client)
{
    int ends[2];

    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    client->server = ends[1];
    client->structured = !one_in(3);
    client->error = 0;
    REQUIRE(nbd_connection_new(&client->connection, ends[0], (uint32_t)random_below(2), client->structured) == 0);
}

static void free_client_read(struct client_read *one)
{
    free(one->read.bytes);
    free(one);
}

static void client_ask(struct client *client)
{
    uint32_t wanted = 1 + (uint32_t)random_below(8);

    pthread_mutex_lock(&client->lock);
    for (uint32_t i = n_reads; i < READS_MAX && wanted && nbd_connection_has_room(client->connection); i++, wanted--) {
        struct client_read *one = calloc(1, sizeof(*one));
        REQUIRE(one);
        one->read.length = 1 + (uint32_t)random_below(one_in(8) ? READ_BYTES_MAX : 64);
        one->read.offset = one_in(8) ? random_edge() >> 1 : random_below(1 << 20);
        one->read.bytes = malloc(one->read.length);
        REQUIRE(one->read.bytes);
        client->reads[i] = one;
        nbd_connection_ask(client->connection, &one->read, 1);
    }
    nbd_connection_send(client->connection, &client->lock);
    pthread_mutex_unlock(&client->lock);
    (void)take_requests(client->server);
}

/* Whether it is lost. */
static int client_step(void *argument)
{
    struct client *client = argument;
    int rc;

    do {
        struct nbd_read *read = NULL;
        rc = nbd_connection_receive(client->connection, &client->lock, &read);
        REQUIRE((rc == NBD_RECEIVED_READ) == (read != NULL));
        if (read) {
            struct client_read *one = (struct client_read *)read;
            REQUIRE(!one->is_over);
            one->is_over = 1;
        }
    } while (rc > 0);
    client->error = -rc;
    return rc < 0;
}

static void compare_client(struct client *client)
{
    for (uint32_t i = 0; i < n_reads; i++) {
        const struct client_read *one = client->reads[i];

        REQUIRE(one->is_over == (reads[i].state != OPEN));
        if (!one->is_over)
            continue;
        REQUIRE(one->read.error == reads[i].error);
        if (one->read.error)
            n_refused++;
        else
            n_answered++;
        REQUIRE(one->read.error || memcmp(one->read.bytes, reads[i].expected, reads[i].length) == 0);
    }
}

static void client_forget(struct client *client, int all)
{
    for (uint32_t i = n_reads; i-- > 0;) {
        if (!all && !client->reads[i]->is_over)
            continue;
        free_client_read(client->reads[i]);
        client->reads[i] = client->reads[n_reads - 1];
        forget_read(i);
    }
}

static void client_disconnect(struct client *client)
{
    uint32_t owed = 0, open = 0;

    for (struct nbd_read *read = nbd_connection_take_all(client->connection); read; read = read->next)
        owed++;
    for (uint32_t i = 0; i < n_reads; i++)
        open += reads[i].state == OPEN;
    REQUIRE(owed == open && client->connection->n_in_flight == 0);
    nbd_connection_free(client->connection);
    client->connection = NULL;
    close(client->server);
    client_forget(client, 1);
}

static void run_connection(struct client *client)
{
    struct second_parser p = {.leaving = LEAVE_NEVER};

    if (!client->connection)
        client_connect(client);
    client_ask(client);
    fuzz_inputs += (uint64_t)make_stream(client->structured);
    p.structured = client->structured;
    second_parse(&p);
    send_stream(client->server, client_step, client);
    int ends = p.error || p.at < stream_length || one_in(16);
    if (ends) {
        (void)shutdown(client->server, SHUT_WR);
        REQUIRE(client->error || client_step(client)); /* once lost it is not asked again */
        n_lost++;
    }
    REQUIRE(client->error == (p.error ? p.error : ends ? ECONNRESET : 0));
    REQUIRE(!client->error || client->connection->text[0]);
    compare_client(client);
    if (ends)
        client_disconnect(client);
    else
        client_forget(client, 0);
}

/* ---- a page channel over its demand connection ---- */

struct asked {
    struct page_request request;
    int n_done;
    int result;
};

struct channel {
    struct page_channel *channel;
    struct nbd_settings settings;
    struct asked asked[READS_MAX / JOB_READS_MAX];
    uint32_t n_asked;
    int structured;
    int server;
    uint32_t number;
};

static uint8_t content_at(uint64_t offset)
{
    return (uint8_t)(offset * 2654435761u >> 13);
}

static void channel_begin(struct channel *c)
{
    c->settings = (struct nbd_settings){
        .size = (uint64_t)ZONE * (READS_MAX / JOB_READS_MAX),
        .alignment = (uint32_t)1 << random_below(10),
        .length_max = one_in(2) ? CHANNEL_LENGTH_MAX : 700,
        .reply_timeout_ms = CHANNEL_TIMEOUT_MS,
        .server_count = 1 + (uint32_t)random_below(2),
    };
    REQUIRE(page_channel_nbd_new(&c->channel, &c->settings) == 0);
}

static void channel_end(struct channel *c)
{
    page_channel_nbd_end(c->channel);
    page_channel_free(c->channel);
    page_channel_nbd_release(c->channel);
}

static void channel_connect(struct channel *c)
{
    int ends[2];

    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    c->server = ends[1];
    c->structured = !one_in(3);
    REQUIRE(page_channel_nbd_connect(c->channel, ends[0], NBD_DEMAND, c->structured, &c->number) == 0);
}

static void request_done(struct page_request *request, int result)
{
    struct asked *asked = request->owner;

    asked->n_done++;
    asked->result = result;
}

static void channel_ask(struct channel *c)
{
    uint64_t most = (JOB_READS_MAX - 1) * (c->settings.length_max & ~(c->settings.alignment - 1)) / 2;

    c->n_asked = 1 + (uint32_t)random_below(READS_MAX / JOB_READS_MAX);
    for (uint32_t i = 0; i < c->n_asked; i++) {
        struct asked *asked = &c->asked[i];
        struct page_request *request = &asked->request;

        *asked = (struct asked){0};
        request->offset = (uint64_t)i * ZONE + 1024 + random_below(2048);
        request->length = 1 + random_below(one_in(4) ? most : 100);
        request->bytes = malloc(request->length);
        REQUIRE(request->bytes);
        request->is_demand = 1;
        request->done = request_done;
        request->owner = asked;
        page_channel_submit(c->channel, request);
    }
}

/* Never ends the sending: the connection is lost where the channel says so. */
static int channel_step(void *argument)
{
    struct channel *c = argument;
    struct pollfd polled = {.fd = page_channel_poll_fd(c->channel), .events = POLLIN};

    while (poll(&polled, 1, 0) == 1)
        page_channel_dispatch(c->channel);
    return 0;
}

static void expect_lost(struct channel *c, const struct second_parser *p)
{
    struct nbd_event event;
    uint32_t owed = 0;

    for (uint32_t i = 0; i < n_reads; i++)
        owed += reads[i].state == OPEN;
    REQUIRE(page_channel_nbd_next_event(c->channel, &event) == 1);
    REQUIRE(event.connection == c->number && event.text[0] && memchr(event.text, '\0', sizeof(event.text)));
    REQUIRE(event.error == (p->error ? p->error : ECONNRESET) && event.n_owed == owed);
    REQUIRE(page_channel_nbd_next_event(c->channel, &event) == 0);
    close(c->server);
    n_lost++;
}

/* A read that was refused is over, unless it is left for another server. */
static void settle_reads(const struct channel *c)
{
    for (uint32_t i = 0; i < n_reads; i++)
        reads[i].is_over = reads[i].state == ANSWERED ||
                           (reads[i].state == REFUSED && c->settings.server_count == 1 && reads[i].error != ESHUTDOWN);
}

/* What the requesters must have got in the end; unasked reads hold the right content. */
static void compare_channel(struct channel *c, const struct server_read *before, uint32_t n_before)
{
    for (uint32_t i = 0; i < c->n_asked; i++) {
        const struct page_request *request = &c->asked[i].request;
        int error = 0, allowed = c->asked[i].result == 0;

        REQUIRE(c->asked[i].n_done == 1);
        for (uint32_t r = 0; r < n_before; r++) {
            const struct server_read *read = &before[r];
            if (read->offset / ZONE != i || !read->is_over || read->state != REFUSED)
                continue;
            error = read->error;
            allowed |= c->asked[i].result == -error;
        }
        REQUIRE(allowed && (c->asked[i].result == 0) == (error == 0));
        n_answered += !error;
        n_refused += error != 0;
        for (uint64_t at = 0; at < request->length && !error; at++) {
            uint8_t expected = content_at(request->offset + at);
            for (uint32_t r = 0; r < n_before; r++)
                if (before[r].is_over && request->offset + at >= before[r].offset &&
                    request->offset + at < before[r].offset + before[r].length)
                    expected = before[r].expected[request->offset + at - before[r].offset];
            REQUIRE(request->bytes[at] == expected);
        }
        free(request->bytes);
    }
}

/* Answers everything rightly, so that every request ends. */
static void serve_rightly(struct channel *c)
{
    n_reads = 0;
    channel_connect(c);
    (void)take_requests(c->server);
    for (uint32_t i = 0; i < n_reads; i++) {
        uint64_t cookie = htobe64(reads[i].cookie), offset = htobe64(reads[i].offset);

        stream_length = 0;
        put_number(c->structured ? CHUNK_MAGIC : SIMPLE_MAGIC, 4);
        put_number(c->structured ? 1 << 16 | DATA : 0, 4);
        put(&cookie, sizeof(cookie));
        if (c->structured) {
            put_number(8 + (uint64_t)reads[i].length, 4);
            put(&offset, sizeof(offset));
        }
        for (uint32_t at = 0; at < reads[i].length; at++)
            put_number(content_at(reads[i].offset + at), 1);
        send_stream(c->server, channel_step, c);
    }
}

static void run_channel(struct channel *c)
{
    static struct server_read before[READS_MAX];
    struct second_parser p = {.leaving = c->settings.server_count > 1 ? LEAVE_REFUSING : LEAVE_CLOSING};
    struct nbd_event event;

    n_reads = 0;
    channel_connect(c);
    channel_ask(c);
    (void)take_requests(c->server);
    fuzz_inputs += (uint64_t)make_stream(c->structured);
    p.structured = c->structured;
    second_parse(&p);
    settle_reads(c);
    send_stream(c->server, channel_step, c);
    if (!p.error)
        (void)shutdown(c->server, SHUT_WR);
    (void)channel_step(c);
    expect_lost(c, &p);
    memcpy(before, reads, sizeof(reads));
    uint32_t n_before = n_reads;
    serve_rightly(c);
    compare_channel(c, before, n_before);
    (void)shutdown(c->server, SHUT_RDWR); /* at once; a close may wait for somebody who looks at /proc */
    (void)channel_step(c);
    close(c->server);
    REQUIRE(page_channel_nbd_next_event(c->channel, &event) == 1 && event.n_owed == 0);
    n_reads = 0;
}

int main(int argc, char **argv)
{
    struct client client = {.lock = PTHREAD_MUTEX_INITIALIZER};
    struct channel channel = {0};

    fuzz_arguments(argc, argv);
    fuzz_begin();
    do {
        for (int i = 0; i < ROUNDS_PER_CHANNEL; i++)
            run_connection(&client);
        if (client.connection)
            client_disconnect(&client);
        channel_begin(&channel);
        for (int i = 0; i < ROUNDS_PER_CHANNEL; i++)
            run_channel(&channel);
        channel_end(&channel);
    } while (fuzz_more());
    printf("%" PRIu64 " mutated answers: %" PRIu64 " reads answered, %" PRIu64 " refused, %" PRIu64
           " connections lost\n",
           fuzz_inputs, n_answered, n_refused, n_lost);
    return 0;
}
