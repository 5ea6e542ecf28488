/* helper_fork: the process-wide state of the helper's side, and what fork does to it.
 *
 * A child must never run with an inherited mapping that is not registered: a page that it touched there would be zeros,
 * and then zeros for everybody. So guarded mappings are MADV_DONTFORK, and before any other code of the child runs each
 * of them is made anew, at the same address, with a uffd of the child's own. A copy-on-write mapping holds the child's
 * copy of what was written: it is inherited and registered first. Registered is safe; handing over can wait, so the
 * child's sentinel does it in the background, as after the loss of a coordinator. A child that cannot have its memory
 * back ends, with a message: the addresses may be somebody else's by now.
 *
 * Everything here is at the library's load, in one place, so that handlers of others that touch blocks run before ours
 * in the parent and after ours in the child.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include "helper_internal.h"
#include "trace.h"

struct library library = {
    .lock = PTHREAD_MUTEX_INITIALIZER,
    .sentinel_left = PTHREAD_COND_INITIALIZER,
    .wake_fd = -1,
};

void library_lock(void)
{
    pthread_mutex_lock(&library.lock);
}

void library_unlock(void)
{
    pthread_mutex_unlock(&library.lock);
}

void library_add(struct pcshare_attachment *a)
{
    a->next = library.attachments;
    library.attachments = a;
}

void library_remove(struct pcshare_attachment *a)
{
    struct pcshare_attachment **ap = &library.attachments;

    while (*ap && *ap != a)
        ap = &(*ap)->next;
    if (*ap)
        *ap = a->next;
}

/* The calls of other threads that waited are not in the child, nor what they held. */
static void drop_calls(struct pcshare_attachment *a)
{
    a->references = 1;
    a->requests = NULL;
    a->in_flight = 0;
    if (a->view)
        a->view->references = 1;
}

__attribute__((noreturn)) static void end_child(void)
{
    char line[2 * HELPER_TEXT_MAX];
    int n = snprintf(line, sizeof(line), "pcshare: this child of a fork ends, its memory cannot be made anew: %s\n",
                     pcshare_error_text());

    (void)!write(STDERR_FILENO, line, (size_t)n);
    _exit(FORK_FAILED_EXIT);
}

/* The inherited uffd serves the parent's memory, and our copy of its socket would hide the parent's end. */
static void restore(struct pcshare_attachment *a)
{
    link_forget(a);
    fd_close(&a->uffd);
    if (memory_guard_in_child(a) < 0)
        end_child();
    trace_point(TRACE_HELPER_FORK_CHILD, 0, 0, 0, 0);
    if (a->state != PCSHARE_LOST) {
        attachment_set_state(a, PCSHARE_ORPHANED);
        a->orphan_since_ms = helper_now_ms();
        snprintf(a->why, sizeof(a->why), "the coordinator at %s has not answered since this process was forked",
                 a->socket_path);
    }
    a->next_try_ms = 0;
    a->unread_looks = 0;
}

/* Was being attached by a thread that is not in the child: nobody will ask for it. A caller's mapping keeps its place.
 */
static void abandon(struct pcshare_attachment *a)
{
    link_forget(a);
    fd_close(&a->uffd);
    if (a->data && a->info.mode != PCSHARE_COW) { /* not inherited: the addresses may be somebody else's */
        if (a->map_at)
            (void)!mmap(a->map_at, a->info.map_length, PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
        a->data = NULL;
    }
    attachment_release(a, a->map_at != NULL);
    library_remove(a);
    free(a);
}

static void at_fork_prepare(void)
{
    library_lock();
}

static void at_fork_parent(void)
{
    library_unlock();
}

/* The lock is held, by this thread: it was taken before the fork. */
static void at_fork_child(void)
{
    struct pcshare_attachment *a, *next;
    int n_restored = 0;

    pthread_cond_init(&library.sentinel_left, NULL);
    library.sentinel_runs = 0;
    fd_close(&library.wake_fd);
    for (a = library.attachments; a; a = next) {
        next = a->next;
        drop_calls(a);
        if (a->state == ATTACHMENT_LIMBO) {
            abandon(a);
        } else if (a->state == PCSHARE_COMPLETE) {
            a->relock_offset = a->info.map_length; /* locks are not inherited */
        } else {
            restore(a);
            n_restored++;
        }
    }
    if (n_restored > 0 && sentinel_start() < 0)
        end_child();
    library_unlock();
}

__attribute__((constructor)) static void register_at_fork(void)
{
    pthread_atfork(at_fork_prepare, at_fork_parent, at_fork_child);
}
