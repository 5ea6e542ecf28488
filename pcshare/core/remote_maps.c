/* remote_maps: see remote_maps.h. */
#include "remote_maps.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "remote_fd.h"

struct remote_maps {
    pthread_mutex_t lock;
    uint64_t page_size;
    uint32_t n;
    struct remote_map of[REMOTE_MAPS_MAX];
};

/* A new state in the making: a change may need more pieces for a moment than it leaves. */
struct draft {
    uint64_t page_size;
    uint32_t n;
    struct remote_map of[4 * REMOTE_MAPS_MAX]; /* cut in the middle: twice as many; and as many that are added */
};

int remote_maps_new(struct remote_maps **mp, const struct remote_map *maps, uint32_t n_maps, uint64_t page_size)
{
    struct remote_maps *m = calloc(1, sizeof(*m));

    *mp = m;
    if (!m)
        return -ENOMEM;
    pthread_mutex_init(&m->lock, NULL);
    m->page_size = page_size;
    m->n = n_maps;
    memcpy(m->of, maps, n_maps * sizeof(maps[0]));
    return 0;
}

void remote_maps_free(struct remote_maps *m)
{
    if (!m)
        return;
    pthread_mutex_destroy(&m->lock);
    free(m);
}

static uint64_t end_of(const struct remote_map *map)
{
    return map->client_addr + map->length;
}

/* ---- asking ---- */

int remote_maps_page(struct remote_maps *m, uint64_t client_addr, uint64_t *pagep)
{
    int rc = -EFAULT;

    pthread_mutex_lock(&m->lock);
    for (uint32_t i = 0; i < m->n && rc < 0; i++) {
        if (client_addr < m->of[i].client_addr || client_addr >= end_of(&m->of[i]))
            continue;
        *pagep = m->of[i].page + (client_addr - m->of[i].client_addr) / m->page_size;
        rc = 0;
    }
    pthread_mutex_unlock(&m->lock);
    return rc;
}

uint32_t remote_maps_places(struct remote_maps *m, uint64_t page, struct remote_place places[REMOTE_MAPS_MAX])
{
    uint32_t n = 0;

    pthread_mutex_lock(&m->lock);
    for (uint32_t i = 0; i < m->n; i++) {
        const struct remote_map *map = &m->of[i];
        uint64_t n_pages = map->length / m->page_size;
        if (page < map->page || page - map->page >= n_pages)
            continue;
        places[n++] = (struct remote_place){.client_addr = map->client_addr + (page - map->page) * m->page_size,
                                            .pages_before = page - map->page,
                                            .pages_from = n_pages - (page - map->page)};
    }
    pthread_mutex_unlock(&m->lock);
    return n;
}

uint32_t remote_maps_spans(struct remote_maps *m, uint64_t client_addr, uint64_t length,
                           struct remote_span spans[REMOTE_MAPS_MAX])
{
    uint64_t end_addr = client_addr + length, n = 0;

    pthread_mutex_lock(&m->lock);
    for (uint32_t i = 0; i < m->n; i++) {
        const struct remote_map *map = &m->of[i];
        uint64_t from = client_addr > map->client_addr ? client_addr - map->client_addr : 0;
        if (end_addr <= map->client_addr || from >= map->length)
            continue;
        uint64_t to = end_addr < end_of(map) ? end_addr - map->client_addr : map->length;
        uint64_t start = (from + m->page_size - 1) / m->page_size, end = to / m->page_size;
        if (start < end)
            spans[n++] = (struct remote_span){.start = map->page + start, .end = map->page + end};
    }
    pthread_mutex_unlock(&m->lock);
    return (uint32_t)n;
}

uint32_t remote_maps_describe(struct remote_maps *m, struct wire_map maps[REMOTE_MAPS_MAX])
{
    pthread_mutex_lock(&m->lock);
    uint32_t n = m->n;
    for (uint32_t i = 0; i < n; i++)
        maps[i] = (struct wire_map){.client_addr = m->of[i].client_addr,
                                    .offset = m->of[i].page * m->page_size,
                                    .length = m->of[i].length};
    pthread_mutex_unlock(&m->lock);
    return n;
}

/* ---- changing ---- */

static void draft_from(struct draft *d, const struct remote_maps *m)
{
    d->page_size = m->page_size;
    d->n = m->n;
    memcpy(d->of, m->of, m->n * sizeof(m->of[0]));
}

/* The part of map that lies in [start, end), or one of length 0. */
static struct remote_map part_of(const struct draft *d, const struct remote_map *map, uint64_t start, uint64_t end)
{
    struct remote_map part = *map;

    if (start > map->client_addr) {
        uint64_t off = start - map->client_addr < map->length ? start - map->client_addr : map->length;
        part.client_addr += off;
        part.page += off / d->page_size;
        part.length -= off;
    }
    if (part.length && end < end_of(&part))
        part.length = end > part.client_addr ? end - part.client_addr : 0;
    return part;
}

static void draft_cut(struct draft *d, uint64_t start, uint64_t end)
{
    uint32_t n = d->n, kept = 0;
    struct remote_map before[4 * REMOTE_MAPS_MAX];

    memcpy(before, d->of, n * sizeof(before[0]));
    for (uint32_t i = 0; i < n; i++) {
        struct remote_map low = part_of(d, &before[i], 0, start), high = part_of(d, &before[i], end, UINT64_MAX);
        if (low.length)
            d->of[kept++] = low;
        if (high.length)
            d->of[kept++] = high;
    }
    d->n = kept;
}

static int follows(const struct draft *d, const struct remote_map *low, const struct remote_map *high)
{
    return end_of(low) == high->client_addr && low->page + low->length / d->page_size == high->page;
}

/* Two pieces that lie one behind the other, here and in the block, become one: 1; 0: there are none. */
static int merge_two(struct draft *d)
{
    for (uint32_t i = 0; i < d->n; i++) {
        for (uint32_t j = 0; j < d->n; j++) {
            if (i == j || !follows(d, &d->of[i], &d->of[j]))
                continue;
            d->of[i].length += d->of[j].length;
            d->of[j] = d->of[--d->n];
            return 1;
        }
    }
    return 0;
}

static int draft_commit(struct draft *d, struct remote_maps *m)
{
    while (merge_two(d))
        ;
    if (d->n > REMOTE_MAPS_MAX)
        return -ENOSPC;
    m->n = d->n;
    memcpy(m->of, d->of, d->n * sizeof(d->of[0]));
    return 0;
}

int remote_maps_move(struct remote_maps *m, uint64_t from_addr, uint64_t to_addr, uint64_t length)
{
    struct remote_map moved[REMOTE_MAPS_MAX];
    struct draft d;
    uint32_t n = 0;
    int rc = 0;

    pthread_mutex_lock(&m->lock);
    draft_from(&d, m);
    for (uint32_t i = 0; i < m->n; i++) {
        struct remote_map part = part_of(&d, &m->of[i], from_addr, from_addr + length);
        if (!part.length)
            continue;
        part.client_addr = to_addr + (part.client_addr - from_addr);
        moved[n++] = part;
    }
    if (n > 0) { /* else it was said already, by the maps themselves: an event may be older than these */
        draft_cut(&d, to_addr, to_addr + length); /* what lay there is gone */
        memcpy(d.of + d.n, moved, n * sizeof(moved[0]));
        d.n += n;
        rc = draft_commit(&d, m);
    }
    pthread_mutex_unlock(&m->lock);
    return rc;
}

int remote_maps_cut(struct remote_maps *m, uint64_t client_addr, uint64_t length)
{
    struct draft d;

    pthread_mutex_lock(&m->lock);
    draft_from(&d, m);
    draft_cut(&d, client_addr, client_addr + length);
    int rc = draft_commit(&d, m);
    pthread_mutex_unlock(&m->lock);
    return rc;
}
