/* helper_life: the states of an attachment, and what is done in each; the sentinel looks at every attachment in turn.
 *
 *   ATTACHED --END--> COMPLETE                 ORPHANED --WELCOME, ACK--> ATTACHED
 *   ATTACHED --BYE--> LOST                     ORPHANED --timeout--> LOST
 *   ATTACHED --hung up, garbage--> ORPHANED    any but LOST, and the status segment says END --> COMPLETE
 *   ATTACHED --ACK--> ATTACHED                 (another coordinator serves: what is not answered is asked for again)
 *
 * Nothing here waits, and no page of a block is touched: whatever waits for a page, its rescue does not.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <unistd.h>
#include "helper_internal.h"
#include "trace.h"
#include "uffd.h"

#define EVENT_FEATURES                                                                                                 \
    (UFFD_FEATURE_BIT_EVENT_FORK | UFFD_FEATURE_BIT_EVENT_REMAP | UFFD_FEATURE_BIT_EVENT_REMOVE |                      \
     UFFD_FEATURE_BIT_EVENT_UNMAP)

/* ---- changes of state ---- */

static int block_has_ended(const struct pcshare_attachment *a)
{
    return __atomic_load_n(&a->view->block->state, __ATOMIC_ACQUIRE) == STATUS_STATE_END;
}

static void note_why(struct pcshare_attachment *a)
{
    snprintf(a->why, sizeof(a->why), "%s", pcshare_error_text());
}

static void become_complete(struct pcshare_attachment *a)
{
    trace_point(TRACE_HELPER_COMPLETE, 0, 0, 0, 0);
    memory_complete(a);
    link_send_leave(a);
    link_close(a);
    attachment_set_state(a, PCSHARE_COMPLETE);
    requests_finish_all(a, 0);
}

/* One line, and only if it can be written at once: the sentinel waits for nobody's pipe. */
static void tell_lost(const struct pcshare_attachment *a)
{
    char line[2 * HELPER_TEXT_MAX];
    struct pollfd out = {.fd = STDERR_FILENO, .events = POLLOUT};
    int n = snprintf(line, sizeof(line),
                     "pcshare: block %s: %s; touching a page that has not arrived is SIGBUS from now on\n",
                     a->info.idstr, a->why);

    if (poll(&out, 1, 0) == 1 && (out.revents & POLLOUT))
        (void)!write(STDERR_FILENO, line, (size_t)n);
}

static void become_lost(struct pcshare_attachment *a)
{
    link_close(a);
    tell_lost(a);
    a->next_try_ms = helper_now_ms() + LOST_WAKE_INTERVAL_MS;
    attachment_set_state(a, PCSHARE_LOST);
    requests_finish_all(a, -ECONNRESET);
    uffd_wake_all(a->uffd); /* what the coordinator had read and not answered comes again, to us */
}

static void become_orphaned(struct pcshare_attachment *a)
{
    note_why(a);
    link_close(a);
    if (block_has_ended(a)) {
        become_complete(a);
        return;
    }
    a->orphan_since_ms = helper_now_ms();
    a->next_try_ms = a->orphan_since_ms + REATTACH_INTERVAL_MS;
    a->unread_looks = 0;
    attachment_set_state(a, PCSHARE_ORPHANED);
}

static void become_attached(struct pcshare_attachment *a)
{
    a->why[0] = '\0';
    attachment_set_state(a, PCSHARE_ATTACHED);
    trace_point(TRACE_HELPER_ACKED, 0, 0, 0, 0);
    uffd_wake_all(a->uffd); /* what a dead coordinator had read comes again, to the new one */
    requests_send_again(a);
}

/* ---- ATTACHED ---- */

static void hear_bye(struct pcshare_attachment *a)
{
    if (block_has_ended(a)) {
        become_complete(a);
        return;
    }
    snprintf(a->why, sizeof(a->why), "the coordinator at %s ended before the block was complete", a->socket_path);
    become_lost(a);
}

/* The coordinator was killed, and the one after it has this socket and our uffd. */
static int hear_takeover(struct pcshare_attachment *a, struct link_message *message)
{
    int is_complete;
    int rc = link_accept_ack(a, message, &is_complete);

    trace_point(TRACE_HELPER_TAKEN_OVER, 0, 0, 0, 0);
    if (rc == 0 && is_complete)
        become_complete(a);
    else if (rc == 0)
        requests_send_again(a);
    return rc;
}

static int handle_message(struct pcshare_attachment *a, struct link_message *message)
{
    link_message_close(message);
    switch (message->body.header.type) {
    case WIRE_DONE:
        return requests_answer(a, &message->body.done);
    case WIRE_ACK:
        return hear_takeover(a, message);
    case WIRE_END:
        become_complete(a);
        return 0;
    case WIRE_BYE:
        hear_bye(a);
        return 0;
    default:
        return helper_fail(EPROTO, "the coordinator at %s broke the protocol: message type %u out of turn",
                           a->socket_path, message->body.header.type);
    }
}

static void serve_attached(struct pcshare_attachment *a)
{
    struct link_message message;
    int rc = 0;

    for (int i = 0; i < SENTINEL_MESSAGES_MAX && rc == 0 && a->state == PCSHARE_ATTACHED; i++) {
        rc = link_receive(a, &message);
        if (rc == 0)
            rc = handle_message(a, &message);
    }
    if (rc < 0)
        become_orphaned(a);
    else if (a->state == PCSHARE_ATTACHED)
        requests_send(a);
}

/* ---- ORPHANED ---- */

static void give_up(struct pcshare_attachment *a)
{
    char last[HELPER_TEXT_MAX];

    snprintf(last, sizeof(last), "%s", a->why);
    snprintf(a->why, sizeof(a->why), "the coordinator went away and has not come back within %" PRIu64 " ms (%.300s)",
             a->orphan_timeout_ms, last);
    become_lost(a);
}

static void try_again_later(struct pcshare_attachment *a, int64_t now_ms)
{
    note_why(a);
    link_close(a);
    a->next_try_ms = now_ms + REATTACH_INTERVAL_MS;
}

static int handle_reattach_message(struct pcshare_attachment *a, struct link_message *message)
{
    int is_complete = 0, rc;

    if (a->link == LINK_HELLO) {
        rc = link_recognise_welcome(a, message, &is_complete);
        if (rc == 0 && !is_complete)
            return link_send_attach(a);
    } else {
        rc = link_accept_ack(a, message, &is_complete);
        if (rc == 0 && !is_complete)
            become_attached(a);
    }
    if (rc == 0 && is_complete)
        become_complete(a);
    return rc;
}

static int continue_reattach(struct pcshare_attachment *a, int64_t now_ms)
{
    struct link_message message;
    int rc = link_receive(a, &message);

    if (rc == LINK_EMPTY && now_ms >= a->next_try_ms)
        return helper_fail(ETIMEDOUT, "the coordinator at %s does not answer", a->socket_path);
    return rc == 0 ? handle_reattach_message(a, &message) : rc;
}

static void serve_orphaned(struct pcshare_attachment *a, int64_t now_ms)
{
    int rc = 0;

    if (block_has_ended(a)) {
        become_complete(a);
    } else if (a->orphan_timeout_ms && now_ms - a->orphan_since_ms >= (int64_t)a->orphan_timeout_ms) {
        give_up(a);
    } else if (a->link != LINK_DOWN) {
        rc = continue_reattach(a, now_ms);
    } else if (now_ms >= a->next_try_ms) {
        rc = link_connect(a);
        a->next_try_ms = now_ms + REATTACH_ANSWER_MS;
    }
    if (rc < 0)
        try_again_later(a, now_ms);
}

/* ---- the own uffd, when nobody else reads it ---- */

/* LOST: answers every fault. ORPHANED: only takes events, for which madvise or munmap wait, and which nobody else has
 * taken for a while: whoever will serve must hear which pages were removed. A fault that is read here is not lost,
 * since everybody is woken at the next change of state. */
static void read_own_uffd(struct pcshare_attachment *a)
{
    struct uffd_message messages[UFFD_READ_MAX];
    int n, rounds = SENTINEL_MESSAGES_MAX;

    while (rounds-- > 0 && (n = uffd_read(a->uffd, messages, UFFD_READ_MAX)) > 0) {
        for (int i = 0; i < n; i++) {
            fd_close(&messages[i].fork_fd);
            if (a->state == PCSHARE_LOST && messages[i].event == UFFD_MESSAGE_PAGEFAULT)
                memory_give_up_page(a, messages[i].fault_addr);
        }
    }
}

int life_reads_own_uffd(const struct pcshare_attachment *a)
{
    return a->state == PCSHARE_LOST;
}

static int looks_for_unread(const struct pcshare_attachment *a)
{
    return a->state == PCSHARE_ORPHANED && (a->features & EVENT_FEATURES);
}

static void look_for_unread(struct pcshare_attachment *a, int64_t now_ms)
{
    struct pollfd uffd = {.fd = a->uffd, .events = POLLIN};

    if (now_ms < a->next_unread_look_ms)
        return;
    a->next_unread_look_ms = now_ms + UNREAD_LOOK_MS;
    if (poll(&uffd, 1, 0) != 1)
        a->unread_looks = 0;
    else if (++a->unread_looks >= UNREAD_LOOKS)
        read_own_uffd(a);
}

/* A coordinator that said BYE, or only lost its socket, may still have read a fault before it ended. */
static void serve_lost(struct pcshare_attachment *a, int64_t now_ms)
{
    if (now_ms < a->next_try_ms)
        return;
    uffd_wake_all(a->uffd);
    a->next_try_ms = now_ms + LOST_WAKE_INTERVAL_MS;
}

/* ---- for the sentinel ---- */

static int must_relock(const struct pcshare_attachment *a)
{
    return a->state == PCSHARE_COMPLETE && a->relock_offset < a->info.map_length;
}

void life_serve(struct pcshare_attachment *a)
{
    int64_t now_ms = helper_now_ms();

    if (life_reads_own_uffd(a))
        read_own_uffd(a);
    if (looks_for_unread(a))
        look_for_unread(a, now_ms);
    if (a->state == PCSHARE_ATTACHED)
        serve_attached(a);
    else if (a->state == PCSHARE_ORPHANED)
        serve_orphaned(a, now_ms);
    else if (a->state == PCSHARE_LOST)
        serve_lost(a, now_ms);
    else if (must_relock(a))
        memory_relock_some(a);
}

int life_needs_sentinel(const struct pcshare_attachment *a)
{
    return a->state == PCSHARE_ATTACHED || a->state == PCSHARE_ORPHANED || a->state == PCSHARE_LOST || must_relock(a);
}

int64_t life_next_look_ms(const struct pcshare_attachment *a)
{
    int64_t lost_at_ms;

    if (must_relock(a))
        return 0;
    if (a->state == PCSHARE_LOST)
        return a->next_try_ms;
    if (a->state != PCSHARE_ORPHANED)
        return INT64_MAX;
    lost_at_ms = a->orphan_timeout_ms ? a->orphan_since_ms + (int64_t)a->orphan_timeout_ms : INT64_MAX;
    if (looks_for_unread(a) && a->next_unread_look_ms < lost_at_ms)
        lost_at_ms = a->next_unread_look_ms;
    return a->next_try_ms < lost_at_ms ? a->next_try_ms : lost_at_ms;
}
