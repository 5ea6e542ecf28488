/* keeper_child: the coordinator as the keeper's only child: started, heard, and started again when it was killed.
 *
 * It ends for good when it says so (STOPPING=1), when it never served (READY=1), or when whoever ends it signals the
 * keeper; else the keeper never gives up on it. Who ends it while none serves gets one more, which clears up. The
 * blocks, and what the store holds, outlive it. With a command named "next" in the store that one is started in its
 * place; if it does not come to serve, the old one is again.
 */
#define _GNU_SOURCE
#include "keeper_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "keeper_store.h"
#include "thread.h"

enum { EXIT_NOT_EXECUTABLE = 126, EXIT_NOT_FOUND = 127, EXIT_SIGNAL_BASE = 128 };
enum {
    RESTART_DELAY_MIN_MS = 100, /* after one that did not come to serve; doubled each time */
    RESTART_DELAY_MAX_MS = 5000,
    COMMAND_BYTES_MAX = 128 << 10,
    LISTEN_FDS_START = 3, /* where the protocol of LISTEN_FDS begins */
};

struct child {
    pid_t pid;     /* 0: none */
    int socket_fd; /* its keeper's socket, our end; -1: it has hung up */
    int told_fd;   /* where it tells the store, our end */
    int pidfd;
    int64_t started_ms;
    int is_ready;
    int is_stopping;
};

struct care {
    struct keeping *keeping;
    struct store *store;
    struct child child;
    char **command;
    char **next; /* is being tried; NULL: none */
    int has_served;
    int is_last;      /* was started to clear up: nobody follows it */
    int64_t delay_ms; /* before the next start */
    int64_t start_at_ms;
    int exit_code;
    sigset_t mask_before;
};

static volatile sig_atomic_t child_pid;
static volatile sig_atomic_t forwarded; /* the last signal passed on: dying of it is no news */

static int64_t now_ms(void)
{
    return (int64_t)(clock_ns() / 1000000);
}

/* ---- signals ---- */

static const int ending_signals[] = {SIGINT, SIGTERM, SIGHUP};
enum { ENDING_SIGNALS = sizeof(ending_signals) / sizeof(*ending_signals) };

static void forward(int signal_number)
{
    forwarded = signal_number;
    if (child_pid > 0)
        kill((pid_t)child_pid, signal_number);
}

/* Blocked but in ppoll: none comes between a look at the flag and the wait. */
static void take_signals(struct care *c)
{
    struct sigaction action = {.sa_handler = forward};
    sigset_t set;

    sigemptyset(&set);
    for (int i = 0; i < ENDING_SIGNALS; i++)
        sigaddset(&set, ending_signals[i]);
    action.sa_mask = set;
    sigprocmask(SIG_BLOCK, &set, &c->mask_before);
    for (int i = 0; i < ENDING_SIGNALS; i++)
        sigaction(ending_signals[i], &action, NULL);
    signal(SIGPIPE, SIG_IGN);
}

/* ---- in the child, before its command ---- */

/* What is to lie at LISTEN_FDS_START and on. */
struct row {
    int *fds;
    uint32_t n;
    int *owners; /* of each number of the row: the index of the fd that has it now; -1: none of ours */
};

static int in_row(const struct row *r, int fd)
{
    return fd >= LISTEN_FDS_START && fd < LISTEN_FDS_START + (int)r->n;
}

static int row_new(struct row *r, const struct store *s, int keeper_fd, int told_fd)
{
    uint32_t n = store_count(s);

    *r = (struct row){.n = n + 2, .fds = calloc(n + 2, sizeof(int)), .owners = calloc(n + 2, sizeof(int))};
    if (!r->fds || !r->owners)
        return -ENOMEM;
    for (uint32_t i = 0; i < r->n; i++)
        r->owners[i] = -1;
    for (uint32_t i = 0; i < r->n; i++) {
        r->fds[i] = i < n ? store_fd(s, i) : i == n ? keeper_fd : told_fd;
        if (in_row(r, r->fds[i]))
            r->owners[r->fds[i] - LISTEN_FDS_START] = (int)i;
    }
    return 0;
}

/* Puts one where it belongs; another one of the row that is there goes beyond it first. */
static int row_place(struct row *r, uint32_t index)
{
    int wanted = LISTEN_FDS_START + (int)index, other = r->owners[index];

    if (r->fds[index] == wanted)
        return fcntl(wanted, F_SETFD, 0) < 0 ? -errno : 0;
    if (other >= 0) {
        r->fds[other] = fcntl(wanted, F_DUPFD_CLOEXEC, LISTEN_FDS_START + (int)r->n);
        if (r->fds[other] < 0)
            return -errno;
    }
    if (dup2(r->fds[index], wanted) < 0)
        return -errno;
    if (in_row(r, r->fds[index]))
        r->owners[r->fds[index] - LISTEN_FDS_START] = -1;
    close(r->fds[index]); /* ours alone: so all of it takes hardly more numbers than the keeper has fds */
    return 0;
}

/* As LISTEN_FDS has them: from 3 on in the store's order. */
static int place_fds(const struct store *s, int *keeper_fdp, int *told_fdp)
{
    struct row row;
    int rc = row_new(&row, s, *keeper_fdp, *told_fdp);

    for (uint32_t i = 0; rc == 0 && i < row.n; i++)
        rc = row_place(&row, i);
    *told_fdp = LISTEN_FDS_START + (int)row.n - 1;
    *keeper_fdp = *told_fdp - 1;
    free(row.fds);
    free(row.owners);
    return rc;
}

/* Of the first one nothing is stored, and what it inherited keeps its numbers, which its command line may name. */
static int pass_plainly(int *keeper_fdp, int *told_fdp)
{
    *keeper_fdp = dup(*keeper_fdp);
    *told_fdp = dup(*told_fdp);
    return *keeper_fdp < 0 || *told_fdp < 0 ? -errno : 0;
}

static void set_number(const char *name, int number)
{
    char text[16];

    snprintf(text, sizeof(text), "%d", number);
    setenv(name, text, 1);
}

static int name_fds(const struct store *s)
{
    char *names = malloc((size_t)store_count(s) * STORE_NAME_MAX + 1), *at = names;

    if (!names)
        return -ENOMEM;
    *at = '\0';
    for (uint32_t i = 0; i < store_count(s); i++)
        at += sprintf(at, "%s%s", i ? ":" : "", store_name(s, i));
    setenv("LISTEN_FDNAMES", names, 1);
    set_number("LISTEN_FDS", (int)store_count(s));
    set_number("LISTEN_PID", (int)getpid());
    free(names);
    return 0;
}

__attribute__((noreturn)) static void run_command(const struct care *c, char **command, int keeper_fd, int told_fd,
                                                  pid_t keeper_pid)
{
    int rc = store_count(c->store) ? place_fds(c->store, &keeper_fd, &told_fd) : pass_plainly(&keeper_fd, &told_fd);

    if (rc == 0)
        rc = name_fds(c->store);
    if (rc < 0) {
        fprintf(stderr, "pcshare-keeper: passing on what is kept: %s\n", strerror(-rc));
        _exit(EXIT_FAILURE);
    }
    /* The keeper's death is the block's: a coordinator without one has nothing left to place into. */
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() != keeper_pid)
        _exit(EXIT_FAILURE);
    signal(SIGPIPE, SIG_DFL);
    /* What came since the fork ends this process: our handler in it has nobody to tell. */
    for (int i = 0; i < ENDING_SIGNALS; i++)
        signal(ending_signals[i], SIG_DFL);
    /* One that takes over opens its mask when it can hear: dying of a signal it would leave all behind. */
    if (!c->has_served)
        sigprocmask(SIG_SETMASK, &c->mask_before, NULL);
    unsetenv("NOTIFY_SOCKET"); /* what is told to the supervisor is told by us */
    set_number("PCSHARE_KEEPER_FD", keeper_fd);
    set_number("PCSHARE_STORE_FD", told_fd);
    execvp(command[0], command);
    fprintf(stderr, "pcshare-keeper: %s: %s\n", command[0], strerror(errno));
    _exit(errno == ENOENT ? EXIT_NOT_FOUND : EXIT_NOT_EXECUTABLE);
}

/* ---- starting ---- */

static void close_fd(int *fdp)
{
    if (*fdp >= 0)
        close(*fdp);
    *fdp = -1;
}

/* Each word with its NUL; NULL: it is none. */
static char **read_command(int fd)
{
    struct stat file;

    if (fstat(fd, &file) < 0 || file.st_size < 2 || file.st_size > COMMAND_BYTES_MAX)
        return NULL;
    size_t size = (size_t)file.st_size, n_words = 0;
    char *bytes = malloc(size);
    if (!bytes || pread(fd, bytes, size, 0) != (ssize_t)size || bytes[size - 1] != '\0') {
        free(bytes);
        return NULL;
    }
    for (size_t i = 0; i < size; i++)
        n_words += bytes[i] == '\0';
    char **words = calloc(n_words + 1, sizeof(*words));
    char *at = bytes;
    if (!words)
        free(bytes);
    for (size_t i = 0; words && i < n_words; i++, at += strlen(at) + 1)
        words[i] = at;
    return words; /* bytes live as long as they do */
}

static void free_command(char **command)
{
    if (command)
        free(command[0]);
    free(command);
}

static void take_next_command(struct care *c)
{
    int fd = store_steal(c->store, STORE_NEXT_COMMAND);

    if (fd < 0)
        return;
    free_command(c->next);
    c->next = read_command(fd);
    if (!c->next)
        fprintf(stderr, "pcshare-keeper: what shall serve from now on is no command\n");
    close(fd);
}

static void let_go(struct child *child)
{
    close_fd(&child->socket_fd);
    close_fd(&child->told_fd);
    close_fd(&child->pidfd);
    child->pid = 0;
}

/* One whose end we could not see is none. */
static int watch_child(struct care *c)
{
    c->child.pidfd = (int)syscall(SYS_pidfd_open, c->child.pid, 0);
    if (c->child.pidfd < 0) {
        int error = errno;
        kill(c->child.pid, SIGKILL);
        (void)waitpid(c->child.pid, NULL, 0);
        let_go(&c->child);
        return -error;
    }
    child_pid = c->child.pid;
    c->is_last = forwarded != 0;
    if (forwarded) /* came when there was none: it waits there until it can be heard */
        kill(c->child.pid, forwarded);
    return 0;
}

static int start_child(struct care *c)
{
    int pair[2], told[2];
    pid_t self = getpid();

    take_next_command(c);
    if (c->has_served)
        store_prepare_events(c->store);
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
        return -errno;
    if (socketpair(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0, told) < 0) {
        int error = errno;
        close(pair[0]);
        close(pair[1]);
        return -error;
    }
    pid_t pid = fork();
    if (pid == 0)
        run_command(c, c->next ? c->next : c->command, pair[1], told[1], self);
    int error = errno;
    close(pair[1]);
    close(told[1]);
    if (pid < 0) {
        close(pair[0]);
        close(told[0]);
        return -error;
    }
    c->child = (struct child){.pid = pid, .socket_fd = pair[0], .told_fd = told[0], .started_ms = now_ms()};
    return watch_child(c);
}

/* ---- hearing ---- */

static void hear_store(struct care *c)
{
    int told;

    while ((told = store_receive(c->store, c->child.told_fd)) >= 0) {
        c->child.is_stopping |= (told & STORE_TOLD_STOPPING) != 0;
        if (!(told & STORE_TOLD_READY))
            continue;
        c->child.is_ready = c->has_served = 1;
        if (c->next) { /* it serves: it is the command from now on. The first one's words are main's own */
            c->command = c->next;
            c->next = NULL;
        }
    }
}

static void hear_keeper_socket(struct care *c)
{
    if (keeping_serve(c->keeping, c->child.socket_fd) != 0)
        close_fd(&c->child.socket_fd);
}

/* ---- the end of a child ---- */

static int reap(const struct child *child, int *was_killedp)
{
    int status;

    while (waitpid(child->pid, &status, 0) < 0)
        if (errno != EINTR)
            return EXIT_FAILURE;
    *was_killedp = WIFSIGNALED(status);
    return WIFSIGNALED(status) ? EXIT_SIGNAL_BASE + WTERMSIG(status) : WEXITSTATUS(status);
}

static void say_end(const struct care *c, int code, int was_killed, int again)
{
    const char *then = again ? "; it is started again" : "";

    if (was_killed && code - EXIT_SIGNAL_BASE != forwarded)
        fprintf(stderr, "pcshare-keeper: the coordinator (pid %d) was killed by signal %d (%s)%s\n", (int)c->child.pid,
                code - EXIT_SIGNAL_BASE, strsignal(code - EXIT_SIGNAL_BASE), then);
    else if (again && code)
        fprintf(stderr, "pcshare-keeper: the coordinator (pid %d) ended with exit code %d%s\n", (int)c->child.pid, code,
                then);
}

static void give_up_next(struct care *c)
{
    if (!c->next || c->child.is_ready)
        return;
    fprintf(stderr, "pcshare-keeper: the coordinator that was to take over did not come to serve\n");
    free_command(c->next);
    c->next = NULL;
}

static void put_off_start(struct care *c)
{
    c->delay_ms = c->delay_ms ? 2 * c->delay_ms : RESTART_DELAY_MIN_MS;
    if (c->delay_ms > RESTART_DELAY_MAX_MS)
        c->delay_ms = RESTART_DELAY_MAX_MS;
    c->start_at_ms = now_ms() + c->delay_ms;
}

/* At once, unless that one did not come to serve, or served and died so soon that the next one may well do so too. */
static void plan_start(struct care *c)
{
    if (c->child.is_ready || forwarded)
        c->delay_ms = 0;
    c->start_at_ms = now_ms();
    if (!forwarded && (!c->child.is_ready || now_ms() - c->child.started_ms < RESTART_DELAY_MIN_MS))
        put_off_start(c);
}

/* Whether there is to be another one. What it told before it died is heard first. */
static int bury(struct care *c)
{
    int was_killed = 0;
    int code = reap(&c->child, &was_killed);

    child_pid = 0;
    hear_store(c);
    int again = c->has_served && !c->child.is_stopping && !c->is_last;
    say_end(c, code, was_killed, again);
    give_up_next(c);
    let_go(&c->child);
    keeping_forget_coordinator(c->keeping);
    c->exit_code = code;
    plan_start(c);
    return again;
}

/* ---- the loop ---- */

enum { AT_PIDFD, AT_STORE, AT_KEEPER, AT_WRITERS };

static uint32_t collect(const struct care *c, struct pollfd **polledp)
{
    uint32_t n_writers = keeping_is_greeted(c->keeping) ? 0 : store_writers(c->store, NULL);
    struct pollfd *larger = realloc(*polledp, (AT_WRITERS + n_writers) * sizeof(**polledp));

    if (larger)
        *polledp = larger;
    else
        n_writers = 0; /* their events wait a while longer */
    struct pollfd *polled = *polledp;
    polled[AT_PIDFD] = (struct pollfd){.fd = c->child.pidfd, .events = POLLIN};
    polled[AT_STORE] = (struct pollfd){.fd = c->child.told_fd, .events = POLLIN};
    polled[AT_KEEPER] = (struct pollfd){.fd = c->child.socket_fd, .events = POLLIN};
    if (n_writers)
        store_writers(c->store, polled + AT_WRITERS);
    return AT_WRITERS + n_writers;
}

static void wait_for_something(const struct care *c, struct pollfd *polled, uint32_t n)
{
    struct timespec timeout = {0};
    int64_t left_ms = c->start_at_ms - now_ms();

    if (left_ms > 0)
        timeout = (struct timespec){.tv_sec = left_ms / 1000, .tv_nsec = (left_ms % 1000) * 1000000};
    if (ppoll(polled, n, c->child.pid ? NULL : &timeout, &c->mask_before) < 0)
        for (uint32_t i = 0; i < n; i++)
            polled[i].revents = 0;
}

static int any_readable(const struct pollfd *polled, uint32_t from, uint32_t n)
{
    for (uint32_t i = from; i < n; i++)
        if (polled[i].revents)
            return 1;
    return 0;
}

/* 0: the keeper has nothing more to keep. */
static int turn(struct care *c, struct pollfd **polledp)
{
    uint32_t n = collect(c, polledp);
    struct pollfd *polled = *polledp;

    wait_for_something(c, polled, n);
    if (polled[AT_STORE].revents)
        hear_store(c);
    if (any_readable(polled, AT_WRITERS, n)) /* before HELLO is answered: whoever says it reads what is written down */
        store_read_writers(c->store);
    if (polled[AT_KEEPER].revents)
        hear_keeper_socket(c);
    if (polled[AT_PIDFD].revents && !bury(c))
        return 0;
    if (c->child.pid || (now_ms() < c->start_at_ms && !forwarded))
        return 1;
    int rc = start_child(c);
    if (rc < 0) {
        fprintf(stderr, "pcshare-keeper: starting the coordinator: %s\n", strerror(-rc));
        put_off_start(c);
    }
    return rc == 0 || !forwarded;
}

/* Each helper takes two fds here, too: the soft limit is for programs that use select. */
static void raise_fd_limit(void)
{
    struct rlimit limit;

    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max;
        (void)setrlimit(RLIMIT_NOFILE, &limit);
    }
}

/* A supervisor has started us again and gives back what we passed on to it: fds, which are the child's, to say good-bye
 * with. Our blocks it cannot give back. */
static int take_listen_fds(struct store *s)
{
    const char *pid = getenv("LISTEN_PID"), *count = getenv("LISTEN_FDS"), *given = getenv("LISTEN_FDNAMES");
    char *names = strdup(given ? given : ""), *rest = names, *name;
    int rc = names ? 0 : -ENOMEM;

    for (int i = 0; rc == 0 && pid && count && atoi(pid) == (int)getpid() && i < atoi(count); i++) {
        int fd = LISTEN_FDS_START + i;
        name = strsep(&rest, ":");
        if (fcntl(fd, F_SETFD, FD_CLOEXEC) == 0)
            rc = store_put(s, name ? name : "stored", fd);
    }
    free(names);
    return rc;
}

static int prepare(struct care *c)
{
    int rc = keeping_new(&c->keeping);

    if (rc == 0)
        rc = store_new(&c->store, getenv("NOTIFY_SOCKET"));
    if (rc == 0)
        rc = take_listen_fds(c->store);
    if (rc == 0)
        rc = start_child(c);
    if (rc < 0)
        fprintf(stderr, "pcshare-keeper: %s\n", strerror(-rc));
    return rc;
}

int child_keep(char **command)
{
    struct care c = {
        .command = command, .exit_code = EXIT_FAILURE, .child = {.socket_fd = -1, .told_fd = -1, .pidfd = -1}};
    struct pollfd *polled = calloc(AT_WRITERS, sizeof(*polled));

    raise_fd_limit();
    take_signals(&c);
    if (polled && prepare(&c) == 0)
        while (turn(&c, &polled))
            ;
    free(polled);
    store_free(c.store);
    keeping_free(c.keeping);
    return c.exit_code;
}
