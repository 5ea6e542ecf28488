/* incoming: the memory of a migration stream: its blocks, its page records, what is asked on the return path.
 *
 * One struct incoming is one migration, however many connections it takes. Its blocks are stored into in place before
 * LISTEN (nobody else has them: the last copy of a page counts) and placed atomically afterwards, through the fault
 * threads; it is a page channel of each of them, one whose source pushes. Knows page records and the framing of RAM
 * sections; headers, commands, device state and states are Python's. Never trusts a byte: what the format does not
 * allow is -EPROTO, with where it stands and what it is.
 *
 * Some facts about the stream that shaped it:
 *  - in post-copy nothing is sent twice: a page that was received is never given up, also when the connection breaks
 *    or turns to garbage right after it;
 *  - a host page's target pages come one after the other on one connection, but sections end in between; what a broken
 *    connection leaves half is dropped;
 *  - the source names a block only where it differs from the last record's of the connection, and so do we in requests.
 *
 * Order of a block's life: incoming_add_block, records and incoming_discard; at LISTEN incoming_unmap_block,
 * incoming_page_channel, fault_threads_add_block, incoming_listen_block; records again.
 */
#ifndef PCSHARE_INCOMING_H
#define PCSHARE_INCOMING_H

#include <stdint.h>

#include "fault_thread.h"
#include "page_channel.h"
#include "ramblock.h"

enum {
    INCOMING_BLOCKS_MAX = STATUS_BLOCKS_MAX,
    INCOMING_IDSTR_MAX = 255,           /* a name's length is one byte */
    INCOMING_PAYLOAD_MAX = 512,         /* of a message on the return path; the format's own limit */
    INCOMING_TARGET_PAGE_MIN = 1 << 10, /* the flags of a record lie in the bits below */
    INCOMING_TEXT_MAX = 256,
    INCOMING_FOREVER = -1, /* a timeout_ms */
};

/* Whose fault an error is. */
enum {
    INCOMING_FAULT_NONE = 0,
    INCOMING_FAULT_LINK = 1,  /* the connection: another one may go on */
    INCOMING_FAULT_PEER = 2,  /* -EPROTO, -EPROTONOSUPPORT */
    INCOMING_FAULT_LOCAL = 3, /* memory, placing, or stopped (-ECANCELED) */
};

/* Why incoming_stream_records came back without an error. */
enum {
    INCOMING_END_OF_PAYLOAD = 0,
    INCOMING_SECTION = 1, /* a section that is no PART or END of RAM begins; its type byte is read already */
    INCOMING_EOF = 2,     /* the peer closed between two records or sections */
};

enum { INCOMING_TIMED_OUT = 1 };

/* Types of section that incoming_stream_records knows; the format's own numbers. */
enum {
    INCOMING_SECTION_NONE = 0, /* bare records: up to the end-of-payload mark */
    INCOMING_SECTION_PART = 2,
    INCOMING_SECTION_END = 3,
};

struct incoming_result {
    uint32_t fault;        /* INCOMING_FAULT_* */
    uint32_t section_type; /* of INCOMING_SECTION */
    int saw_end;           /* an END section of RAM has ended: no more records come */
    uint64_t offset;       /* of the byte of the stream (from 0) where what is wrong, or what comes next, begins */
    char text[INCOMING_TEXT_MAX];
};

struct incoming_counters {
    uint64_t bytes;      /* read from the connection */
    uint64_t data_pages; /* target pages */
    uint64_t zero_pages;
    uint64_t fill_pages;   /* a zero record with another byte */
    uint64_t repeat_pages; /* came again after LISTEN, and were left alone */
    uint64_t sections;     /* of RAM */
    uint64_t places;       /* calls of fault_threads_place */
};

struct incoming_progress {
    uint64_t target_pages;
    uint64_t received_pages; /* target pages, zero ones included; of now */
};

struct incoming;
struct incoming_stream;

/* -EINVAL: no power of two from INCOMING_TARGET_PAGE_MIN to the host's page size. */
int incoming_new(struct incoming **ip, uint32_t target_page_size);
/* Lets go of the owner's count; streams and page channels have theirs. Nothing is sent any more. */
void incoming_free(struct incoming *in);

/* A block: memfd is duplicated and must be unsealed and at least used_length long. -EINVAL: page_size is no power of
 * two, or smaller than the target page, or used_length is no multiple of it; -EEXIST: the name; -ENAMETOOLONG;
 * -ENOSPC: INCOMING_BLOCKS_MAX; -ENOMEM: also of huge pages. */
int incoming_add_block(struct incoming *in, const char *idstr, uint64_t used_length, uint64_t page_size, int memfd,
                       uint32_t *indexp);
/* A block that is past LISTEN, of a migration that a coordinator before this one took in: received has a bit for each
 * of its host pages that is in memory, and what lies outside of extents (bytes) came as zeros. It is as after
 * incoming_unmap_block. Errors as of incoming_add_block. */
int incoming_take_block(struct incoming *in, const char *idstr, uint64_t used_length, uint64_t page_size,
                        const uint64_t *received, const struct ramblock_extent *extents, uint64_t n_extents,
                        uint32_t *indexp);
/* Forgets a range, bytes, before LISTEN. -ENOENT: no such block; -ERANGE: it ends beyond the block; -EINVAL: it is
 * empty or not in whole host pages; -EBUSY: too late. */
int incoming_discard(struct incoming *in, const char *idstr, uint64_t start, uint64_t length);
/* -ENOENT. */
int incoming_progress(struct incoming *in, uint32_t index, struct incoming_progress *progress);

/* LISTEN, first half: nothing is stored any more, the mapping goes. received: a bitmap of host pages, zeros, which gets
 * those that are in memory. *extentsp: what is no hole, in bytes, sorted; a hole is a page that came as zeros and takes
 * no memory. A host page of which only a part came counts as missing, and its memory is given back. */
int incoming_unmap_block(struct incoming *in, uint32_t index, uint64_t *received, struct ramblock_extent **extentsp,
                         uint64_t *n_extentsp);
void incoming_free_extents(struct ramblock_extent *extents);
/* The block's page channel; once. -EEXIST. */
int incoming_page_channel(struct incoming *in, uint32_t index, struct page_channel **channelp);
/* LISTEN, second half: ft serves it under block_index, with its channel; from now on its pages are placed. Records that
 * came meanwhile on another connection have waited. -EINVAL: not unmapped, or no channel. */
int incoming_listen_block(struct incoming *in, uint32_t index, struct fault_threads *ft, uint32_t block_index);

/* ---- the return path ---- */

/* The connection that messages go back on; NULL: none. Where one is replaced or taken away, outstanding requests wait
 * for incoming_resend; before the first one they wait for nothing. */
void incoming_set_return_path(struct incoming *in, struct incoming_stream *stream);
/* One message; never blocks. -ENOTCONN: no path, or it broke; -EMSGSIZE; -ENOBUFS: the peer takes nothing. */
int incoming_send(struct incoming *in, uint16_t type, const void *payload, uint32_t length);
/* Answers RECV_BITMAP: the message, then which target pages were received. -ENOENT and as incoming_send. */
int incoming_send_bitmap(struct incoming *in, const char *idstr);
/* After a recovery: all that is outstanding is asked again, the first with a name; requests flow again. */
void incoming_resend(struct incoming *in);
/* Waits until all messages have left. INCOMING_TIMED_OUT, -ENOTCONN. */
int incoming_flush(struct incoming *in, int timeout_ms);
/* error != 0: outstanding requests, and those to come, fail with it (a positive errno). 0: they wait again. Not while a
 * page channel is being freed. */
void incoming_give_up(struct incoming *in, int error);
/* How many requests are outstanding. */
uint64_t incoming_outstanding(struct incoming *in);

/* ---- a connection ---- */

/* fd, a stream socket, is consumed, also on failure. Used by one thread at a time, stop, counters and offset apart. */
int incoming_stream_new(struct incoming_stream **sp, struct incoming *in, int fd);
/* It is no return path from here on. */
void incoming_stream_free(struct incoming_stream *s);
/* Whoever reads comes back, -ECANCELED. */
void incoming_stream_stop(struct incoming_stream *s);
/* Exactly length bytes. -ECONNRESET: they end before; -ETIMEDOUT: the peer was silent for so long, and what it had sent
 * of them is lost; -ECANCELED. */
int incoming_stream_read(struct incoming_stream *s, void *bytes, uint64_t length, int timeout_ms);
/* What is there, at least one byte and at most length; *np 0: the peer has closed. INCOMING_TIMED_OUT: nothing came. */
int incoming_stream_read_some(struct incoming_stream *s, void *bytes, uint64_t length, int timeout_ms, uint64_t *np);
/* Bytes taken from the connection's start. */
uint64_t incoming_stream_offset(const struct incoming_stream *s);
void incoming_stream_counters(const struct incoming_stream *s, struct incoming_counters *counters);

/* Reads records and stores or places their pages. section_type NONE: until an end-of-payload mark. PART, END: the
 * payload of such a section of RAM has begun; goes on through its footer and through more of them (ram_section_id),
 * until something else begins. INCOMING_END_OF_PAYLOAD, INCOMING_SECTION, INCOMING_EOF; on a negative errno the result
 * says where and why; every whole page before it is stored or placed. */
int incoming_stream_records(struct incoming_stream *s, uint32_t section_type, uint32_t ram_section_id,
                            struct incoming_result *result);

#endif
