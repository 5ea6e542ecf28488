/* restart_bench: a helper that uses pages that nobody has used yet, one after the other, and tells the longest wait.
 *
 *   restart_bench SOCKET touch|ensure FIRST STRIDE PAUSE_US FILE
 *
 * Page FIRST, FIRST + STRIDE, ... of a coordinator's only block, with a pause after each; each is compared with FILE. A
 * line on stdin is answered, after the page that is under way, with the longest wait since the last one in us, how many
 * pages that were, and how many of all were wrong. The end of stdin ends it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "helper.h"

enum { PAGE = 4096, ATTACH_TIMEOUT_MS = 10000 };

static void fail(const char *what)
{
    fprintf(stderr, "restart_bench: %s: %s\n", what, strerror(errno));
    exit(EXIT_FAILURE);
}

static double now_us(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

/* How long it took until the page's bytes were here. */
static double use_page(struct pcshare_attachment *a, int by_ensure, uint64_t page, uint8_t *bytes)
{
    const volatile uint8_t *data = pcshare_data(a);
    double before = now_us();

    if (by_ensure && pcshare_ensure(a, page * PAGE, PAGE, -1, NULL, NULL) < 0) {
        fprintf(stderr, "restart_bench: %s\n", pcshare_error_text());
        exit(EXIT_FAILURE);
    }
    bytes[0] = data[page * PAGE];
    double took_us = now_us() - before;
    memcpy(bytes, (const uint8_t *)pcshare_data(a) + page * PAGE, PAGE);
    return took_us;
}

static int is_wrong(int fd, uint64_t page, const uint8_t *bytes)
{
    uint8_t expected[PAGE];

    if (pread(fd, expected, PAGE, (off_t)(page * PAGE)) != PAGE)
        fail("reading the file");
    return memcmp(bytes, expected, PAGE) != 0;
}

/* Waits, at most so long, for a line: 1; 0: none came; -1: the end. */
static int hear(int64_t pause_us)
{
    struct timespec pause = {.tv_sec = pause_us / 1000000, .tv_nsec = pause_us % 1000000 * 1000};
    struct pollfd asked = {.fd = STDIN_FILENO, .events = POLLIN};
    char line[16];

    if (ppoll(&asked, 1, &pause, NULL) <= 0)
        return 0;
    return read(STDIN_FILENO, line, sizeof(line)) > 0 ? 1 : -1;
}

int main(int argc, char **argv)
{
    struct pcshare_attachment *a;
    struct pcshare_info info;
    uint8_t bytes[PAGE];
    double longest_us = 0;
    uint64_t count = 0, wrong = 0;

    if (argc != 7)
        return 2;
    int fd = open(argv[6], O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        fail(argv[6]);
    if (pcshare_attach(&a, argv[1], NULL, 0, ATTACH_TIMEOUT_MS, NULL, 0) < 0) {
        fprintf(stderr, "restart_bench: %s\n", pcshare_error_text());
        return EXIT_FAILURE;
    }
    pcshare_get_info(a, &info);
    uint64_t stride = strtoull(argv[4], NULL, 10), page = strtoull(argv[3], NULL, 10);
    int heard = 0;
    for (; heard >= 0 && (page + 1) * PAGE <= info.used_length; page += stride) {
        double took_us = use_page(a, strcmp(argv[2], "ensure") == 0, page, bytes);
        longest_us = took_us > longest_us ? took_us : longest_us;
        count++;
        wrong += (uint64_t)is_wrong(fd, page, bytes);
        heard = hear(atoll(argv[5]));
        if (heard <= 0)
            continue;
        printf("%.1f %llu %llu\n", longest_us, (unsigned long long)count, (unsigned long long)wrong);
        fflush(stdout);
        longest_us = 0;
        count = 0;
    }
    if (heard >= 0)
        fprintf(stderr, "restart_bench: the block is used up\n");
    pcshare_detach(a, 0);
    return heard >= 0;
}
