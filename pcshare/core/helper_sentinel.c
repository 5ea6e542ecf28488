/* helper_sentinel: the one thread of the library, in which helper_life runs.
 *
 * Runs while an attachment needs it and leaves with the last one. All signals are blocked in it, and it runs no code of
 * the program's. It waits in poll alone, and poll only says "look": every attachment is then looked at, so an fd number
 * that was closed and used again meanwhile does no harm.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <unistd.h>
#include "helper_internal.h"

enum { FDS_OF_ONE = 2 }; /* control socket and own uffd */

static size_t count_needing(void)
{
    size_t n = 0;

    for (const struct pcshare_attachment *a = library.attachments; a; a = a->next)
        n += (size_t)life_needs_sentinel(a);
    return n;
}

static int has_unsent(const struct pcshare_attachment *a)
{
    const struct helper_request *request = a->requests;

    while (request && request->is_sent)
        request = request->next;
    return request && a->in_flight < HELPER_REQUESTS_IN_FLIGHT_MAX;
}

static nfds_t collect_one(const struct pcshare_attachment *a, struct pollfd *polled)
{
    nfds_t n = 0;

    if (a->socket >= 0 && a->state != ATTACHMENT_LIMBO)
        polled[n++] = (struct pollfd){
            .fd = a->socket,
            .events = a->state == PCSHARE_ATTACHED && has_unsent(a) ? POLLIN | POLLOUT : POLLIN,
        };
    if (life_reads_own_uffd(a))
        polled[n++] = (struct pollfd){.fd = a->uffd, .events = POLLIN};
    return n;
}

/* What to poll, into an array that grows as needed; without memory for that, fewer fds for a shorter time. */
static nfds_t collect(struct pollfd **polledp, size_t *capacityp, int *timeout_msp)
{
    size_t wanted = 1 + FDS_OF_ONE * count_needing();
    int64_t look_ms = INT64_MAX, now_ms = helper_now_ms();
    struct pollfd *larger;
    nfds_t n = 0;

    if (wanted > *capacityp && (larger = realloc(*polledp, wanted * sizeof(**polledp)))) {
        *polledp = larger;
        *capacityp = wanted;
    }
    if (wanted > *capacityp)
        look_ms = now_ms + REATTACH_INTERVAL_MS;
    if (*capacityp > 0)
        (*polledp)[n++] = (struct pollfd){.fd = library.wake_fd, .events = POLLIN};
    for (const struct pcshare_attachment *a = library.attachments; a; a = a->next) {
        if (n + FDS_OF_ONE <= *capacityp)
            n += collect_one(a, *polledp + n);
        if (life_next_look_ms(a) < look_ms)
            look_ms = life_next_look_ms(a);
    }
    if (look_ms == INT64_MAX)
        *timeout_msp = -1;
    else
        *timeout_msp = look_ms <= now_ms ? 0 : (int)(look_ms - now_ms < INT_MAX ? look_ms - now_ms : INT_MAX);
    return n;
}

static void *sentinel_main(void *unused)
{
    struct pollfd *polled = NULL;
    size_t capacity = 0;
    uint64_t wakes;
    int timeout_ms;
    nfds_t n;

    prctl(PR_SET_NAME, "pcshare-sentinel"); /* the kernel keeps 15 bytes of it */
    library_lock();
    while (count_needing() > 0) {
        n = collect(&polled, &capacity, &timeout_ms);
        library_unlock();
        poll(polled, n, timeout_ms);
        library_lock();
        (void)!read(library.wake_fd, &wakes, sizeof(wakes));
        for (struct pcshare_attachment *a = library.attachments; a; a = a->next)
            life_serve(a);
    }
    free(polled);
    fd_close(&library.wake_fd);
    library.sentinel_runs = 0;
    pthread_cond_broadcast(&library.sentinel_left);
    library_unlock();
    return unused;
}

static int start_thread(void)
{
    pthread_attr_t attributes;
    sigset_t all, before;
    pthread_t thread;
    int error;

    sigfillset(&all);
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, SENTINEL_STACK_BYTES);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    error = pthread_create(&thread, &attributes, sentinel_main, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return error;
}

int sentinel_start(void)
{
    int error;

    if (library.sentinel_runs) {
        sentinel_wake();
        return 0;
    }
    library.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (library.wake_fd < 0)
        return helper_fail(errno, "an eventfd for the sentinel thread: %s", strerror(errno));
    error = start_thread();
    if (error) {
        fd_close(&library.wake_fd);
        return helper_fail(
            error, "starting the sentinel thread: %s (limit of processes: ulimit -u, pids of the control group)",
            strerror(error));
    }
    library.sentinel_runs = 1;
    return 0;
}

void sentinel_wake(void)
{
    uint64_t one = 1;

    if (library.sentinel_runs)
        (void)!write(library.wake_fd, &one, sizeof(one));
}

void sentinel_wait_left(void)
{
    sentinel_wake();
    while (library.sentinel_runs && count_needing() == 0)
        pthread_cond_wait(&library.sentinel_left, &library.lock);
}
