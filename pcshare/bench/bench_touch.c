/* bench_touch: what touching memory costs a process, by the same loops whatever the memory is.
 *
 *   bench-touch walk   CPU COUNT TARGET        COUNT different pages (0: all), far from each other; each is timed
 *   bench-touch list   CPU LIST TARGET         the pages whose numbers, 8 bytes each, are in the file LIST; each timed
 *   bench-touch random CPU COUNT SEED TARGET   COUNT random pages; those that were missing just before are timed
 *   bench-touch times  CPU COUNT SEED TARGET   the same, and prints each of these times alone
 *   bench-touch scan   CPU TARGET              every page in order
 *   bench-touch sum    CPU SEED TARGET         every byte is read: SEED 0 in order, else page by page at random
 *   bench-touch -w ...                         with -w: an empty line once the target is there; begins when one comes
 *                                              on stdin
 *
 * TARGET is pcshare:SOCKET (a coordinator's only block), pcshare:SOCKET#BLOCK, file:PATH (mapped shared, read-only), or
 * memfd:PATH (a memfd that holds a copy of the file, mapped likewise). sum over a pcshare target waits until the block
 * is complete. CPU -1 is not pinned.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bench_common.h"
#include "helper.h"

enum { ATTACH_TIMEOUT_MS = 10000 };

struct target {
    const volatile uint8_t *data;
    uint64_t length;
    struct pcshare_attachment *attachment; /* NULL: no coordinator's */
};

static struct target map_fd(int fd, uint64_t length)
{
    void *data = mmap(NULL, length, PROT_READ, MAP_SHARED, fd, 0);

    if (data == MAP_FAILED)
        bench_fail("mmap");
    close(fd);
    return (struct target){.data = data, .length = length};
}

static int open_file(const char *path, uint64_t *lengthp)
{
    struct stat info;
    int fd = open(path, O_RDONLY | O_CLOEXEC);

    if (fd < 0 || fstat(fd, &info) < 0)
        bench_fail(path);
    *lengthp = (uint64_t)info.st_size;
    return fd;
}

static struct target copy_to_memfd(const char *path)
{
    uint64_t length;
    int file = open_file(path, &length), memfd = memfd_create("bench-touch", MFD_CLOEXEC);

    if (memfd < 0 || ftruncate(memfd, (off_t)length) < 0)
        bench_fail("memfd");
    for (uint64_t done = 0; done < length;) {
        ssize_t n = sendfile(memfd, file, NULL, length - done);
        if (n <= 0)
            bench_fail("sendfile");
        done += (uint64_t)n;
    }
    close(file);
    return map_fd(memfd, length);
}

static struct target attach(char *socket_path)
{
    struct pcshare_attachment *a;
    struct pcshare_info info;
    char *block = strchr(socket_path, '#');

    if (block)
        *block++ = '\0';
    if (pcshare_attach(&a, socket_path, block, PCSHARE_RO, ATTACH_TIMEOUT_MS, NULL, 0) < 0) {
        fprintf(stderr, "%s\n", pcshare_error_text());
        exit(EXIT_FAILURE);
    }
    pcshare_get_info(a, &info);
    return (struct target){.data = pcshare_data(a), .length = info.used_length, .attachment = a};
}

static struct target open_target(char *text)
{
    uint64_t length;

    if (strncmp(text, "pcshare:", 8) == 0)
        return attach(text + 8);
    if (strncmp(text, "memfd:", 6) == 0)
        return copy_to_memfd(text + 6);
    if (strncmp(text, "file:", 5) == 0) {
        int fd = open_file(text + 5, &length);
        return map_fd(fd, length);
    }
    fprintf(stderr, "a target is pcshare:SOCKET, pcshare:SOCKET#BLOCK, file:PATH or memfd:PATH, not %s\n", text);
    exit(2);
}

static void wait_for_line(void)
{
    int c;

    printf("\n");
    fflush(stdout);
    do
        c = getchar();
    while (c != '\n' && c != EOF);
}

static double *new_times(uint64_t count)
{
    double *us = malloc((count ? count : 1) * sizeof(*us));

    if (!us)
        bench_fail("malloc");
    return us;
}

static void walk(const struct target *target, uint64_t count)
{
    uint64_t pages = target->length / BENCH_PAGE, step = bench_stride(pages), at = 0;
    uint64_t n = count && count < pages ? count : pages;
    double *us = new_times(n), begin_us = bench_now_us();

    for (uint64_t i = 0; i < n; i++, at = (at + step) % pages) {
        double start_us = bench_now_us();
        (void)target->data[at * BENCH_PAGE];
        us[i] = bench_now_us() - start_us;
    }
    bench_print_times(n, (bench_now_us() - begin_us) / 1e6, us, n);
    free(us);
}

static uint64_t *read_list(const char *path, uint64_t *np)
{
    uint64_t length;
    int fd = open_file(path, &length);
    uint64_t *pages = malloc(length ? length : 1);

    if (!pages || read(fd, pages, length) != (ssize_t)length)
        bench_fail(path);
    close(fd);
    *np = length / sizeof(*pages);
    return pages;
}

static void touch_list(const struct target *target, const char *path)
{
    uint64_t n, *pages = read_list(path, &n);
    double *us = new_times(n), begin_us = bench_now_us();

    for (uint64_t i = 0; i < n; i++) {
        double start_us = bench_now_us();
        (void)target->data[pages[i] * BENCH_PAGE];
        us[i] = bench_now_us() - start_us;
    }
    bench_print_times(n, (bench_now_us() - begin_us) / 1e6, us, n);
    free(us);
    free(pages);
}

static int is_missing(const struct target *target, uint64_t page)
{
    unsigned char present = 0;

    if (mincore((void *)(uintptr_t)(target->data + page * BENCH_PAGE), BENCH_PAGE, &present) < 0)
        bench_fail("mincore");
    return !(present & 1);
}

static void print_list(const double *us, uint64_t n)
{
    printf("[");
    for (uint64_t i = 0; i < n; i++)
        printf("%s%.2f", i ? ", " : "", us[i]);
    printf("]\n");
}

static void touch_random(const struct target *target, uint64_t count, uint64_t seed, int lists)
{
    uint64_t pages = target->length / BENCH_PAGE, state = bench_random_state(seed), missing = 0;
    double *us = new_times(count), begin_us = bench_now_us();

    for (uint64_t i = 0; i < count; i++) {
        uint64_t page = bench_random(&state) % pages;
        int was_missing = is_missing(target, page);
        double start_us = bench_now_us();

        (void)target->data[page * BENCH_PAGE];
        if (was_missing)
            us[missing++] = bench_now_us() - start_us;
    }
    if (lists)
        print_list(us, missing);
    else
        bench_print_times(count, (bench_now_us() - begin_us) / 1e6, us, missing);
    free(us);
}

static void scan(const struct target *target)
{
    uint64_t pages = (target->length + BENCH_PAGE - 1) / BENCH_PAGE;
    double begin_us = bench_now_us();

    for (uint64_t page = 0; page < pages; page++)
        (void)target->data[page * BENCH_PAGE];
    bench_print_seconds(target->length, (bench_now_us() - begin_us) / 1e6);
}

static uint64_t sum_page(const volatile uint8_t *page)
{
    const volatile uint64_t *words = (const volatile uint64_t *)(uintptr_t)page;
    uint64_t sum = 0;

    for (uint64_t i = 0; i < BENCH_PAGE / sizeof(*words); i++)
        sum += words[i];
    return sum;
}

/* The first round maps the pages and is not timed. */
static void sum(const struct target *target, uint64_t seed)
{
    uint64_t pages = target->length / BENCH_PAGE, state = bench_random_state(seed), total = 0;
    double begin_us = 0;

    for (int round = 0; round < 2; round++) {
        begin_us = bench_now_us();
        for (uint64_t i = 0; i < pages; i++)
            total += sum_page(target->data + (seed && round ? bench_random(&state) % pages : i) * BENCH_PAGE);
    }
    double seconds = (bench_now_us() - begin_us) / 1e6;
    fprintf(stderr, "%llu\n", (unsigned long long)total); /* so that the reads are not left out */
    bench_print_seconds(pages * BENCH_PAGE, seconds);
}

static void wait_until_complete(const struct target *target)
{
    struct pcshare_info info = {0};

    while (target->attachment && pcshare_state(target->attachment) == PCSHARE_ATTACHED) {
        pcshare_get_info(target->attachment, &info);
        usleep(1000);
    }
}

static uint64_t number(const char *text)
{
    return strtoull(text, NULL, 10);
}

int main(int argc, char **argv)
{
    int waits = argc > 1 && strcmp(argv[1], "-w") == 0;

    argc -= waits;
    argv += waits;
    const char *what = argc > 2 ? argv[1] : "";
    int is_walk = strcmp(what, "walk") == 0 && argc == 5, is_scan = strcmp(what, "scan") == 0 && argc == 4;
    int lists = strcmp(what, "times") == 0, is_random = (strcmp(what, "random") == 0 || lists) && argc == 6;
    int is_sum = strcmp(what, "sum") == 0 && argc == 5, is_list = strcmp(what, "list") == 0 && argc == 5;

    if (!is_walk && !is_list && !is_scan && !is_random && !is_sum)
        bench_refuse("usage: bench-touch [-w] walk CPU COUNT TARGET | list CPU LIST TARGET | random|times CPU COUNT"
                     " SEED TARGET | scan CPU TARGET | sum CPU SEED TARGET");
    bench_pin(atoi(argv[2]));
    struct target target = open_target(argv[argc - 1]);
    if (target.length < BENCH_PAGE)
        bench_refuse("the target is smaller than a page");
    if (waits)
        wait_for_line();
    if (is_walk)
        walk(&target, number(argv[3]));
    else if (is_list)
        touch_list(&target, argv[3]);
    else if (is_random)
        touch_random(&target, number(argv[3]), number(argv[4]), lists);
    else if (is_scan)
        scan(&target);
    else {
        wait_until_complete(&target);
        sum(&target, number(argv[3]));
    }
    if (target.attachment)
        pcshare_detach(target.attachment, 0);
    return EXIT_SUCCESS;
}
