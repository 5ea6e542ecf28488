/* ramblock: see ramblock.h. Its life: memory, mappings, bitmaps. */
#define _GNU_SOURCE
#include "ramblock_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bitmap.h"
#include "error.h"
#include "place_gate.h"
#include "uffd.h"

/* ---- making ---- */

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

static void give_back(struct keeper *keeper, uint32_t keeper_block, int memfd)
{
    if (memfd < 0)
        return;
    (void)keeper_drop_block(keeper, keeper_block);
    close(memfd);
}

static int check_sizes(const struct ramblock *b, char *text)
{
    uint64_t host_page = (uint64_t)getpagesize();

    if (b->page_size == 0 || (b->page_size & (b->page_size - 1)) || b->page_size < host_page ||
        b->page_size > RAMBLOCK_PAGE_SIZE_MAX) {
        snprintf(text, CORE_ERROR_TEXT_MAX, "block %s: page size %llu: the host's is %llu, the largest supported %u",
                 b->idstr, (unsigned long long)b->page_size, (unsigned long long)host_page, RAMBLOCK_PAGE_SIZE_MAX);
        return -EINVAL;
    }
    if (b->map_length == 0 || b->map_length % b->page_size) {
        snprintf(text, CORE_ERROR_TEXT_MAX, "block %s: length %llu is no multiple of its page size %llu", b->idstr,
                 (unsigned long long)b->map_length, (unsigned long long)b->page_size);
        return -EINVAL;
    }
    if (b->used_length == 0 || b->used_length > b->map_length) {
        snprintf(text, CORE_ERROR_TEXT_MAX, "block %s: used length %llu does not fit its length %llu", b->idstr,
                 (unsigned long long)b->used_length, (unsigned long long)b->map_length);
        return -EINVAL;
    }
    return 0;
}

/* Widens the extents to whole pages and merges what then touches. */
static int set_extents(struct ramblock *b, const struct ramblock_extent *data, uint64_t n_data)
{
    b->data = calloc(n_data ? n_data : 1, sizeof(*b->data));
    if (!b->data)
        return -ENOMEM;
    for (uint64_t i = 0; i < n_data; i++) {
        uint64_t start = data[i].start / b->page_size;
        uint64_t end = (data[i].end + b->page_size - 1) / b->page_size;

        if (data[i].start >= data[i].end || end > b->page_count)
            return -EINVAL;
        if (b->n_data && start < b->data[b->n_data - 1].start)
            return -EINVAL;
        if (b->n_data && start <= b->data[b->n_data - 1].end) {
            if (end > b->data[b->n_data - 1].end)
                b->data[b->n_data - 1].end = end;
        } else {
            b->data[b->n_data++] = (struct ramblock_extent){.start = start, .end = end};
        }
    }
    return 0;
}

static void hold_no_holes(struct ramblock *b)
{
    b->data[0] = (struct ramblock_extent){.start = 0, .end = b->page_count};
    b->n_data = 1;
}

static int make_bitmaps(struct ramblock *b)
{
    uint64_t **bitmaps[] = {&b->placing, &b->requested, &b->failed, &b->poisoned, &b->lifted};
    int rc = 0;

    for (size_t i = 0; rc == 0 && i < sizeof(bitmaps) / sizeof(*bitmaps); i++)
        rc = bitmap_new(bitmaps[i], b->page_count);
    if (rc == 0)
        rc = bitmap_new(&b->reserved, ramblock_bitmap_page_of(b->page_count - 1) + 1);
    return rc;
}

static int open_helper_memfd(struct ramblock *b)
{
    char path[64];

    snprintf(path, sizeof(path), "/proc/self/fd/%d", b->memfd);
    b->helper_memfd = open(path, (b->writable ? O_RDWR : O_RDONLY) | O_CLOEXEC);
    return b->helper_memfd < 0 ? -errno : 0;
}

/* In the order that no touch can slip in before the mapping is registered. */
static int map_own(struct ramblock *b)
{
    void *mapped = mmap(NULL, b->map_length, PROT_NONE, MAP_PRIVATE | MAP_NORESERVE, b->helper_memfd, 0);

    if (mapped == MAP_FAILED)
        return -errno;
    b->host_addr = mapped;
    if (madvise(mapped, b->map_length, MADV_DONTDUMP) < 0 || madvise(mapped, b->map_length, MADV_DONTFORK) < 0)
        return -errno;
    (void)madvise(mapped, b->map_length, MADV_NOHUGEPAGE);
    int user_mode_only;
    b->own_uffd = uffd_open(-1, &user_mode_only);
    if (b->own_uffd < 0)
        return b->own_uffd;
    int rc = uffd_api(b->own_uffd, UFFD_FEATURE_BIT_THREAD_ID, NULL, NULL);
    if (rc == 0)
        rc = uffd_register(b->own_uffd, (uint64_t)(uintptr_t)mapped, b->map_length, UFFD_MODE_MISSING, NULL);
    if (rc == 0 && mprotect(mapped, b->map_length, PROT_READ) < 0)
        rc = -errno;
    return rc;
}

/* ---- memory that was filled before ---- */

static int check_memory(const struct ramblock *b, char *text)
{
    struct stat stat;

    if (fstat(b->memfd, &stat) < 0)
        return -errno;
    if ((uint64_t)stat.st_size == b->map_length &&
        (!ramblock_needs_every_page(b) || (uint64_t)stat.st_blksize == b->page_size))
        return 0;
    snprintf(text, CORE_ERROR_TEXT_MAX, "block %s: its memory of %llu bytes is not what was made for it", b->idstr,
             (unsigned long long)stat.st_size);
    return -EINVAL;
}

/* What is present must be received, or it would be read as it is, without a fault. */
static int forget_the_rest(const struct ramblock *b)
{
    uint64_t page = bitmap_next_clear(b->received, 0, b->page_count);

    while (page < b->page_count) {
        uint64_t end = bitmap_next_set(b->received, page, b->page_count);
        if (fallocate(b->memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(page * b->page_size),
                      (off_t)((end - page) * b->page_size)) < 0)
            return -errno;
        page = bitmap_next_clear(b->received, end, b->page_count);
    }
    return 0;
}

/* What is received must be present: nobody would ever place it. Of hugetlb the kernel does not tell. */
static int check_present(const struct ramblock *b, char *text)
{
    uint64_t page = bitmap_next_set(b->received, 0, b->page_count);

    while (page < b->page_count) {
        uint64_t end = bitmap_next_clear(b->received, page, b->page_count);
        off_t hole = lseek(b->memfd, (off_t)(page * b->page_size), SEEK_HOLE);
        if (hole < 0)
            return -errno;
        if ((uint64_t)hole < end * b->page_size) {
            snprintf(text, CORE_ERROR_TEXT_MAX, "block %s: the page at offset %llu is said to be received and is not",
                     b->idstr, (unsigned long long)hole);
            return -EIO;
        }
        page = bitmap_next_set(b->received, end, b->page_count);
    }
    return 0;
}

static int prepare_memory(const struct ramblock *b, char *text)
{
    int rc = check_memory(b, text);

    if (rc == 0)
        rc = forget_the_rest(b);
    return rc < 0 ? rc : check_present(b, text);
}

/* ---- memory that a dead coordinator has served ---- */

/* The first pages of [page, end) that may be present: from *startp on, and where they end. SEEK_DATA is a hint, and
 * enough: what it does not see was planted beside the protocol. Of hugetlb the kernel does not tell. */
static uint64_t next_present(const struct ramblock *b, uint64_t page, uint64_t end, uint64_t *startp)
{
    *startp = page;
    if (ramblock_needs_every_page(b))
        return end;
    off_t data = lseek(b->memfd, (off_t)(page * b->page_size), SEEK_DATA);
    *startp = data < 0 ? end : (uint64_t)data / b->page_size;
    off_t hole = data < 0 ? -1 : lseek(b->memfd, data, SEEK_HOLE);
    return hole < 0 || (uint64_t)hole / b->page_size > end ? end : (uint64_t)hole / b->page_size;
}

/* What it may have placed and not noted any more. */
static int note_recovered(struct ramblock *b)
{
    int rc = bitmap_new(&b->recovered, b->page_count);

    for (uint64_t start, page = 0; rc == 0 && page < b->page_count;) {
        uint64_t end = next_present(b, page, b->page_count, &start);

        for (uint64_t at = bitmap_next_clear(b->received, start, end); at < end;) {
            uint64_t stop = bitmap_next_set(b->received, at, end);
            bitmap_set_range(b->recovered, at, stop);
            at = bitmap_next_clear(b->received, stop, end);
        }
        page = end;
    }
    return rc;
}

/* Poison marks are in the helpers, and who has some is known no more: where there ever were any, each page that comes
 * lifts what may be there. */
static void expect_poison(struct ramblock *b)
{
    b->status->lost_pages = 0; /* they are asked for again */
    if (b->status->was_poisoned)
        bitmap_set_range(b->poisoned, 0, b->page_count);
}

static int fill_holes(struct ramblock *b)
{
    int rc = 0;

    for (uint64_t page = 0; page < b->page_count && rc >= 0; page++)
        if (ramblock_is_hole(b, page))
            rc = ramblock_place_zero(b, page);
    return rc < 0 ? rc : 0;
}

/* Where a block's memory comes from. */
enum origin { ORIGIN_NEW, ORIGIN_DEFERRED, ORIGIN_KEPT };

static int ask_keeper(struct ramblock *b, enum origin origin, struct keeper_answer *answer)
{
    if (origin == ORIGIN_DEFERRED)
        return keeper_listen_block(b->keeper, b->keeper_block, answer, &b->placing_uffd);
    if (origin == ORIGIN_KEPT)
        return keeper_take_block(b->keeper, b->keeper_block, b->idstr, answer, &b->memfd, &b->placing_uffd);
    return keeper_make_block(b->keeper, b->idstr, b->map_length, b->page_size, b->writable, answer, &b->memfd,
                             &b->placing_uffd);
}

static int make_memory(struct ramblock *b, enum origin origin, char *text)
{
    struct keeper_answer answer;
    int rc = ask_keeper(b, origin, &answer);

    if (rc < 0) {
        snprintf(text, CORE_ERROR_TEXT_MAX, "block %s: %.180s", b->idstr, keeper_error_text(b->keeper));
        return rc;
    }
    b->keeper_block = answer.block;
    b->place_addr = answer.place_addr;
    b->can_zeropage = (answer.ioctls >> UFFD_IOCTL_ZEROPAGE) & 1;
    if (!((answer.ioctls >> UFFD_IOCTL_COPY) & 1)) {
        snprintf(text, CORE_ERROR_TEXT_MAX, "block %s: userfaultfd offers no COPY for its kind of memory", b->idstr);
        return -EOPNOTSUPP;
    }
    rc = open_helper_memfd(b);
    if (rc == 0)
        rc = map_own(b);
    if (rc < 0)
        snprintf(text, CORE_ERROR_TEXT_MAX, "block %s: mapping it in the coordinator: %s", b->idstr, strerror(-rc));
    return rc;
}

/* Of new memory the bitmap is all zeros, and for a sparse block too large to read; of a kept block the holes that were
 * touched are counted already, and the rest is recounted: its coordinator may have died between a bit and a count. */
static void count_pages(struct ramblock *b, enum origin origin)
{
    uint64_t received = origin == ORIGIN_DEFERRED ? bitmap_count(b->received, 0, b->page_count) : 0;
    uint64_t data = 0, data_received = 0;

    for (uint64_t i = 0; i < b->n_data; i++) {
        data += b->data[i].end - b->data[i].start;
        if (origin != ORIGIN_NEW)
            data_received += bitmap_count(b->received, b->data[i].start, b->data[i].end);
    }
    b->missing_pages = data - data_received;
    if (origin == ORIGIN_KEPT)
        received = data_received + (b->page_count - data) - b->status->hole_pages;
    else
        b->status->hole_pages = b->page_count - data - (received - data_received);
    b->status->received_pages = received;
    if (origin == ORIGIN_DEFERRED) /* what is here already came without anybody waiting */
        b->status->stream_pages = received;
}

static void describe(struct ramblock *b)
{
    struct status_block *status = b->status;

    memcpy(status->idstr, b->idstr, sizeof(status->idstr));
    status->writable = (uint32_t)b->writable;
    status->used_length = b->used_length;
    status->page_size = b->page_size;
    status->page_count = b->page_count;
    __atomic_store_n(&status->in_use, 1, __ATOMIC_RELEASE);
}

/* What is in the memory already, made to fit the bitmap; before anybody can place a page. */
static int settle_memory(struct ramblock *b, enum origin origin)
{
    if (origin == ORIGIN_DEFERRED && ramblock_needs_every_page(b))
        return fill_holes(b);
    if (origin != ORIGIN_KEPT)
        return 0;
    expect_poison(b);
    return note_recovered(b);
}

/* From the sizes to the memory; b holds what the caller asked for. */
static int make(struct ramblock *b, enum origin origin, const struct ramblock_extent *data, uint64_t n_data, char *text)
{
    int rc = check_sizes(b, text);

    if (rc == 0) {
        b->page_count = b->map_length / b->page_size;
        rc = set_extents(b, data, n_data);
    }
    if (rc == 0 && ramblock_needs_every_page(b) && origin != ORIGIN_DEFERRED)
        hold_no_holes(b);
    if (rc == 0)
        rc = make_bitmaps(b);
    if (rc == 0 && b->writable)
        rc = place_gate_new(&b->gate);
    if (rc == 0 && origin == ORIGIN_DEFERRED)
        rc = prepare_memory(b, text);
    if (rc == 0)
        rc = make_memory(b, origin, text);
    if (rc == 0)
        count_pages(b, origin);
    return rc == 0 ? settle_memory(b, origin) : rc;
}

static enum origin origin_of(const struct ramblock_memory *memory)
{
    if (!memory)
        return ORIGIN_NEW;
    return memory->is_kept ? ORIGIN_KEPT : ORIGIN_DEFERRED;
}

int ramblock_new(struct ramblock **bp, struct keeper *keeper, const struct ramblock_memory *memory, const char *idstr,
                 uint64_t used_length, uint64_t map_length, uint64_t page_size, int writable,
                 const struct ramblock_extent *data, uint64_t n_data, uint32_t index, struct status_block *status,
                 uint64_t *received, char *text)
{
    struct ramblock *b = calloc(1, sizeof(*b));

    *bp = NULL;
    text[0] = '\0';
    if (!b) {
        if (memory && !memory->is_kept)
            give_back(keeper, memory->keeper_block, memory->memfd);
        return -ENOMEM;
    }
    snprintf(b->idstr, sizeof(b->idstr), "%s", idstr);
    b->used_length = used_length;
    b->map_length = map_length;
    b->page_size = page_size;
    b->writable = writable;
    b->index = index;
    b->keeper = keeper;
    b->status = status;
    b->received = received;
    b->memfd = b->helper_memfd = b->placing_uffd = b->own_uffd = -1;
    if (memory) {
        b->keeper_block = memory->keeper_block;
        b->memfd = memory->is_kept ? -1 : memory->memfd;
    }
    int rc = make(b, origin_of(memory), data, n_data, text);
    if (rc < 0) {
        if (!text[0])
            snprintf(text, CORE_ERROR_TEXT_MAX, "block %s: %s", b->idstr, strerror(-rc));
        if (memory && memory->is_kept)
            close_fd(&b->memfd); /* stays the keeper's, for the coordinator after this one */
        ramblock_free(b);
        return rc;
    }
    describe(b);
    *bp = b;
    return 0;
}

void ramblock_free(struct ramblock *b)
{
    if (!b)
        return;
    /* The mapping goes before its uffd: an unregistered mapping of an unfinished block would plant zero pages. */
    if (b->host_addr)
        munmap(b->host_addr, b->map_length);
    close_fd(&b->own_uffd);
    give_back(b->keeper, b->keeper_block, b->memfd);
    close_fd(&b->placing_uffd);
    close_fd(&b->helper_memfd);
    bitmap_free(b->reserved, ramblock_bitmap_page_of(b->page_count - 1) + 1);
    bitmap_free(b->placing, b->page_count);
    bitmap_free(b->requested, b->page_count);
    bitmap_free(b->failed, b->page_count);
    bitmap_free(b->poisoned, b->page_count);
    bitmap_free(b->lifted, b->page_count);
    bitmap_free(b->recovered, b->page_count);
    place_gate_free(b->gate);
    free(b->data);
    free(b);
}

void ramblock_complete(struct ramblock *b)
{
    (void)uffd_unregister(b->own_uffd, (uint64_t)(uintptr_t)b->host_addr, b->map_length);
    (void)madvise(b->host_addr, b->map_length, MADV_HUGEPAGE);
    (void)keeper_complete_block(b->keeper, b->keeper_block);
}
