/* keeper_main: `pcshare-keeper [--serve FD] [-- COMMAND...]`, the executable.
 *
 * With a COMMAND it runs it as its only child, with the keeper's socket as fd PCSHARE_KEEPER_FD, forwards SIGINT,
 * SIGTERM and SIGHUP to it and ends with its exit code. With --serve it serves the given socket. Started by exec, so
 * that no process inherits its mappings.
 */
#define _GNU_SOURCE
#include "keeper.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

enum { EXIT_USAGE = 2, EXIT_NOT_EXECUTABLE = 126, EXIT_NOT_FOUND = 127, EXIT_SIGNAL_BASE = 128 };

static volatile sig_atomic_t child_pid;
static volatile sig_atomic_t forwarded; /* the last signal passed on: dying of it is no news */

static void forward(int signal_number)
{
    forwarded = signal_number;
    if (child_pid > 0)
        kill((pid_t)child_pid, signal_number);
}

static void install(int signal_number, void (*handler)(int))
{
    struct sigaction action = {.sa_handler = handler};

    sigemptyset(&action.sa_mask);
    sigaction(signal_number, &action, NULL);
}

static int run_child(char **command, int socket_fd, pid_t keeper_pid, const sigset_t *mask)
{
    char number[16];

    /* The keeper's death is the block's: a coordinator without one has nothing left to place into. */
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() != keeper_pid)
        _exit(EXIT_FAILURE);
    sigprocmask(SIG_SETMASK, mask, NULL);
    snprintf(number, sizeof(number), "%d", socket_fd);
    setenv("PCSHARE_KEEPER_FD", number, 1);
    execvp(command[0], command);
    fprintf(stderr, "pcshare-keeper: %s: %s\n", command[0], strerror(errno));
    _exit(errno == ENOENT ? EXIT_NOT_FOUND : EXIT_NOT_EXECUTABLE);
}

static int reap(pid_t pid)
{
    int status;

    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR)
            return EXIT_FAILURE;
    if (!WIFSIGNALED(status))
        return WEXITSTATUS(status);
    if (WTERMSIG(status) != forwarded)
        fprintf(stderr, "pcshare-keeper: the coordinator (pid %d) was killed by signal %d (%s)\n", (int)pid,
                WTERMSIG(status), strsignal(WTERMSIG(status)));
    return EXIT_SIGNAL_BASE + WTERMSIG(status);
}

/* Those that are passed on wait while the child has no pid yet: none is lost, and none ends the keeper alone. */
static void hold_signals(sigset_t *before)
{
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGHUP);
    sigprocmask(SIG_BLOCK, &set, before);
}

static int keep_for(char **command)
{
    int pair[2];
    pid_t self = getpid();
    sigset_t mask;

    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0) {
        perror("pcshare-keeper: socketpair");
        return EXIT_FAILURE;
    }
    hold_signals(&mask);
    pid_t pid = fork();
    if (pid < 0) {
        perror("pcshare-keeper: fork");
        return EXIT_FAILURE;
    }
    if (pid == 0) {
        int inherited = dup(pair[1]);
        if (inherited < 0)
            _exit(EXIT_FAILURE);
        run_child(command, inherited, self, &mask);
    }
    child_pid = pid;
    close(pair[1]);
    install(SIGINT, forward);
    install(SIGTERM, forward);
    install(SIGHUP, forward);
    sigprocmask(SIG_SETMASK, &mask, NULL);
    int rc = keeper_serve(pair[0]);
    if (rc < 0)
        fprintf(stderr, "pcshare-keeper: %s\n", strerror(-rc));
    close(pair[0]);
    return reap(pid);
}

static void protect_memory(void)
{
    const char *debug = getenv("PCSHARE_DEBUG");

    if (!debug || !*debug)
        prctl(PR_SET_DUMPABLE, 0);
}

int main(int argc, char **argv)
{
    protect_memory();
    prctl(PR_SET_NAME, "pcshare-keeper");
    if (argc == 3 && strcmp(argv[1], "--serve") == 0) {
        install(SIGINT, SIG_IGN); /* a terminal's Ctrl-C is for whoever holds the other end */
        return keeper_serve(atoi(argv[2])) < 0 ? EXIT_FAILURE : EXIT_SUCCESS;
    }
    if (argc >= 3 && strcmp(argv[1], "--") == 0)
        return keep_for(argv + 2);
    fprintf(stderr, "usage: pcshare-keeper --serve FD | pcshare-keeper -- COMMAND...\n"
                    "Started by `pcshare coordinator`; there is no use in starting it by hand.\n");
    return EXIT_USAGE;
}
