/* page_channel_file: a local file behind a page channel.
 *
 * What is in the page cache is read at once; all else by reader threads, so that a read that blocks holds up no other.
 * Demand and stream have lanes of their own with readers of their own: a demand never waits behind the stream. Never
 * invents bytes: only what lies beyond the size that the file had at the start (the tail of its last page) is zeros.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/uio.h>
#include <unistd.h>
#include "page_channel.h"
#include "thread.h"

enum {
    PAGE_CHANNEL_READERS_MAX = 16,       /* demand: as many reads as one disk or one NFS mount does side by side */
    PAGE_CHANNEL_STREAM_READERS_MAX = 2, /* stream: one that reads while the other's bytes are placed */
};

struct file_channel;

struct lane {
    struct file_channel *channel;
    struct page_request *head;
    struct page_request *tail;
    pthread_cond_t changed;
    pthread_t threads[PAGE_CHANNEL_READERS_MAX];
    int is_started[PAGE_CHANNEL_READERS_MAX]; /* the slot is taken */
    uint32_t readers_max;
    uint32_t n_readers;  /* started, or being started */
    uint32_t n_starting; /* of those; their threads[] is not to be read yet */
    uint32_t n_idle;     /* waiting, or woken and not yet here */
    uint32_t n_queued;
};

struct file_channel {
    struct page_channel channel;
    int fd;
    uint64_t size;
    int has_no_nowait; /* the file system cannot read without waiting */
    pthread_mutex_t mutex;
    int is_stopping;
    struct lane demand;
    struct lane stream;
};

static struct page_request *lane_pop(struct lane *lane)
{
    struct page_request *request = lane->head;

    if (request) {
        lane->head = request->next;
        if (!lane->head)
            lane->tail = NULL;
        lane->n_queued--;
        request->next = NULL;
    }
    return request;
}

static void lane_push(struct lane *lane, struct page_request *request)
{
    request->next = NULL;
    if (lane->tail)
        lane->tail->next = request;
    else
        lane->head = request;
    lane->tail = request;
    lane->n_queued++;
}

static struct page_request *lane_take_all(struct lane *lane)
{
    struct page_request *all = lane->head;

    lane->head = lane->tail = NULL;
    lane->n_queued = 0;
    return all;
}

static void fail_all(struct page_request *request, int result)
{
    while (request) {
        struct page_request *next = request->next;

        request->next = NULL;
        request->done(request, result);
        request = next;
    }
}

/* Bytes of a request that the file has to give; the rest of it lies beyond the file's size and is zeros. */
static int64_t length_in_file(const struct file_channel *c, uint64_t length, uint64_t offset)
{
    if (offset >= c->size)
        return -EINVAL;
    return (int64_t)(length < c->size - offset ? length : c->size - offset);
}

static int file_read(struct file_channel *c, uint8_t *bytes, uint64_t length, uint64_t offset)
{
    int64_t wanted = length_in_file(c, length, offset), done = 0;

    if (wanted < 0)
        return (int)wanted;
    while (done < wanted) {
        ssize_t n = pread(c->fd, bytes + done, (size_t)(wanted - done), (off_t)(offset + (uint64_t)done));

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        if (n == 0)
            return -ENODATA;
        done += n;
    }
    page_channel_zero_tail(bytes, (uint64_t)wanted, length);
    return PAGE_CHANNEL_DONE;
}

/* Less than all of it is no answer: whether the cache or the file ended there is found out by file_read. */
static int file_read_now(struct page_channel *channel, void *bytes, uint64_t length, uint64_t offset)
{
    struct file_channel *c = (struct file_channel *)channel;
    int64_t wanted = length_in_file(c, length, offset);
    struct iovec iov = {.iov_base = bytes, .iov_len = (size_t)wanted};
    ssize_t n;

    if (wanted < 0)
        return (int)wanted;
    if (__atomic_load_n(&c->has_no_nowait, __ATOMIC_RELAXED))
        return PAGE_CHANNEL_WOULD_BLOCK;
    n = preadv2(c->fd, &iov, 1, (off_t)offset, RWF_NOWAIT);
    if (n < 0 && (errno == EOPNOTSUPP || errno == ENOSYS))
        __atomic_store_n(&c->has_no_nowait, 1, __ATOMIC_RELAXED);
    else if (n < 0 && errno != EAGAIN && errno != EINTR)
        return -errno;
    if (n != wanted)
        return PAGE_CHANNEL_WOULD_BLOCK;
    page_channel_zero_tail(bytes, (uint64_t)wanted, length);
    return PAGE_CHANNEL_DONE;
}

/* The next request, or NULL: the channel is being freed. */
static struct page_request *lane_wait(struct lane *lane)
{
    struct file_channel *c = lane->channel;
    struct page_request *request;

    pthread_mutex_lock(&c->mutex);
    while (!(request = lane_pop(lane)) && !c->is_stopping) {
        lane->n_idle++;
        pthread_cond_wait(&lane->changed, &c->mutex);
        lane->n_idle--;
    }
    pthread_mutex_unlock(&c->mutex);
    return request;
}

static void *reader_run(void *argument)
{
    struct lane *lane = argument;
    struct page_request *request;

    while ((request = lane_wait(lane)))
        request->done(request, file_read(lane->channel, request->bytes, request->length, request->offset));
    return NULL;
}

/* With the mutex held: a slot for one more reader, or -1. */
static int lane_reserve_reader(struct lane *lane)
{
    if (lane->n_queued <= lane->n_idle || lane->n_readers == lane->readers_max)
        return -1;
    for (uint32_t i = 0; i < lane->readers_max; i++) {
        if (!lane->is_started[i]) {
            lane->is_started[i] = 1;
            lane->n_readers++;
            lane->n_starting++;
            return (int)i;
        }
    }
    return -1;
}

/* Without a single reader nobody would ever answer: what waits fails with the reason. */
static void lane_start_reader(struct lane *lane, int slot)
{
    struct file_channel *c = lane->channel;
    struct page_request *stranded = NULL;
    int rc = thread_new(&lane->threads[slot], "pcshare-read", reader_run, lane);

    pthread_mutex_lock(&c->mutex);
    lane->n_starting--;
    if (rc < 0) {
        lane->is_started[slot] = 0;
        if (--lane->n_readers == 0)
            stranded = lane_take_all(lane);
    }
    if (c->is_stopping)
        pthread_cond_broadcast(&lane->changed);
    pthread_mutex_unlock(&c->mutex);
    fail_all(stranded, rc);
}

static void file_submit(struct page_channel *channel, struct page_request *request)
{
    struct file_channel *c = (struct file_channel *)channel;
    struct lane *lane = request->is_demand ? &c->demand : &c->stream;
    int slot = -1, is_stopping;

    pthread_mutex_lock(&c->mutex);
    is_stopping = c->is_stopping;
    if (!is_stopping) {
        lane_push(lane, request);
        slot = lane_reserve_reader(lane);
        if (slot < 0)
            pthread_cond_signal(&lane->changed);
    }
    pthread_mutex_unlock(&c->mutex);
    if (is_stopping)
        request->done(request, -ECANCELED);
    else if (slot >= 0)
        lane_start_reader(lane, slot);
}

/* The last submit may have come from a reader itself, which may still be starting another. */
static void lane_join(struct lane *lane)
{
    pthread_mutex_lock(&lane->channel->mutex);
    while (lane->n_starting)
        pthread_cond_wait(&lane->changed, &lane->channel->mutex);
    pthread_mutex_unlock(&lane->channel->mutex);
    for (uint32_t i = 0; i < lane->readers_max; i++)
        if (lane->is_started[i])
            pthread_join(lane->threads[i], NULL);
}

static void file_free(struct page_channel *channel)
{
    struct file_channel *c = (struct file_channel *)channel;
    struct page_request *demands, *streams;

    pthread_mutex_lock(&c->mutex);
    c->is_stopping = 1;
    demands = lane_take_all(&c->demand);
    streams = lane_take_all(&c->stream);
    pthread_cond_broadcast(&c->demand.changed);
    pthread_cond_broadcast(&c->stream.changed);
    pthread_mutex_unlock(&c->mutex);
    fail_all(demands, -ECANCELED);
    fail_all(streams, -ECANCELED);
    lane_join(&c->demand);
    lane_join(&c->stream);
    pthread_cond_destroy(&c->demand.changed);
    pthread_cond_destroy(&c->stream.changed);
    pthread_mutex_destroy(&c->mutex);
    close(c->fd);
    free(c);
}

static const struct page_channel_ops file_ops = {
    .read_now = file_read_now,
    .submit = file_submit,
    .free = file_free,
};

static void lane_init(struct lane *lane, struct file_channel *channel, uint32_t readers_max)
{
    lane->channel = channel;
    lane->readers_max = readers_max;
    pthread_cond_init(&lane->changed, NULL);
}

int page_channel_file_new(struct page_channel **channelp, int fd, uint64_t size)
{
    struct file_channel *c = calloc(1, sizeof(*c));

    *channelp = NULL;
    if (!c) {
        close(fd);
        return -ENOMEM;
    }
    c->channel = (struct page_channel){.ops = &file_ops,
                                       .stream_piece_bytes = PAGE_CHANNEL_PIECE_BYTES,
                                       .stream_piece_count = PAGE_CHANNEL_PIECES,
                                       .stream_piece_count_demand = PAGE_CHANNEL_PIECES_DEMAND,
                                       .demands_of_one = PAGE_CHANNEL_DEMANDS_OF_ONE};
    c->fd = fd;
    c->size = size;
    pthread_mutex_init(&c->mutex, NULL);
    lane_init(&c->demand, c, PAGE_CHANNEL_READERS_MAX);
    lane_init(&c->stream, c, PAGE_CHANNEL_STREAM_READERS_MAX);
    *channelp = &c->channel;
    return 0;
}
