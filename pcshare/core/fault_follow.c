/* fault_follow: the uffd of a writable helper, which says not only where it faults but also what it does to its mapping:
 * pages that it removes (MADV_REMOVE), unmaps, moves (mremap).
 *
 * The helper goes on when its event is read. So reading, and all that must be true when it goes on (which pages count
 * as received, which address shows which page), happens behind the block's closed gate (place_gate.h); waking and
 * asking come after. Some facts about these events that shaped it:
 *  - REMOVE comes before pages are removed, and for MADV_DONTNEED too, with nothing to tell them apart;
 *  - UNMAP and REMAP come when it is done; a move is REMAP, then UNMAP of where it was, or REMAP alone if it stays there
 * (MREMAP_DONTUNMAP). So REMAP adds, UNMAP takes away;
 *  - faults are handed out before events: one at a new address may come before the REMAP that explains it.
 */
#include "fault_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include "place_gate.h"
#include "remote_maps.h"
#include "trace.h"
#include "uffd.h"

/* What one message asks for once the gate is open. */
struct errand {
    uint64_t page; /* PAGEFAULT */
    int error;     /* what it is cut off for, or 0 */
    uint32_t n_spans;
    struct remote_span spans[REMOTE_MAPS_MAX]; /* REMOVE */
};

/* ---- behind the closed gate ---- */

static void mark_removed(const struct remote_fd *remote, const struct uffd_message *message, struct errand *errand)
{
    errand->n_spans = remote_maps_spans(remote->maps, message->fault_addr, message->length, errand->spans);
    for (uint32_t i = 0; i < errand->n_spans; i++)
        ramblock_remove(remote->block, errand->spans[i].start, errand->spans[i].end);
}

static void settle(struct remote_fd *remote, const struct uffd_message *message, struct errand *errand)
{
    int rc = -EBADMSG;

    errand->error = 0;
    errand->n_spans = 0;
    if (message->event != UFFD_MESSAGE_PAGEFAULT)
        trace_point(TRACE_EVENT, remote->block->index, remote->id, message->fault_addr, message->event);
    switch (message->event) {
    case UFFD_MESSAGE_PAGEFAULT:
        rc = remote_fd_page(remote, message->fault_addr, &errand->page);
        break;
    case UFFD_MESSAGE_REMOVE:
        mark_removed(remote, message, errand);
        return;
    case UFFD_MESSAGE_REMAP:
        rc = remote_fd_move(remote, message->fault_addr, message->to_addr, message->length);
        break;
    case UFFD_MESSAGE_UNMAP:
        rc = remote_fd_cut(remote, message->fault_addr, message->length);
        break;
    }
    if (rc < 0)
        errand->error = -rc;
}

/* Before its helper can have done more: the coordinator after this one would not know where it faults. */
static void keep_maps(const struct fault_threads *ft, const struct remote_fd *remote)
{
    struct kept_maps kept;
    off_t at = (off_t)remote->kept_slot * (off_t)sizeof(kept);

    if (ft->maps_fd < 0 || pread(ft->maps_fd, &kept, sizeof(kept), at) < (ssize_t)sizeof(kept) - (ssize_t)sizeof(kept.maps))
        return;
    kept.n_maps = remote_maps_describe(remote->maps, kept.maps);
    (void)!pwrite(ft->maps_fd, &kept, sizeof(kept), at); /* the record is there: no memory is needed */
}

static int changes_maps(const struct uffd_message *message)
{
    return message->event == UFFD_MESSAGE_REMAP || message->event == UFFD_MESSAGE_UNMAP;
}

/* Faults whose addresses nothing explained yet, when all that was read has been settled. */
static void settle_faults_again(struct remote_fd *remote, const struct uffd_message *messages, struct errand *errands,
                                int n)
{
    for (int i = 0; i < n; i++)
        if (messages[i].event == UFFD_MESSAGE_PAGEFAULT && errands[i].error)
            settle(remote, &messages[i], &errands[i]);
}

/* ---- when it is open again ---- */

static void run_errand(struct fault_threads *ft, struct fault_worker *worker, struct remote_fd *remote,
                       const struct uffd_message *message, const struct errand *errand)
{
    if (message->fork_fd >= 0)
        close(message->fork_fd);
    if (errand->error)
        disable_remote(ft, remote, errand->error, message->fault_addr);
    else if (message->event == UFFD_MESSAGE_PAGEFAULT && worker && worker->drains)
        worker->n_put_off++;
    else if (message->event == UFFD_MESSAGE_PAGEFAULT && worker)
        request_shared_page(ft, worker, remote, errand->page, message->tid);
    for (uint32_t i = 0; i < errand->n_spans; i++)
        after_placing(ft, served_block_of(ft, remote->block), errand->spans[i].start,
                      errand->spans[i].end - errand->spans[i].start, 0, REMOVED);
}

static void lift_what_was_left(struct fault_threads *ft, struct remote_fd *remote)
{
    if (__atomic_exchange_n(&remote->must_lift, 0, __ATOMIC_ACQ_REL))
        lift_poison(ft, remote->block, 0, remote->block->page_count);
}

/* Reads and acts once. Whether it met nothing but faults, behind which an event may wait. */
static int follow_once(struct fault_worker *worker, struct remote_fd *remote, uint32_t most)
{
    struct uffd_message messages[UFFD_READ_MAX];
    struct errand errands[UFFD_READ_MAX];
    uint32_t faulted = 0;
    int faults_alone = 1;

    place_gate_close(remote->block->gate);
    int n = uffd_read(remote->uffd, messages, most);
    for (int i = 0; i < n; i++)
        settle(remote, &messages[i], &errands[i]);
    settle_faults_again(remote, messages, errands, n);
    for (int i = 0; i < n; i++)
        if (changes_maps(&messages[i]))
            keep_maps(worker->ft, remote);
    place_gate_open(remote->block->gate);
    if (n < 0 && n != -EINTR)
        disable_remote(worker->ft, remote, -n, 0);
    for (int i = 0; i < n; i++) {
        run_errand(worker->ft, worker, remote, &messages[i], &errands[i]);
        if (messages[i].event == UFFD_MESSAGE_PAGEFAULT)
            faulted = messages[i].tid;
        else
            faults_alone = 0;
    }
    if (faulted)
        home_note_fault(worker->ft, remote, faulted);
    if (n > 0)
        lift_what_was_left(worker->ft, remote);
    return n > 0 && faults_alone;
}

/* Where faults had to be put off, an event waits behind them, or behind others: all are read until it comes or nothing
 * is in its way any more. So it is when a crowd is drained, behind whose faults one may wait. That is no longer than the
 * helper has threads, as nobody is woken meanwhile; so each other helper waits no longer than that, and they need not be
 * read one by one. Who was put off then faults again. */
void follow_uffd(struct fault_worker *worker, struct remote_fd *remote, uint32_t most, uint64_t now_ns)
{
    worker->n_put_off = 0;
    worker->is_answered = 0;
    worker->drains = crowd_must_drain(remote, now_ns);
    int goes_on = follow_once(worker, remote, worker->drains ? UFFD_READ_MAX : most);
    while (goes_on && worker->n_put_off && !worker->is_answered)
        goes_on = follow_once(worker, remote, UFFD_READ_MAX);
    if (worker->n_put_off)
        (void)uffd_wake_all(remote->uffd);
    if (worker->drains)
        crowd_note_drained(remote, now_ns, worker->n_put_off);
    ahead_bring(worker, remote);
}

int fault_threads_keep_maps(struct fault_threads *ft, int maps_fd)
{
    ft->maps_fd = fcntl(maps_fd, F_DUPFD_CLOEXEC, 0);
    return ft->maps_fd < 0 ? -errno : 0;
}

void fault_threads_apply_event(struct fault_threads *ft, uint32_t id, const struct uffd_message *message)
{
    struct remote_fd *remote = remote_by_id(ft, id);
    struct errand errand;

    if (!remote)
        return;
    if (message->event != UFFD_MESSAGE_PAGEFAULT && remote->has_events && remote->block->gate) {
        place_gate_close(remote->block->gate);
        settle(remote, message, &errand);
        if (changes_maps(message))
            keep_maps(ft, remote);
        place_gate_open(remote->block->gate);
        run_errand(ft, NULL, remote, message, &errand);
    }
    remote_fd_put(remote);
}
