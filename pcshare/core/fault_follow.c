/* fault_follow: the uffd of a writable helper, which says not only where it faults but also what it does to its
 * mapping: pages that it removes (MADV_REMOVE), unmaps, moves (mremap).
 *
 * The helper goes on when its event is read. So reading, and all that must be true when it goes on (which pages count
 * as received, which address shows which page), happens behind the block's closed gate (place_gate.h); waking and
 * asking come after. Some facts about these events that shaped it:
 *  - REMOVE comes before pages are removed, and for MADV_DONTNEED too, with nothing to tell them apart;
 *  - UNMAP and REMAP come when it is done; a move is REMAP, then UNMAP of where it was, or REMAP alone if it stays
 * there (MREMAP_DONTUNMAP). So REMAP adds, UNMAP takes away;
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

enum { DRAIN_READS_MAX = 64 };

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

    if (ft->maps_fd < 0 ||
        pread(ft->maps_fd, &kept, sizeof(kept), at) < (ssize_t)sizeof(kept) - (ssize_t)sizeof(kept.maps))
        return;
    kept.n_maps = remote_maps_describe(remote->maps, kept.maps);
    (void)!pwrite(ft->maps_fd, &kept, sizeof(kept), at); /* the record is there: no memory is needed */
}

static int changes_maps(const struct uffd_message *message)
{
    return message->event == UFFD_MESSAGE_REMAP || message->event == UFFD_MESSAGE_UNMAP;
}

/* Reads most messages and settles them, after n that were. How many there are then, or why there are none. */
static int read_and_settle(struct remote_fd *remote, struct uffd_message *messages, struct errand *errands, int n,
                           uint32_t most)
{
    int more = uffd_read(remote->uffd, messages + n, most);

    for (int i = n; i < n + more; i++)
        settle(remote, &messages[i], &errands[i]);
    return n > 0 && more < 0 ? n : n + more;
}

/* Faults whose addresses nothing explained yet, when all that was read has been settled. Whether some are left. */
static int settle_faults_again(struct remote_fd *remote, const struct uffd_message *messages, struct errand *errands,
                               int n)
{
    int n_left = 0;

    for (int i = 0; i < n; i++) {
        if (messages[i].event != UFFD_MESSAGE_PAGEFAULT || !errands[i].error)
            continue;
        settle(remote, &messages[i], &errands[i]);
        n_left += errands[i].error != 0;
    }
    return n_left;
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

/* Reads and acts once. Whether an event may wait behind what it met: behind faults alone; of a crowd, behind others. */
static int follow_once(struct fault_worker *worker, struct remote_fd *remote, uint32_t most)
{
    struct uffd_message messages[UFFD_READ_MAX];
    struct errand errands[UFFD_READ_MAX];
    uint32_t faulted = 0;
    int faults_alone = 1;

    place_gate_close(remote->block->gate);
    int n = read_and_settle(remote, messages, errands, 0, most);
    if (settle_faults_again(remote, messages, errands, n) && n < UFFD_READ_MAX) { /* what explains them may come next */
        n = read_and_settle(remote, messages, errands, n, UFFD_READ_MAX - (uint32_t)n);
        (void)settle_faults_again(remote, messages, errands, n);
    }
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
    return n > 0 && (faults_alone || worker->drains);
}

/* All that waits is read, and no fault answered, for a while at most: others wake its threads meanwhile. */
static void drain(struct fault_worker *worker, struct remote_fd *remote, uint64_t now_ns)
{
    worker->drains = 1;
    for (int i = 0; i < DRAIN_READS_MAX && !__atomic_load_n(&remote->disabled, __ATOMIC_ACQUIRE); i++)
        if (!follow_once(worker, remote, UFFD_READ_MAX))
            break;
    worker->drains = 0;
    crowd_end_drain(remote, now_ns, worker->n_put_off + demand_count(worker->ft, remote));
}

/* Where faults had to be put off, an event waits behind them, or behind others: all are read until it comes or nothing
 * is in its way any more. That is no longer than the helper has threads, as this worker wakes nobody meanwhile; so each
 * other helper waits no longer than that, and they need not be read one by one. Who was put off then faults again. */
void follow_uffd(struct fault_worker *worker, struct remote_fd *remote, uint32_t most, uint64_t now_ns)
{
    worker->n_put_off = 0;
    worker->is_answered = 0;
    if (crowd_begin_drain(remote, now_ns)) {
        drain(worker, remote, now_ns);
    } else {
        int goes_on = follow_once(worker, remote, most);
        while (goes_on && worker->n_put_off && !worker->is_answered)
            goes_on = follow_once(worker, remote, UFFD_READ_MAX);
    }
    if (worker->n_put_off)
        (void)uffd_wake_all(remote->uffd);
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
