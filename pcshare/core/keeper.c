/* keeper: the coordinator's side of the keeper: one request, one answer, serialised by a lock of its own. */
#define _GNU_SOURCE
#include "keeper.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include "error.h"
#include "fd_message.h"
#include "thread.h"

struct keeper {
    int socket_fd;
    uint32_t pid;
    uint32_t serial; /* of the last request */
    uint8_t *staging;
    pthread_mutex_t lock; /* one request at a time; also guards staging. Held over the exchange: never on the way of a
                             fault that is not a repair */
    char text[CORE_ERROR_TEXT_MAX];
};

/* The answer to this request: what a coordinator that died was still owed is dropped, fds and all. */
static int receive_answer(struct keeper *k, struct keeper_answer *answer, int *fds, uint32_t *n_fdsp)
{
    uint32_t room = *n_fdsp;
    int rc;

    for (;;) {
        *n_fdsp = room;
        rc = fd_message_receive(k->socket_fd, answer, sizeof(*answer), fds, n_fdsp, 0);
        if (rc == -EINTR)
            continue;
        if (rc != (int)sizeof(*answer) || answer->serial == k->serial)
            return rc;
        fd_message_close(fds, *n_fdsp);
    }
}

static int exchange(struct keeper *k, struct keeper_request *request, struct keeper_answer *answer, int *fds,
                    uint32_t n_fds_wanted)
{
    uint32_t n_fds = n_fds_wanted;

    request->serial = ++k->serial;
    int rc = fd_message_send(k->socket_fd, request, sizeof(*request), NULL, 0, 0);
    if (rc == 0)
        rc = receive_answer(k, answer, fds, &n_fds);
    if (rc <= 0) {
        snprintf(k->text, sizeof(k->text), "the keeper is gone (%s)", rc == 0 ? "it hung up" : strerror(-rc));
        return -EPIPE;
    }
    if (rc != (int)sizeof(*answer) || (answer->status == 0 && n_fds != n_fds_wanted)) {
        fd_message_close(fds, n_fds);
        snprintf(k->text, sizeof(k->text), "the keeper answered with %d bytes and %u fds", rc, n_fds);
        return -EPROTO;
    }
    if (answer->status < 0)
        snprintf(k->text, sizeof(k->text), "%.*s", (int)sizeof(answer->text) - 1, answer->text);
    return answer->status;
}

static int map_staging(struct keeper *k, int *staging_fd)
{
    void *mapped = mmap(NULL, KEEPER_STAGING_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, *staging_fd, 0);
    int rc = mapped == MAP_FAILED ? -errno : 0;

    fd_message_close(staging_fd, 1);
    if (rc == 0)
        k->staging = mapped;
    return rc;
}

int keeper_connect(struct keeper **kp, int socket_fd)
{
    struct keeper_request request = {.version = KEEPER_VERSION, .op = KEEPER_HELLO};
    struct keeper_answer answer;
    struct keeper *k = calloc(1, sizeof(*k));
    int staging_fd = -1;

    *kp = NULL;
    if (!k) {
        close(socket_fd);
        return -ENOMEM;
    }
    k->socket_fd = socket_fd;
    k->serial = (uint32_t)clock_ns(); /* not where the coordinator before this one began */
    pthread_mutex_init(&k->lock, NULL);
    int rc = exchange(k, &request, &answer, &staging_fd, 1);
    if (rc == 0)
        rc = map_staging(k, &staging_fd);
    if (rc < 0) {
        keeper_free(k);
        return rc;
    }
    k->pid = answer.pid;
    *kp = k;
    return 0;
}

void keeper_free(struct keeper *k)
{
    if (!k)
        return;
    if (k->staging)
        munmap(k->staging, KEEPER_STAGING_BYTES);
    close(k->socket_fd);
    pthread_mutex_destroy(&k->lock);
    free(k);
}

uint32_t keeper_pid(const struct keeper *k)
{
    return k->pid;
}

int keeper_socket(const struct keeper *k)
{
    return k->socket_fd;
}

const char *keeper_error_text(const struct keeper *k)
{
    return k->text;
}

static int ask(struct keeper *k, struct keeper_request *request, struct keeper_answer *answer, int *fds, uint32_t n_fds)
{
    pthread_mutex_lock(&k->lock);
    int rc = exchange(k, request, answer, fds, n_fds);
    pthread_mutex_unlock(&k->lock);
    return rc;
}

static struct keeper_request make_request(const char *idstr, uint64_t map_length, uint64_t page_size, int writable)
{
    struct keeper_request request = {.version = KEEPER_VERSION,
                                     .op = KEEPER_MAKE,
                                     .writable = (uint32_t)writable,
                                     .map_length = map_length,
                                     .page_size = page_size};

    snprintf(request.idstr, sizeof(request.idstr), "%s", idstr);
    return request;
}

int keeper_make_block(struct keeper *k, const char *idstr, uint64_t map_length, uint64_t page_size, int writable,
                      struct keeper_answer *answer, int *memfdp, int *placing_uffdp)
{
    struct keeper_request request = make_request(idstr, map_length, page_size, writable);
    int fds[2] = {-1, -1};
    int rc = ask(k, &request, answer, fds, 2);

    *memfdp = fds[0];
    *placing_uffdp = fds[1];
    return rc;
}

int keeper_defer_block(struct keeper *k, const char *idstr, uint64_t map_length, uint64_t page_size, int writable,
                       uint32_t *blockp, int *memfdp)
{
    struct keeper_request request = make_request(idstr, map_length, page_size, writable);
    struct keeper_answer answer = {0};

    request.deferred = 1;
    *memfdp = -1;
    int rc = ask(k, &request, &answer, memfdp, 1);
    *blockp = answer.block;
    return rc;
}

int keeper_listen_block(struct keeper *k, uint32_t block, struct keeper_answer *answer, int *placing_uffdp)
{
    struct keeper_request request = {.version = KEEPER_VERSION, .op = KEEPER_LISTEN, .block = block};

    *placing_uffdp = -1;
    return ask(k, &request, answer, placing_uffdp, 1);
}

int keeper_take_block(struct keeper *k, uint32_t block, const char *idstr, struct keeper_answer *answer, int *memfdp,
                      int *placing_uffdp)
{
    struct keeper_request request = {.version = KEEPER_VERSION, .op = KEEPER_TAKE, .block = block};
    int fds[2] = {-1, -1};

    snprintf(request.idstr, sizeof(request.idstr), "%s", idstr);
    int rc = ask(k, &request, answer, fds, 2);
    *memfdp = fds[0];
    *placing_uffdp = fds[1];
    return rc;
}

static int plain_request(struct keeper *k, uint32_t op, uint32_t block)
{
    struct keeper_request request = {.version = KEEPER_VERSION, .op = op, .block = block};
    struct keeper_answer answer;

    return ask(k, &request, &answer, NULL, 0);
}

int keeper_drop_block(struct keeper *k, uint32_t block)
{
    return plain_request(k, KEEPER_DROP, block);
}

int keeper_sweep(struct keeper *k)
{
    return plain_request(k, KEEPER_SWEEP, 0);
}

int keeper_complete_block(struct keeper *k, uint32_t block)
{
    return plain_request(k, KEEPER_COMPLETE, block);
}

int keeper_repair(struct keeper *k, uint32_t block, uint64_t offset, const void *bytes, uint64_t length)
{
    struct keeper_request request = {
        .version = KEEPER_VERSION, .op = KEEPER_REPAIR, .block = block, .offset = offset, .length = length};
    struct keeper_answer answer;

    if (length > KEEPER_STAGING_BYTES)
        return -EINVAL;
    pthread_mutex_lock(&k->lock);
    memcpy(k->staging, bytes, length);
    int rc = exchange(k, &request, &answer, NULL, 0);
    pthread_mutex_unlock(&k->lock);
    return rc;
}
