/* waiters_test: who waits for which page, a case a run, named by the first argument.
 *
 * Exit status: 0 the claim holds, 1 it does not (stderr says where).
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "waiters.h"

enum {
    PAGE = 4096,
    PAGES = 1000,
    REMOTES = 3,
    OWN = 2, /* which of the remote fds is the coordinator's */
    THREADS = 4,
    ROUNDS = 20000,
};

#define CHECK(condition) ((condition) ? (void)0 : fail(#condition, __LINE__))

static void fail(const char *what, int line)
{
    fprintf(stderr, "waiters_test.c:%d: %s\n", line, what);
    exit(1);
}

static struct waiters waiters;
static struct ramblock block = {.page_size = PAGE, .page_count = PAGES, .index = 0};
static struct ramblock other = {.page_size = PAGE, .page_count = PAGES, .index = 1};
static struct status_helper status[REMOTES];
static struct remote_fd *remotes[REMOTES];

static void make_remotes(void)
{
    struct remote_map map = {.client_addr = 1 << 30, .length = PAGES * PAGE, .page = 0};

    for (int i = 0; i < REMOTES; i++) {
        int uffd = open("/dev/null", O_RDONLY | O_CLOEXEC);
        CHECK(remote_fd_new(&remotes[i], &block, uffd, -1, &map, 1, i == OWN ? NULL : &status[i]) == 0);
    }
    remotes[OWN]->is_own = 1;
}

static int add(uint64_t page, int remote, uint32_t tid)
{
    return waiters_add(&waiters, &block, page, remotes[remote], tid, 1000 + page, 1);
}

/* Whom it is queued for is looked at by one case alone. */
static int next_unasked(struct ramblock *of, uint32_t *bucketp, uint64_t *pagep)
{
    struct remote_fd *remote;

    if (!waiters_next_unasked(&waiters, of, 1, bucketp, pagep, &remote))
        return 0;
    remote_fd_put(remote);
    return 1;
}

static int length(const struct waiter *list)
{
    int n = 0;

    for (; list; list = list->next)
        n++;
    return n;
}

/* How many were taken. */
static int take(uint64_t page, uint64_t n)
{
    struct waiter *list = waiters_take(&waiters, &block, page, n);
    int n_taken = length(list);

    waiters_free_list(list);
    return n_taken;
}

static void one_request_a_page(void)
{
    CHECK(add(5, 0, 1) == WAITERS_ASK);
    CHECK(add(5, 0, 2) == WAITERS_JOINED);
    CHECK(add(5, 1, 1) == WAITERS_JOINED);
    CHECK(add(6, 0, 1) == WAITERS_ASK);
    CHECK(waiters_add(&waiters, &other, 5, remotes[0], 1, 0, 1) == WAITERS_ASK);
    CHECK(waiters.entry_count == 3);
    CHECK(take(5, 1) == 3);
    CHECK(take(5, 1) == 0);
    CHECK(add(5, 0, 1) == WAITERS_ASK);
}

static void thread_that_faults_again_is_no_second_waiter(void)
{
    CHECK(add(5, 0, 1) == WAITERS_ASK);
    for (int i = 0; i < 100; i++)
        CHECK(waiters_add(&waiters, &block, 5, remotes[0], 1, 99999, 1) == WAITERS_JOINED);
    CHECK(status[0].waiting == 1);
    struct waiter *list = waiters_take(&waiters, &block, 5, 1);
    CHECK(length(list) == 1);
    CHECK(list->start_ns == 1005); /* since the first time */
    waiters_free_list(list);
    CHECK(status[0].waiting == 0);
}

static void range_is_taken_whole_and_nothing_beside_it(void)
{
    for (uint64_t page = 0; page < 20; page++)
        CHECK(add(page, 0, (uint32_t)page) == WAITERS_ASK);
    CHECK(take(5, 10) == 10);
    CHECK(status[0].waiting == 10);
    CHECK(take(0, PAGES) == 10);
    CHECK(waiters.entry_count == 0);
}

static void waiters_keep_their_remote_fd(void)
{
    CHECK(add(5, 0, 1) == WAITERS_ASK);
    CHECK(remotes[0]->references == 2);
    CHECK(take(5, 1) == 1);
    CHECK(remotes[0]->references == 1);
}

static void own_waiters_stay_where_others_are_told_of_a_loss(void)
{
    add(5, 0, 1);
    add(5, OWN, 2);
    struct waiter *list = waiters_take_remote(&waiters, &block, 5);
    CHECK(length(list) == 1 && list->remote == remotes[0]);
    waiters_free_list(list);
    CHECK(add(5, 0, 1) == WAITERS_ASK); /* the source may be asked again */
    CHECK(take(5, 1) == 2);
}

static void page_whose_source_failed_is_asked_for_again(void)
{
    add(5, 0, 1);
    add(5, 1, 2);
    waiters_unask(&waiters, &block, 5);
    waiters_unask(&waiters, &block, 77); /* nobody waits there */
    CHECK(status[0].waiting == 1 && status[1].waiting == 1);
    CHECK(add(5, 0, 3) == WAITERS_ASK);
    CHECK(add(5, 0, 4) == WAITERS_JOINED);
    CHECK(take(5, 1) == 4);
}

static void each_unasked_page_is_found_once(void)
{
    char found[PAGES] = {0};
    uint32_t bucket = 0;
    uint64_t page;
    int n = 0;

    for (uint64_t i = 0; i < PAGES; i++) {
        add(i, 0, 1);
        if (i % 3)
            waiters_unask(&waiters, &block, i);
    }
    CHECK(waiters_add(&waiters, &other, 1, remotes[1], 1, 0, 1) == WAITERS_ASK);
    waiters_unask(&waiters, &other, 1);
    while (next_unasked(&block, &bucket, &page)) {
        CHECK(page % 3 && !found[page]);
        found[page] = 1;
        n++;
    }
    CHECK(n == PAGES - (PAGES + 2) / 3);
    bucket = 0;
    CHECK(!next_unasked(&block, &bucket, &page));
    bucket = 0;
    CHECK(next_unasked(&other, &bucket, &page) && page == 1);
}

static void who_waits_without_asking_leaves_the_page_unasked(void)
{
    uint32_t bucket = 0;
    uint64_t page;

    CHECK(waiters_add(&waiters, &block, 5, remotes[0], 1, 0, 0) == WAITERS_ASK);
    CHECK(waiters_add(&waiters, &block, 5, remotes[1], 2, 0, 0) == WAITERS_ASK);
    CHECK(next_unasked(&block, &bucket, &page) && page == 5);
    bucket = 0;
    CHECK(!next_unasked(&block, &bucket, &page));
    CHECK(add(5, 0, 3) == WAITERS_JOINED); /* it was asked for when it was found */
    CHECK(waiters_add(&waiters, &block, 6, remotes[0], 1, 0, 0) == WAITERS_ASK);
    CHECK(add(6, 1, 2) == WAITERS_ASK);
    CHECK(waiters_add(&waiters, &block, 6, remotes[0], 4, 0, 0) == WAITERS_JOINED); /* nor does it take that back */
    bucket = 0;
    CHECK(!next_unasked(&block, &bucket, &page));
    CHECK(take(0, PAGES) == 6);
}

static int queue_page(uint64_t page, int remote, uint32_t tid, uint64_t now_ns)
{
    return waiters_add(&waiters, &block, page, remotes[remote], tid, now_ns, WAITERS_QUEUED);
}

static int claim(uint64_t page)
{
    return waiters_claim_queued(&waiters, &block, page, 0);
}

static void page_in_the_queue_of_one_is_asked_for_by_the_next(void)
{
    CHECK(queue_page(5, 0, 1, 0) == WAITERS_ASK);
    CHECK(queue_page(5, 0, 2, 0) == WAITERS_JOINED); /* in its own queue it is already */
    CHECK(queue_page(5, 1, 3, 0) == WAITERS_ASK);
    CHECK(queue_page(6, 0, 1, 0) == WAITERS_ASK);
    CHECK(add(6, 1, 3) == WAITERS_ASK);
    CHECK(queue_page(6, 0, 4, 0) == WAITERS_JOINED);
    CHECK(!claim(6) && !waiters_is_queued(&waiters, &block, 6)); /* the other has asked */
    CHECK(waiters_is_queued(&waiters, &block, 5) && claim(5));
    CHECK(!waiters_is_queued(&waiters, &block, 5) && !claim(5));
    CHECK(queue_page(5, 0, 7, 0) == WAITERS_JOINED);
    CHECK(take(0, PAGES) == 7);
    CHECK(!waiters_is_queued(&waiters, &block, 5) && !claim(5));
}

static void queue_that_goes_leaves_its_pages_to_who_else_waits(void)
{
    struct remote_fd *remote;
    uint32_t bucket = 0;
    uint64_t page;

    add(5, 1, 1);
    add(5, 0, 2);
    waiters_unask(&waiters, &block, 5);
    CHECK(waiters_next_unasked(&waiters, &block, 1, &bucket, &page, &remote) && page == 5);
    CHECK(remote == remotes[0] || remote == remotes[1]);
    CHECK(waiters_drop_remote(&waiters, remote) == 1);
    CHECK(!claim(5));
    struct remote_fd *other_one = remotes[remote == remotes[0]];
    remote_fd_put(remote);
    bucket = 0;
    CHECK(waiters_next_unasked(&waiters, &block, 1, &bucket, &page, &remote) && remote == other_one);
    remote_fd_put(remote);
    CHECK(claim(5));
    CHECK(take(5, 1) == 1);
}

static void page_is_late_once_until_it_is_asked_for_again(void)
{
    struct ramblock *late_block;
    uint32_t bucket = 0;
    uint64_t page;

    waiters_add(&waiters, &block, 5, remotes[0], 1, 100, WAITERS_ASKED);
    queue_page(6, 0, 2, 150);
    waiters_add(&waiters, &block, 7, remotes[0], 3, 100, WAITERS_UNASKED); /* somebody is placing it */
    CHECK(!waiters_next_late(&waiters, 99, &bucket, &late_block, &page));
    CHECK(!waiters_has_late(&waiters, &block));
    bucket = 0;
    CHECK(waiters_next_late(&waiters, 149, &bucket, &late_block, &page) && page == 5 && late_block == &block);
    CHECK(!waiters_next_late(&waiters, 149, &bucket, &late_block, &page));
    CHECK(waiters_has_late(&waiters, &block) && !waiters_has_late(&waiters, &other));
    bucket = 0;
    CHECK(!waiters_next_late(&waiters, 170, &bucket, &late_block, &page)); /* the time in the queue does not count */
    CHECK(waiters_claim_queued(&waiters, &block, 6, 180));
    bucket = 0;
    CHECK(!waiters_next_late(&waiters, 179, &bucket, &late_block, &page));
    bucket = 0;
    CHECK(waiters_next_late(&waiters, 180, &bucket, &late_block, &page) && page == 6);
    waiters_unask_late(&waiters, &block);
    CHECK(!waiters_has_late(&waiters, &block));
    CHECK(waiters_add(&waiters, &block, 5, remotes[1], 9, 200, WAITERS_ASKED) == WAITERS_ASK);
    bucket = 0;
    CHECK(!waiters_next_late(&waiters, 199, &bucket, &late_block, &page));
    CHECK(take(5, 1) == 2 && take(6, 2) == 2);
}

static void unasked_page_that_nobody_waits_for_is_forgotten(void)
{
    CHECK(waiters_add(&waiters, &block, 5, remotes[0], 1, 0, 0) == WAITERS_ASK);
    CHECK(waiters_drop_remote(&waiters, remotes[0]) == 1);
    CHECK(waiters.entry_count == 0);
    CHECK(add(5, 1, 2) == WAITERS_ASK);
    CHECK(take(5, 1) == 1);
}

static void remote_fd_that_goes_is_forgotten_and_no_other(void)
{
    for (uint64_t page = 0; page < 50; page++) {
        add(page, 0, 1);
        add(page, 0, 2);
        if (page % 2)
            add(page, 1, 3);
    }
    CHECK(waiters_drop_remote(&waiters, remotes[0]) == 100);
    CHECK(waiters_drop_remote(&waiters, remotes[0]) == 0);
    CHECK(remotes[0]->references == 1);
    CHECK(status[0].waiting == 0 && status[1].waiting == 25);
    CHECK(add(0, 1, 3) == WAITERS_JOINED); /* what was asked is still under way */
    CHECK(take(0, PAGES) == 26);
}

static void block_that_goes_is_forgotten_and_no_other(void)
{
    add(5, 0, 1);
    CHECK(waiters_add(&waiters, &other, 5, remotes[1], 1, 0, 1) == WAITERS_ASK);
    waiters_drop_block(&waiters, &block);
    CHECK(status[0].waiting == 0 && status[1].waiting == 1);
    CHECK(waiters.entry_count == 1);
    CHECK(take(5, 1) == 0);
}

/* Threads that add and take at once: whoever was noted is taken exactly once, by somebody. */
static uint64_t n_added, n_taken;

static void *add_and_take(void *argument)
{
    uint32_t tid = (uint32_t)(uintptr_t)argument, random = tid + 1;

    for (uint32_t i = 0; i < ROUNDS; i++) {
        random = random * 1664525 + 1013904223;
        uint64_t page = random >> 16 & 15;
        if (random >> 30) {
            uint32_t waiter_tid = tid * ROUNDS + i;
            CHECK(waiters_add(&waiters, &block, page, remotes[random >> 8 & 1], waiter_tid, 0, 1) > 0);
            __atomic_fetch_add(&n_added, 1, __ATOMIC_RELAXED);
        } else {
            __atomic_fetch_add(&n_taken, (uint64_t)take(page, 1 + (random >> 20 & 3)), __ATOMIC_RELAXED);
        }
    }
    return NULL;
}

static void nobody_is_lost_between_threads(void)
{
    pthread_t threads[THREADS];

    for (uintptr_t i = 0; i < THREADS; i++)
        CHECK(pthread_create(&threads[i], NULL, add_and_take, (void *)i) == 0);
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    n_taken += (uint64_t)take(0, 20);
    CHECK(n_taken == n_added);
    CHECK(status[0].waiting == 0 && status[1].waiting == 0);
    CHECK(waiters.entry_count == 0);
    CHECK(remotes[0]->references == 1 && remotes[1]->references == 1);
}

static const struct {
    const char *name;
    void (*run)(void);
} cases[] = {
    {"one_request_a_page", one_request_a_page},
    {"thread_that_faults_again_is_no_second_waiter", thread_that_faults_again_is_no_second_waiter},
    {"range_is_taken_whole_and_nothing_beside_it", range_is_taken_whole_and_nothing_beside_it},
    {"waiters_keep_their_remote_fd", waiters_keep_their_remote_fd},
    {"own_waiters_stay_where_others_are_told_of_a_loss", own_waiters_stay_where_others_are_told_of_a_loss},
    {"page_whose_source_failed_is_asked_for_again", page_whose_source_failed_is_asked_for_again},
    {"each_unasked_page_is_found_once", each_unasked_page_is_found_once},
    {"who_waits_without_asking_leaves_the_page_unasked", who_waits_without_asking_leaves_the_page_unasked},
    {"unasked_page_that_nobody_waits_for_is_forgotten", unasked_page_that_nobody_waits_for_is_forgotten},
    {"page_in_the_queue_of_one_is_asked_for_by_the_next", page_in_the_queue_of_one_is_asked_for_by_the_next},
    {"queue_that_goes_leaves_its_pages_to_who_else_waits", queue_that_goes_leaves_its_pages_to_who_else_waits},
    {"page_is_late_once_until_it_is_asked_for_again", page_is_late_once_until_it_is_asked_for_again},
    {"remote_fd_that_goes_is_forgotten_and_no_other", remote_fd_that_goes_is_forgotten_and_no_other},
    {"block_that_goes_is_forgotten_and_no_other", block_that_goes_is_forgotten_and_no_other},
    {"nobody_is_lost_between_threads", nobody_is_lost_between_threads},
};

int main(int argc, char **argv)
{
    for (size_t i = 0; argc == 2 && i < sizeof(cases) / sizeof(*cases); i++) {
        if (strcmp(cases[i].name, argv[1]) != 0)
            continue;
        waiters_init(&waiters);
        make_remotes();
        cases[i].run();
        waiters_deinit(&waiters);
        for (int j = 0; j < REMOTES; j++)
            remote_fd_put(remotes[j]);
        return 0;
    }
    fprintf(stderr, "waiters_test: no such case\n");
    return 1;
}
