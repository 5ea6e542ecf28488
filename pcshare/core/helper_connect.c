/* helper_connect: the helper's end of the control socket (wire.h): connects, sends, receives.
 *
 * Whatever comes is checked before anybody sees it: size, version, type, number of fds. What the messages mean is not
 * its business. Never waits: who wants to wait polls the socket.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#include "fd_message.h"
#include "helper_internal.h"
#include "trace.h"

_Static_assert((int)WIRE_FDS_MAX <= (int)FD_MESSAGE_FDS_MAX, "a message's fds fit");

/* What a coordinator may send us. */
static const struct message_row {
    const char *name;
    uint32_t length;
    uint32_t fds_min;
    uint32_t fds_max;
} rows[] = {
    [WIRE_WELCOME] = {"WELCOME", sizeof(struct wire_welcome), 2, 3},
    [WIRE_ACK] = {"ACK", sizeof(struct wire_ack), 0, 0},
    [WIRE_DONE] = {"DONE", sizeof(struct wire_done), 0, 0},
    [WIRE_END] = {"END", sizeof(struct wire_plain), 0, 0},
    [WIRE_BYE] = {"BYE", sizeof(struct wire_plain), 0, 0},
    [WIRE_ERROR] = {"ERROR", sizeof(struct wire_error), 0, 0},
};

void fd_close(int *fdp)
{
    if (*fdp >= 0)
        close(*fdp);
    *fdp = -1;
}

void link_forget(struct pcshare_attachment *a)
{
    fd_close(&a->socket);
    a->link = LINK_DOWN;
    a->in_flight = 0;
}

/* A socket that is closed with something unread in it resets its peer, which then may not read our last words. */
void link_close(struct pcshare_attachment *a)
{
    char first;

    if (a->socket >= 0) {
        shutdown(a->socket, SHUT_RD);
        while (recv(a->socket, &first, sizeof(first), MSG_DONTWAIT) > 0)
            ;
    }
    link_forget(a);
}

void link_message_close(struct link_message *message)
{
    fd_message_close(message->fds, message->n_fds);
}

static struct wire_header header_of(uint16_t type, uint32_t length)
{
    return (struct wire_header){.magic = WIRE_MAGIC, .version = WIRE_VERSION, .type = type, .length = length};
}

/* ---- connecting ---- */

static int connect_failed(const char *path, int error)
{
    switch (error) {
    case ENOENT:
        return helper_fail(ENOENT, "%s: no coordinator has made this socket (yet)", path);
    case ECONNREFUSED:
        return helper_fail(ECONNREFUSED, "%s: the coordinator that made this socket does not listen any more", path);
    case EAGAIN:
        return helper_fail(EAGAIN, "%s: too many helpers wait for the coordinator to accept them; try again", path);
    case EACCES:
        return helper_fail(
            EACCES, "%s: this user may not use the coordinator's socket; start the coordinator with --allow-uid %u",
            path, (unsigned)getuid());
    case EPROTOTYPE:
        return helper_fail(EPROTOTYPE, "%s: this socket is not a coordinator's (it is not of type SEQPACKET)", path);
    default:
        return helper_fail(error, "%s: connect: %s", path, strerror(error));
    }
}

static int say_hello(struct pcshare_attachment *a)
{
    struct wire_hello hello = {
        .header = header_of(WIRE_HELLO, sizeof(hello)),
        .version_min = WIRE_VERSION,
        .version_max = WIRE_VERSION,
        .mode = a->info.mode,
    };
    int rc;

    memcpy(hello.idstr, a->info.idstr, sizeof(hello.idstr));
    rc = fd_message_send(a->socket, &hello, sizeof(hello), NULL, 0, MSG_DONTWAIT);
    if (rc < 0 && rc != -EPIPE) /* hung up already: what it says first is still to be read */
        return helper_fail(-rc, "%s: sending HELLO: %s", a->socket_path, strerror(-rc));
    a->link = LINK_HELLO;
    trace_point(TRACE_HELPER_HELLO, 0, 0, 0, 0);
    return 0;
}

int link_connect(struct pcshare_attachment *a)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int rc;

    memcpy(address.sun_path, a->socket_path, sizeof(address.sun_path));
    a->socket = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (a->socket < 0)
        return helper_fail(errno, "a socket for %s: %s", a->socket_path, strerror(errno));
    if (connect(a->socket, (struct sockaddr *)&address, sizeof(address)) < 0)
        rc = connect_failed(a->socket_path, errno);
    else
        rc = say_hello(a);
    if (rc < 0)
        link_close(a);
    return rc;
}

/* ---- sending ---- */

int link_send_attach(struct pcshare_attachment *a)
{
    struct wire_attach attach = {
        .header = header_of(WIRE_ATTACH, sizeof(attach)),
    };
    attach.n_maps = memory_find_maps(a, attach.maps);
    int rc = fd_message_send(a->socket, &attach, sizeof(attach), &a->uffd, 1, MSG_DONTWAIT);

    if (rc < 0 && rc != -EPIPE)
        return helper_fail(-rc, "%s: sending ATTACH: %s", a->socket_path, strerror(-rc));
    a->link = LINK_ATTACH;
    trace_point(TRACE_HELPER_ATTACH, 0, 0, 0, 0);
    return 0;
}

int link_send_request(struct pcshare_attachment *a, const struct helper_request *request, uint32_t flags)
{
    struct wire_request message = {
        .header = header_of(WIRE_REQUEST, sizeof(message)),
        .flags = flags,
        .offset = request->offset,
        .length = request->length,
    };

    message.header.cookie = request->cookie;
    int rc = fd_message_send(a->socket, &message, sizeof(message), NULL, 0, MSG_DONTWAIT);
    trace_point(TRACE_HELPER_REQUEST, 0, 0, request->offset, request->length);
    return rc;
}

void link_send_leave(struct pcshare_attachment *a)
{
    struct wire_plain leave = {.header = header_of(WIRE_LEAVE, sizeof(leave))};

    if (a->socket >= 0 && a->link >= LINK_ATTACH)
        (void)fd_message_send(a->socket, &leave, sizeof(leave), NULL, 0, MSG_DONTWAIT);
}

/* ---- receiving ---- */

int link_is_text(const char *text, size_t size)
{
    return memchr(text, '\0', size) != NULL;
}

static int check_version(const struct pcshare_attachment *a, const struct wire_header *header)
{
    if (header->version == WIRE_VERSION)
        return 0;
    return helper_fail(EPROTONOSUPPORT,
                       "%s: the coordinator speaks version %u of the control protocol, this program version %u: "
                       "install the same pcshare",
                       a->socket_path, header->version, WIRE_VERSION);
}

const char *link_message_name(uint16_t type)
{
    return rows[type].name;
}

static int check_message(const struct pcshare_attachment *a, const struct link_message *m, uint32_t length)
{
    const struct wire_header *header = &m->body.header;
    const struct message_row *row;

    if (length < sizeof(*header) || header->magic != WIRE_MAGIC)
        return helper_fail(EPROTO, "%s: what answers there is no coordinator (%u bytes that are no message)",
                           a->socket_path, length);
    if (header->type >= sizeof(rows) / sizeof(rows[0]) || !rows[header->type].name) {
        int rc = check_version(a, header);
        return rc < 0 ? rc
                      : helper_fail(EPROTO, "%s: the coordinator sent message type %u, which is none of its",
                                    a->socket_path, header->type);
    }
    row = &rows[header->type];
    if (header->type != WIRE_ERROR && check_version(a, header) < 0)
        return -EPROTONOSUPPORT; /* an ERROR is read in any version: it says what is wrong */
    if (header->length != length || length != row->length)
        return helper_fail(EPROTO, "%s: the coordinator sent %s with %u bytes (its header says %u) instead of %u",
                           a->socket_path, row->name, length, header->length, row->length);
    if (m->n_fds < row->fds_min || m->n_fds > row->fds_max)
        return helper_fail(EPROTO, "%s: the coordinator sent %s with %u fds instead of %u to %u", a->socket_path,
                           row->name, m->n_fds, row->fds_min, row->fds_max);
    return 0;
}

static int told_error(const struct pcshare_attachment *a, const struct wire_error *error)
{
    if (!link_is_text(error->text, sizeof(error->text)) || error->error <= 0)
        return helper_fail(EPROTO, "%s: the coordinator sent an ERROR without an error or a text", a->socket_path);
    if (!error->text[0])
        return helper_fail(error->error, "%s: the coordinator refuses: %s", a->socket_path, strerror(error->error));
    return helper_fail(error->error, "%s", error->text);
}

static int hung_up(const struct pcshare_attachment *a)
{
    return helper_fail(ECONNRESET, "the coordinator at %s hung up", a->socket_path);
}

int link_receive(struct pcshare_attachment *a, struct link_message *m)
{
    int rc;

    memset(m, 0, sizeof(*m));
    m->n_fds = WIRE_FDS_MAX;
    rc = fd_message_receive(a->socket, &m->body, sizeof(m->body), m->fds, &m->n_fds, MSG_DONTWAIT);
    if (rc == -ECONNRESET) { /* it closed without having read all of ours: its last words come after this error */
        m->n_fds = WIRE_FDS_MAX;
        rc = fd_message_receive(a->socket, &m->body, sizeof(m->body), m->fds, &m->n_fds, MSG_DONTWAIT);
    }
    if (rc == -EAGAIN || rc == -EINTR)
        return LINK_EMPTY;
    if (rc == 0 || rc == -ECONNRESET) {
        link_message_close(m);
        return hung_up(a);
    }
    if (rc == -EMSGSIZE)
        return helper_fail(EPROTO,
                           "%s: the coordinator sent a message that is longer, or has more fds, than any of the "
                           "protocol; or this process may open no more fds (ulimit -n)",
                           a->socket_path);
    if (rc < 0)
        return helper_fail(-rc, "%s: receiving: %s", a->socket_path, strerror(-rc));
    rc = check_message(a, m, (uint32_t)rc);
    if (rc == 0 && m->body.header.type == WIRE_ERROR)
        rc = told_error(a, &m->body.error);
    if (rc < 0)
        link_message_close(m);
    return rc;
}
