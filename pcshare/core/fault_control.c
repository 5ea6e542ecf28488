/* fault_control: the messages of a helper that is attached: range requests and leaving. Answered here, in C, because a
 * thread may hold the GIL while it waits for a range. Hand-over and operators are Python's.
 */
#include "fault_internal.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

#include "fd_message.h"

union control_message {
    struct wire_header header;
    struct wire_request request;
    struct wire_plain plain;
};

static struct wire_header header_of(uint16_t type, uint32_t length, uint32_t cookie)
{
    return (struct wire_header){
        .magic = WIRE_MAGIC, .version = WIRE_VERSION, .type = type, .length = length, .cookie = cookie};
}

void send_to_helper(struct fault_threads *ft, struct remote_fd *remote, const void *message, uint32_t length)
{
    int rc = fd_message_send(remote->control, message, length, NULL, 0, MSG_DONTWAIT);

    /* A helper may have no more answers under way than its socket holds: who does not read them is cut off. A socket
     * that is gone says so to the worker that polls it. */
    if (rc == -EAGAIN)
        disable_remote(ft, remote, ENOBUFS, 0);
}

void send_done(struct fault_threads *ft, struct remote_fd *remote, uint32_t cookie, int status, uint64_t offset,
               uint64_t length)
{
    struct wire_done done = {
        .header = header_of(WIRE_DONE, sizeof(done), cookie), .status = status, .offset = offset, .length = length};

    send_to_helper(ft, remote, &done, sizeof(done));
}

static void handle_request(struct fault_threads *ft, struct remote_fd *remote, const struct wire_request *request)
{
    struct ramblock *block = remote->block;
    int wait = (request->flags & WIRE_REQUEST_WAIT) != 0;

    if (request->offset > block->map_length || request->length > block->map_length - request->offset) {
        disable_remote(ft, remote, ERANGE, request->offset);
        return;
    }
    uint32_t *in_flight = wait ? &remote->requests_in_flight : &remote->hints_in_flight;
    if (__atomic_load_n(in_flight, __ATOMIC_RELAXED) >= FAULT_REQUESTS_IN_FLIGHT_MAX) {
        if (wait)
            disable_remote(ft, remote, EDQUOT, 0);
        return; /* a prefetch is a hint */
    }
    uint64_t start = request->offset / block->page_size;
    uint64_t end = (request->offset + request->length + block->page_size - 1) / block->page_size;
    if (wait && start < end)
        working_set_note(ft, block, start, end - start);
    int rc = stream_add_range(ft, block, start, end, remote, request->header.cookie, wait);
    if (rc < 0 && wait)
        send_done(ft, remote, request->header.cookie, rc, request->offset, request->length);
}

static int is_wellformed(const union control_message *message, int length)
{
    if (length < (int)sizeof(message->header))
        return 0;
    uint32_t wanted = message->header.type == WIRE_REQUEST ? sizeof(message->request) : sizeof(message->plain);
    return message->header.magic == WIRE_MAGIC && message->header.version == WIRE_VERSION &&
           message->header.length == (uint32_t)length && (uint32_t)length == wanted &&
           (message->header.type == WIRE_REQUEST || message->header.type == WIRE_LEAVE);
}

/* Whether there may be more to read. */
static int handle_message(struct fault_threads *ft, struct remote_fd *remote, const union control_message *message,
                          int length)
{
    if (!is_wellformed(message, length)) {
        disable_remote(ft, remote, EPROTO, 0);
        return 0;
    }
    if (message->header.type == WIRE_LEAVE) {
        stop_polling_control(ft, remote);
        tell_remote(ft, remote, EVENT_REMOTE_LEFT, 0, 0);
        return 0;
    }
    handle_request(ft, remote, &message->request);
    return !__atomic_load_n(&remote->disabled, __ATOMIC_ACQUIRE);
}

/* Whether the next message is one of this type. It stays in the socket. */
static int next_is(const struct remote_fd *remote, uint16_t type)
{
    union control_message message;
    ssize_t length;
    int tries = 2; /* a reset is told once, before the last words */

    do
        length = recv(remote->control, &message, sizeof(message), MSG_PEEK | MSG_TRUNC | MSG_DONTWAIT);
    while (length < 0 && errno == ECONNRESET && --tries);
    return length > 0 && is_wellformed(&message, (int)length) && message.header.type == type;
}

/* Before it is taken out of the socket: a LEAVE is said once, and a coordinator that dies when it has read it, and has
 * noted it nowhere, has read it for nobody. The next one would wait for the helper's end. */
static void note_leave(struct remote_fd *remote)
{
    if (remote->status && next_is(remote, WIRE_LEAVE))
        __atomic_store_n(&remote->status->state, STATUS_HELPER_LEFT, __ATOMIC_RELEASE);
}

int fault_threads_forget_requests(struct fault_threads *ft, uint32_t id)
{
    struct remote_fd *remote = remote_by_id(ft, id);
    union control_message message;

    if (!remote)
        return -ENOENT;
    while (next_is(remote, WIRE_REQUEST)) /* a LEAVE, an end and what is no message are for the fault threads */
        (void)fd_message_receive(remote->control, &message, sizeof(message), NULL, NULL, MSG_DONTWAIT);
    remote_fd_put(remote);
    return 0;
}

void handle_control(struct fault_threads *ft, struct remote_fd *remote)
{
    union control_message message;

    for (int i = 0; i < CONTROL_MESSAGES_MAX; i++) {
        note_leave(remote);
        int length = fd_message_receive(remote->control, &message, sizeof(message), NULL, NULL, MSG_DONTWAIT);
        if (length == -EAGAIN || length == -EINTR)
            return;
        if (length == -ECONNRESET) /* it closed with our answers unread: told once, before its last words */
            continue;
        if (length == -EMSGSIZE) {
            disable_remote(ft, remote, EPROTO, 0);
            return;
        }
        if (length <= 0) {
            stop_polling_control(ft, remote);
            tell_remote(ft, remote, EVENT_REMOTE_HUNG_UP, -length, 0);
            return;
        }
        if (!handle_message(ft, remote, &message, length))
            return;
    }
}
