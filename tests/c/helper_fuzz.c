/* helper_fuzz: what a coordinator sends, with mutations, to the helper's side, beside a plain second reading of the
 * same messages: each must be taken or refused as that says, whatever was taken must be what was sent, a helper that is
 * attached must end where that says, and no fd and no mapping stay.
 *
 * helper_fuzz COUNT SEED SOCKET: SOCKET is a path that does not exist yet. An input is one message that is mutated or
 * noise, fds included; most go straight to what reads them, the rest through pcshare_attach and the sentinel, from a
 * coordinator that listens. stdout: how much was done. No page is touched here: only messages count.
 */
#define _GNU_SOURCE
#include "fuzz.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>

#include "fd_message.h"
#include "helper.h"
#include "helper_internal.h"
#include "status_segment.h"
#include "wire.h"

enum {
    PAGE = 4096,
    PAGES = 16,
    BLOCK = 1, /* ours in the status segment; the other one is of another size */
    SCRIPT_MAX = 8,
    MESSAGE_BYTES_MAX = sizeof(struct wire_welcome) + 64,
    ATTACH_TIMEOUT_MS = 20000,
    ORPHAN_TIMEOUT_MS = 1,
    DIRECT_PER_ATTACH = 32,
    ERRNO_MAX = 4095,    /* of a DONE */
    ANY_ERROR = -100000, /* refused; what the errno is, is the kernel's */
};
enum { FD_MEMFD, FD_STATUS, FD_DEVICE, FD_SHORT, FD_SOCKET, FD_FOLDER, FD_NULL, FD_KINDS };

struct message {
    uint8_t bytes[MESSAGE_BYTES_MAX];
    uint32_t length;
    uint32_t n_fds;
    int fds[FUZZ_FDS_MAX]; /* FD_* */
};

struct script {
    struct message messages[SCRIPT_MAX];
    uint32_t n;
    uint32_t n_first; /* sent at once; the others when the helper asks for a range */
    int hangs_up;
};

static int fds[FD_KINDS];
static const char *socket_path;
static uint64_t n_taken, n_refused, n_attached, n_ends[5];

/* In the C library's place, for the code under test alone: a helper that is lost says so on stderr, thousands of times
 * here. */
ssize_t write(int fd, const void *bytes, size_t length)
{
    return fd == STDERR_FILENO ? (ssize_t)length : syscall(SYS_write, fd, bytes, length);
}

/* ---- a coordinator's things ---- */

static int make_status(void)
{
    struct status_header *header;
    uint64_t blocks_offset = (sizeof(*header) + 7) / 8 * 8;
    uint64_t size = blocks_offset + 2 * sizeof(struct status_block) + 64;
    int fd = memfd_create("status", MFD_CLOEXEC);

    REQUIRE(fd >= 0 && ftruncate(fd, (off_t)size) == 0);
    header = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    REQUIRE(header != MAP_FAILED);
    struct status_block *block = (struct status_block *)((char *)header + blocks_offset);
    *header = (struct status_header){
        .magic = STATUS_MAGIC, .version = STATUS_VERSION, .blocks_offset = blocks_offset, .blocks_max = 2};
    for (int i = 0; i < 2; i++)
        block[i] = (struct status_block){.in_use = 1,
                                         .page_size = PAGE,
                                         .page_count = i == BLOCK ? PAGES : PAGES / 2,
                                         .state = STATUS_STATE_RUNNING,
                                         .bitmap_offset = blocks_offset + 2 * sizeof(*block)};
    munmap(header, size);
    return fd;
}

static void make_things(void)
{
    int ends[2];

    fds[FD_MEMFD] = memfd_create("block", MFD_CLOEXEC);
    REQUIRE(fds[FD_MEMFD] >= 0 && ftruncate(fds[FD_MEMFD], PAGES * PAGE) == 0);
    fds[FD_STATUS] = make_status();
    fds[FD_DEVICE] = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (fds[FD_DEVICE] < 0) /* not everybody may: what it is is not looked at */
        fds[FD_DEVICE] = open("/dev/null", O_RDWR | O_CLOEXEC);
    fds[FD_SHORT] = memfd_create("short", MFD_CLOEXEC);
    REQUIRE(fds[FD_SHORT] >= 0 && ftruncate(fds[FD_SHORT], PAGE / 2) == 0);
    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    fds[FD_SOCKET] = ends[0];
    close(ends[1]);
    fds[FD_FOLDER] = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    fds[FD_NULL] = open("/dev/null", O_RDWR | O_CLOEXEC);
    for (int i = 0; i < FD_KINDS; i++)
        REQUIRE(fds[i] >= 0);
}

/* ---- messages ---- */

static struct wire_header header_of(uint16_t type, uint32_t length)
{
    return (struct wire_header){.magic = WIRE_MAGIC, .version = WIRE_VERSION, .type = type, .length = length};
}

static void put_welcome(struct message *message, uint64_t features)
{
    struct wire_welcome w = {
        .header = header_of(WIRE_WELCOME, sizeof(w)),
        .mode = WIRE_MODE_RO,
        .block_index = BLOCK,
        .used_length = PAGES * PAGE - random_below(PAGE),
        .page_size = PAGE,
        .map_length = PAGES * PAGE,
        .features = features,
        .orphan_timeout_ms = ORPHAN_TIMEOUT_MS,
        .idstr = "block",
    };

    message->n_fds = 2;
    message->fds[0] = FD_MEMFD;
    message->fds[1] = FD_STATUS;
    message->fds[2] = FD_DEVICE;
    if (one_in(8))
        w.flags |= WIRE_WELCOME_COMPLETE;
    if (one_in(3)) {
        w.flags |= WIRE_WELCOME_DEVICE;
        message->n_fds = 3;
    }
    if (one_in(3)) {
        w.flags |= WIRE_WELCOME_ARRAY;
        w.ndim = (uint32_t)random_below(WIRE_DIMS_MAX + 1);
        w.data_offset = 128;
        memcpy(w.dtype, "<f8", 4);
        random_fill(w.dims, sizeof(w.dims));
    }
    message->length = sizeof(w);
    memcpy(message->bytes, &w, sizeof(w));
}

static void put_plain(struct message *message, uint16_t type)
{
    struct wire_plain plain = {.header = header_of(type, sizeof(plain))};

    message->length = sizeof(plain);
    memcpy(message->bytes, &plain, sizeof(plain));
}

static void put_ack(struct message *message)
{
    struct wire_ack ack = {.header = header_of(WIRE_ACK, sizeof(ack)), .helper_index = 7};

    if (one_in(8))
        ack.flags = WIRE_WELCOME_COMPLETE;
    message->length = sizeof(ack);
    memcpy(message->bytes, &ack, sizeof(ack));
}

static void put_done(struct message *message)
{
    struct wire_done done = {.header = header_of(WIRE_DONE, sizeof(done))};

    done.header.cookie = 1 + (uint32_t)(one_in(4) ? random_below(3) : 0); /* the first REQUEST's is 1 */
    done.status = one_in(2) ? 0 : one_in(2) ? -EIO : (int32_t)random_below(400) - 350;
    done.offset = random_below(PAGES * PAGE);
    done.length = PAGE;
    message->length = sizeof(done);
    memcpy(message->bytes, &done, sizeof(done));
}

static void put_error(struct message *message)
{
    struct wire_error error = {.header = header_of(WIRE_ERROR, sizeof(error)), .error = EACCES, .text = "no"};

    if (one_in(3))
        error.error = (int32_t)random_below(150);
    message->length = sizeof(error);
    memcpy(message->bytes, &error, sizeof(error));
}

static void make_message(struct message *message, uint16_t type)
{
    memset(message, 0, sizeof(*message));
    switch (type) {
    case WIRE_WELCOME:
        put_welcome(message, 0);
        break;
    case WIRE_ACK:
        put_ack(message);
        break;
    case WIRE_DONE:
        put_done(message);
        break;
    case WIRE_ERROR:
        put_error(message);
        break;
    default:
        put_plain(message, type);
    }
}

static uint16_t random_type(void)
{
    static const uint16_t types[] = {WIRE_WELCOME, WIRE_ACK, WIRE_DONE, WIRE_END, WIRE_BYE, WIRE_ERROR, WIRE_LEAVE};

    return types[random_below(sizeof(types) / sizeof(*types))];
}

/* A field of WELCOME, which has the most to be wrong about. */
static void change_welcome(struct message *message)
{
    struct wire_welcome w;
    uint64_t *sizes[] = {&w.used_length, &w.page_size, &w.map_length, &w.data_offset, &w.orphan_timeout_ms};

    memcpy(&w, message->bytes, sizeof(w));
    uint64_t *size = sizes[random_below(sizeof(sizes) / sizeof(*sizes))];
    switch (random_below(8)) {
    case 0:
        *size = random_edge();
        break;
    case 1:
        *size += PAGE * (random_below(5) - 2);
        break;
    case 2:
        *size <<= random_below(64);
        break;
    case 3:
        w.mode = (uint32_t)random_below(6);
        break;
    case 4:
        w.flags ^= (uint32_t)1 << random_below(6);
        break;
    case 5:
        w.block_index = (uint32_t)random_below(4);
        break;
    case 6:
        memset(one_in(2) ? w.idstr : w.dtype, 'x', one_in(2) ? 64 : 63);
        break;
    default:
        w.ndim = (uint32_t)random_edge();
    }
    memcpy(message->bytes, &w, sizeof(w));
}

static void mutate(struct message *message)
{
    struct wire_header header;

    memcpy(&header, message->bytes, sizeof(header));
    switch (random_below(10)) {
    case 0:
        message->length = (uint32_t)random_below(MESSAGE_BYTES_MAX + 1);
        break;
    case 1:
        message->length = (uint32_t)random_below(one_in(2) ? 64 : MESSAGE_BYTES_MAX + 1);
        random_fill(message->bytes, message->length);
        break;
    case 2:
        message->n_fds = (uint32_t)random_below(FUZZ_FDS_MAX + 1);
        for (uint32_t i = 0; i < message->n_fds; i++)
            message->fds[i] = (int)random_below(FD_KINDS);
        break;
    case 3:
        if (message->n_fds)
            message->fds[random_below(message->n_fds)] = (int)random_below(FD_KINDS);
        else
            message->length = 0;
        break;
    case 4:
        mutate_bytes(message->bytes, sizeof(header));
        break;
    default:
        if (header.type == WIRE_WELCOME)
            for (uint64_t n = 1 + random_below(2); n > 0; n--)
                change_welcome(message);
        else
            mutate_bytes(message->bytes, message->length);
    }
}

static void send_message(int fd, const struct message *message)
{
    int sent[FUZZ_FDS_MAX];

    for (uint32_t i = 0; i < message->n_fds; i++)
        sent[i] = fds[message->fds[i]];
    (void)fuzz_send(fd, message->bytes, message->length, sent, message->n_fds, 0); /* it may have hung up before */
}

/* ---- the second reading ---- */

static const struct {
    uint16_t type;
    uint32_t length;
    uint32_t fds_min;
    uint32_t fds_max;
} table[] = {
    {WIRE_WELCOME, sizeof(struct wire_welcome), 2, 3}, {WIRE_ACK, sizeof(struct wire_ack), 0, 0},
    {WIRE_DONE, sizeof(struct wire_done), 0, 0},       {WIRE_END, sizeof(struct wire_plain), 0, 0},
    {WIRE_BYE, sizeof(struct wire_plain), 0, 0},       {WIRE_ERROR, sizeof(struct wire_error), 0, 0},
};

static int ends_within(const char *text, size_t size)
{
    return strnlen(text, size) < size;
}

/* 0: it is a message; else what receiving it comes to. */
static int second_receive(const struct message *message)
{
    struct wire_header header;
    struct wire_error error;
    size_t row = 0;

    if (message->n_fds > WIRE_FDS_MAX || message->length > sizeof(struct wire_welcome))
        return -EPROTO;
    if (message->length == 0)
        return -ECONNRESET;
    memcpy(&header, message->bytes, sizeof(header));
    if (message->length < sizeof(header) || header.magic != WIRE_MAGIC)
        return -EPROTO;
    while (row < sizeof(table) / sizeof(*table) && table[row].type != header.type)
        row++;
    if (header.version != WIRE_VERSION && header.type != WIRE_ERROR)
        return -EPROTONOSUPPORT;
    if (row == sizeof(table) / sizeof(*table) || header.length != message->length ||
        message->length != table[row].length)
        return -EPROTO;
    if (message->n_fds < table[row].fds_min || message->n_fds > table[row].fds_max)
        return -EPROTO;
    if (header.type != WIRE_ERROR)
        return 0;
    memcpy(&error, message->bytes, sizeof(error));
    return error.error > 0 && ends_within(error.text, sizeof(error.text)) ? -error.error : -EPROTO;
}

static uint64_t size_of(int kind)
{
    return kind == FD_MEMFD ? PAGES * PAGE : kind == FD_SHORT ? PAGE / 2 : 0;
}

static int second_sizes(const struct wire_welcome *w, int memfd_kind)
{
    int power_of_two = __builtin_popcountll(w->page_size) == 1 && w->page_size >= PAGE;

    if (!power_of_two || w->map_length == 0 || w->map_length % w->page_size || w->map_length > INT64_MAX)
        return 0;
    if (w->used_length > w->map_length || w->used_length + w->page_size <= w->map_length)
        return 0;
    if (memfd_kind == FD_STATUS)
        return -1; /* long enough or not: the kernel knows */
    return size_of(memfd_kind) >= w->map_length;
}

/* All but the status segment. 0: right; a negative errno, or ANY_ERROR. The mode and name that were asked for, or none.
 */
static int second_words(const struct message *message, uint32_t mode, const char *idstr)
{
    struct wire_welcome w;
    int rc = second_receive(message);

    if (rc < 0)
        return rc;
    memcpy(&w, message->bytes, message->length < sizeof(w) ? message->length : sizeof(w));
    if (w.header.type != WIRE_WELCOME)
        return -EPROTO;
    int sizes = second_sizes(&w, message->fds[0]);
    if (sizes <= 0)
        return sizes < 0 ? ANY_ERROR : -EPROTO;
    if (message->n_fds != (w.flags & WIRE_WELCOME_DEVICE ? 3 : 2) || !ends_within(w.idstr, sizeof(w.idstr)) ||
        !ends_within(w.dtype, sizeof(w.dtype)) || (idstr[0] && strcmp(idstr, w.idstr) != 0))
        return -EPROTO;
    if (w.mode < WIRE_MODE_RO || w.mode > WIRE_MODE_COW || (mode && mode != w.mode) ||
        (w.mode == WIRE_MODE_RW && !(w.flags & WIRE_WELCOME_WRITABLE)))
        return -EPROTO;
    if ((w.flags & WIRE_WELCOME_ARRAY) && (w.ndim > WIRE_DIMS_MAX || w.data_offset > w.used_length))
        return -EPROTO;
    return 0;
}

static int second_status(const struct message *message)
{
    struct wire_welcome w;

    memcpy(&w, message->bytes, sizeof(w));
    if (message->fds[1] != FD_STATUS)
        return ANY_ERROR;
    return w.block_index == BLOCK && w.page_size == PAGE && w.map_length == PAGES * PAGE ? 0 : -EPROTO;
}

static int second_welcome(const struct message *message, uint32_t mode, const char *idstr)
{
    int rc = second_words(message, mode, idstr);

    return rc ? rc : second_status(message);
}

static int is_as_said(int rc, int said)
{
    return said == ANY_ERROR ? rc < 0 : rc == said;
}

static void count_verdict(int rc)
{
    n_taken += rc >= 0;
    n_refused += rc < 0;
}

/* ---- straight to what reads messages ---- */

static struct pcshare_attachment *new_attachment(int *peerp)
{
    struct pcshare_attachment *a = calloc(1, sizeof(*a));
    int ends[2];

    REQUIRE(a && socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) == 0);
    a->references = 1;
    a->socket = ends[0];
    a->memfd = a->device = a->uffd = -1;
    a->link = LINK_HELLO;
    a->info.mode = (uint32_t)(one_in(2) ? 0 : random_below(4));
    if (one_in(2))
        memcpy(a->info.idstr, "block", 6);
    *peerp = ends[1];
    return a;
}

static void compare_info(const struct pcshare_attachment *a, const struct wire_welcome *w, int n_fds)
{
    struct stat ours, theirs;

    REQUIRE(a->info.used_length == w->used_length && a->info.map_length == w->map_length &&
            a->info.page_size == w->page_size && a->info.mode == w->mode && a->info.block_index == w->block_index);
    REQUIRE(strcmp(a->info.idstr, w->idstr) == 0 && (a->device >= 0) == (n_fds == 3));
    REQUIRE(fstat(a->memfd, &ours) == 0 && fstat(fds[FD_MEMFD], &theirs) == 0 && ours.st_ino == theirs.st_ino);
    if (w->flags & WIRE_WELCOME_ARRAY)
        REQUIRE(a->info.has_array && a->info.ndim == w->ndim && strcmp(a->info.dtype, w->dtype) == 0 &&
                memcmp(a->info.dims, w->dims, sizeof(w->dims)) == 0 && a->info.data_offset == w->data_offset);
    REQUIRE(pcshare_is_received(a, 0, a->info.used_length) == 0);
}

static int receive_and(struct pcshare_attachment *a,
                       int (*accept)(struct pcshare_attachment *, struct link_message *, int *), int *is_completep)
{
    struct link_message message;
    int rc;

    library_lock();
    rc = link_receive(a, &message);
    if (rc == 0)
        rc = accept(a, &message, is_completep);
    library_unlock();
    REQUIRE(rc != LINK_EMPTY && (rc == 0 || (rc < 0 && pcshare_error_text()[0])));
    count_verdict(rc);
    return rc;
}

static void maybe_mutate(struct message *message, uint64_t odds)
{
    if (one_in(odds)) {
        mutate(message);
        fuzz_inputs++;
    }
}

/* A WELCOME that comes again: it must be of the same block. */
static void run_again(struct pcshare_attachment *a, int peer, const struct message *first)
{
    struct message message = *first;
    struct wire_welcome before, now;
    int is_complete, said;

    maybe_mutate(&message, 2);
    said = second_words(&message, a->info.mode, a->info.idstr);
    memcpy(&before, first->bytes, sizeof(before));
    memcpy(&now, message.bytes, sizeof(now));
    if (said == 0 && (now.used_length != before.used_length || now.map_length != before.map_length ||
                      now.page_size != before.page_size || now.features != before.features ||
                      ((now.flags ^ before.flags) & WIRE_WELCOME_STRICT)))
        said = -ESTALE;
    else if (said == 0)
        said = second_status(&message);
    send_message(peer, &message);
    REQUIRE(is_as_said(receive_and(a, link_recognise_welcome, &is_complete), said));
    REQUIRE(a->view && a->info.block_index == BLOCK);
}

static void run_ack(struct pcshare_attachment *a, int peer)
{
    struct message message;
    struct wire_header header;
    int is_complete, said;

    make_message(&message, one_in(4) ? random_type() : WIRE_ACK);
    maybe_mutate(&message, 2);
    memcpy(&header, message.bytes, sizeof(header));
    said = second_receive(&message);
    if (said == 0 && header.type != WIRE_ACK)
        said = -EPROTO;
    send_message(peer, &message);
    REQUIRE(is_as_said(receive_and(a, link_accept_ack, &is_complete), said));
}

static void run_direct(void)
{
    struct message message;
    struct wire_welcome w;
    int peer, is_complete, said, rc;
    struct pcshare_attachment *a = new_attachment(&peer);

    make_message(&message, one_in(8) ? random_type() : WIRE_WELCOME);
    maybe_mutate(&message, 2);
    said = second_welcome(&message, a->info.mode, a->info.idstr);
    send_message(peer, &message);
    rc = receive_and(a, link_accept_welcome, &is_complete);
    REQUIRE(is_as_said(rc, said));
    memcpy(&w, message.bytes, sizeof(w));
    REQUIRE(rc < 0 || is_complete == ((w.flags & WIRE_WELCOME_COMPLETE) != 0));
    if (rc == 0) {
        compare_info(a, &w, (int)message.n_fds);
        for (uint64_t n = random_below(3); n > 0; n--)
            run_again(a, peer, &message);
        run_ack(a, peer);
    }
    library_lock();
    attachment_release(a, 0);
    library_unlock();
    attachment_put(a);
    close(peer);
}

/* ---- through the library, from a coordinator that listens ---- */

static struct {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct script script;
    int is_ready; /* a script waits to be played */
    int stops;
    int socket;
    pthread_t thread;
} server = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

static int hears_request(int fd)
{
    struct wire_attach attach; /* the longest that a helper sends */
    uint32_t n_fds = 1;
    int uffd = -1, length;

    do {
        length = fd_message_receive(fd, &attach, sizeof(attach), &uffd, &n_fds, 0);
        if (length > 0)
            fd_message_close(&uffd, n_fds);
        n_fds = 1;
    } while (length > 0 && attach.header.type != WIRE_REQUEST);
    return length > 0;
}

static void wait_for_end(int fd)
{
    struct wire_attach attach;
    uint32_t n_fds = 1;
    int uffd = -1;

    while (fd_message_receive(fd, &attach, sizeof(attach), &uffd, &n_fds, 0) > 0) {
        fd_message_close(&uffd, n_fds);
        n_fds = 1;
    }
}

static void play(int fd, const struct script *script)
{
    uint32_t i = 0;

    while (i < script->n_first)
        send_message(fd, &script->messages[i++]);
    if (i < script->n && hears_request(fd))
        while (i < script->n)
            send_message(fd, &script->messages[i++]);
    if (script->hangs_up)
        (void)shutdown(fd, SHUT_WR);
    wait_for_end(fd);
    close(fd);
}

static void *serve(void *unused)
{
    for (;;) {
        struct script script;
        int fd = accept4(server.socket, NULL, NULL, SOCK_CLOEXEC);

        pthread_mutex_lock(&server.lock);
        int stops = server.stops, plays = server.is_ready;
        script = server.script;
        server.is_ready = 0;
        pthread_mutex_unlock(&server.lock);
        if (fd >= 0 && plays)
            play(fd, &script);
        else if (fd >= 0)
            close(fd); /* one that looks for a coordinator again: there is none */
        pthread_mutex_lock(&server.lock);
        server.script.n = 0;
        pthread_cond_signal(&server.changed);
        pthread_mutex_unlock(&server.lock);
        if (stops)
            return unused;
    }
}

static void start_server(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};

    snprintf(address.sun_path, sizeof(address.sun_path), "%s", socket_path);
    server.socket = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    REQUIRE(server.socket >= 0);
    REQUIRE(bind(server.socket, (struct sockaddr *)&address, sizeof(address)) == 0 && listen(server.socket, 16) == 0);
    REQUIRE(pthread_create(&server.thread, NULL, serve, NULL) == 0);
}

/* What the helper comes to by these messages: an errno of attaching, or the state, and what ensure says. */
struct outcome {
    int attach_rc;
    int state;
    int ensure_rc;
};

/* The helper's one REQUEST: under which cookie it was sent last, and which is the oldest that an answer may have. */
struct second_request {
    uint32_t cookie;
    uint32_t cookie_first;
    int in_flight;
    int is_answered;
};

/* Whether the conversation goes on. */
static int second_done(struct outcome *outcome, struct second_request *request, const struct wire_done *done)
{
    if ((int32_t)(done->header.cookie - request->cookie_first) < 0)
        return 1; /* asked of another coordinator */
    if (request->in_flight == 0 || done->status > 0 || done->status < -ERRNO_MAX)
        return 0;
    request->in_flight--;
    if (!request->is_answered && done->header.cookie == request->cookie) {
        outcome->ensure_rc = done->status;
        request->is_answered = 1;
    }
    return 1;
}

/* Another coordinator serves: what is not answered is asked of it. */
static int second_takeover(struct outcome *outcome, struct second_request *request, const struct wire_ack *ack)
{
    if (ack->flags & WIRE_WELCOME_COMPLETE) {
        outcome->state = PCSHARE_COMPLETE;
        return 0;
    }
    request->cookie_first = request->cookie + 1;
    request->in_flight = !request->is_answered;
    request->cookie += !request->is_answered;
    return 1;
}

/* The messages after ATTACH has been answered, with one REQUEST under way. */
static void second_life(struct outcome *outcome, const struct script *script)
{
    struct second_request request = {.cookie = 1, .in_flight = 1};
    int goes_on = 1;

    outcome->state = PCSHARE_LOST; /* after the orphan timeout, unless something else comes first */
    for (uint32_t i = script->n_first; i < script->n && goes_on; i++) {
        union {
            struct wire_header header;
            struct wire_done done;
            struct wire_ack ack;
        } message;

        if (second_receive(&script->messages[i]) < 0)
            break;
        memcpy(&message, script->messages[i].bytes, sizeof(message));
        if (message.header.type == WIRE_DONE)
            goes_on = second_done(outcome, &request, &message.done);
        else if (message.header.type == WIRE_ACK)
            goes_on = second_takeover(outcome, &request, &message.ack);
        else
            goes_on = 0;
        if (message.header.type == WIRE_END)
            outcome->state = PCSHARE_COMPLETE;
    }
    if (!request.is_answered)
        outcome->ensure_rc = outcome->state == PCSHARE_COMPLETE ? 0 : -ECONNRESET;
}

static struct outcome second_attach(const struct script *script)
{
    struct outcome outcome = {.attach_rc = second_welcome(&script->messages[0], PCSHARE_RO, "block")};
    struct wire_welcome w;
    struct wire_ack ack;

    memcpy(&w, script->messages[0].bytes, sizeof(w));
    outcome.state = PCSHARE_COMPLETE;
    if (outcome.attach_rc || (w.flags & WIRE_WELCOME_COMPLETE))
        return outcome;
    outcome.attach_rc = second_receive(&script->messages[1]);
    memcpy(&ack, script->messages[1].bytes, sizeof(ack));
    if (outcome.attach_rc == 0 && ack.header.type != WIRE_ACK)
        outcome.attach_rc = -EPROTO;
    if (outcome.attach_rc || (ack.flags & WIRE_WELCOME_COMPLETE))
        return outcome;
    second_life(&outcome, script);
    return outcome;
}

/* WELCOME, ACK, then whatever; a mutated one among them. */
static void make_script(struct script *script)
{
    const uint64_t orphan_timeout_ms = ORPHAN_TIMEOUT_MS;
    uint32_t mutated;

    script->n = 3 + (uint32_t)random_below(SCRIPT_MAX - 2);
    script->n_first = 2;
    script->hangs_up = 1;
    for (uint32_t i = 0; i < script->n; i++)
        make_message(&script->messages[i], i == 0      ? WIRE_WELCOME
                                           : i == 1    ? WIRE_ACK
                                           : one_in(3) ? random_type()
                                                       : WIRE_DONE);
    mutated = one_in(3) ? (uint32_t)random_below(script->n) : 2 + (uint32_t)random_below(script->n - 2);
    mutate(&script->messages[mutated]);
    memcpy(script->messages[0].bytes + offsetof(struct wire_welcome, orphan_timeout_ms), &orphan_timeout_ms,
           sizeof(orphan_timeout_ms)); /* nobody waits for ever here */
    fuzz_inputs++;
}

static void await_state(const struct pcshare_attachment *a, int state)
{
    while (pcshare_state(a) != state) /* SIGALRM ends it */
        sched_yield();
    n_ends[state]++;
}

static void run_life(struct pcshare_attachment *a, const struct outcome *outcome)
{
    struct pcshare_progress progress;
    uint64_t lost_offset, lost_length;
    int rc;

    n_attached++;
    if (pcshare_state(a) == PCSHARE_ATTACHED || outcome->state != PCSHARE_COMPLETE || outcome->ensure_rc) {
        rc = pcshare_ensure(a, 0, PAGE, ATTACH_TIMEOUT_MS, &lost_offset, &lost_length);
        REQUIRE(rc == outcome->ensure_rc);
    }
    await_state(a, outcome->state);
    pcshare_get_progress(a, &progress);
    REQUIRE(progress.page_count == PAGES);
    (void)pcshare_prefetch(a, 0, PAGE);
}

static void run_attach(void)
{
    struct pcshare_attachment *a = NULL;
    struct script script;
    struct outcome outcome;
    int rc;

    make_script(&script);
    outcome = second_attach(&script);
    pthread_mutex_lock(&server.lock);
    server.script = script;
    server.is_ready = 1;
    pthread_mutex_unlock(&server.lock);
    rc = pcshare_attach(&a, socket_path, "block", PCSHARE_RO, ATTACH_TIMEOUT_MS, NULL, 0);
    REQUIRE(is_as_said(rc, outcome.attach_rc));
    count_verdict(rc);
    if (rc == 0)
        run_life(a, &outcome);
    pcshare_detach(a, 0);
    pthread_mutex_lock(&server.lock);
    while (server.script.n)
        pthread_cond_wait(&server.changed, &server.lock);
    pthread_mutex_unlock(&server.lock);
}

static void stop_server(void)
{
    pthread_mutex_lock(&server.lock);
    server.stops = 1;
    pthread_mutex_unlock(&server.lock);
    (void)shutdown(server.socket, SHUT_RDWR);
    pthread_join(server.thread, NULL);
    close(server.socket);
    unlink(socket_path);
}

int main(int argc, char **argv)
{
    fuzz_arguments(argc, argv);
    if (argc < 4) {
        fprintf(stderr, "usage: helper_fuzz COUNT SEED SOCKET\n");
        return 2;
    }
    socket_path = argv[3];
    make_things();
    start_server();
    fuzz_begin();
    while (fuzz_more()) {
        for (int i = 0; i < DIRECT_PER_ATTACH; i++)
            run_direct();
        run_attach();
    }
    stop_server();
    printf("%" PRIu64 " mutated messages: %" PRIu64 " taken, %" PRIu64 " refused; %" PRIu64
           " helpers attached, %" PRIu64 " to the end, %" PRIu64 " were lost\n",
           fuzz_inputs, n_taken, n_refused, n_attached, n_ends[PCSHARE_COMPLETE], n_ends[PCSHARE_LOST]);
    return 0;
}
