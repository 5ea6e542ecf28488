/* working_set_test: what is noted of touches, by one thread and by many, a case a run, named by the first argument.
 *
 * Exit status: 0 the claim holds, 1 it does not (stderr says where).
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "fault_internal.h"

enum {
    PAGE = 4096,
    PAGES = 5000,
    BLOCKS = 2,
    THREADS = 4,
    ROUNDS = 40000,
    RUNS_MAX = 2 * PAGES,
};

#define CHECK(condition) ((condition) ? (void)0 : fail(#condition, __LINE__))

static void fail(const char *what, int line)
{
    fprintf(stderr, "working_set_test.c:%d: %s\n", line, what);
    exit(1);
}

static struct fault_threads *ft;
static struct ramblock blocks[BLOCKS] = {{.page_size = PAGE, .page_count = PAGES, .index = 0},
                                         {.page_size = PAGE, .page_count = PAGES, .index = 1}};
static struct served_block served[BLOCKS] = {{.block = &blocks[0]}, {.block = &blocks[1]}};

static void begin(int fd, uint64_t runs_max)
{
    ft = calloc(1, sizeof(*ft));
    CHECK(ft);
    working_set_init(&ft->working_set);
    CHECK(fault_threads_record(ft, fd, runs_max) == 0);
    for (int i = 0; i < BLOCKS; i++) {
        CHECK(working_set_add_block(ft, &blocks[i]) == 0);
        ft->blocks[i] = &served[i];
    }
    working_set_know_kept(ft);
}

static void end(void)
{
    for (int i = 0; i < BLOCKS; i++)
        working_set_drop_block(ft, &blocks[i]);
    working_set_deinit(&ft->working_set);
    free(ft);
}

static int new_memory(void)
{
    int fd = memfd_create("pcshare-test", MFD_CLOEXEC);

    CHECK(fd >= 0);
    return fd;
}

/* The runs that there are, as text: "block:page+count ...". */
static const char *told(void)
{
    static char text[4096];
    const struct working_set_run *runs;
    uint64_t n_runs = fault_threads_recorded(ft, &runs);
    size_t length = 0;

    text[0] = '\0';
    for (uint64_t i = 0; i < n_runs && length < sizeof(text); i++)
        length += (size_t)snprintf(text + length, sizeof(text) - length, "%s%u:%llu+%u", i ? " " : "",
                                   runs[i].block_index, (unsigned long long)runs[i].page, runs[i].n_pages);
    return text;
}

static void check_told(const char *wanted, int line)
{
    if (strcmp(told(), wanted) == 0)
        return;
    fprintf(stderr, "noted %s\n", told());
    fail(wanted, line);
}

#define CHECK_TOLD(wanted) check_told(wanted, __LINE__)

static void each_page_once_in_the_order_of_the_touches(void)
{
    int fd = new_memory();

    begin(fd, RUNS_MAX);
    for (const uint64_t *page = (uint64_t[]){9, 10, 3, 9, 11, 10, PAGES - 1, 0}; *page; page++)
        working_set_note(ft, &blocks[0], *page, 1);
    working_set_note(ft, &blocks[1], 10, 1);
    working_set_note(ft, &blocks[0], 0, 1);
    CHECK_TOLD("0:9+2 0:3+1 0:11+1 0:4999+1 1:10+1 0:0+1");
    end();
    close(fd);
}

static void range_is_what_is_new_of_it(void)
{
    int fd = new_memory();

    begin(fd, RUNS_MAX);
    working_set_note(ft, &blocks[0], 100, 1);
    working_set_note(ft, &blocks[0], 128, 64);
    working_set_note(ft, &blocks[0], 60, 200);
    working_set_note(ft, &blocks[0], 60, 200);
    CHECK_TOLD("0:100+1 0:128+64 0:60+40 0:101+27 0:192+68");
    working_set_note(ft, &blocks[0], 260, PAGES - 260);
    working_set_note(ft, &blocks[0], 0, PAGES);
    CHECK_TOLD("0:100+1 0:128+64 0:60+40 0:101+27 0:192+4808 0:0+60");
    end();
    close(fd);
}

static void what_was_kept_goes_on_and_is_not_noted_again(void)
{
    int fd = new_memory();

    begin(fd, RUNS_MAX);
    working_set_note(ft, &blocks[0], 7, 2);
    working_set_note(ft, &blocks[1], 3, 1);
    end();
    begin(fd, 1); /* the file says how many there may be */
    CHECK_TOLD("0:7+2 1:3+1");
    working_set_note(ft, &blocks[0], 8, 1);
    working_set_note(ft, &blocks[1], 4, 1);
    working_set_note(ft, &blocks[1], 3, 1);
    working_set_note(ft, &blocks[0], 1, 1);
    CHECK_TOLD("0:7+2 1:3+2 0:1+1");
    end();
    close(fd);
}

static void no_more_than_there_may_be(void)
{
    int fd = new_memory();

    begin(fd, 2);
    for (uint64_t page = 10; page < 60; page += 10)
        working_set_note(ft, &blocks[0], page, 1);
    CHECK_TOLD("0:10+1 0:20+1");
    end();
    close(fd);
}

static void nothing_is_noted_where_nothing_is_recorded(void)
{
    const struct working_set_run *runs;

    ft = calloc(1, sizeof(*ft));
    CHECK(ft);
    working_set_init(&ft->working_set);
    CHECK(working_set_add_block(ft, &blocks[0]) == 0);
    working_set_note(ft, &blocks[0], 0, PAGES);
    CHECK(fault_threads_recorded(ft, &runs) == 0);
    end();
}

static void *note_at_random(void *argument)
{
    unsigned seed = (unsigned)(uintptr_t)argument;

    for (int i = 0; i < ROUNDS; i++) {
        uint64_t page = (uint64_t)rand_r(&seed) % PAGES, n = i % 10 ? 1 : (uint64_t)rand_r(&seed) % 200 + 1;
        working_set_note(ft, &blocks[i % BLOCKS], page, n < PAGES - page ? n : PAGES - page);
    }
    return NULL;
}

/* While it is read: what n_runs counts is whole. */
static void each_page_once_between_threads(void)
{
    static uint8_t seen[BLOCKS][PAGES];
    int fd = new_memory();
    pthread_t threads[THREADS];
    const struct working_set_run *runs;

    begin(fd, RUNS_MAX);
    for (uintptr_t i = 0; i < THREADS; i++)
        CHECK(pthread_create(&threads[i], NULL, note_at_random, (void *)(i + 1)) == 0);
    for (int i = 0; i < 1000; i++) {
        uint64_t n_runs = fault_threads_recorded(ft, &runs);
        for (uint64_t k = 0; k < n_runs; k++)
            CHECK(__atomic_load_n(&runs[k].n_pages, __ATOMIC_RELAXED) > 0 && runs[k].block_index < BLOCKS);
    }
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < BLOCKS; i++)
        working_set_note(ft, &blocks[i], 0, PAGES);
    uint64_t n_runs = fault_threads_recorded(ft, &runs);
    for (uint64_t i = 0; i < n_runs; i++)
        for (uint32_t k = 0; k < runs[i].n_pages; k++)
            CHECK(!seen[runs[i].block_index][runs[i].page + k]++);
    for (int i = 0; i < BLOCKS; i++)
        CHECK(!memchr(seen[i], 0, PAGES));
    end();
    close(fd);
}

static const struct {
    const char *name;
    void (*run)(void);
} cases[] = {
#define CASE(name) {#name, name}
    CASE(each_page_once_in_the_order_of_the_touches),
    CASE(range_is_what_is_new_of_it),
    CASE(what_was_kept_goes_on_and_is_not_noted_again),
    CASE(no_more_than_there_may_be),
    CASE(nothing_is_noted_where_nothing_is_recorded),
    CASE(each_page_once_between_threads),
};

int main(int argc, char **argv)
{
    for (size_t i = 0; argc == 2 && i < sizeof(cases) / sizeof(cases[0]); i++) {
        if (strcmp(argv[1], cases[i].name))
            continue;
        cases[i].run();
        return 0;
    }
    fprintf(stderr, "usage: working_set_test CASE\n");
    return 2;
}
