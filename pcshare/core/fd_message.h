/* fd_message: one datagram with fds over a SEQPACKET socket, checked on arrival.
 *
 * Knows no protocol. Every received fd is close-on-exec and has an owner from the line where it exists; truncation of
 * bytes or of fds, and an fd count that was not announced, are errors that close what came.
 */
#ifndef PCSHARE_FD_MESSAGE_H
#define PCSHARE_FD_MESSAGE_H

#include <stddef.h>
#include <stdint.h>

enum { FD_MESSAGE_FDS_MAX = 4 };

/* Sends all or nothing, with dups of n_fds fds; never SIGPIPE. flags: MSG_DONTWAIT or 0. */
int fd_message_send(int socket_fd, const void *bytes, size_t length, const int *fds, uint32_t n_fds, int flags);
/* One message: its length, 0 when the peer hung up, -EMSGSIZE when it or its fds were truncated, or another negative
 * errno (-EAGAIN with MSG_DONTWAIT). *n_fdsp: in, how many fds fit; out, how many came, now the caller's. */
int fd_message_receive(int socket_fd, void *bytes, size_t capacity, int *fds, uint32_t *n_fdsp, int flags);
/* Closes fds[0..n) and marks them closed (-1). */
void fd_message_close(int *fds, uint32_t n_fds);

#endif
