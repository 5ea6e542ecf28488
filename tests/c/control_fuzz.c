/* control_fuzz: what attached helpers send, with mutations, to real fault threads with real blocks, beside a plain
 * second reading of the same messages: each session must end as that says (left, hung up, cut off and why), every
 * REQUEST be answered as it says or not at all, and no fd that came along stay open.
 *
 * control_fuzz COUNT SEED KEEPER: KEEPER is the executable pcshare-keeper. An input is one message that is mutated or
 * noise. stdout: how much was done. No page is ever missing here for anybody who waits: only messages count.
 */
#define _GNU_SOURCE
#include "fuzz.h"

#include <errno.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "bitmap.h"
#include "error.h"
#include "fault_thread.h"
#include "fd_message.h"
#include "keeper.h"
#include "page_channel.h"
#include "uffd.h"
#include "wire.h"

enum {
    PAGE = 4096,
    EVENT_TIMEOUT_MS = 20000,
    MESSAGES_MAX = 250, /* fewer than a socket holds messages */
    MESSAGE_BYTES_MAX = 128,
    CLIENT_PAGE = 16,
};
_Static_assert(MESSAGES_MAX > FAULT_REQUESTS_IN_FLIGHT_MAX * 3 / 2, "one helper asks too much now and then");
/* What the three blocks are: all holes, so a request is answered at once; a source that has lost everything; a source
 * that never answers. */
enum { HOLES, LOST, SILENT, BLOCKS };

struct message {
    uint8_t bytes[MESSAGE_BYTES_MAX];
    uint32_t length;
    int n_fds;
};

/* What the second reading says of a session. */
struct outcome {
    uint32_t kind; /* EVENT_REMOTE_* */
    int32_t error;
    uint64_t offset;
    uint32_t n_answers;
    struct wire_done answers[MESSAGES_MAX];
    uint32_t in_flight;
};

struct source {
    struct page_channel channel;
    int loses;
    struct page_request *held;
};

static const uint64_t lengths[BLOCKS] = {64 * PAGE, 32 * PAGE, 262144ull * PAGE};
static struct status_header status;
static struct status_block block_status[BLOCKS];
static struct ramblock *blocks[BLOCKS];
static uint64_t *received[BLOCKS];
static struct fault_threads *ft;
static struct keeper *keeper;
static pid_t keeper_process;
static int uffd;
static uint64_t n_sessions, n_answers, n_crowds, n_ends[4];

/* ---- sources ---- */

static int source_read_now(struct page_channel *channel, void *bytes, uint64_t length, uint64_t offset)
{
    (void)channel, (void)bytes, (void)length, (void)offset;
    return PAGE_CHANNEL_WOULD_BLOCK;
}

/* The stream alone asks here. */
static void source_submit(struct page_channel *channel, struct page_request *request)
{
    struct source *source = (struct source *)channel;

    if (source->loses) {
        request->done(request, -EIO);
        return;
    }
    request->next = source->held;
    source->held = request;
}

static void source_free(struct page_channel *channel)
{
    struct source *source = (struct source *)channel;

    while (source->held) {
        struct page_request *request = source->held;
        source->held = request->next;
        request->done(request, -ECANCELED);
    }
    free(source);
}

static struct page_channel *source_new(int loses)
{
    static const struct page_channel_ops ops = {
        .read_now = source_read_now, .submit = source_submit, .free = source_free};
    struct source *source = calloc(1, sizeof(*source));

    REQUIRE(source);
    source->channel = (struct page_channel){
        .ops = &ops, .stream_piece_bytes = 1 << 20, .stream_piece_count = 4, .stream_piece_count_demand = 1};
    source->loses = loses;
    return &source->channel;
}

/* ---- the coordinator ---- */

static void start_keeper(const char *executable)
{
    char number[16];
    int ends[2];

    REQUIRE(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends) == 0);
    keeper_process = fork();
    REQUIRE(keeper_process >= 0);
    if (keeper_process == 0) {
        close(ends[0]);
        snprintf(number, sizeof(number), "%d", ends[1]);
        execl(executable, executable, "--serve", number, NULL);
        _exit(127);
    }
    close(ends[1]);
    REQUIRE(keeper_connect(&keeper, ends[0]) == 0);
}

static void add_block(int which)
{
    struct ramblock_extent all = {.start = 0, .end = lengths[which]};
    uint64_t length = lengths[which];
    char text[CORE_ERROR_TEXT_MAX];
    struct page_channel *channel;

    received[which] = calloc(bitmap_bytes(length / PAGE), 1);
    int rc = ramblock_new(&blocks[which], keeper, NULL, "fuzz", length, length, PAGE, 0, which == HOLES ? NULL : &all,
                          which == HOLES ? 0 : 1, (uint32_t)which, &block_status[which], received[which], text);
    if (rc < 0)
        fprintf(stderr, "%s\n", text);
    REQUIRE(rc == 0);
    if (which == HOLES)
        REQUIRE(page_channel_zero_new(&channel) == 0);
    else
        channel = source_new(which == LOST);
    REQUIRE(fault_threads_add_block(ft, blocks[which], channel, SOURCE_LOSS_POISON) == 0);
}

/* Every page of it is asked for once, so that each is known to be lost. */
static void lose_all(void)
{
    struct pollfd polled = {.fd = fault_threads_event_fd(ft), .events = POLLIN};
    struct fault_event event;

    fault_threads_set_stream(ft, STATUS_STREAM_EAGER, 0);
    while (__atomic_load_n(&block_status[LOST].lost_pages, __ATOMIC_ACQUIRE) < lengths[LOST] / PAGE) {
        REQUIRE(poll(&polled, 1, EVENT_TIMEOUT_MS) == 1);
        (void)fault_threads_next_event(ft, &event);
    }
    fault_threads_set_stream(ft, STATUS_STREAM_LAZY, 0);
}

static void begin(const char *executable)
{
    const int32_t cpus[] = {-1, -1};
    int user_mode_only;

    start_keeper(executable);
    uffd = uffd_open(-1, &user_mode_only);
    REQUIRE(uffd >= 0 && uffd_api(uffd, 0, NULL, NULL) == 0);
    REQUIRE(fault_threads_new(&ft, &status) == 0);
    for (int which = 0; which < BLOCKS; which++)
        add_block(which);
    REQUIRE(fault_threads_start(ft, cpus, 2) == 0);
    lose_all();
}

static void end(void)
{
    int how;

    fault_threads_free(ft);
    for (int which = 0; which < BLOCKS; which++)
        free(received[which]);
    keeper_free(keeper);
    close(uffd);
    REQUIRE(waitpid(keeper_process, &how, 0) == keeper_process && WIFEXITED(how) && WEXITSTATUS(how) == 0);
}

/* ---- messages ---- */

static uint64_t random_place(uint64_t length)
{
    switch (random_below(6)) {
    case 0:
        return random_edge();
    case 1:
        return length + random_below(3) - 1;
    case 2:
        return 0;
    default:
        return random_below(length);
    }
}

/* is_tame: nothing in it ends a session. */
static void make_message(struct message *message, int which, int is_tame)
{
    struct wire_request request = {
        .header = {.magic = WIRE_MAGIC, .version = WIRE_VERSION, .type = WIRE_REQUEST, .length = sizeof(request)}};

    request.header.cookie = (uint32_t)random_below(UINT32_MAX);
    request.flags = one_in(3) ? 0 : WIRE_REQUEST_WAIT;
    request.offset = !is_tame && one_in(4) ? random_place(lengths[which]) : random_below(lengths[which]);
    uint64_t left = request.offset < lengths[which] ? lengths[which] - request.offset : 0;
    request.length = !is_tame && one_in(4) ? random_place(lengths[which]) : random_below(left + 1);
    if (!is_tame && one_in(24)) {
        request.header.type = WIRE_LEAVE;
        request.header.length = sizeof(struct wire_plain);
    }
    *message = (struct message){.length = request.header.length};
    memcpy(message->bytes, &request, message->length);
}

static void mutate(struct message *message)
{
    switch (random_below(10)) {
    case 0:
        message->length = (uint32_t)random_below(MESSAGE_BYTES_MAX + 1); /* it says another length */
        break;
    case 1:
        message->length = (uint32_t)random_below(MESSAGE_BYTES_MAX + 1);
        random_fill(message->bytes, message->length);
        break;
    case 2:
        message->n_fds = 1 + (int)random_below(FUZZ_FDS_MAX);
        if (one_in(4))
            message->length = 0;
        break;
    case 3: /* the other's length, and it says so */
        message->length =
            message->length == sizeof(struct wire_plain) ? sizeof(struct wire_request) : sizeof(struct wire_plain);
        memcpy(message->bytes + 8, &message->length, 4);
        break;
    case 4: /* another type */
        message->bytes[6] = (uint8_t)random_below(WIRE_ADMIN + 2);
        break;
    default:
        for (uint64_t n = 1 + random_below(3); n > 0; n--)
            mutate_bytes(message->bytes + (one_in(2) ? 0 : 16), message->length > 16 ? message->length - 16 : 16);
    }
}

/* SEQPACKET: whole or not at all. 0, or a negative errno. */
static int send_message(int fd, const struct message *message)
{
    int fds[FUZZ_FDS_MAX];

    for (int i = 0; i < message->n_fds; i++)
        fds[i] = one_in(2) ? fd : uffd;
    return fuzz_send(fd, message->bytes, message->length, fds, (uint32_t)message->n_fds, MSG_DONTWAIT);
}

/* ---- the second reading ---- */

static int end_as(struct outcome *outcome, uint32_t kind, int error, uint64_t offset)
{
    outcome->kind = kind;
    outcome->error = error;
    outcome->offset = offset;
    return 1;
}

static void answer(struct outcome *outcome, const struct wire_request *request, int32_t error, uint64_t offset,
                   uint64_t length)
{
    outcome->answers[outcome->n_answers++] = (struct wire_done){
        .header = {.magic = WIRE_MAGIC,
                   .version = WIRE_VERSION,
                   .type = WIRE_DONE,
                   .length = sizeof(struct wire_done),
                   .cookie = request->header.cookie},
        .status = error,
        .offset = offset,
        .length = length,
    };
}

static int second_request(struct outcome *outcome, const struct wire_request *request, int which)
{
    uint64_t length = lengths[which], start = request->offset / PAGE * PAGE;

    if (request->offset > length || request->length > length - request->offset)
        return end_as(outcome, EVENT_REMOTE_DISABLED, ERANGE, request->offset);
    if (!(request->flags & WIRE_REQUEST_WAIT))
        return 0;
    if (outcome->in_flight == FAULT_REQUESTS_IN_FLIGHT_MAX)
        return end_as(outcome, EVENT_REMOTE_DISABLED, EDQUOT, 0);
    uint64_t end = (request->offset + request->length + PAGE - 1) / PAGE * PAGE;
    if (which == HOLES || start == end)
        answer(outcome, request, 0, 0, 0);
    else if (which == LOST)
        answer(outcome, request, -EIO, start, end - start);
    else
        outcome->in_flight++;
    return 0;
}

/* Whether the session ends with it. */
static int second_reading(struct outcome *outcome, const struct message *message, int which)
{
    struct wire_request request;

    if (message->n_fds == 0 && message->length == 0)
        return end_as(outcome, EVENT_REMOTE_HUNG_UP, 0, 0); /* not to be told from an end */
    if (message->n_fds || (message->length != sizeof(request) && message->length != sizeof(struct wire_plain)))
        return end_as(outcome, EVENT_REMOTE_DISABLED, EPROTO, 0);
    memcpy(&request, message->bytes, message->length);
    uint32_t wanted = request.header.type == WIRE_REQUEST ? sizeof(request) : sizeof(struct wire_plain);
    if (request.header.magic != WIRE_MAGIC || request.header.version != WIRE_VERSION || wanted != message->length ||
        request.header.length != wanted || (request.header.type != WIRE_REQUEST && request.header.type != WIRE_LEAVE))
        return end_as(outcome, EVENT_REMOTE_DISABLED, EPROTO, 0);
    if (request.header.type == WIRE_LEAVE)
        return end_as(outcome, EVENT_REMOTE_LEFT, 0, 0);
    return second_request(outcome, &request, which);
}

/* ---- a session ---- */

static uint32_t join(int which, int control)
{
    struct remote_map map = {.client_addr = (uint64_t)CLIENT_PAGE * PAGE, .length = lengths[which], .page = 0};
    struct remote_fd *remote;
    uint32_t id;

    REQUIRE(remote_fd_new(&remote, blocks[which], dup(uffd), control, &map, 1, NULL) == 0);
    REQUIRE(fault_threads_add_remote(ft, remote, &id) == 0);
    return id;
}

/* The one event of this helper. */
static struct fault_event await_event(uint32_t id)
{
    struct pollfd polled = {.fd = fault_threads_event_fd(ft), .events = POLLIN};
    struct fault_event event = {0};

    while (event.remote_id != id) {
        if (fault_threads_next_event(ft, &event))
            REQUIRE(event.remote_id == id || event.remote_id == 0); /* a block's */
        else
            REQUIRE(poll(&polled, 1, EVENT_TIMEOUT_MS) == 1);
    }
    return event;
}

static void compare_answers(int fd, const struct outcome *outcome)
{
    struct wire_done done;

    for (uint32_t i = 0; i < outcome->n_answers; i++) {
        REQUIRE(recv(fd, &done, sizeof(done), MSG_DONTWAIT) == (ssize_t)sizeof(done));
        REQUIRE(memcmp(&done, &outcome->answers[i], sizeof(done)) == 0);
    }
    REQUIRE(recv(fd, &done, sizeof(done), MSG_DONTWAIT) <= 0);
    n_answers += outcome->n_answers;
}

static void count_end(uint32_t kind)
{
    n_sessions++;
    n_ends[kind == EVENT_REMOTE_LEFT ? 0 : kind == EVENT_REMOTE_HUNG_UP ? 1 : 2]++;
}

static void run_session(void)
{
    int which = (int)random_below(BLOCKS), ends[2], over = 0, joins_late = one_in(2), is_long = one_in(20);
    uint32_t n = is_long ? MESSAGES_MAX - (uint32_t)random_below(MESSAGES_MAX / 2) : 1 + (uint32_t)random_below(8),
             id = 0;
    struct outcome outcome = {0};
    struct message message;

    REQUIRE(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0);
    if (!joins_late)
        id = join(which, ends[0]);
    for (uint32_t i = 0; i < n; i++) {
        int is_mutated = one_in(is_long ? MESSAGES_MAX : 2);

        make_message(&message, which, is_long);
        if (is_mutated)
            mutate(&message);
        if (!over) {
            over = second_reading(&outcome, &message, which);
            fuzz_inputs += (uint64_t)is_mutated;
            n_crowds += over && outcome.error == EDQUOT;
        }
        REQUIRE(send_message(ends[1], &message) == 0);
    }
    if (joins_late)
        id = join(which, ends[0]);
    if (!over) {
        (void)shutdown(ends[1], SHUT_WR);
        (void)end_as(&outcome, EVENT_REMOTE_HUNG_UP, 0, 0);
    }
    struct fault_event event = await_event(id);
    REQUIRE(event.kind == outcome.kind && event.error == outcome.error && event.offset == outcome.offset);
    compare_answers(ends[1], &outcome);
    REQUIRE(fault_threads_remove_remote(ft, id) == 0);
    REQUIRE(recv(ends[1], &message, 1, 0) <= 0); /* its end is closed */
    close(ends[1]);
    count_end(outcome.kind);
}

/* A helper that asks and never reads what it is told is cut off, and nobody waits for it. */
static void run_flood(void)
{
    int ends[2], small = 1, rc = 0;
    struct fault_event event;

    REQUIRE(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0);
    REQUIRE(setsockopt(ends[0], SOL_SOCKET, SO_SNDBUF, &small, sizeof(small)) == 0);
    uint32_t id = join(HOLES, ends[0]);
    for (int i = 0; i < MESSAGES_MAX && rc == 0; i++) {
        struct message message = {.length = sizeof(struct wire_request)};
        struct wire_request request = {.header = {.magic = WIRE_MAGIC,
                                                  .version = WIRE_VERSION,
                                                  .type = WIRE_REQUEST,
                                                  .length = sizeof(request),
                                                  .cookie = (uint32_t)i},
                                       .flags = WIRE_REQUEST_WAIT};
        memcpy(message.bytes, &request, sizeof(request));
        rc = send_message(ends[1], &message);
    }
    event = await_event(id);
    REQUIRE(event.kind == EVENT_REMOTE_DISABLED && event.error == ENOBUFS);
    REQUIRE(fault_threads_remove_remote(ft, id) == 0);
    close(ends[1]);
    n_ends[3]++;
}

int main(int argc, char **argv)
{
    fuzz_arguments(argc, argv);
    if (argc < 4) {
        fprintf(stderr, "usage: control_fuzz COUNT SEED KEEPER\n");
        return 2;
    }
    begin(argv[3]);
    fuzz_begin();
    while (fuzz_more()) {
        run_session();
        if (one_in(1000))
            run_flood();
    }
    end();
    printf("%" PRIu64 " mutated messages in %" PRIu64 " sessions: %" PRIu64 " left, %" PRIu64 " hung up, %" PRIu64
           " cut off, of these %" PRIu64 " for asking too much, and %" PRIu64 " more for not reading; %" PRIu64
           " answers\n",
           fuzz_inputs, n_sessions, n_ends[0], n_ends[1], n_ends[2], n_crowds, n_ends[3], n_answers);
    return 0;
}
