/* helper_driver: a helper in plain C that does what it is told on stdin, for the tests of the helper's side.
 *
 *   helper_driver SOCKET
 *
 * A line is TAG COMMAND ARGUMENTS...; the answer is one line, TAG and the result. A TAG that begins with '&' runs in a
 * thread of its own. Touches are caught: the result of a read is "ok", "wrong", "sigbus" or "segv". Knows nothing of
 * coordinators.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
#include "helper.h"

enum { SLOTS = 16, LINE_BYTES = 1024, RESULT_BYTES = 1024, PEEK_MS = 20000 };

static char socket_path[256];
static struct pcshare_attachment *slots[SLOTS];
static void *reserved[SLOTS];
static pthread_mutex_t out = PTHREAD_MUTEX_INITIALIZER;
static _Thread_local sigjmp_buf escape;
static _Thread_local volatile sig_atomic_t is_touching;
static pid_t child;

struct job {
    char line[LINE_BYTES];
};

static void on_fault(int signal_number)
{
    if (!is_touching)
        _exit(99);
    siglongjmp(escape, signal_number);
}

static void on_nothing(int signal_number)
{
    (void)signal_number;
}

static void answer(const char *tag, const char *result)
{
    char line[LINE_BYTES + RESULT_BYTES];
    int n = snprintf(line, sizeof(line), "%s %s\n", tag, result);

    pthread_mutex_lock(&out);
    if (write(STDOUT_FILENO, line, (size_t)n) != n)
        _exit(98);
    pthread_mutex_unlock(&out);
}

/* What comes now comes after all that was answered and touched before: the thread sanitizer cannot see that from the
 * pipes. */
static void synchronize(void)
{
    pthread_mutex_lock(&out);
    pthread_mutex_unlock(&out);
}

/* ---- touching ---- */

/* What the block holds: each 8 bytes their number; the tail zeros or whatever the last page brought. */
static const char *compare_page(const struct pcshare_attachment *a, uint64_t page)
{
    struct pcshare_info info;
    const volatile uint64_t *words;
    const char *verdict = "ok";
    int caught;

    pcshare_get_info(a, &info);
    words = (const volatile uint64_t *)((char *)pcshare_data(a) + page * info.page_size);
    synchronize();
    caught = sigsetjmp(escape, 1);
    if (caught) {
        is_touching = 0;
        return caught == SIGBUS ? "sigbus" : "segv";
    }
    is_touching = 1;
    for (uint64_t i = 0; i < info.page_size / 8; i++)
        if (words[i] != page * (info.page_size / 8) + i)
            verdict = "wrong";
    is_touching = 0;
    return verdict;
}

static const char *write_word(const struct pcshare_attachment *a, uint64_t page, uint64_t value)
{
    struct pcshare_info info;
    int caught;

    pcshare_get_info(a, &info);
    caught = sigsetjmp(escape, 1);
    if (caught) {
        is_touching = 0;
        return caught == SIGBUS ? "sigbus" : "segv";
    }
    is_touching = 1;
    *(volatile uint64_t *)((char *)pcshare_data(a) + page * info.page_size) = value;
    is_touching = 0;
    return "ok";
}

static const char *read_word(const struct pcshare_attachment *a, uint64_t page, uint64_t value)
{
    struct pcshare_info info;

    pcshare_get_info(a, &info);
    return *(volatile uint64_t *)((char *)pcshare_data(a) + page * info.page_size) == value ? "ok" : "wrong";
}

/* A fault inside a system call. */
static int send_page(const struct pcshare_attachment *a, uint64_t page)
{
    int fds[2], rc;

    if (pipe(fds) < 0)
        return -errno;
    rc = write(fds[1], (char *)pcshare_data(a) + page * 4096, 8) == 8 ? 0 : -errno;
    close(fds[0]);
    close(fds[1]);
    return rc;
}

/* ---- looking at the process ---- */

static int count_entries(const char *path)
{
    DIR *directory = opendir(path);
    int n = -3; /* ".", "..", and the directory's own fd, which /proc/self/task has not */

    while (directory && readdir(directory))
        n++;
    if (directory)
        closedir(directory);
    return n;
}

static int count_sentinels(void)
{
    DIR *directory = opendir("/proc/self/task");
    struct dirent *entry;
    char path[300], name[32];
    int n = 0;

    while (directory && (entry = readdir(directory))) {
        FILE *comm;

        snprintf(path, sizeof(path), "/proc/self/task/%s/comm", entry->d_name);
        comm = fopen(path, "re");
        if (comm && fgets(name, sizeof(name), comm))
            n += strncmp(name, "pcshare-sentinel", 15) == 0;
        if (comm)
            fclose(comm);
    }
    if (directory)
        closedir(directory);
    return n;
}

/* Of the mapping that data lies in: an inaccessible one may have merged with its neighbour. */
static void vm_flags(const void *data, char *result)
{
    FILE *smaps = fopen("/proc/self/smaps", "re");
    uintptr_t start, end, addr = (uintptr_t)data;
    char line[512];
    int inside = 0;

    strcpy(result, "none");
    while (smaps && fgets(line, sizeof(line), smaps)) {
        if (sscanf(line, "%" SCNxPTR "-%" SCNxPTR " ", &start, &end) == 2)
            inside = start <= addr && addr < end;
        if (inside && strncmp(line, "VmFlags:", 8) == 0) {
            line[strcspn(line, "\n")] = '\0';
            strcpy(result, line);
            break;
        }
    }
    if (smaps)
        fclose(smaps);
}

/* ---- commands ---- */

static void *reserve_place(uint32_t mode, uint64_t *lengthp)
{
    struct pcshare_info info;
    char *place;

    if (pcshare_peek(&info, socket_path, "data", mode, PEEK_MS) < 0)
        return NULL;
    *lengthp = info.map_length;
    place = mmap(NULL, info.map_length + info.page_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return place + (info.page_size - (uintptr_t)place % info.page_size) % info.page_size;
}

static uint32_t mode_of(const char *text)
{
    return text[0] == 'c' ? PCSHARE_COW : text[0] == 'd' ? 0 : text[1] == 'w' ? PCSHARE_RW : PCSHARE_RO;
}

static void run_attach(const char *arguments, char *result)
{
    char mode[16], place[16] = "";
    uint64_t length = 0;
    unsigned slot;
    long timeout_ms;
    int rc;

    sscanf(arguments, "%u %15s %ld %15s", &slot, mode, &timeout_ms, place);
    reserved[slot] = place[0] ? reserve_place(mode_of(mode), &length) : NULL;
    length += strcmp(place, "long") == 0 ? 4096 : 0;
    rc = pcshare_attach(&slots[slot], socket_path, "data", mode_of(mode), timeout_ms, reserved[slot], length);
    if (rc == 0 && reserved[slot] && pcshare_data(slots[slot]) != reserved[slot])
        rc = -1;
    snprintf(result, RESULT_BYTES, "%d %s", rc, rc < 0 ? pcshare_error_text() : "");
}

static void run_peek(char *result)
{
    struct pcshare_info info = {0};
    int rc = pcshare_peek(&info, socket_path, NULL, 0, PEEK_MS);

    snprintf(result, RESULT_BYTES, "%d %s %" PRIu64 " %" PRIu64 " %u", rc, rc < 0 ? pcshare_error_text() : info.idstr,
             info.used_length, info.map_length, info.mode);
}

static void run_ensure(const char *arguments, char *result)
{
    uint64_t offset, length, lost_offset = 0, lost_length = 0;
    unsigned slot;
    long timeout_ms;
    int rc;

    sscanf(arguments, "%u %" SCNu64 " %" SCNu64 " %ld", &slot, &offset, &length, &timeout_ms);
    rc = pcshare_ensure(slots[slot], offset, length, timeout_ms, &lost_offset, &lost_length);
    snprintf(result, RESULT_BYTES, "%d %" PRIu64 " %" PRIu64 " %s", rc, lost_offset, lost_length,
             rc < 0 ? pcshare_error_text() : "");
}

/* Waits, without polling, until the state is the one wanted. */
static void run_await(unsigned slot, int wanted, char *result)
{
    struct pcshare_progress progress;
    int state;

    while ((state = pcshare_state(slots[slot])) != wanted && state != PCSHARE_COMPLETE && state != PCSHARE_LOST) {
        pcshare_get_progress(slots[slot], &progress);
        if (pcshare_state(slots[slot]) == state)
            pcshare_wait_progress(slots[slot], progress.seq, 1000);
    }
    snprintf(result, RESULT_BYTES, "%d", state);
}

static void run_progress(unsigned slot, char *result)
{
    struct pcshare_progress p;

    pcshare_get_progress(slots[slot], &p);
    snprintf(result, RESULT_BYTES, "%" PRIu64 " %" PRIu64 " %u %u", p.received_pages, p.page_count, p.state, p.seq);
}

static void run_line(char *line);

/* fork COMMAND;COMMAND...: the child runs them, answers them, and exits. */
static void run_fork(const char *commands, char *result)
{
    char copy[LINE_BYTES], *rest = copy, *one;

    child = fork();
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        pthread_mutex_init(&out, NULL);
        snprintf(copy, sizeof(copy), "%s", commands);
        while ((one = strsep(&rest, ";"))) {
            for (char *comma = strchr(one, ','); comma; comma = strchr(comma, ',')) /* of a fork in the fork */
                *comma = ';';
            run_line(one);
        }
        _exit(0);
    }
    snprintf(result, RESULT_BYTES, "%d", child > 0 ? 0 : -errno);
}

static void run_join(char *result)
{
    int status = 0;

    waitpid(child, &status, 0);
    snprintf(result, RESULT_BYTES, "%s %d", WIFEXITED(status) ? "exit" : "signal",
             WIFEXITED(status) ? WEXITSTATUS(status) : WTERMSIG(status));
}

/* Takes the place of a mapping in the child, before the library's own handler has run. */
static void *robbed;

static void rob(void)
{
    if (robbed)
        mmap(robbed, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
}

__attribute__((constructor(101))) static void be_robber_first(void)
{
    pthread_atfork(NULL, NULL, rob);
}

static void run_detach(unsigned slot, char *result)
{
    struct pcshare_info info;
    void *data = pcshare_data(slots[slot]);

    pcshare_get_info(slots[slot], &info);
    pcshare_detach(slots[slot], reserved[slot] != NULL);
    slots[slot] = NULL;
    vm_flags(data, result);
    if (reserved[slot])
        munmap(data, (info.used_length + 4095) / 4096 * 4096);
}

static int run_simple(const char *command, const char *arguments, char *result)
{
    uint64_t x = 0, y = 0, z = 0;
    int n = sscanf(arguments, "%" SCNu64 " %" SCNu64 " %" SCNu64, &x, &y, &z), rc = 0;
    struct pcshare_attachment *a = n > 0 && x < SLOTS ? slots[x] : NULL;

    if (strcmp(command, "state") == 0)
        rc = pcshare_state(a);
    else if (strcmp(command, "prefetch") == 0)
        rc = pcshare_prefetch(a, y, z);
    else if (strcmp(command, "received") == 0)
        rc = pcshare_is_received(a, y, z);
    else if (strcmp(command, "wait") == 0)
        rc = pcshare_wait_progress(a, (uint32_t)y, (int64_t)z);
    else if (strcmp(command, "send") == 0)
        rc = send_page(a, y);
    else if (strcmp(command, "mlockall") == 0)
        rc = mlockall(MCL_FUTURE);
    else if (strcmp(command, "munlockall") == 0)
        rc = munlockall();
    else if (strcmp(command, "memlock") == 0)
        rc = setrlimit(RLIMIT_MEMLOCK, &(struct rlimit){x, x});
    else if (strcmp(command, "nofile") == 0)
        rc = prlimit(0, RLIMIT_NOFILE, &(struct rlimit){x, 4096}, NULL);
    else if (strcmp(command, "setuid") == 0)
        rc = setresgid((gid_t)x, (gid_t)x, (gid_t)x) | setresuid((uid_t)x, (uid_t)x, (uid_t)x);
    else if (strcmp(command, "fds") == 0)
        rc = count_entries("/proc/self/fd");
    else if (strcmp(command, "threads") == 0)
        rc = count_entries("/proc/self/task") + 1;
    else if (strcmp(command, "sentinels") == 0)
        rc = count_sentinels();
    else if (strcmp(command, "settle") == 0) {
        while ((rc = count_sentinels()) == 0)
            usleep(1000);
    } else if (strcmp(command, "pause") == 0)
        rc = poll(NULL, 0, (int)x);
    else if (strcmp(command, "end-child") == 0)
        rc = kill(child, SIGKILL) | (waitpid(child, NULL, 0) < 0);
    else if (strcmp(command, "remove") == 0)
        rc = madvise((char *)pcshare_data(a) + y * 4096, 4096, MADV_REMOVE);
    else if (strcmp(command, "drop") == 0) {
        pcshare_detach(a, reserved[x] != NULL);
        slots[x] = NULL;
    } else if (strcmp(command, "rob") == 0)
        robbed = pcshare_data(a);
    else
        return 0;
    snprintf(result, RESULT_BYTES, "%d", rc);
    return 1;
}

static void run_command(const char *command, const char *arguments, char *result)
{
    uint64_t x = 0, y = 0, z = 0;
    int n = sscanf(arguments, "%" SCNu64 " %" SCNu64 " %" SCNu64, &x, &y, &z);
    struct pcshare_attachment *a = n > 0 && x < SLOTS ? slots[x] : NULL;

    if (run_simple(command, arguments, result))
        return;
    if (strcmp(command, "attach") == 0)
        run_attach(arguments, result);
    else if (strcmp(command, "socket") == 0)
        snprintf(socket_path, sizeof(socket_path), "%s", arguments);
    else if (strcmp(command, "peek") == 0)
        run_peek(result);
    else if (strcmp(command, "ensure") == 0)
        run_ensure(arguments, result);
    else if (strcmp(command, "await") == 0)
        run_await((unsigned)x, (int)y, result);
    else if (strcmp(command, "progress") == 0)
        run_progress((unsigned)x, result);
    else if (strcmp(command, "fork") == 0)
        run_fork(arguments, result);
    else if (strcmp(command, "join") == 0)
        run_join(result);
    else if (strcmp(command, "detach") == 0)
        run_detach((unsigned)x, result);
    else if (strcmp(command, "flags") == 0)
        vm_flags(pcshare_data(a), result);
    else if (strcmp(command, "read") == 0)
        strcpy(result, compare_page(a, y));
    else if (strcmp(command, "word") == 0)
        strcpy(result, read_word(a, y, z));
    else if (strcmp(command, "write") == 0)
        strcpy(result, write_word(a, y, z));
    else
        strcpy(result, "unknown");
}

static void run_line(char *line)
{
    char tag[64] = "?", command[64] = "?", result[RESULT_BYTES] = "";
    int at = 0;

    sscanf(line, "%63s %63s %n", tag, command, &at);
    synchronize();
    run_command(command, line + at, result);
    answer(tag, result);
}

static void *run_job(void *argument)
{
    struct job *job = argument;

    run_line(job->line);
    free(job);
    return NULL;
}

static void start_job(const char *line)
{
    struct job *job = malloc(sizeof(*job));
    pthread_t thread;

    strcpy(job->line, line);
    if (pthread_create(&thread, NULL, run_job, job) == 0)
        pthread_detach(thread);
}

int main(int argc, char **argv)
{
    struct sigaction on_touch = {.sa_handler = on_fault},
                     on_interrupt = {.sa_handler = on_nothing, .sa_flags = SA_RESTART};
    char line[LINE_BYTES];

    if (argc < 2)
        return 2;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    snprintf(socket_path, sizeof(socket_path), "%s", argv[1]);
    sigaction(SIGBUS, &on_touch, NULL);
    sigaction(SIGSEGV, &on_touch, NULL);
    sigaction(SIGUSR1, &on_interrupt, NULL);
    while (fgets(line, sizeof(line), stdin)) {
        line[strcspn(line, "\n")] = '\0';
        if (line[0] == '&')
            start_job(line);
        else
            run_line(line);
    }
    return 0;
}
