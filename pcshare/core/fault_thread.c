/* fault_thread: the threads, what they poll and how they start and end; see fault_thread.h. */
#define _GNU_SOURCE
#include "fault_internal.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "memory_room.h"
#include "thread.h"
#include "trace.h"
#include "uffd.h"

static const uint64_t beside_others_ns = 100000000; /* since another helper faulted: then it is likely to fault again */

/* ---- polling ---- */

static int control_polling(const struct fault_worker *worker, int operation, int fd, uint64_t kind, uint32_t id,
                           int polls)
{
    struct epoll_event event = {.events = polls ? EPOLLIN : 0, .data.u64 = kind << POLL_KIND_SHIFT | id};

    return epoll_ctl(worker->epoll_fd, operation, fd, &event) < 0 ? -errno : 0;
}

static int add_fd(const struct fault_worker *worker, int fd, uint64_t kind, uint32_t id, int polls)
{
    return control_polling(worker, EPOLL_CTL_ADD, fd, kind, id, polls);
}

static int poll_fd(const struct fault_worker *worker, int fd, uint64_t kind, uint32_t id)
{
    return add_fd(worker, fd, kind, id, 1);
}

void change_polling(struct fault_worker *worker, struct remote_fd *remote, int polls)
{
    (void)control_polling(worker, EPOLL_CTL_MOD, remote->uffd, POLL_UFFD, remote->id, polls);
}

void change_polling_channel(struct fault_worker *worker, struct served_block *served, int polls)
{
    int fd = page_channel_poll_fd(served->channel);

    (void)control_polling(worker, EPOLL_CTL_MOD, fd, POLL_CHANNEL, served->block->index, polls);
}

void stop_polling(struct fault_threads *ft, int fd)
{
    for (uint32_t i = 0; fd >= 0 && i < ft->n_workers; i++)
        (void)epoll_ctl(ft->workers[i].epoll_fd, EPOLL_CTL_DEL, fd, NULL);
}

void stop_polling_control(struct fault_threads *ft, struct remote_fd *remote)
{
    stop_polling(ft, remote->control);
}

/* Every worker knows every uffd, and those poll it that shall; one of them reads the control sockets. Before there is a
 * worker: when they start. A fault may wait already, and must give the helper no home before all workers know it. Nor
 * must a channel have a taker before all know it that may. */
int start_polling(struct fault_threads *ft, struct remote_fd *remote)
{
    int rc = 0;

    __atomic_store_n(&remote->home_moves, 1, __ATOMIC_RELEASE);
    if (remote->control >= 0 && ft->n_workers)
        rc = poll_fd(&ft->workers[0], remote->control, POLL_CONTROL, remote->id);
    for (uint32_t i = 0; rc == 0 && i < ft->n_workers; i++)
        rc = add_fd(&ft->workers[i], remote->uffd, POLL_UFFD, remote->id, polls_anywhere(&ft->workers[i]));
    __atomic_store_n(&remote->home_moves, 0, __ATOMIC_RELEASE);
    return rc;
}

int start_polling_channel(struct fault_threads *ft, struct served_block *served)
{
    int fd = page_channel_poll_fd(served->channel), rc = 0;

    for (uint32_t i = 0; fd >= 0 && rc == 0 && i < ft->n_workers; i++)
        if (polls_anywhere(&ft->workers[i]))
            rc = poll_fd(&ft->workers[i], fd, POLL_CHANNEL, served->block->index);
    if (ft->n_workers)
        __atomic_store_n(&served->taker_moves, 0, __ATOMIC_RELEASE);
    return rc;
}

void disable_remote(struct fault_threads *ft, struct remote_fd *remote, int error, uint64_t addr)
{
    if (__atomic_exchange_n(&remote->disabled, 1, __ATOMIC_ACQ_REL))
        return;
    trace_point(TRACE_REMOTE_DISABLE, remote->block->index, remote->id, 0, (uint64_t)error);
    stop_polling(ft, remote->uffd);
    stop_polling(ft, remote->control);
    demand_drop_remote(ft, remote);
    stream_drop_remote(ft, remote);
    tell_remote(ft, remote, EVENT_REMOTE_DISABLED, error, addr);
}

static void handle_fault_message(struct fault_worker *worker, struct remote_fd *remote,
                                 const struct uffd_message *message)
{
    uint64_t page;

    if (message->event != UFFD_MESSAGE_PAGEFAULT) {
        if (message->fork_fd >= 0)
            close(message->fork_fd);
        disable_remote(worker->ft, remote, EBADMSG, message->fault_addr);
    } else if (remote_fd_page(remote, message->fault_addr, &page) < 0) {
        disable_remote(worker->ft, remote, EFAULT, message->fault_addr);
    } else {
        request_shared_page(worker->ft, worker, remote, page, message->tid);
    }
}

int is_beside_others(const struct fault_threads *ft, uint64_t now_ns)
{
    return now_ns < __atomic_load_n(&ft->beside_others_until_ns, __ATOMIC_RELAXED);
}

/* How many faults of a helper are answered in a row. While others fault too it is one: each answer makes a thread
 * runnable, and behind sixteen of one helper's another's fault waits, and then its thread, which is longer. */
static uint32_t batch_for(struct fault_threads *ft, const struct remote_fd *remote, uint64_t now_ns)
{
    uint32_t last = __atomic_load_n(&ft->last_faulter, __ATOMIC_RELAXED);

    if (last != remote->id) {
        __atomic_store_n(&ft->last_faulter, remote->id, __ATOMIC_RELAXED);
        if (last)
            __atomic_store_n(&ft->beside_others_until_ns, now_ns + beside_others_ns, __ATOMIC_RELAXED);
    }
    return is_beside_others(ft, now_ns) ? 1 : UFFD_READ_MAX;
}

static void answer_faults(struct fault_worker *worker, struct remote_fd *remote, uint32_t most)
{
    struct uffd_message messages[UFFD_READ_MAX];
    int n = uffd_read(remote->uffd, messages, most);
    if (n < 0 && n != -EINTR)
        disable_remote(worker->ft, remote, -n, 0);
    for (int i = 0; i < n; i++)
        handle_fault_message(worker, remote, &messages[i]);
    ahead_bring(worker, remote);
    if (n > 0)
        home_note_fault(worker->ft, remote, messages[n - 1].tid);
}

/* One batch a round, so that one helper cannot keep the others waiting; level-triggered, so nothing is forgotten. */
static void handle_uffd(struct fault_worker *worker, struct remote_fd *remote, uint32_t poll_events)
{
    if (poll_events & EPOLLERR) { /* its owner made it blocking */
        disable_remote(worker->ft, remote, EBADFD, 0);
        return;
    }
    uint64_t now_ns = clock_ns();
    uint32_t most = batch_for(worker->ft, remote, now_ns);
    if (crowd_must_rest(worker, remote, now_ns))
        return;
    if (remote->has_events)
        follow_uffd(worker, remote, most, now_ns);
    else
        answer_faults(worker, remote, most);
    crowd_note_answered(worker, remote, now_ns);
}

static void handle_channel(struct fault_threads *ft, uint32_t block_index)
{
    struct served_block *served = __atomic_load_n(&ft->blocks[block_index], __ATOMIC_ACQUIRE);

    if (served)
        page_channel_dispatch(served->channel);
}

static void dispatch(struct fault_worker *worker, const struct epoll_event *event)
{
    uint64_t kind = event->data.u64 >> POLL_KIND_SHIFT;

    if (kind == POLL_QUIT)
        return;
    if (kind == POLL_CHANNEL) {
        handle_channel(worker->ft, (uint32_t)event->data.u64);
        wait_note_answer(worker);
        return;
    }
    struct remote_fd *remote = remote_by_id(worker->ft, (uint32_t)event->data.u64);
    if (!remote)
        return;
    if (!__atomic_load_n(&remote->disabled, __ATOMIC_ACQUIRE)) {
        if (kind == POLL_CONTROL) {
            handle_control(worker->ft, remote);
        } else {
            handle_uffd(worker, remote, event->events);
            wait_note_fault(worker, remote);
        }
    } else { /* cut off while it was being added */
        (void)epoll_ctl(worker->epoll_fd, EPOLL_CTL_DEL, kind == POLL_UFFD ? remote->uffd : remote->control, NULL);
    }
    remote_fd_put(remote);
}

int worker_is_wanted(const struct fault_worker *worker, const struct remote_fd *remote)
{
    struct epoll_event events[2]; /* one of them may be this remote fd's */
    int n = epoll_wait(worker->epoll_fd, events, 2, 0);

    for (int i = 0; i < n; i++)
        if (events[i].data.u64 != ((uint64_t)POLL_UFFD << POLL_KIND_SHIFT | remote->id))
            return 1;
    return 0;
}

/* ---- workers ---- */

static void pass_by(struct fault_worker *worker)
{
    struct fault_threads *ft = worker->ft;

    if (worker->started && worker->epoch_seen == __atomic_load_n(&ft->epoch, __ATOMIC_ACQUIRE))
        return;
    pthread_mutex_lock(&ft->workers_lock);
    worker->started = 1;
    worker->epoch_seen = ft->epoch;
    pthread_cond_broadcast(&ft->workers_changed);
    pthread_mutex_unlock(&ft->workers_lock);
}

static void *worker_run(void *argument)
{
    struct fault_worker *worker = argument;
    struct fault_threads *ft = worker->ft;
    struct epoll_event events[EPOLL_EVENTS_MAX];

    thread_be_prompt();
    trace_point(TRACE_THREAD_START, 0, worker->number, 0, (uint64_t)(int64_t)worker->cpu);
    for (;;) {
        pass_by(worker);
        if (__atomic_load_n(&ft->quit, __ATOMIC_ACQUIRE))
            break;
        int n = wait_for_events(worker, events, EPOLL_EVENTS_MAX);
        for (int i = 0; i < n; i++)
            dispatch(worker, &events[i]);
    }
    trace_point(TRACE_THREAD_QUIT, 0, worker->number, 0, 0);
    return NULL;
}

static void pin(const struct fault_worker *worker)
{
    cpu_set_t set;

    if (worker->cpu < 0)
        return;
    CPU_ZERO(&set);
    CPU_SET((size_t)worker->cpu, &set);
    (void)pthread_setaffinity_np(worker->thread, sizeof(set), &set); /* a CPU that went away: unpinned serves too */
}

static int start_worker(struct fault_threads *ft, uint32_t number, int32_t cpu)
{
    struct fault_worker *worker = &ft->workers[number];

    *worker = (struct fault_worker){.ft = ft, .number = number, .cpu = cpu, .epoll_fd = -1};
    worker->staging = mmap(NULL, RAMBLOCK_PAGE_SIZE_MAX, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (worker->staging == MAP_FAILED) {
        worker->staging = NULL;
        return -errno;
    }
    worker->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (worker->epoll_fd < 0)
        return -errno;
    int rc = poll_fd(worker, ft->quit_fd, POLL_QUIT, 0);
    if (rc == 0)
        rc = thread_new(&worker->thread, "pcshare-fault", worker_run, worker);
    if (rc == 0)
        pin(worker);
    return rc;
}

static void free_worker(struct fault_worker *worker)
{
    if (worker->epoll_fd >= 0)
        close(worker->epoll_fd);
    if (worker->staging)
        munmap(worker->staging, RAMBLOCK_PAGE_SIZE_MAX);
    worker->epoll_fd = -1;
    worker->staging = NULL;
}

static void set_quit_fd(struct fault_threads *ft, int readable)
{
    uint64_t value = 1;
    ssize_t done = readable ? write(ft->quit_fd, &value, sizeof(value)) : read(ft->quit_fd, &value, sizeof(value));

    (void)done;
}

static int all_passed(const struct fault_threads *ft, uint32_t epoch)
{
    for (uint32_t i = 0; i < ft->n_workers; i++)
        if (!ft->workers[i].started || ft->workers[i].epoch_seen != epoch)
            return 0;
    return 1;
}

/* Returns when no worker holds on to what it saw before: each has been at the top of its loop. */
void wait_for_workers(struct fault_threads *ft)
{
    pthread_mutex_lock(&ft->workers_lock);
    uint32_t epoch = __atomic_add_fetch(&ft->epoch, 1, __ATOMIC_ACQ_REL);
    set_quit_fd(ft, 1);
    while (!all_passed(ft, epoch))
        pthread_cond_wait(&ft->workers_changed, &ft->workers_lock);
    set_quit_fd(ft, 0);
    pthread_mutex_unlock(&ft->workers_lock);
}

static int poll_existing(struct fault_threads *ft)
{
    int rc = 0;

    for (uint32_t slot = 0; slot < REMOTES_MAX && rc == 0; slot++)
        if (ft->remotes[slot])
            rc = start_polling(ft, ft->remotes[slot]);
    for (uint32_t i = 0; i < STATUS_BLOCKS_MAX && rc == 0; i++)
        if (ft->blocks[i])
            rc = start_polling_channel(ft, ft->blocks[i]);
    return rc;
}

int fault_threads_start(struct fault_threads *ft, const int32_t *cpus, uint32_t n)
{
    int rc = 0;

    if (n == 0 || n > FAULT_THREADS_MAX || ft->n_workers)
        return -EINVAL;
    for (uint32_t i = 0; i < n && rc == 0; i++) {
        rc = start_worker(ft, i, cpus[i]);
        if (rc == 0)
            ft->n_workers++;
        else
            free_worker(&ft->workers[i]);
    }
    if (rc == 0) {
        wait_for_workers(ft);
        working_set_know_kept(ft);
        rc = poll_existing(ft);
    }
    if (rc == 0)
        rc = stream_start(ft);
    if (rc == 0)
        lift_what_is_kept(ft);
    else
        fault_threads_stop(ft);
    return rc;
}

/* Frees the channels: what is in flight ends, also what a slow source would take minutes for. */
static void free_channels(struct fault_threads *ft)
{
    for (uint32_t i = 0; i < STATUS_BLOCKS_MAX; i++) {
        if (ft->blocks[i] && ft->blocks[i]->channel) {
            page_channel_free(ft->blocks[i]->channel);
            ft->blocks[i]->channel = NULL;
        }
    }
}

void fault_threads_stop(struct fault_threads *ft)
{
    __atomic_store_n(&ft->quit, 1, __ATOMIC_RELEASE);
    set_quit_fd(ft, 1);
    for (uint32_t i = 0; i < ft->n_workers; i++)
        pthread_join(ft->workers[i].thread, NULL);
    stream_quiesce(ft);
    free_channels(ft);
    stream_stop(ft); /* to its end it may cut off a helper, which takes the workers' epolls */
    for (uint32_t i = 0; i < ft->n_workers; i++)
        free_worker(&ft->workers[i]);
    ft->n_workers = 0;
}

/* ---- the set ---- */

static uint32_t count_cpus(void)
{
    cpu_set_t set;

    if (sched_getaffinity(0, sizeof(set), &set) < 0) /* there are more than fit */
        return CPU_SETSIZE;
    return (uint32_t)CPU_COUNT(&set);
}

int fault_threads_new(struct fault_threads **ftp, struct status_header *status)
{
    struct fault_threads *ft = calloc(1, sizeof(*ft));

    *ftp = NULL;
    if (!ft)
        return -ENOMEM;
    ft->status = status;
    ft->n_cpus = count_cpus();
    memory_room_get();
    pthread_mutex_init(&ft->workers_lock, NULL);
    pthread_cond_init(&ft->workers_changed, NULL);
    pthread_mutex_init(&ft->table_lock, NULL);
    pthread_mutex_init(&ft->events_lock, NULL);
    pthread_mutex_init(&ft->demands_lock, NULL);
    waiters_init(&ft->waiters);
    working_set_init(&ft->working_set);
    ft->maps_fd = -1;
    ft->quit_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    ft->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    int rc = ft->quit_fd < 0 || ft->event_fd < 0 ? -errno : stream_init(ft);
    if (rc < 0) {
        fault_threads_free(ft);
        return rc;
    }
    *ftp = ft;
    return 0;
}

void fault_threads_free(struct fault_threads *ft)
{
    if (!ft)
        return;
    fault_threads_stop(ft);
    waiters_deinit(&ft->waiters);
    for (uint32_t slot = 0; slot < REMOTES_MAX; slot++) {
        if (ft->remotes[slot]) {
            stream_drop_remote(ft, ft->remotes[slot]);
            remote_fd_put(ft->remotes[slot]);
        }
    }
    for (uint32_t i = 0; i < STATUS_BLOCKS_MAX; i++) {
        if (ft->blocks[i]) {
            stream_drop_block(ft, ft->blocks[i]->block);
            working_set_drop_block(ft, ft->blocks[i]->block);
            ramblock_free(ft->blocks[i]->block);
            free(ft->blocks[i]);
        }
    }
    stream_deinit(ft);
    working_set_deinit(&ft->working_set);
    memory_room_put();
    if (ft->maps_fd >= 0)
        close(ft->maps_fd);
    if (ft->quit_fd >= 0)
        close(ft->quit_fd);
    if (ft->event_fd >= 0)
        close(ft->event_fd);
    pthread_mutex_destroy(&ft->demands_lock);
    pthread_mutex_destroy(&ft->events_lock);
    pthread_mutex_destroy(&ft->table_lock);
    pthread_cond_destroy(&ft->workers_changed);
    pthread_mutex_destroy(&ft->workers_lock);
    free(ft);
}
