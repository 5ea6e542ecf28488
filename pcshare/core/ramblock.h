/* ramblock: one RAM block in the coordinator: its memory, its received bitmap, and the one way pages get into it.
 *
 * Places pages whole and atomically through the placing uffd, exactly once each, and sets received bits afterwards: the
 * bitmap never runs ahead of the memory. Wakes nobody, asks no source. Some facts that shaped it:
 *  - COPY never overwrites; EEXIST means the page is present. If it is not received and we hold its placing bit, nobody
 * who follows the protocol put it there: a foreign page;
 *  - a page that is received yet faults in a writable block was removed by a helper and comes back as zeros;
 *  - a coordinator that is killed may leave pages that are placed and not yet received: no foreign pages, if the block
 * is taken over, though in a read-only one the source's bytes are stored over them once more;
 *  - who knows that a block is complete is registered no more, and touching a hole makes its page: not foreign;
 *  - one that is removed before it was received counts as received from then on, and is never placed (place_gate.h);
 *  - hugetlb offers no ZEROPAGE: one shared zero page of the largest size is copied instead.
 */
#ifndef PCSHARE_RAMBLOCK_H
#define PCSHARE_RAMBLOCK_H

#include <stdint.h>
#include "keeper.h"
#include "status_segment.h"

enum {
    RAMBLOCK_PAGE_SIZE_MAX = 2 << 20,
};

/* Bytes that the source holds; what lies between the extents are holes, which read as zeros. Sorted, not touching. */
struct ramblock_extent {
    uint64_t start;
    uint64_t end;
};

/* Memory that is there before the block is made. */
struct ramblock_memory {
    uint32_t keeper_block;
    int memfd;   /* of a deferred block; -1: the keeper has it */
    int is_kept; /* 0: a deferred block, filled before anybody else had it; 1: one that a dead coordinator has served */
};

struct place_gate;

struct ramblock {
    char idstr[64];
    uint64_t used_length;
    uint64_t map_length;
    uint64_t page_size;
    uint64_t page_count;
    uint32_t index; /* in the status segment */
    int writable;
    int can_zeropage;
    int memfd;        /* read-write: never leaves the coordinator if the block is read-only */
    int helper_memfd; /* what helpers get: O_RDONLY unless writable */
    int placing_uffd;
    int own_uffd;
    uint8_t *host_addr;  /* the coordinator's own mapping: private, read-only, registered with own_uffd */
    uint64_t place_addr; /* in the keeper */
    uint32_t keeper_block;
    struct keeper *keeper;
    struct place_gate *gate; /* of a writable block: placing and reading its helpers' events keep apart. Else NULL */
    uint64_t *received;      /* in the status segment */
    uint64_t *reserved;      /* which pages of the received bitmap have memory: a bit each */
    uint64_t *placing;       /* who holds a page's bit may place it */
    uint64_t *requested;     /* the stream asked for it and has no answer yet, or it is lost: not to be asked for */
    uint64_t *failed;        /* the source lost it: a touch is poisoned, or waits */
    uint64_t *poisoned;      /* some helper has a poison mark there, to be lifted when the page arrives after all */
    uint64_t *lifted;        /* that was done; a child of fork may come later with a mark that it inherited */
    uint64_t n_lifted;
    uint64_t *recovered; /* of a block taken over: may be present although nobody has noted it. NULL: of no page */
    struct ramblock_extent *data; /* page-aligned, in pages */
    uint64_t n_data;
    uint64_t missing_pages;  /* data pages not received: 0 is complete */
    uint64_t foreign_pages;  /* found so far */
    uint64_t foreign_offset; /* of the last one, bytes */
    struct status_block *status;
};

enum {
    RAMBLOCK_PLACED = 0,
    RAMBLOCK_PRESENT = 1, /* nothing to place: received already, or another thread is at it and will wake */
};

/* Makes the block: keeper's mapping, own mapping, bitmaps. received lies in the status segment and holds zeros; status
 * is filled in. data may be NULL (all holes); it is copied, in bytes, and widened to whole pages. -EINVAL: a length
 * that is no multiple of the page size, or sizes that do not fit; the text says which.
 *
 * memory NULL: new and empty. Else the keeper's deferred block, which belongs to this one from here on, also on
 * failure, as its memfd does; received then tells which pages are in it. Whatever else it holds is forgotten before it
 * is sealed; a page that is said to be received and is not there: -EIO. Holes of huge pages are filled.
 * A kept block stays the keeper's until it is freed here, also where this fails; received and the counters of status go
 * on where they were. */
int ramblock_new(struct ramblock **bp, struct keeper *keeper, const struct ramblock_memory *memory, const char *idstr,
                 uint64_t used_length, uint64_t map_length, uint64_t page_size, int writable,
                 const struct ramblock_extent *data, uint64_t n_data, uint32_t index, struct status_block *status,
                 uint64_t *received, char *text);
void ramblock_free(struct ramblock *b);
/* Unregisters the coordinator's own mapping and the keeper's: every page is in. Twice is fine. */
void ramblock_complete(struct ramblock *b);

int ramblock_is_received(const struct ramblock *b, uint64_t page);
int ramblock_is_hole(const struct ramblock *b, uint64_t page);
/* The first page of [start, end) that is neither received nor a hole, or end. */
uint64_t ramblock_next_missing(const struct ramblock *b, uint64_t start, uint64_t end);
/* The first page in [start, end) that is missing and not requested, and how many follow it that are the same, max at
 * most; returns the count and marks them requested. 0: none. */
uint64_t ramblock_claim_missing(struct ramblock *b, uint64_t start, uint64_t end, uint64_t max, uint64_t *firstp);

/* Marks the page requested, and those of [start, end) around it that are missing, not requested and touch it. How
 * many from *firstp on; 0: the page is requested already. */
uint64_t ramblock_claim_around(struct ramblock *b, uint64_t page, uint64_t start, uint64_t end, uint64_t *firstp);

/* Places n_pages from bytes. Pages that are received or being placed are left alone. *placed_pagesp counts those placed
 * now. On a negative errno the pages before the failing one are placed; -ENOSPC: the status segment has no room for
 * their bits. A foreign page is counted, and repaired in a read-only block. */
int ramblock_place(struct ramblock *b, uint64_t page, uint64_t n_pages, const void *bytes, uint64_t *placed_pagesp);
int ramblock_place_zero(struct ramblock *b, uint64_t page);
/* The same for many pages. */
int ramblock_place_zeros(struct ramblock *b, uint64_t page, uint64_t n_pages, uint64_t *placed_pagesp);
/* A received page that faults: present (1), or removed by a helper and now zero again (0). */
int ramblock_revive(struct ramblock *b, uint64_t page);
/* A helper has removed these pages, which it does when its event is read; called while the gate is closed. Those that
 * are data and not received count as received from now on: how many. Holes stay holes. */
uint64_t ramblock_remove(struct ramblock *b, uint64_t start_page, uint64_t end_page);
/* Forgets the memory and the received bits of n_pages from start_page. -EPERM: the block is sealed against it. */
int ramblock_discard(struct ramblock *b, uint64_t start_page, uint64_t n_pages);

#endif
