/* flooding: too much of what is allowed. Slowed down or cut off, alone. */
#ifndef PCSHARE_HOSTILE_FLOODING_H
#define PCSHARE_HOSTILE_FLOODING_H

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>
#include "uffd.h"
#include "scene.h"

enum {
    FLOOD_REQUESTS = 20000,
    FLOOD_FAULTS_THREADS = 8,
    FLOOD_WAKES_MAX = 200000, /* in all; a page arrives long before */
    FLOOD_WAITS_MAX = 4096,   /* FAULT_DEMANDS_IN_FLIGHT_MAX: who waits for more pages is cut off */
    FLOOD_PERIOD_US = 50,     /* for each of them */
    FLOOD_ROUNDS = 16,        /* over the block: what is left before anybody has read it does not count */
    FLOOD_LOOK_PAGES = 64,
    IDLE_CONNECTIONS = 512,
    RECONNECTIONS = 100,
};

/* Sends until the socket is full, the coordinator hangs up, or it has had enough. */
static int flood(struct scene *s, uint32_t flags)
{
    struct raw r;
    struct wire_request request = {.header = raw_header(WIRE_REQUEST, sizeof request), .flags = flags};
    int rc = 0;
    TRY(scene_join(s, &r));
    fcntl(r.control, F_SETFL, O_NONBLOCK);
    uint64_t page_count = raw_status_block(&r)->page_count;
    for (uint32_t i = 0; i < FLOOD_REQUESTS && (!rc || rc == -EAGAIN); i++) {
        request.header.cookie = i;
        request.offset = scene_random(s) % page_count * r.welcome.page_size;
        request.length = 1;
        rc = raw_send(r.control, &request, sizeof request, NULL, 0);
        s->attempts++;
    }
    TRY(scene_others_go_on(s));
    return scene_end(s, WELL, rc == 0 ? "served" : rc == -EAGAIN ? "held back" : "cut-off", "while the others went on");
}

static int hostile_floods_requests(struct scene *s)
{
    return flood(s, WIRE_REQUEST_WAIT);
}

static int hostile_floods_prefetch(struct scene *s)
{
    return flood(s, 0);
}

/* Every wake makes the waiter fault again, and every fault is a message. */
static int hostile_floods_faults(struct scene *s)
{
    struct toucher threads[FLOOD_FAULTS_THREADS];
    uint64_t pages[FLOOD_FAULTS_THREADS];
    struct raw r;
    TRY(scene_join(s, &r));
    for (int i = 0; i < FLOOD_FAULTS_THREADS; i++) {
        TRY(scene_missing_page(s, &r, &pages[i]));
        toucher_start(&threads[i], r.data + pages[i] * r.welcome.page_size);
    }
    while (s->attempts++ < FLOOD_WAKES_MAX)
        uffd_wake(r.uffd, (uintptr_t)r.data, r.welcome.map_length);
    TRY(scene_others_go_on(s));
    for (int i = 0; i < FLOOD_FAULTS_THREADS; i++) {
        if (toucher_join(&threads[i], FAULT_LIMIT_MS))
            return scene_end(s, WELL, "cut-off", "page %llu never came", (unsigned long long)pages[i]);
        if (!scene_is_right(s, &r, r.data + pages[i] * r.welcome.page_size, pages[i]))
            return scene_end(s, HARM, "harm", "page %llu holds wrong bytes", (unsigned long long)pages[i]);
    }
    return scene_end(s, WELL, "served", "like the others");
}

static sigjmp_buf before_next_page;

static void leave_page(int signal_number)
{
    (void)signal_number;
    siglongjmp(before_next_page, 1);
}

/* Whether the coordinator has said something, or hung up. */
static int is_told(const struct raw *r)
{
    struct pollfd control = {.fd = r->control, .events = POLLIN};
    return poll(&control, 1, 0) > 0;
}

/* Touches page after page and leaves each by a timer's signal before it comes, until it is told; how many. */
static uint64_t touch_and_leave(const struct raw *r, uint64_t n)
{
    const struct itimerspec period = {{0, FLOOD_PERIOD_US * 1000L}, {0, FLOOD_PERIOD_US * 1000L}}, never = {{0}, {0}};
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGPROF};
    struct sigaction action = {.sa_handler = leave_page}, ignore = {.sa_handler = SIG_IGN};
    static timer_t timer;
    static volatile uint64_t page;
    sigaction(SIGPROF, &action, NULL);
    if (timer_create(CLOCK_MONOTONIC, &event, &timer))
        return 0;
    if (sigsetjmp(before_next_page, 1) == 0)
        timer_settime(timer, 0, &period, NULL);
    while (page < FLOOD_ROUNDS * n && (page % FLOOD_LOOK_PAGES || !is_told(r))) {
        const volatile uint8_t *at = r->data + page++ % n * r->welcome.page_size;
        (void)*at;
    }
    timer_settime(timer, 0, &never, NULL);
    sigaction(SIGPROF, &ignore, NULL);
    timer_delete(timer);
    return page;
}

/* One thread that waits for more pages than a process has threads. */
static int hostile_floods_waits(struct scene *s)
{
    struct toucher threads[OTHERS_PAGES];
    struct raw r, other;
    TRY(scene_join(s, &r));
    uint64_t page_count = raw_status_block(&r)->page_count;
    if (page_count < 2 * FLOOD_WAITS_MAX + OTHERS_PAGES)
        return scene_end(s, CANNOT, "cannot", "a block of %llu pages is too small", (unsigned long long)page_count);
    if (touch_and_leave(&r, page_count - OTHERS_PAGES) <= FLOOD_WAITS_MAX)
        return scene_end(s, CANNOT, "cannot", "timer: %s", strerror(errno));
    TRY(scene_expect_refusal(s, &r, "waits for too many pages"));
    TRY(scene_join(s, &other));
    for (uint64_t i = 0; i < OTHERS_PAGES; i++) /* at once: the source is slow */
        toucher_start(&threads[i], other.data + (page_count - OTHERS_PAGES + i) * r.welcome.page_size);
    for (int i = 0; i < OTHERS_PAGES; i++)
        if (toucher_join(&threads[i], FAULT_LIMIT_MS))
            return scene_end(s, HARM, "harm", "a page of another helper never came");
    for (uint64_t i = page_count - OTHERS_PAGES; i < page_count; i++)
        if (!scene_is_right(s, &other, other.data + i * r.welcome.page_size, i))
            return scene_end(s, HARM, "harm", "page %llu holds wrong bytes", (unsigned long long)i);
    return WELL;
}

static int hostile_idle_connections(struct scene *s)
{
    struct rlimit files = {.rlim_cur = 2 * IDLE_CONNECTIONS, .rlim_max = 2 * IDLE_CONNECTIONS};
    struct raw r;
    setrlimit(RLIMIT_NOFILE, &files);
    for (int i = 0; i < IDLE_CONNECTIONS; i++) {
        int rc = raw_connect(&r, s->socket_path); /* the older ones stay open */
        if (rc == -EAGAIN || rc == -ECONNREFUSED || rc == -ECONNRESET)
            break;
        if (rc)
            return scene_end(s, CANNOT, "cannot", "connection %d: %s", i, strerror(-rc));
        s->attempts++;
    }
    return scene_end_if_others_go_on(s, "served", "the others, beside all that are silent");
}

static int hostile_reconnects(struct scene *s)
{
    struct wire_plain leave = {.header = raw_header(WIRE_LEAVE, sizeof leave)};
    for (int i = 0; i < RECONNECTIONS; i++) {
        struct raw r;
        TRY(scene_join(s, &r));
        if (i % 2)
            raw_send(r.control, &leave, sizeof leave, NULL, 0);
        close(r.control);
        close(r.uffd);
        close(r.memfd);
        close(r.status_fd);
        if (r.device_fd >= 0)
            close(r.device_fd);
        s->attempts++;
    }
    return scene_end_if_others_go_on(s, "served", "each time");
}

#endif
