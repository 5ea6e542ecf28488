/* keeper_main: `pcshare-keeper [--serve FD] [-- COMMAND...]`, the executable.
 *
 * With a COMMAND it runs it as its only child (keeper_child.c), forwards SIGINT, SIGTERM and SIGHUP to it and ends with
 * its exit code. With --serve it serves the given socket. Started by exec, so that no process inherits its mappings.
 */
#include "keeper_internal.h"
#include "uffd.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>

enum { EXIT_USAGE = 2 };

static int serve_socket(int socket_fd)
{
    struct keeping *keeping;
    int rc = keeping_new(&keeping);

    signal(SIGINT, SIG_IGN); /* a terminal's Ctrl-C is for whoever holds the other end */
    while (rc == 0)
        rc = keeping_serve(keeping, socket_fd);
    keeping_free(keeping);
    return rc < 0 ? EXIT_FAILURE : EXIT_SUCCESS;
}

static void protect_memory(void)
{
    const char *debug = getenv("PCSHARE_DEBUG");

    if (!debug || !*debug)
        prctl(PR_SET_DUMPABLE, 0);
}

/* Opened by root for a coordinator that is another user's (--user). The coordinator inherits it too, each time it is
 * started. */
static void inherit_device(void)
{
    const char *number = getenv("PCSHARE_DEVICE_FD");

    if (number && *number)
        uffd_inherit_device(atoi(number));
}

int main(int argc, char **argv)
{
    protect_memory();
    inherit_device();
    prctl(PR_SET_NAME, "pcshare-keeper");
    if (argc == 3 && strcmp(argv[1], "--serve") == 0)
        return serve_socket(atoi(argv[2]));
    if (argc >= 3 && strcmp(argv[1], "--") == 0)
        return child_keep(argv + 2);
    fprintf(stderr, "usage: pcshare-keeper --serve FD | pcshare-keeper -- COMMAND...\n"
                    "Started by `pcshare coordinator`; there is no use in starting it by hand.\n");
    return EXIT_USAGE;
}
