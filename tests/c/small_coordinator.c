/* small_coordinator: the smallest coordinator that the helper's side can be tested against, and that misbehaves on
 * command.
 *
 *   small_coordinator SOCKET PAGES TAIL_BYTES PAGE_SIZE ORPHAN_MS [writable] [device]
 *
 * Reads commands from stdin, one a line, and prints one line for each thing that happens. The parent process keeps the
 * block: its memory, the writable mapping with the placing uffd, the status segment. The child serves, and may be
 * killed: "restart" starts another. It is no example of how to serve: one thread, one block, no limits.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>
#include "bitmap.h"
#include "fd_message.h"
#include "status_segment.h"
#include "uffd.h"
#include "wire.h"

enum { HELPERS_MAX = 64, LINE_MAX_BYTES = 256, REQUESTS_MAX = 512 };
#define FEATURES (UFFD_FEATURE_BIT_MISSING_SHMEM | UFFD_FEATURE_BIT_MISSING_HUGETLBFS | UFFD_FEATURE_BIT_THREAD_ID)

struct helper {
    int in_use;
    int socket;
    int uffd;
    uint32_t id;
    uint64_t client_addr;
};

struct request {
    uint32_t id; /* of the helper */
    uint32_t cookie;
    uint64_t offset;
    uint64_t length;
};

static struct {
    const char *socket_path;
    uint64_t page_size, page_count, map_length, used_length, orphan_ms;
    int writable, device;
    int memfd, helper_memfd, status_memfd, helper_status, placing_uffd;
    char *place;
    struct status_header *status;
    struct status_block *block;
    uint64_t *received;
} b;

static struct helper helpers[HELPERS_MAX];
static struct request requests[REQUESTS_MAX];
static int n_requests, listener = -1;
static uint32_t next_id;
static char wrong[32] = "nothing";
static enum { SERVE, HOLD, EAT } faults = SERVE;
static int answers_requests = 1;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static void *check(void *p, const char *what)
{
    if (p == MAP_FAILED)
        die(what);
    return p;
}

static int is_wrong(const char *kind)
{
    return strcmp(wrong, kind) == 0;
}

/* ---- the block, made by the parent ---- */

static int reopened(int fd)
{
    char path[64];

    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        die(path);
    return fd;
}

static void make_memory(void)
{
    unsigned huge = b.page_size > 4096 ? MFD_HUGETLB : 0;
    int user_mode_only;

    b.memfd = memfd_create("small", MFD_CLOEXEC | MFD_ALLOW_SEALING | huge);
    if (b.memfd < 0 || ftruncate(b.memfd, (off_t)b.map_length) < 0 || fchmod(b.memfd, b.writable ? 0600 : 0444) < 0)
        die("memfd");
    b.place = check(mmap(NULL, b.map_length, PROT_NONE, MAP_SHARED | MAP_NORESERVE, b.memfd, 0), "mmap");
    madvise(b.place, b.map_length, MADV_DONTFORK);
    b.placing_uffd = uffd_open(-1, &user_mode_only);
    if (uffd_api(b.placing_uffd, FEATURES, NULL, NULL) < 0 ||
        uffd_register(b.placing_uffd, (uintptr_t)b.place, b.map_length, UFFD_MODE_MISSING, NULL) < 0)
        die("placing uffd");
    mprotect(b.place, b.map_length, PROT_READ | PROT_WRITE);
    fcntl(b.memfd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | (b.writable ? 0 : F_SEAL_FUTURE_WRITE) | F_SEAL_SEAL);
    b.helper_memfd = b.writable ? b.memfd : reopened(b.memfd);
}

static void make_status(void)
{
    uint64_t head = sizeof(struct status_header) + sizeof(struct status_block) + sizeof(struct status_helper);
    uint64_t bitmap_at = (head + 4095) / 4096 * 4096, size = bitmap_at + bitmap_bytes(b.page_count);

    b.status_memfd = memfd_create("small-status", MFD_CLOEXEC);
    if (b.status_memfd < 0 || ftruncate(b.status_memfd, (off_t)size) < 0)
        die("status");
    b.status = check(mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, b.status_memfd, 0), "status");
    *b.status = (struct status_header){.magic = STATUS_MAGIC,
                                       .version = STATUS_VERSION,
                                       .size = head,
                                       .blocks_offset = sizeof(struct status_header),
                                       .helpers_offset = sizeof(struct status_header) + sizeof(struct status_block),
                                       .blocks_max = 1,
                                       .helpers_max = 1};
    b.block = (struct status_block *)(b.status + 1);
    *b.block = (struct status_block){.idstr = "data",
                                     .in_use = 1,
                                     .state = STATUS_STATE_RUNNING,
                                     .used_length = b.used_length,
                                     .page_size = b.page_size,
                                     .page_count = b.page_count,
                                     .bitmap_offset = bitmap_at};
    b.received = (uint64_t *)((char *)b.status + bitmap_at);
    b.helper_status = reopened(b.status_memfd);
}

/* ---- pages ---- */

/* What the tests expect: each 8 bytes of the block hold their number. */
static void fill(uint64_t *bytes, uint64_t page)
{
    for (uint64_t i = 0; i < b.page_size / 8; i++)
        bytes[i] = page * (b.page_size / 8) + i;
}

static void say(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    fflush(stdout);
}

static void send_plain(const struct helper *h, uint16_t type)
{
    struct wire_plain message = {.header = {WIRE_MAGIC, WIRE_VERSION, type, sizeof(message), 0}};

    fd_message_send(h->socket, &message, sizeof(message), NULL, 0, MSG_DONTWAIT);
}

static struct helper *helper_by_id(uint32_t id)
{
    for (int i = 0; i < HELPERS_MAX; i++)
        if (helpers[i].in_use && helpers[i].id == id)
            return &helpers[i];
    return NULL;
}

static void answer(const struct request *r, int status)
{
    struct wire_done done = {.header = {WIRE_MAGIC, WIRE_VERSION, WIRE_DONE, sizeof(done), r->cookie},
                             .status = status,
                             .offset = status ? r->offset : 0,
                             .length = status ? r->length : 0};
    struct helper *h = helper_by_id(r->id);

    if (h)
        fd_message_send(h->socket, &done, sizeof(done), NULL, 0, MSG_DONTWAIT);
}

/* Answers what is there; with status, everything. */
static void answer_requests(int status)
{
    int kept = 0;

    for (int i = 0; i < n_requests; i++) {
        uint64_t start = requests[i].offset / b.page_size,
                 end = (requests[i].offset + requests[i].length - 1) / b.page_size + 1;

        if (status || bitmap_next_clear(b.received, start, end) == end)
            answer(&requests[i], status);
        else
            requests[kept++] = requests[i];
    }
    n_requests = kept;
}

static void finish_block(void)
{
    __atomic_store_n(&b.block->state, STATUS_STATE_END, __ATOMIC_RELEASE);
    status_block_notify(b.block);
}

static void place(uint64_t page)
{
    static uint64_t staging[(2 << 20) / 8];
    uint64_t done;
    int rc;

    if (bitmap_test(b.received, page))
        return;
    fill(staging, page);
    rc = uffd_copy(b.placing_uffd, (uintptr_t)b.place + page * b.page_size, staging, b.page_size, &done);
    if (rc == -EEXIST)
        say("foreign %llu\n", (unsigned long long)page);
    else if (rc < 0)
        say("place-error %d\n", rc);
    bitmap_test_and_set(b.received, page);
    __atomic_fetch_add(&b.block->received_pages, 1, __ATOMIC_RELAXED);
    status_block_notify(b.block);
}

static void wake_everybody(void)
{
    for (int i = 0; i < HELPERS_MAX; i++)
        if (helpers[i].in_use && helpers[i].uffd >= 0)
            uffd_wake(helpers[i].uffd, helpers[i].client_addr, b.map_length);
    if (answers_requests)
        answer_requests(0);
}

static void place_range(uint64_t start, uint64_t end)
{
    for (uint64_t page = start; page < end; page++)
        place(page);
    wake_everybody();
}

/* ---- the hand-over, right and wrong ---- */

static void forget(struct helper *h)
{
    close(h->socket);
    if (h->uffd >= 0)
        close(h->uffd);
    h->in_use = 0;
}

static void send_error(const struct helper *h, int error, const char *text)
{
    struct wire_error message = {.header = {WIRE_MAGIC, WIRE_VERSION, WIRE_ERROR, sizeof(message), 0}, .error = error};

    message.header.version += is_wrong("refuse-version");
    strncpy(message.text, text, sizeof(message.text) - 1);
    fd_message_send(h->socket, &message, sizeof(message), NULL, 0, MSG_DONTWAIT);
}

static void spoil(struct wire_welcome *w)
{
    w->header.magic ^= is_wrong("magic");
    w->header.version += is_wrong("version");
    w->header.type = is_wrong("type") ? 77 : is_wrong("early-end") ? WIRE_END : w->header.type;
    w->header.length += is_wrong("header-length");
    w->page_size += is_wrong("page-size");
    w->map_length += is_wrong("map-length");
    w->used_length = is_wrong("used-length") ? w->map_length + 1 : w->used_length;
    w->block_index += is_wrong("block-index");
    w->mode = is_wrong("mode") ? 9 : w->mode;
    w->ndim = is_wrong("ndim") ? 33 : w->ndim;
    w->flags |= is_wrong("ndim") ? WIRE_WELCOME_ARRAY : 0;
    w->features |= is_wrong("features") ? 1ull << 60 : 0;
    if (is_wrong("name"))
        strcpy(w->idstr, "other");
    if (is_wrong("endless"))
        memset(w->idstr, 'x', sizeof(w->idstr));
    if (is_wrong("long-memory"))
        w->map_length = w->used_length = b.map_length + b.page_size;
}

static void send_welcome(struct helper *h, const struct wire_hello *hello)
{
    char bytes[sizeof(struct wire_welcome) + 8] = {0};
    struct wire_welcome *w = (struct wire_welcome *)bytes;
    int fds[4] = {b.helper_memfd, b.helper_status, b.device, b.device}, n_fds = b.device >= 0 ? 3 : 2;
    size_t length = sizeof(*w);

    *w = (struct wire_welcome){
        .header = {WIRE_MAGIC, WIRE_VERSION, WIRE_WELCOME, sizeof(*w), 0},
        .flags = (b.device >= 0 ? WIRE_WELCOME_DEVICE : 0) | (b.writable ? WIRE_WELCOME_WRITABLE : 0) |
                 (b.block->state == STATUS_STATE_END ? WIRE_WELCOME_COMPLETE : 0),
        .mode = hello->mode  ? hello->mode
                : b.writable ? WIRE_MODE_RW
                             : WIRE_MODE_RO,
        .used_length = b.used_length,
        .page_size = b.page_size,
        .map_length = b.map_length,
        .features = FEATURES,
        .orphan_timeout_ms = b.orphan_ms,
        .idstr = "data",
    };
    spoil(w);
    n_fds = is_wrong("no-fds")           ? 0
            : is_wrong("one-fd")         ? 1
            : is_wrong("four-fds")       ? 4
            : is_wrong("unannounced-fd") ? 3
                                         : n_fds;
    length += is_wrong("long") ? 8 : 0;
    length = is_wrong("short") ? length / 2 : is_wrong("tiny") ? 3 : length;
    for (int i = 2; i < n_fds; i++)
        if (fds[i] < 0)
            fds[i] = b.status_memfd;
    if (is_wrong("no-status"))
        fds[1] = b.memfd;
    if (is_wrong("pipe-memory"))
        fds[0] = 0;
    if (fd_message_send(h->socket, w, length, fds, (uint32_t)n_fds, MSG_DONTWAIT) < 0)
        say("welcome-error %d\n", errno);
}

static void hear_hello(struct helper *h, const struct wire_hello *hello)
{
    say("hello %u %s\n", h->id, hello->idstr);
    if (is_wrong("die-at-hello"))
        raise(SIGKILL);
    if (is_wrong("hang-up-at-hello"))
        forget(h);
    else if (is_wrong("refuse-hello")) {
        send_error(h, EPERM, "uid 7 may not attach; start the coordinator with --allow-uid 7");
        forget(h);
    } else if (is_wrong("refuse-silently")) {
        send_error(h, EPERM, "");
        forget(h);
    } else if (is_wrong("refuse-version")) {
        send_error(h, EPROTONOSUPPORT, "this coordinator speaks version 2 only");
        forget(h);
    } else if (is_wrong("mute-once")) {
        strcpy(wrong, "nothing");
    } else if (!is_wrong("mute"))
        send_welcome(h, hello);
}

static void hear_attach(struct helper *h, const struct wire_attach *attach, int uffd)
{
    struct wire_ack ack = {.header = {WIRE_MAGIC, WIRE_VERSION, WIRE_ACK, sizeof(ack), 0}, .helper_index = h->id};

    h->uffd = uffd;
    h->client_addr = attach->maps[0].client_addr;
    say("attach %u\n", h->id);
    if (is_wrong("die-at-attach"))
        raise(SIGKILL);
    if (is_wrong("hang-up-at-attach")) {
        forget(h);
        return;
    }
    if (is_wrong("refuse-attach")) {
        send_error(h, EBUSY, "too many helpers");
        forget(h);
        return;
    }
    if (is_wrong("mute-attach"))
        return;
    if (is_wrong("complete-at-ack")) {
        place_range(0, b.page_count);
        finish_block();
        ack.flags = WIRE_WELCOME_COMPLETE;
    }
    ack.header.version += is_wrong("ack-version");
    uffd_wake_all(h->uffd); /* before ACK: who waits then has waited for another coordinator */
    fd_message_send(h->socket, &ack, sizeof(ack), NULL, 0, MSG_DONTWAIT);
    if (is_wrong("die-after-ack"))
        raise(SIGKILL);
}

static void hear_request(struct helper *h, const struct wire_request *r)
{
    say("request %u %llu %llu %s\n", h->id, (unsigned long long)r->offset, (unsigned long long)r->length,
        r->flags & WIRE_REQUEST_WAIT ? "wait" : "hint");
    if ((r->flags & WIRE_REQUEST_WAIT) && n_requests < REQUESTS_MAX)
        requests[n_requests++] = (struct request){h->id, r->header.cookie, r->offset, r->length};
    if (faults == SERVE && answers_requests)
        place_range(r->offset / b.page_size, (r->offset + r->length - 1) / b.page_size + 1);
    else if (answers_requests)
        answer_requests(0);
}

static void hear(struct helper *h)
{
    union {
        struct wire_header header;
        struct wire_hello hello;
        struct wire_attach attach;
        struct wire_request request;
    } m;
    int fds[4];
    uint32_t n_fds = 4;
    int n = fd_message_receive(h->socket, &m, sizeof(m), fds, &n_fds, MSG_DONTWAIT);

    if (n == -EAGAIN)
        return;
    if (n <= 0 || m.header.type == WIRE_LEAVE) {
        say("%s %u\n", n <= 0 ? "hung-up" : "leave", h->id);
        forget(h);
    } else if (m.header.type == WIRE_HELLO) {
        hear_hello(h, &m.hello);
    } else if (m.header.type == WIRE_ATTACH && n_fds == 1) {
        hear_attach(h, &m.attach, fds[0]);
    } else if (m.header.type == WIRE_REQUEST) {
        hear_request(h, &m.request);
    } else {
        say("nonsense %u\n", h->id);
    }
}

static void read_faults(struct helper *h)
{
    struct uffd_message messages[UFFD_READ_MAX];
    int n = uffd_read(h->uffd, messages, UFFD_READ_MAX);

    for (int i = 0; i < n; i++) {
        uint64_t page = (messages[i].fault_addr - h->client_addr) / b.page_size;

        say("fault %u %llu\n", h->id, (unsigned long long)page);
        if (faults == SERVE)
            place_range(page, page + 1);
    }
}

/* ---- commands ---- */

static void for_all(void (*act)(const struct helper *, uint16_t), uint16_t type)
{
    for (int i = 0; i < HELPERS_MAX; i++)
        if (helpers[i].in_use)
            act(&helpers[i], type);
}

static void hang_up(const struct helper *h, uint16_t unused)
{
    (void)unused;
    shutdown(h->socket, SHUT_RDWR);
}

static void send_stray_done(const struct helper *h, uint16_t unused)
{
    (void)unused;
    answer(&(struct request){.id = h->id, .cookie = 12345}, 0);
}

static void command(const char *line)
{
    unsigned long long start, end;

    if (sscanf(line, "place %llu %llu", &start, &end) == 2)
        place_range(start, end);
    else if (sscanf(line, "wrong %31s", wrong) == 1)
        ;
    else if (sscanf(line, "lose %llu", &start) == 1)
        answer_requests(-(int)start);
    else if (strcmp(line, "sync") == 0)
        ;
    else if (strcmp(line, "serve") == 0)
        faults = SERVE;
    else if (strcmp(line, "hold") == 0)
        faults = HOLD;
    else if (strcmp(line, "eat") == 0)
        faults = EAT;
    else if (strcmp(line, "answer") == 0 || strcmp(line, "keep-silent") == 0)
        answers_requests = line[0] == 'a';
    else if (strcmp(line, "finish") == 0) /* the segment says END, nobody else does */
        finish_block();
    else if (strcmp(line, "end") == 0)
        for_all(send_plain, WIRE_END);
    else if (strcmp(line, "bye") == 0)
        for_all(send_plain, WIRE_BYE);
    else if (strcmp(line, "garbage") == 0)
        for_all(send_plain, 77);
    else if (strcmp(line, "out-of-turn") == 0)
        for_all(send_plain, WIRE_WELCOME);
    else if (strcmp(line, "lose-nothing") == 0)
        for_all(send_stray_done, 0);
    else if (strcmp(line, "hang-up") == 0)
        for_all(hang_up, 0);
    else if (strcmp(line, "deafen") == 0) {
        close(listener);
        listener = -1;
    } else
        say("unknown command %s\n", line);
    say("done %s\n", line);
}

/* Byte by byte: what follows the line belongs to whoever reads next, perhaps the parent. 0 at the end. */
static int read_line(char *line)
{
    int n = 0;

    while (n < LINE_MAX_BYTES - 1 && read(STDIN_FILENO, &line[n], 1) == 1) {
        if (line[n] == '\n') {
            line[n] = '\0';
            return 1;
        }
        n++;
    }
    return 0;
}

/* ---- serving ---- */

static void start_listening(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};

    strncpy(address.sun_path, b.socket_path, sizeof(address.sun_path) - 1);
    unlink(b.socket_path);
    listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (bind(listener, (struct sockaddr *)&address, sizeof(address)) < 0 || chmod(b.socket_path, 0666) < 0 ||
        listen(listener, 64) < 0)
        die(b.socket_path);
}

static void welcome_helper(void)
{
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);

    for (int i = 0; fd >= 0 && i < HELPERS_MAX; i++) {
        if (!helpers[i].in_use) {
            helpers[i] = (struct helper){1, fd, -1, ++next_id, 0};
            return;
        }
    }
}

static void serve_round(struct pollfd *polled)
{
    int n = 0;

    polled[n++] = (struct pollfd){.fd = STDIN_FILENO, .events = POLLIN};
    polled[n++] = (struct pollfd){.fd = listener, .events = POLLIN};
    for (int i = 0; i < HELPERS_MAX; i++) {
        polled[n++] = (struct pollfd){.fd = helpers[i].in_use ? helpers[i].socket : -1, .events = POLLIN};
        polled[n++] =
            (struct pollfd){.fd = helpers[i].in_use && faults != HOLD ? helpers[i].uffd : -1, .events = POLLIN};
    }
    poll(polled, (nfds_t)n, -1);
}

static int serve(void)
{
    struct pollfd polled[2 + 2 * HELPERS_MAX];
    char line[LINE_MAX_BYTES];

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    start_listening();
    say("serving %d\n", (int)getpid());
    for (;;) {
        serve_round(polled);
        if (polled[0].revents) {
            if (!read_line(line))
                return 0;
            command(line);
            continue; /* it may have closed what was polled */
        }
        if (polled[1].revents)
            welcome_helper();
        for (int i = 0; i < HELPERS_MAX; i++) {
            if (helpers[i].in_use && polled[2 + 2 * i].revents)
                hear(&helpers[i]);
            if (helpers[i].in_use && polled[3 + 2 * i].revents)
                read_faults(&helpers[i]);
        }
    }
}

/* While nobody serves: the next line is "restart", or the end. */
static int wait_for_restart(void)
{
    char line[LINE_MAX_BYTES];

    say("server-gone\n");
    return read_line(line) && strcmp(line, "restart") == 0;
}

int main(int argc, char **argv)
{
    int status = 0;
    pid_t child;

    if (argc < 6)
        return 2;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    signal(SIGPIPE, SIG_IGN);
    b.socket_path = argv[1];
    b.page_size = strtoull(argv[4], NULL, 10);
    b.page_count = strtoull(argv[2], NULL, 10);
    b.map_length = b.page_count * b.page_size;
    b.used_length = b.map_length - (b.page_size - strtoull(argv[3], NULL, 10)) % b.page_size;
    b.orphan_ms = strtoull(argv[5], NULL, 10);
    b.device = -1;
    for (int i = 6; i < argc; i++) {
        b.writable |= strcmp(argv[i], "writable") == 0;
        if (strcmp(argv[i], "device") == 0)
            b.device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    }
    make_memory();
    make_status();
    do {
        child = fork();
        if (child == 0)
            exit(serve());
        waitpid(child, &status, 0);
    } while (WIFSIGNALED(status) && wait_for_restart());
    unlink(b.socket_path);
    return 0;
}
