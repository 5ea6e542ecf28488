/* memfd: helpers that change the memfd itself. The seals must refuse all of it, whatever the fd is reopened as. */
#ifndef PCSHARE_HOSTILE_MEMFD_H
#define PCSHARE_HOSTILE_MEMFD_H

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include "scene.h"

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

/* The same memfd, opened anew for writing: allowed to its owner or to root, whatever its mode. -1: not allowed. */
static int reopen(int memfd)
{
    char path[32];
    snprintf(path, sizeof path, "/proc/self/fd/%d", memfd);
    return open(path, O_RDWR | O_CLOEXEC);
}

static int hostile_truncates(struct scene *s)
{
    struct raw r;
    struct stat before, after;
    TRY(scene_join(s, &r));
    const int fds[] = {r.memfd, reopen(r.memfd)};
    const off_t sizes[] = {0, (off_t)(r.welcome.map_length - r.welcome.page_size), (off_t)(2 * r.welcome.map_length)};
    fstat(r.memfd, &before);
    for (size_t i = 0; i < 2 * sizeof sizes / sizeof *sizes; i++, s->attempts++)
        if (!ftruncate(fds[i % 2], sizes[i / 2]))
            return scene_end(s, HARM, "harm", "the memfd was truncated to %lld bytes", (long long)sizes[i / 2]);
    fstat(r.memfd, &after);
    if (before.st_size != after.st_size)
        return scene_end(s, HARM, "harm", "the memfd's size changed");
    return scene_end_if_others_go_on(s, "refused", "every size");
}

/* Punching a hole and writing are the only ways that could take right bytes away. Each returns whether it succeeded. */
static int can_map_writable(int fd, const struct raw *r)
{
    void *bytes = mmap(NULL, r->welcome.page_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    return bytes != MAP_FAILED;
}

static int can_protect_writable(int fd, const struct raw *r)
{
    void *bytes = mmap(NULL, r->welcome.page_size, PROT_NONE, MAP_SHARED, fd, 0);
    return bytes != MAP_FAILED && !mprotect(bytes, r->welcome.page_size, PROT_READ | PROT_WRITE);
}

static int can_pwrite(int fd, const struct raw *r)
{
    (void)r;
    return pwrite(fd, "wrong", 5, 0) > 0;
}

static int can_punch(int fd, const struct raw *r)
{
    return !fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)r->welcome.page_size);
}

static int can_zero(int fd, const struct raw *r)
{
    return !fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, 0, (off_t)r->welcome.page_size);
}

static int can_remove(int fd, const struct raw *r)
{
    void *bytes = mmap(NULL, r->welcome.page_size, PROT_NONE, MAP_SHARED, fd, 0);
    return bytes != MAP_FAILED && !madvise(bytes, r->welcome.page_size, MADV_REMOVE);
}

static int can_splice(int fd, const struct raw *r)
{
    int pipe_fds[2];
    (void)r;
    return !pipe2(pipe_fds, O_CLOEXEC) && write(pipe_fds[1], "wrong", 5) == 5
           && splice(pipe_fds[0], NULL, fd, &(loff_t){0}, 5, 0) > 0;
}

static int hostile_writes_readonly(struct scene *s)
{
    static const struct {
        const char *name;
        int (*can)(int fd, const struct raw *r);
    } ways[] = {
        {"mmap", can_map_writable}, {"mprotect", can_protect_writable}, {"pwrite", can_pwrite}, {"splice", can_splice},
        {"punch hole", can_punch},  {"zero range", can_zero},           {"MADV_REMOVE", can_remove},
    };
    struct raw r;
    TRY(scene_join(s, &r));
    const int fds[] = {r.memfd, reopen(r.memfd)};
    if (raw_ensure(&r, 0, r.welcome.page_size))
        return scene_end(s, CANNOT, "cannot", "the first page did not come");
    for (size_t i = 0; i < 2 * sizeof ways / sizeof *ways; i++, s->attempts++)
        if (fds[i % 2] >= 0 && ways[i / 2].can(fds[i % 2], &r))
            return scene_end(s, HARM, "harm", "%s succeeded%s", ways[i / 2].name, i % 2 ? ", memfd opened anew" : "");
    if (!scene_memfd_is_right(s, &r, 0))
        return scene_end(s, HARM, "harm", "the first page holds wrong bytes");
    return scene_end_if_others_go_on(s, "refused", fds[1] < 0 ? "even opening it anew" : "every way");
}

static int hostile_adds_seals(struct scene *s)
{
    const int seals[] = {F_SEAL_FUTURE_WRITE, F_SEAL_WRITE, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_SEAL};
    struct raw r, later;
    TRY(scene_join(s, &r));
    const int fds[] = {r.memfd, reopen(r.memfd)};
    for (size_t i = 0; i < 2 * sizeof seals / sizeof *seals; i++, s->attempts++)
        if (!fcntl(fds[i % 2], F_ADD_SEALS, seals[i / 2]))
            return scene_end(s, HARM, "harm", "seal %#x was added", (unsigned)seals[i / 2]);
    TRY(scene_join(s, &later)); /* a shared writable mapping of somebody who comes later */
    return scene_end_if_others_go_on(s, "refused", "every seal");
}

/* fallocate puts a zero page where none was; a right page that is here it leaves alone. */
static int hostile_fallocates(struct scene *s)
{
    struct raw r;
    uint64_t page;
    TRY(scene_join(s, &r));
    TRY(scene_missing_page(s, &r, &page));
    off_t offset = (off_t)(page * r.welcome.page_size);
    int fd = s->mode == WIRE_MODE_RW ? r.memfd : reopen(r.memfd);
    s->attempts++;
    if (fd < 0 || fallocate(fd, 0, offset, (off_t)r.welcome.page_size))
        return scene_end_if_others_go_on(s, "refused", strerror(errno));
    s->planted_pages++;
    if (raw_ensure(&r, (uint64_t)offset, r.welcome.page_size))
        return scene_end(s, HARM, "harm", "the page that was asked for did not come");
    if (s->mode == WIRE_MODE_RO && !scene_memfd_is_right(s, &r, page))
        return scene_end(s, HARM, "harm", "page %llu stayed wrong", (unsigned long long)page);
    return scene_end_if_others_go_on(s, "planted", s->mode == WIRE_MODE_RO ? "and repaired when the page was asked for"
                                                                            : "and left alone: it could be a write");
}

#endif
