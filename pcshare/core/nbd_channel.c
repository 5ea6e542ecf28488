/* nbd_channel: see nbd_channel.h. */
#include "nbd_channel.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "thread.h"

enum {
    NBD_STREAM_IN_FLIGHT_MAX = 48, /* of a connection's; the rest is for demands */
    NBD_EPOLL_EVENTS = 4,
    NBD_TICKS = 4,          /* looks at the clock within a reply timeout */
    NBD_PATIENCE = 4,       /* reply timeouts that one read may take while others are answered */
    ROUND_TRIP_DRIFT = 256, /* a server that went away from us is known to be far after so many demands or some more */
};
static const uint64_t ns_per_ms = 1000000;
static const uint64_t far_ns = 1000000; /* a page takes longer, and it is not for want of a CPU */

/* ---- reads that wait, and jobs that are over ---- */

struct nbd_queue *nbd_channel_queue_of(struct nbd_channel *c, const struct nbd_read *read)
{
    return read->job->request->is_demand ? &c->demands : &c->streams;
}

void nbd_channel_unlock(struct nbd_channel *c, struct nbd_job *over)
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
        nbd_job_end(job);
    }
    pthread_mutex_lock(&c->lock);
    if (--c->n_ending == 0)
        pthread_cond_broadcast(&c->jobs_ended);
    pthread_mutex_unlock(&c->lock);
}

void nbd_channel_fail_queued(struct nbd_channel *c, int result, struct nbd_job **overp)
{
    struct nbd_read *read;

    while ((read = nbd_queue_pop(&c->demands)))
        nbd_job_read_over(read, result, overp);
    while ((read = nbd_queue_pop(&c->streams)))
        nbd_job_read_over(read, result, overp);
}

/* ---- connections: all with the lock held ---- */

int nbd_channel_is_served(const struct nbd_channel *c)
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

void nbd_channel_wake(const struct nbd_channel *c)
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
            nbd_job_read_over(read, -ECANCELED, overp);
        else
            nbd_queue_push_front(nbd_channel_queue_of(c, read), read);
    }
    return count;
}

void nbd_channel_drop(struct nbd_channel *c, struct nbd_connection *connection, struct nbd_job **overp)
{
    c->connections[connection->kind] = NULL;
    (void)epoll_ctl(c->epoll_fds[connection->kind], EPOLL_CTL_DEL, connection->fd, NULL);
    (void)shutdown(connection->fd, SHUT_RDWR);
    tell(c, connection, take_back(c, connection, overp));
    put_connection(connection);
    if (c->given_up && !nbd_channel_is_served(c)) /* that was said before anybody could drop it */
        nbd_channel_fail_queued(c, -c->given_up, overp);
}

/* Spoiled ones that nobody receives from go at once; else whoever receives drops it when he is through. */
static void lose_connection(struct nbd_channel *c, struct nbd_connection *connection, int error, const char *text,
                            struct nbd_job **overp)
{
    nbd_connection_spoil(connection, error, "%s", text);
    if (connection->receiving)
        (void)shutdown(connection->fd, SHUT_RDWR);
    else
        nbd_channel_drop(c, connection, overp);
}

void nbd_channel_lose_all(struct nbd_channel *c, int error, const char *text, struct nbd_job **overp)
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
static uint32_t ask_queued(struct nbd_queue *queue, struct nbd_connection *connection, uint32_t in_flight_max)
{
    uint64_t now_ns = queue->head ? clock_ns() : 0;
    uint32_t count = 0;

    for (; queue->head && nbd_connection_has_room(connection) && connection->n_in_flight < in_flight_max; count++)
        nbd_connection_ask(connection, nbd_queue_pop(queue), now_ns);
    return count;
}

int nbd_channel_send(struct nbd_channel *c, struct nbd_connection *connection, struct nbd_job **overp)
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
            nbd_channel_drop(c, connection, overp);
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

/* It looks again after it has sent: meanwhile all may have been answered by a thread that found the output full, and
 * then nobody else would. */
void nbd_channel_pump(struct nbd_channel *c, struct nbd_job **overp)
{
    int lost;

    (void)ask(c);
    do {
        lost = nbd_channel_send(c, c->connections[NBD_DEMAND], overp);
        lost |= nbd_channel_send(c, c->connections[NBD_PRIMARY], overp);
    } while (ask(c) || lost);
}

/* ---- receiving ---- */

/* The server refused this read. Where others have the same bytes, it is left for the next of them. */
static void handle_refusal(struct nbd_channel *c, struct nbd_read *read, struct nbd_job **overp)
{
    int is_leaving = read->error == ESHUTDOWN;
    char text[NBD_EVENT_TEXT_MAX];

    if (!is_leaving && ++read->refusals >= c->settings.server_count) {
        nbd_job_read_over(read, -read->error, overp);
        return;
    }
    nbd_queue_push_front(nbd_channel_queue_of(c, read), read);
    snprintf(text, sizeof(text), "the server refused to read at offset %llu: %s", (unsigned long long)read->offset,
             strerror(read->error));
    nbd_channel_lose_all(c, read->error, is_leaving ? "the server is shutting down" : text, overp);
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
        nbd_job_read_over(read, 0, &over);
    else if (c->ended)
        nbd_job_read_over(read, -ECANCELED, &over);
    else
        handle_refusal(c, read, &over);
    nbd_channel_pump(c, &over);
    nbd_channel_unlock(c, over);
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
    (void)nbd_channel_send(c, connection, &over); /* where the socket was full */
    connection->receiving = 0;
    if (c->connections[connection->kind] == connection) {
        if (!connection->error)
            arm(c, connection, EPOLL_CTL_MOD);
        if (connection->error)
            nbd_channel_drop(c, connection, &over);
    }
    put_connection(connection);
    nbd_channel_pump(c, &over);
    nbd_channel_unlock(c, over);
}

void nbd_channel_handle_ready(struct nbd_channel *c, uint32_t kind, uint64_t number)
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
    nbd_channel_pump(c, &over);
    nbd_channel_unlock(c, over);
}

static void drain_wake_fd(const struct nbd_channel *c)
{
    uint64_t value;
    ssize_t done = read(c->wake_fd, &value, sizeof(value));

    (void)done;
}

void *nbd_channel_run(void *argument)
{
    struct nbd_channel *c = argument;
    int tick_ms = (int)(c->settings.reply_timeout_ms / NBD_TICKS) + 1;
    uint64_t checked_ns = clock_ns();

    thread_step_back();
    while (!__atomic_load_n(&c->stopping, __ATOMIC_ACQUIRE)) {
        struct epoll_event events[NBD_EPOLL_EVENTS];
        int n = epoll_wait(c->epoll_fds[NBD_PRIMARY], events, NBD_EPOLL_EVENTS, tick_ms);

        for (int i = 0; i < n; i++) {
            if (events[i].data.u64 == nbd_wake_number)
                drain_wake_fd(c);
            else
                nbd_channel_handle_ready(c, NBD_PRIMARY, events[i].data.u64);
        }
        if (clock_ns() - checked_ns >= (uint64_t)tick_ms * ns_per_ms) {
            check_clock(c);
            checked_ns = clock_ns();
        }
    }
    return NULL;
}
