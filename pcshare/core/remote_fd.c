#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "read_ahead.h"
#include "remote_fd.h"
#include "remote_maps.h"
#include "uffd.h"

#define ADDRESS_SPACE_END ((1ull << 47) - 4096) /* of a process that asked for no more than 47 bits */

static int map_is_valid(const struct remote_map *map, const struct ramblock *block)
{
    uint64_t n_pages = map->length / block->page_size;

    if (map->length == 0 || map->length % block->page_size || map->client_addr % block->page_size)
        return 0;
    if (map->client_addr == 0 || map->client_addr > UINT64_MAX - map->length)
        return 0;
    return map->page <= block->page_count && n_pages <= block->page_count - map->page;
}

static int maps_overlap(const struct remote_map *a, const struct remote_map *b)
{
    return a->client_addr < b->client_addr + b->length && b->client_addr < a->client_addr + a->length;
}

/* What a helper says of itself: nothing in it is believed. */
static int maps_are_valid(const struct remote_map *maps, uint32_t n_maps, const struct ramblock *block)
{
    if (n_maps == 0 || n_maps > WIRE_MAPS_MAX)
        return 0;
    for (uint32_t i = 0; i < n_maps; i++) {
        if (!map_is_valid(&maps[i], block))
            return 0;
        for (uint32_t j = 0; j < i; j++)
            if (maps_overlap(&maps[i], &maps[j]))
                return 0;
    }
    return 1;
}

static void close_fds(int uffd, int control)
{
    close(uffd);
    if (control >= 0)
        close(control);
}

int remote_fd_new(struct remote_fd **rp, struct ramblock *block, int uffd, int control, const struct remote_map *maps,
                  uint32_t n_maps, struct status_helper *status)
{
    struct remote_fd *r = NULL;
    int rc = -EINVAL;

    *rp = NULL;
    if (maps_are_valid(maps, n_maps, block)) {
        r = calloc(1, sizeof(*r));
        rc = r ? read_ahead_new(&r->ahead) : -ENOMEM;
    }
    if (rc == 0)
        rc = remote_maps_new(&r->maps, maps, n_maps, block->page_size);
    if (rc < 0) {
        if (r)
            read_ahead_free(r->ahead);
        free(r);
        close_fds(uffd, control);
        return rc;
    }
    r->references = 1;
    r->home_cpu = -1;
    r->uffd = uffd;
    r->control = control;
    r->block = block;
    r->probe_addr = maps[0].client_addr;
    r->status = status;
    *rp = r;
    return 0;
}

struct remote_fd *remote_fd_get(struct remote_fd *r)
{
    __atomic_fetch_add(&r->references, 1, __ATOMIC_RELAXED);
    return r;
}

void remote_fd_put(struct remote_fd *r)
{
    if (!r || __atomic_sub_fetch(&r->references, 1, __ATOMIC_ACQ_REL) > 0)
        return;
    close_fds(r->uffd, r->control);
    while (r->demands.head) {
        struct queued_page *first = r->demands.head;

        r->demands.head = first->next;
        free(first);
    }
    remote_maps_free(r->maps);
    read_ahead_free(r->ahead);
    free(r);
}

int remote_fd_page(const struct remote_fd *r, uint64_t client_addr, uint64_t *pagep)
{
    return remote_maps_page(r->maps, client_addr, pagep);
}

typedef int page_verb(int uffd, uint64_t addr, uint64_t length);

/* Does the verb wherever the page is shown; one that fails does not keep the others from it. The first error. */
static int each_place(const struct remote_fd *r, uint64_t page, page_verb *verb)
{
    struct remote_place places[REMOTE_MAPS_MAX];
    uint32_t n = remote_maps_places(r->maps, page, places);
    int rc = 0;

    for (uint32_t i = 0; i < n; i++) {
        int rc_here = verb(r->uffd, places[i].client_addr, r->block->page_size);
        if (rc == 0)
            rc = rc_here;
    }
    return rc;
}

int remote_fd_wake(const struct remote_fd *r, uint64_t page)
{
    return each_place(r, page, uffd_wake);
}

static uint64_t at_most(uint64_t n, uint64_t most)
{
    return n < most ? n : most;
}

/* What follows comes with the call that maps the page and wakes; what lies before takes another. */
static int give_place(const struct remote_fd *r, const struct remote_place *place, uint64_t before, uint64_t from)
{
    uint64_t done, page_size = r->block->page_size;
    int rc = uffd_continue_wake(r->uffd, place->client_addr, at_most(place->pages_from, from) * page_size, &done);

    if (!done) {
        if (rc != -EAGAIN)
            (void)uffd_wake(r->uffd, place->client_addr, page_size);
        return rc == -EEXIST ? 0 : rc; /* mapped already: by another thread's fault */
    }
    before = at_most(place->pages_before, before);
    if (before)
        (void)uffd_continue(r->uffd, place->client_addr - before * page_size, before * page_size, &done);
    return 0;
}

int remote_fd_give(const struct remote_fd *r, uint64_t page, uint64_t start, uint64_t end)
{
    struct remote_place places[REMOTE_MAPS_MAX];
    uint32_t n = remote_maps_places(r->maps, page, places);
    int rc = 0;

    for (uint32_t i = 0; i < n; i++) {
        int rc_here = give_place(r, &places[i], page - start, end - page);
        if (rc == 0)
            rc = rc_here;
    }
    return rc;
}

/* EEXIST: the page is mapped there, nothing to poison. */
static int poison_one(int uffd, uint64_t addr, uint64_t length)
{
    uint64_t done;
    int rc = uffd_poison(uffd, addr, length, &done);

    return rc == -EEXIST ? 0 : rc;
}

int remote_fd_poison(const struct remote_fd *r, uint64_t page)
{
    return r->is_own ? 0 : each_place(r, page, poison_one);
}

/* EEXIST: it is mapped, not poisoned. ENOENT: no longer a mapping of ours. */
static int unpoison_one(int uffd, uint64_t addr, uint64_t length)
{
    uint64_t done;
    int rc = uffd_continue(uffd, addr, length, &done);

    return rc == -EEXIST || rc == -ENOENT ? 0 : rc;
}

int remote_fd_unpoison(const struct remote_fd *r, uint64_t page)
{
    return r->is_own ? 0 : each_place(r, page, unpoison_one);
}

int remote_fd_move(struct remote_fd *r, uint64_t from_addr, uint64_t to_addr, uint64_t length)
{
    return remote_maps_move(r->maps, from_addr, to_addr, length);
}

/* Who waited there would never be woken: woken now, it meets SIGSEGV as it must. */
int remote_fd_cut(struct remote_fd *r, uint64_t client_addr, uint64_t length)
{
    (void)uffd_wake(r->uffd, client_addr, length);
    return remote_maps_cut(r->maps, client_addr, length);
}

/* CONTINUE over a range that no mapping can hold (up to the end of the address space): the kernel first looks whether
 * events of it are unread (EAGAIN: then a thread of it waits for that), then whether there is an address space at all,
 * then whether one mapping holds the whole range, and only then does something. */
int remote_fd_probe(const struct remote_fd *r)
{
    uint64_t addr = r->probe_addr, done;
    uint64_t length = addr < ADDRESS_SPACE_END ? ADDRESS_SPACE_END - addr : r->block->page_size;

    int rc = uffd_continue(r->uffd, addr, length, &done);
    return rc == -ENOENT || rc == -EAGAIN ? 0 : rc == -ESRCH ? rc : -EINVAL;
}
