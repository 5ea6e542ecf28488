/* incoming_race: a migration whose connections break at any moment, while several threads ask for its pages, messages
 * leave and requests are given up. Every request must be answered exactly once, and never before its pages are placed.
 *
 * Arguments: how many breaks, the random seed. Built from the core's files but for the fault threads, with a
 * sanitizer: pages that are to be placed arrive in this file.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "incoming.h"

enum {
    PAGE_BYTES = 4096,
    BLOCKS = 2,
    PAGES = 1 << 14, /* target pages of a block; those of the second one make host pages of several */
    PER_HUGE = 8,
    ASKERS = 3,
    CONNECTIONS = 2, /* main and preempt */
    ASKED_MAX = 64,  /* by one thread before it waits for some answers */
};

#define REQUIRE(condition)                                                                                             \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "line %d: %s\n", __LINE__, #condition);                                                    \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

struct connection {
    struct incoming_stream *stream;
    int peer;
    uint64_t seed;
    int is_whole; /* brings every page, and ends */
    int is_read;
    pthread_t writer;
    pthread_t reader;
    pthread_t listener;
};

static struct incoming *in;
static struct page_channel *channels[BLOCKS];
static const char *const names[BLOCKS] = {"small", "huge"};
static const uint64_t page_bytes[BLOCKS] = {PAGE_BYTES, PER_HUGE * PAGE_BYTES};
static uint8_t is_placed[BLOCKS][PAGES];
static int stopping;
static uint64_t submitted, answered, arrived, repeats;

static uint64_t random_below(uint64_t *state, uint64_t n)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return (*state >> 11) % n;
}

static uint8_t byte_of(uint32_t block, uint64_t page)
{
    return (uint8_t)(1 + (page * 7 + block * 3) % 250);
}

int fault_threads_place(struct fault_threads *ft, uint32_t block, uint64_t page, uint64_t n_pages, const void *bytes,
                        int is_demand, uint64_t *placedp)
{
    const uint8_t *from = bytes;

    (void)ft;
    (void)is_demand;
    REQUIRE(block < BLOCKS && from);
    *placedp = 0;
    for (uint64_t i = page; i < page + n_pages; i++, from += page_bytes[block]) {
        REQUIRE(from[0] == byte_of(block, i) && from[page_bytes[block] - 1] == byte_of(block, i));
        *placedp += !__atomic_exchange_n(&is_placed[block][i], 1, __ATOMIC_ACQ_REL);
    }
    return 0;
}

/* ---- those who ask ---- */

static void done(struct page_request *request, int result)
{
    uint32_t *in_flight = request->owner;

    REQUIRE(result == PAGE_CHANNEL_ARRIVED || result == -EIO || result == -ECANCELED);
    for (uint64_t i = 0; result == PAGE_CHANNEL_ARRIVED && i < request->n_pages; i++)
        REQUIRE(__atomic_load_n(&is_placed[request->block_index][request->page + i], __ATOMIC_ACQUIRE));
    __atomic_fetch_add(&arrived, result == PAGE_CHANNEL_ARRIVED, __ATOMIC_RELAXED);
    __atomic_fetch_add(&answered, 1, __ATOMIC_RELAXED);
    free(request);
    __atomic_fetch_sub(in_flight, 1, __ATOMIC_RELEASE);
}

static void ask(uint64_t *seed, uint32_t *in_flight)
{
    struct page_request *request = calloc(1, sizeof(*request));
    uint32_t block = (uint32_t)random_below(seed, BLOCKS);
    uint64_t count = PAGES * PAGE_BYTES / page_bytes[block];

    REQUIRE(request);
    request->block_index = block;
    request->page = random_below(seed, count);
    request->is_demand = random_below(seed, 2) == 0;
    request->n_pages = request->is_demand ? 1 : 1 + random_below(seed, 8);
    if (request->n_pages > count - request->page)
        request->n_pages = count - request->page;
    request->offset = request->page * page_bytes[block];
    request->length = request->n_pages * page_bytes[block];
    request->done = done;
    request->owner = in_flight;
    __atomic_fetch_add(in_flight, 1, __ATOMIC_RELAXED);
    __atomic_fetch_add(&submitted, 1, __ATOMIC_RELAXED);
    page_channel_submit(channels[block], request);
}

static uint32_t in_flight_of[ASKERS];

static void *run_asker(void *argument)
{
    uint32_t *in_flight = argument;
    uint64_t seed = 77 + (uint64_t)(in_flight - in_flight_of);

    while (!__atomic_load_n(&stopping, __ATOMIC_ACQUIRE)) {
        if (__atomic_load_n(in_flight, __ATOMIC_ACQUIRE) < ASKED_MAX)
            ask(&seed, in_flight);
        else
            page_channel_dispatch(channels[random_below(&seed, BLOCKS)]);
        sched_yield();
    }
    return NULL;
}

/* ---- a connection ---- */

static int send_all(int fd, const void *bytes, size_t length)
{
    size_t sent = 0;

    while (sent < length) {
        ssize_t n = send(fd, (const uint8_t *)bytes + sent, length - sent, MSG_NOSIGNAL);
        if (n <= 0)
            return -1;
        sent += (size_t)n;
    }
    return 0;
}

/* The target pages of a host page. */
static int send_host_page(int fd, uint32_t block, uint64_t page)
{
    uint8_t bytes[9 + 5 + PAGE_BYTES];
    uint64_t parts = page_bytes[block] / PAGE_BYTES;

    for (uint64_t part = 0; part < parts; part++) {
        uint64_t word = htobe64((page * parts + part) * PAGE_BYTES | 0x08);
        size_t name = strlen(names[block]), n = sizeof(word);

        memcpy(bytes, &word, n);
        bytes[n++] = (uint8_t)name;
        memcpy(bytes + n, names[block], name);
        memset(bytes + n + name, byte_of(block, page), PAGE_BYTES);
        if (send_all(fd, bytes, n + name + PAGE_BYTES) < 0)
            return -1;
    }
    return 0;
}

static void *run_writer(void *argument)
{
    struct connection *c = argument;
    uint64_t end = htobe64(0x10);
    int rc = 0;

    for (uint64_t i = 0; rc == 0 && (i < PAGES || !c->is_whole); i++) {
        uint32_t block = c->is_whole ? 0 : (uint32_t)random_below(&c->seed, BLOCKS);
        uint64_t count = PAGES * PAGE_BYTES / page_bytes[block];

        rc = send_host_page(c->peer, block, c->is_whole ? i : random_below(&c->seed, count));
        if (rc == 0 && c->is_whole && i < PAGES / PER_HUGE)
            rc = send_host_page(c->peer, 1, i);
    }
    if (rc == 0)
        (void)send_all(c->peer, &end, sizeof(end));
    return NULL;
}

static void *run_reader(void *argument)
{
    struct connection *c = argument;
    struct incoming_counters counters;
    struct incoming_result result;
    int rc = incoming_stream_records(c->stream, INCOMING_SECTION_NONE, 0, &result);

    REQUIRE(c->is_whole ? rc == INCOMING_END_OF_PAYLOAD : rc < 0 && result.fault != INCOMING_FAULT_PEER);
    incoming_stream_counters(c->stream, &counters);
    __atomic_fetch_add(&repeats, counters.repeat_pages, __ATOMIC_RELAXED);
    __atomic_store_n(&c->is_read, 1, __ATOMIC_RELEASE);
    return NULL;
}

/* The peer's side of the return path. */
static void *run_listener(void *argument)
{
    const struct connection *c = argument;
    uint8_t bytes[PAGE_BYTES];

    while (recv(c->peer, bytes, sizeof(bytes), 0) > 0)
        ;
    return NULL;
}

static void connect_one(struct connection *c, uint64_t seed, int is_whole)
{
    int fds[2];

    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0);
    *c = (struct connection){.peer = fds[1], .seed = seed, .is_whole = is_whole};
    REQUIRE(incoming_stream_new(&c->stream, in, fds[0]) == 0);
    REQUIRE(pthread_create(&c->writer, NULL, run_writer, c) == 0);
    REQUIRE(pthread_create(&c->reader, NULL, run_reader, c) == 0);
    REQUIRE(pthread_create(&c->listener, NULL, run_listener, c) == 0);
}

static void disconnect(struct connection *c)
{
    incoming_stream_stop(c->stream);
    pthread_join(c->reader, NULL);
    incoming_stream_free(c->stream);
    shutdown(c->peer, SHUT_RDWR);
    pthread_join(c->writer, NULL);
    pthread_join(c->listener, NULL);
    close(c->peer);
}

/* ---- the migration ---- */

static void add_block(uint32_t index)
{
    uint64_t received[PAGES / 64] = {0}, n_extents;
    struct ramblock_extent *extents;
    uint32_t found;
    int memfd = memfd_create(names[index], MFD_CLOEXEC);

    REQUIRE(memfd >= 0 && ftruncate(memfd, PAGES * PAGE_BYTES) == 0);
    REQUIRE(incoming_add_block(in, names[index], PAGES * PAGE_BYTES, page_bytes[index], memfd, &found) == 0);
    close(memfd);
    REQUIRE(incoming_unmap_block(in, index, received, &extents, &n_extents) == 0);
    incoming_free_extents(extents);
    REQUIRE(incoming_page_channel(in, index, &channels[index]) == 0);
    REQUIRE(incoming_listen_block(in, index, NULL, index) == 0);
}

static void disturb(uint64_t *seed, struct incoming_stream *main_stream)
{
    switch (random_below(seed, 6)) {
    case 0:
        incoming_give_up(in, EIO);
        incoming_give_up(in, 0);
        break;
    case 1:
        (void)incoming_send_bitmap(in, names[random_below(seed, BLOCKS)]);
        break;
    case 2:
        (void)incoming_send(in, 2, "ping", 4);
        break;
    case 3:
        (void)incoming_flush(in, 1);
        break;
    case 4:
        incoming_set_return_path(in, main_stream);
        break;
    default:
        incoming_resend(in);
    }
}

/* A link that holds for some bytes. */
static void run_link(uint64_t *seed)
{
    struct connection links[CONNECTIONS];
    uint64_t bytes = random_below(seed, 400 * PAGE_BYTES);

    for (int i = 0; i < CONNECTIONS; i++)
        connect_one(&links[i], *seed + (uint64_t)i, 0);
    incoming_set_return_path(in, links[0].stream);
    incoming_resend(in);
    while (incoming_stream_offset(links[0].stream) < bytes)
        disturb(seed, links[0].stream);
    for (int i = CONNECTIONS - 1; i >= 0; i--)
        disconnect(&links[i]);
}

/* It is brought to its end: whoever still waits is answered. */
static void end_whole(uint64_t seed)
{
    struct connection last;

    connect_one(&last, seed, 1);
    while (!__atomic_load_n(&last.is_read, __ATOMIC_ACQUIRE))
        sched_yield();
    REQUIRE(incoming_outstanding(in) == 0 && submitted == answered);
    disconnect(&last);
}

/* Its blocks go while pages come and requests are outstanding. */
static void end_torn(uint64_t seed)
{
    struct connection links[CONNECTIONS];
    uint32_t in_flight = 0;

    for (int i = 0; i < CONNECTIONS; i++)
        connect_one(&links[i], seed + (uint64_t)i, 0);
    incoming_set_return_path(in, links[0].stream);
    for (int i = 0; i < ASKED_MAX; i++)
        ask(&seed, &in_flight);
    for (uint32_t i = 0; i < BLOCKS; i++)
        page_channel_free(channels[i]);
    REQUIRE(submitted == answered && in_flight == 0);
    for (int i = 0; i < CONNECTIONS; i++)
        disconnect(&links[i]);
}

static void run_migration(uint64_t breaks, uint64_t seed, int is_torn)
{
    pthread_t askers[ASKERS];

    submitted = answered = arrived = repeats = 0;
    stopping = 0;
    memset(is_placed, 0, sizeof(is_placed));
    REQUIRE(incoming_new(&in, PAGE_BYTES) == 0);
    for (uint32_t i = 0; i < BLOCKS; i++)
        add_block(i);
    for (int i = 0; i < ASKERS; i++)
        REQUIRE(pthread_create(&askers[i], NULL, run_asker, &in_flight_of[i]) == 0);
    for (uint64_t i = 0; i < breaks; i++)
        run_link(&seed);
    __atomic_store_n(&stopping, 1, __ATOMIC_RELEASE);
    for (int i = 0; i < ASKERS; i++)
        pthread_join(askers[i], NULL);
    if (is_torn)
        end_torn(seed);
    else
        end_whole(seed);
    for (uint32_t i = 0; i < BLOCKS && !is_torn; i++)
        page_channel_free(channels[i]);
    incoming_free(in);
    printf("%" PRIu64 " requests, %" PRIu64 " of them answered by pages, %" PRIu64 " pages came again\n", submitted,
           arrived, repeats);
}

int main(int argc, char **argv)
{
    uint64_t breaks = argc > 1 ? strtoull(argv[1], NULL, 10) : 50;
    uint64_t seed = (argc > 2 ? strtoull(argv[2], NULL, 10) : 1) * 2 + 1;

    run_migration(breaks, seed, 0);
    run_migration(breaks, seed + 2, 1);
    return 0;
}
