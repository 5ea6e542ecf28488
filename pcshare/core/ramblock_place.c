/* ramblock_place: how pages get in, and are removed; see ramblock.h. */
#define _GNU_SOURCE
#include "ramblock_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>

#include "bitmap.h"
#include "memory_room.h"
#include "place_gate.h"
#include "trace.h"
#include "uffd.h"

enum { PLACE_TRIES_MAX = 1000 }; /* EAGAIN in a row: the keeper's address space moves only while it makes a block */

static _Alignas(4096) uint8_t zero_page[RAMBLOCK_PAGE_SIZE_MAX]; /* never written; not const, so that it lies in .bss */

static void set_received(struct ramblock *b, uint64_t page)
{
    if (bitmap_test_and_set(b->received, page))
        return;
    count(&b->status->received_pages, 1);
    if (ramblock_is_hole(b, page))
        discount(&b->status->hole_pages, 1);
    else
        discount(&b->missing_pages, 1);
}

/* Memory first, then the bit, then the right to place is given up. */
static void finish_pages(struct ramblock *b, uint64_t page, uint64_t n)
{
    for (uint64_t i = page; i < page + n; i++) {
        set_received(b, i);
        bitmap_test_and_clear(b->placing, i);
    }
}

/* How many pages from here on are ours to place now: not received, and nobody else at them. */
static uint64_t acquire_run(struct ramblock *b, uint64_t page, uint64_t end)
{
    uint64_t n = 0;

    for (; page + n < end; n++) {
        if (bitmap_test(b->received, page + n) || bitmap_test_and_set(b->placing, page + n))
            break;
        if (bitmap_test(b->received, page + n)) {
            bitmap_test_and_clear(b->placing, page + n);
            break;
        }
    }
    return n;
}

/* Present, not received, and only we may place it: somebody planted it, unless a coordinator died over it, or the block
 * is complete: who knows that already is registered no more, and its touch of a hole makes the page. */
static int is_foreign(struct ramblock *b, uint64_t page)
{
    if (b->recovered && bitmap_test_and_clear(b->recovered, page))
        return 0;
    return __atomic_load_n(&b->missing_pages, __ATOMIC_ACQUIRE) > 0 || !ramblock_is_hole(b, page);
}

/* In a writable block it may be a write: it stays. */
static int meet_present_page(struct ramblock *b, uint64_t page, const void *bytes)
{
    if (is_foreign(b, page)) {
        count(&b->foreign_pages, 1);
        count(&b->status->foreign_pages, 1);
        __atomic_store_n(&b->foreign_offset, page * b->page_size, __ATOMIC_RELAXED);
        trace_point(TRACE_FOREIGN, b->index, 0, page, 0);
    }
    return b->writable ? 0 : keeper_repair(b->keeper, b->keeper_block, page * b->page_size, bytes, b->page_size);
}

static int copy_in(struct ramblock *b, uint64_t page, uint64_t n, const uint8_t *bytes, uint64_t *donep)
{
    return uffd_copy(b->placing_uffd, b->place_addr + page * b->page_size, bytes, n * b->page_size, donep);
}

/* Of a complete block the keeper's mapping is registered no more, and nobody may be told to wait for what it has not: a
 * hole, or a page that a helper removed. Made as anybody's touch would make it. */
static int make_zero_page(const struct ramblock *b, uint64_t page, uint64_t *donep)
{
    if (fallocate(b->memfd, FALLOC_FL_KEEP_SIZE, (off_t)(page * b->page_size), (off_t)b->page_size) < 0)
        return -errno;
    *donep = b->page_size;
    return 0;
}

static int zero_in(struct ramblock *b, uint64_t page, uint64_t n, uint64_t *donep)
{
    uint64_t addr = b->place_addr + page * b->page_size;
    int rc = b->can_zeropage ? uffd_zeropage(b->placing_uffd, addr, n * b->page_size, donep)
                             : copy_in(b, page, 1, zero_page, donep);

    if (rc == -ENOENT && __atomic_load_n(&b->missing_pages, __ATOMIC_ACQUIRE) == 0)
        rc = make_zero_page(b, page, donep);
    return rc;
}

/* Places pages that we hold the placing bits of; gives the bits up whatever happens. bytes NULL: zeros. */
static int place_run(struct ramblock *b, uint64_t page, uint64_t n, const uint8_t *bytes, uint64_t *placed_pagesp)
{
    uint64_t placed = 0;
    int tries = 0;

    while (placed < n) {
        uint64_t done = 0, at = page + placed;
        int rc = bytes ? copy_in(b, at, n - placed, bytes + placed * b->page_size, &done)
                       : zero_in(b, at, n - placed, &done);

        if (done)
            trace_point(TRACE_PLACED, b->index, 0, at, done / b->page_size);
        finish_pages(b, at, done / b->page_size);
        placed += done / b->page_size;
        *placed_pagesp += done / b->page_size;
        tries = done ? 0 : tries + 1;
        if (rc == -EEXIST) {
            trace_point(TRACE_PLACE_PRESENT, b->index, 0, page + placed, 0);
            rc = meet_present_page(b, page + placed, bytes ? bytes + placed * b->page_size : zero_page);
            if (rc == 0)
                finish_pages(b, page + placed++, 1);
        } else if (rc == -EAGAIN && tries < PLACE_TRIES_MAX) {
            if (!done)
                sched_yield();
            continue;
        }
        if (rc < 0) {
            bitmap_clear_range(b->placing, page + placed, page + n);
            return rc;
        }
    }
    return 0;
}

/* bytes NULL: zeros. */
static int place_between(struct ramblock *b, uint64_t page, uint64_t end, const uint8_t *bytes, uint64_t *placed_pagesp)
{
    uint64_t at = page;
    int rc;

    while (at < end) {
        uint64_t run = acquire_run(b, at, end);
        if (run == 0) {
            at++;
            continue;
        }
        rc = place_run(b, at, run, bytes ? bytes + (at - page) * b->page_size : NULL, placed_pagesp);
        if (rc < 0)
            return rc;
        at += run;
    }
    return 0;
}

/* Inside the gate from the look at the received bits to the end of the COPY: what is removed meanwhile is not placed.
 */
static int place_gated(struct ramblock *b, uint64_t page, uint64_t end, const uint8_t *bytes, uint64_t *placed_pagesp)
{
    uint64_t most = b->page_size < PLACE_GATE_BYTES ? PLACE_GATE_BYTES / b->page_size : 1;
    int rc = 0;

    for (uint64_t at = page; at < end && rc == 0; at += most) {
        place_gate_enter(b->gate);
        rc = place_between(b, at, at + most < end ? at + most : end, bytes ? bytes + (at - page) * b->page_size : NULL,
                           placed_pagesp);
        place_gate_leave(b->gate);
    }
    return rc;
}

/* Before anybody is kept waiting for these pages: their bits, and where there is a limit their memory, have room. */
static int make_room(struct ramblock *b, uint64_t page, uint64_t n_pages)
{
    int rc = n_pages ? ramblock_reserve_bits(b, page, page + n_pages) : 0;

    if (rc == 0 && !ramblock_needs_every_page(b)) /* huge pages were set aside when the block was made */
        rc = memory_room_take(n_pages * b->page_size);
    return rc;
}

static int place_pages(struct ramblock *b, uint64_t page, uint64_t n_pages, const uint8_t *bytes,
                       uint64_t *placed_pagesp)
{
    *placed_pagesp = 0;
    int rc = make_room(b, page, n_pages);
    if (rc == 0)
        rc = b->gate ? place_gated(b, page, page + n_pages, bytes, placed_pagesp)
                     : place_between(b, page, page + n_pages, bytes, placed_pagesp);
    return rc < 0 ? rc : *placed_pagesp ? RAMBLOCK_PLACED : RAMBLOCK_PRESENT;
}

int ramblock_place(struct ramblock *b, uint64_t page, uint64_t n_pages, const void *bytes, uint64_t *placed_pagesp)
{
    int rc = place_pages(b, page, n_pages, bytes, placed_pagesp);

    if (rc >= 0)
        trace_point(TRACE_PLACE, b->index, 0, page, *placed_pagesp);
    return rc;
}

int ramblock_place_zeros(struct ramblock *b, uint64_t page, uint64_t n_pages, uint64_t *placed_pagesp)
{
    int rc = place_pages(b, page, n_pages, NULL, placed_pagesp);

    count(&b->status->zero_pages, *placed_pagesp);
    trace_point(TRACE_PLACE_ZERO, b->index, 0, page, *placed_pagesp);
    return rc;
}

int ramblock_place_zero(struct ramblock *b, uint64_t page)
{
    uint64_t placed;

    return ramblock_place_zeros(b, page, 1, &placed);
}

int ramblock_revive(struct ramblock *b, uint64_t page)
{
    uint64_t done;
    int rc = zero_in(b, page, 1, &done);

    if (rc == -EEXIST)
        return RAMBLOCK_PRESENT;
    if (rc == 0)
        count(&b->status->zero_pages, 1);
    return rc;
}

/* Whole runs at a time: a helper may remove terabytes at once, and placers wait meanwhile. */
uint64_t ramblock_remove(struct ramblock *b, uint64_t start_page, uint64_t end_page)
{
    uint64_t removed = 0, page = ramblock_next_missing(b, start_page, end_page);

    while (page < end_page) {
        uint64_t extent_end = b->data[ramblock_extent_after(b, page)].end;
        uint64_t end = bitmap_next_set(b->received, page, extent_end < end_page ? extent_end : end_page);
        bitmap_set_range(b->received, page, end);
        removed += end - page;
        page = ramblock_next_missing(b, end, end_page);
    }
    count(&b->status->received_pages, removed);
    count(&b->status->removed_pages, removed);
    discount(&b->missing_pages, removed);
    trace_point(TRACE_REMOVE, b->index, 0, start_page, end_page - start_page);
    return removed;
}

int ramblock_discard(struct ramblock *b, uint64_t start_page, uint64_t n_pages)
{
    if (start_page > b->page_count || n_pages > b->page_count - start_page)
        return -EINVAL;
    if (fallocate(b->memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(start_page * b->page_size),
                  (off_t)(n_pages * b->page_size)) < 0)
        return -errno;
    for (uint64_t page = bitmap_next_set(b->received, start_page, start_page + n_pages); page < start_page + n_pages;
         page = bitmap_next_set(b->received, page + 1, start_page + n_pages)) {
        bitmap_test_and_clear(b->received, page);
        discount(&b->status->received_pages, 1);
        count(ramblock_is_hole(b, page) ? &b->status->hole_pages : &b->missing_pages, 1);
    }
    trace_point(TRACE_BLOCK_DISCARD, b->index, 0, start_page, n_pages);
    return 0;
}
