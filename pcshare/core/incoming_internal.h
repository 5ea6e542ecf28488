/* incoming_internal: what the files of an incoming migration share. Private to the core.
 *
 * Files: incoming.c (its life, blocks before LISTEN), incoming_stream.c (a connection's bytes), incoming_record.c (page
 * records, and where their pages go), incoming_request.c (what is asked, the page channels), incoming_path.c (what is
 * sent).
 *
 * One lock guards all but what the reading thread alone uses; it is open over every system call that could take long
 * once somebody waits for a page. Before LISTEN nobody does: then stores are made under it.
 */
#ifndef PCSHARE_INCOMING_INTERNAL_H
#define PCSHARE_INCOMING_INTERNAL_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

#include "incoming.h"

enum {
    INCOMING_INPUT_BYTES = 512 << 10, /* read ahead: some runs */
    INCOMING_WANTED_BYTES = 32 << 10, /* at once while somebody waits: his page may be the first of what is there */
    INCOMING_RUN_BYTES = 256 << 10,   /* placed in one call when nobody waits: a larger one gains nothing */
    INCOMING_TARGET_PAGES_MAX = RAMBLOCK_PAGE_SIZE_MAX / INCOMING_TARGET_PAGE_MIN, /* of one host page */
    INCOMING_BUCKETS = 1024,
    INCOMING_REQUESTS_AHEAD = 4096, /* bytes of requests before the socket; the rest can still be overtaken */
    INCOMING_OUTPUT_MAX = 4 << 20,  /* beside one bitmap of each block: who lets more lie reads nothing */
    INCOMING_CHUNK_BYTES = 16 << 10,
};

/* The format's own numbers. */
enum {
    RETURN_REQ_PAGES_ID = 3,
    RETURN_REQ_PAGES = 4,
    RETURN_RECV_BITMAP = 5,
    RETURN_HEADER_LENGTH = 4,
};

enum { BLOCK_STORES = 0, BLOCK_UNMAPPED = 1, BLOCK_PLACES = 2, BLOCK_GONE = 3 };

struct incoming_block {
    struct incoming *in;
    char idstr[INCOMING_IDSTR_MAX + 1];
    uint32_t idstr_length;
    uint32_t index;
    uint64_t used_length;
    uint64_t page_size;
    uint64_t page_count;      /* host pages */
    uint64_t target_per_page; /* target pages in a host page */
    uint64_t *received;       /* target pages */
    uint64_t received_pages;  /* target pages; atomic */
    /* Under the lock; state is read without it too. */
    int state;
    int memfd;         /* the next four before LISTEN only */
    uint8_t *memory;   /* where pages are stored */
    uint64_t *present; /* host pages that have memory: received ones that have none came as zeros */
    int has_channel;
    struct fault_threads *ft;
    uint32_t block_index;
    struct placing *placing;    /* threads in fault_threads_place for it */
    uint64_t n_outstanding;     /* read without the lock */
    struct outstanding *ranges; /* those of more than one page, by chain */
};

/* A thread that places pages of a block; on its stack. */
struct placing {
    struct placing *next;
    uint64_t page;
    uint64_t n_pages;
};

struct queue {
    struct queue *next;
    struct queue *prev;
};

/* A request that has been submitted and not answered. */
struct outstanding {
    struct queue link;         /* in one of sent, unsent; first, so that a link is its entry */
    struct outstanding *chain; /* in its bucket, or in the block's ranges */
    struct incoming_block *block;
    struct page_request *request;
    uint64_t page;
    uint64_t n_pages;
    int is_sent;
};

/* Bytes on their way out. Memory that may be with send() does not move. */
struct chunk {
    struct chunk *next;
    size_t start;
    size_t end;
    size_t capacity;
    uint8_t bytes[];
};

struct incoming {
    uint32_t n_owners;
    uint32_t target_page_size;
    uint64_t host_page_size;
    int epoll_fd; /* tells when the return path takes more */
    pthread_mutex_t lock;
    pthread_cond_t changed; /* a block's state or placing, path_users, a stream's stop */
    uint32_t n_blocks;      /* read without the lock: a block is whole before it counts */
    struct incoming_block *blocks[INCOMING_BLOCKS_MAX];
    /* Requests, by is_demand. */
    struct queue unsent[2];
    struct queue sent[2];
    struct outstanding *buckets[INCOMING_BUCKETS]; /* those of one page */
    uint64_t n_outstanding;                        /* read without the lock */
    int given_up;                                  /* a positive errno */
    int held;                                      /* requests wait for incoming_resend */
    /* The return path. */
    struct incoming_stream *path;
    int path_error;                          /* it broke */
    int path_polled;                         /* it is in the epoll */
    int path_blocked;                        /* it takes no more for now */
    int path_sending;                        /* somebody sends: what is added goes with it */
    uint32_t path_users;                     /* threads that use its fd without the lock */
    const struct incoming_block *path_block; /* named last */
    struct chunk *output;
    struct chunk *output_tail;
    size_t output_length;
    uint64_t bitmaps_length; /* of the answers to RECV_BITMAP, one for each block */
};

/* Pages of one kind that follow each other and wait to be placed together. */
struct run {
    struct incoming_block *block;
    uint64_t page;
    uint64_t n_pages; /* 0: none */
    int is_zero;
};

/* A host page of which some target pages have come. */
struct half_page {
    struct incoming_block *block; /* NULL: none */
    uint64_t page;
    uint64_t n_seen;
    int is_zero; /* so far: its bytes are not filled in yet */
    uint64_t seen[INCOMING_TARGET_PAGES_MAX / 64];
};

struct incoming_stream {
    struct incoming *in;
    int fd;
    int stopped;
    uint64_t offset; /* bytes taken */
    uint8_t *input;
    uint32_t input_start;
    uint32_t input_end;
    struct incoming_counters counters;
    /* Of records. */
    struct incoming_block *block; /* of the last record */
    uint64_t record_offset;
    struct incoming_result *result; /* while in incoming_stream_records */
    struct run run;
    uint8_t *run_bytes;
    struct half_page half;
    uint8_t *half_bytes;
    uint8_t *fill_bytes; /* one target page */
};

static inline uint64_t bytes_in_pages(const struct incoming_block *block, uint64_t pages)
{
    return pages * block->page_size;
}

/* incoming.c */
struct incoming *incoming_get(struct incoming *in);
void incoming_put(struct incoming *in);
/* By name; NULL. */
struct incoming_block *incoming_find_block(struct incoming *in, const void *idstr, uint32_t length);
struct incoming_block *incoming_block_at(struct incoming *in, uint32_t index);
/* Before LISTEN: stores a target page; bytes NULL: it is all fill. 1: too late, it is to be placed. */
int incoming_store(struct incoming_block *block, uint64_t target_page, const void *bytes, uint8_t fill);
void incoming_note_received(struct incoming_block *block, uint64_t page, uint64_t n_pages);

/* incoming_stream.c: bytes */
enum { INPUT_EOF = 1, INPUT_SILENT = 2 };
/* n bytes in the input, n being small: *bytesp stays good until the next call. INPUT_EOF: closed, and none are left;
 * -ECONNRESET: closed in between. */
int input_need(struct incoming_stream *s, uint32_t n, const uint8_t **bytesp);
void input_consume(struct incoming_stream *s, uint32_t n);
void count_up(uint64_t *counter, uint64_t n);

/* incoming_record.c */
/* Before the stream waits for the peer: nothing that has come is kept back. */
int incoming_before_waiting(struct incoming_stream *s);

/* incoming_request.c */
/* Whether all of these came, before LISTEN or after; once they have, they stay. */
int incoming_is_received(const struct incoming_block *block, uint64_t page, uint64_t n_pages);
/* Whether somebody waits for just this page. */
int incoming_is_wanted(struct incoming_block *block, uint64_t page);
/* With the lock held: takes out what is answered by these pages. The caller ends the list without the lock. */
struct outstanding *requests_take_arrived(struct incoming_block *block, uint64_t page, uint64_t n_pages);
void requests_end(struct outstanding *list, int result);
/* With the lock held. The next that is to be asked, NULL: none; and that it was. */
struct outstanding *requests_next_unsent(struct incoming *in);
void requests_mark_sent(struct outstanding *entry);
int requests_is_asked(const struct outstanding *entry);
/* With the lock held: all are to be asked again, in the old order. */
void requests_unsend(struct incoming *in);

/* Bytes of the answer to RECV_BITMAP for the block. */
uint64_t path_bitmap_length(const struct incoming_block *block);
/* incoming_path.c: with the lock held, which is open while it sends */
void path_send(struct incoming *in);
void path_ready(struct incoming *in);
/* The stream is going. */
void path_forget(struct incoming *in, const struct incoming_stream *s);
void path_free(struct incoming *in);

#endif
