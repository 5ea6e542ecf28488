/* remover: a helper that removes pages of a writable block just where the stream is placing them, and then looks
 * whether an old page came all the same.
 *
 *   remover SOCKET SOURCE SEED
 *
 * Each page is removed once at most. Of the removed ones a third is written at once, a third is read at once, a third
 * is left alone until the block is complete. Then every page is looked at: removed ones hold zeros and what was written
 * since, the others the source's bytes. Prints one line: removed missing wrong, where missing are those that had not
 * been received when they were removed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <signal.h>
#include <unistd.h>
#include "helper.h"
#include "status_segment.h"

enum {
    PAGE = 4096,
    THREADS = 2,
    AHEAD_PAGES = 1024,  /* around where the stream is: what it has under way */
    MISSING_LEAST = 200, /* before it says that it is there; the stream may be over before it runs again */
    LIMIT_S = 60,
};
enum { KEPT = 0, LEFT_ALONE = 1, WRITTEN = 2, READ = 3 };

static struct pcshare_attachment *a;
static uint8_t *data;
static uint64_t page_count;
static uint8_t *fate; /* of each page; who sets it first removes the page */
static uint64_t removed, missing, wrong;

static uint64_t next_random(uint64_t *state)
{
    uint64_t z = *state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

static uint64_t marker(uint64_t page)
{
    return page * 0x9E3779B97F4A7C15u | 1;
}

static int is_zero_from(const uint8_t *bytes, size_t from)
{
    for (size_t i = from; i < PAGE; i++)
        if (bytes[i])
            return 0;
    return 1;
}

static void complain(uint64_t page, const char *what)
{
    if (__atomic_fetch_add(&wrong, 1, __ATOMIC_RELAXED) < 5)
        fprintf(stderr, "page %llu: %s\n", (unsigned long long)page, what);
}

static void remove_page(uint64_t page, int wanted)
{
    uint8_t none = KEPT, *bytes = data + page * PAGE;

    if (!__atomic_compare_exchange_n(&fate[page], &none, (uint8_t)wanted, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
        return;
    int was_here = pcshare_is_received(a, page * PAGE, 1);
    if (madvise(bytes, PAGE, MADV_REMOVE)) {
        complain(page, strerror(errno));
        return;
    }
    __atomic_fetch_add(&removed, 1, __ATOMIC_RELAXED);
    __atomic_fetch_add(&missing, !was_here, __ATOMIC_RELAXED);
    if (wanted == WRITTEN)
        *(uint64_t *)bytes = marker(page);
    else if (wanted == READ && !is_zero_from(bytes, 0))
        complain(page, "not zero right after it was removed");
}

static void *remove_pages(void *argument)
{
    uint64_t state = (uint64_t)(uintptr_t)argument;
    struct pcshare_progress progress;

    do {
        pcshare_get_progress(a, &progress);
        uint64_t page = progress.received_pages + next_random(&state) % AHEAD_PAGES;
        page = page > AHEAD_PAGES / 4 ? page - AHEAD_PAGES / 4 : page;
        if (page < page_count)
            remove_page(page, 1 + (int)(next_random(&state) % 3));
    } while (pcshare_state(a) != PCSHARE_COMPLETE);
    return NULL;
}

static void look_at_all(const uint8_t *source)
{
    for (uint64_t page = 0; page < page_count; page++) {
        const uint8_t *bytes = data + page * PAGE;

        if (fate[page] == KEPT && memcmp(bytes, source + page * PAGE, PAGE))
            complain(page, "is not the source's");
        if (fate[page] == WRITTEN && *(const uint64_t *)bytes != marker(page))
            complain(page, "lost what was written");
        if (fate[page] != KEPT && !is_zero_from(bytes, fate[page] == WRITTEN ? sizeof(uint64_t) : 0))
            complain(page, "was removed, and holds old bytes");
    }
}

int main(int argc, char **argv)
{
    pthread_t threads[THREADS];
    struct pcshare_info info;

    if (argc != 4)
        return 2;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    alarm(LIMIT_S);
    int fd = open(argv[2], O_RDONLY | O_CLOEXEC);
    if (fd < 0 || pcshare_attach(&a, argv[1], "", PCSHARE_RW, 20000, NULL, 0) < 0) {
        fprintf(stderr, "%s\n", pcshare_error_text());
        return 2;
    }
    pcshare_get_info(a, &info);
    page_count = info.map_length / PAGE;
    data = pcshare_data(a);
    fate = calloc(page_count, 1);
    const uint8_t *source = mmap(NULL, info.map_length, PROT_READ, MAP_PRIVATE, fd, 0);
    for (uintptr_t i = 0; i < THREADS; i++)
        if (pthread_create(&threads[i], NULL, remove_pages, (void *)(strtoull(argv[3], NULL, 10) + i)))
            return 2;
    while (__atomic_load_n(&missing, __ATOMIC_RELAXED) <= MISSING_LEAST)
        usleep(100);
    puts("attached");
    fflush(stdout);
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    look_at_all(source);
    printf("%llu %llu %llu\n", (unsigned long long)removed, (unsigned long long)missing, (unsigned long long)wrong);
    pcshare_detach(a, 0);
    return wrong != 0;
}
