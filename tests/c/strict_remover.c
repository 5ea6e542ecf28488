/* strict_remover: many threads of a helper that touch present pages, while one of it removes them again and again.
 *
 *   strict_remover SOCKET
 *
 * Of a strict, writable block of which every page but the last is received: each touch is a fault again once the page
 * was removed. Another attachment faults all the time, so that one fault of a helper is answered at a time. Prints how
 * often the pages were removed; is killed by SIGALRM if a removal never returns.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>
#include "helper.h"

enum {
    PAGE = 4096,
    THREADS = 96,
    REMOVALS = 50,
    LIMIT_S = 40,
};

static volatile uint8_t *data, *beside;
static uint64_t page_count;
static int ended;

static void *touch_pages(void *argument)
{
    uint64_t state = (uint64_t)(uintptr_t)argument;

    while (!__atomic_load_n(&ended, __ATOMIC_RELAXED)) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        (void)data[(state >> 33) % (page_count - 1) * PAGE];
    }
    return NULL;
}

/* What it unmaps stays received, and nobody is told of it. */
static void *fault_beside(void *argument)
{
    while (!__atomic_load_n(&ended, __ATOMIC_RELAXED)) {
        (void)beside[0];
        (void)madvise((void *)(uintptr_t)beside, PAGE, MADV_DONTNEED);
    }
    return argument;
}

int main(int argc, char **argv)
{
    struct pcshare_attachment *a, *b;
    pthread_t threads[THREADS + 1];
    struct pcshare_info info;
    int n = 0;

    if (argc != 2)
        return 2;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    alarm(LIMIT_S);
    if (pcshare_attach(&a, argv[1], "", PCSHARE_RW, 20000, NULL, 0) < 0 ||
        pcshare_attach(&b, argv[1], "", PCSHARE_RO, 20000, NULL, 0) < 0) {
        fprintf(stderr, "%s\n", pcshare_error_text());
        return 2;
    }
    pcshare_get_info(a, &info);
    page_count = info.map_length / PAGE;
    data = pcshare_data(a);
    beside = pcshare_data(b);
    for (uintptr_t i = 0; i <= THREADS; i++)
        if (pthread_create(&threads[i], NULL, i < THREADS ? touch_pages : fault_beside, (void *)(i + 1)))
            return 2;
    for (; n < REMOVALS; n++) {
        if (madvise((void *)(uintptr_t)data, (page_count - 1) * PAGE, MADV_REMOVE)) {
            fprintf(stderr, "MADV_REMOVE: %s\n", strerror(errno));
            break;
        }
    }
    __atomic_store_n(&ended, 1, __ATOMIC_RELAXED);
    for (int i = 0; i <= THREADS; i++)
        pthread_join(threads[i], NULL);
    printf("%d\n", n);
    pcshare_detach(a, 0);
    pcshare_detach(b, 0);
    return n != REMOVALS;
}
