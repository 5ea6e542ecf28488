/* fault_internal: what the files of the fault thread share: the set of threads, blocks and remote fds. Private to the
 * core.
 *
 * Files: fault_thread.c (threads and what they poll), fault_wait.c (how they wait for it), fault_set.c (adding,
 * finding, removing), request.c (a fault's way to its page), fault_ahead.c (what it brings besides), demand.c (what
 * faults ask of sources), fault_timeout.c (what takes too long), fault_follow.c (what a writable helper does to its
 * mapping), fault_home.c (which of them answers), fault_crowd.c (whom they answer less), stream.c (all that is asked
 * for without a fault), fault_control.c (messages of attached helpers), fault_event.c (what Python is told),
 * working_set.c (what was touched, in which order).
 */
#ifndef PCSHARE_FAULT_INTERNAL_H
#define PCSHARE_FAULT_INTERNAL_H

#include <pthread.h>
#include <stdint.h>
#include <sys/epoll.h>

#include "fault_thread.h"
#include "stream.h"
#include "thread.h"
#include "waiters.h"

enum {
    REMOTES_MAX = STATUS_HELPERS_MAX + STATUS_BLOCKS_MAX, /* each block has one of the coordinator's own */
    EPOLL_EVENTS_MAX = 64,
    CONTROL_MESSAGES_MAX = 8, /* read from one helper in a row */
    CROWDS_RESTING_MAX = 64,  /* of a fault thread; more go on */
};

/* What an epoll event is about; the low half of its data is a remote fd's id, or the index of a channel's block. */
enum { POLL_QUIT = 0, POLL_UFFD = 1, POLL_CONTROL = 2, POLL_CHANNEL = 3 };
enum { POLL_KIND_SHIFT = 32 };
enum { TAKER_ANY = -1 };

/* Pages that the stream asks for first: see stream_replay.h. */
struct replay_run {
    uint64_t page;
    uint32_t n_pages;
    uint32_t order; /* among the runs of all blocks */
};

struct stream_replay {
    struct served_block *next_block; /* in the stream's list of blocks that have one */
    struct replay_run *runs;         /* NULL: none */
    uint64_t n_runs;
    uint64_t next;  /* the run that is asked for */
    uint64_t issue; /* of its pages: asked for up to here */
    uint32_t in_flight;
    int has_failed; /* what was asked for may be missing: begins again when the block is resumed */
};

/* What is recorded: see working_set.h. */
struct working_set {
    pthread_mutex_t lock;               /* appending alone; short, no system call under it */
    struct working_set_log *log;        /* NULL: nothing is recorded */
    uint64_t *noted[STATUS_BLOCKS_MAX]; /* by block: pages that were noted, a bit each */
};

/* A block in the set, with its source. */
struct served_block {
    struct ramblock *block;
    struct page_channel *channel;
    uint32_t on_source_loss;
    uint32_t own_remote_id;
    int pushes; /* the channel's */
    int paused; /* the source failed and the policy is to wait for a resume: the stream leaves it alone */
    int complete;
    int gaps_told;
    int late;            /* something takes too long: the stream's thread's */
    int32_t taker;       /* the only fault thread that polls the channel; TAKER_ANY: a few do. fault_home.c's, as are */
    uint32_t asked_last; /* who asked last, */
    uint32_t asked_in_a_row;
    int taker_moves; /* and that somebody is changing the taker */
    uint64_t foreign_told;
    uint64_t progress_told;
    uint32_t stream_window_max;
    uint32_t stream_window;      /* the stream's: pieces that may be under way; under its lock */
    uint64_t stream_cursor;      /* the stream's: the page where its background goes on; under its lock */
    struct stream_replay replay; /* the stream's; under its lock */
    /* Events not yet told; under events_lock. */
    uint32_t events;
    int error;
    uint64_t error_offset;
    uint64_t foreign_offset;
    int late_error; /* 0: nothing is late any more */
    uint64_t late_offset;
};

/* Pages [start, end). */
struct ahead_span {
    uint64_t start, end;
};

struct read_ahead_plan;

struct fault_worker {
    struct fault_threads *ft;
    pthread_t thread;
    uint32_t number;
    int32_t cpu;
    int epoll_fd;
    int started;
    uint32_t epoch_seen;
    int awaits_answer; /* this and the next two: fault_wait.c's */
    uint32_t skips, skips_left;
    uint32_t left_id;        /* fault_home.c's: a remote fd that may have left this CPU; 0: none */
    uint64_t crowd_spent_ns; /* on crowds, since it last slept or let them rest; this to n_resting: fault_crowd.c's */
    uint64_t crowd_rest_end_ns;
    uint32_t resting[CROWDS_RESTING_MAX]; /* remote fds that it does not poll until then */
    uint32_t n_resting;
    int drains;         /* follow_uffd's: no fault is answered */
    uint32_t n_put_off; /* faults that were left unanswered, for that or since the helper's address space is changing */
    int is_answered;    /* and another was not: it no longer is */
    uint8_t *staging;   /* one page of the largest size */
    struct ahead_span ahead[UFFD_READ_MAX]; /* fault_ahead.c's: of one remote fd, to be brought after its faults */
    uint32_t n_ahead;
};

struct fault_threads {
    struct status_header *status;
    int quit_fd; /* eventfd: readable makes every worker look at quit and epoch */
    int quit;
    uint32_t epoch;
    uint32_t n_workers;
    struct fault_worker workers[FAULT_THREADS_MAX];
    pthread_mutex_t workers_lock;
    pthread_cond_t workers_changed;

    pthread_mutex_t table_lock; /* remotes, generations; short, no system call under it */
    struct remote_fd *remotes[REMOTES_MAX];
    uint16_t generations[REMOTES_MAX];

    struct served_block *blocks[STATUS_BLOCKS_MAX]; /* a pointer is cleared only after every worker has passed by */
    struct waiters waiters;
    struct stream stream;
    struct working_set working_set;
    uint32_t last_faulter;           /* a remote fd's id */
    uint64_t beside_others_until_ns; /* more than one of them faults */
    uint64_t crowd_until_ns;         /* and one of them is a crowd */
    uint64_t others_until_ns;        /* and one of them is none */
    uint32_t n_cpus;                 /* that this process may use, and its helpers likely too */
    uint32_t demand_in_flight;
    pthread_mutex_t demands_lock; /* the remote fds' queues, and these; short, no system call under it */
    struct demand *demands_head;  /* asked for because of faults, and not late: the oldest first */
    struct demand *demands_tail;
    uint64_t fault_timeout_ns; /* 0: never */
    uint64_t read_ahead_bytes; /* 0: none */
    uint64_t next_look_ns;     /* the stream's thread's */
    int maps_fd;               /* struct kept_maps after struct kept_maps; -1: nobody wants them */

    pthread_mutex_t events_lock;
    int event_fd;
    uint64_t events_pending; /* how many objects have events: a hint to stop searching early */
};

/* fault_thread.c */
int start_polling(struct fault_threads *ft, struct remote_fd *remote);
void stop_polling(struct fault_threads *ft, int fd);
/* A few workers poll the block's channel, if it has something to poll. */
int start_polling_channel(struct fault_threads *ft, struct served_block *served);
/* Whether a worker polls a remote fd's uffd that was added, or a block's channel; without effect on one that was not,
 * or was taken away. */
void change_polling(struct fault_worker *worker, struct remote_fd *remote, int polls);
void change_polling_channel(struct fault_worker *worker, struct served_block *served, int polls);
void stop_polling_control(struct fault_threads *ft, struct remote_fd *remote);
/* Whether more than one helper has faulted lately. */
int is_beside_others(const struct fault_threads *ft, uint64_t now_ns);
void disable_remote(struct fault_threads *ft, struct remote_fd *remote, int error, uint64_t addr);
/* Returns when no worker holds on to what it saw before: each has been at the top of its loop. */
void wait_for_workers(struct fault_threads *ft);
/* Whether something waits for the worker, other than what this remote fd's uffd says. */
int worker_is_wanted(const struct fault_worker *worker, const struct remote_fd *remote);

/* fault_wait.c */
/* Faults of this remote fd were dealt with: perhaps a server owes an answer now. */
void wait_note_fault(struct fault_worker *worker, const struct remote_fd *remote);
/* What a channel had to tell was dealt with: perhaps it was a part of an answer. */
void wait_note_answer(struct fault_worker *worker);
/* As epoll_wait without a timeout. */
int wait_for_events(struct fault_worker *worker, struct epoll_event *events, int most);

/* fault_set.c */
struct remote_fd *remote_by_id(struct fault_threads *ft, uint32_t id); /* counted; NULL: gone */
/* Calls with each living remote fd of the block, counted meanwhile. */
void for_each_remote(struct fault_threads *ft, const struct ramblock *block,
                     void (*call)(struct remote_fd *remote, void *argument), void *argument);
struct served_block *served_block_of(struct fault_threads *ft, const struct ramblock *block);

/* fault_follow.c */
/* Reads what waits on the uffd of a helper that may send events, most messages, and acts on it. */
void follow_uffd(struct fault_worker *worker, struct remote_fd *remote, uint32_t most, uint64_t now_ns);

/* fault_home.c */
/* Whether this worker polls what belongs to no CPU: channels that nobody takes alone, and the uffds of helpers that
 * have no home. A few do. */
int polls_anywhere(const struct fault_worker *worker);
/* A thread of the helper has faulted and been answered: now and then looks where it runs. */
void home_note_fault(struct fault_threads *ft, struct remote_fd *remote, uint32_t tid);
/* Whether the helper's thread is at home on the worker's CPU, and to be followed where it is woken on another one. */
int home_may_leave(const struct fault_worker *worker, const struct remote_fd *remote, uint32_t tid, uint64_t now_ns);
/* It may, and was woken, which began then. */
void home_note_wake(struct fault_worker *worker, struct remote_fd *remote, uint64_t since_ns);
/* Looks where that helper went, if there is one. Counted, if it has its home elsewhere now; else NULL. */
struct remote_fd *home_follow(struct fault_worker *worker);
/* Whether the worker's CPU, which it left then, is not to sleep: it would be woken here next, and fault here. */
int home_keeps_awake(const struct fault_worker *worker, const struct remote_fd *remote, uint64_t left_ns,
                     uint64_t now_ns);
/* Faults on the block were dealt with while answers are awaited: the worker is taken for who asked its source. Whether
 * it polls for the answers. */
int home_note_asked(struct fault_worker *worker, struct served_block *served);
/* The worker had stopped polling the remote fd's uffd: it polls again, unless only others shall. */
void home_poll_again(struct fault_worker *worker, struct remote_fd *remote);

/* fault_crowd.c */
/* A thread of the helper has faulted, and others' do. */
void crowd_note_fault(struct fault_threads *ft, struct remote_fd *remote, uint32_t tid, uint64_t now_ns);
/* Whether the helper has many threads in faults, beside others; whether any has. */
int is_crowd(const struct remote_fd *remote, uint64_t now_ns);
int has_crowd(const struct fault_threads *ft, uint64_t now_ns);
/* Whether what waits on the uffd must wait longer: then the worker does not poll it until its rest ends. */
int crowd_must_rest(struct fault_worker *worker, struct remote_fd *remote, uint64_t now_ns);
/* The helper's uffd was read, and what was found answered. */
void crowd_note_answered(struct fault_worker *worker, const struct remote_fd *remote, uint64_t since_ns);
/* The worker is about to sleep, or the rest is over: all are polled. */
void crowd_end_turn(struct fault_worker *worker);
/* Whether all is to be read now that waits on the uffd, and its faults put off, since events may wait behind them. By
 * one worker at a time, which says how many threads it woke. */
int crowd_begin_drain(struct remote_fd *remote, uint64_t now_ns);
void crowd_end_drain(struct remote_fd *remote, uint64_t now_ns, uint32_t n_woken);

/* fault_ahead.c */
/* Notes a fault on a missing page: what is to be brought besides it. */
void ahead_plan(struct fault_threads *ft, struct remote_fd *remote, uint64_t page, uint32_t tid,
                struct read_ahead_plan *plan);
/* How many pages from the faulted one on are to be read and placed at once, if they are at hand. */
uint64_t ahead_with(const struct ramblock *block, uint64_t page, const struct read_ahead_plan *plan);
/* The rest of the plan: left for ahead_bring, or asked for. */
void ahead_begin(struct fault_threads *ft, struct fault_worker *worker, struct remote_fd *remote,
                 const struct read_ahead_plan *plan, int is_at_hand);
/* All faults that were read with those of the plans are answered: brings what was left. */
void ahead_bring(struct fault_worker *worker, struct remote_fd *remote);
/* What is to be asked for with the page, since the source reads it in any case, is marked requested: how many pages
 * from *firstp on; 0: nothing is, and the page is asked for alone. */
uint64_t ahead_claim_around(struct fault_threads *ft, struct ramblock *block, uint64_t page, uint64_t *firstp);

/* request.c */
void request_shared_page(struct fault_threads *ft, struct fault_worker *worker, struct remote_fd *remote, uint64_t page,
                         uint32_t tid);
enum { NOT_AT_HAND = 2 }; /* beside RAMBLOCK_PLACED and RAMBLOCK_PRESENT */
/* Places n pages that are no holes if the source can read them at once; as ramblock_place, or NOT_AT_HAND. */
int place_at_hand(struct fault_worker *worker, struct served_block *served, uint64_t page, uint64_t n,
                  uint64_t *placedp);
/* Who waited is woken, ranges advance, completion is told. kind: whose counter the pages go to. */
enum { PLACED_DEMAND = 1, PLACED_STREAM = 2, REMOVED = 3 };
void after_placing(struct fault_threads *ft, struct served_block *served, uint64_t page, uint64_t n, uint64_t placed,
                   int kind);
/* The same for those of [page, end) that are received. */
void after_placing_received(struct fault_threads *ft, struct served_block *served, uint64_t page, uint64_t end,
                            uint64_t placed, int kind);
/* The same for n pages from first on of which one was demanded; that one goes first. rc: of placing them. */
void after_bringing(struct fault_threads *ft, struct served_block *served, uint64_t demanded, uint64_t first,
                    uint64_t n, uint64_t placed, int rc);
/* Lifts the poison marks of pages that are received by now. */
void lift_poison(struct fault_threads *ft, struct ramblock *block, uint64_t page, uint64_t n);
/* Pages came because this helper asked. It may be gone by now. */
void credit_helper(struct fault_threads *ft, uint32_t remote_id, uint64_t placed);
/* A child of fork comes with the poison marks of its parent's copy-on-write mapping, also of pages that have come
 * meanwhile: takes those off. */
void lift_inherited(struct remote_fd *remote);
/* The helper is about to be told that these pages are here: whoever placed one may not have come to its mark yet. */
void lift_before_told(struct remote_fd *remote, uint64_t page, uint64_t end);
/* Lifts the marks that a dead coordinator may have left in the helpers that were taken over. Once their uffds are
 * polled: while an event of theirs is unread nothing can be lifted. */
void lift_what_is_kept(struct fault_threads *ft);
void lose_page(struct fault_threads *ft, struct served_block *served, uint64_t page);
/* The result of a request, or -EPROTO where it says that pages have arrived which are not here. */
int checked_result(const struct ramblock *block, const struct page_request *request, int result);
/* How many bytes of [page, page + n) the source holds; the rest of the last page is zeros. */
uint64_t source_length(const struct ramblock *block, uint64_t page, uint64_t n);
/* The page did not come: whoever waits goes on waiting, visibly, or is told by a poison mark. */
void page_failed(struct fault_threads *ft, struct served_block *served, uint64_t page, int error, uint32_t kind);

/* demand.c */
/* A place at the source for one page of the helper's, or 0: it goes to its queue. Given back by the answer, or before
 * when that is late, or by demand_release. */
int demand_reserve(struct fault_threads *ft, struct remote_fd *remote);
void demand_release(struct fault_threads *ft, struct remote_fd *remote);
/* Asks the source; a place is reserved. */
void demand_ask(struct fault_threads *ft, struct remote_fd *remote, uint64_t page);
/* Asks in the helper's turn. */
void demand_queue_page(struct fault_threads *ft, struct remote_fd *remote, uint64_t page);
/* What has been at the source since then_ns or longer counts in its helper's share no more: the next is asked for. */
void demand_give_up_late(struct fault_threads *ft, uint64_t then_ns);
/* Takes out of the queue what is not to be asked for any more. */
void demand_drop_stale(struct fault_threads *ft, struct remote_fd *remote);
/* Pages at the source, without what is late, and in its queue. */
uint32_t demand_count(struct fault_threads *ft, const struct remote_fd *remote);
/* A remote fd waits for nothing any more; what it was to ask for and others wait for is asked for by them. */
void demand_drop_remote(struct fault_threads *ft, struct remote_fd *remote);
/* The source may be asked again: for every page of the block that somebody waits for and that is not on its way. */
void demand_ask_again(struct fault_threads *ft, struct served_block *served);

/* fault_timeout.c */
/* With the stream's lock held, which it may open: looks for what takes too long, if it is time to. Returns how long
 * there is nothing to look for, in ns. */
uint64_t timeout_look(struct fault_threads *ft);
/* What is late may be asked again. */
void timeout_forget(struct fault_threads *ft, struct served_block *served);

/* fault_control.c */
void handle_control(struct fault_threads *ft, struct remote_fd *remote);
/* Sends or, where the helper does not read what it asked for, cuts it off. */
void send_to_helper(struct fault_threads *ft, struct remote_fd *remote, const void *message, uint32_t length);
void send_done(struct fault_threads *ft, struct remote_fd *remote, uint32_t cookie, int status, uint64_t offset,
               uint64_t length);

/* working_set.c */
/* The block that has these pages, or NULL. */
struct served_block *working_set_block_of(const struct fault_threads *ft, const struct working_set_run *run);
/* A helper waits for these pages, or they came in one request with a page that it waits for. Any thread. */
void working_set_note(struct fault_threads *ft, const struct ramblock *block, uint64_t page, uint64_t n_pages);
void working_set_init(struct working_set *set);
void working_set_deinit(struct working_set *set);
/* Before the block is served; when nobody looks at it any more. */
int working_set_add_block(struct fault_threads *ft, const struct ramblock *block);
void working_set_drop_block(struct fault_threads *ft, const struct ramblock *block);
/* What another coordinator has noted is not noted again. Before faults are answered. */
void working_set_know_kept(struct fault_threads *ft);

/* fault_event.c */
void tell_block(struct fault_threads *ft, struct served_block *served, uint32_t kind, int error, uint64_t offset);
/* Pages of the block are late (error, the offset of one), or no longer (0). */
void tell_late(struct fault_threads *ft, struct served_block *served, int error, uint64_t offset);
void tell_remote(struct fault_threads *ft, struct remote_fd *remote, uint32_t kind, int error, uint64_t addr);

#endif
