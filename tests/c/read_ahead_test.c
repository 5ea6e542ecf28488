/* read_ahead_test: how far ahead of a thread pages are brought, a case a run, named by the first argument.
 *
 * Exit status: 0 the claim holds, 1 it does not (stderr says where).
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "read_ahead.h"

enum {
    START = 4,
    MOST = 64,
    A = 1, /* thread ids */
    B = 2,
    FAR = 1000000, /* pages between what has nothing to do with each other */
    THREADS = 4,
    ROUNDS = 20000,
};

#define CHECK(condition) ((condition) ? (void)0 : fail(#condition, __LINE__))

static void fail(const char *what, int line)
{
    fprintf(stderr, "read_ahead_test.c:%d: %s\n", line, what);
    exit(1);
}

static struct read_ahead *table;
static const struct read_ahead_reach reach = {.start_pages = START, .most_pages = MOST};
static struct read_ahead_plan plan; /* of the last fault */

/* Returns how many pages it brings; all of [run_start, page) are received. */
static uint64_t fault_after(uint32_t tid, uint64_t page, uint64_t run_start)
{
    read_ahead_note(table, tid, page, run_start, &reach, &plan);
    CHECK(plan.start <= plan.end && plan.near_end > page);
    return plan.end - plan.start;
}

static uint64_t fault(uint32_t tid, uint64_t page)
{
    return fault_after(tid, page, page);
}

/* Faults at pages from page on until the stream has opened; returns where its thread faults next. */
static uint64_t open_at(uint32_t tid, uint64_t page)
{
    CHECK(fault(tid, page) == 0);
    CHECK(fault(tid, page + 1) == 0);
    CHECK(fault(tid, page + 2) == START);
    return plan.end;
}

static void two_faults_in_a_row_open_a_stream(void)
{
    CHECK(open_at(A, 10) == 13 + START);
    CHECK(plan.start == 13 && plan.near_end == plan.end);
}

static void window_doubles_up_to_the_most(void)
{
    uint64_t next = open_at(A, 0);

    for (uint64_t window = START * 2; window <= MOST * 4; window *= 2) {
        CHECK(fault(A, next) == (window < MOST ? window : MOST));
        CHECK(plan.start == next + 1);
        next = plan.end;
    }
}

static void fault_elsewhere_brings_nothing(void)
{
    open_at(A, 0);
    CHECK(fault(A, FAR) == 0 && plan.near_end == FAR + 1);
    CHECK(fault(A, FAR + 1) == 0 && plan.near_end == FAR + 2);
}

static void fault_before_the_stream_brings_nothing(void)
{
    open_at(A, 100);
    CHECK(fault(A, 99) == 0 && plan.near_end == 100);
    CHECK(fault(A, 98) == 0);
    CHECK(fault(A, 97) == 0);
}

static void every_second_page_is_no_stream(void)
{
    for (uint64_t page = 0; page < 100; page += 2)
        CHECK(fault(A, page) == 0 && plan.near_end == page + 1);
}

static void same_fault_again_changes_nothing(void)
{
    CHECK(fault(A, 0) == 0);
    for (int i = 0; i < 10; i++)
        CHECK(fault(A, 0) == 0);
    CHECK(fault(A, 1) == 0);
    CHECK(fault(A, 1) == 0);
    CHECK(fault(A, 2) == START);
    CHECK(fault(A, 2) == 0);
    CHECK(fault(A, 3 + START) == START * 2);
}

static void next_window_is_due_in_the_middle_of_the_last(void)
{
    uint64_t next = open_at(A, 0);

    while (fault(A, next) < MOST)
        next = plan.end;
    uint64_t start = plan.start, end = plan.end;
    CHECK(fault(A, start) == 0 && plan.near_end == end);
    CHECK(fault(A, start + MOST / 2 - 1) == 0);
    CHECK(fault(A, start + MOST / 2) == MOST);
    CHECK(plan.start == end && plan.end == end + MOST && plan.near_end == plan.end);
    CHECK(fault(A, start + MOST / 2 + 1) == 0);
    CHECK(fault(A, end) == 0);
    CHECK(fault(A, end + MOST / 2) == MOST);
}

static void what_others_brought_is_passed_over(void)
{
    uint64_t next = open_at(A, 0);

    CHECK(fault_after(A, next + 30, next) == START * 2 && plan.start == next + 31);
    next = plan.end;
    CHECK(fault_after(A, next + 30, next + 1) == 0); /* one page between is missing: it jumped */
}

static void two_arrays_walked_in_turns_are_two_streams(void)
{
    uint64_t low = 0, high = FAR, n_low = 0, n_high = 0;

    for (int i = 0; i < 10; i++) {
        n_low = fault(A, low);
        low = plan.near_end;
        n_high = fault(A, high);
        high = plan.near_end;
    }
    CHECK(n_low == MOST && n_high == MOST);
    CHECK(high - low == FAR);
}

static void threads_are_told_apart(void)
{
    CHECK(fault(A, 0) == 0);
    CHECK(fault(B, 1) == 0);
    CHECK(fault(A, 2) == 0);
    CHECK(fault(B, 3) == 0);
    CHECK(fault(A, 4) == 0);
}

static void thread_that_faults_anywhere_displaces_no_other(void)
{
    uint64_t next = open_at(A, 0);
    uint64_t begun = FAR;

    CHECK(fault(3, begun) == 0);
    for (uint64_t i = 0; i < READ_AHEAD_STREAMS * 4; i++)
        CHECK(fault(B, FAR * (2 + i)) == 0);
    CHECK(fault(A, next) == START * 2);
    CHECK(fault(3, begun + 1) == 0);
    CHECK(fault(3, begun + 2) == START);
}

static void thread_that_also_faults_anywhere_keeps_its_stream(void)
{
    uint64_t next = open_at(A, 0);

    for (uint64_t i = 0; i < 10; i++) {
        CHECK(fault(A, FAR * (1 + i)) == 0);
        CHECK(fault(A, next) > 0);
        next = plan.end;
    }
}

static void many_threads_that_fault_anywhere_displace_none_that_reads_on(void)
{
    uint64_t next = open_at(A, 0);

    for (uint32_t tid = 100; tid < 100 + READ_AHEAD_STREAMS * 4; tid++)
        CHECK(fault(tid, (uint64_t)tid * FAR) == 0);
    CHECK(fault(A, next) == START * 2);
}

static void threads_that_ended_make_room(void)
{
    for (uint32_t tid = 100; tid < 100 + READ_AHEAD_STREAMS * 4; tid++)
        CHECK(open_at(tid, (uint64_t)tid * FAR) > 0);
}

static void one_page_at_a_time_where_pages_are_large(void)
{
    static const struct read_ahead_reach one = {.start_pages = 1, .most_pages = 1};

    for (uint64_t page = 0; page < 20; page += page < 2 ? 1 : 2) {
        read_ahead_note(table, A, page, page, &one, &plan);
        CHECK(plan.end - plan.start == (page < 2 ? 0 : 1));
    }
}

static void *scan(void *argument)
{
    uint32_t tid = *(uint32_t *)argument;
    uint64_t page = (uint64_t)tid * FAR * FAR, expected = 0;
    struct read_ahead_plan mine;

    for (int i = 0; i < ROUNDS; i++) {
        read_ahead_note(table, tid, page, page, &reach, &mine);
        CHECK(mine.end - mine.start == expected);
        page = mine.end;
        expected = i == 0 ? 0 : i == 1 ? START : expected < MOST ? expected * 2 : MOST;
    }
    return NULL;
}

static void threads_at_the_same_time_get_what_each_would_alone(void)
{
    pthread_t threads[THREADS];
    uint32_t tids[THREADS];

    for (uint32_t i = 0; i < THREADS; i++) {
        tids[i] = i + 1;
        CHECK(pthread_create(&threads[i], NULL, scan, &tids[i]) == 0);
    }
    for (int i = 0; i < THREADS; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
}

static const struct {
    const char *name;
    void (*run)(void);
} cases[] = {
    {"two_faults_in_a_row_open_a_stream", two_faults_in_a_row_open_a_stream},
    {"window_doubles_up_to_the_most", window_doubles_up_to_the_most},
    {"fault_elsewhere_brings_nothing", fault_elsewhere_brings_nothing},
    {"fault_before_the_stream_brings_nothing", fault_before_the_stream_brings_nothing},
    {"every_second_page_is_no_stream", every_second_page_is_no_stream},
    {"same_fault_again_changes_nothing", same_fault_again_changes_nothing},
    {"next_window_is_due_in_the_middle_of_the_last", next_window_is_due_in_the_middle_of_the_last},
    {"what_others_brought_is_passed_over", what_others_brought_is_passed_over},
    {"two_arrays_walked_in_turns_are_two_streams", two_arrays_walked_in_turns_are_two_streams},
    {"threads_are_told_apart", threads_are_told_apart},
    {"thread_that_faults_anywhere_displaces_no_other", thread_that_faults_anywhere_displaces_no_other},
    {"thread_that_also_faults_anywhere_keeps_its_stream", thread_that_also_faults_anywhere_keeps_its_stream},
    {"many_threads_that_fault_anywhere_displace_none_that_reads_on",
     many_threads_that_fault_anywhere_displace_none_that_reads_on},
    {"threads_that_ended_make_room", threads_that_ended_make_room},
    {"one_page_at_a_time_where_pages_are_large", one_page_at_a_time_where_pages_are_large},
    {"threads_at_the_same_time_get_what_each_would_alone", threads_at_the_same_time_get_what_each_would_alone},
};

int main(int argc, char **argv)
{
    CHECK(read_ahead_new(&table) == 0);
    for (size_t i = 0; argc == 2 && i < sizeof(cases) / sizeof(*cases); i++) {
        if (strcmp(cases[i].name, argv[1]) == 0) {
            cases[i].run();
            read_ahead_free(table);
            return 0;
        }
    }
    fprintf(stderr, "usage: read_ahead_test CASE\n");
    return 1;
}
