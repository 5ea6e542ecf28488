/* helper_internal: what the files of the helper's side share. Not for users of the library.
 *
 *   helper.c           the public functions: attach, detach, what is known of a block
 *   helper_request.c   the public functions that ask for ranges, and the progress
 *   helper_connect.c   the control socket: connect, send, receive
 *   helper_welcome.c   what the coordinator's answers bring, checked
 *   helper_memory.c    the mapping and its uffd, from the first mmap to the last munmap
 *   helper_life.c      the states of an attachment and what is done in each
 *   helper_sentinel.c  the thread in which that happens
 *   helper_fork.c      the one lock, the list of attachments, and what fork does to them
 *
 * One lock guards every attachment and all it owns. It is never held over anything that waits for somebody else, and no
 * page of a block is touched under it. Every fd and every mapping is made and recorded under it, in one go: fork takes
 * it too, so a child never finds an fd without an owner. Functions here expect it to be held unless they say otherwise.
 */
#ifndef PCSHARE_HELPER_INTERNAL_H
#define PCSHARE_HELPER_INTERNAL_H

#include <pthread.h>
#include <stdint.h>
#include <sys/types.h>
#include "helper.h"
#include "status_segment.h"
#include "wire.h"

enum {
    HELPER_REQUESTS_IN_FLIGHT_MAX = 64, /* of one attachment; the coordinator refuses more */
    HELPER_TEXT_MAX = 512,              /* bytes of an error's text, with the final NUL */
    SOCKET_PATH_MAX = 108,              /* sun_path, with the final NUL */
    REATTACH_INTERVAL_MS = 100,         /* between two tries to find a coordinator again */
    REATTACH_ANSWER_MS = 10000,         /* a coordinator that has not answered by then is tried anew */
    UNREAD_LOOK_MS = 100,               /* ORPHANED: between two looks for events that nobody reads */
    UNREAD_LOOKS = 10,                  /* in a row that find something: then nobody else reads, for a second now */
    LOST_WAKE_INTERVAL_MS = 1000,       /* how soon a fault is seen that a dying coordinator had read */
    PROGRESS_SLICE_MS = 200,            /* how soon pcshare_wait_progress sees a change of state */
    MAP_SLICE_BYTES = 64 << 20,         /* mapped at a time after an ensure, under the lock: some 7 ms */
    RELOCK_SLICE_BYTES = 64 << 20,      /* mlocked at a time, under the lock: some 25 ms */
    SENTINEL_MESSAGES_MAX = 64,         /* of one attachment before the next one's turn */
    SENTINEL_STACK_BYTES = 256 << 10,   /* small: under mlockall all of it is locked memory */
    FORK_FAILED_EXIT = 70,              /* EX_SOFTWARE: the child could not get its mapping back */
};

/* Beside the states of helper.h: being made, or gone. */
enum { ATTACHMENT_LIMBO = 0 };

/* How far the conversation on the control socket has come. */
enum {
    LINK_DOWN = 0,
    LINK_HELLO = 1,  /* HELLO is sent: WELCOME or ERROR comes */
    LINK_ATTACH = 2, /* ATTACH is sent: ACK or ERROR comes */
    LINK_UP = 3,     /* ACK has come */
};

/* link_receive: nothing has come yet. */
enum { LINK_EMPTY = 1 };

struct link_message {
    union {
        struct wire_header header;
        struct wire_welcome welcome;
        struct wire_ack ack;
        struct wire_done done;
        struct wire_error error;
    } body;
    int fds[WIRE_FDS_MAX]; /* -1 once somebody has taken it */
    uint32_t n_fds;
};

/* The mapped status segment, and our block in it. A restarted coordinator may bring another. */
struct status_view {
    int references; /* the attachment's, and one for each call that waits on it */
    void *base;
    uint64_t size;
    dev_t device;
    ino_t inode;
    const struct status_block *block;
    const uint64_t *received;
};

/* One pcshare_ensure that waits; lives on its caller's stack. */
struct helper_request {
    struct helper_request *next;
    uint64_t offset;
    uint64_t length;
    uint32_t cookie;
    uint32_t done; /* futex */
    int is_sent;
    int status;
    uint64_t lost_offset;
    uint64_t lost_length;
};

struct pcshare_attachment {
    struct pcshare_attachment *next;
    int references; /* the list's, and one for each call that waits */
    int state;      /* PCSHARE_* or ATTACHMENT_LIMBO; written under the lock, read anywhere */
    int link;       /* LINK_* */
    int socket;
    int memfd;
    int device; /* the offered /dev/userfaultfd: a child of fork may need it too */
    int uffd;   /* our own copy: if the last one closes, the kernel answers faults with zero pages */
    void *data;
    void *map_at; /* the caller's mapping that data replaced, or NULL */
    uint64_t map_at_length;
    int was_locked; /* mlockall(MCL_FUTURE) had locked it: locked again when complete */
    int thp_switched_off;
    int is_strict;              /* registered for MINOR faults too */
    uint64_t relock_offset;     /* what of it is locked again; map_length: nothing to do */
    uint64_t features;          /* of the uffd */
    uint64_t orphan_timeout_ms; /* 0: for ever */
    int64_t orphan_since_ms;
    int64_t next_try_ms; /* ORPHANED: to connect, or to give up waiting for an answer; LOST: to wake everybody */
    int64_t next_unread_look_ms;
    int unread_looks; /* how many in a row have found something unread */
    dev_t memfd_device;
    ino_t memfd_inode;
    struct status_view *view;
    struct helper_request *requests; /* in the order they came */
    uint32_t next_cookie;
    uint32_t first_cookie; /* of what the coordinator of now was asked; answers to earlier ones are another's */
    uint32_t in_flight; /* sent and not answered, those that their caller has given up included */
    struct pcshare_info info;
    char socket_path[SOCKET_PATH_MAX];
    char why[HELPER_TEXT_MAX]; /* why it is not attached now */
};

/* helper_fork.c */
struct library {
    pthread_mutex_t lock;
    pthread_cond_t sentinel_left;
    struct pcshare_attachment *attachments;
    int sentinel_runs;
    int wake_fd; /* eventfd: the sentinel must look again */
};
extern struct library library;
void library_lock(void);
void library_unlock(void);
void library_add(struct pcshare_attachment *a);
void library_remove(struct pcshare_attachment *a);

/* helper.c */
/* Stores the text for pcshare_error_text and returns -error. Needs no lock. */
__attribute__((format(printf, 2, 3))) int helper_fail(int error, const char *format, ...);
int64_t helper_now_ms(void); /* CLOCK_MONOTONIC */
/* When timeout_ms will be over; INT64_MAX: never. */
int64_t helper_deadline_ms(int64_t timeout_ms);
void attachment_set_state(struct pcshare_attachment *a, int state);
/* Unmaps, says LEAVE, closes everything; what is left is an empty struct in the list. */
void attachment_release(struct pcshare_attachment *a, int keep_reserved);
void attachment_put(struct pcshare_attachment *a);

/* helper_request.c */
/* Sends what may be sent now. That the link is broken is found by who reads it, after the last words in it. */
void requests_send(struct pcshare_attachment *a);
/* After a new link: nothing of the old one will be answered. */
void requests_send_again(struct pcshare_attachment *a);
/* DONE. -EPROTO: it answers nothing that was asked. */
int requests_answer(struct pcshare_attachment *a, const struct wire_done *done);
void requests_finish_all(struct pcshare_attachment *a, int status);

/* helper_connect.c */
void fd_close(int *fdp);
/* Connects and says HELLO. -ENOENT, -ECONNREFUSED, -EAGAIN: see helper.h. */
int link_connect(struct pcshare_attachment *a);
void link_close(struct pcshare_attachment *a);
/* In a child of fork: the conversation is the parent's and goes on without this process. */
void link_forget(struct pcshare_attachment *a);
/* One whole, checked message, or LINK_EMPTY. -ECONNRESET: hung up; -EPROTO, -EPROTONOSUPPORT: the peer's fault. An
 * ERROR from the peer comes back as its errno and text. The fds are the caller's. */
int link_receive(struct pcshare_attachment *a, struct link_message *message);
void link_message_close(struct link_message *message);
int link_send_attach(struct pcshare_attachment *a);
int link_send_request(struct pcshare_attachment *a, const struct helper_request *request, uint32_t flags);
/* Never fails: who does not listen any more needs not know. */
void link_send_leave(struct pcshare_attachment *a);
int link_is_text(const char *text, size_t size);
const char *link_message_name(uint16_t type);

/* helper_welcome.c */
/* First attachment: takes over what WELCOME brought. *is_completep: the block is complete, no ATTACH is needed. */
int link_accept_welcome(struct pcshare_attachment *a, struct link_message *message, int *is_completep);
/* A later one: it must be the same block, in the same memory. */
int link_recognise_welcome(struct pcshare_attachment *a, struct link_message *message, int *is_completep);
int link_accept_ack(struct pcshare_attachment *a, struct link_message *message, int *is_completep);
struct status_view *status_view_get(struct pcshare_attachment *a);
void status_view_put(struct status_view *view);

/* helper_memory.c */
/* The block is complete: a plain mapping. */
int memory_map_plain(struct pcshare_attachment *a);
/* A mapping that no page gets into except through its new uffd. */
int memory_map_guarded(struct pcshare_attachment *a);
/* In a child of fork, where a guarded mapping was. */
int memory_guard_in_child(struct pcshare_attachment *a);
/* Every page is here: makes it plain memory. */
void memory_complete(struct pcshare_attachment *a);
/* Locks the next slice again. */
void memory_relock_some(struct pcshare_attachment *a);
/* Of a strict attachment: maps what is received of the range, so that touching it asks nobody. */
void memory_map_received(struct pcshare_attachment *a, uint64_t offset, uint64_t length);
/* Makes a touch of the page at client_addr SIGBUS, unless the page is here; wakes who waits for it. */
void memory_give_up_page(struct pcshare_attachment *a, uint64_t client_addr);
/* Where the block is mapped here by now, in pieces: how many. The caller may have moved and unmapped some of it. */
uint32_t memory_find_maps(const struct pcshare_attachment *a, struct wire_map maps[WIRE_MAPS_MAX]);
void memory_release(struct pcshare_attachment *a, int keep_reserved);

/* helper_life.c */
/* Does what there is to do now. */
void life_serve(struct pcshare_attachment *a);
int life_needs_sentinel(const struct pcshare_attachment *a);
/* When it must be looked at although nothing has happened; INT64_MAX: never. */
int64_t life_next_look_ms(const struct pcshare_attachment *a);
int life_reads_own_uffd(const struct pcshare_attachment *a);

/* helper_sentinel.c */
/* Starts the sentinel if it does not run, else makes it look again. */
int sentinel_start(void);
void sentinel_wake(void);
/* Waits until it has left, if nothing is left for it to do. */
void sentinel_wait_left(void);

#endif
