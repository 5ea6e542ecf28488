/* read_ahead: see read_ahead.h. */
#include "read_ahead.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>

struct read_ahead_stream {
    uint64_t turn; /* when it was used last; 0: never */
    uint32_t tid;
    uint32_t hits;
    uint64_t at;     /* the page that faulted last */
    uint64_t end;    /* brought or asked for up to here; after at */
    uint64_t middle; /* of the last window: a fault here or later brings the next one */
    uint64_t window; /* pages of the last one; 0: not open yet */
};

struct read_ahead {
    pthread_mutex_t lock;
    uint64_t turn;
    struct read_ahead_stream streams[READ_AHEAD_STREAMS];
};

int read_ahead_new(struct read_ahead **rp)
{
    struct read_ahead *r = calloc(1, sizeof(*r));

    *rp = r;
    if (!r)
        return -ENOMEM;
    pthread_mutex_init(&r->lock, NULL);
    return 0;
}

void read_ahead_free(struct read_ahead *r)
{
    if (!r)
        return;
    pthread_mutex_destroy(&r->lock);
    free(r);
}

/* The stream of the thread that the fault belongs to: the nearest, of those that it goes on with. */
static struct read_ahead_stream *find(struct read_ahead *r, uint32_t tid, uint64_t page, uint64_t run_start)
{
    struct read_ahead_stream *found = NULL;

    for (struct read_ahead_stream *s = r->streams; s < r->streams + READ_AHEAD_STREAMS; s++)
        if (s->turn && s->tid == tid && s->at <= page && run_start <= s->end && (!found || found->at < s->at))
            found = s;
    return found;
}

static void keep_oldest(struct read_ahead_stream **oldestp, struct read_ahead_stream *s)
{
    if (!*oldestp || s->turn < (*oldestp)->turn)
        *oldestp = s;
}

/* Whose place a new stream takes: another of its thread's, if that has enough; else one that never opened, as long as
 * these have half of the table: then many threads that fault anywhere displace each other and none that reads on. */
static struct read_ahead_stream *find_place(struct read_ahead *r, uint32_t tid)
{
    struct read_ahead_stream *own = NULL, *closed = NULL, *any = NULL;
    uint32_t n_own = 0, n_closed = 0;

    for (struct read_ahead_stream *s = r->streams; s < r->streams + READ_AHEAD_STREAMS; s++) {
        keep_oldest(&any, s);
        if (!s->window) {
            n_closed++;
            keep_oldest(&closed, s);
        }
        if (s->turn && s->tid == tid) {
            n_own++;
            keep_oldest(&own, s);
        }
    }
    if (n_own >= READ_AHEAD_STREAMS_OF_THREAD)
        return own;
    return n_closed >= READ_AHEAD_STREAMS / 2 ? closed : any;
}

static struct read_ahead_stream *begin(struct read_ahead *r, uint32_t tid, uint64_t page)
{
    struct read_ahead_stream *s = find_place(r, tid);

    *s = (struct read_ahead_stream){.tid = tid, .at = page, .end = page + 1};
    return s;
}

static uint64_t at_most(uint64_t n, uint64_t most)
{
    return n < most ? n : most;
}

/* A fault within what was brought, or right behind it. */
static void go_on(struct read_ahead_stream *s, uint64_t page, const struct read_ahead_reach *reach,
                  struct read_ahead_plan *plan)
{
    s->at = page;
    if (s->end <= page)
        s->end = page + 1;
    if (s->hits < READ_AHEAD_OPENING_HITS)
        s->hits++;
    if (s->hits < READ_AHEAD_OPENING_HITS || (s->window && page < s->middle))
        return;
    s->window = at_most(s->window ? s->window * 2 : reach->start_pages, reach->most_pages);
    plan->start = s->end;
    plan->end = s->end = s->end + s->window;
    s->middle = plan->start + s->window / 2;
}

void read_ahead_note(struct read_ahead *r, uint32_t tid, uint64_t page, uint64_t run_start,
                     const struct read_ahead_reach *reach, struct read_ahead_plan *plan)
{
    plan->start = plan->end = page + 1;
    pthread_mutex_lock(&r->lock);
    struct read_ahead_stream *s = find(r, tid, page, run_start);
    if (!s)
        s = begin(r, tid, page);
    else if (page > s->at) /* else it is the same fault once more: a signal, or a wake for nothing */
        go_on(s, page, reach, plan);
    s->turn = ++r->turn;
    plan->near_end = s->end;
    pthread_mutex_unlock(&r->lock);
}
