/* page_channel: one connection to a source, behind one small table of functions.
 *
 * A channel reads bytes; it places nothing and knows no helper. Requests may complete in any order and on any thread,
 * exactly once each, also when the channel is closed (-ECANCELED). One whose source pushes is the exception: its pages
 * come asked for or not, it places them itself (fault_threads_place), and a request only says what is urgent.
 */
#ifndef PCSHARE_PAGE_CHANNEL_H
#define PCSHARE_PAGE_CHANNEL_H

#include <stdint.h>

enum {
    PAGE_CHANNEL_DONE = 0,
    PAGE_CHANNEL_WOULD_BLOCK = 1, /* read_now: ask with submit */
    PAGE_CHANNEL_ARRIVED = 2,     /* done: every page of the request has been placed; its bytes are not filled */
};

struct page_request;
typedef void page_request_done(struct page_request *request, int result);

struct page_request {
    struct page_request *next; /* the channel's while it is submitted */
    uint64_t offset;           /* bytes in the source */
    uint64_t length;           /* bytes wanted; all of them or an error */
    uint8_t *bytes;
    int is_demand;
    uint64_t due_ns; /* a filter's: when it may go on */
    page_request_done *done;
    void *owner;
    uint32_t block_index; /* for whoever made the request */
    uint64_t page;
    uint64_t n_pages;
};

struct page_channel;

enum {
    PAGE_CHANNEL_POLL_NONE = -1, /* the channel's own threads do it all */
    PAGE_CHANNEL_PIECE_BYTES = 1 << 20,
    PAGE_CHANNEL_PIECES = 4,
    PAGE_CHANNEL_PIECES_DEMAND = 1,
    PAGE_CHANNEL_DEMANDS_OF_ONE = 8,           /* half of what a file's readers do side by side */
    PAGE_CHANNEL_AROUND_BYTES_MAX = 256 << 10, /* more takes longer on the way than it saves */
};

struct page_channel_ops {
    /* Reads without ever waiting, or says that it would have to. */
    int (*read_now)(struct page_channel *channel, void *bytes, uint64_t length, uint64_t offset);
    void (*submit)(struct page_channel *channel, struct page_request *request);
    void (*free)(struct page_channel *channel);
    /* Both may be NULL. An fd of the channel's that is readable when something is to be done, for as long as it lives;
     * and the doing, which waits for nothing and may be called by several threads. */
    int (*poll_fd)(struct page_channel *channel);
    void (*dispatch)(struct page_channel *channel);
};

struct page_channel {
    const struct page_channel_ops *ops;
    /* What the stream is to ask for at a time, bytes; how many of these at once. */
    uint32_t stream_piece_bytes;
    uint32_t stream_piece_count;
    uint32_t stream_piece_count_demand; /* while somebody waits in a fault */
    uint32_t demands_of_one;            /* pages of one helper's faults that it is asked for at once; 0: any number */
    uint32_t demands_of_crowd;          /* of one with many threads in faults, beside others; 0: as of any */
    /* What its source reads at a time, bytes, whatever is asked of it: a demand asks for all of that. 0: no such. */
    uint32_t around_bytes;
    int pushes; /* its source sends every page of its own accord: only what somebody wants is asked for */
};

/* A local file. fd is consumed, also on failure; size is what it held at the start: where the file is shorter today,
 * -ENODATA. What a request wants beyond size (the tail of the last page) is zeros. */
int page_channel_file_new(struct page_channel **channelp, int fd, uint64_t size);
/* A source that only has holes: any read is zeros. */
int page_channel_zero_new(struct page_channel **channelp);

/* A filter in front of a channel: each request waits delay_us, all together take at most rate bytes a second (0: no
 * limit), and while error_path exists they fail with error_errno (0: never). inner is consumed, also on failure. */
int page_channel_filter_new(struct page_channel **channelp, struct page_channel *inner, uint64_t delay_us,
                            uint64_t rate, int error_errno, const char *error_path);

int page_channel_read_now(struct page_channel *channel, void *bytes, uint64_t length, uint64_t offset);
void page_channel_submit(struct page_channel *channel, struct page_request *request);
int page_channel_poll_fd(struct page_channel *channel);
void page_channel_dispatch(struct page_channel *channel);
/* Waits for what is in flight, then frees. */
void page_channel_free(struct page_channel *channel);

/* What a source does not hold of end bytes is zeros: those from length on, mostly none. Then the C library's AVX-512
 * memset would take 0.15 us where the page behind is not there yet. */
void page_channel_zero_tail(uint8_t *bytes, uint64_t length, uint64_t end);

#endif
