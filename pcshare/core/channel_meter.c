/* channel_meter: see channel_meter.h. */
#define _GNU_SOURCE
#include "channel_meter.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "thread.h"

enum { METER_PAGE = 4096 };
static const uint64_t ns_per_ms = 1000000;

struct metered {
    struct page_request request;
    struct meter *meter;
    int is_busy;
    int is_done;
    int result;
};

struct meter {
    struct page_channel *channel;
    int done_fd; /* eventfd: something was answered */
    uint64_t size;
    uint64_t timeout_ns;
    struct channel_meter_report *report;
    uint8_t *bytes;
    struct metered pieces[CHANNEL_METER_PIECES_MAX];
};

static void metered_done(struct page_request *request, int result)
{
    struct metered *metered = request->owner;
    uint64_t one = 1;
    int done_fd = metered->meter->done_fd;

    metered->result = result;
    __atomic_store_n(&metered->is_done, 1, __ATOMIC_RELEASE);
    ssize_t done = write(done_fd, &one, sizeof(one));
    (void)done;
}

static void ask(struct meter *m, struct metered *metered, uint64_t offset, uint64_t length, int is_demand)
{
    metered->is_busy = 1;
    metered->is_done = 0;
    metered->request.offset = offset;
    metered->request.length = length < m->size - offset ? length : m->size - offset;
    metered->request.is_demand = is_demand;
    metered->request.done = metered_done;
    metered->request.owner = metered;
    page_channel_submit(m->channel, &metered->request);
}

/* Does what the fault threads do for the channel, until something was answered. -ETIMEDOUT. */
static int wait_for_answer(struct meter *m, uint64_t deadline_ns)
{
    struct pollfd polled[2] = {{.fd = m->done_fd, .events = POLLIN},
                               {.fd = page_channel_poll_fd(m->channel), .events = POLLIN}};
    uint64_t value, now_ns = clock_ns();

    while (now_ns < deadline_ns) {
        (void)poll(polled, 2, (int)((deadline_ns - now_ns) / ns_per_ms) + 1);
        if (polled[1].revents)
            page_channel_dispatch(m->channel);
        if (polled[0].revents)
            return read(m->done_fd, &value, sizeof(value)) < 0 ? -errno : 0;
        now_ns = clock_ns();
    }
    return -ETIMEDOUT;
}

static int fail(struct meter *m, uint64_t offset, int error)
{
    m->report->error = -error;
    m->report->error_offset = offset;
    return error;
}

/* Pages from all over the source. What can be read at once is, as in a fault. */
static int measure_round_trips(struct meter *m)
{
    struct metered *metered = &m->pieces[0];

    for (uint32_t i = 0; i < CHANNEL_METER_ROUND_TRIPS; i++) {
        uint64_t offset = (uint64_t)((double)m->size * i / CHANNEL_METER_ROUND_TRIPS) / METER_PAGE * METER_PAGE;
        uint64_t length = m->size - offset < METER_PAGE ? m->size - offset : METER_PAGE, start_ns = clock_ns();
        int rc = page_channel_read_now(m->channel, m->bytes, length, offset);

        if (rc != PAGE_CHANNEL_DONE) {
            ask(m, metered, offset, length, 1);
            rc = wait_for_answer(m, start_ns + m->timeout_ns);
            if (rc == 0)
                rc = metered->result;
        }
        if (rc < 0)
            return fail(m, offset, rc);
        m->report->round_trip_ns[m->report->n_round_trips++] = clock_ns() - start_ns;
    }
    return 0;
}

static uint32_t piece_count(const struct meter *m)
{
    return m->channel->stream_piece_count < CHANNEL_METER_PIECES_MAX ? m->channel->stream_piece_count
                                                                     : CHANNEL_METER_PIECES_MAX;
}

/* Takes up what was answered; *busyp counts what was not. */
static int take_answers(struct meter *m, uint32_t *busyp)
{
    *busyp = 0;
    for (uint32_t i = 0; i < piece_count(m); i++) {
        struct metered *metered = &m->pieces[i];

        if (!metered->is_busy)
            continue;
        if (!__atomic_load_n(&metered->is_done, __ATOMIC_ACQUIRE)) {
            ++*busyp;
            continue;
        }
        metered->is_busy = 0;
        if (metered->result < 0)
            return fail(m, metered->request.offset, metered->result);
        m->report->stream_bytes += metered->request.length;
    }
    return 0;
}

static uint64_t ask_pieces(struct meter *m, uint64_t at)
{
    for (uint32_t i = 0; i < piece_count(m) && at < m->size; i++) {
        if (m->pieces[i].is_busy)
            continue;
        ask(m, &m->pieces[i], at, m->channel->stream_piece_bytes, 0);
        at += m->pieces[i].request.length;
    }
    return at;
}

static int measure_stream(struct meter *m, uint64_t duration_ns)
{
    uint64_t start_ns = clock_ns(), at = 0;
    uint32_t busy = 0;

    m->pieces[0].is_busy = 0;
    do {
        if (clock_ns() - start_ns < duration_ns)
            at = ask_pieces(m, at);
        int rc = wait_for_answer(m, clock_ns() + m->timeout_ns);
        if (rc < 0)
            return fail(m, at, rc);
        rc = take_answers(m, &busy);
        if (rc < 0)
            return rc;
    } while (busy || (at < m->size && clock_ns() - start_ns < duration_ns));
    m->report->stream_ns = clock_ns() - start_ns;
    return 0;
}

int channel_meter_run(struct page_channel *channel, uint64_t size, uint32_t duration_ms, uint32_t timeout_ms,
                      struct channel_meter_report *report)
{
    struct meter m = {.channel = channel, .size = size, .timeout_ns = timeout_ms * ns_per_ms, .report = report};
    uint64_t piece = channel->stream_piece_bytes;

    memset(report, 0, sizeof(*report));
    m.done_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    m.bytes = malloc(piece * CHANNEL_METER_PIECES_MAX);
    int rc = m.done_fd >= 0 && m.bytes ? 0 : -ENOMEM;
    if (rc == 0) {
        for (uint32_t i = 0; i < CHANNEL_METER_PIECES_MAX; i++) {
            m.pieces[i].meter = &m;
            m.pieces[i].request.bytes = m.bytes + i * piece;
        }
        if (measure_round_trips(&m) == 0)
            (void)measure_stream(&m, duration_ms * ns_per_ms);
    }
    page_channel_free(channel); /* what is still in flight ends here, so that the bytes may go */
    free(m.bytes);
    if (m.done_fd >= 0)
        close(m.done_fd);
    return rc;
}
