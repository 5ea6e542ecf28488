/* touch_bench: what touching memory costs a process, the same loops over a coordinator's block and over a mapped file.
 *
 *   touch_bench random COUNT SEED TARGET   COUNT random pages; the time of those that were missing is told apart
 *   touch_bench times COUNT SEED TARGET    the same, and prints each of those times alone
 *   touch_bench scan TARGET                every page, in order
 *   touch_bench fill BYTES                 no target: UFFDIO_COPY in large pieces into fresh shared memory, the limit
 * of every fill
 *
 * TARGET is pcshare:SOCKET (a coordinator's only block), pcshare:SOCKET#BLOCK, or file:PATH (mapped shared, read-only).
 * XX
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "helper.h"
#include "uffd.h"

enum { PAGE = 4096, ATTACH_TIMEOUT_MS = 10000, FILL_PIECE = 1 << 20 };

static void fail(const char *what)
{
    fprintf(stderr, "touch_bench: %s: %s\n", what, strerror(errno));
    exit(EXIT_FAILURE);
}

static double now_us(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static int compare_doubles(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

static void report(uint64_t touches, double *us, uint64_t missing, double seconds)
{
    qsort(us, missing, sizeof(*us), compare_doubles);
    printf("%llu %llu %.6f %.2f %.2f %.2f %.2f\n", (unsigned long long)touches, (unsigned long long)missing, seconds,
           missing ? us[missing / 2] : 0, missing ? us[missing * 99 / 100] : 0, missing ? us[missing * 999 / 1000] : 0,
           missing ? us[missing - 1] : 0);
}

struct target {
    const volatile uint8_t *data;
    uint64_t length;
    struct pcshare_attachment *attachment;
};

static struct target open_file(const char *path)
{
    struct stat info;
    int fd = open(path, O_RDONLY | O_CLOEXEC);

    if (fd < 0 || fstat(fd, &info) < 0)
        fail(path);
    void *data = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_SHARED, fd, 0);
    if (data == MAP_FAILED)
        fail("mmap");
    close(fd);
    return (struct target){.data = data, .length = (uint64_t)info.st_size};
}

static struct target open_target(char *text)
{
    struct pcshare_attachment *a;
    struct pcshare_info info;
    char *block;

    if (strncmp(text, "file:", 5) == 0)
        return open_file(text + 5);
    if (strncmp(text, "pcshare:", 8) != 0) {
        fprintf(stderr, "touch_bench: a target is pcshare:SOCKET, pcshare:SOCKET#BLOCK or file:PATH\n");
        exit(2);
    }
    block = strchr(text, '#');
    if (block)
        *block++ = '\0';
    if (pcshare_attach(&a, text + 8, block, PCSHARE_RO, ATTACH_TIMEOUT_MS, NULL, 0) < 0) {
        fprintf(stderr, "touch_bench: %s\n", pcshare_error_text());
        exit(EXIT_FAILURE);
    }
    pcshare_get_info(a, &info);
    return (struct target){.data = pcshare_data(a), .length = info.used_length, .attachment = a};
}

static int is_missing(const struct target *target, uint64_t page)
{
    unsigned char present = 0;

    if (mincore((void *)(uintptr_t)(target->data + page * PAGE), PAGE, &present) < 0)
        fail("mincore");
    return !(present & 1);
}

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static void report_times(const double *us, uint64_t missing)
{
    for (uint64_t i = 0; i < missing; i++)
        printf("%.2f ", us[i]);
    printf("\n");
}

static void touch_random(const struct target *target, uint64_t count, uint64_t seed, int all_times)
{
    uint64_t pages = target->length / PAGE, state = seed * 2654435761u + 88172645463325252ull, missing = 0;
    double *us = malloc((count ? count : 1) * sizeof(*us)), begin = now_us();

    for (uint64_t i = 0; i < count; i++) {
        uint64_t page = next_random(&state) % pages;
        int was_missing = is_missing(target, page);
        double start = now_us();

        (void)target->data[page * PAGE];
        if (was_missing)
            us[missing++] = now_us() - start;
    }
    if (all_times)
        report_times(us, missing);
    else
        report(count, us, missing, (now_us() - begin) / 1e6);
    free(us);
}

static void scan(const struct target *target)
{
    uint64_t pages = (target->length + PAGE - 1) / PAGE;
    double begin = now_us();

    for (uint64_t page = 0; page < pages; page++)
        (void)target->data[page * PAGE];
    report(pages, NULL, 0, (now_us() - begin) / 1e6);
}

static void fill(uint64_t length)
{
    int user_mode_only, memfd = memfd_create("touch-bench", MFD_CLOEXEC);
    uint8_t *piece = malloc(FILL_PIECE);

    if (memfd < 0 || ftruncate(memfd, (off_t)length) < 0 || !piece)
        fail("memfd");
    memset(piece, 1, FILL_PIECE);
    void *data = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
    int uffd = uffd_open(-1, &user_mode_only);
    if (data == MAP_FAILED || uffd < 0 || uffd_api(uffd, 0, NULL, NULL) < 0 ||
        uffd_register(uffd, (uint64_t)(uintptr_t)data, length, UFFD_MODE_MISSING, NULL) < 0)
        fail("userfaultfd");
    double begin = now_us();
    for (uint64_t at = 0; at < length; at += FILL_PIECE) {
        uint64_t done;
        if (uffd_copy(uffd, (uint64_t)(uintptr_t)data + at, piece, FILL_PIECE, &done) < 0)
            fail("UFFDIO_COPY");
    }
    report(length / PAGE, NULL, 0, (now_us() - begin) / 1e6);
    free(piece);
}

int main(int argc, char **argv)
{
    if (argc == 3 && strcmp(argv[1], "fill") == 0) {
        fill(strtoull(argv[2], NULL, 10) / FILL_PIECE * FILL_PIECE);
        return EXIT_SUCCESS;
    }
    int all_times = strcmp(argc > 1 ? argv[1] : "", "times") == 0;

    if (!(argc == 5 && (all_times || strcmp(argv[1], "random") == 0)) &&
        !(argc == 3 && strcmp(argv[1], "scan") == 0)) {
        fprintf(stderr, "usage: touch_bench random|times COUNT SEED TARGET | scan TARGET | fill BYTES\n");
        return 2;
    }
    struct target target = open_target(argv[argc - 1]);
    if (argc == 5)
        touch_random(&target, strtoull(argv[2], NULL, 10), strtoull(argv[3], NULL, 10), all_times);
    else
        scan(&target);
    if (target.attachment)
        pcshare_detach(target.attachment, 0);
    return EXIT_SUCCESS;
}
