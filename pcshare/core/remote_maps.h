/* remote_maps: which addresses of a helper show which pages of its block, while the helper may change that.
 *
 * Several fault threads look at it, and one that reads the helper's events changes it (mremap, munmap). One short lock,
 * and no system call under it: what is asked for is copied out. Knows no uffd; believes nothing but what the kernel's
 * events say.
 */
#ifndef PCSHARE_REMOTE_MAPS_H
#define PCSHARE_REMOTE_MAPS_H

#include <stdint.h>
#include "wire.h"

enum { REMOTE_MAPS_MAX = WIRE_MAPS_MAX };

struct remote_map;
struct remote_maps;

/* Where a page is shown, how many pages of the block lie before it there, and how many follow, itself included. */
struct remote_place {
    uint64_t client_addr;
    uint64_t pages_before;
    uint64_t pages_from;
};

/* Pages [start, end) of the block. */
struct remote_span {
    uint64_t start;
    uint64_t end;
};

/* maps: valid, and not overlapping. */
int remote_maps_new(struct remote_maps **mp, const struct remote_map *maps, uint32_t n_maps, uint64_t page_size);
void remote_maps_free(struct remote_maps *m);
/* 0 and the page that client_addr shows; -EFAULT: outside every map. */
int remote_maps_page(struct remote_maps *m, uint64_t client_addr, uint64_t *pagep);
/* Everywhere the page is shown: how many places. */
uint32_t remote_maps_places(struct remote_maps *m, uint64_t page, struct remote_place places[REMOTE_MAPS_MAX]);
/* The pages of the block of which all lies in [client_addr, + length): how many spans. */
uint32_t remote_maps_spans(struct remote_maps *m, uint64_t client_addr, uint64_t length,
                           struct remote_span spans[REMOTE_MAPS_MAX]);
/* All of it, as it goes over the wire: how many maps. */
uint32_t remote_maps_describe(struct remote_maps *m, struct wire_map maps[REMOTE_MAPS_MAX]);
/* What [from_addr, + length) shows is shown at to_addr as well. -ENOSPC: in more pieces than fit; then nothing changed.
 */
int remote_maps_move(struct remote_maps *m, uint64_t from_addr, uint64_t to_addr, uint64_t length);
/* [client_addr, + length) shows nothing any more. -ENOSPC as above. */
int remote_maps_cut(struct remote_maps *m, uint64_t client_addr, uint64_t length);

#endif
