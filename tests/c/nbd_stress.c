/* nbd_stress: an NBD page channel with everything at once: threads that ask, threads that dispatch, servers that answer
 * in any order, piecemeal, wrongly or not at all, and a supplier who connects, disconnects, gives up and ends.
 *
 * nbd_stress SEED ROUNDS: exit status 0 if every request ended exactly once and every byte that was handed on is right,
 * 1 if not (stderr says where). stdout: how much was done. Never sends wrong bytes in a reply that is whole.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#include "page_channel_nbd.h"

enum {
    SUBMITTERS = 3,
    DISPATCHERS = 2,
    IN_FLIGHT = 40, /* of a submitter: together more than a connection takes */
    REQUEST_BYTES_MAX = 150000,
    GRANULE = 4096, /* of zeros in the content */
    PEERS_MAX = 4000,
    PENDING_MAX = 24, /* requests that a server keeps before it answers one */
    PIECES_MAX = 12,
    ROUND_MS = 150,
    PATIENT_TIMEOUT_MS = 400000, /* its look at the clock comes too late to hide that a wake-up was lost */
    SHORT_TIMEOUT_MS = 120,
    SETTLE_S = 30,
    TINY_BUFFER = 1,
};
enum { ENDING_CALM, ENDING_END, ENDING_FREE, ENDING_RELEASE, ENDINGS };
enum { MAGIC_REQUEST = 0x25609513, MAGIC_SIMPLE = 0x67446698, MAGIC_CHUNK = 0x668e33ef };
enum { CHUNK_NONE = 0, CHUNK_DATA = 1, CHUNK_HOLE = 2, CHUNK_ERROR = (1 << 15) + 1 };

#define CHECK(condition) ((condition) ? (void)0 : fail(#condition, __LINE__))

struct wire_request {
    uint32_t magic;
    uint16_t flags;
    uint16_t command;
    uint64_t cookie;
    uint64_t offset;
    uint32_t length;
} __attribute__((packed));

struct wire_chunk {
    uint32_t magic;
    uint16_t flags;
    uint16_t type;
    uint64_t cookie;
    uint32_t length;
} __attribute__((packed));

struct peer {
    pthread_t thread;
    struct round *round;
    uint64_t random;
    int fd;
    int structured;
    int honest;
    struct wire_request pending[PENDING_MAX];
    uint32_t n_pending;
};

struct submitter {
    pthread_t thread;
    struct round *round;
    uint64_t random;
    sem_t room;
    uint64_t n_submitted;
    uint64_t n_done;
};

struct round {
    struct nbd_settings settings;
    struct page_channel *channel;
    uint64_t random;
    uint8_t *content;
    int ending;
    int is_hostile;
    int stop_fd; /* readable: dispatchers end */
    int calm, stop_submitting, stop_supplying, ended, gave_up;
    struct submitter submitters[SUBMITTERS];
    pthread_t dispatchers[DISPATCHERS];
    pthread_t supplier;
    struct peer *peers[PEERS_MAX];
    uint32_t n_peers;
};

static uint64_t run_seed;
static uint64_t n_right, n_failed, n_lost;

static void fail(const char *what, int line)
{
    fprintf(stderr, "nbd_stress.c:%d: %s (seed %llu)\n", line, what, (unsigned long long)run_seed);
    _exit(1);
}

static uint64_t draw(uint64_t *random, uint64_t below)
{
    *random ^= *random << 13;
    *random ^= *random >> 7;
    *random ^= *random << 17;
    return *random % below;
}

static int get_flag(const int *flag)
{
    return __atomic_load_n(flag, __ATOMIC_ACQUIRE);
}

static void set_flag(int *flag)
{
    __atomic_store_n(flag, 1, __ATOMIC_RELEASE);
}

static void pause_ms(int ms)
{
    (void)poll(NULL, 0, ms);
}

/* ---- a server ---- */

static int put(struct peer *peer, const void *bytes, size_t length)
{
    const uint8_t *at = bytes;

    while (length) {
        size_t most = draw(&peer->random, 4) ? length : 1 + draw(&peer->random, length);
        ssize_t n = send(peer->fd, at, most, MSG_NOSIGNAL);

        if (n <= 0)
            return -1;
        at += n;
        length -= (size_t)n;
    }
    return 0;
}

static int put_chunk(struct peer *peer, uint64_t cookie, int done, int type, const void *head, size_t head_length,
                     const void *data, size_t length)
{
    struct wire_chunk chunk = {htobe32(MAGIC_CHUNK), htobe16(done ? 1 : 0), htobe16((uint16_t)type), htobe64(cookie),
                               htobe32((uint32_t)(head_length + length))};

    if (put(peer, &chunk, sizeof(chunk)) < 0 || put(peer, head, head_length) < 0)
        return -1;
    return length ? put(peer, data, length) : 0;
}

static int put_simple(struct peer *peer, uint64_t cookie, uint32_t error, const void *data, size_t length)
{
    struct __attribute__((packed)) {
        uint32_t magic, error;
        uint64_t cookie;
    } reply = {htobe32(MAGIC_SIMPLE), htobe32(error), htobe64(cookie)};

    return put(peer, &reply, sizeof(reply)) < 0 ? -1 : length ? put(peer, data, length) : 0;
}

static int put_error(struct peer *peer, uint64_t cookie, uint32_t error)
{
    uint8_t head[6] = {0, 0, 0, (uint8_t)error, 0, 3};

    if (!peer->structured)
        return put_simple(peer, cookie, error, NULL, 0);
    return put_chunk(peer, cookie, 1, CHUNK_ERROR, head, sizeof(head), "no!", 3);
}

static int is_zeros(const uint8_t *bytes, uint64_t length)
{
    return bytes[0] == 0 && memcmp(bytes, bytes + 1, length - 1) == 0;
}

static int put_piece(struct peer *peer, const struct wire_request *request, uint64_t start, uint64_t end, int done)
{
    const uint8_t *bytes = peer->round->content + request->offset + start;
    struct __attribute__((packed)) {
        uint64_t offset;
        uint32_t length;
    } head = {htobe64(request->offset + start), htobe32((uint32_t)(end - start))};

    if (is_zeros(bytes, end - start) && draw(&peer->random, 4))
        return put_chunk(peer, request->cookie, done, CHUNK_HOLE, &head, sizeof(head), NULL, 0);
    return put_chunk(peer, request->cookie, done, CHUNK_DATA, &head, sizeof(head.offset), bytes, end - start);
}

static int compare_numbers(const void *a, const void *b)
{
    uint64_t left = *(const uint64_t *)a, right = *(const uint64_t *)b;

    return left < right ? -1 : left > right;
}

/* The whole reply in pieces, in any order. skip: a piece that is left out, or none. */
static int put_pieces(struct peer *peer, const struct wire_request *request, uint64_t skip)
{
    uint64_t cuts[PIECES_MAX + 1] = {0}, order[PIECES_MAX], count = 1 + draw(&peer->random, PIECES_MAX);

    for (uint64_t i = 1; i < count; i++)
        cuts[i] = draw(&peer->random, request->length);
    cuts[count] = request->length;
    qsort(cuts, count, sizeof(cuts[0]), compare_numbers);
    for (uint64_t i = 0; i < count; i++) {
        uint64_t other = draw(&peer->random, i + 1);

        order[i] = order[other];
        order[other] = i;
    }
    for (uint64_t i = 0; i < count; i++) {
        uint64_t start = cuts[order[i]], end = cuts[order[i] + 1];

        if (start < end && order[i] != skip && put_piece(peer, request, start, end, 0) < 0)
            return -1;
    }
    return put_chunk(peer, request->cookie, 1, CHUNK_NONE, NULL, 0, NULL, 0);
}

static int put_right_answer(struct peer *peer, const struct wire_request *request)
{
    if (!peer->structured)
        return put_simple(peer, request->cookie, 0, peer->round->content + request->offset, request->length);
    if (draw(&peer->random, 2))
        return put_piece(peer, request, 0, request->length, 1);
    return put_pieces(peer, request, PIECES_MAX);
}

/* Ends with the connection, whatever it is. */
static int put_garbage(struct peer *peer, const struct wire_request *request)
{
    static const uint16_t types[] = {CHUNK_NONE, CHUNK_DATA, CHUNK_HOLE, CHUNK_ERROR, 5};
    static const uint32_t lengths[] = {0, 1, 8, 9, 12, 4000, UINT32_MAX};
    struct wire_chunk chunk = {htobe32(MAGIC_CHUNK), 0, 0, htobe64(request->cookie), 0};
    uint8_t noise[4096];

    for (size_t i = 0; i < sizeof(noise); i++)
        noise[i] = (uint8_t)draw(&peer->random, 256);
    switch (draw(&peer->random, 8)) {
    case 0:
        return put(peer, noise, 1 + draw(&peer->random, sizeof(noise)));
    case 1: /* any fields, a magic that is right */
        memcpy(&chunk.flags, noise, sizeof(chunk) - sizeof(chunk.magic));
        return put(peer, &chunk, sizeof(chunk)) < 0 ? -1 : put(peer, noise, sizeof(noise));
    case 2: /* fields that may do */
        chunk.type = htobe16(types[noise[0] % 5]);
        chunk.length = htobe32(lengths[noise[1] % 7]);
        return put(peer, &chunk, sizeof(chunk)) < 0 ? -1 : put(peer, noise, sizeof(noise));
    case 3: /* answered twice */
        return put_right_answer(peer, request) < 0 ? -1 : put_right_answer(peer, request);
    case 4: /* a part is missing */
        return peer->structured ? put_pieces(peer, request, 0)
                                : put_simple(peer, request->cookie ^ 1ull << 40, 0, noise, 16);
    case 5: /* the wrong bytes, but not all that were asked for */
        if (request->length < 2)
            return -1;
        uint64_t offset = htobe64(request->offset);
        size_t length = request->length / 2 < sizeof(noise) ? request->length / 2 : sizeof(noise);
        return put_chunk(peer, request->cookie, 0, CHUNK_DATA, &offset, sizeof(offset), noise, length) < 0 ? -1 : -1;
    case 6: /* half of a reply that is right */
        return put_simple(peer, request->cookie, 0, peer->round->content + request->offset, request->length / 2);
    default:
        return put_simple(peer, htobe64(request->cookie), 0, noise, 64);
    }
}

static int answer_one(struct peer *peer)
{
    uint32_t at = (uint32_t)draw(&peer->random, peer->n_pending);
    struct wire_request request = peer->pending[at];

    peer->pending[at] = peer->pending[--peer->n_pending];
    if (peer->honest || get_flag(&peer->round->calm))
        return put_right_answer(peer, &request);
    switch (draw(&peer->random, 400)) {
    case 0:
        return -1;
    case 1:
        (void)put_garbage(peer, &request);
        return -1;
    case 2:
    case 3:
        return put_error(peer, request.cookie, EIO);
    case 4:
        return put_error(peer, request.cookie, ESHUTDOWN);
    case 5: /* never answered */
        return peer->round->settings.reply_timeout_ms == SHORT_TIMEOUT_MS ? 0 : put_right_answer(peer, &request);
    default:
        return put_right_answer(peer, &request);
    }
}

static int take_request(struct peer *peer)
{
    const struct nbd_settings *settings = &peer->round->settings;
    struct wire_request *request = &peer->pending[peer->n_pending];

    if (recv(peer->fd, request, sizeof(*request), MSG_WAITALL) != sizeof(*request))
        return -1;
    request->cookie = be64toh(request->cookie);
    request->offset = be64toh(request->offset);
    request->length = be32toh(request->length);
    CHECK(be32toh(request->magic) == MAGIC_REQUEST && request->flags == 0);
    if (be16toh(request->command) == 2)
        return -1;
    CHECK(request->command == 0);
    CHECK(request->length > 0 && request->length <= settings->length_max);
    CHECK(request->offset % settings->alignment == 0 && request->offset < settings->size);
    CHECK(request->length <= settings->size - request->offset);
    CHECK(request->length % settings->alignment == 0 || request->offset + request->length == settings->size);
    peer->n_pending++;
    return 0;
}

static void *peer_run(void *argument)
{
    struct peer *peer = argument;

    for (;;) {
        struct pollfd readable = {.fd = peer->fd, .events = POLLIN};
        int wants = peer->n_pending == 0 || (peer->n_pending < PENDING_MAX && draw(&peer->random, 3));

        if (wants && (peer->n_pending == 0 || poll(&readable, 1, 0) == 1)) {
            if (take_request(peer) < 0)
                break;
        } else if (answer_one(peer) < 0) {
            break;
        }
    }
    (void)shutdown(peer->fd, SHUT_RDWR); /* the fd lives to the round's end, so that fds can be counted */
    return NULL;
}

/* ---- who asks ---- */

static void request_done(struct page_request *request, int result)
{
    struct submitter *s = request->owner;
    struct round *r = s->round;

    if (result == 0)
        CHECK(memcmp(request->bytes, r->content + request->offset, request->length) == 0);
    else if (result == -ECANCELED)
        CHECK(get_flag(&r->ended));
    else if (result == -ETIMEDOUT)
        CHECK(get_flag(&r->gave_up));
    else
        CHECK(result == -EIO && r->is_hostile);
    free(request->bytes);
    free(request);
    __atomic_add_fetch(result == 0 ? &n_right : &n_failed, 1, __ATOMIC_RELAXED);
    __atomic_add_fetch(&s->n_done, 1, __ATOMIC_ACQ_REL);
    sem_post(&s->room);
}

static void submit_one(struct submitter *s)
{
    struct round *r = s->round;
    struct page_request *request = calloc(1, sizeof(*request));
    uint64_t left, most = draw(&s->random, 4) ? GRANULE : REQUEST_BYTES_MAX;

    CHECK(request);
    request->is_demand = most == GRANULE;
    request->offset = draw(&s->random, r->settings.size);
    if (draw(&s->random, 2))
        request->offset -= request->offset % GRANULE;
    left = r->settings.size - request->offset;
    request->length = draw(&s->random, 2) ? most : 1 + draw(&s->random, most);
    if (request->length > left)
        request->length = left;
    request->bytes = malloc(request->length);
    CHECK(request->bytes);
    memset(request->bytes, 0xaa, request->length);
    request->owner = s;
    request->done = request_done;
    s->n_submitted++;
    page_channel_submit(r->channel, request);
}

static void *submitter_run(void *argument)
{
    struct submitter *s = argument;

    for (;;) {
        while (sem_wait(&s->room) < 0)
            ;
        if (get_flag(&s->round->stop_submitting))
            return NULL;
        submit_one(s);
    }
}

static void *dispatcher_run(void *argument)
{
    struct round *r = argument;
    struct pollfd fds[2] = {{.fd = page_channel_poll_fd(r->channel), .events = POLLIN},
                            {.fd = r->stop_fd, .events = POLLIN}};

    while (poll(fds, 2, -1) >= 0 && !fds[1].revents)
        if (fds[0].revents)
            page_channel_dispatch(r->channel);
    return NULL;
}

/* ---- who supplies ---- */

/* The client's end of a new server's connection. */
static int new_peer(struct round *r, int structured)
{
    struct peer *peer = calloc(1, sizeof(*peer));
    int ends[2], tiny = TINY_BUFFER;

    CHECK(peer && socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    if (draw(&r->random, 3) == 0)
        CHECK(setsockopt(ends[0], SOL_SOCKET, SO_SNDBUF, &tiny, sizeof(tiny)) == 0);
    if (draw(&r->random, 3) == 0)
        CHECK(setsockopt(ends[1], SOL_SOCKET, SO_SNDBUF, &tiny, sizeof(tiny)) == 0);
    peer->round = r;
    peer->random = r->random | 1;
    peer->fd = ends[1];
    peer->structured = structured;
    peer->honest = !r->is_hostile;
    CHECK(pthread_create(&peer->thread, NULL, peer_run, peer) == 0);
    r->peers[r->n_peers++] = peer;
    return ends[0];
}

static void connect_one(struct round *r, uint32_t kind, uint32_t *numberp)
{
    int structured = draw(&r->random, 3) > 0;

    if (r->n_peers == PEERS_MAX)
        return;
    int rc = page_channel_nbd_connect(r->channel, new_peer(r, structured), kind, structured, numberp);
    if (rc == -ESHUTDOWN)
        CHECK(get_flag(&r->ended));
    else
        CHECK(rc == 0 || rc == -EEXIST); /* the former is still being read from */
}

static void hear(struct round *r, uint32_t *numbers)
{
    struct nbd_event event;

    while (page_channel_nbd_next_event(r->channel, &event)) {
        n_lost++;
        CHECK(event.error > 0 && event.text[0] && event.connection > 0);
        for (uint32_t kind = 0; kind < 2; kind++)
            if (numbers[kind] == event.connection)
                numbers[kind] = 0;
    }
}

static void disturb(struct round *r)
{
    switch (draw(&r->random, 60)) {
    case 0:
        page_channel_nbd_disconnect(r->channel, ECONNABORTED, "the supplier wants it so");
        break;
    case 1:
        set_flag(&r->gave_up);
        page_channel_nbd_disconnect(r->channel, ECONNABORTED, "the supplier gives up");
        page_channel_nbd_give_up(r->channel, ETIMEDOUT);
        break;
    case 2:
        page_channel_nbd_give_up(r->channel, 0);
        break;
    default:
        break;
    }
}

static void *supplier_run(void *argument)
{
    struct round *r = argument;
    struct pollfd fd = {.fd = page_channel_nbd_event_fd(r->channel), .events = POLLIN};
    uint32_t numbers[2] = {0, 0};

    while (!get_flag(&r->stop_supplying)) {
        int calm = get_flag(&r->calm);

        hear(r, numbers);
        for (uint32_t kind = 0; kind < 2; kind++)
            if (!numbers[kind] && (calm || draw(&r->random, 2)))
                connect_one(r, kind, &numbers[kind]);
        if (!calm && r->is_hostile)
            disturb(r);
        (void)poll(&fd, 1, (int)draw(&r->random, 4));
    }
    return NULL;
}

/* ---- a round ---- */

static void draw_settings(struct round *r)
{
    static const uint32_t alignments[] = {1, 512, 4096, 65536}, lengths[] = {0, 1, 4096, 100000, 32 << 20};
    uint32_t alignment = alignments[draw(&r->random, 4)];

    r->settings = (struct nbd_settings){
        .size = (256 << 10) + draw(&r->random, 1 << 20),
        .alignment = alignment,
        .length_max = alignment + lengths[draw(&r->random, 5)],
        .reply_timeout_ms = draw(&r->random, 3) ? PATIENT_TIMEOUT_MS : SHORT_TIMEOUT_MS,
        .server_count = 1 + (uint32_t)draw(&r->random, 3),
    };
    if (r->settings.length_max < 512) /* a request of many thousand reads only takes long */
        r->settings.length_max = 512;
    r->is_hostile = draw(&r->random, 4) > 0;
    if (!r->is_hostile) /* a server that is only slow is not to be lost */
        r->settings.reply_timeout_ms = PATIENT_TIMEOUT_MS;
    r->content = calloc(1, r->settings.size);
    CHECK(r->content);
    for (uint64_t start = 0; start < r->settings.size; start += GRANULE) {
        uint64_t end = draw(&r->random, 3) ? start + GRANULE : start;

        for (uint64_t i = start; i < end && i < r->settings.size; i++)
            r->content[i] = (uint8_t)(i * 31 + i / 251 + 1);
    }
}

static void start_round(struct round *r)
{
    draw_settings(r);
    CHECK(page_channel_nbd_new(&r->channel, &r->settings) == 0);
    r->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    CHECK(r->stop_fd >= 0);
    for (uint32_t i = 0; i < DISPATCHERS; i++)
        CHECK(pthread_create(&r->dispatchers[i], NULL, dispatcher_run, r) == 0);
    for (uint32_t i = 0; i < SUBMITTERS; i++) {
        struct submitter *s = &r->submitters[i];

        s->round = r;
        s->random = draw(&r->random, UINT32_MAX) + 1;
        CHECK(sem_init(&s->room, 0, IN_FLIGHT) == 0);
        CHECK(pthread_create(&s->thread, NULL, submitter_run, s) == 0);
    }
    CHECK(pthread_create(&r->supplier, NULL, supplier_run, r) == 0);
}

static void stop_submitters(struct round *r)
{
    set_flag(&r->stop_submitting);
    for (uint32_t i = 0; i < SUBMITTERS; i++) {
        sem_post(&r->submitters[i].room);
        pthread_join(r->submitters[i].thread, NULL);
    }
}

static void stop_dispatchers(struct round *r)
{
    CHECK(eventfd_write(r->stop_fd, 1) == 0);
    for (uint32_t i = 0; i < DISPATCHERS; i++)
        pthread_join(r->dispatchers[i], NULL);
}

static void stop_supplier(struct round *r)
{
    set_flag(&r->stop_supplying);
    pthread_join(r->supplier, NULL);
}

static int all_done(struct round *r)
{
    int all = 1;

    for (uint32_t i = 0; i < SUBMITTERS; i++)
        all &= __atomic_load_n(&r->submitters[i].n_done, __ATOMIC_ACQUIRE) == r->submitters[i].n_submitted;
    return all;
}

static void wait_all_done(struct round *r)
{
    for (int i = 0; i < SETTLE_S * 1000 && !all_done(r); i++)
        pause_ms(1);
    CHECK(all_done(r));
}

static void free_channel(struct round *r)
{
    stop_dispatchers(r);
    set_flag(&r->ended);
    page_channel_free(r->channel);
    CHECK(all_done(r)); /* at once: whoever frees a channel goes on to free what asked */
}

static void end_channel(struct round *r)
{
    set_flag(&r->ended);
    page_channel_nbd_end(r->channel);
}

static void end_round(struct round *r)
{
    switch (r->ending) {
    case ENDING_CALM: /* what waits is answered when all is well again */
        stop_submitters(r);
        set_flag(&r->calm);
        wait_all_done(r);
        free_channel(r);
        break;
    case ENDING_END: /* while requests go on to come */
        end_channel(r);
        pause_ms(5);
        stop_submitters(r);
        wait_all_done(r);
        free_channel(r);
        break;
    case ENDING_FREE: /* with everything in flight, and the supplier at work */
        stop_submitters(r);
        free_channel(r);
        pause_ms(5);
        break;
    default: /* the supplier goes first */
        stop_supplier(r);
        end_channel(r);
        page_channel_nbd_release(r->channel);
        stop_submitters(r);
        free_channel(r);
        return;
    }
    stop_supplier(r);
    page_channel_nbd_end(r->channel);
    page_channel_nbd_release(r->channel);
}

static void clean_round(struct round *r)
{
    for (uint32_t i = 0; i < r->n_peers; i++) {
        pthread_join(r->peers[i]->thread, NULL);
        close(r->peers[i]->fd);
        free(r->peers[i]);
    }
    for (uint32_t i = 0; i < SUBMITTERS; i++)
        sem_destroy(&r->submitters[i].room);
    close(r->stop_fd);
    free(r->content);
}

static int count_fds(void)
{
    DIR *folder = opendir("/proc/self/fd");
    int count = 0;

    CHECK(folder);
    while (readdir(folder))
        count++;
    closedir(folder);
    return count;
}

int main(int argc, char **argv)
{
    CHECK(argc == 3);
    run_seed = strtoull(argv[1], NULL, 10);
    int rounds = atoi(argv[2]), before = count_fds();
    uint64_t random = run_seed * 2654435761u + 88172645463325252u;

    for (int i = 0; i < rounds; i++) {
        struct round *r = calloc(1, sizeof(*r));

        CHECK(r);
        (void)draw(&random, 2);
        r->random = random;
        r->ending = i % ENDINGS;
        start_round(r);
        pause_ms(ROUND_MS);
        end_round(r);
        clean_round(r);
        free(r);
        CHECK(count_fds() == before);
    }
    printf("%llu read, %llu failed, %llu connections lost\n", (unsigned long long)n_right, (unsigned long long)n_failed,
           (unsigned long long)n_lost);
    return n_right == 0 || n_lost == 0;
}
