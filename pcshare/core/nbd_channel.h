/* nbd_channel: what moves behind a page channel of NBD: reads that wait, connections that carry them, who receives.
 *
 * One lock guards queues and connections; it is open over every system call. Who may receive from a connection is
 * decided by its epoll: events are one-shot and armed again when the receiver is through, so that several fault threads
 * can poll the demand connection. Private to the core; page_channel_nbd.h is how it looks from outside.
 */
#ifndef PCSHARE_NBD_CHANNEL_H
#define PCSHARE_NBD_CHANNEL_H

#include <pthread.h>
#include <stdint.h>

#include "nbd_connection.h"
#include "nbd_job.h"
#include "page_channel_nbd.h"

enum {
    NBD_KINDS = 2,
    NBD_EVENTS_MAX = 32,           /* not yet told; more losses than anybody can have connected meanwhile */
    NBD_STREAM_PIECES_NEAR = 1,    /* beside a demand: one that answers at once keeps CPUs busy that the demand needs */
    NBD_STREAM_PIECES_FAR = 4,     /* one that takes its time goes on at full speed */
    NBD_DEMANDS_OF_ONE_NEAR = 4,   /* pages of one helper: what a near server has to do is done one after the other */
    NBD_DEMANDS_OF_ONE_FAR = 16,   /* as many as nbdkit and qemu-nbd work on at once */
    NBD_DEMANDS_OF_CROWD_NEAR = 2, /* each wakes a thread, and so does each answer: those take the CPUs */
};
static const uint64_t nbd_wake_number = 0; /* in an epoll's data: the channel's own eventfd */

struct nbd_channel {
    struct page_channel channel;
    struct nbd_settings settings;
    uint32_t n_owners;
    pthread_mutex_t lock;
    pthread_cond_t jobs_ended;
    uint32_t n_ending; /* threads that tell requesters of their jobs' end; a free waits for them */
    pthread_t thread;
    int wake_fd;
    int epoll_fds[NBD_KINDS]; /* by kind of connection */
    int event_fd;
    int stopping; /* the thread is to end */
    int ended;
    int given_up; /* a positive errno */
    uint32_t last_number;
    struct nbd_connection *connections[NBD_KINDS];
    struct nbd_queue demands;
    struct nbd_queue streams;
    struct nbd_event events[NBD_EVENTS_MAX];
    uint32_t n_events;
    uint64_t round_trip_ns; /* of a demand, about the shortest of late; 0: not known */
};

/* With the lock held. Jobs that are over by it go to the list *overp, for nbd_channel_unlock. */
int nbd_channel_is_served(const struct nbd_channel *c);
struct nbd_queue *nbd_channel_queue_of(struct nbd_channel *c, const struct nbd_read *read);
/* Asks for what waits, as far as connections take it: demands first. */
void nbd_channel_pump(struct nbd_channel *c, struct nbd_job **overp);
/* 1: it was lost, and what it owed waits again. */
int nbd_channel_send(struct nbd_channel *c, struct nbd_connection *connection, struct nbd_job **overp);
/* What waits for a connection has failed. */
void nbd_channel_fail_queued(struct nbd_channel *c, int result, struct nbd_job **overp);
/* It is spoiled or of no more use, and nobody receives from it. */
void nbd_channel_drop(struct nbd_channel *c, struct nbd_connection *connection, struct nbd_job **overp);
void nbd_channel_lose_all(struct nbd_channel *c, int error, const char *text, struct nbd_job **overp);
/* Opens the lock; those who asked hear of what is over. */
void nbd_channel_unlock(struct nbd_channel *c, struct nbd_job *over);

/* Without the lock. */
void nbd_channel_handle_ready(struct nbd_channel *c, uint32_t kind, uint64_t number);
void nbd_channel_wake(const struct nbd_channel *c);
/* The thread: the primary connection and the clock, until the channel is stopping. */
void *nbd_channel_run(void *channel);

#endif
