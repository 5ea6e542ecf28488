/* page_channel_nbd: see page_channel_nbd.h.
 *
 * One lock guards queues and connections; it is open over every system call. Who may receive from a connection is
 * decided by its epoll: events are one-shot and armed again when the receiver is through, so that several fault threads
 * can poll the demand connection.
 */
#define _GNU_SOURCE
#include "page_channel_nbd.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "nbd_connection.h"
#include "thread.h"

enum {
    NBD_KINDS = 2,
    NBD_STREAM_IN_FLIGHT_MAX = 48, /* of a connection's; the rest is for demands */
    NBD_EVENTS_MAX = 32,           /* not yet told; more losses than anybody can have connected meanwhile */
    NBD_EPOLL_EVENTS = 4,
    NBD_TICKS = 4,            /* looks at the clock within a reply timeout */
    NBD_PATIENCE = 4,         /* reply timeouts that one read may take while others are answered */
    NBD_FAREWELL_MS = 500,    /* how long answers are waited for at the end */
    NBD_FAREWELL_LOOK_MS = 5, /* between looks whether they have come */
    ROUND_TRIP_DRIFT = 256, /* a server that went away from us is known to be far after so many demands or some more */
    NBD_STREAM_PIECE_BYTES = 512 << 10,
    NBD_STREAM_PIECES = 16,        /* as many as nbdkit and qemu-nbd work on at once */
    NBD_STREAM_PIECES_NEAR = 1,    /* beside a demand: one that answers at once keeps CPUs busy that the demand needs */
    NBD_STREAM_PIECES_FAR = 4,     /* one that takes its time goes on at full speed */
    NBD_DEMANDS_OF_ONE_NEAR = 4,   /* pages of one helper: what a near server has to do is done one after the other */
    NBD_DEMANDS_OF_ONE_FAR = 16,   /* as many as nbdkit and qemu-nbd work on at once */
    NBD_DEMANDS_OF_CROWD_NEAR = 2, /* each wakes a thread, and so does each answer: those take the CPUs */
};
static const uint64_t ns_per_ms = 1000000;
static const uint64_t far_ns = 1000000; /* a page takes longer, and it is not for want of a CPU */
static const uint64_t wake_number = 0;  /* in an epoll's data: the channel's own eventfd */

/* A request, cut into reads that the server takes. */
struct nbd_job {
    struct nbd_job *next; /* in a list of those that are over */
    struct page_request *request;
    uint8_t *bounce; /* where the server's alignment asks for more than the request */
    uint64_t bounce_offset;
    int result;
    uint32_t n_open;
    struct nbd_read reads[];
};

struct read_queue {
    struct nbd_read *head;
    struct nbd_read *tail;
};

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
    struct read_queue demands;
    struct read_queue streams;
    struct nbd_event events[NBD_EVENTS_MAX];
    uint32_t n_events;
    uint64_t round_trip_ns; /* of a demand, about the shortest of late; 0: not known */
};

/* ---- queues ---- */

static void queue_push(struct read_queue *queue, struct nbd_read *read)
{
    read->next = NULL;
    if (queue->tail)
        queue->tail->next = read;
    else
        queue->head = read;
    queue->tail = read;
}

static void queue_push_front(struct read_queue *queue, struct nbd_read *read)
{
    read->next = queue->head;
    queue->head = read;
    if (!queue->tail)
        queue->tail = read;
}

static struct nbd_read *queue_pop(struct read_queue *queue)
{
    struct nbd_read *read = queue->head;

    if (read) {
        queue->head = read->next;
        if (!queue->head)
            queue->tail = NULL;
        read->next = NULL;
    }
    return read;
}

static struct read_queue *queue_of(struct nbd_channel *c, const struct nbd_read *read)
{
    return read->job->request->is_demand ? &c->demands : &c->streams;
}

/* ---- jobs ---- */

static uint64_t align_down(uint64_t value, uint64_t alignment)
{
    return value & ~(alignment - 1);
}

/* The reads of a job, in order; on the wire each is as long as the server takes. */
static void cut_into_reads(struct nbd_job *job, uint64_t start, uint64_t end, uint8_t *bytes, uint32_t most)
{
    for (uint64_t at = start; at < end; at += most) {
        struct nbd_read *read = &job->reads[job->n_open++];

        read->job = job;
        read->offset = at;
        read->length = (uint32_t)(end - at < most ? end - at : most);
        read->bytes = bytes + (at - start);
    }
}

static int job_new(struct nbd_job **jobp, const struct nbd_channel *c, struct page_request *request)
{
    uint64_t alignment = c->settings.alignment, most = align_down(c->settings.length_max, alignment);
    uint64_t end = request->offset + request->length, start = align_down(request->offset, alignment);

    if (request->length == 0 || end < request->offset || end > c->settings.size)
        return -EINVAL;
    uint64_t aligned_end = align_down(end + alignment - 1, alignment);
    if (aligned_end > c->settings.size)
        aligned_end = c->settings.size;
    uint64_t count = (aligned_end - start + most - 1) / most;
    struct nbd_job *job = calloc(1, sizeof(*job) + count * sizeof(job->reads[0]));
    if (!job)
        return -ENOMEM;
    job->request = request;
    if (start != request->offset || aligned_end != end) {
        job->bounce = malloc(aligned_end - start);
        if (!job->bounce) {
            free(job);
            return -ENOMEM;
        }
        job->bounce_offset = request->offset - start;
    }
    cut_into_reads(job, start, aligned_end, job->bounce ? job->bounce : request->bytes, (uint32_t)most);
    *jobp = job;
    return 0;
}

/* With the lock held: one read less is open. A job that is over goes to the list. */
static void read_over(struct nbd_read *read, int result, struct nbd_job **overp)
{
    struct nbd_job *job = read->job;

    if (result < 0)
        job->result = result;
    if (--job->n_open == 0) {
        job->next = *overp;
        *overp = job;
    }
}

static void end_job(struct nbd_job *job)
{
    struct page_request *request = job->request;
    int result = job->result;

    if (result == 0 && job->bounce)
        memcpy(request->bytes, job->bounce + job->bounce_offset, request->length);
    free(job->bounce);
    free(job);
    request->done(request, result);
}

/* Opens the lock; those who asked hear of what is over. */
static void unlock_and_end(struct nbd_channel *c, struct nbd_job *over)
{
    if (!over) {
        pthread_mutex_unlock(&c->lock);
        return;
    }
    c->n_ending++;
    pthread_mutex_unlock(&c->lock);
    while (over) {
        struct nbd_job *job = over;

        over = job->next;
        end_job(job);
    }
    pthread_mutex_lock(&c->lock);
    if (--c->n_ending == 0)
        pthread_cond_broadcast(&c->jobs_ended);
    pthread_mutex_unlock(&c->lock);
}

/* With the lock held. */
static void fail_queued(struct nbd_channel *c, int result, struct nbd_job **overp)
{
    struct nbd_read *read;

    while ((read = queue_pop(&c->demands)))
        read_over(read, result, overp);
    while ((read = queue_pop(&c->streams)))
        read_over(read, result, overp);
}

/* ---- connections: all with the lock held ---- */

static int is_served(const struct nbd_channel *c)
{
    return c->connections[NBD_PRIMARY] || c->connections[NBD_DEMAND];
}

static void arm(struct nbd_channel *c, struct nbd_connection *connection, int operation)
{
    uint32_t more = connection->blocked ? EPOLLOUT : 0;
    struct epoll_event event = {.events = EPOLLIN | EPOLLONESHOT | more, .data.u64 = connection->number};

    if (epoll_ctl(c->epoll_fds[connection->kind], operation, connection->fd, &event) < 0)
        nbd_connection_spoil(connection, errno, "polling it: %s", strerror(errno));
}

static void wake_thread(const struct nbd_channel *c)
{
    uint64_t one = 1;
    ssize_t done = write(c->wake_fd, &one, sizeof(one));

    (void)done;
}

static void tell(struct nbd_channel *c, const struct nbd_connection *connection, uint32_t n_owed)
{
    uint64_t one = 1;

    if (c->n_events == NBD_EVENTS_MAX)
        memmove(c->events, c->events + 1, --c->n_events * sizeof(c->events[0]));
    struct nbd_event *event = &c->events[c->n_events++];
    *event = (struct nbd_event){.connection = connection->number, .error = connection->error, .n_owed = n_owed};
    memcpy(event->text, connection->text, sizeof(event->text));
    ssize_t done = write(c->event_fd, &one, sizeof(one));
    (void)done;
}

static void put_connection(struct nbd_connection *connection)
{
    if (--connection->users == 0)
        nbd_connection_free(connection);
}

/* Its reads wait again, before all others. */
static uint32_t take_back(struct nbd_channel *c, struct nbd_connection *connection, struct nbd_job **overp)
{
    struct nbd_read *list = nbd_connection_take_all(connection);
    uint32_t count = 0;

    while (list) {
        struct nbd_read *read = list;

        list = read->next;
        count++;
        if (c->ended)
            read_over(read, -ECANCELED, overp);
        else
            queue_push_front(queue_of(c, read), read);
    }
    return count;
}

/* It is spoiled, and nobody receives from it. */
static void drop_connection(struct nbd_channel *c, struct nbd_connection *connection, struct nbd_job **overp)
{
    c->connections[connection->kind] = NULL;
    (void)epoll_ctl(c->epoll_fds[connection->kind], EPOLL_CTL_DEL, connection->fd, NULL);
    (void)shutdown(connection->fd, SHUT_RDWR);
    tell(c, connection, take_back(c, connection, overp));
    put_connection(connection);
    if (c->given_up && !is_served(c)) /* that was said before anybody could drop it */
        fail_queued(c, -c->given_up, overp);
}

/* Spoiled ones that nobody receives from go at once; else whoever receives drops it when he is through. */
static void lose_connection(struct nbd_channel *c, struct nbd_connection *connection, int error, const char *text,
                            struct nbd_job **overp)
{
    nbd_connection_spoil(connection, error, "%s", text);
    if (connection->receiving)
        (void)shutdown(connection->fd, SHUT_RDWR);
    else
        drop_connection(c, connection, overp);
}

static void lose_all(struct nbd_channel *c, int error, const char *text, struct nbd_job **overp)
{
    for (uint32_t kind = 0; kind < NBD_KINDS; kind++)
        if (c->connections[kind])
            lose_connection(c, c->connections[kind], error, text, overp);
}

static struct nbd_connection *connection_for(const struct nbd_channel *c, int is_demand)
{
    if (is_demand && c->connections[NBD_DEMAND])
        return c->connections[NBD_DEMAND];
    return c->connections[NBD_PRIMARY];
}

/* How many were asked. */
static uint32_t ask_queued(struct read_queue *queue, struct nbd_connection *connection, uint32_t in_flight_max)
{
    uint64_t now_ns = queue->head ? clock_ns() : 0;
    uint32_t count = 0;

    for (; queue->head && nbd_connection_has_room(connection) && connection->n_in_flight < in_flight_max; count++)
        nbd_connection_ask(connection, queue_pop(queue), now_ns);
    return count;
}

/* 1: it was lost, and what it owed waits again. */
static int send_output(struct nbd_channel *c, struct nbd_connection *connection, struct nbd_job **overp)
{
    int lost = 0;

    if (!connection || !connection->output_length || connection->error)
        return 0;
    connection->users++;
    nbd_connection_send(connection, &c->lock);
    if (c->connections[connection->kind] == connection && !connection->receiving) {
        if (connection->blocked && !connection->error)
            arm(c, connection, EPOLL_CTL_MOD);
        lost = connection->error != 0;
        if (lost)
            drop_connection(c, connection, overp);
    }
    put_connection(connection);
    return lost;
}

static uint32_t ask(struct nbd_channel *c)
{
    struct nbd_connection *for_demands = connection_for(c, 1), *for_streams = connection_for(c, 0);
    uint32_t count = 0;

    if (for_demands)
        count += ask_queued(&c->demands, for_demands, NBD_IN_FLIGHT_MAX);
    if (for_streams)
        count += ask_queued(&c->streams, for_streams, NBD_STREAM_IN_FLIGHT_MAX);
    return count;
}

/* Asks for what waits, as far as connections take it: demands first. It looks again after it has sent: meanwhile all
 * may have been answered by a thread that found the output full, and then nobody else would. */
static void pump(struct nbd_channel *c, struct nbd_job **overp)
{
    int lost;

    (void)ask(c);
    do {
        lost = send_output(c, c->connections[NBD_DEMAND], overp);
        lost |= send_output(c, c->connections[NBD_PRIMARY], overp);
    } while (ask(c) || lost);
}

/* ---- receiving ---- */

/* The server refused this read. Where others have the same bytes, it is left for the next of them. */
static void handle_refusal(struct nbd_channel *c, struct nbd_read *read, struct nbd_job **overp)
{
    int is_leaving = read->error == ESHUTDOWN;
    char text[NBD_EVENT_TEXT_MAX];

    if (!is_leaving && ++read->refusals >= c->settings.server_count) {
        read_over(read, -read->error, overp);
        return;
    }
    queue_push_front(queue_of(c, read), read);
    snprintf(text, sizeof(text), "the server refused to read at offset %llu: %s", (unsigned long long)read->offset,
             strerror(read->error));
    lose_all(c, read->error, is_leaving ? "the server is shutting down" : text, overp);
}

/* The shortest of late says how far the server is; longer ones, how busy it or this machine is. */
static void note_round_trip(struct nbd_channel *c, const struct nbd_read *read)
{
    uint64_t took_ns = clock_ns() - read->asked_ns;

    if (c->round_trip_ns == 0 || took_ns < c->round_trip_ns)
        c->round_trip_ns = took_ns;
    else
        c->round_trip_ns += c->round_trip_ns / ROUND_TRIP_DRIFT + 1;
    int is_near = c->round_trip_ns < far_ns;
    __atomic_store_n(&c->channel.stream_piece_count_demand, is_near ? NBD_STREAM_PIECES_NEAR : NBD_STREAM_PIECES_FAR,
                     __ATOMIC_RELAXED);
    __atomic_store_n(&c->channel.demands_of_one, is_near ? NBD_DEMANDS_OF_ONE_NEAR : NBD_DEMANDS_OF_ONE_FAR,
                     __ATOMIC_RELAXED);
    __atomic_store_n(&c->channel.demands_of_crowd, is_near ? NBD_DEMANDS_OF_CROWD_NEAR : 0, __ATOMIC_RELAXED);
}

static void handle_answer(struct nbd_channel *c, struct nbd_read *read)
{
    struct nbd_job *over = NULL;

    pthread_mutex_lock(&c->lock);
    if (read->job->request->is_demand)
        note_round_trip(c, read);
    if (!read->error)
        read_over(read, 0, &over);
    else if (c->ended)
        read_over(read, -ECANCELED, &over);
    else
        handle_refusal(c, read, &over);
    pump(c, &over);
    unlock_and_end(c, over);
}

/* Whether there may be more to read at once. On the demand connection what is not owed does not come. */
static int may_have_more(struct nbd_channel *c, const struct nbd_connection *connection)
{
    pthread_mutex_lock(&c->lock);
    int more = !connection->error && (connection->kind == NBD_PRIMARY || connection->n_in_flight ||
                                      connection->input_end != connection->input_start);
    pthread_mutex_unlock(&c->lock);
    return more;
}

/* What was read ahead is used up in any case: its epoll knows nothing of it. */
static void receive_replies(struct nbd_channel *c, struct nbd_connection *connection)
{
    for (int i = 0; i < NBD_RECEIVE_CALLS_MAX || nbd_connection_has_input(connection); i++) {
        struct nbd_read *read = NULL;
        int rc = nbd_connection_receive(connection, &c->lock, &read);

        if (rc == NBD_RECEIVED_ALL || rc < 0)
            return;
        if (rc == NBD_RECEIVED_READ) {
            handle_answer(c, read);
            if (!may_have_more(c, connection))
                return;
        }
    }
}

static struct nbd_connection *begin_receiving(struct nbd_channel *c, uint32_t kind, uint64_t number)
{
    struct nbd_connection *connection;

    pthread_mutex_lock(&c->lock);
    connection = c->connections[kind];
    if (connection && (connection->number != number || connection->receiving))
        connection = NULL;
    if (connection) {
        connection->receiving = 1;
        connection->users++;
    }
    pthread_mutex_unlock(&c->lock);
    return connection;
}

static void end_receiving(struct nbd_channel *c, struct nbd_connection *connection)
{
    struct nbd_job *over = NULL;

    pthread_mutex_lock(&c->lock);
    (void)send_output(c, connection, &over); /* where the socket was full */
    connection->receiving = 0;
    if (c->connections[connection->kind] == connection) {
        if (!connection->error)
            arm(c, connection, EPOLL_CTL_MOD);
        if (connection->error)
            drop_connection(c, connection, &over);
    }
    put_connection(connection);
    pump(c, &over);
    unlock_and_end(c, over);
}

static void handle_ready(struct nbd_channel *c, uint32_t kind, uint64_t number)
{
    struct nbd_connection *connection = begin_receiving(c, kind, number);

    if (!connection)
        return;
    receive_replies(c, connection);
    end_receiving(c, connection);
}

/* ---- the thread: the primary connection and the clock ---- */

static uint64_t oldest_ns(const struct nbd_connection *connection, uint64_t now_ns)
{
    uint64_t oldest = now_ns;

    for (uint32_t slot = 0; slot < NBD_IN_FLIGHT_MAX; slot++)
        if (connection->in_flight[slot] && connection->in_flight[slot]->asked_ns < oldest)
            oldest = connection->in_flight[slot]->asked_ns;
    return oldest;
}

static void check_connection(struct nbd_channel *c, struct nbd_connection *connection, struct nbd_job **overp)
{
    uint64_t timeout_ns = c->settings.reply_timeout_ms * ns_per_ms, now_ns = clock_ns();
    uint64_t heard_ns = __atomic_load_n(&connection->heard_ns, __ATOMIC_RELAXED);
    uint64_t asked_ns = oldest_ns(connection, now_ns);
    char text[NBD_EVENT_TEXT_MAX];

    if (heard_ns + timeout_ns <= now_ns)
        snprintf(text, sizeof(text), "the server owes %u replies and was silent for %.1f s", connection->n_in_flight,
                 (double)(now_ns - heard_ns) / 1e9);
    else if (asked_ns + NBD_PATIENCE * timeout_ns <= now_ns)
        snprintf(text, sizeof(text), "the server has left a read without its reply for %.1f s",
                 (double)(now_ns - asked_ns) / 1e9);
    else
        return;
    lose_connection(c, connection, ETIMEDOUT, text, overp);
}

static void check_clock(struct nbd_channel *c)
{
    struct nbd_job *over = NULL;

    pthread_mutex_lock(&c->lock);
    for (uint32_t kind = 0; kind < NBD_KINDS; kind++)
        if (c->connections[kind] && c->connections[kind]->n_in_flight)
            check_connection(c, c->connections[kind], &over);
    pump(c, &over);
    unlock_and_end(c, over);
}

static void drain_wake_fd(const struct nbd_channel *c)
{
    uint64_t value;
    ssize_t done = read(c->wake_fd, &value, sizeof(value));

    (void)done;
}

static void *channel_run(void *argument)
{
    struct nbd_channel *c = argument;
    int tick_ms = (int)(c->settings.reply_timeout_ms / NBD_TICKS) + 1;
    uint64_t checked_ns = clock_ns();

    thread_step_back();
    while (!__atomic_load_n(&c->stopping, __ATOMIC_ACQUIRE)) {
        struct epoll_event events[NBD_EPOLL_EVENTS];
        int n = epoll_wait(c->epoll_fds[NBD_PRIMARY], events, NBD_EPOLL_EVENTS, tick_ms);

        for (int i = 0; i < n; i++) {
            if (events[i].data.u64 == wake_number)
                drain_wake_fd(c);
            else
                handle_ready(c, NBD_PRIMARY, events[i].data.u64);
        }
        if (clock_ns() - checked_ns >= (uint64_t)tick_ms * ns_per_ms) {
            check_clock(c);
            checked_ns = clock_ns();
        }
    }
    return NULL;
}

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
    int rc = job_new(&job, c, request);

    if (rc < 0) {
        request->done(request, rc);
        return;
    }
    pthread_mutex_lock(&c->lock);
    int refused = c->ended ? -ECANCELED : is_served(c) ? 0 : -c->given_up;
    uint32_t count = job->n_open; /* the job may be over before the loop is */
    for (uint32_t i = 0; i < count; i++) {
        if (refused)
            read_over(&job->reads[i], refused, &over);
        else
            queue_push(queue_of(c, &job->reads[i]), &job->reads[i]);
    }
    pump(c, &over);
    unlock_and_end(c, over);
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
        handle_ready(c, NBD_DEMAND, event.data.u64);
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
            drop_connection(c, c->connections[kind], &over);
    unlock_and_end(c, over);
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
    wake_thread(c);
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
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = wake_number};

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
        rc = thread_new(&c->thread, "pcshare-nbd", channel_run, c);
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
        pump(c, &over);
    } else {
        nbd_connection_free(connection);
    }
    unlock_and_end(c, over);
    return rc;
}

void page_channel_nbd_disconnect(struct page_channel *channel, int error, const char *text)
{
    struct nbd_channel *c = (struct nbd_channel *)channel;
    struct nbd_job *over = NULL;

    pthread_mutex_lock(&c->lock);
    lose_all(c, error, text, &over);
    unlock_and_end(c, over);
}

void page_channel_nbd_give_up(struct page_channel *channel, int error)
{
    struct nbd_channel *c = (struct nbd_channel *)channel;
    struct nbd_job *over = NULL;

    pthread_mutex_lock(&c->lock);
    c->given_up = error;
    if (error && !is_served(c))
        fail_queued(c, -error, &over);
    unlock_and_end(c, over);
}

static void say_goodbye(struct nbd_channel *c, struct nbd_connection *connection, struct nbd_job **overp)
{
    if (!connection || connection->n_in_flight)
        return;
    nbd_connection_say_goodbye(connection);
    (void)send_output(c, connection, overp);
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
    fail_queued(c, -ECANCELED, &over);
    unlock_and_end(c, over);
    if (was_ended)
        return;
    await_answers(c);
    over = NULL;
    pthread_mutex_lock(&c->lock);
    for (uint32_t kind = 0; kind < NBD_KINDS; kind++)
        say_goodbye(c, c->connections[kind], &over);
    lose_all(c, ESHUTDOWN, "nothing is wanted any more", &over);
    unlock_and_end(c, over);
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
