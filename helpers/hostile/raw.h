/* raw: the control protocol by hand, a step a function, so that a hostile helper can leave the path at any of them.
 *
 * Checks next to nothing and cleans up nothing: the program ends soon and the kernel closes what is open. Every fact is
 * a field, free to be made wrong before the next step.
 */
#ifndef PCSHARE_HOSTILE_RAW_H
#define PCSHARE_HOSTILE_RAW_H

#include <errno.h>
#include <poll.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>
#include "status_segment.h"
#include "uffd.h"
#include "wire.h"

enum {
    RAW_ANSWER_TIMEOUT_MS = 10000, /* an answer takes milliseconds, also while others misbehave */
    RAW_MESSAGE_MAX = 4096,        /* bytes; the largest message of the protocol, and room to see that one is longer */
};

/* One connection and what came of it. -1: no such fd (yet). */
struct raw {
    int control, memfd, status_fd, device_fd, uffd;
    struct wire_welcome welcome;
    struct wire_ack ack;
    uint8_t *data;                      /* the block, mapped and registered */
    const struct status_header *status; /* the status segment */
};

enum { FDS_SENT_MAX = 32 }; /* more than the protocol knows: to see what becomes of too many */

/* A header that is right for a message of this type and length. */
static struct wire_header raw_header(uint16_t type, uint32_t length)
{
    return (struct wire_header){.magic = WIRE_MAGIC, .version = WIRE_VERSION, .type = type, .length = length};
}

static struct wire_hello raw_hello_message(const char *idstr, uint32_t mode)
{
    struct wire_hello hello = {
        .header = raw_header(WIRE_HELLO, sizeof hello),
        .version_min = WIRE_VERSION,
        .version_max = WIRE_VERSION,
        .mode = mode,
    };
    strncpy(hello.idstr, idstr, sizeof hello.idstr - 1);
    return hello;
}

/* 0 or a negative errno, all of these. */
static int raw_connect(struct raw *r, const char *socket_path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct timeval patience = {.tv_sec = RAW_ANSWER_TIMEOUT_MS / 1000};
    *r = (struct raw){.control = -1, .memfd = -1, .status_fd = -1, .device_fd = -1, .uffd = -1};
    if (strlen(socket_path) >= sizeof address.sun_path)
        return -ENAMETOOLONG;
    strcpy(address.sun_path, socket_path);
    r->control = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (r->control < 0 || setsockopt(r->control, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience))
        return -errno;
    return connect(r->control, (struct sockaddr *)&address, sizeof address) ? -errno : 0;
}

static int raw_send(int control, const void *bytes, size_t length, const int *fds, uint32_t n_fds)
{
    union {
        char bytes[CMSG_SPACE(FDS_SENT_MAX * sizeof(int))];
        struct cmsghdr align;
    } room = {.bytes = {0}};
    struct iovec part = {.iov_base = (void *)(uintptr_t)bytes, .iov_len = length};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (n_fds) {
        message.msg_control = room.bytes;
        message.msg_controllen = CMSG_SPACE(n_fds * sizeof(int));
        struct cmsghdr *beside = CMSG_FIRSTHDR(&message);
        beside->cmsg_level = SOL_SOCKET;
        beside->cmsg_type = SCM_RIGHTS;
        beside->cmsg_len = CMSG_LEN(n_fds * sizeof(int));
        memcpy(CMSG_DATA(beside), fds, n_fds * sizeof(int));
    }
    return sendmsg(control, &message, MSG_NOSIGNAL) < 0 ? -errno : 0;
}

/* Bytes received, 0 if the other side hung up, or a negative errno (-ETIMEDOUT). n_fdsp may be NULL. */
static int raw_receive(int control, void *bytes, size_t size, int *fds, uint32_t *n_fdsp, int timeout_ms)
{
    union {
        char bytes[CMSG_SPACE(WIRE_FDS_MAX * sizeof(int))];
        struct cmsghdr align;
    } room;
    struct iovec part = {.iov_base = bytes, .iov_len = size};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = room.bytes, .msg_controllen = sizeof room};
    struct pollfd waiting = {.fd = control, .events = POLLIN};
    int n = poll(&waiting, 1, timeout_ms);
    if (n <= 0)
        return n ? -errno : -ETIMEDOUT;
    n = (int)recvmsg(control, &message, MSG_CMSG_CLOEXEC);
    if (n < 0 && errno == ECONNRESET) /* it hung up before it had read all of ours; its last words come after that */
        n = (int)recvmsg(control, &message, MSG_CMSG_CLOEXEC);
    if (n < 0)
        return errno == ECONNRESET ? 0 : -errno;
    if (n_fdsp)
        *n_fdsp = 0;
    struct cmsghdr *beside = CMSG_FIRSTHDR(&message);
    if (beside && fds && n_fdsp) {
        *n_fdsp = (uint32_t)((beside->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        memcpy(fds, CMSG_DATA(beside), *n_fdsp * sizeof(int));
    }
    return n;
}

static int map_status(struct raw *r)
{
    struct stat file;
    if (fstat(r->status_fd, &file))
        return -errno;
    void *status = mmap(NULL, (size_t)file.st_size, PROT_READ, MAP_SHARED, r->status_fd, 0);
    r->status = status == MAP_FAILED ? NULL : status;
    return r->status ? 0 : -errno;
}

/* HELLO, and WELCOME with its fds. */
static int raw_hello(struct raw *r, const char *idstr, uint32_t mode)
{
    struct wire_hello hello = raw_hello_message(idstr, mode);
    int fds[WIRE_FDS_MAX], rc = raw_send(r->control, &hello, sizeof hello, NULL, 0);
    uint32_t n_fds;
    if (rc)
        return rc;
    rc = raw_receive(r->control, &r->welcome, sizeof r->welcome, fds, &n_fds, RAW_ANSWER_TIMEOUT_MS);
    if (rc < 0)
        return rc;
    if (rc != (int)sizeof r->welcome || r->welcome.header.type != WIRE_WELCOME || n_fds < 2)
        return -EPROTO;
    r->memfd = fds[0];
    r->status_fd = fds[1];
    r->device_fd = n_fds > 2 ? fds[2] : -1;
    return map_status(r);
}

/* Maps the block PROT_NONE and opens a uffd with these features, no more. */
static int raw_map(struct raw *r)
{
    int shared = r->welcome.mode == WIRE_MODE_RW;
    int flags = (shared ? MAP_SHARED : MAP_PRIVATE) | MAP_NORESERVE;
    void *data = mmap(NULL, r->welcome.map_length, PROT_NONE, flags, r->memfd, 0);
    if (data == MAP_FAILED)
        return -errno;
    r->data = data;
    madvise(data, r->welcome.map_length, MADV_DONTDUMP);
    madvise(data, r->welcome.map_length, MADV_DONTFORK);
    madvise(data, r->welcome.map_length, MADV_NOHUGEPAGE);
    return 0;
}

static int raw_open_uffd(struct raw *r, uint64_t features)
{
    int user_mode_only;
    r->uffd = uffd_open(r->device_fd, &user_mode_only);
    return r->uffd < 0 ? r->uffd : uffd_api(r->uffd, features, NULL, NULL);
}

/* Registers the mapping and makes it readable, and writable where the mode says so. */
static int raw_register(struct raw *r)
{
    int protection = PROT_READ | (r->welcome.mode == WIRE_MODE_RO ? 0 : PROT_WRITE);
    uint64_t mode = UFFD_MODE_MISSING | (r->welcome.flags & WIRE_WELCOME_STRICT ? UFFD_MODE_MINOR : 0);
    int rc = uffd_register(r->uffd, (uintptr_t)r->data, r->welcome.map_length, mode, NULL);
    if (rc)
        return rc;
    return mprotect(r->data, r->welcome.map_length, protection) ? -errno : 0;
}

/* An ATTACH that is right: the whole block in one map. */
static struct wire_attach raw_attach_message(const struct raw *r)
{
    return (struct wire_attach){
        .header = raw_header(WIRE_ATTACH, sizeof(struct wire_attach)),
        .n_maps = 1,
        .maps = {{.client_addr = (uintptr_t)r->data, .offset = 0, .length = r->welcome.map_length}},
    };
}

/* ATTACH and ACK. */
static int raw_attach(struct raw *r)
{
    struct wire_attach attach = raw_attach_message(r);
    int rc = raw_send(r->control, &attach, sizeof attach, &r->uffd, 1);
    if (rc)
        return rc;
    rc = raw_receive(r->control, &r->ack, sizeof r->ack, NULL, NULL, RAW_ANSWER_TIMEOUT_MS);
    if (rc < 0)
        return rc;
    return rc == (int)sizeof r->ack && r->ack.header.type == WIRE_ACK ? 0 : -EPROTO;
}

/* REQUEST with WAIT for these bytes, and its DONE: the status that it brings. */
static int raw_ensure(struct raw *r, uint64_t offset, uint64_t length)
{
    static uint32_t cookie;
    struct wire_request request = {
        .header = raw_header(WIRE_REQUEST, sizeof request),
        .flags = WIRE_REQUEST_WAIT,
        .offset = offset,
        .length = length,
    };
    union {
        struct wire_done done;
        uint8_t room[RAW_MESSAGE_MAX];
    } answer;
    request.header.cookie = ++cookie;
    int rc = raw_send(r->control, &request, sizeof request, NULL, 0);
    while (rc >= 0) {
        rc = raw_receive(r->control, &answer, sizeof answer, NULL, NULL, RAW_ANSWER_TIMEOUT_MS);
        if (rc == 0)
            return -ECONNRESET;
        struct wire_header *header = &answer.done.header;
        if (rc == (int)sizeof answer.done && header->type == WIRE_DONE && header->cookie == cookie)
            return answer.done.status;
    }
    return rc;
}

/* 0: ERROR came (its text is copied) or it hung up; 1: it answered as if all were well; -ETIMEDOUT: silence. */
static int raw_refusal(int control, char *text, size_t size, int timeout_ms)
{
    union {
        struct wire_error error;
        uint8_t room[RAW_MESSAGE_MAX];
    } answer;
    text[0] = 0;
    int rc = raw_receive(control, &answer, sizeof answer, NULL, NULL, timeout_ms);
    if (rc <= 0)
        return rc;
    if (rc != (int)sizeof answer.error || answer.error.header.type != WIRE_ERROR)
        return 1;
    strncpy(text, answer.error.text, size - 1);
    text[size - 1] = 0;
    return 0;
}

static const struct status_block *raw_status_block(const struct raw *r)
{
    const uint8_t *segment = (const uint8_t *)r->status;
    return (const struct status_block *)(segment + r->status->blocks_offset) + r->welcome.block_index;
}

static const struct status_helper *raw_status_helper(const struct raw *r)
{
    const uint8_t *segment = (const uint8_t *)r->status;
    return (const struct status_helper *)(segment + r->status->helpers_offset) + r->ack.helper_index;
}

static int raw_is_received(const struct raw *r, uint64_t page)
{
    const uint64_t *received = (const uint64_t *)((const uint8_t *)r->status + raw_status_block(r)->bitmap_offset);
    return __atomic_load_n(&received[page / 64], __ATOMIC_ACQUIRE) >> page % 64 & 1;
}

#endif
