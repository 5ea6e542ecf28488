/* page_channel_filter: makes a source slow or failing on command, for demonstrations and tests.
 *
 * Delays run side by side, each request's own; the rate is a token bucket in virtual time. Demands queue behind demands
 * only: what the stream has booked does not delay them, but what they use is taken from the stream. Changes no byte and
 * keeps no request longer than it must.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include "page_channel.h"
#include "thread.h"

#define NS_PER_S 1000000000ull

enum { NS_PER_US = 1000 };

struct filter_channel {
    struct page_channel channel;
    struct page_channel *inner;
    uint64_t delay_ns;
    uint64_t rate;   /* bytes a second; 0: no limit */
    int error_errno; /* positive; 0: never fails */
    char *error_path;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    pthread_t timer;
    int is_stopping;
    uint64_t demand_free_ns;      /* when the demands before are through */
    uint64_t all_free_ns;         /* when all before are through */
    struct page_request *waiting; /* by due_ns, those of one time in order of arrival */
};

static uint64_t later(uint64_t a_ns, uint64_t b_ns)
{
    return a_ns > b_ns ? a_ns : b_ns;
}

/* How long so many bytes take; in two parts, so that large requests do not overflow. */
static uint64_t transfer_ns(const struct filter_channel *c, uint64_t length)
{
    if (c->rate == 0)
        return 0;
    return length / c->rate * NS_PER_S + (uint64_t)((double)(length % c->rate) / (double)c->rate * (double)NS_PER_S);
}

/* With the mutex held: when the request may go on. */
static uint64_t filter_book(struct filter_channel *c, const struct page_request *request)
{
    uint64_t now = clock_ns(), cost = transfer_ns(c, request->length);

    if (!request->is_demand) {
        c->all_free_ns = later(now, c->all_free_ns) + cost;
        return c->all_free_ns + c->delay_ns;
    }
    c->demand_free_ns = later(now, c->demand_free_ns) + cost;
    c->all_free_ns = later(now, c->all_free_ns) + cost;
    return c->demand_free_ns + c->delay_ns;
}

static void filter_insert(struct filter_channel *c, struct page_request *request)
{
    struct page_request **linkp = &c->waiting;

    while (*linkp && (*linkp)->due_ns <= request->due_ns)
        linkp = &(*linkp)->next;
    request->next = *linkp;
    *linkp = request;
}

/* The next request that is due, or NULL: the filter is being freed. */
static struct page_request *filter_wait(struct filter_channel *c)
{
    struct page_request *request = NULL;

    pthread_mutex_lock(&c->mutex);
    while (!c->is_stopping) {
        struct timespec due;

        if (!c->waiting) {
            pthread_cond_wait(&c->changed, &c->mutex);
            continue;
        }
        if (c->waiting->due_ns <= clock_ns()) {
            request = c->waiting;
            c->waiting = request->next;
            break;
        }
        due.tv_sec = (time_t)(c->waiting->due_ns / NS_PER_S);
        due.tv_nsec = (long)(c->waiting->due_ns % NS_PER_S);
        pthread_cond_timedwait(&c->changed, &c->mutex, &due);
    }
    pthread_mutex_unlock(&c->mutex);
    return request;
}

static void *timer_run(void *argument)
{
    struct filter_channel *c = argument;
    struct page_request *request;

    while ((request = filter_wait(c))) {
        request->next = NULL;
        if (c->error_errno && access(c->error_path, F_OK) == 0)
            request->done(request, -c->error_errno);
        else
            page_channel_submit(c->inner, request);
    }
    return NULL;
}

/* A filter with work to do answers nothing out of turn; an error too has to go the way of every other. */
static int filter_read_now(struct page_channel *channel, void *bytes, uint64_t length, uint64_t offset)
{
    struct filter_channel *c = (struct filter_channel *)channel;

    if (c->delay_ns || c->rate || c->error_errno)
        return PAGE_CHANNEL_WOULD_BLOCK;
    return page_channel_read_now(c->inner, bytes, length, offset);
}

static void filter_submit(struct page_channel *channel, struct page_request *request)
{
    struct filter_channel *c = (struct filter_channel *)channel;
    int is_stopping;

    pthread_mutex_lock(&c->mutex);
    is_stopping = c->is_stopping;
    if (!is_stopping) {
        request->due_ns = filter_book(c, request);
        filter_insert(c, request);
        if (c->waiting == request)
            pthread_cond_signal(&c->changed);
    }
    pthread_mutex_unlock(&c->mutex);
    if (is_stopping)
        request->done(request, -ECANCELED);
}

static int filter_poll_fd(struct page_channel *channel)
{
    return page_channel_poll_fd(((struct filter_channel *)channel)->inner);
}

static void filter_dispatch(struct page_channel *channel)
{
    page_channel_dispatch(((struct filter_channel *)channel)->inner);
}

static void filter_deinit(struct filter_channel *c)
{
    pthread_cond_destroy(&c->changed);
    pthread_mutex_destroy(&c->mutex);
    page_channel_free(c->inner);
    free(c->error_path);
    free(c);
}

static void filter_free(struct page_channel *channel)
{
    struct filter_channel *c = (struct filter_channel *)channel;
    struct page_request *request;

    pthread_mutex_lock(&c->mutex);
    c->is_stopping = 1;
    request = c->waiting;
    c->waiting = NULL;
    pthread_cond_signal(&c->changed);
    pthread_mutex_unlock(&c->mutex);
    while (request) {
        struct page_request *next = request->next;

        request->next = NULL;
        request->done(request, -ECANCELED);
        request = next;
    }
    pthread_join(c->timer, NULL);
    filter_deinit(c);
}

static const struct page_channel_ops filter_ops = {
    .read_now = filter_read_now,
    .submit = filter_submit,
    .free = filter_free,
    .poll_fd = filter_poll_fd,
    .dispatch = filter_dispatch,
};

static void condition_init(pthread_cond_t *condition)
{
    pthread_condattr_t attributes;

    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(condition, &attributes);
    pthread_condattr_destroy(&attributes);
}

int page_channel_filter_new(struct page_channel **channelp, struct page_channel *inner, uint64_t delay_us,
                            uint64_t rate, int error_errno, const char *error_path)
{
    struct filter_channel *c = calloc(1, sizeof(*c));
    int rc = 0;

    *channelp = NULL;
    if (!c) {
        page_channel_free(inner);
        return -ENOMEM;
    }
    c->channel = *inner;
    c->channel.ops = &filter_ops;
    c->inner = inner;
    c->delay_ns = delay_us * NS_PER_US;
    c->rate = rate;
    c->error_errno = error_errno;
    pthread_mutex_init(&c->mutex, NULL);
    condition_init(&c->changed);
    if (error_errno < 0 || (error_errno && !error_path))
        rc = -EINVAL;
    else if (error_path && !(c->error_path = strdup(error_path)))
        rc = -ENOMEM;
    if (rc == 0)
        rc = thread_new(&c->timer, "pcshare-filter", timer_run, c);
    if (rc < 0) {
        filter_deinit(c);
        return rc;
    }
    *channelp = &c->channel;
    return 0;
}
