/* keeper_serve: the keeper's own side: makes, maps, registers and seals blocks, and holds them for whoever comes. */
#define _GNU_SOURCE
#include "keeper_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fd_message.h"
#include "uffd.h"

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif
#ifndef MFD_HUGE_SHIFT
#define MFD_HUGE_SHIFT 26
#endif

struct kept_block {
    int in_use;
    int is_claimed; /* by the coordinator of now: it has made or taken it */
    int registered;
    int writable;
    int memfd;
    uint8_t *place_addr; /* NULL: deferred, and not listening yet */
    uint64_t map_length;
    uint64_t page_size;
    uint64_t ioctls; /* what REGISTER offered */
    char idstr[sizeof(((struct keeper_request *)0)->idstr)];
};

struct keeping {
    int is_greeted;
    int uffd; /* the placing uffd: one for all blocks */
    int staging_fd;
    uint8_t *staging;
    struct kept_block blocks[KEEPER_BLOCKS_MAX];
};

static int refuse(struct keeper_answer *answer, int error, const char *what)
{
    answer->status = -error;
    snprintf(answer->text, sizeof(answer->text), "%s: %s", what, strerror(error));
    return -error;
}

static int open_placing_uffd(struct keeping *k, struct keeper_answer *answer)
{
    int user_mode_only;

    if (k->uffd >= 0)
        return 0;
    int fd = uffd_open(-1, &user_mode_only);
    if (fd < 0)
        return refuse(answer, -fd, "the keeper cannot open a userfaultfd");
    int rc = uffd_api(fd, 0, NULL, NULL);
    if (rc < 0) {
        close(fd);
        return refuse(answer, -rc, "userfaultfd API handshake");
    }
    k->uffd = fd;
    return 0;
}

static int make_memfd(const struct keeper_request *request, struct keeper_answer *answer)
{
    unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
    char name[sizeof(request->idstr) + 16];

    if (request->page_size > (uint64_t)getpagesize())
        flags |= MFD_HUGETLB | ((unsigned)__builtin_ctzll(request->page_size) << MFD_HUGE_SHIFT);
    snprintf(name, sizeof(name), "pcshare-%.*s", (int)sizeof(request->idstr), request->idstr);
    int fd = memfd_create(name, flags);
    if (fd < 0)
        return refuse(answer, errno, "memfd_create");
    if (ftruncate(fd, (off_t)request->map_length) < 0 || fchmod(fd, request->writable ? 0600 : 0444) < 0) {
        int error = errno;
        close(fd);
        return refuse(answer, error, "sizing the memfd");
    }
    return fd;
}

/* PROT_NONE first: whatever touches a mapping before it is registered (mlockall, a core dump) would fill it with zero
 * pages. */
static int map_and_register(struct keeping *k, struct kept_block *block, struct keeper_answer *answer)
{
    uint64_t length = block->map_length;
    void *mapped = mmap(NULL, length, PROT_NONE, MAP_SHARED, block->memfd, 0);

    if (mapped == MAP_FAILED)
        return refuse(answer, errno, block->page_size > (uint64_t)getpagesize() ? "reserving huge pages" : "mmap");
    block->place_addr = mapped;
    if (madvise(mapped, length, MADV_DONTDUMP) < 0 || madvise(mapped, length, MADV_DONTFORK) < 0)
        return refuse(answer, errno, "madvise");
    (void)madvise(mapped, length, MADV_NOHUGEPAGE); /* refused where THP is not configured: then there is none */
    int rc = uffd_register(k->uffd, (uint64_t)(uintptr_t)mapped, length, UFFD_MODE_MISSING, &answer->ioctls);
    if (rc < 0)
        return refuse(answer, -rc, "registering the block with userfaultfd");
    block->registered = 1;
    block->ioctls = answer->ioctls;
    if (mprotect(mapped, length, PROT_READ | PROT_WRITE) < 0)
        return refuse(answer, errno, "mprotect");
    return 0;
}

static int seal(const struct kept_block *block, struct keeper_answer *answer)
{
    int seals = F_SEAL_SHRINK | F_SEAL_GROW;

    if (!block->writable)
        seals |= F_SEAL_FUTURE_WRITE;
    if (fcntl(block->memfd, F_ADD_SEALS, seals | F_SEAL_SEAL) < 0)
        return refuse(answer, errno, "sealing the memfd");
    return 0;
}

static void complete_block(struct keeping *k, struct kept_block *block)
{
    if (block->registered)
        (void)uffd_unregister(k->uffd, (uint64_t)(uintptr_t)block->place_addr, block->map_length);
    block->registered = 0;
}

static void unmap_block(struct keeping *k, struct kept_block *block)
{
    complete_block(k, block);
    if (block->place_addr)
        munmap(block->place_addr, block->map_length);
    block->place_addr = NULL;
}

static void drop_block(struct keeping *k, struct kept_block *block)
{
    unmap_block(k, block);
    if (block->memfd >= 0)
        close(block->memfd);
    memset(block, 0, sizeof(*block));
    block->memfd = -1;
}

static struct kept_block *free_slot(struct keeping *k, uint32_t *indexp)
{
    for (uint32_t i = 0; i < KEEPER_BLOCKS_MAX; i++) {
        if (!k->blocks[i].in_use) {
            *indexp = i;
            return &k->blocks[i];
        }
    }
    return NULL;
}

/* A block that cannot listen is as it was: its memory may yet be dropped, or tried again. */
static int listen_on(struct keeping *k, struct kept_block *block, struct keeper_answer *answer)
{
    if (map_and_register(k, block, answer) < 0 || seal(block, answer) < 0) {
        unmap_block(k, block);
        return answer->status;
    }
    answer->place_addr = (uint64_t)(uintptr_t)block->place_addr;
    return 0;
}

static void serve_listen(struct keeping *k, const struct keeper_request *request, struct keeper_answer *answer,
                         int *fds, uint32_t *n_fdsp)
{
    struct kept_block *block = &k->blocks[request->block];

    answer->block = request->block;
    if (block->place_addr) {
        refuse(answer, EALREADY, "listen");
        return;
    }
    if (listen_on(k, block, answer) < 0)
        return;
    fds[0] = k->uffd;
    *n_fdsp = 1;
}

/* Of a deferred block too the userfaultfd is opened here: a host that has none says so before anything is stored. */
static void serve_make(struct keeping *k, const struct keeper_request *request, struct keeper_answer *answer, int *fds,
                       uint32_t *n_fdsp)
{
    struct kept_block *block = free_slot(k, &answer->block);

    if (!block) {
        refuse(answer, ENOSPC, "the keeper holds as many blocks as it may");
        return;
    }
    if (open_placing_uffd(k, answer) < 0)
        return;
    block->writable = request->writable != 0;
    block->map_length = request->map_length;
    block->page_size = request->page_size;
    block->memfd = make_memfd(request, answer);
    if (block->memfd < 0)
        return;
    block->in_use = block->is_claimed = 1;
    memcpy(block->idstr, request->idstr, sizeof(block->idstr));
    if (!request->deferred && listen_on(k, block, answer) < 0) {
        drop_block(k, block);
        return;
    }
    fds[0] = block->memfd;
    fds[1] = k->uffd;
    *n_fdsp = request->deferred ? 1 : 2;
}

/* Of a block that only a dead coordinator had: whoever says its name was told of it. */
static void serve_take(struct keeping *k, const struct keeper_request *request, struct keeper_answer *answer, int *fds,
                       uint32_t *n_fdsp)
{
    struct kept_block *block = &k->blocks[request->block];

    if (!block->place_addr || memcmp(block->idstr, request->idstr, sizeof(block->idstr)) != 0) {
        refuse(answer, ENOENT, "no such block to take");
        return;
    }
    block->is_claimed = 1;
    answer->block = request->block;
    answer->place_addr = (uint64_t)(uintptr_t)block->place_addr;
    answer->ioctls = block->ioctls;
    fds[0] = block->memfd;
    fds[1] = k->uffd;
    *n_fdsp = 2;
}

static void sweep(struct keeping *k)
{
    for (uint32_t i = 0; i < KEEPER_BLOCKS_MAX; i++)
        if (k->blocks[i].in_use && !k->blocks[i].is_claimed)
            drop_block(k, &k->blocks[i]);
}

static void serve_hello(struct keeping *k, int *fds, uint32_t *n_fdsp)
{
    for (uint32_t i = 0; i < KEEPER_BLOCKS_MAX; i++)
        k->blocks[i].is_claimed = 0;
    k->is_greeted = 1;
    fds[0] = k->staging_fd;
    *n_fdsp = 1;
}

/* Only a block that nobody can punch holes into: a page that was present stays so, and this store cannot wait in a
 * fault. */
static void serve_repair(struct keeping *k, const struct keeper_request *request, struct keeper_answer *answer)
{
    struct kept_block *block = &k->blocks[request->block];

    if (block->writable || !block->place_addr || request->length > KEEPER_STAGING_BYTES ||
        request->offset > block->map_length || request->length > block->map_length - request->offset) {
        refuse(answer, EINVAL, "repair");
        return;
    }
    memcpy(block->place_addr + request->offset, k->staging, request->length);
}

static int names_block(uint32_t op)
{
    return op == KEEPER_DROP || op == KEEPER_REPAIR || op == KEEPER_COMPLETE || op == KEEPER_LISTEN ||
           op == KEEPER_TAKE;
}

static void serve_one(struct keeping *k, const struct keeper_request *request, struct keeper_answer *answer, int *fds,
                      uint32_t *n_fdsp)
{
    answer->pid = (uint32_t)getpid();
    answer->serial = request->serial;
    if (request->version != KEEPER_VERSION) {
        refuse(answer, EPROTONOSUPPORT, "keeper protocol version");
    } else if (names_block(request->op) && (request->block >= KEEPER_BLOCKS_MAX || !k->blocks[request->block].in_use)) {
        refuse(answer, ENOENT, "no such block");
    } else if (request->op == KEEPER_HELLO) {
        serve_hello(k, fds, n_fdsp);
    } else if (request->op == KEEPER_MAKE) {
        serve_make(k, request, answer, fds, n_fdsp);
    } else if (request->op == KEEPER_DROP) {
        drop_block(k, &k->blocks[request->block]);
    } else if (request->op == KEEPER_REPAIR) {
        serve_repair(k, request, answer);
    } else if (request->op == KEEPER_COMPLETE) {
        complete_block(k, &k->blocks[request->block]);
    } else if (request->op == KEEPER_LISTEN) {
        serve_listen(k, request, answer, fds, n_fdsp);
    } else if (request->op == KEEPER_TAKE) {
        serve_take(k, request, answer, fds, n_fdsp);
    } else if (request->op == KEEPER_SWEEP) {
        sweep(k);
    } else {
        refuse(answer, EOPNOTSUPP, "unknown request");
    }
}

static int make_staging(struct keeping *k)
{
    k->staging_fd = memfd_create("pcshare-staging", MFD_CLOEXEC);
    if (k->staging_fd < 0 || ftruncate(k->staging_fd, KEEPER_STAGING_BYTES) < 0)
        return -errno;
    void *mapped = mmap(NULL, KEEPER_STAGING_BYTES, PROT_READ, MAP_SHARED, k->staging_fd, 0);
    if (mapped == MAP_FAILED)
        return -errno;
    k->staging = mapped;
    return 0;
}

int keeping_serve(struct keeping *k, int socket_fd)
{
    struct keeper_request request;
    struct keeper_answer answer = {0};
    int fds[FD_MESSAGE_FDS_MAX];
    uint32_t n_fds = 0;
    int rc = fd_message_receive(socket_fd, &request, sizeof(request), NULL, NULL, 0);

    if (rc == -EINTR)
        return 0;
    if (rc <= 0)
        return rc == 0 ? KEEPING_HUNG_UP : rc;
    if (rc != (int)sizeof(request))
        return -EPROTO;
    request.idstr[sizeof(request.idstr) - 1] = '\0';
    serve_one(k, &request, &answer, fds, &n_fds);
    return fd_message_send(socket_fd, &answer, sizeof(answer), fds, n_fds, 0);
}

int keeping_is_greeted(const struct keeping *k)
{
    return k->is_greeted;
}

void keeping_forget_coordinator(struct keeping *k)
{
    k->is_greeted = 0;
}

int keeping_new(struct keeping **kp)
{
    struct keeping *k = calloc(1, sizeof(*k));

    *kp = NULL;
    if (!k)
        return -ENOMEM;
    k->uffd = -1;
    k->staging_fd = -1;
    for (uint32_t i = 0; i < KEEPER_BLOCKS_MAX; i++)
        k->blocks[i].memfd = -1;
    int rc = make_staging(k);
    if (rc < 0) {
        keeping_free(k);
        return rc;
    }
    *kp = k;
    return 0;
}

void keeping_free(struct keeping *k)
{
    if (!k)
        return;
    for (uint32_t i = 0; i < KEEPER_BLOCKS_MAX; i++)
        if (k->blocks[i].in_use)
            drop_block(k, &k->blocks[i]);
    if (k->uffd >= 0)
        close(k->uffd);
    if (k->staging)
        munmap(k->staging, KEEPER_STAGING_BYTES);
    if (k->staging_fd >= 0)
        close(k->staging_fd);
    free(k);
}
