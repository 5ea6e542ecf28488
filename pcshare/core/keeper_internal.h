/* keeper_internal: what the keeper's own files share. Private to the executable.
 *
 *   keeper_main.c    what it is started for: the coordinator as its child, or a socket
 *   keeper_child.c   that child: started, heard, started again
 *   keeper_serve.c   its blocks
 *   keeper_store.c   the fds that a coordinator leaves to the next one
 */
#ifndef PCSHARE_KEEPER_INTERNAL_H
#define PCSHARE_KEEPER_INTERNAL_H

#include "keeper.h"

/* keeper_serve.c */
struct keeping;

enum { KEEPING_HUNG_UP = 1 };

int keeping_new(struct keeping **kp);
/* Drops every block. */
void keeping_free(struct keeping *k);
/* One request of whoever holds the other end, and its answer. 0; KEEPING_HUNG_UP; a negative errno: the other end is of
 * no use any more. */
int keeping_serve(struct keeping *k, int socket_fd);
/* Whether a coordinator has said HELLO; forgotten when it has gone. */
int keeping_is_greeted(const struct keeping *k);
void keeping_forget_coordinator(struct keeping *k);

/* keeper_child.c */
/* Runs the command as the only child until it has ended for good: its exit code, or 128 and the signal's number. */
int child_keep(char **command);

#endif
