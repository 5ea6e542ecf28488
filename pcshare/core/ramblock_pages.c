/* ramblock_pages: which pages are here, missing, asked for; see ramblock.h. */
#define _GNU_SOURCE
#include "ramblock_internal.h"

#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#include "bitmap.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14; older headers lack it */
#endif

int ramblock_needs_every_page(const struct ramblock *b)
{
    return b->page_size > (uint64_t)getpagesize();
}

uint64_t ramblock_bitmap_page_of(uint64_t page)
{
    return page / ((uint64_t)getpagesize() * 8);
}

/* Linux before 5.14 does not know the question (EINVAL). */
int ramblock_reserve_bits(const struct ramblock *b, uint64_t page, uint64_t end)
{
    size_t host_page = (size_t)getpagesize();

    for (uint64_t at = ramblock_bitmap_page_of(page); at <= ramblock_bitmap_page_of(end - 1); at++) {
        if (bitmap_test(b->reserved, at))
            continue;
        if (madvise((uint8_t *)b->received + at * host_page, host_page, MADV_POPULATE_WRITE) < 0 && errno != EINVAL)
            return errno == EFAULT ? -ENOSPC : -errno;
        bitmap_test_and_set(b->reserved, at);
    }
    return 0;
}

/* Where there is no room for its bit it is not. */
int ramblock_is_received(const struct ramblock *b, uint64_t page)
{
    return ramblock_reserve_bits(b, page, page + 1) == 0 && bitmap_test(b->received, page);
}

uint64_t ramblock_extent_after(const struct ramblock *b, uint64_t page)
{
    uint64_t low = 0, high = b->n_data;

    while (low < high) {
        uint64_t middle = low + (high - low) / 2;
        if (b->data[middle].end > page)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

int ramblock_is_hole(const struct ramblock *b, uint64_t page)
{
    uint64_t i = ramblock_extent_after(b, page);

    return i == b->n_data || page < b->data[i].start;
}

uint64_t ramblock_next_missing(const struct ramblock *b, uint64_t start, uint64_t end)
{
    for (uint64_t i = ramblock_extent_after(b, start); i < b->n_data && b->data[i].start < end; i++) {
        uint64_t from = b->data[i].start > start ? b->data[i].start : start;
        uint64_t to = b->data[i].end < end ? b->data[i].end : end;
        uint64_t page = bitmap_next_clear(b->received, from, to);
        if (page < to)
            return page;
    }
    return end;
}

uint64_t ramblock_claim_missing(struct ramblock *b, uint64_t start, uint64_t end, uint64_t max, uint64_t *firstp)
{
    uint64_t page = start, n = 0;

    for (;;) {
        uint64_t missing = ramblock_next_missing(b, page, end);
        if (missing >= end)
            return 0;
        page = bitmap_next_clear(b->requested, missing, end);
        if (page == missing && !bitmap_test_and_set(b->requested, page))
            break;
        if (page == missing)
            page++;
    }
    uint64_t extent_end = b->data[ramblock_extent_after(b, page)].end;
    *firstp = page;
    for (n = 1; n < max && page + n < end && page + n < extent_end; n++)
        if (bitmap_test(b->received, page + n) || bitmap_test_and_set(b->requested, page + n))
            break;
    return n;
}

static int claim_one(struct ramblock *b, uint64_t page)
{
    return ramblock_next_missing(b, page, page + 1) == page && !bitmap_test_and_set(b->requested, page);
}

uint64_t ramblock_claim_around(struct ramblock *b, uint64_t page, uint64_t start, uint64_t end, uint64_t *firstp)
{
    uint64_t first = page, last = page + 1;

    *firstp = page;
    if (bitmap_test_and_set(b->requested, page))
        return 0;
    while (first > start && claim_one(b, first - 1))
        first--;
    while (last < end && claim_one(b, last))
        last++;
    *firstp = first;
    return last - first;
}
