/* habits: honest users of the library who do what programs do: take signals, lock memory, dump core, exec.
 * Nothing of it may plant a page, lose one, or hang. */
#ifndef PCSHARE_HOSTILE_HABITS_H
#define PCSHARE_HOSTILE_HABITS_H

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include "helper.h"
#include "scene.h"

enum {
    HABIT_PAGES = 64,           /* that each of them reads */
    PROFILER_PERIOD_US = 1000,  /* a sampling profiler's */
    BYTES_OF_ST_BLOCKS = 512,   /* whatever the file system's blocks are */
};

static int attach(struct scene *s, struct pcshare_attachment **ap, uint32_t mode)
{
    int rc;
    do /* a profiler's signals interrupt it: that is the caller's business */
        rc = pcshare_attach(ap, s->socket_path, s->idstr, mode, RAW_ANSWER_TIMEOUT_MS, NULL, 0);
    while (rc == -EINTR);
    return rc ? scene_end(s, CANNOT, "cannot", "attach: %s", pcshare_error_text()) : 0;
}

/* Pages at random places, through the library's mapping; scene_is_right wants only the page size of r. */
static int use(struct scene *s, struct pcshare_attachment *a, uint32_t n_pages)
{
    struct pcshare_info info;
    struct raw r = {.control = -1};
    pcshare_get_info(a, &info);
    r.welcome.page_size = info.page_size;
    for (uint32_t i = 0; i < n_pages; i++) {
        uint64_t page = scene_random(s) % (info.map_length / info.page_size);
        if (!scene_is_right(s, &r, (const uint8_t *)pcshare_data(a) + page * info.page_size, page))
            return scene_end(s, HARM, "harm", "page %llu holds wrong bytes", (unsigned long long)page);
    }
    return 0;
}

static volatile sig_atomic_t n_samples;

static void on_sample(int signal_number)
{
    (void)signal_number;
    n_samples++;
}

static int hostile_profiled(struct scene *s)
{
    const struct itimerspec period = {{0, PROFILER_PERIOD_US * 1000L}, {0, PROFILER_PERIOD_US * 1000L}};
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGPROF};
    struct sigaction action = {.sa_handler = on_sample, .sa_flags = SA_RESTART};
    struct pcshare_attachment *a;
    timer_t timer;
    sigaction(SIGPROF, &action, NULL);
    if (timer_create(CLOCK_MONOTONIC, &event, &timer) || timer_settime(timer, 0, &period, NULL))
        return scene_end(s, CANNOT, "cannot", "timer: %s", strerror(errno));
    TRY(attach(s, &a, PCSHARE_RO));
    TRY(use(s, a, HABIT_PAGES));
    timer_delete(timer);
    pcshare_detach(a, 0);
    s->attempts = (uint64_t)n_samples;
    if (!n_samples)
        return scene_end(s, CANNOT, "cannot", "the timer took no sample");
    return scene_end_if_others_go_on(s, "served", "between the samples");
}

static int allow_locking(struct scene *s, int flags)
{
    const struct rlimit all = {RLIM_INFINITY, RLIM_INFINITY};
    setrlimit(RLIMIT_MEMLOCK, &all);
    s->attempts++;
    return mlockall(flags) ? scene_end(s, CANNOT, "cannot", "mlockall: %s", strerror(errno)) : 0;
}

/* A private mapping that becomes writable under MCL_FUTURE is filled at once: who serves must be told of it before. */
static int attach_locked(struct scene *s, uint32_t mode)
{
    struct pcshare_attachment *a;
    TRY(allow_locking(s, MCL_FUTURE));
    TRY(attach(s, &a, mode));
    TRY(use(s, a, HABIT_PAGES));
    pcshare_detach(a, 0);
    munlockall();
    return scene_end(s, WELL, "served", "with memory locked before it attached");
}

static int hostile_mlockall_before(struct scene *s)
{
    return attach_locked(s, PCSHARE_RO);
}

static int hostile_mlockall_before_cow(struct scene *s)
{
    return attach_locked(s, PCSHARE_COW);
}

static int hostile_mlockall_after(struct scene *s)
{
    struct pcshare_attachment *a;
    TRY(attach(s, &a, PCSHARE_RO));
    TRY(allow_locking(s, MCL_CURRENT)); /* waits until every page has come */
    TRY(use(s, a, HABIT_PAGES));
    pcshare_detach(a, 0);
    munlockall();
    return scene_end(s, WELL, "served", "when every page had come");
}

static char core_directory[] = "/tmp/pcshare-core-XXXXXX";

static int dump_core(struct scene *s)
{
    const struct rlimit all = {RLIM_INFINITY, RLIM_INFINITY};
    struct pcshare_attachment *a;
    setrlimit(RLIMIT_CORE, &all);
    TRY(attach(s, &a, PCSHARE_RO));
    TRY(use(s, a, 1));
    if (chdir(core_directory))
        return CANNOT;
    abort();
}

/* Removes what lies in the directory, and it; how many bytes the largest file takes (a dump has holes). */
static off_t remove_cores(void)
{
    off_t largest = 0, bytes;
    DIR *directory = opendir(core_directory);
    for (struct dirent *entry; directory && (entry = readdir(directory));) {
        struct stat file;
        if (!fstatat(dirfd(directory), entry->d_name, &file, 0) && S_ISREG(file.st_mode)) {
            bytes = (off_t)file.st_blocks * BYTES_OF_ST_BLOCKS;
            largest = bytes > largest ? bytes : largest;
            unlinkat(dirfd(directory), entry->d_name, 0);
        }
    }
    if (directory)
        closedir(directory);
    rmdir(core_directory);
    return largest;
}

/* The others read pages that the dump would have planted, had it looked at them. */
static int hostile_dumps_core(struct scene *s)
{
    struct raw r;
    TRY(scene_hello(s, &r));
    if (!mkdtemp(core_directory))
        return scene_end(s, CANNOT, "cannot", "mkdtemp: %s", strerror(errno));
    int status = scene_wait(scene_spawn(s, dump_core), 0);
    off_t largest = remove_cores();
    s->attempts++;
    if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGABRT)
        return scene_end(s, CANNOT, "cannot", "it did not come so far as to abort (wait status %#x)", (unsigned)status);
    if (largest >= (off_t)r.welcome.map_length)
        return scene_end(s, HARM, "harm", "the core has %lld bytes: the block is in it", (long long)largest);
    TRY(scene_others_go_on(s));
    const char *missing = WCOREDUMP(status) ? "" : ", not dumped";
    return scene_end(s, WELL, "died", "core of %lld bytes%s", (long long)largest, missing);
}

static int told[2]; /* closes at exec */

static int exec_idle(void)
{
    execl("/proc/self/exe", "hostile", "--idle", (char *)NULL);
    return CANNOT;
}

static int exec_attached(struct scene *s)
{
    struct pcshare_attachment *a;
    TRY(attach(s, &a, PCSHARE_RO));
    TRY(use(s, a, 1));
    return exec_idle();
}

static int exec_holding(struct scene *s)
{
    struct raw r;
    TRY(scene_join(s, &r));
    TRY(scene_use(s, &r, 1));
    fcntl(r.control, F_SETFD, 0);
    fcntl(r.uffd, F_SETFD, 0);
    return exec_idle();
}

static int exec_and_look(struct scene *s, int (*deed)(struct scene *s))
{
    char byte;
    if (pipe2(told, O_CLOEXEC))
        return scene_end(s, CANNOT, "cannot", "pipe2: %s", strerror(errno));
    pid_t pid = scene_spawn(s, deed);
    close(told[1]);
    while (read(told[0], &byte, 1) < 0 && errno == EINTR)
        ;
    s->attempts++;
    int verdict = scene_others_go_on(s);
    kill(pid, SIGKILL);
    int status = scene_wait(pid, 0);
    if (verdict)
        return verdict;
    if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL)
        return scene_end(s, CANNOT, "cannot", "it did not come so far as to exec (wait status %#x)", (unsigned)status);
    return scene_end(s, WELL, "left", "while the others went on");
}

static int hostile_execs(struct scene *s)
{
    return exec_and_look(s, exec_attached);
}

static int hostile_execs_holding(struct scene *s)
{
    return exec_and_look(s, exec_holding);
}

#endif
