/* keeper_store: see keeper_store.h. */
#define _GNU_SOURCE
#include "keeper_store.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "fd_message.h"
#include "keeper.h"
#include "uffd.h"

enum {
    EVENT_ROUNDS_MAX = 64,      /* reads of one uffd in a row, of UFFD_READ_MAX messages each */
    EVENTS_BYTES_MAX = 16 << 20 /* written down at most, about: who removes more waits for the next coordinator */
};

struct stored_fd {
    char name[STORE_NAME_MAX];
    int fd;
    int is_broken; /* its owner made this uffd blocking: whoever read it could wait for ever */
};

struct store {
    struct stored_fd *fds;
    uint32_t count;
    uint32_t capacity;
    int forward_fd; /* connected to the supervisor's store; -1: none */
};

/* What one datagram says. */
struct told {
    int stores;
    int removes;
    int flags; /* STORE_TOLD_* */
    char name[STORE_NAME_MAX];
};

/* ---- the table ---- */

static int grow(struct store *s)
{
    uint32_t capacity = s->capacity ? 2 * s->capacity : 64;
    struct stored_fd *larger;

    if (s->count == STORE_FDS_MAX)
        return -ENOSPC;
    larger = realloc(s->fds, capacity * sizeof(*larger));
    if (!larger)
        return -ENOMEM;
    s->fds = larger;
    s->capacity = capacity;
    return 0;
}

int store_put(struct store *s, const char *name, int fd)
{
    int rc = s->count == s->capacity || s->count == STORE_FDS_MAX ? grow(s) : 0;

    if (rc < 0) {
        close(fd);
        return rc;
    }
    struct stored_fd *one = &s->fds[s->count++];
    *one = (struct stored_fd){.fd = fd};
    snprintf(one->name, sizeof(one->name), "%s", name);
    return 0;
}

static void take_out(struct store *s, uint32_t index)
{
    memmove(&s->fds[index], &s->fds[index + 1], (s->count - index - 1) * sizeof(s->fds[0]));
    s->count--;
}

void store_remove(struct store *s, const char *name)
{
    for (uint32_t i = s->count; i-- > 0;) {
        if (strcmp(s->fds[i].name, name) == 0) {
            close(s->fds[i].fd);
            take_out(s, i);
        }
    }
}

int store_steal(struct store *s, const char *name)
{
    for (uint32_t i = 0; i < s->count; i++) {
        if (strcmp(s->fds[i].name, name) == 0) {
            int fd = s->fds[i].fd;
            take_out(s, i);
            return fd;
        }
    }
    return -1;
}

uint32_t store_count(const struct store *s)
{
    return s->count;
}

int store_fd(const struct store *s, uint32_t index)
{
    return s->fds[index].fd;
}

const char *store_name(const struct store *s, uint32_t index)
{
    return s->fds[index].name;
}

/* ---- a supervisor's store behind ours ---- */

static int connect_to(const char *address_text)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    size_t length = strlen(address_text);

    if (length == 0 || length >= sizeof(address.sun_path))
        return -1;
    memcpy(address.sun_path, address_text, length);
    if (address.sun_path[0] == '@')
        address.sun_path[0] = '\0';
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    socklen_t size = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + length);
    if (fd >= 0 && connect(fd, (struct sockaddr *)&address, size) < 0) {
        close(fd);
        return -1;
    }
    return fd;
}

/* It must not poll: a uffd may report an error at any time, and it would drop it. A supervisor that takes nothing is
 * no reason to stop: ours is the first line. */
static void forward(const struct store *s, char *text, size_t length, const struct told *told, const int *fds,
                    uint32_t n_fds)
{
    static const char no_poll[] = "\nFDPOLL=0";

    if (s->forward_fd < 0)
        return;
    if (told->stores) { /* there is room for it: store_receive */
        memcpy(text + length, no_poll, sizeof(no_poll) - 1);
        length += sizeof(no_poll) - 1;
    }
    (void)fd_message_send(s->forward_fd, text, length, fds, n_fds, MSG_DONTWAIT);
}

/* ---- datagrams ---- */

static void parse_line(struct told *told, const char *line)
{
    if (strcmp(line, "FDSTORE=1") == 0)
        told->stores = 1;
    else if (strcmp(line, "FDSTOREREMOVE=1") == 0)
        told->removes = 1;
    else if (strcmp(line, "READY=1") == 0)
        told->flags |= STORE_TOLD_READY;
    else if (strcmp(line, "STOPPING=1") == 0)
        told->flags |= STORE_TOLD_STOPPING;
    else if (strncmp(line, "FDNAME=", 7) == 0 && strlen(line + 7) < STORE_NAME_MAX)
        memcpy(told->name, line + 7, strlen(line + 7) + 1);
}

/* A copy is parsed; text stays as it came. */
static struct told parse(const char *text, size_t length)
{
    char copy[STORE_DATAGRAM_MAX + 1];
    struct told told = {.name = "stored"}; /* as systemd calls what has no name */
    char *rest = copy, *line;

    memcpy(copy, text, length);
    copy[length] = '\0';
    while ((line = strsep(&rest, "\n")))
        parse_line(&told, line);
    return told;
}

static void put_all(struct store *s, const struct told *told, int *fds, uint32_t n_fds)
{
    for (uint32_t i = 0; i < n_fds; i++) {
        int rc = told->stores ? store_put(s, told->name, fds[i]) : close(fds[i]);
        if (rc < 0)
            fprintf(stderr, "pcshare-keeper: %s is not kept for a restart: %s\n", told->name, strerror(-rc));
    }
}

int store_receive(struct store *s, int socket_fd)
{
    char text[STORE_DATAGRAM_MAX + sizeof("\nFDPOLL=0")];
    int fds[FD_MESSAGE_FDS_MAX];
    uint32_t n_fds = FD_MESSAGE_FDS_MAX;
    int length = fd_message_receive(socket_fd, text, STORE_DATAGRAM_MAX, fds, &n_fds, MSG_DONTWAIT);

    if (length == -EINTR)
        return 0;
    if (length == -EMSGSIZE) {
        fprintf(stderr, "pcshare-keeper: a message to the store is too long, or no fd is left (ulimit -n)\n");
        return 0;
    }
    if (length < 0)
        return length;
    struct told told = parse(text, (size_t)length);
    if (strcmp(told.name, STORE_NEXT_COMMAND) != 0) /* is for us alone, and out of date once it was started */
        forward(s, text, (size_t)length, &told, fds, n_fds);
    if (told.removes)
        store_remove(s, told.name);
    put_all(s, &told, fds, n_fds);
    return told.flags;
}

/* ---- events of writable helpers ---- */

static int is_writer(const struct stored_fd *one)
{
    return !one->is_broken && strncmp(one->name, STORE_WRITER_PREFIX, strlen(STORE_WRITER_PREFIX)) == 0;
}

static int find(const struct store *s, const char *name)
{
    for (uint32_t i = 0; i < s->count; i++)
        if (strcmp(s->fds[i].name, name) == 0)
            return s->fds[i].fd;
    return -1;
}

static int events_are_full(const struct store *s)
{
    struct stat file;

    return fstat(find(s, STORE_EVENTS), &file) == 0 && file.st_size >= EVENTS_BYTES_MAX;
}

uint32_t store_writers(const struct store *s, struct pollfd *polled)
{
    uint32_t n = 0;

    if (events_are_full(s))
        return 0;
    for (uint32_t i = 0; i < s->count; i++) {
        if (!is_writer(&s->fds[i]))
            continue;
        if (polled)
            polled[n] = (struct pollfd){.fd = s->fds[i].fd, .events = POLLIN};
        n++;
    }
    return n;
}

/* The file is in the store itself, so that the next coordinator gets it with the rest. */
static int events_file(struct store *s)
{
    int fd = find(s, STORE_EVENTS);

    if (fd >= 0)
        return fd;
    fd = memfd_create("pcshare-" STORE_EVENTS, MFD_CLOEXEC);
    return fd < 0 || store_put(s, STORE_EVENTS, fd) < 0 ? -1 : fd;
}

void store_prepare_events(struct store *s)
{
    (void)events_file(s); /* without memory for it: tried again when there is something to write */
}

static void write_down(struct store *s, const char *name, const struct uffd_message *message)
{
    struct keeper_event event = {.slot = (uint32_t)atoi(name + strlen(STORE_WRITER_PREFIX)), .message = *message};
    int fd = events_file(s);
    struct stat file;

    event.message.fork_fd = -1;
    if (fd >= 0 && fstat(fd, &file) == 0 && pwrite(fd, &event, sizeof(event), file.st_size) == (ssize_t)sizeof(event))
        return;
    fprintf(stderr, "pcshare-keeper: no memory to write down what %s removed\n", name);
}

static void read_writer(struct store *s, uint32_t index)
{
    struct uffd_message messages[UFFD_READ_MAX];
    char name[STORE_NAME_MAX];
    int n = 1;

    memcpy(name, s->fds[index].name, sizeof(name)); /* the table may move while it grows */
    for (int round = 0; round < EVENT_ROUNDS_MAX && n > 0; round++) {
        n = uffd_read(s->fds[index].fd, messages, UFFD_READ_MAX);
        for (int i = 0; i < n; i++) {
            if (messages[i].fork_fd >= 0)
                close(messages[i].fork_fd);
            if (messages[i].event != UFFD_MESSAGE_PAGEFAULT)
                write_down(s, name, &messages[i]);
        }
    }
    if (n < 0) /* the helper has ended, or is none that could be read */
        s->fds[index].is_broken = 1;
}

static int is_uffd(int fd)
{
    char path[64], target[64];

    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    ssize_t n = readlink(path, target, sizeof(target) - 1);
    if (n < 0)
        return 0;
    target[n] = '\0';
    return strcmp(target, "anon_inode:[userfaultfd]") == 0;
}

void store_read_writers(struct store *s)
{
    for (uint32_t i = 0; i < s->count; i++) {
        if (!is_writer(&s->fds[i]))
            continue;
        if (is_uffd(s->fds[i].fd) && fcntl(s->fds[i].fd, F_GETFL) & O_NONBLOCK)
            read_writer(s, i);
        else
            s->fds[i].is_broken = 1; /* its control socket, or made blocking: for the coordinator */
    }
}

/* ---- life ---- */

int store_new(struct store **sp, const char *forward_to)
{
    struct store *s = calloc(1, sizeof(*s));

    *sp = s;
    if (!s)
        return -ENOMEM;
    s->forward_fd = forward_to ? connect_to(forward_to) : -1;
    return 0;
}

void store_free(struct store *s)
{
    if (!s)
        return;
    for (uint32_t i = 0; i < s->count; i++)
        close(s->fds[i].fd);
    if (s->forward_fd >= 0)
        close(s->forward_fd);
    free(s->fds);
    free(s);
}
