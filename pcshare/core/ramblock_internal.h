/* ramblock_internal: what the files of a block share. Private to the core.
 *
 * Files: ramblock.c (its life: memory, mappings, bitmaps), ramblock_pages.c (which pages are here, missing, asked for),
 * ramblock_place.c (how pages get in, and are removed).
 */
#ifndef PCSHARE_RAMBLOCK_INTERNAL_H
#define PCSHARE_RAMBLOCK_INTERNAL_H

#include "ramblock.h"

static inline void count(uint64_t *counter, uint64_t n)
{
    __atomic_fetch_add(counter, n, __ATOMIC_RELAXED);
}

static inline void discount(uint64_t *counter, uint64_t n)
{
    __atomic_fetch_sub(counter, n, __ATOMIC_ACQ_REL);
}

/* The keeper's mapping holds every huge page of such a block, so a hole left open would find none in a private mapping.
 */
int ramblock_needs_every_page(const struct ramblock *b);
/* Which page of the received bitmap holds the bit of a page. */
uint64_t ramblock_bitmap_page_of(uint64_t page);
/* Of a sparse block the received bitmap has memory only where it is needed. With /dev/shm full a look at such a hole or
 * a write would be SIGBUS; this says so instead: -ENOSPC. */
int ramblock_reserve_bits(const struct ramblock *b, uint64_t page, uint64_t end);
/* The index of the first extent that ends after the page; n_data if there is none. */
uint64_t ramblock_extent_after(const struct ramblock *b, uint64_t page);

#endif
