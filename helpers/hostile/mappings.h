/* mappings: helpers that change their mapping, or make another one. Those that plant a zero page do so against the
 * rules; it must be found when the page is asked for, counted, and, in a read-only block, overwritten with the
 * right bytes.
 */
#ifndef PCSHARE_HOSTILE_MAPPINGS_H
#define PCSHARE_HOSTILE_MAPPINGS_H

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include "uffd.h"
#include "scene.h"

enum { PLANT_TRIES = 16 }; /* somebody else may have brought the page in between */

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

/* Reads a page of r where nobody serves; fails with a negative errno. The byte goes to *value. */
typedef int plant_function(const struct raw *r, uint64_t page, uint8_t *value);

/* Planted it was if its first byte reads zero and the source's is not. Then it is asked for, and must be right. */
static int plant(struct scene *s, plant_function *plant_page)
{
    struct raw r;
    TRY(scene_join(s, &r));
    for (int i = 0; i < PLANT_TRIES && !s->planted_pages; i++) {
        uint64_t page;
        uint8_t value = 0, source = 1;
        TRY(scene_missing_page(s, &r, &page));
        if (s->source_fd >= 0 && (pread(s->source_fd, &source, 1, (off_t)(page * r.welcome.page_size)) != 1 || !source))
            continue; /* no telling a planted zero from the right one */
        int rc = plant_page(&r, page, &value);
        if (rc)
            return scene_end(s, CANNOT, "cannot", "%s", strerror(-rc));
        s->attempts++;
        s->planted_pages += value == 0;
        rc = raw_ensure(&r, page * r.welcome.page_size, r.welcome.page_size);
        if (rc)
            return scene_end(s, HARM, "harm", "the page that was asked for did not come: %s", strerror(-rc));
        if (!scene_memfd_is_right(s, &r, page))
            return scene_end(s, HARM, "harm", "page %llu stayed wrong", (unsigned long long)page);
    }
    if (!s->planted_pages)
        return scene_end(s, CANNOT, "cannot", "no page could be planted");
    return scene_end_if_others_go_on(s, "planted", "and repaired when the page was asked for");
}

static int read_elsewhere(const struct raw *r, uint64_t page, uint8_t *value)
{
    size_t page_size = r->welcome.page_size;
    uint8_t *bytes = mmap(NULL, page_size, PROT_READ, MAP_SHARED, r->memfd, (off_t)(page * page_size));
    if (bytes == MAP_FAILED)
        return -errno;
    *value = *(volatile uint8_t *)bytes;
    return munmap(bytes, page_size) ? -errno : 0;
}

static int hostile_maps_unregistered(struct scene *s)
{
    return plant(s, read_elsewhere);
}

static int populate(const struct raw *r, uint64_t page, uint8_t *value)
{
    size_t page_size = r->welcome.page_size;
    uint8_t *bytes = mmap(NULL, page_size, PROT_READ, MAP_PRIVATE | MAP_NORESERVE, r->memfd, (off_t)(page * page_size));
    if (bytes == MAP_FAILED || madvise(bytes, page_size, MADV_POPULATE_READ))
        return -errno;
    *value = *bytes;
    return munmap(bytes, page_size) ? -errno : 0;
}

static int hostile_populate_read(struct scene *s)
{
    return plant(s, populate);
}

static int move_away(const struct raw *r, uint64_t page, uint8_t *value)
{
    size_t page_size = r->welcome.page_size;
    uint8_t *room = mmap(NULL, page_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint8_t *bytes = mremap(r->data + page * page_size, page_size, page_size, MREMAP_MAYMOVE | MREMAP_FIXED, room);
    if (bytes == MAP_FAILED)
        return -errno;
    *value = *(volatile uint8_t *)bytes;
    return 0;
}

static int hostile_mremaps(struct scene *s)
{
    return plant(s, move_away);
}

static const volatile uint8_t *inherited;

static int read_inherited(struct scene *s)
{
    (void)s;
    return *inherited == 0;
}

static int read_in_child(const struct raw *r, uint64_t page, uint8_t *value)
{
    if (madvise(r->data, r->welcome.map_length, MADV_DOFORK))
        return -errno;
    inherited = r->data + page * r->welcome.page_size;
    *value = scene_wait(scene_spawn(NULL, read_inherited), 0) == 0;
    return 0;
}

static int hostile_forks_carelessly(struct scene *s)
{
    return plant(s, read_in_child);
}

/* COPY into a private mapping fills that mapping only. */
static int hostile_fills_own_page(struct scene *s)
{
    struct raw r, other;
    uint64_t page, done;
    uint8_t *wrong;
    TRY(scene_join(s, &r));
    TRY(scene_missing_page(s, &r, &page));
    wrong = mmap(NULL, r.welcome.page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(wrong, 0x5a, r.welcome.page_size);
    int rc = uffd_copy(r.uffd, (uintptr_t)r.data + page * r.welcome.page_size, wrong, r.welcome.page_size, &done);
    TRY(scene_join(s, &other));
    rc = raw_ensure(&other, page * r.welcome.page_size, r.welcome.page_size) ? -EIO : rc;
    if (!scene_is_right(s, &other, other.data + page * r.welcome.page_size, page))
        return scene_end(s, HARM, "harm", "page %llu holds its bytes for others", (unsigned long long)page);
    return scene_end_if_others_go_on(s, "served", rc ? strerror(-rc) : "its bytes stayed its own");
}

static int hostile_clears_nonblock(struct scene *s)
{
    struct raw r;
    struct toucher t;
    uint64_t page;
    char text[WIRE_TEXT_MAX];
    TRY(scene_join(s, &r));
    fcntl(r.uffd, F_SETFL, 0);
    TRY(scene_missing_page(s, &r, &page));
    const uint8_t *bytes = r.data + page * r.welcome.page_size;
    toucher_start(&t, bytes);
    TRY(scene_others_go_on(s)); /* a fault thread that sleeps in read() would serve nobody */
    if (!toucher_join(&t, UNSERVED_WAIT_MS)) {
        if (!scene_is_right(s, &r, bytes, page))
            return scene_end(s, HARM, "harm", "page %llu holds wrong bytes", (unsigned long long)page);
        return scene_end_if_others_go_on(s, "served", "without O_NONBLOCK");
    }
    if (raw_refusal(r.control, text, sizeof text, NOTICE_LIMIT_MS))
        return scene_end(s, HARM, "harm", "its fault waits and nobody told it why");
    return scene_end_if_others_go_on(s, "cut-off", text);
}

/* Its own copy of the page tables goes, the page stays. */
static int hostile_madv_dontneed(struct scene *s)
{
    struct raw r;
    uint64_t page;
    TRY(scene_join(s, &r));
    for (int i = 0; i < PLANT_TRIES; i++) {
        TRY(scene_missing_page(s, &r, &page));
        uint8_t *bytes = r.data + page * r.welcome.page_size;
        int right_before = scene_is_right(s, &r, bytes, page);
        if (madvise(bytes, r.welcome.page_size, MADV_DONTNEED))
            return scene_end(s, CANNOT, "cannot", "madvise: %s", strerror(errno));
        s->attempts++;
        if (!right_before || !scene_is_right(s, &r, bytes, page))
            return scene_end(s, HARM, "harm", "page %llu holds wrong bytes", (unsigned long long)page);
    }
    return scene_end_if_others_go_on(s, "served", "each page, before and after");
}

/* A page that was removed is zeros, whether it was here or not: the source's old bytes never come to it. */
static int hostile_madv_remove(struct scene *s)
{
    struct raw r;
    struct toucher t;
    uint64_t page;
    TRY(scene_join(s, &r));
    TRY(scene_missing_page(s, &r, &page));
    uint8_t *bytes = r.data + page * r.welcome.page_size;
    for (int was_here = 0; was_here < 2; was_here++) {
        if (madvise(bytes, r.welcome.page_size, MADV_REMOVE))
            return scene_end(s, CANNOT, "cannot", "madvise: %s", strerror(errno));
        s->attempts++;
        toucher_start(&t, bytes);
        if (toucher_join(&t, FAULT_LIMIT_MS))
            return scene_end(s, HARM, "harm", "page %llu never came back", (unsigned long long)page);
        if (bytes[0] || memcmp(bytes, bytes + 1, r.welcome.page_size - 1))
            return scene_end(s, HARM, "harm", "page %llu was removed and is not zero", (unsigned long long)page);
    }
    return scene_end_if_others_go_on(s, "served", "with zeros, removed before it came and after");
}

/* The thread that waited for an unmapped page is woken one day and has no memory to go back to: let it sleep on. */
static void on_no_memory(int signal_number)
{
    (void)signal_number;
    for (;;)
        pause();
}

static int hostile_munmaps(struct scene *s)
{
    struct raw r;
    struct toucher t;
    uint64_t page;
    TRY(scene_join(s, &r));
    TRY(scene_missing_page(s, &r, &page));
    signal(SIGSEGV, on_no_memory);
    toucher_start(&t, r.data + page * r.welcome.page_size);
    if (raw_wait_for_fault(&r))
        return scene_end(s, CANNOT, "cannot", "no fault was counted");
    if (munmap(r.data + page * r.welcome.page_size, r.welcome.page_size))
        return scene_end(s, CANNOT, "cannot", "munmap: %s", strerror(errno));
    TRY(scene_others_go_on(s));
    for (int i = 0; i < OTHERS_PAGES; i++) {
        uint64_t other;
        TRY(scene_missing_page(s, &r, &other));
        if (other != page && !scene_is_right(s, &r, r.data + other * r.welcome.page_size, other))
            return scene_end(s, HARM, "harm", "page %llu holds wrong bytes", (unsigned long long)other);
    }
    return scene_end_if_others_go_on(s, "served", "on the rest of its mapping");
}

#endif
