/* page_channel_test: what of the page channels needs callbacks and threads; a case a run, named by the first argument.
 *
 * A read that blocks is made for real: its buffer lies in memory that is missing until the test places it. Exit status:
 * 0 the claim holds, 1 it does not (stderr says where), 77 this host cannot (no uffd for faults inside system calls).
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>
#include "page_channel.h"
#include "uffd.h"

enum {
    CANNOT = 77,
    PAGE = 4096,
    FILE_PAGES = 256,
    DEMAND_READERS = 16,
    STREAM_READERS = 2,
    REQUESTS_MAX = 256,
    WAIT_S = 30,
    NOT_DONE = 12345, /* no result that a channel gives */
};

#define CHECK(condition) ((condition) ? (void)0 : fail(#condition, __LINE__))

static void fail(const char *what, int line) {
    fprintf(stderr, "page_channel_test.c:%d: %s\n", line, what);
    exit(1);
}

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t finished = PTHREAD_COND_INITIALIZER;

struct job {
    struct page_request request;
    struct page_channel *again; /* submitted there once more when done, so often */
    int n_again;
    int result;
    int n_done;
    uint64_t done_ns;
    uint64_t rank; /* how many of all were done before it */
};

static struct job jobs[REQUESTS_MAX];
static uint64_t n_done_all;
static uint8_t plain[REQUESTS_MAX][PAGE];
static uint8_t *missing; /* REQUESTS_MAX pages */
static int missing_uffd = -1;
static const char *file_path;

static uint64_t now_ns(void) {
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void job_done(struct page_request *request, int result) {
    struct job *job = request->owner;
    int again;

    pthread_mutex_lock(&lock);
    job->result = result;
    job->done_ns = now_ns();
    again = job->n_again > 0 && result == 0;
    if (again) {
        job->n_again--;
    } else {
        job->n_done++;
        job->rank = n_done_all++;
        pthread_cond_broadcast(&finished);
    }
    pthread_mutex_unlock(&lock);
    if (again)
        page_channel_submit(job->again, request);
}

/* Job i asks for page i of the file. */
static void job_submit(struct page_channel *channel, int i, int is_demand, uint8_t *bytes) {
    pthread_mutex_lock(&lock);
    jobs[i].result = NOT_DONE;
    jobs[i].n_done = 0;
    pthread_mutex_unlock(&lock);
    jobs[i].request = (struct page_request){
        .offset = (uint64_t)i % FILE_PAGES * PAGE,
        .length = PAGE,
        .bytes = bytes,
        .is_demand = is_demand,
        .done = job_done,
        .owner = &jobs[i],
    };
    page_channel_submit(channel, &jobs[i].request);
}

static int jobs_done(int first, int n) {
    int count = 0;

    for (int i = first; i < first + n; i++)
        count += jobs[i].n_done;
    return count;
}

/* Waits until n of all jobs from first on are done. */
static void jobs_wait(int first, int n) {
    struct timespec deadline;

    clock_gettime(CLOCK_REALTIME, &deadline);
    deadline.tv_sec += WAIT_S;
    pthread_mutex_lock(&lock);
    while (jobs_done(first, REQUESTS_MAX - first) < n)
        CHECK(pthread_cond_timedwait(&finished, &lock, &deadline) == 0);
    pthread_mutex_unlock(&lock);
}

static int job_result(int i) {
    int result;

    pthread_mutex_lock(&lock);
    result = jobs[i].n_done == 1 ? jobs[i].result : NOT_DONE;
    pthread_mutex_unlock(&lock);
    return result;
}

static uint8_t content(int page) {
    return (uint8_t)(page * 7 + 1);
}

static int page_is(const uint8_t *bytes, int value) {
    for (int i = 0; i < PAGE; i++)
        if (bytes[i] != value)
            return 0;
    return 1;
}

static struct page_channel *open_file(void) {
    struct page_channel *channel;
    uint8_t page[PAGE];
    int fd = open(file_path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

    CHECK(fd >= 0);
    for (int i = 0; i < FILE_PAGES; i++) {
        memset(page, content(i), PAGE);
        CHECK(write(fd, page, PAGE) == PAGE);
    }
    CHECK(page_channel_file_new(&channel, fd, (uint64_t)FILE_PAGES * PAGE) == 0);
    return channel;
}

static void missing_setup(void) {
    int user_mode_only;

    missing_uffd = uffd_open(-1, &user_mode_only);
    if (missing_uffd < 0 || user_mode_only) {
        fprintf(stderr, "no uffd for faults inside system calls\n");
        exit(CANNOT);
    }
    CHECK(uffd_api(missing_uffd, 0, NULL, NULL) == 0);
    missing = mmap(NULL, (size_t)REQUESTS_MAX * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(missing != MAP_FAILED);
    CHECK(uffd_register(missing_uffd, (uint64_t)(uintptr_t)missing, (uint64_t)REQUESTS_MAX * PAGE, UFFD_MODE_MISSING,
                        NULL) == 0);
}

/* Lets the reads into missing pages [first, first + n) go on. */
static void missing_release(int first, int n) {
    uint64_t done, addr = (uint64_t)(uintptr_t)missing + (uint64_t)first * PAGE;

    CHECK(uffd_zeropage(missing_uffd, addr, (uint64_t)n * PAGE, &done) == 0);
    CHECK(uffd_wake(missing_uffd, addr, (uint64_t)n * PAGE) == 0);
}

/* Waits until so many reads block in missing pages. */
static void missing_wait(int n) {
    struct uffd_message message;
    uint64_t deadline = now_ns() + WAIT_S * 1000000000ull;

    while (n > 0) {
        int got = uffd_read(missing_uffd, &message, 1);

        CHECK(got >= 0 && now_ns() < deadline);
        n -= got;
        usleep(got ? 0 : 100);
    }
}

static void case_reads(void) {
    struct page_channel *channel = open_file();

    for (int i = 0; i < REQUESTS_MAX; i++)
        job_submit(channel, i, i % 2, plain[i]);
    jobs_wait(0, REQUESTS_MAX);
    page_channel_free(channel);
    for (int i = 0; i < REQUESTS_MAX; i++) {
        CHECK(job_result(i) == 0);
        CHECK(page_is(plain[i], content(i)));
    }
}

static void case_tail(void) {
    struct page_channel *channel;
    int fd = open(file_path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

    CHECK(write(fd, "abcdef", 6) == 6);
    CHECK(page_channel_file_new(&channel, fd, 3) == 0);
    memset(plain, 0xff, sizeof(plain));
    job_submit(channel, 0, 1, plain[0]);
    job_submit(channel, 1, 1, plain[1]);
    jobs_wait(0, 2);
    CHECK(job_result(0) == 0 && memcmp(plain[0], "abc\0\0\0", 6) == 0 && plain[0][PAGE - 1] == 0);
    CHECK(job_result(1) == -EINVAL);
    page_channel_free(channel);
}

static void case_shrunk(void) {
    struct page_channel *channel = open_file();

    CHECK(truncate(file_path, 10 * PAGE + 100) == 0);
    memset(plain, 0xff, sizeof(plain));
    for (int i = 9; i <= 11; i++) {
        job_submit(channel, i, 1, plain[i]);
        jobs_wait(i, 1);
    }
    CHECK(job_result(9) == 0 && page_is(plain[9], content(9)));
    CHECK(job_result(10) == -ENODATA);
    CHECK(job_result(11) == -ENODATA);
    CHECK(page_channel_read_now(channel, plain[10], PAGE, 10 * PAGE) != PAGE_CHANNEL_DONE);
    CHECK(page_channel_read_now(channel, plain[11], PAGE, 11 * PAGE) != PAGE_CHANNEL_DONE);
    page_channel_free(channel);
}

static void case_read_error(void) {
    struct page_channel *channel;

    CHECK(page_channel_file_new(&channel, open("/", O_RDONLY | O_CLOEXEC), PAGE) == 0);
    job_submit(channel, 0, 1, plain[0]);
    jobs_wait(0, 1);
    CHECK(job_result(0) == -EISDIR);
    page_channel_free(channel);
}

static void case_blocked_demand_holds_up_no_other(void) {
    struct page_channel *channel = open_file();

    missing_setup();
    for (int i = 0; i < DEMAND_READERS - 1; i++)
        job_submit(channel, i, 1, missing + i * PAGE);
    for (int i = 0; i < 3 * STREAM_READERS; i++)
        job_submit(channel, 100 + i, 0, missing + (100 + i) * PAGE);
    missing_wait(DEMAND_READERS - 1 + STREAM_READERS);
    for (int i = 50; i < 60; i++) {
        job_submit(channel, i, 1, plain[i]);
        jobs_wait(50, i - 49);
        CHECK(job_result(i) == 0 && page_is(plain[i], content(i)));
    }
    CHECK(job_result(0) == NOT_DONE && job_result(100) == NOT_DONE);
    missing_release(0, REQUESTS_MAX);
    jobs_wait(0, DEMAND_READERS - 1 + 3 * STREAM_READERS + 10);
    for (int i = 0; i < DEMAND_READERS - 1; i++)
        CHECK(job_result(i) == 0 && page_is(missing + i * PAGE, content(i)));
    page_channel_free(channel);
}

static int count_readers(void) {
    DIR *tasks = opendir("/proc/self/task");
    struct dirent *task;
    int count = 0;

    while ((task = readdir(tasks))) {
        char path[300], text[2048];
        unsigned long long blocked;
        const char *line;
        ssize_t n;
        int fd;

        snprintf(path, sizeof(path), "/proc/self/task/%s/status", task->d_name);
        fd = open(path, O_RDONLY | O_CLOEXEC);
        n = fd < 0 ? 0 : read(fd, text, sizeof(text) - 1);
        if (fd >= 0)
            close(fd);
        text[n > 0 ? n : 0] = '\0';
        if (strncmp(text, "Name:\tpcshare-read\n", 19) != 0)
            continue;
        count++;
        line = strstr(text, "\nSigBlk:\t");
        CHECK(line && sscanf(line, "\nSigBlk:\t%llx", &blocked) == 1);
        CHECK((blocked & 0x7fffffff) == (0x7fffffff & ~(1ull << (SIGKILL - 1) | 1ull << (SIGSTOP - 1))));
    }
    closedir(tasks);
    return count;
}

static void case_readers_are_limited_and_take_no_signals(void) {
    struct page_channel *channel = open_file();

    missing_setup();
    CHECK(count_readers() == 0);
    for (int i = 0; i < DEMAND_READERS + 8; i++)
        job_submit(channel, i, 1, missing + i * PAGE);
    missing_wait(DEMAND_READERS);
    CHECK(count_readers() == DEMAND_READERS);
    missing_release(0, 1); /* its reader takes a request that waited */
    jobs_wait(0, 1);
    missing_wait(1);
    CHECK(count_readers() == DEMAND_READERS);
    missing_release(1, DEMAND_READERS + 7);
    jobs_wait(0, DEMAND_READERS + 8);
    page_channel_free(channel);
    for (int i = 0; count_readers() && i < 10000; i++) /* one that was joined may be listed a little longer */
        usleep(1000);
    CHECK(count_readers() == 0);
}

static void *free_run(void *argument) {
    page_channel_free(argument);
    return NULL;
}

static void case_free_cancels_what_waits_and_ends_what_is_read(void) {
    struct page_channel *channel = open_file();
    pthread_t freer;

    missing_setup();
    for (int i = 0; i < DEMAND_READERS + 4; i++)
        job_submit(channel, i, 1, missing + i * PAGE);
    for (int i = 100; i < 100 + STREAM_READERS + 3; i++)
        job_submit(channel, i, 0, missing + i * PAGE);
    missing_wait(DEMAND_READERS + STREAM_READERS);
    CHECK(pthread_create(&freer, NULL, free_run, channel) == 0);
    jobs_wait(0, 4 + 3);
    for (int i = 0; i < DEMAND_READERS; i++)
        CHECK(job_result(i) == NOT_DONE);
    for (int i = DEMAND_READERS; i < DEMAND_READERS + 4; i++)
        CHECK(job_result(i) == -ECANCELED);
    missing_release(0, REQUESTS_MAX);
    pthread_join(freer, NULL);
    for (int i = 0; i < DEMAND_READERS; i++)
        CHECK(job_result(i) == 0 && page_is(missing + i * PAGE, content(i)));
    for (int i = 100; i < 100 + STREAM_READERS + 3; i++)
        CHECK(job_result(i) == (i < 100 + STREAM_READERS ? 0 : -ECANCELED));
}

static void case_no_reader_can_start(void) {
    struct page_channel *channel = open_file();
    struct rlimit before, none;

    CHECK(getrlimit(RLIMIT_AS, &before) == 0);
    none = before;
    none.rlim_cur = PAGE;
    CHECK(setrlimit(RLIMIT_AS, &none) == 0);
    job_submit(channel, 0, 1, plain[0]);
    CHECK(setrlimit(RLIMIT_AS, &before) == 0);
    CHECK(job_result(0) == -EAGAIN);
    job_submit(channel, 1, 1, plain[1]); /* the channel goes on when the host can again */
    jobs_wait(1, 1);
    CHECK(job_result(1) == 0);
    page_channel_free(channel);
}

/* Readers that ask again while the channel is being freed, and start other readers as they do. */
static void case_free_while_requests_are_made(void) {
    for (int round = 0; round < 100; round++) {
        struct page_channel *channel = open_file();

        for (int i = 0; i < 32; i++) {
            jobs[i].again = channel;
            jobs[i].n_again = 1000000;
            job_submit(channel, i, i % 4 != 0, plain[i]);
        }
        page_channel_free(channel);
        for (int i = 0; i < 32; i++)
            CHECK(job_result(i) == -ECANCELED);
    }
}

static void case_zero(void) {
    struct page_channel *channel;

    CHECK(page_channel_zero_new(&channel) == 0);
    memset(plain, 0xff, sizeof(plain));
    job_submit(channel, 3, 0, plain[3]);
    CHECK(job_result(3) == 0 && page_is(plain[3], 0));
    page_channel_free(channel);
}

static struct page_channel *open_filter(uint64_t delay_us, uint64_t rate, int error_errno, const char *error_path) {
    struct page_channel *filter;

    CHECK(page_channel_filter_new(&filter, open_file(), delay_us, rate, error_errno, error_path) == 0);
    return filter;
}

static void case_delays_run_side_by_side(void) {
    enum { N = 50, DELAY_MS = 100 };
    struct page_channel *filter = open_filter(DELAY_MS * 1000, 0, 0, NULL);
    uint64_t start = now_ns();

    CHECK(page_channel_read_now(filter, plain[0], PAGE, 0) == PAGE_CHANNEL_WOULD_BLOCK);
    for (int i = 0; i < N; i++)
        job_submit(filter, i, i % 2, plain[i]);
    jobs_wait(0, N);
    for (int i = 0; i < N; i++) {
        CHECK(job_result(i) == 0 && page_is(plain[i], content(i)));
        CHECK(jobs[i].done_ns - start >= DELAY_MS * 1000000ull);
        CHECK(jobs[i].done_ns - start < (N - 1) * DELAY_MS * 1000000ull);
    }
    page_channel_free(filter);
}

static void case_rate(int is_demand) {
    enum { N = 100, RATE = N * PAGE * 5 }; /* a fifth of a second in all */
    struct page_channel *filter = open_filter(0, RATE, 0, NULL);
    uint64_t start = now_ns();

    CHECK(page_channel_read_now(filter, plain[0], PAGE, 0) == PAGE_CHANNEL_WOULD_BLOCK);
    for (int i = 0; i < N; i++)
        job_submit(filter, i, is_demand, plain[i]);
    jobs_wait(0, N);
    for (int i = 0; i < N; i++) {
        CHECK(job_result(i) == 0 && page_is(plain[i], content(i)));
        CHECK(jobs[i].done_ns - start >= (uint64_t)(i + 1) * 2000000 - 1000);
    }
    page_channel_free(filter);
}

static void case_rate_of_stream(void) {
    case_rate(0);
}

static void case_rate_of_demand(void) {
    case_rate(1);
}

/* D4: the demand comes after one page's time, not after those of the stream; the stream pays for it. */
static void case_demand_waits_for_no_stream(void) {
    enum { N = 50, RATE = N * PAGE / 3 }; /* three seconds of stream */
    struct page_channel *filter = open_filter(0, RATE, 0, NULL);
    uint64_t start = now_ns();

    for (int i = 0; i < N; i++)
        job_submit(filter, i, 0, plain[i]);
    job_submit(filter, 100, 1, plain[100]);
    job_submit(filter, 60, 0, plain[60]);
    jobs_wait(0, N + 2);
    CHECK(job_result(100) == 0 && jobs[100].rank < N / 2);
    CHECK(jobs[60].done_ns - start >= (N + 2) * 60000000ull - 1000);
    page_channel_free(filter);
}

static void case_error_while_its_file_exists(void) {
    char path[512];
    struct page_channel *filter;
    int fd;

    snprintf(path, sizeof(path), "%s.error", file_path);
    filter = open_filter(0, 0, EIO, path);
    for (int round = 0; round < 3; round++) {
        if (round == 1)
            CHECK((fd = open(path, O_CREAT | O_CLOEXEC, 0600)) >= 0 && close(fd) == 0);
        else
            unlink(path);
        CHECK(page_channel_read_now(filter, plain[0], PAGE, 0) == PAGE_CHANNEL_WOULD_BLOCK);
        job_submit(filter, round, 1, plain[round]);
        jobs_wait(round, 1);
        CHECK(job_result(round) == (round == 1 ? -EIO : 0));
    }
    page_channel_free(filter);
}

static void case_filter_without_work_is_no_hindrance(void) {
    struct page_channel *filter = open_filter(0, 0, 0, NULL);

    job_submit(filter, 5, 1, plain[5]);
    jobs_wait(5, 1);
    CHECK(job_result(5) == 0 && page_is(plain[5], content(5)));
    CHECK(page_channel_read_now(filter, plain[6], PAGE, 6 * PAGE) == PAGE_CHANNEL_DONE);
    CHECK(page_is(plain[6], content(6)));
    page_channel_free(filter);
}

static void case_free_cancels_what_is_delayed(void) {
    struct page_channel *filter = open_filter(3600 * 1000000ull, 0, 0, NULL);

    for (int i = 0; i < 10; i++)
        job_submit(filter, i, i % 2, plain[i]);
    page_channel_free(filter);
    for (int i = 0; i < 10; i++)
        CHECK(job_result(i) == -ECANCELED);
}

static void case_filters_of_filters(void) {
    struct page_channel *outer;
    uint64_t start;

    CHECK(page_channel_filter_new(&outer, open_filter(30000, 0, 0, NULL), 30000, 0, 0, NULL) == 0);
    start = now_ns();
    job_submit(outer, 0, 1, plain[0]);
    jobs_wait(0, 1);
    CHECK(job_result(0) == 0 && jobs[0].done_ns - start >= 60000000);
    page_channel_free(outer);
}

static void case_filter_with_an_error_needs_its_file(void) {
    struct page_channel *filter;

    CHECK(page_channel_filter_new(&filter, open_file(), 0, 0, EIO, NULL) == -EINVAL);
    CHECK(filter == NULL);
}

static const struct {
    const char *name;
    void (*run)(void);
} cases[] = {
    {"reads", case_reads},
    {"tail", case_tail},
    {"shrunk", case_shrunk},
    {"read_error", case_read_error},
    {"blocked_demand_holds_up_no_other", case_blocked_demand_holds_up_no_other},
    {"readers_are_limited_and_take_no_signals", case_readers_are_limited_and_take_no_signals},
    {"free_cancels_what_waits_and_ends_what_is_read", case_free_cancels_what_waits_and_ends_what_is_read},
    {"no_reader_can_start", case_no_reader_can_start},
    {"free_while_requests_are_made", case_free_while_requests_are_made},
    {"zero", case_zero},
    {"delays_run_side_by_side", case_delays_run_side_by_side},
    {"rate_of_stream", case_rate_of_stream},
    {"rate_of_demand", case_rate_of_demand},
    {"demand_waits_for_no_stream", case_demand_waits_for_no_stream},
    {"error_while_its_file_exists", case_error_while_its_file_exists},
    {"filter_without_work_is_no_hindrance", case_filter_without_work_is_no_hindrance},
    {"free_cancels_what_is_delayed", case_free_cancels_what_is_delayed},
    {"filters_of_filters", case_filters_of_filters},
    {"filter_with_an_error_needs_its_file", case_filter_with_an_error_needs_its_file},
};

/* With a case and a file to write: runs it. Without: names all. */
int main(int argc, char **argv) {
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        if (argc < 3)
            puts(cases[i].name);
        if (argc == 3 && strcmp(argv[1], cases[i].name) == 0) {
            file_path = argv[2];
            cases[i].run();
            return 0;
        }
    }
    return argc < 3 ? 0 : 1;
}
