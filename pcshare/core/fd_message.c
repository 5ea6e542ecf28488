#define _GNU_SOURCE
#include "fd_message.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

union control_buffer {
    char bytes[CMSG_SPACE(sizeof(int) * FD_MESSAGE_FDS_MAX)];
    struct cmsghdr align;
};

int fd_message_send(int socket_fd, const void *bytes, size_t length, const int *fds, uint32_t n_fds, int flags)
{
    union control_buffer control;
    struct iovec vector = {.iov_base = (void *)bytes, .iov_len = length};
    struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1};
    ssize_t sent;

    if (n_fds > FD_MESSAGE_FDS_MAX)
        return -EINVAL;
    if (n_fds > 0) {
        memset(&control, 0, sizeof(control));
        message.msg_control = control.bytes;
        message.msg_controllen = CMSG_SPACE(sizeof(int) * n_fds);
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof(int) * n_fds);
        memcpy(CMSG_DATA(header), fds, sizeof(int) * n_fds);
    }
    do
        sent = sendmsg(socket_fd, &message, flags | MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR && !(flags & MSG_DONTWAIT));
    return sent < 0 ? -errno : 0;
}

void fd_message_close(int *fds, uint32_t n_fds)
{
    for (uint32_t i = 0; i < n_fds; i++) {
        if (fds[i] >= 0)
            close(fds[i]);
        fds[i] = -1;
    }
}

static uint32_t take_fds(struct msghdr *message, int *fds, uint32_t capacity, int *overflowp)
{
    uint32_t n = 0;

    for (struct cmsghdr *header = CMSG_FIRSTHDR(message); header; header = CMSG_NXTHDR(message, header)) {
        if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS)
            continue;
        size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(header) + i * sizeof(int), sizeof(int));
            if (n < capacity) {
                fds[n++] = fd;
            } else {
                close(fd);
                *overflowp = 1;
            }
        }
    }
    return n;
}

int fd_message_receive(int socket_fd, void *bytes, size_t capacity, int *fds, uint32_t *n_fdsp, int flags)
{
    union control_buffer control;
    struct iovec vector = {.iov_base = bytes, .iov_len = capacity};
    struct msghdr message = {
        .msg_iov = &vector, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof(control.bytes)};
    uint32_t room = n_fdsp ? *n_fdsp : 0;
    int overflow = 0;
    ssize_t got = recvmsg(socket_fd, &message, flags | MSG_CMSG_CLOEXEC);

    if (n_fdsp)
        *n_fdsp = 0;
    if (got < 0)
        return -errno;
    uint32_t n = take_fds(&message, fds, room, &overflow);
    if (overflow || (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC))) {
        fd_message_close(fds, n);
        return -EMSGSIZE;
    }
    if (n_fdsp)
        *n_fdsp = n;
    return (int)got;
}
