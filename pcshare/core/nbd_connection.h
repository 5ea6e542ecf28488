/* nbd_connection: one connection in NBD's transmission phase: reads are asked, replies are taken apart.
 *
 * Knows its own reads in flight and nothing of queues, other connections or why something is read: whoever owns it
 * decides what to ask and what becomes of reads that were not answered. Fields are guarded by the owner's lock, what
 * the receiver is at by the right to receive. A peer that says anything the protocol does not allow is lost, not
 * guessed at.
 */
#ifndef PCSHARE_NBD_CONNECTION_H
#define PCSHARE_NBD_CONNECTION_H

#include <pthread.h>
#include <stdint.h>

#include "page_channel_nbd.h"

enum {
    NBD_IN_FLIGHT_MAX = 64, /* servers work on 16 or so at once; the rest waits where it can still be overtaken */
    NBD_REQUEST_LENGTH = 28,
    NBD_INPUT_MAX = 4096 + 64,   /* a page with its header, or the longest error text, in one go */
    NBD_HEADER_LENGTH = 28,      /* of a data chunk: what is read ahead of a long reply */
    NBD_REPLY_SPANS_MAX = 16,    /* separate pieces of one reply at any time; servers send them in order */
    NBD_RECEIVE_CALLS_MAX = 256, /* in a row, before others are looked at */
};

struct nbd_job;

struct nbd_span {
    uint32_t start;
    uint32_t end;
};

/* One read on the wire. */
struct nbd_read {
    struct nbd_read *next; /* the owner's while it is not in flight */
    struct nbd_job *job;
    uint64_t offset;
    uint32_t length;
    uint32_t refusals; /* servers that answered it with an error */
    uint8_t *bytes;
    uint64_t asked_ns;
    /* Of the reply. */
    int error; /* positive errno */
    uint32_t n_spans;
    struct nbd_span spans[NBD_REPLY_SPANS_MAX];
};

struct nbd_connection {
    uint32_t number;
    uint32_t kind; /* NBD_PRIMARY, NBD_DEMAND */
    int fd;
    int structured_replies;
    int users;     /* threads that hold it outside the lock, and its owner */
    int receiving; /* somebody has the right to receive */
    int sending;   /* somebody is sending: what is added to output goes with it */
    int blocked;   /* the socket takes no more for now */
    int error;     /* it is lost, and why; a positive errno */
    char text[NBD_EVENT_TEXT_MAX];
    uint64_t heard_ns;
    uint32_t n_in_flight;
    struct nbd_read *in_flight[NBD_IN_FLIGHT_MAX];
    uint32_t generations[NBD_IN_FLIGHT_MAX]; /* high half of the cookie: an old reply finds no new read */
    uint32_t output_length;
    uint8_t output[(NBD_IN_FLIGHT_MAX + 1) * NBD_REQUEST_LENGTH];
    /* The receiver's. */
    uint8_t input[NBD_INPUT_MAX];
    uint32_t input_start;
    uint32_t input_end;
    struct nbd_read *filling; /* its data comes next */
    uint8_t *fill;
    uint32_t fill_left;
    int ends_reply;
};

enum {
    NBD_RECEIVED_ALL = 0, /* nothing more for now */
    NBD_RECEIVED_SOME = 1,
    NBD_RECEIVED_READ = 2, /* *readp was answered: bytes, or error */
};

/* fd is consumed, also on failure. It is made non-blocking. */
int nbd_connection_new(struct nbd_connection **connectionp, int fd, uint32_t kind, int structured_replies);
void nbd_connection_free(struct nbd_connection *connection);

/* Under the lock: whether one more fits, puts one into the output, puts the farewell there. */
int nbd_connection_has_room(const struct nbd_connection *connection);
void nbd_connection_ask(struct nbd_connection *connection, struct nbd_read *read, uint64_t now_ns);
void nbd_connection_say_goodbye(struct nbd_connection *connection);
/* Takes everything that is in flight out, in a list. */
struct nbd_read *nbd_connection_take_all(struct nbd_connection *connection);
/* Notes why it is lost, unless that is noted. */
void nbd_connection_spoil(struct nbd_connection *connection, int error, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* Sends what is in the output, with the lock open meanwhile. Called and returns with the lock held. */
void nbd_connection_send(struct nbd_connection *connection, pthread_mutex_t *lock);
/* By who has the right to receive, without the lock; takes it for short. One step: NBD_RECEIVED_*; a negative errno: it
 * is lost, and spoiled. */
int nbd_connection_receive(struct nbd_connection *connection, pthread_mutex_t *lock, struct nbd_read **readp);
/* Likewise: whether a step can be made with what was received before. */
int nbd_connection_has_input(const struct nbd_connection *connection);

#endif
