/* page_channel_nbd: the transmission phase of NBD behind a page channel: many requests in flight, replies in any order.
 *
 * Connections come from outside, negotiated and idle (connect), and when one is lost that is told (next_event) and what
 * it owed is asked of the next. Demand goes over a connection of its own while there is one, which the fault threads
 * themselves read; the stream goes over the primary one, which a thread of the channel reads. Never negotiates, never
 * connects, never decides to give up.
 *
 * The channel is counted twice: whoever frees the page channel lets go of one, whoever supplies connections of the
 * other.
 */
#ifndef PCSHARE_PAGE_CHANNEL_NBD_H
#define PCSHARE_PAGE_CHANNEL_NBD_H

#include <stdint.h>
#include "page_channel.h"

enum {
    NBD_PRIMARY = 0, /* carries the stream, and demands while no demand connection lives */
    NBD_DEMAND = 1,
};

enum { NBD_EVENT_TEXT_MAX = 192 };

struct nbd_settings {
    uint64_t size;             /* of the export, bytes; what a request wants beyond it is an error */
    uint32_t alignment;        /* offsets and lengths of reads are multiples of it; the size's end apart */
    uint32_t length_max;       /* of one read */
    uint32_t preferred;        /* what the server reads at a time at best, bytes; 0: not known */
    uint32_t reply_timeout_ms; /* a connection that owes replies and says nothing for so long is lost */
    uint32_t server_count;     /* equivalents: a read that one refuses is asked of so many before it fails */
};

/* A connection was lost: it owed n_owed reads, which are kept. error is a positive errno. */
struct nbd_event {
    uint32_t connection;
    int32_t error;
    uint32_t n_owed;
    char text[NBD_EVENT_TEXT_MAX]; /* what happened, without the name of the server */
};

/* -EINVAL: a setting is zero, size is beyond what a file can have, or alignment is no power of two or larger than
 * length_max. */
int page_channel_nbd_new(struct page_channel **channelp, const struct nbd_settings *settings);
/* Lets go of the second count; no other call here after it. */
void page_channel_nbd_release(struct page_channel *channel);

/* A connection in its transmission phase: a stream socket on which nothing is outstanding. fd is consumed, also on
 * failure. *numberp names it in events. -EEXIST: one of that kind lives; -ESHUTDOWN: the channel was ended. */
int page_channel_nbd_connect(struct page_channel *channel, int fd, uint32_t kind, int structured_replies,
                             uint32_t *numberp);
/* Ends both connections as if they were lost, with this error and text in their events. */
void page_channel_nbd_disconnect(struct page_channel *channel, int error, const char *text);
/* error != 0: everything that waits, and what comes while no connection lives, fails with it. 0: things wait again. */
void page_channel_nbd_give_up(struct page_channel *channel, int error);
/* Nothing is wanted any more: what waits fails with -ECANCELED, what servers are answering is awaited for a moment,
 * then they are told and left. Twice is fine. */
void page_channel_nbd_end(struct page_channel *channel);

/* Readable when an event waits. */
int page_channel_nbd_event_fd(const struct page_channel *channel);
/* 1 and the event, or 0. */
int page_channel_nbd_next_event(struct page_channel *channel, struct nbd_event *event);

#endif
