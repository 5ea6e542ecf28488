/* incoming: its life, and its blocks before LISTEN; see incoming.h. */
#define _GNU_SOURCE
#include "incoming_internal.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bitmap.h"

/* ---- life ---- */

static int is_power_of_two(uint64_t value)
{
    return value && !(value & (value - 1));
}

int incoming_new(struct incoming **ip, uint32_t target_page_size)
{
    uint64_t host_page = (uint64_t)getpagesize();
    struct incoming *in;

    *ip = NULL;
    if (!is_power_of_two(target_page_size) || target_page_size < INCOMING_TARGET_PAGE_MIN ||
        target_page_size > host_page)
        return -EINVAL;
    in = calloc(1, sizeof(*in));
    if (!in)
        return -ENOMEM;
    in->n_owners = 1;
    in->target_page_size = target_page_size;
    in->host_page_size = host_page;
    for (int i = 0; i < 2; i++) {
        in->unsent[i].next = in->unsent[i].prev = &in->unsent[i];
        in->sent[i].next = in->sent[i].prev = &in->sent[i];
    }
    pthread_mutex_init(&in->lock, NULL);
    pthread_cond_init(&in->changed, NULL);
    in->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (in->epoll_fd < 0) {
        int rc = -errno;
        incoming_put(in);
        return rc;
    }
    *ip = in;
    return 0;
}

struct incoming *incoming_get(struct incoming *in)
{
    __atomic_add_fetch(&in->n_owners, 1, __ATOMIC_RELAXED);
    return in;
}

static void unmap(struct incoming_block *block)
{
    if (block->memory)
        munmap(block->memory, block->used_length);
    if (block->memfd >= 0)
        close(block->memfd);
    bitmap_free(block->present, block->page_count);
    block->memory = NULL;
    block->memfd = -1;
    block->present = NULL;
}

static void free_block(struct incoming_block *block)
{
    unmap(block);
    bitmap_free(block->received, block->page_count * block->target_per_page);
    free(block);
}

void incoming_put(struct incoming *in)
{
    if (__atomic_sub_fetch(&in->n_owners, 1, __ATOMIC_ACQ_REL))
        return;
    for (uint32_t i = 0; i < in->n_blocks; i++)
        free_block(in->blocks[i]);
    path_free(in);
    if (in->epoll_fd >= 0)
        close(in->epoll_fd);
    pthread_cond_destroy(&in->changed);
    pthread_mutex_destroy(&in->lock);
    free(in);
}

void incoming_free(struct incoming *in)
{
    if (!in)
        return;
    incoming_set_return_path(in, NULL);
    incoming_put(in);
}

/* ---- blocks ---- */

struct incoming_block *incoming_find_block(struct incoming *in, const void *idstr, uint32_t length)
{
    uint32_t n_blocks = __atomic_load_n(&in->n_blocks, __ATOMIC_ACQUIRE);

    for (uint32_t i = 0; i < n_blocks; i++) {
        struct incoming_block *block = in->blocks[i];
        if (block->idstr_length == length && memcmp(block->idstr, idstr, length) == 0)
            return block;
    }
    return NULL;
}

struct incoming_block *incoming_block_at(struct incoming *in, uint32_t index)
{
    return index < __atomic_load_n(&in->n_blocks, __ATOMIC_ACQUIRE) ? in->blocks[index] : NULL;
}

static int map_memory(struct incoming_block *block, int memfd)
{
    struct stat memory;

    block->memfd = fcntl(memfd, F_DUPFD_CLOEXEC, 0);
    if (block->memfd < 0 || fstat(block->memfd, &memory) < 0)
        return -errno;
    if ((uint64_t)memory.st_size < block->used_length)
        return -EINVAL;
    void *mapped = mmap(NULL, block->used_length, PROT_READ | PROT_WRITE, MAP_SHARED, block->memfd, 0);
    if (mapped == MAP_FAILED)
        return -errno;
    block->memory = mapped;
    if (madvise(mapped, block->used_length, MADV_DONTDUMP) < 0 ||
        madvise(mapped, block->used_length, MADV_DONTFORK) < 0)
        return -errno;
    (void)madvise(mapped, block->used_length, MADV_NOHUGEPAGE); /* refused where there is none */
    return 0;
}

static int make_block(struct incoming_block *block, int memfd)
{
    int rc = bitmap_new(&block->received, block->page_count * block->target_per_page);

    if (rc == 0)
        rc = bitmap_new(&block->present, block->page_count);
    return rc < 0 ? rc : map_memory(block, memfd);
}

static int check_block(struct incoming *in, const char *idstr, uint64_t used_length, uint64_t page_size)
{
    size_t length = strlen(idstr);

    if (length > INCOMING_IDSTR_MAX)
        return -ENAMETOOLONG;
    if (length == 0 || !is_power_of_two(page_size) || page_size < in->target_page_size ||
        page_size > RAMBLOCK_PAGE_SIZE_MAX || used_length == 0 || used_length > INT64_MAX || used_length % page_size)
        return -EINVAL;
    if (incoming_find_block(in, idstr, (uint32_t)length))
        return -EEXIST;
    return in->n_blocks == INCOMING_BLOCKS_MAX ? -ENOSPC : 0;
}

static int new_block(struct incoming_block **blockp, struct incoming *in, const char *idstr, uint64_t used_length,
                     uint64_t page_size)
{
    int rc = check_block(in, idstr, used_length, page_size);

    if (rc < 0)
        return rc;
    struct incoming_block *block = calloc(1, sizeof(*block));
    if (!block)
        return -ENOMEM;
    block->in = in;
    block->idstr_length = (uint32_t)strlen(idstr);
    memcpy(block->idstr, idstr, block->idstr_length);
    block->index = in->n_blocks;
    block->used_length = used_length;
    block->page_size = page_size;
    block->page_count = used_length / page_size;
    block->target_per_page = page_size / in->target_page_size;
    block->memfd = -1;
    *blockp = block;
    return 0;
}

static void insert_block(struct incoming *in, struct incoming_block *block, uint32_t *indexp)
{
    pthread_mutex_lock(&in->lock);
    in->bitmaps_length += path_bitmap_length(block);
    pthread_mutex_unlock(&in->lock);
    in->blocks[block->index] = block;
    *indexp = block->index;
    __atomic_store_n(&in->n_blocks, block->index + 1, __ATOMIC_RELEASE);
}

int incoming_add_block(struct incoming *in, const char *idstr, uint64_t used_length, uint64_t page_size, int memfd,
                       uint32_t *indexp)
{
    struct incoming_block *block;
    int rc = new_block(&block, in, idstr, used_length, page_size);

    if (rc < 0)
        return rc;
    rc = make_block(block, memfd);
    if (rc < 0) {
        free_block(block);
        return rc;
    }
    insert_block(in, block, indexp);
    return 0;
}

/* Holes came too. */
static void note_holes(struct incoming_block *block, const struct ramblock_extent *extents, uint64_t n_extents)
{
    uint64_t page = 0;

    for (uint64_t i = 0; i < n_extents; i++) {
        incoming_note_received(block, page, extents[i].start / block->page_size - page);
        page = extents[i].end / block->page_size;
    }
    incoming_note_received(block, page, block->page_count - page);
}

int incoming_take_block(struct incoming *in, const char *idstr, uint64_t used_length, uint64_t page_size,
                        const uint64_t *received, const struct ramblock_extent *extents, uint64_t n_extents,
                        uint32_t *indexp)
{
    struct incoming_block *block;
    int rc = new_block(&block, in, idstr, used_length, page_size);

    if (rc < 0)
        return rc;
    rc = bitmap_new(&block->received, block->page_count * block->target_per_page);
    if (rc < 0) {
        free_block(block);
        return rc;
    }
    note_holes(block, extents, n_extents);
    for (uint64_t page = 0; page < block->page_count; page++)
        if (bitmap_test(received, page))
            incoming_note_received(block, page, 1);
    block->state = BLOCK_UNMAPPED;
    insert_block(in, block, indexp);
    return 0;
}

int incoming_progress(struct incoming *in, uint32_t index, struct incoming_progress *progress)
{
    const struct incoming_block *block = incoming_block_at(in, index);

    if (!block)
        return -ENOENT;
    progress->target_pages = block->page_count * block->target_per_page;
    progress->received_pages = __atomic_load_n(&block->received_pages, __ATOMIC_RELAXED);
    return 0;
}

/* ---- storing: with the lock held ---- */

static void note_target_page(struct incoming_block *block, uint64_t target_page)
{
    if (!bitmap_test_and_set(block->received, target_page))
        __atomic_fetch_add(&block->received_pages, 1, __ATOMIC_RELAXED);
}

void incoming_note_received(struct incoming_block *block, uint64_t page, uint64_t n_pages)
{
    uint64_t end = (page + n_pages) * block->target_per_page;

    for (uint64_t target_page = page * block->target_per_page; target_page < end; target_page++)
        note_target_page(block, target_page);
}

static int punch(const struct incoming_block *block, uint64_t start, uint64_t length)
{
    int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;

    return fallocate(block->memfd, mode, (off_t)start, (off_t)length) < 0 ? -errno : 0;
}

/* A huge page is asked for before it is touched: where there is none left, that is an error and no SIGBUS. */
static int make_present(struct incoming_block *block, uint64_t page)
{
    if (bitmap_test(block->present, page))
        return 0;
    if (block->page_size > block->in->host_page_size &&
        fallocate(block->memfd, 0, (off_t)bytes_in_pages(block, page), (off_t)block->page_size) < 0)
        return errno == ENOSPC ? -ENOMEM : -errno;
    bitmap_test_and_set(block->present, page);
    return 0;
}

/* A page that came before and is zero now needs no memory. */
static void store_zero(struct incoming_block *block, uint64_t target_page)
{
    uint64_t size = block->in->target_page_size, page = target_page / block->target_per_page;

    if (!bitmap_test(block->present, page))
        return;
    if (block->target_per_page == 1 && punch(block, bytes_in_pages(block, page), block->page_size) == 0)
        bitmap_test_and_clear(block->present, page);
    else
        memset(block->memory + target_page * size, 0, size);
}

static int store(struct incoming_block *block, uint64_t target_page, const void *bytes, uint8_t fill)
{
    uint64_t size = block->in->target_page_size;
    uint8_t *at = block->memory + target_page * size;

    if (!bytes && !fill) {
        store_zero(block, target_page);
    } else {
        int rc = make_present(block, target_page / block->target_per_page);
        if (rc < 0)
            return rc;
        if (bytes)
            memcpy(at, bytes, size);
        else
            memset(at, fill, size);
    }
    note_target_page(block, target_page);
    return 0;
}

int incoming_store(struct incoming_block *block, uint64_t target_page, const void *bytes, uint8_t fill)
{
    struct incoming *in = block->in;
    int rc = 1;

    if (__atomic_load_n(&block->state, __ATOMIC_ACQUIRE) != BLOCK_STORES)
        return rc;
    pthread_mutex_lock(&in->lock);
    if (block->state == BLOCK_STORES)
        rc = store(block, target_page, bytes, fill);
    pthread_mutex_unlock(&in->lock);
    return rc;
}

/* ---- discard ---- */

static int discard(struct incoming_block *block, uint64_t start, uint64_t length)
{
    uint64_t size = block->in->target_page_size;

    if (block->state != BLOCK_STORES)
        return -EBUSY;
    int rc = punch(block, start, length);
    if (rc < 0)
        return rc;
    uint64_t forgotten = bitmap_count(block->received, start / size, (start + length) / size);
    bitmap_clear_range(block->received, start / size, (start + length) / size);
    bitmap_clear_range(block->present, start / block->page_size, (start + length) / block->page_size);
    __atomic_fetch_sub(&block->received_pages, forgotten, __ATOMIC_RELAXED);
    return 0;
}

int incoming_discard(struct incoming *in, const char *idstr, uint64_t start, uint64_t length)
{
    struct incoming_block *block = incoming_find_block(in, idstr, (uint32_t)strlen(idstr));

    if (!block)
        return -ENOENT;
    if (start > block->used_length || length > block->used_length - start)
        return -ERANGE;
    if (length == 0 || start % block->page_size || length % block->page_size)
        return -EINVAL;
    pthread_mutex_lock(&in->lock);
    int rc = discard(block, start, length);
    pthread_mutex_unlock(&in->lock);
    return rc;
}

/* ---- LISTEN ---- */

static int is_whole(const struct incoming_block *block, uint64_t page)
{
    uint64_t start = page * block->target_per_page, end = start + block->target_per_page;

    return bitmap_next_clear(block->received, start, end) == end;
}

/* What of it came is forgotten: the rest will never be told apart from it. */
static int drop_half_page(struct incoming_block *block, uint64_t page)
{
    uint64_t start = page * block->target_per_page, end = start + block->target_per_page;

    if (bitmap_next_set(block->received, start, end) == end)
        return 0;
    return discard(block, bytes_in_pages(block, page), block->page_size);
}

/* Where each target page is a host page, a word at a time: somebody may be waiting for LISTEN. */
static int sort_words(const struct incoming_block *block, uint64_t *in_memory, uint64_t *holes)
{
    for (uint64_t i = 0; i < bitmap_bytes(block->page_count) / sizeof(*holes); i++) {
        __atomic_store_n(&in_memory[i], block->received[i] & block->present[i], __ATOMIC_RELEASE);
        holes[i] = block->received[i] & ~block->present[i];
    }
    return 0;
}

/* Sorts host pages into those in memory, holes, and missing ones, which are neither. */
static int sort_pages(struct incoming_block *block, uint64_t *in_memory, uint64_t *holes)
{
    int rc = 0;

    for (uint64_t page = 0; page < block->page_count && rc == 0; page++) {
        if (!is_whole(block, page))
            rc = drop_half_page(block, page);
        else if (bitmap_test(block->present, page))
            bitmap_test_and_set(in_memory, page);
        else
            bitmap_test_and_set(holes, page);
    }
    return rc;
}

static uint64_t count_extents(const struct incoming_block *block, const uint64_t *holes)
{
    uint64_t count = 0;

    for (uint64_t page = 0; page < block->page_count; page = bitmap_next_set(holes, page, block->page_count)) {
        page = bitmap_next_clear(holes, page, block->page_count);
        count += page < block->page_count;
    }
    return count;
}

static int make_extents(const struct incoming_block *block, const uint64_t *holes, struct ramblock_extent **extentsp,
                        uint64_t *n_extentsp)
{
    uint64_t n = 0, page = 0;
    struct ramblock_extent *extents = calloc(count_extents(block, holes) + 1, sizeof(*extents));

    if (!extents)
        return -ENOMEM;
    while ((page = bitmap_next_clear(holes, page, block->page_count)) < block->page_count) {
        uint64_t end = bitmap_next_set(holes, page, block->page_count);

        extents[n++] =
            (struct ramblock_extent){.start = bytes_in_pages(block, page), .end = bytes_in_pages(block, end)};
        page = end;
    }
    *extentsp = extents;
    *n_extentsp = n;
    return 0;
}

static int take_stock(struct incoming_block *block, uint64_t *in_memory, struct ramblock_extent **extentsp,
                      uint64_t *n_extentsp)
{
    uint64_t *holes;
    int rc = bitmap_new(&holes, block->page_count);

    if (rc < 0)
        return rc;
    rc = block->target_per_page == 1 ? sort_words(block, in_memory, holes) : sort_pages(block, in_memory, holes);
    if (rc == 0)
        rc = make_extents(block, holes, extentsp, n_extentsp);
    bitmap_free(holes, block->page_count);
    return rc;
}

int incoming_unmap_block(struct incoming *in, uint32_t index, uint64_t *received, struct ramblock_extent **extentsp,
                         uint64_t *n_extentsp)
{
    struct incoming_block *block = incoming_block_at(in, index);

    *extentsp = NULL;
    *n_extentsp = 0;
    if (!block)
        return -ENOENT;
    pthread_mutex_lock(&in->lock);
    int rc = block->state == BLOCK_STORES ? take_stock(block, received, extentsp, n_extentsp) : -EBUSY;
    if (rc == 0) {
        unmap(block);
        __atomic_store_n(&block->state, BLOCK_UNMAPPED, __ATOMIC_RELEASE);
    }
    pthread_mutex_unlock(&in->lock);
    return rc;
}

void incoming_free_extents(struct ramblock_extent *extents)
{
    free(extents);
}

int incoming_listen_block(struct incoming *in, uint32_t index, struct fault_threads *ft, uint32_t block_index)
{
    struct incoming_block *block = incoming_block_at(in, index);
    int rc = -EINVAL;

    if (!block)
        return -ENOENT;
    pthread_mutex_lock(&in->lock);
    if (block->state == BLOCK_UNMAPPED && block->has_channel) {
        block->ft = ft;
        block->block_index = block_index;
        __atomic_store_n(&block->state, BLOCK_PLACES, __ATOMIC_RELEASE);
        pthread_cond_broadcast(&in->changed);
        rc = 0;
    }
    pthread_mutex_unlock(&in->lock);
    return rc;
}
