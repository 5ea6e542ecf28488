/* hostile: helpers that break the rules on purpose, one function a way of breaking them, all in one program.
 *
 * Each function does its harm as well as it can and then says what the world did. It must leave nothing running. A
 * coordinator that is well protected makes each of them end WELL. One unit for the compiler: the parts are headers with
 * bodies, which nobody else reads.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>
#include "scene.h"

#include "flooding.h"
#include "habits.h"
#include "handover.h"
#include "leaving.h"
#include "mappings.h"
#include "memfd.h"
#include "messages.h"

enum {
    LIMIT_S = 30, /* after which even a hostile helper that hangs ends */
    RO = WIRE_MODE_RO,
    RW = WIRE_MODE_RW,
};

struct row {
    const char *name;
    int (*function)(struct scene *s);
    uint32_t mode; /* RO: it needs a read-only block; RW: a writable one */
    int plants;    /* it may put zero pages into the block: who reads without asking first may see them */
    const char *description;
};

static const struct row rows[] = {
    {"wrong-version", hostile_wrong_version, RO, 0, "HELLO of a version that nobody speaks"},
    {"wrong-magic", hostile_wrong_magic, RO, 0, "HELLO of another protocol"},
    {"garbage", hostile_garbage, RO, 0, "random bytes of many lengths"},
    {"short-message", hostile_short_message, RO, 0, "HELLO cut at every length"},
    {"long-message", hostile_long_message, RO, 0, "HELLO with more behind it"},
    {"wrong-length", hostile_wrong_length, RO, 0, "a length in the header that is not the message's"},
    {"unknown-type", hostile_unknown_type, RO, 0, "a type that does not exist, before HELLO and after ACK"},
    {"wrong-order", hostile_wrong_order, RO, 0, "every other message in HELLO's place"},
    {"wrong-name", hostile_wrong_name, RO, 0, "blocks that do not exist, names without an end"},
    {"wrong-mode", hostile_wrong_mode, RO, 0, "a read-only block for writing, and modes that do not exist"},
    {"wrong-range", hostile_wrong_range, RO, 0, "REQUEST of bytes outside the block"},
    {"wrong-admin", hostile_wrong_admin, RO, 0, "ADMIN with an operation that does not exist"},
    {"double-attach-message", hostile_double_attach_message, RO, 0, "a second ATTACH after ACK"},
    {"slow-sender", hostile_slow_sender, RO, 0, "a pause before each step, within the time limits"},
    {"no-fd", hostile_no_fd, RO, 0, "ATTACH without a uffd"},
    {"extra-fds", hostile_extra_fds, RO, 0, "more fds than the message's row allows, on each message"},
    {"not-a-uffd", hostile_not_a_uffd, RO, 0, "a pipe, an eventfd, the memfd, the socket in the uffd's place"},
    {"uffd-no-handshake", hostile_uffd_no_handshake, RO, 0, "a uffd without its API handshake"},
    {"uffd-with-events", hostile_uffd_with_events, RO, 0, "a uffd that would have to be read in time"},
    {"outside-offsets", hostile_outside_offsets, RO, 0, "maps of bytes that the block does not have"},
    {"outside-addresses", hostile_outside_addresses, RO, 0, "faults at addresses that no map names"},
    {"maps-beyond", hostile_maps_beyond, RO, 0, "maps beyond the end of every address space"},
    {"faults-before-attach", hostile_faults_before_attach, RO, 0, "faults older than ATTACH, one outside its maps"},
    {"overlapping-maps", hostile_overlapping_maps, RO, 0, "two maps of one address"},
    {"zero-length-map", hostile_zero_length_map, RO, 0, "maps of nothing"},
    {"too-many-maps", hostile_too_many_maps, RO, 0, "no map, and more than fit into the message"},
    {"foreign-uffd", hostile_foreign_uffd, RO, 0, "the same uffd again on a second connection"},
    {"lent-uffd", hostile_lent_uffd, RO, 0, "a uffd handed over by a child that dies while its parent goes on"},
    {"dies-after-connect", hostile_dies_after_connect, RO, 0, "SIGKILL before HELLO"},
    {"dies-after-hello", hostile_dies_after_hello, RO, 0, "SIGKILL between HELLO and WELCOME"},
    {"dies-after-welcome", hostile_dies_after_welcome, RO, 0, "SIGKILL between WELCOME and ATTACH"},
    {"dies-after-attach", hostile_dies_after_attach, RO, 0, "SIGKILL between ATTACH and ACK"},
    {"dies-while-waiting", hostile_dies_while_waiting, RO, 0, "SIGKILL while it waits for a page"},
    {"stops-for-ever", hostile_stops_for_ever, RO, 0, "SIGSTOP while it is attached and waits"},
    {"never-speaks", hostile_never_speaks, RO, 0, "connects and is silent"},
    {"never-attaches", hostile_never_attaches, RO, 0, "HELLO, and then silence"},
    {"closes-uffd", hostile_closes_uffd, RO, 0, "closes its own copy of the uffd, then touches"},
    {"lies-leave", hostile_lies_leave, RO, 0, "LEAVE, and then it goes on touching"},
    {"closes-control", hostile_closes_control, RO, 0, "closes the control socket and goes on touching"},
    {"floods-requests", hostile_floods_requests, RO, 0, "REQUESTs without end, DONEs never read"},
    {"floods-prefetch", hostile_floods_prefetch, RO, 0, "REQUESTs that are not answered, without end"},
    {"floods-faults", hostile_floods_faults, RO, 0, "wakes its own waiters, so that each faults again and again"},
    {"floods-waits", hostile_floods_waits, RO, 0, "one thread waits for thousands of pages; needs a large, slow block"},
    {"idle-connections", hostile_idle_connections, RO, 0, "hundreds of connections that are silent"},
    {"reconnects", hostile_reconnects, RO, 0, "attaches and goes, again and again"},
    {"madv-dontneed", hostile_madv_dontneed, RO, 0, "MADV_DONTNEED, then touches again"},
    {"madv-remove", hostile_madv_remove, RW, 0, "MADV_REMOVE of pages that are here and of pages that are not"},
    {"munmaps", hostile_munmaps, RO, 0, "unmaps a page while a thread waits for it"},
    {"mremaps", hostile_mremaps, RO, 1, "moves a page away from its registration, then reads it"},
    {"maps-unregistered", hostile_maps_unregistered, RO, 1, "maps the memfd a second time, unregistered, and reads"},
    {"populate-read", hostile_populate_read, RO, 1, "MADV_POPULATE_READ on an unregistered mapping"},
    {"forks-carelessly", hostile_forks_carelessly, RO, 1, "a child of fork reads through the inherited mapping"},
    {"fills-own-page", hostile_fills_own_page, RO, 0, "COPY of bytes of its own through its own uffd"},
    {"clears-nonblock", hostile_clears_nonblock, RO, 0, "takes O_NONBLOCK from the uffd that it shares"},
    {"truncates", hostile_truncates, RO, 0, "ftruncate of the memfd, smaller and larger"},
    {"truncates-writable", hostile_truncates, RW, 0, "the same where the fd is writable"},
    {"fallocates", hostile_fallocates, RO, 1, "fallocate of a missing page, by reopening the memfd"},
    {"fallocates-writable", hostile_fallocates, RW, 1, "the same where the fd is writable"},
    {"writes-readonly", hostile_writes_readonly, RO, 0, "every way to write a read-only block"},
    {"adds-seals", hostile_adds_seals, RW, 0, "seals a writable block against the writers to come"},
    {"profiled", hostile_profiled, RO, 0, "a 1 kHz timer interrupts it while it waits"},
    {"mlockall-before", hostile_mlockall_before, RO, 0, "mlockall(MCL_FUTURE), then attaches"},
    {"mlockall-before-cow", hostile_mlockall_before_cow, RO, 0, "the same with a private writable mapping"},
    {"mlockall-after", hostile_mlockall_after, RO, 0, "attaches, then mlockall(MCL_CURRENT)"},
    {"dumps-core", hostile_dumps_core, RO, 0, "aborts with a core dump while it is attached"},
    {"execs", hostile_execs, RO, 0, "becomes another program while it is attached"},
    {"execs-holding", hostile_execs_holding, RO, 0, "the same, with uffd and control socket left open"},
};
enum { ROWS = sizeof rows / sizeof *rows };

static const char *row_name = "";

/* In the middle of anything, a wait in a fault included: only write and _exit. */
static void on_limit(int signal_number)
{
    const char *parts[] = {"{\"hostile\": \"", row_name, "\", \"outcome\": \"hangs\", \"ok\": false}\n"};
    (void)signal_number;
    for (int i = 0; i < 3; i++)
        if (write(STDOUT_FILENO, parts[i], strlen(parts[i])) < 0)
            break;
    _exit(HARM);
}

static void print_text(const char *text)
{
    for (; *text; text++) {
        if (*text == '"' || *text == '\\')
            putchar('\\');
        putchar((unsigned char)*text < ' ' ? ' ' : *text);
    }
}

static void report(const struct scene *s, int verdict)
{
    printf("{\"hostile\": \"%s\", \"outcome\": \"%s\", \"ok\": %s, \"attempts\": %llu, \"planted_pages\": %llu, "
           "\"bytes_checked\": %llu, \"detail\": \"", row_name, s->outcome, verdict == WELL ? "true" : "false",
           (unsigned long long)s->attempts, (unsigned long long)s->planted_pages, (unsigned long long)s->bytes_checked);
    print_text(s->detail);
    printf("\"}\n");
    fflush(stdout);
}

static int list(void)
{
    for (int i = 0; i < ROWS; i++)
        printf("%s\t%s\t%s\t%s\n", rows[i].name, rows[i].mode == RW ? "rw" : "ro", rows[i].plants ? "plants" : "-",
               rows[i].description);
    return 0;
}

static int usage(FILE *to, int exit_code)
{
    fprintf(to, "usage: hostile [--socket PATH] [--block BLOCK] [--source FILE] [--seed S] [--limit S] NAME\n"
                "       hostile --list\n"
                "Breaks one rule of pcshare and prints as JSON what came of it.\n"
                "Exit status: 0 nobody was harmed, 1 somebody was, 2 it could not be tried.\n"
                "--socket: default $PCSHARE_SOCKET. --source: the block's source, to compare bytes with.\n"
                "--list: name, kind of block it needs, whether it plants pages, description; separated by tabs.\n");
    return exit_code;
}

/* What execs becomes: a program that knows nothing of pcshare. */
static _Noreturn void idle(void)
{
    alarm(LIMIT_S);
    for (;;)
        pause();
}

static const struct row *parse(struct scene *s, unsigned *limit_s, int argc, char **argv)
{
    static const struct option names[] = {
        {"socket", required_argument, NULL, 'S'}, {"block", required_argument, NULL, 'b'},
        {"source", required_argument, NULL, 'f'}, {"seed", required_argument, NULL, 's'},
        {"limit", required_argument, NULL, 'l'},  {NULL, 0, NULL, 0},
    };
    for (int c; (c = getopt_long(argc, argv, "", names, NULL)) != -1;) {
        switch (c) {
        case 'S': s->socket_path = optarg; break;
        case 'b': s->idstr = optarg; break;
        case 's': s->random = strtoull(optarg, NULL, 0); break;
        case 'l': *limit_s = (unsigned)strtoul(optarg, NULL, 0); break;
        case 'f':
            s->source_fd = open(optarg, O_RDONLY | O_CLOEXEC);
            if (s->source_fd < 0)
                return NULL;
            break;
        default: return NULL;
        }
    }
    for (int i = 0; i < ROWS && optind == argc - 1; i++)
        if (!strcmp(rows[i].name, argv[optind]))
            return &rows[i];
    return NULL;
}

int main(int argc, char **argv)
{
    struct scene s = {.socket_path = getenv("PCSHARE_SOCKET"), .idstr = "", .source_fd = -1};
    unsigned limit_s = LIMIT_S;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (argc == 2 && !strcmp(argv[1], "--list"))
        return list();
    if (argc == 2 && !strcmp(argv[1], "--idle"))
        idle();
    if (argc == 2 && !strcmp(argv[1], "--help"))
        return usage(stdout, 0);
    const struct row *row = parse(&s, &limit_s, argc, argv);
    if (!row || !s.socket_path)
        return usage(stderr, CANNOT);
    row_name = row->name;
    s.mode = row->mode;
    signal(SIGALRM, on_limit);
    alarm(limit_s);
    int verdict = row->function(&s);
    report(&s, verdict);
    return verdict;
}
