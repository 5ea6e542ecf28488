/* scene: what every hostile helper stands on: a verdict, steps of a hand-over that must succeed, pages to touch, and
 * others who must not suffer.
 *
 * Leaves what it opens to the end of the process; what it starts dies with the process. A function that can fail
 * returns 0 or the verdict that ends the program.
 */
#ifndef PCSHARE_HOSTILE_SCENE_H
#define PCSHARE_HOSTILE_SCENE_H

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include "raw.h"

/* How it ended; the exit status of the program. */
enum {
    WELL = 0,   /* the harm was refused, or came to nobody but its doer */
    HARM = 1,   /* a wrong byte, a fault that never ended, or somebody else disturbed */
    CANNOT = 2, /* the trial could not be made: no coordinator, no missing page, wrong kind of block */
};

enum {
    OTHERS_PAGES = 4,        /* that a well-behaved helper reads, to see that others are served */
    FAULT_LIMIT_MS = 10000,  /* a page at a slow source takes milliseconds */
    UNSERVED_WAIT_MS = 2000, /* for a fault that may rightly wait for ever */
    NOTICE_LIMIT_MS = 15000, /* for what the coordinator notices by itself, time limits of the hand-over included */
};

struct scene {
    const char *socket_path;
    const char *idstr;
    uint32_t mode;     /* WIRE_MODE_*: what the row needs */
    int source_fd;     /* the block's source, to compare bytes with; -1: bytes are not compared */
    uint64_t random;   /* state of scene_random */
    uint64_t attempts; /* ways in which the row tried it */
    uint64_t bytes_checked;
    uint64_t planted_pages; /* zero pages that it put into the block against the rules */
    char outcome[24];  /* refused, cut-off, served, waits, planted, harm, cannot */
    char detail[WIRE_TEXT_MAX];
};

/* A thread that touches one byte: it may wait, for ever even, while the others act. */
struct toucher {
    pthread_t thread;
    const volatile uint8_t *at;
    uint8_t value;
};

enum {
    COMPARED_BYTES = 4096, /* at once; every page size is a multiple */
    LOOK_AGAIN_MS = 1,     /* between two looks at a counter of the status segment */
};

#define TRY(call)            \
    do {                     \
        int verdict_ = (call); \
        if (verdict_)        \
            return verdict_; \
    } while (0)

/* Says how it ended and returns the verdict. */
__attribute__((format(printf, 4, 5)))
static int scene_end(struct scene *s, int verdict, const char *outcome, const char *format, ...)
{
    va_list values;
    va_start(values, format);
    vsnprintf(s->detail, sizeof s->detail, format, values);
    va_end(values);
    snprintf(s->outcome, sizeof s->outcome, "%s", outcome);
    return verdict;
}

static uint64_t scene_random(struct scene *s)
{
    uint64_t z = s->random += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

static int step(struct scene *s, int rc, const char *what)
{
    return rc ? scene_end(s, CANNOT, "cannot", "%s: %s", what, strerror(-rc)) : 0;
}

/* Steps of a hand-over that must succeed, or the trial cannot be made: 0 or CANNOT. */
static int scene_connect(struct scene *s, struct raw *r)
{
    return step(s, raw_connect(r, s->socket_path), "connect");
}

static int scene_hello(struct scene *s, struct raw *r)
{
    TRY(scene_connect(s, r));
    TRY(step(s, raw_hello(r, s->idstr, s->mode), "HELLO"));
    if (r->welcome.flags & WIRE_WELCOME_COMPLETE)
        return scene_end(s, CANNOT, "cannot", "the block is complete: nothing is missing");
    return 0;
}

static int scene_map(struct scene *s, struct raw *r)
{
    TRY(scene_hello(s, r));
    TRY(step(s, raw_map(r), "mmap"));
    TRY(step(s, raw_open_uffd(r, r->welcome.features), "uffd"));
    return step(s, raw_register(r), "register");
}

/* up to a registered uffd that is not handed over */
static int scene_join(struct scene *s, struct raw *r)
{
    TRY(scene_map(s, r));
    return step(s, raw_attach(r), "ATTACH");
}

/* A page of these that is not received, at a random place: 0 or CANNOT. */
static int scene_missing_page_of(struct scene *s, const struct raw *r, uint64_t first, uint64_t n, uint64_t *pagep)
{
    uint64_t start = scene_random(s) % n;
    for (uint64_t i = 0; i < n; i++) {
        *pagep = first + (start + i) % n;
        if (!raw_is_received(r, *pagep))
            return 0;
    }
    return scene_end(s, CANNOT, "cannot", "every page is received already");
}

static int scene_missing_page(struct scene *s, const struct raw *r, uint64_t *pagep)
{
    return scene_missing_page_of(s, r, 0, raw_status_block(r)->page_count, pagep);
}

/* Whether the bytes are the source's of that page. */
static int scene_is_right(struct scene *s, const struct raw *r, const void *bytes, uint64_t page)
{
    uint64_t page_size = r->welcome.page_size, start = page * page_size;
    for (uint64_t at = 0; at < page_size && s->source_fd >= 0; at += COMPARED_BYTES) {
        uint8_t source[COMPARED_BYTES] = {0}; /* the source may end within the page */
        if (pread(s->source_fd, source, sizeof source, (off_t)(start + at)) < 0)
            return 0;
        if (memcmp(source, (const uint8_t *)bytes + at, sizeof source))
            return 0;
        s->bytes_checked += sizeof source;
    }
    return 1;
}

/* The same through the memfd, whoever has which mapping. */
static int scene_memfd_is_right(struct scene *s, const struct raw *r, uint64_t page)
{
    uint64_t page_size = r->welcome.page_size;
    uint8_t *bytes = malloc(page_size);
    ssize_t n = pread(r->memfd, bytes, page_size, (off_t)(page * page_size));
    int right = n == (ssize_t)page_size && scene_is_right(s, r, bytes, page);
    free(bytes);
    return right;
}

static void *touch(void *argument)
{
    struct toucher *t = argument;
    t->value = *t->at;
    return NULL;
}

static void toucher_start(struct toucher *t, const uint8_t *at)
{
    t->at = at;
    if (pthread_create(&t->thread, NULL, touch, t))
        _exit(CANNOT);
}

/* 0: it has its byte; -ETIMEDOUT. */
static int toucher_join(struct toucher *t, int timeout_ms)
{
    struct timespec deadline;
    clock_gettime(CLOCK_REALTIME, &deadline);
    deadline.tv_sec += timeout_ms / 1000;
    deadline.tv_nsec += timeout_ms % 1000 * 1000000L;
    deadline.tv_sec += deadline.tv_nsec / 1000000000;
    deadline.tv_nsec %= 1000000000;
    return -pthread_timedjoin_np(t->thread, NULL, &deadline);
}

/* Touches this page through r and compares it: 0 or HARM. */
static int scene_use_page(struct scene *s, const struct raw *r, uint64_t page)
{
    struct toucher t;
    const uint8_t *bytes = r->data + page * r->welcome.page_size;
    toucher_start(&t, bytes);
    if (toucher_join(&t, FAULT_LIMIT_MS))
        return scene_end(s, HARM, "harm", "page %llu never came", (unsigned long long)page);
    if (!scene_is_right(s, r, bytes, page))
        return scene_end(s, HARM, "harm", "page %llu holds wrong bytes", (unsigned long long)page);
    return 0;
}

/* The same with missing pages at random places: 0, CANNOT or HARM. */
static int scene_use(struct scene *s, const struct raw *r, uint32_t n_pages)
{
    for (uint32_t i = 0; i < n_pages; i++) {
        uint64_t page;
        TRY(scene_missing_page(s, r, &page));
        TRY(scene_use_page(s, r, page));
    }
    return 0;
}

/* A well-behaved helper comes, reads pages and leaves: 0, CANNOT or HARM. */
static int scene_others_go_on(struct scene *s)
{
    struct wire_plain leave = {.header = raw_header(WIRE_LEAVE, sizeof leave)};
    struct scene honest = *s;
    struct raw r;
    honest.mode = WIRE_MODE_RO;
    int verdict = scene_join(&honest, &r);
    if (!verdict)
        verdict = scene_use(&honest, &r, OTHERS_PAGES);
    s->bytes_checked = honest.bytes_checked;
    s->random = honest.random;
    if (verdict)
        return scene_end(s, HARM, "harm", "another helper is not served: %s", honest.detail);
    close(r.uffd);
    raw_send(r.control, &leave, sizeof leave, NULL, 0);
    close(r.control);
    return 0;
}

/* The connection must be refused or cut off: 0 or HARM. */
static int scene_expect_refusal(struct scene *s, const struct raw *r, const char *what)
{
    char text[WIRE_TEXT_MAX];
    int rc = raw_refusal(r->control, text, sizeof text, NOTICE_LIMIT_MS);
    s->attempts++;
    if (rc)
        return scene_end(s, HARM, "harm", "%s: %s", what, rc > 0 ? "was answered as if all were well" : strerror(-rc));
    scene_end(s, WELL, "refused", "%s: %s", what, text[0] ? text : "hung up");
    return 0;
}

/* The same of an ATTACH that may be granted first: ACK, then the cut. */
static int scene_expect_cut_off(struct scene *s, struct raw *r, const char *what)
{
    int rc = raw_receive(r->control, &r->ack, sizeof r->ack, NULL, NULL, NOTICE_LIMIT_MS);
    if (rc == (int)sizeof r->ack && r->ack.header.type == WIRE_ACK)
        return scene_expect_refusal(s, r, what);
    s->attempts++;
    return rc == -ETIMEDOUT ? scene_end(s, HARM, "harm", "%s: no answer", what) : 0;
}

/* Ends WELL if the others go on. */
static int scene_end_if_others_go_on(struct scene *s, const char *outcome, const char *detail)
{
    TRY(scene_others_go_on(s));
    return scene_end(s, WELL, outcome, "%s", detail);
}

/* Returns when the coordinator has seen a fault of r's (or time is over: -ETIMEDOUT). */
static int raw_wait_for_fault(const struct raw *r)
{
    const struct timespec nap = {.tv_nsec = LOOK_AGAIN_MS * 1000000L};
    for (int i = 0; i < FAULT_LIMIT_MS / LOOK_AGAIN_MS; i++) {
        if (__atomic_load_n(&raw_status_helper(r)->faults, __ATOMIC_ACQUIRE))
            return 0;
        nanosleep(&nap, NULL);
    }
    return -ETIMEDOUT;
}

/* How many faults wait on r's uffd that nobody has read. */
static unsigned raw_pending(const struct raw *r)
{
    char path[64], text[512];
    unsigned pending = 0;
    snprintf(path, sizeof path, "/proc/self/fdinfo/%d", r->uffd);
    FILE *file = fopen(path, "re");
    size_t length = file ? fread(text, 1, sizeof text - 1, file) : 0;
    if (file)
        fclose(file);
    text[length] = 0;
    const char *line = strstr(text, "pending:");
    return line && sscanf(line, "pending: %u", &pending) == 1 ? pending : 0;
}

/* Another process that does the deed and ends with exit status 0; it dies with this one. */
static pid_t scene_spawn(struct scene *s, int (*deed)(struct scene *s))
{
    pid_t pid = fork();
    if (pid)
        return pid;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    _exit(deed(s));
}

/* Its wait status; with WUNTRACED also when it stops. */
static int scene_wait(pid_t pid, int options)
{
    int status = -1;
    while (waitpid(pid, &status, options) < 0 && errno == EINTR)
        ;
    return status;
}

#endif
