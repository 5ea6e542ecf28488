/* page_channel_nbd: see page_channel_nbd.h. What fault threads see of it, and what the supplier of connections does;
 * what moves between them is in nbd_channel.c.
 */
#include "nbd_channel.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "thread.h"

enum {
    NBD_STREAM_PIECE_BYTES = 512 << 10,
    NBD_STREAM_PIECES = 16,   /* as many as nbdkit and qemu-nbd work on at once */
    NBD_FAREWELL_MS = 500,    /* how long answers are waited for at the end */
    NBD_FAREWELL_LOOK_MS = 5, /* between looks whether they have come */
};
static const uint64_t ns_per_ms = 1000000;

/* ---- the page channel ---- */

static int nbd_read_now(struct page_channel *channel, void *bytes, uint64_t length, uint64_t offset)
{
    (void)channel;
    (void)bytes;
    (void)length;
    (void)offset;
    return PAGE_CHANNEL_WOULD_BLOCK;
}

static void nbd_submit(struct page_channel *channel, struct page_request *request)
{
    struct nbd_channel *c = (struct nbd_channel *)channel;
    struct nbd_job *job, *over = NULL;
    int rc = nbd_job_new(&job, &c->settings, request);

    if (rc < 0) {
        request->done(request, rc);
        return;
    }
    pthread_mutex_lock(&c->lock);
    int refused = c->ended ? -ECANCELED : nbd_channel_is_served(c) ? 0 : -c->given_up;
    uint32_t count = job->n_open; /* the job may be over before the loop is */
    for (uint32_t i = 0; i < count; i++) {
        if (refused)
            nbd_job_read_over(&job->reads[i], refused, &over);
        else
            nbd_queue_push(nbd_channel_queue_of(c, &job->reads[i]), &job->reads[i]);
    }
    nbd_channel_pump(c, &over);
    nbd_channel_unlock(c, over);
}

static int nbd_poll_fd(struct page_channel *channel)
{
    return ((struct nbd_channel *)channel)->epoll_fds[NBD_DEMAND];
}

static void nbd_dispatch(struct page_channel *channel)
{
    struct nbd_channel *c = (struct nbd_channel *)channel;
    struct epoll_event event;

    if (epoll_wait(c->epoll_fds[NBD_DEMAND], &event, 1, 0) == 1)
        nbd_channel_handle_ready(c, NBD_DEMAND, event.data.u64);
}

static void close_fd(int fd)
{
    if (fd >= 0)
        close(fd);
}

static void channel_put(struct nbd_channel *c)
{
    if (__atomic_sub_fetch(&c->n_owners, 1, __ATOMIC_ACQ_REL))
        return;
    close_fd(c->event_fd);
    close_fd(c->wake_fd);
    for (uint32_t kind = 0; kind < NBD_KINDS; kind++)
        close_fd(c->epoll_fds[kind]);
    pthread_cond_destroy(&c->jobs_ended);
    pthread_mutex_destroy(&c->lock);
    free(c);
}

/* Nobody receives any more: the thread has ended, and no fault thread polls the channel. */
static void drop_all(struct nbd_channel *c)
{
    struct nbd_job *over = NULL;

    pthread_mutex_lock(&c->lock);
    for (uint32_t kind = 0; kind < NBD_KINDS; kind++)
        if (c->connections[kind])
            nbd_channel_drop(c, c->connections[kind], &over);
    nbd_channel_unlock(c, over);
    pthread_mutex_lock(&c->lock);
    while (c->n_ending) /* the supplier */
        pthread_cond_wait(&c->jobs_ended, &c->lock);
    pthread_mutex_unlock(&c->lock);
}

static void nbd_free(struct page_channel *channel)
{
    struct nbd_channel *c = (struct nbd_channel *)channel;

    page_channel_nbd_end(channel);
    __atomic_store_n(&c->stopping, 1, __ATOMIC_RELEASE);
    nbd_channel_wake(c);
    pthread_join(c->thread, NULL);
    drop_all(c);
    channel_put(c);
}

static const struct page_channel_ops nbd_ops = {
    .read_now = nbd_read_now,
    .submit = nbd_submit,
    .free = nbd_free,
    .poll_fd = nbd_poll_fd,
    .dispatch = nbd_dispatch,
};

static int open_fds(struct nbd_channel *c)
{
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = nbd_wake_number};

    c->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    c->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    for (uint32_t kind = 0; kind < NBD_KINDS; kind++) {
        c->epoll_fds[kind] = epoll_create1(EPOLL_CLOEXEC);
        if (c->epoll_fds[kind] < 0)
            return -errno;
    }
    if (c->wake_fd < 0 || c->event_fd < 0 ||
        epoll_ctl(c->epoll_fds[NBD_PRIMARY], EPOLL_CTL_ADD, c->wake_fd, &event) < 0)
        return -errno;
    return 0;
}

static int is_usable(const struct nbd_settings *settings)
{
    return settings->size && settings->size <= INT64_MAX && settings->alignment &&
           !(settings->alignment & (settings->alignment - 1)) && settings->length_max >= settings->alignment &&
           settings->reply_timeout_ms && settings->server_count;
}

int page_channel_nbd_new(struct page_channel **channelp, const struct nbd_settings *settings)
{
    struct nbd_channel *c;

    *channelp = NULL;
    if (!is_usable(settings))
        return -EINVAL;
    c = calloc(1, sizeof(*c));
    if (!c)
        return -ENOMEM;
    c->channel = (struct page_channel){.ops = &nbd_ops,
                                       .stream_piece_bytes = NBD_STREAM_PIECE_BYTES,
                                       .stream_piece_count = NBD_STREAM_PIECES,
                                       .stream_piece_count_demand = NBD_STREAM_PIECES_NEAR,
                                       .demands_of_one = NBD_DEMANDS_OF_ONE_NEAR,
                                       .around_bytes = settings->preferred < PAGE_CHANNEL_AROUND_BYTES_MAX
                                                           ? settings->preferred
                                                           : PAGE_CHANNEL_AROUND_BYTES_MAX};
    c->settings = *settings;
    c->n_owners = 1;
    c->wake_fd = c->event_fd = c->epoll_fds[NBD_PRIMARY] = c->epoll_fds[NBD_DEMAND] = -1;
    pthread_mutex_init(&c->lock, NULL);
    pthread_cond_init(&c->jobs_ended, NULL);
    int rc = open_fds(c);
    if (rc == 0)
        rc = thread_new(&c->thread, "pcshare-nbd", nbd_channel_run, c);
    if (rc < 0) {
        channel_put(c);
        return rc;
    }
    c->n_owners = 2;
    *channelp = &c->channel;
    return 0;
}

/* ---- the supplier's side ---- */

void page_channel_nbd_release(struct page_channel *channel)
{
    channel_put((struct nbd_channel *)channel);
}

int page_channel_nbd_connect(struct page_channel *channel, int fd, uint32_t kind, int structured_replies,
                             uint32_t *numberp)
{
    struct nbd_channel *c = (struct nbd_channel *)channel;
    struct nbd_connection *connection;
    struct nbd_job *over = NULL;
    struct epoll_event event = {.events = EPOLLIN | EPOLLONESHOT};

    if (kind >= NBD_KINDS) {
        close(fd);
        return -EINVAL;
    }
    int rc = nbd_connection_new(&connection, fd, kind, structured_replies);
    if (rc < 0)
        return rc;
    pthread_mutex_lock(&c->lock);
    connection->number = c->last_number + 1;
    event.data.u64 = connection->number;
    rc = c->ended ? -ESHUTDOWN : c->connections[kind] ? -EEXIST : 0;
    if (rc == 0 && epoll_ctl(c->epoll_fds[kind], EPOLL_CTL_ADD, fd, &event) < 0)
        rc = -errno;
    if (rc == 0) {
        *numberp = c->last_number = connection->number;
        c->connections[kind] = connection;
        c->given_up = 0;
        nbd_channel_pump(c, &over);
    } else {
        nbd_connection_free(connection);
    }
    nbd_channel_unlock(c, over);
    return rc;
}

void page_channel_nbd_disconnect(struct page_channel *channel, int error, const char *text)
{
    struct nbd_channel *c = (struct nbd_channel *)channel;
    struct nbd_job *over = NULL;

    pthread_mutex_lock(&c->lock);
    nbd_channel_lose_all(c, error, text, &over);
    nbd_channel_unlock(c, over);
}

void page_channel_nbd_give_up(struct page_channel *channel, int error)
{
    struct nbd_channel *c = (struct nbd_channel *)channel;
    struct nbd_job *over = NULL;

    pthread_mutex_lock(&c->lock);
    c->given_up = error;
    if (error && !nbd_channel_is_served(c))
        nbd_channel_fail_queued(c, -error, &over);
    nbd_channel_unlock(c, over);
}

static void say_goodbye(struct nbd_channel *c, struct nbd_connection *connection, struct nbd_job **overp)
{
    if (!connection || connection->n_in_flight)
        return;
    nbd_connection_say_goodbye(connection);
    (void)nbd_channel_send(c, connection, overp);
}

static int is_owed(struct nbd_channel *c)
{
    int owed = 0;

    pthread_mutex_lock(&c->lock);
    for (uint32_t kind = 0; kind < NBD_KINDS; kind++)
        owed |= c->connections[kind] && c->connections[kind]->n_in_flight;
    pthread_mutex_unlock(&c->lock);
    return owed;
}

/* Whoever leaves a server in the midst of its answers may bring it down, with all its clients (nbdkit 1.32 aborts). The
 * fault threads may have ended: what they would read is read here. */
static void await_answers(struct nbd_channel *c)
{
    uint64_t deadline_ns = clock_ns() + NBD_FAREWELL_MS * ns_per_ms;
    struct pollfd polled = {.fd = c->epoll_fds[NBD_DEMAND], .events = POLLIN};

    while (is_owed(c) && clock_ns() < deadline_ns) {
        (void)poll(&polled, 1, NBD_FAREWELL_LOOK_MS);
        nbd_dispatch(&c->channel);
    }
}

void page_channel_nbd_end(struct page_channel *channel)
{
    struct nbd_channel *c = (struct nbd_channel *)channel;
    struct nbd_job *over = NULL;

    pthread_mutex_lock(&c->lock);
    int was_ended = c->ended;
    c->ended = 1;
    nbd_channel_fail_queued(c, -ECANCELED, &over);
    nbd_channel_unlock(c, over);
    if (was_ended)
        return;
    await_answers(c);
    over = NULL;
    pthread_mutex_lock(&c->lock);
    for (uint32_t kind = 0; kind < NBD_KINDS; kind++)
        say_goodbye(c, c->connections[kind], &over);
    nbd_channel_lose_all(c, ESHUTDOWN, "nothing is wanted any more", &over);
    nbd_channel_unlock(c, over);
}

int page_channel_nbd_event_fd(const struct page_channel *channel)
{
    return ((const struct nbd_channel *)channel)->event_fd;
}

int page_channel_nbd_next_event(struct page_channel *channel, struct nbd_event *event)
{
    struct nbd_channel *c = (struct nbd_channel *)channel;
    uint64_t value;

    pthread_mutex_lock(&c->lock);
    int found = c->n_events > 0;
    if (found) {
        *event = c->events[0];
        memmove(c->events, c->events + 1, --c->n_events * sizeof(c->events[0]));
    }
    if (c->n_events == 0) {
        ssize_t done = read(c->event_fd, &value, sizeof(value));
        (void)done;
    }
    pthread_mutex_unlock(&c->lock);
    return found;
}
