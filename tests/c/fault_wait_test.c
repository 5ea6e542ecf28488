/* fault_wait_test: when a fault thread looks for an answer before it sleeps, and whom it lets rest meanwhile, a case a
 * run, named by the first argument.
 * Time is what this file says it is.
 *
 * Exit status: 0 the claim holds, 1 it does not (stderr says where).
 */
#define _GNU_SOURCE
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "fault_internal.h"
#include "remote_fd.h"

enum { MANY = 20000, NEAR_NS = 20000, FAR_NS = 2000000, LOOK_NS = 1000 };
enum { CPUS = 2, FEW_THREADS = 2, CROWD_THREADS = 5, HELPERS = CROWDS_RESTING_MAX + 4, STEADY = HELPERS - 1 };
enum { FAULT_NS = 8000, FAULTS = 100, NEVER = -1, WORKERS = 8 };

#define CHECK(condition) ((condition) ? (void)0 : fail(#condition, __LINE__))

static void fail(const char *what, int line)
{
    fprintf(stderr, "fault_wait_test.c:%d: %s\n", line, what);
    exit(1);
}

static uint64_t now_ns, event_ns, event_data;
static int poll_fd = 3, sleeps, looks, is_polled[HELPERS], is_gone[HELPERS], n_held, beside_others = 1;
static uint64_t next_fault_ns; /* of helper 1, whose faults others answer; 0: none */
static struct remote_fd helpers[HELPERS];
static struct served_block block_served = {.taker = TAKER_ANY};
static int is_answer_polled[WORKERS] = {1, 0, 1, 0, 1, 0, 1, 0};

uint64_t clock_ns(void)
{
    return now_ns;
}

struct served_block *served_block_of(struct fault_threads *ft, const struct ramblock *block)
{
    (void)ft;
    (void)block;
    return &block_served;
}

int page_channel_poll_fd(struct page_channel *channel)
{
    (void)channel;
    return poll_fd;
}

/* A helper's id is its number. */
struct remote_fd *remote_by_id(struct fault_threads *ft, uint32_t id)
{
    (void)ft;
    CHECK(id < HELPERS);
    n_held += !is_gone[id];
    return is_gone[id] ? NULL : &helpers[id];
}

void remote_fd_put(struct remote_fd *remote)
{
    (void)remote;
    n_held--;
}

void change_polling(struct fault_worker *worker, struct remote_fd *remote, int polls)
{
    (void)worker;
    CHECK(!is_gone[remote->id]);
    is_polled[remote->id] = polls;
}

void change_polling_channel(struct fault_worker *worker, struct served_block *served, int polls)
{
    CHECK(served == &block_served && worker->number < WORKERS && polls_anywhere(worker));
    is_answer_polled[worker->number] = polls;
}

int is_beside_others(const struct fault_threads *ft, uint64_t now)
{
    (void)ft;
    (void)now;
    return beside_others;
}

int ppoll(struct pollfd *polled, nfds_t n, const struct timespec *timeout, const __sigset_t *mask)
{
    (void)polled;
    CHECK(n == 1 && !mask);
    CHECK(timeout->tv_sec == 0 && timeout->tv_nsec >= 0);
    uint64_t end_ns = now_ns + (uint64_t)timeout->tv_nsec;
    sleeps++;
    if (event_ns >= end_ns)
        now_ns = end_ns;
    else if (event_ns > now_ns)
        now_ns = event_ns;
    return now_ns >= event_ns;
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
        if (next_fault_ns && now_ns >= next_fault_ns) {
            helpers[1].home_fault_ns = now_ns;
            next_fault_ns += FAULT_NS;
        }
    }
    if (now_ns < event_ns)
        return 0;
    events[0] = (struct epoll_event){.events = EPOLLIN, .data.u64 = event_data};
    return 1;
}

static struct fault_threads threads = {.demand_in_flight = 1, .n_cpus = CPUS};
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

static void begin_workers(void)
{
    threads.n_workers = WORKERS;
    for (uint32_t i = 0; i < WORKERS; i++)
        threads.workers[i] = (struct fault_worker){.ft = &threads, .number = i, .cpu = (int32_t)i, .epoll_fd = 7};
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
    begin_workers();
    worker.number = 1; /* others do */
    CHECK(ask_and_wait(NEAR_NS) == 0 && sleeps == 1);
}

static void rest_of_an_answer_is_met_awake_too(void)
{
    for (int i = 0; i < MANY; i++) {
        CHECK(ask_and_wait(NEAR_NS) > 0 && sleeps == 0);
        wait_note_answer(&worker);
        CHECK(wait_for(POLL_CHANNEL, NEAR_NS) == NEAR_NS / LOOK_NS && sleeps == 0);
        threads.demand_in_flight = 0; /* that was all of it */
        wait_note_answer(&worker);
        CHECK(wait_for(POLL_UFFD, NEAR_NS) == 0 && sleeps == 1);
        threads.demand_in_flight = 1;
    }
    threads.demand_in_flight = 2; /* what is in flight may be another page */
    wait_note_answer(&worker);
    CHECK(wait_for(POLL_CHANNEL, NEAR_NS) == 0 && sleeps == 1);
    wait_note_fault(&worker, &remote); /* but who has asked, and in the same round met an answer, looks */
    wait_note_answer(&worker);
    CHECK(wait_for(POLL_CHANNEL, NEAR_NS) > 0 && sleeps == 0);
}

/* How many fault threads poll for answers; that one does. */
static int pollers_with(uint32_t number)
{
    int n = 0;

    for (uint32_t i = 0; i < WORKERS; i++)
        n += is_answer_polled[i];
    CHECK(is_answer_polled[number]);
    return n;
}

static void ask_as(uint32_t number, int times)
{
    for (int i = 0; i < times; i++)
        wait_note_fault(&threads.workers[number], &remote);
}

static void who_asks_alone_takes_the_answers(void)
{
    begin_workers();
    beside_others = 0;
    ask_as(2, 5);
    CHECK(pollers_with(2) == WORKERS / 2 && threads.workers[2].awaits_answer);
    ask_as(2, FAULTS);
    CHECK(pollers_with(2) == 1 && threads.workers[2].awaits_answer);
    ask_as(1, 1); /* at once: nobody shall wait for the other */
    CHECK(pollers_with(0) == WORKERS / 2 && !threads.workers[1].awaits_answer);
    ask_as(1, FAULTS); /* it polls for no answers */
    CHECK(pollers_with(0) == WORKERS / 2 && !threads.workers[1].awaits_answer);
    for (int i = 0; i < FAULTS; i++) {
        ask_as(2, 5);
        ask_as(4, 5);
        CHECK(pollers_with(4) == WORKERS / 2);
    }
}

static void nobody_takes_answers_alone_beside_others(void)
{
    begin_workers();
    ask_as(2, FAULTS);
    CHECK(pollers_with(2) == WORKERS / 2 && threads.workers[2].awaits_answer);
    beside_others = 0;
    ask_as(2, 1);
    CHECK(pollers_with(2) == 1);
    beside_others = 1;
    ask_as(2, 1);
    CHECK(pollers_with(2) == WORKERS / 2 && threads.workers[2].awaits_answer);
}

static void nobody_takes_answers_from_who_is_changing_that(void)
{
    begin_workers();
    beside_others = 0;
    block_served.taker_moves = 1; /* as until all know the channel */
    ask_as(2, FAULTS);
    CHECK(pollers_with(2) == WORKERS / 2 && threads.workers[2].awaits_answer);
    block_served.taker_moves = 0;
    ask_as(2, 1);
    CHECK(pollers_with(2) == 1);
    block_served.taker_moves = 1;
    ask_as(4, 1);
    CHECK(pollers_with(2) == 1 && !threads.workers[4].awaits_answer);
}

static void nobody_looks_for_answers_of_a_source_that_pushes(void)
{
    begin_workers();
    beside_others = 0;
    block_served.pushes = 1;
    ask_as(2, FAULTS);
    CHECK(pollers_with(2) == WORKERS / 2 && !threads.workers[2].awaits_answer);
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

/* ---- crowds ---- */

static int has_steady = 1;

static void begin_crowds(void)
{
    threads.demand_in_flight = 0;
    now_ns = 1000000000;
    for (uint32_t i = 0; i < HELPERS; i++) {
        helpers[i] = (struct remote_fd){.id = i, .home_cpu = -1};
        is_polled[i] = 1;
    }
}

/* A thread of the helper has faulted, beside one that faults now and then, and something else is there already. Whether
 * it was answered. */
static int fault(struct remote_fd *helper, uint32_t tid)
{
    struct epoll_event events[4];

    if (has_steady)
        crowd_note_fault(&threads, &helpers[STEADY], 7, now_ns);
    event_data = (uint64_t)POLL_UFFD << POLL_KIND_SHIFT;
    event_ns = now_ns;
    CHECK(wait_for_events(&worker, events, 4) == 1);
    CHECK(is_polled[helper->id]);
    if (crowd_must_rest(&worker, helper, now_ns))
        return 0;
    now_ns += FAULT_NS;
    crowd_note_fault(&threads, helper, tid, now_ns);
    crowd_note_answered(&worker, helper, now_ns - FAULT_NS);
    return 1;
}

/* As many of them, their threads in turns, as are answered in a row, FAULTS at most. */
static int faults_in_a_row(struct remote_fd *helper, uint32_t n_threads)
{
    int n = 0;

    while (n < FAULTS && fault(helper, 1000 + (uint32_t)n % n_threads))
        n++;
    return n;
}

static void be_crowd(struct remote_fd *helper)
{
    for (uint32_t i = 0; i < CROWD_THREADS; i++)
        crowd_note_fault(&threads, helper, 1000 + i, now_ns);
    CHECK(is_crowd(helper, now_ns) && has_crowd(&threads, now_ns));
}

/* Nothing happens for so long; NEVER: until somebody rests no more. How long it slept. */
static uint64_t sleep_for(int64_t later_ns)
{
    struct epoll_event events[4];
    uint64_t begin_ns = now_ns;

    event_ns = later_ns == NEVER ? UINT64_MAX : now_ns + (uint64_t)later_ns;
    CHECK(wait_for_events(&worker, events, 4) == (later_ns != NEVER));
    return now_ns - begin_ns;
}

static void crowd_rests_after_its_turn(void)
{
    begin_crowds();
    CHECK(faults_in_a_row(&helpers[1], CROWD_THREADS) > CROWD_THREADS);
    for (int i = 0; i < 3; i++) {
        CHECK(!is_polled[1] && worker.n_resting == 1);
        uint64_t slept_ns = sleep_for(NEVER);
        CHECK(slept_ns > 2 * FAULT_NS && slept_ns < 100000);
        int n = faults_in_a_row(&helpers[1], CROWD_THREADS); /* the first of them ends the rest */
        CHECK(n > 1 && n < FAULTS / 4);
    }
    sleep_for(NEVER);
    now_ns += 200000000; /* much later it may be none */
    CHECK(!is_crowd(&helpers[1], now_ns) && !has_crowd(&threads, now_ns));
}

static void crowds_do_not_rest_among_themselves(void)
{
    begin_crowds();
    has_steady = 0;
    for (int i = 0; i < 4; i++) { /* until what they did before they were crowds counts no more */
        be_crowd(&helpers[1]);
        be_crowd(&helpers[2]);
        now_ns += 50000000;
    }
    CHECK(faults_in_a_row(&helpers[1], CROWD_THREADS) == FAULTS);
    crowd_note_fault(&threads, &helpers[STEADY], 7, now_ns);
    CHECK(faults_in_a_row(&helpers[2], CROWD_THREADS) == 0);
}

static void what_others_take_is_not_a_crowds_turn(void)
{
    begin_crowds();
    be_crowd(&helpers[1]);
    for (int i = 0; i < 3; i++) {
        CHECK(fault(&helpers[1], 1000));
        CHECK(faults_in_a_row(&helpers[2], 1) == FAULTS);
    }
    be_crowd(&helpers[1]);
    CHECK(faults_in_a_row(&helpers[1], CROWD_THREADS) < 3);
}

static void few_threads_never_rest(void)
{
    begin_crowds();
    CHECK(faults_in_a_row(&helpers[1], FEW_THREADS) == FAULTS);
    be_crowd(&helpers[2]); /* and neither beside others that do */
    CHECK(faults_in_a_row(&helpers[2], CROWD_THREADS) < FAULTS && !is_polled[2]);
    CHECK(faults_in_a_row(&helpers[1], FEW_THREADS) == FAULTS);
}

static void threads_that_fault_seldom_are_no_crowd(void)
{
    begin_crowds();
    for (uint32_t i = 0; i < FAULTS; i++) {
        crowd_note_fault(&threads, &helpers[1], 1000 + i, now_ns);
        now_ns += 6000000;
        CHECK(!is_crowd(&helpers[1], now_ns));
    }
}

static void many_cpus_run_many_threads(void)
{
    begin_crowds();
    threads.n_cpus = CROWD_THREADS;
    CHECK(faults_in_a_row(&helpers[1], CROWD_THREADS) == FAULTS);
    threads.n_cpus = 1000;
    CHECK(faults_in_a_row(&helpers[1], FAULTS) == FAULTS);
}

static void crowd_that_leaves_time_to_wait_does_not_rest(void)
{
    begin_crowds();
    be_crowd(&helpers[1]);
    for (uint32_t i = 0; i < FAULTS; i++) {
        CHECK(fault(&helpers[1], 1000 + i % CROWD_THREADS));
        sleep_for(FAULT_NS);
    }
}

static void rest_ends_with_others_events_coming(void)
{
    begin_crowds();
    be_crowd(&helpers[1]);
    (void)faults_in_a_row(&helpers[1], CROWD_THREADS);
    for (int i = 0; i < FAULTS && !is_polled[1]; i++) {
        CHECK(fault(&helpers[2], 7));
        sleep_for(1000);
    }
    CHECK(is_polled[1] && worker.n_resting == 0);
}

static void more_crowds_than_are_kept_go_on(void)
{
    begin_crowds();
    for (int i = 0; i < HELPERS; i++)
        be_crowd(&helpers[i]);
    (void)faults_in_a_row(&helpers[0], CROWD_THREADS);
    for (int i = 1; i < CROWDS_RESTING_MAX; i++)
        CHECK(crowd_must_rest(&worker, &helpers[i], now_ns) && !is_polled[i]);
    CHECK(!crowd_must_rest(&worker, &helpers[CROWDS_RESTING_MAX], now_ns) && is_polled[CROWDS_RESTING_MAX]);
    sleep_for(NEVER);
    sleep_for(FAULT_NS);
    for (int i = 0; i < HELPERS; i++)
        CHECK(is_polled[i]);
    CHECK(n_held == 0);
}

static void who_goes_while_it_rests_is_forgotten(void)
{
    begin_crowds();
    be_crowd(&helpers[1]);
    be_crowd(&helpers[2]);
    (void)faults_in_a_row(&helpers[1], CROWD_THREADS);
    CHECK(faults_in_a_row(&helpers[2], CROWD_THREADS) == 0);
    is_gone[1] = 1;
    sleep_for(NEVER);
    CHECK(fault(&helpers[3], 7)); /* which ends the rest */
    CHECK(!is_polled[1] && is_polled[2] && worker.n_resting == 0 && n_held == 0);
}

static void who_has_another_home_meanwhile_is_not_polled_again(void)
{
    struct fault_worker *workers = threads.workers;

    begin_crowds();
    threads.n_workers = 2;
    workers[1].cpu = worker.cpu + 1;
    for (int i = 1; i <= 3; i++)
        be_crowd(&helpers[i]);
    (void)faults_in_a_row(&helpers[1], CROWD_THREADS);
    CHECK(crowd_must_rest(&worker, &helpers[2], now_ns) && crowd_must_rest(&worker, &helpers[3], now_ns));
    helpers[1].home_cpu = workers[1].cpu;
    helpers[2].home_cpu = worker.cpu;
    helpers[3].home_cpu = workers[1].cpu;
    helpers[3].home_moves = 1; /* to where it is not known: rather polled twice than never */
    sleep_for(NEVER);
    CHECK(fault(&helpers[4], 7));
    CHECK(!is_polled[1] && is_polled[2] && is_polled[3]);
    CHECK(!helpers[1].home_moves && !helpers[2].home_moves && helpers[3].home_moves);
}

static void nobody_looks_for_an_answer_while_a_crowd_rests(void)
{
    begin_crowds();
    be_crowd(&helpers[1]);
    (void)faults_in_a_row(&helpers[1], CROWD_THREADS);
    threads.demand_in_flight = 1;
    wait_note_fault(&worker, &remote);
    looks = sleeps = 0;
    CHECK(sleep_for(NEVER) > 0 && sleeps == 1 && looks == 1); /* that one when it wakes */
}

static void crowd_is_drained_now_and_then(void)
{
    begin_crowds();
    CHECK(!crowd_begin_drain(&helpers[1], now_ns));
    be_crowd(&helpers[1]);
    CHECK(crowd_begin_drain(&helpers[1], now_ns));
    CHECK(!crowd_begin_drain(&helpers[1], now_ns)); /* another worker */
    for (uint32_t n = 0; n < 300; n += 50) {
        uint64_t begin_ns = now_ns;

        crowd_end_drain(&helpers[1], now_ns, n);
        for (; !crowd_begin_drain(&helpers[1], now_ns); now_ns += 1000000)
            be_crowd(&helpers[1]);
        CHECK(now_ns - begin_ns >= 10000000 && now_ns - begin_ns >= n * 1000000ull);
        CHECK(now_ns - begin_ns <= 10000000 + n * 1000000ull);
    }
}

/* ---- a helper that leaves the CPU ---- */

enum {
    FAR_WAKE_NS = 8000,
    NEAR_WAKE_NS = 1500,
    AWAKE_NS = 4000000,
    AWAKE_FAULT_NS = 200000,
    LONG_NS = 100000000,
    OTHERS_TID = 1
};

static struct status_helper status;
static int32_t here; /* the CPU that this runs on: the helper's, whenever somebody looks */

/* The first fault thread, on another CPU, is the home of helper 1; the second one is on its CPU. */
static void begin_leaving(void)
{
    cpu_set_t set;

    here = sched_getcpu();
    CPU_ZERO(&set);
    CPU_SET((size_t)here, &set);
    CHECK(here >= 0 && sched_setaffinity(0, sizeof(set), &set) == 0);
    begin_crowds();
    begin_workers();
    beside_others = 0;
    threads.n_workers = 2;
    threads.workers[0].cpu = here + 1;
    threads.workers[1].cpu = here;
    status.pid = (uint32_t)getpid();
    helpers[1].status = &status;
    helpers[1].home_tid = status.pid;
    helpers[1].home_cpu = here + 1;
}

static void note_wake(uint32_t tid, uint64_t wake_ns)
{
    if (!home_may_leave(&threads.workers[0], &helpers[1], tid, now_ns))
        return;
    now_ns += wake_ns;
    home_note_wake(&threads.workers[0], &helpers[1], now_ns - wake_ns);
}

/* The first fault thread waits for something that comes so much later. How long it stayed awake. */
static uint64_t wait_awake(uint64_t later_ns)
{
    struct epoll_event events[4];

    looks = sleeps = 0;
    event_data = (uint64_t)POLL_CONTROL << POLL_KIND_SHIFT;
    event_ns = now_ns + later_ns;
    CHECK(wait_for_events(&threads.workers[0], events, 4) == 1 && n_held == 0);
    CHECK(!helpers[1].home_moves && !threads.workers[0].left_id);
    return (uint64_t)looks * LOOK_NS;
}

/* It wakes the helper's thread before, which takes so long. */
static uint64_t wake_and_wait(uint64_t wake_ns, uint64_t later_ns)
{
    note_wake(status.pid, wake_ns);
    return wait_awake(later_ns);
}

static int is_followed(void)
{
    return helpers[1].home_cpu == here;
}

static void come_back(void)
{
    helpers[1].home_cpu = here + 1;
    now_ns += 2 * AWAKE_NS;
}

static void who_was_woken_on_another_cpu_is_followed(void)
{
    begin_leaving();
    CHECK(wake_and_wait(NEAR_WAKE_NS, FAR_NS) == 0 && sleeps == 1 && !is_followed());
    uint64_t awake_ns = wake_and_wait(FAR_WAKE_NS, FAR_NS); /* it does not fault again */
    CHECK(is_followed() && sleeps == 1 && awake_ns >= AWAKE_FAULT_NS && awake_ns < 2 * AWAKE_FAULT_NS);
    CHECK(wake_and_wait(FAR_WAKE_NS, FAR_NS) == 0); /* it is not at home here */
    come_back();
    next_fault_ns = now_ns;
    awake_ns = wake_and_wait(FAR_WAKE_NS, 2 * AWAKE_NS);
    CHECK(is_followed() && sleeps == 1 && awake_ns >= AWAKE_NS && awake_ns < 2 * AWAKE_NS);
    come_back();
    awake_ns = wake_and_wait(FAR_WAKE_NS, FAR_NS); /* what happens first ends it */
    CHECK(is_followed() && sleeps == 0 && awake_ns >= FAR_NS && awake_ns < 2 * FAR_NS);
}

static void who_is_still_here_is_not_followed(void)
{
    begin_leaving();
    CHECK(wake_and_wait(FAR_WAKE_NS, 0) == LOOK_NS && !is_followed()); /* it has faulted here */
    threads.workers[0].cpu = helpers[1].home_cpu = here;
    threads.workers[1].cpu = here + 1;
    CHECK(wake_and_wait(FAR_WAKE_NS, FAR_NS) == LOOK_NS && sleeps == 1 && is_followed());
    int n_looked = 0;
    for (int i = 0; i < MANY; i++) { /* each wake-up takes long: a look costs more than it brings */
        uint64_t looked_ns = helpers[1].home_look_ns;
        (void)wake_and_wait(FAR_WAKE_NS, FAULT_NS);
        n_looked += helpers[1].home_look_ns != looked_ns;
    }
    CHECK(n_looked > 10 && n_looked < 30);
}

static void other_threads_of_it_are_not_followed(void)
{
    begin_leaving();
    note_wake(OTHERS_TID, FAR_WAKE_NS);
    CHECK(wait_awake(FAR_NS) == 0 && !is_followed());
}

static void who_has_nowhere_to_go_is_not_waited_for(void)
{
    begin_leaving();
    threads.workers[1].cpu = here + 2; /* no fault thread where it is now */
    CHECK(wake_and_wait(FAR_WAKE_NS, FAR_NS) == LOOK_NS && sleeps == 1 && helpers[1].home_cpu == -1);
    threads.workers[0].cpu = -1;
    CHECK(wake_and_wait(FAR_WAKE_NS, FAR_NS) == 0);
}

static void nobody_is_followed_beside_others(void)
{
    begin_leaving();
    beside_others = 1;
    CHECK(wake_and_wait(FAR_WAKE_NS, FAR_NS) == 0 && !is_followed());
    beside_others = 0;
    note_wake(status.pid, FAR_WAKE_NS);
    beside_others = 1; /* meanwhile */
    CHECK(wait_awake(FAR_NS) == LOOK_NS && sleeps == 1 && !is_followed());
}

static void who_moves_meanwhile_or_is_gone_is_not_followed(void)
{
    begin_leaving();
    note_wake(status.pid, FAR_WAKE_NS);
    helpers[1].home_moves = 1; /* somebody looks already */
    CHECK(!home_follow(&threads.workers[0]) && !is_followed());
    helpers[1].home_moves = 0;
    helpers[1].home_cpu = here + 2; /* and has found it */
    CHECK(!home_follow(&threads.workers[0]) && !is_followed());
    is_gone[1] = 1;
    CHECK(!home_follow(&threads.workers[0]) && n_held == 0);
}

static void reason_to_stay_awake_may_go(void)
{
    begin_leaving();
    helpers[1].home_cpu = here;
    helpers[1].home_fault_ns = now_ns;
    CHECK(home_keeps_awake(&threads.workers[0], &helpers[1], now_ns, now_ns));
    beside_others = 1;
    CHECK(!home_keeps_awake(&threads.workers[0], &helpers[1], now_ns, now_ns));
    beside_others = 0;
    helpers[1].home_cpu = here + 1; /* it is back */
    CHECK(!home_keeps_awake(&threads.workers[0], &helpers[1], now_ns, now_ns));
    helpers[1].home_cpu = -1;
    CHECK(!home_keeps_awake(&threads.workers[0], &helpers[1], now_ns, now_ns));
}

static void who_does_not_stay_is_followed_more_and_more_seldom(void)
{
    int n_followed = 0;

    begin_leaving();
    for (int i = 0; i < MANY; i++) {
        CHECK(wake_and_wait(FAR_WAKE_NS, FAULT_NS) <= FAULT_NS);
        n_followed += is_followed();
        helpers[1].home_cpu = here + 1;
    }
    CHECK(n_followed > 10 && n_followed < 30);
    for (int i = 0; i < 2; i++) { /* the second time it has stayed */
        come_back();
        CHECK(wake_and_wait(FAR_WAKE_NS, FAULT_NS) == 0 && !is_followed());
        now_ns += LONG_NS;
        CHECK(wake_and_wait(FAR_WAKE_NS, FAULT_NS) > 0 && is_followed());
    }
    come_back();
    CHECK(wake_and_wait(FAR_WAKE_NS, FAULT_NS) > 0 && is_followed());
}

#define CASE(name) {#name, name}

static const struct {
    const char *name;
    void (*run)(void);
} cases[] = {
    CASE(near_answer_is_met_awake),
    CASE(who_has_asked_for_nothing_sleeps_at_once),
    CASE(source_whose_answers_are_not_polled_for_is_not_looked_for),
    CASE(rest_of_an_answer_is_met_awake_too),
    CASE(who_asks_alone_takes_the_answers),
    CASE(nobody_takes_answers_alone_beside_others),
    CASE(nobody_takes_answers_from_who_is_changing_that),
    CASE(nobody_looks_for_answers_of_a_source_that_pushes),
    CASE(far_answers_are_hardly_ever_looked_for),
    CASE(answers_that_come_soon_again_are_found_out),
    CASE(other_events_teach_nothing),
    CASE(crowd_rests_after_its_turn),
    CASE(few_threads_never_rest),
    CASE(threads_that_fault_seldom_are_no_crowd),
    CASE(many_cpus_run_many_threads),
    CASE(crowd_that_leaves_time_to_wait_does_not_rest),
    CASE(rest_ends_with_others_events_coming),
    CASE(more_crowds_than_are_kept_go_on),
    CASE(who_goes_while_it_rests_is_forgotten),
    CASE(crowds_do_not_rest_among_themselves),
    CASE(what_others_take_is_not_a_crowds_turn),
    CASE(who_has_another_home_meanwhile_is_not_polled_again),
    CASE(nobody_looks_for_an_answer_while_a_crowd_rests),
    CASE(crowd_is_drained_now_and_then),
    CASE(who_was_woken_on_another_cpu_is_followed),
    CASE(who_is_still_here_is_not_followed),
    CASE(other_threads_of_it_are_not_followed),
    CASE(who_has_nowhere_to_go_is_not_waited_for),
    CASE(nobody_is_followed_beside_others),
    CASE(who_moves_meanwhile_or_is_gone_is_not_followed),
    CASE(reason_to_stay_awake_may_go),
    CASE(who_does_not_stay_is_followed_more_and_more_seldom),
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
