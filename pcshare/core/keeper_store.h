/* keeper_store: the fds that a coordinator leaves to the one after it, by name.
 *
 * Speaks what systemd's fd store speaks: datagrams of KEY=VALUE lines with fds beside them (FDSTORE=1 with FDNAME=,
 * FDSTOREREMOVE=1 with FDNAME=, READY=1, STOPPING=1), and gives the fds back as LISTEN_FDS. A datagram that was sent is
 * as good as stored: it is read before the sender's death is looked at. Knows no block and looks into no fd, but for
 * the uffds of writable helpers: while no coordinator is there it reads their events, for which madvise and munmap
 * wait in the helper, and writes them down for the next one.
 */
#ifndef PCSHARE_KEEPER_STORE_H
#define PCSHARE_KEEPER_STORE_H

#include <stdint.h>

struct pollfd;
struct store;

enum {
    STORE_FDS_MAX = 16384, /* two of each helper there may be, a few of each block, and some */
    STORE_NAME_MAX = 64,   /* bytes of a name, with the final NUL */
    STORE_DATAGRAM_MAX = 4096,
};

/* What store_receive was told, beside fds. */
enum {
    STORE_TOLD_READY = 1,
    STORE_TOLD_STOPPING = 2,
};

/* Names that mean something here. */
#define STORE_NEXT_COMMAND "next" /* a file: the command that shall serve from now on, each word with its NUL */
#define STORE_EVENTS "events"     /* a file: struct keeper_event after struct keeper_event */
#define STORE_WRITER_PREFIX "rw." /* before the slot of a writable helper: its control socket and its uffd */

/* forward_to: a socket's address as in NOTIFY_SOCKET, of a supervisor that is to keep the same; NULL: none. */
int store_new(struct store **sp, const char *forward_to);
void store_free(struct store *s);
/* One datagram: STORE_TOLD_*, or 0. -EAGAIN: none waits. What is wrong with one is said on stderr and forgotten. */
int store_receive(struct store *s, int socket_fd);
/* fd is consumed. -ENOSPC: it is full. */
int store_put(struct store *s, const char *name, int fd);
void store_remove(struct store *s, const char *name);
uint32_t store_count(const struct store *s);
int store_fd(const struct store *s, uint32_t index);
const char *store_name(const struct store *s, uint32_t index);
/* The first fd of that name, the caller's from now on; -1: none. */
int store_steal(struct store *s, const char *name);
/* How many fds there are whose events must be read while no coordinator is there; polled (NULL: only counted) gets
 * them. */
uint32_t store_writers(const struct store *s, struct pollfd *polled);
/* Reads them, once round, and writes down what was an event. */
void store_read_writers(struct store *s);
/* Makes the file for that, so that a coordinator which is started now gets it with the rest. */
void store_prepare_events(struct store *s);

#endif
