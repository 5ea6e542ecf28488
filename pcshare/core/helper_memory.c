/* helper_memory: the mapping of a block in this process and its uffd, from the first mmap to the last munmap.
 *
 * Knows no coordinator and no socket; touches no page of a block. Some facts that shaped it, each found by a trial:
 *  - a mapping that can be read before it is registered fills the block with zero pages, for everybody (mlockall,
 * MAP_POPULATE, a core dump do it): so PROT_NONE first, then DONTDUMP and DONTFORK, then register, and only then the
 * real protection;
 *  - unregistering wakes who waits, and lets it read a zero page: so PROT_NONE again before it, unless every page is
 * here;
 *  - munmap wakes nobody, and with UFFD_EVENT_UNMAP it waits for a reader, who may be the sentinel: so unregister
 * before it, all of it, also where the caller has unmapped parts and the kernel refuses the whole;
 *  - a private mapping reserves memory for all of it unless MAP_NORESERVE;
 *  - a read-only fd of a sealed block cannot be registered through a shared mapping, through a private one it can;
 *  - CONTINUE answers whether a page is present (EFAULT: no) in any registered mapping of a memfd, also if only MISSING
 * was asked for.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/sysmacros.h>
#include <unistd.h>
#include "bitmap.h"
#include "helper_internal.h"
#include "uffd.h"

#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif

enum { STATUS_TEXT_MAX = 8192 }; /* of /proc/self/status, which has some 60 short lines */

static int sharing_of(uint32_t mode)
{
    return (mode == PCSHARE_RW ? MAP_SHARED : MAP_PRIVATE) | MAP_NORESERVE;
}

static int protection_of(uint32_t mode)
{
    return mode == PCSHARE_RO ? PROT_READ : PROT_READ | PROT_WRITE;
}

/* ---- errors with their cure ---- */

static int map_failed(const struct pcshare_attachment *a, int error)
{
    struct rlimit limit = {0};

    getrlimit(RLIMIT_MEMLOCK, &limit);
    if (error == EAGAIN || (error == ENOMEM && limit.rlim_cur < a->info.map_length))
        return helper_fail(
            error,
            "block %s: mapping %" PRIu64 " bytes: %s. If this process has called mlockall(MCL_FUTURE), its limit of "
            "locked memory (%" PRIu64 " bytes: ulimit -l) must hold the block, or call munlockall before attaching",
            a->info.idstr, a->info.map_length, strerror(error), (uint64_t)limit.rlim_cur);
    return helper_fail(
        error, "block %s: mapping %" PRIu64 " bytes: %s (address space: ulimit -v; map count: sysctl vm.max_map_count)",
        a->info.idstr, a->info.map_length, strerror(error));
}

/* Not by prctl, which the filter itself may answer. */
static int is_under_seccomp_filter(void)
{
    char text[STATUS_TEXT_MAX];
    const char *line;
    ssize_t n = -1;
    int fd = open("/proc/self/status", O_RDONLY | O_CLOEXEC);

    if (fd >= 0) {
        n = read(fd, text, sizeof(text) - 1);
        close(fd);
    }
    text[n > 0 ? n : 0] = '\0';
    line = strstr(text, "\nSeccomp:\t");
    return line && line[sizeof("\nSeccomp:\t") - 1] == '2';
}

static int uffd_failed(const struct pcshare_attachment *a, int error)
{
    if ((error == EPERM || error == EACCES || error == ENOSYS) && is_under_seccomp_filter())
        return helper_fail(
            error,
            "block %s: userfaultfd is refused to this process (%s), most likely by the seccomp filter that it runs "
            "under: allow userfaultfd in the container's seccomp profile, or give the process, or the coordinator, "
            "/dev/userfaultfd (docker run --device /dev/userfaultfd)",
            a->info.idstr, strerror(error));
    if (error == EPERM || error == EACCES)
        return helper_fail(
            error,
            "block %s: this user may not open a userfaultfd: run the coordinator as root, so that it offers "
            "/dev/userfaultfd, or: sysctl vm.unprivileged_userfaultfd=1",
            a->info.idstr);
    if (error == ENOSYS)
        return helper_fail(error, "block %s: this kernel has no userfaultfd (CONFIG_USERFAULTFD)", a->info.idstr);
    return helper_fail(error, "block %s: opening a userfaultfd: %s", a->info.idstr, strerror(error));
}

static int step_failed(const struct pcshare_attachment *a, const char *step, int error)
{
    return helper_fail(error, "block %s: %s of %" PRIu64 " bytes at %p: %s", a->info.idstr, step, a->info.map_length,
                       a->data, strerror(error));
}

/* ---- locked memory ---- */

static int any_memory_is_locked(void)
{
    FILE *status = fopen("/proc/self/status", "re");
    char line[256];
    unsigned long kilobytes = 0;

    if (!status)
        return 0;
    while (fgets(line, sizeof(line), status))
        if (sscanf(line, "VmLck: %lu", &kilobytes) == 1)
            break;
    fclose(status);
    return kilobytes > 0;
}

/* Whether mlockall(MCL_FUTURE) has locked the mapping at data. Only who locks memory pays for the long look. */
static int is_locked(const void *data)
{
    FILE *smaps = any_memory_is_locked() ? fopen("/proc/self/smaps", "re") : NULL;
    uintptr_t start, end, current = 0;
    char line[512];
    int locked = 0;

    while (smaps && fgets(line, sizeof(line), smaps)) {
        if (sscanf(line, "%" SCNxPTR "-%" SCNxPTR " ", &start, &end) == 2)
            current = start;
        if (current == (uintptr_t)data && strncmp(line, "VmFlags:", 8) == 0) {
            locked = strstr(line, " lo") != NULL;
            break;
        }
    }
    if (smaps)
        fclose(smaps);
    return locked;
}

void memory_relock_some(struct pcshare_attachment *a)
{
    uint64_t left = a->info.map_length - a->relock_offset;
    uint64_t length = left < RELOCK_SLICE_BYTES ? left : RELOCK_SLICE_BYTES;

    mlock((char *)a->data + a->relock_offset, length); /* refused if the limit was lowered meanwhile: so be it */
    a->relock_offset += length;
}

/* ---- mapping ---- */

int memory_map_plain(struct pcshare_attachment *a)
{
    int at = a->map_at ? MAP_FIXED : 0;
    void *data =
        mmap(a->map_at, a->info.map_length, protection_of(a->info.mode), sharing_of(a->info.mode) | at, a->memfd, 0);

    if (data == MAP_FAILED)
        return map_failed(a, errno);
    a->data = data;
    a->relock_offset = a->info.map_length;
    madvise(data, a->info.map_length, MADV_DONTDUMP); /* a dump would fill its holes */
    return 0;
}

static int open_uffd(struct pcshare_attachment *a)
{
    int user_mode_only, rc;

    rc = uffd_open(a->device, &user_mode_only);
    if (rc < 0)
        return uffd_failed(a, -rc);
    a->uffd = rc;
    rc = uffd_api(a->uffd, a->features, NULL, NULL);
    if (rc < 0)
        return helper_fail(
            -rc, "block %s: this kernel's userfaultfd lacks features that the coordinator asks for (0x%" PRIx64 "): %s",
            a->info.idstr, a->features, strerror(-rc));
    return 0;
}

/* An inaccessible mapping, kept out of core dumps, children and huge pages. */
static int reserve(struct pcshare_attachment *a, void *at, int fixed)
{
    void *data = mmap(at, a->info.map_length, PROT_NONE, sharing_of(a->info.mode) | fixed, a->memfd, 0);

    if (data == MAP_FAILED)
        return map_failed(a, errno);
    if (fixed && data != at) { /* a kernel that knows no MAP_FIXED_NOREPLACE */
        munmap(data, a->info.map_length);
        return map_failed(a, EEXIST);
    }
    a->data = data;
    if (madvise(data, a->info.map_length, MADV_DONTDUMP) < 0)
        return step_failed(a, "MADV_DONTDUMP", errno);
    if (a->info.mode != PCSHARE_COW && madvise(data, a->info.map_length, MADV_DONTFORK) < 0)
        return step_failed(a, "MADV_DONTFORK", errno);
    /* Refused by hugetlb and by kernels without THP. */
    a->thp_switched_off = madvise(data, a->info.map_length, MADV_NOHUGEPAGE) == 0;
    return 0;
}

/* A locked mapping would be filled by mprotect, one page after the other, each waiting for its fault. */
static void unlock(struct pcshare_attachment *a)
{
    a->was_locked = is_locked(a->data);
    a->relock_offset = a->was_locked ? 0 : a->info.map_length;
    if (a->was_locked)
        munlock(a->data, a->info.map_length);
}

static int guard(struct pcshare_attachment *a)
{
    uint64_t mode = UFFD_MODE_MISSING | (a->is_strict ? UFFD_MODE_MINOR : 0);
    int rc = uffd_register(a->uffd, (uintptr_t)a->data, a->info.map_length, mode, NULL);

    if (rc < 0)
        return step_failed(a, "registering with userfaultfd", -rc);
    if (mprotect(a->data, a->info.map_length, protection_of(a->info.mode)) < 0)
        return step_failed(a, "mprotect", errno);
    return 0;
}

int memory_map_guarded(struct pcshare_attachment *a)
{
    int rc = open_uffd(a); /* first, because it is refused most: then nothing of the caller's has been replaced */

    if (rc == 0)
        rc = reserve(a, a->map_at, a->map_at ? MAP_FIXED : 0);
    if (rc < 0)
        return rc;
    unlock(a);
    return guard(a);
}

int memory_guard_in_child(struct pcshare_attachment *a)
{
    int rc = open_uffd(a);

    if (rc == 0 && a->info.mode != PCSHARE_COW)
        rc = reserve(a, a->data, MAP_FIXED_NOREPLACE);
    if (rc < 0)
        return rc;
    a->was_locked = 0; /* a child inherits no locks */
    a->relock_offset = a->info.map_length;
    return guard(a);
}

/* ---- where it is by now ---- */

/* Of one line of /proc/PID/maps, if it shows this block. Other attachments' mappings do no harm: nothing comes from
 * them through this uffd. */
static int parse_map(const struct pcshare_attachment *a, const char *line, struct wire_map *map)
{
    unsigned device_major, device_minor;
    uint64_t start, end, offset, inode;

    if (sscanf(line, "%" SCNx64 "-%" SCNx64 " %*s %" SCNx64 " %x:%x %" SCNu64, &start, &end, &offset, &device_major,
               &device_minor, &inode) != 6)
        return 0;
    if (inode != (uint64_t)a->memfd_inode || makedev(device_major, device_minor) != a->memfd_device)
        return 0;
    if (offset >= a->info.map_length)
        return 0;
    *map = (struct wire_map){.client_addr = start, .offset = offset, .length = end - start};
    if (map->length > a->info.map_length - offset)
        map->length = a->info.map_length - offset;
    return 1;
}

static int is_one_piece(const struct wire_map *low, const struct wire_map *high)
{
    return low->client_addr + low->length == high->client_addr && low->offset + low->length == high->offset;
}

static uint32_t whole_map(const struct pcshare_attachment *a, struct wire_map *map)
{
    *map = (struct wire_map){.client_addr = (uintptr_t)a->data, .offset = 0, .length = a->info.map_length};
    return 1;
}

uint32_t memory_find_maps(const struct pcshare_attachment *a, struct wire_map maps[WIRE_MAPS_MAX])
{
    int may_differ = a->state == PCSHARE_ORPHANED && (a->features & UFFD_FEATURE_BIT_EVENT_REMAP);
    FILE *file = may_differ ? fopen("/proc/self/maps", "re") : NULL;
    struct wire_map map;
    char line[512];
    uint32_t n = 0;

    while (file && n <= WIRE_MAPS_MAX && fgets(line, sizeof(line), file)) {
        if (!parse_map(a, line, &map))
            continue;
        if (n > 0 && is_one_piece(&maps[n - 1], &map))
            maps[n - 1].length += map.length;
        else if (n++ < WIRE_MAPS_MAX)
            maps[n - 1] = map;
    }
    if (file)
        fclose(file);
    return n > 0 && n <= WIRE_MAPS_MAX ? n : whole_map(a, maps); /* cut off at its first fault elsewhere */
}

/* ---- the end of the guard ---- */

void memory_complete(struct pcshare_attachment *a)
{
    if (uffd_unregister(a->uffd, (uintptr_t)a->data, a->info.map_length) < 0)
        uffd_wake_all(a->uffd); /* the caller has unmapped parts: closing it unregisters the rest, but wakes nobody */
    if (a->info.mode != PCSHARE_COW)
        madvise(a->data, a->info.map_length, MADV_DOFORK);
    if (a->thp_switched_off)
        madvise(a->data, a->info.map_length, MADV_HUGEPAGE);
    fd_close(&a->uffd);
    fd_close(&a->memfd);
    fd_close(&a->device);
}

/* A page that is mapped already, or was removed, is left out. */
void memory_map_received(struct pcshare_attachment *a, uint64_t offset, uint64_t length)
{
    uint64_t page = offset / a->info.page_size, last = (offset + length + a->info.page_size - 1) / a->info.page_size;
    uint64_t done;

    for (page = bitmap_next_set(a->view->received, page, last); page < last;
         page = bitmap_next_set(a->view->received, page, last)) {
        uint64_t end = bitmap_next_clear(a->view->received, page, last);
        (void)uffd_continue(a->uffd, (uintptr_t)a->data + page * a->info.page_size, (end - page) * a->info.page_size,
                            &done);
        page += done ? done / a->info.page_size : 1;
    }
}

/* For kernels without POISON (before 6.6): a page beyond the end of an empty file is SIGBUS as well. */
static void put_hole_over(struct pcshare_attachment *a, char *page)
{
    int empty = memfd_create("pcshare-lost", MFD_CLOEXEC);

    if (empty < 0)
        return; /* it waits on, and is tried again when everybody is woken next */
    if (mmap(page, a->info.page_size, PROT_READ, MAP_PRIVATE | MAP_FIXED, empty, 0) != MAP_FAILED &&
        a->info.mode != PCSHARE_COW)
        madvise(page, a->info.page_size, MADV_DONTFORK);
    close(empty);
}

/* A received bit is not enough: a page of a writable block can have been removed since. Memory decides. */
static int page_is_here(const struct pcshare_attachment *a, uint64_t addr)
{
    uint64_t done;

    if (!bitmap_test(a->view->received, (addr - (uintptr_t)a->data) / a->info.page_size))
        return 0;
    return uffd_continue(a->uffd, addr, a->info.page_size, &done) != -EFAULT;
}

/* Received, and not here: a helper has removed it, and it is zeros. */
static int bring_back_removed(const struct pcshare_attachment *a, uint64_t addr)
{
    uint64_t done;

    if (a->info.mode != PCSHARE_RW || !bitmap_test(a->view->received, (addr - (uintptr_t)a->data) / a->info.page_size))
        return 0;
    int rc = uffd_zeropage(a->uffd, addr, a->info.page_size, &done);
    return rc == 0 || rc == -EEXIST; /* refused of huge pages */
}

static int has_moved(const struct pcshare_attachment *a, uint64_t addr)
{
    return addr - (uintptr_t)a->data >= a->info.map_length;
}

/* Of a page that mremap has moved nothing is known but that it is missing. */
static int page_can_be_had(const struct pcshare_attachment *a, uint64_t addr)
{
    uint64_t done;

    if (has_moved(a, addr))
        return uffd_continue(a->uffd, addr, a->info.page_size, &done) != -EFAULT;
    return page_is_here(a, addr) || bring_back_removed(a, addr);
}

void memory_give_up_page(struct pcshare_attachment *a, uint64_t client_addr)
{
    uint64_t done, addr = client_addr & ~(a->info.page_size - 1);
    int rc;

    if (!page_can_be_had(a, addr)) {
        rc = uffd_poison(a->uffd, addr, a->info.page_size, &done);
        if ((rc == -EINVAL || rc == -ENOTTY) && !has_moved(a, addr))
            put_hole_over(a, (char *)(uintptr_t)addr);
    }
    /* Whatever came of it: who is not helped faults again, and we see it again. */
    uffd_wake(a->uffd, addr, a->info.page_size);
}

/* ---- the end of the mapping ---- */

/* The caller's place stays taken, in one step, as far as its own bytes reach; what page rounding added goes. */
static void give_back_reserved(struct pcshare_attachment *a)
{
    uint64_t host_page = (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t kept = (a->info.used_length + host_page - 1) / host_page * host_page;

    /* Refused (locked memory, map count): the old mapping stays; it is inaccessible too. */
    (void)!mmap(a->data, a->info.map_length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    if (kept < a->info.map_length)
        munmap((char *)a->data + kept, a->info.map_length - kept);
}

/* What is done to a piece of the mapping; a negative errno where it cannot be done to all of it. */
typedef int piece_step(const struct pcshare_attachment *a, char *piece, uint64_t length);

static int make_inaccessible(const struct pcshare_attachment *a, char *piece, uint64_t length)
{
    (void)a;
    return mprotect(piece, length, PROT_NONE) < 0 ? -errno : 0;
}

static int unregister_piece(const struct pcshare_attachment *a, char *piece, uint64_t length)
{
    return uffd_unregister(a->uffd, (uintptr_t)piece, length);
}

/* All at once, or, where the caller has unmapped some of it or mapped something there, one mapping after the other. */
static void each_piece(const struct pcshare_attachment *a, piece_step *step)
{
    uintptr_t first = (uintptr_t)a->data, last = first + a->info.map_length, start, end;
    FILE *maps = step(a, a->data, a->info.map_length) < 0 ? fopen("/proc/self/maps", "re") : NULL;
    char line[512];

    while (maps && fgets(line, sizeof(line), maps)) {
        if (sscanf(line, "%" SCNxPTR "-%" SCNxPTR " ", &start, &end) != 2 || end <= first || start >= last)
            continue;
        start = start < first ? first : start;
        end = end > last ? last : end;
        (void)step(a, (char *)start, end - start);
    }
    if (maps)
        fclose(maps);
}

void memory_release(struct pcshare_attachment *a, int keep_reserved)
{
    if (!a->data)
        return;
    /* Who waits there is woken by this, and meets SIGSEGV, not zeros. */
    each_piece(a, make_inaccessible);
    if (a->uffd >= 0)
        each_piece(a, unregister_piece);
    if (keep_reserved)
        give_back_reserved(a);
    else
        munmap(a->data, a->info.map_length);
    if (a->uffd >= 0)
        uffd_wake(a->uffd, (uintptr_t)a->data, a->info.map_length);
    a->data = NULL;
}
