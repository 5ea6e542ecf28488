/* fault_wait_test: when a fault thread looks for an answer before it sleeps, a case a run, named by the first argument.
 * Time is what this file says it is.
 *
 * Exit status: 0 the claim holds, 1 it does not (stderr says where).
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fault_internal.h"
#include "remote_fd.h"

enum { MANY = 20000, NEAR_NS = 20000, FAR_NS = 2000000, LOOK_NS = 1000 };

#define CHECK(condition) ((condition) ? (void)0 : fail(#condition, __LINE__))

static void fail(const char *what, int line)
{
    fprintf(stderr, "fault_wait_test.c:%d: %s\n", line, what);
    exit(1);
}

static uint64_t now_ns, event_ns, event_data;
static int poll_fd = 3, polls_channels = 1, sleeps, looks;

uint64_t clock_ns(void)
{
    return now_ns;
}

struct served_block *served_block_of(struct fault_threads *ft, const struct ramblock *block)
{
    static struct served_block served;

    (void)ft;
    (void)block;
    return &served;
}

int polls_anywhere(const struct fault_worker *worker)
{
    (void)worker;
    return polls_channels;
}

int page_channel_poll_fd(struct page_channel *channel)
{
    (void)channel;
    return poll_fd;
}

int epoll_wait(int fd, struct epoll_event *events, int most, int timeout_ms)
{
    CHECK(fd == 7 && most > 0);
    if (timeout_ms < 0) {
        sleeps++;
        now_ns = event_ns > now_ns ? event_ns : now_ns;
    } else {
        CHECK(timeout_ms == 0);
        looks++;
        now_ns += LOOK_NS;
    }
    if (now_ns < event_ns)
        return 0;
    events[0] = (struct epoll_event){.events = EPOLLIN, .data.u64 = event_data};
    return 1;
}

static struct fault_threads threads = {.demand_in_flight = 1};
static struct fault_worker worker = {.ft = &threads, .epoll_fd = 7};
static const struct remote_fd remote;

/* Waits for an event of this kind that comes so much later; how often it looked before it slept. */
static int wait_for(uint64_t kind, uint64_t later_ns)
{
    struct epoll_event events[4];

    looks = sleeps = 0;
    event_data = kind << POLL_KIND_SHIFT;
    event_ns = now_ns + later_ns;
    CHECK(wait_for_events(&worker, events, 4) == 1);
    CHECK(events[0].data.u64 == event_data);
    return looks;
}

static int ask_and_wait(uint64_t later_ns)
{
    wait_note_fault(&worker, &remote);
    return wait_for(POLL_CHANNEL, later_ns);
}

static void near_answer_is_met_awake(void)
{
    for (int i = 0; i < MANY; i++)
        CHECK(ask_and_wait(NEAR_NS) == NEAR_NS / LOOK_NS && sleeps == 0);
}

static void who_has_asked_for_nothing_sleeps_at_once(void)
{
    CHECK(wait_for(POLL_UFFD, NEAR_NS) == 0 && sleeps == 1);
    CHECK(ask_and_wait(NEAR_NS) > 0);
    CHECK(wait_for(POLL_UFFD, NEAR_NS) == 0 && sleeps == 1); /* that was answered */
    threads.demand_in_flight = 0;
    CHECK(ask_and_wait(NEAR_NS) == 0 && sleeps == 1);
}

static void source_whose_answers_are_not_polled_for_is_not_looked_for(void)
{
    poll_fd = -1;
    CHECK(ask_and_wait(NEAR_NS) == 0 && sleeps == 1);
    poll_fd = 3;
    polls_channels = 0; /* others do */
    CHECK(ask_and_wait(NEAR_NS) == 0 && sleeps == 1);
}

static void far_answers_are_hardly_ever_looked_for(void)
{
    int n_looked = 0;

    for (int i = 0; i < MANY; i++) {
        n_looked += ask_and_wait(FAR_NS) > 0;
        CHECK(sleeps == 1);
    }
    CHECK(n_looked > 10 && n_looked < 20);
}

static void answers_that_come_soon_again_are_found_out(void)
{
    far_answers_are_hardly_ever_looked_for();
    for (int i = 0; i < MANY; i++)
        ask_and_wait(NEAR_NS);
    near_answer_is_met_awake();
}

static void other_events_teach_nothing(void)
{
    CHECK(ask_and_wait(FAR_NS) > 0); /* in vain: the next one is left out */
    CHECK(ask_and_wait(FAR_NS) == 0);
    wait_note_fault(&worker, &remote);
    CHECK(wait_for(POLL_UFFD, NEAR_NS) > 0 && sleeps == 0);
    CHECK(ask_and_wait(FAR_NS) > 0);
    CHECK(ask_and_wait(FAR_NS) == 0); /* one would be left out now, had that been an answer; two are */
    CHECK(ask_and_wait(FAR_NS) == 0);
    CHECK(ask_and_wait(FAR_NS) > 0);
}

#define CASE(name) {#name, name}

static const struct {
    const char *name;
    void (*run)(void);
} cases[] = {
    CASE(near_answer_is_met_awake),
    CASE(who_has_asked_for_nothing_sleeps_at_once),
    CASE(source_whose_answers_are_not_polled_for_is_not_looked_for),
    CASE(far_answers_are_hardly_ever_looked_for),
    CASE(answers_that_come_soon_again_are_found_out),
    CASE(other_events_teach_nothing),
};

int main(int argc, char **argv)
{
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        if (argc == 2 && strcmp(argv[1], cases[i].name) == 0) {
            cases[i].run();
            return 0;
        }
    }
    fprintf(stderr, "fault_wait_test: no case %s\n", argc > 1 ? argv[1] : "");
    return 1;
}
