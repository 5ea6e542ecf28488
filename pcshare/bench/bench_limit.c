/* bench_limit: the smallest programs that do the work at all, to be measured beside pcshare. No promises, no policy.
 *
 *   bench-limit server blocks|spins FILE SERVER_CPU HELPER_CPU COUNT   two processes and one uffd: read, pread, COPY
 *   bench-limit chain FILE SOURCE_CPU SERVER_CPU HELPER_CPU COUNT      the page comes from a third process, by a Unix
 *                                                                      stream socket; all block
 *   bench-limit nbd SOCKET SERVER_CPU HELPER_CPU COUNT                 the page comes from an NBD server's only export
 *   bench-limit copy FILE PAGE_SIZE       the whole file: pread of 2 MiB, UFFDIO_COPY of 2 MiB, into fresh memory
 *   bench-limit pwrite FILE               the whole file: pread of 2 MiB, pwrite of 2 MiB, into a fresh memfd
 *   bench-limit memcpy FILE               the whole file, mapped, into memory that was touched before
 *
 * The helper of the first three touches COUNT different pages (0: all) in the order of `bench-touch walk`. PAGE_SIZE is
 * 4096 or 2097152. CPU -1 is not pinned.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "bench_smallest.h"
#include "fd_message.h"
#include "uffd.h"

enum { PIECE = 2 << 20 };

/* ---- the smallest NBD client ---- */

enum {
    NBD_REPLY_LENGTH = 16,
    NBD_FLAGS = 3,       /* fixed newstyle, no zeroes: a server that has not both is too old */
    NBD_EXPORT_NAME = 1, /* option: of the name that follows, here none */
    NBD_REQUEST_MAGIC = 0x25609513,
};
static const char nbd_magic[] = "NBDMAGICIHAVEOPT";

struct __attribute__((packed)) nbd_request {
    uint32_t magic;
    uint32_t read; /* flags and command: all 0 */
    uint64_t cookie;
    uint64_t offset;
    uint32_t length;
};

static void read_all(int fd, uint8_t *bytes, size_t length)
{
    for (size_t done = 0; done < length;) {
        ssize_t n = read(fd, bytes + done, length - done);
        if (n <= 0)
            bench_fail("read");
        done += (size_t)n;
    }
}

static void write_all(int fd, const void *bytes, size_t length)
{
    if (write(fd, bytes, length) != (ssize_t)length)
        bench_fail("write");
}

static int nbd_connect(const char *path, uint64_t *lengthp)
{
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    struct __attribute__((packed)) {
        uint8_t magic[sizeof(nbd_magic) - 1];
        uint16_t flags;
    } hello;
    struct __attribute__((packed)) {
        uint32_t flags;
        uint8_t magic[8];
        uint32_t option, name_length;
    } answer = {.flags = htobe32(NBD_FLAGS), .option = htobe32(NBD_EXPORT_NAME)};
    struct __attribute__((packed)) {
        uint64_t size;
        uint16_t flags;
    } export;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    snprintf(name.sun_path, sizeof(name.sun_path), "%s", path);
    if (fd < 0 || connect(fd, (struct sockaddr *)&name, sizeof(name)) < 0)
        bench_fail(path);
    read_all(fd, (uint8_t *)&hello, sizeof(hello));
    if (memcmp(hello.magic, nbd_magic, sizeof(hello.magic)) != 0 || be16toh(hello.flags) != NBD_FLAGS)
        bench_refuse("no NBD server of today");
    memcpy(answer.magic, nbd_magic + sizeof(answer.magic), sizeof(answer.magic));
    write_all(fd, &answer, sizeof(answer));
    read_all(fd, (uint8_t *)&export, sizeof(export));
    *lengthp = be64toh(export.size) / BENCH_PAGE * BENCH_PAGE;
    if (!*lengthp)
        bench_refuse("the export is too small");
    return fd;
}

/* ---- one fault at a time ---- */

/* Where a server gets pages from: by pread of a file, or by a question and its answer over a socket. */
struct source {
    enum { OF_FILE, OF_PROCESS, OF_NBD } kind;
    int fd;
};

static const uint8_t *fetch_nbd(int fd, uint64_t offset)
{
    struct nbd_request request = {.magic = htobe32(NBD_REQUEST_MAGIC), .offset = htobe64(offset),
                                  .length = htobe32(BENCH_PAGE)};
    static uint8_t reply[NBD_REPLY_LENGTH + BENCH_PAGE];
    uint32_t error;

    write_all(fd, &request, sizeof(request));
    read_all(fd, reply, sizeof(reply)); /* after an error no bytes come, but then the server ends too */
    memcpy(&error, reply + sizeof(error), sizeof(error));
    if (error)
        bench_fail("the NBD server refuses a read");
    return reply + NBD_REPLY_LENGTH;
}

static const uint8_t *fetch(const struct source *source, uint64_t offset)
{
    static uint8_t bytes[BENCH_PAGE] __attribute__((aligned(BENCH_PAGE)));

    if (source->kind == OF_NBD)
        return fetch_nbd(source->fd, offset);
    if (source->kind == OF_FILE) {
        if (pread(source->fd, bytes, BENCH_PAGE, (off_t)offset) != BENCH_PAGE)
            bench_fail("pread");
        return bytes;
    }
    write_all(source->fd, &offset, sizeof(offset));
    read_all(source->fd, bytes, BENCH_PAGE);
    return bytes;
}

static void serve(int uffd, uint64_t client_addr, const struct source *source, int spins)
{
    struct pollfd polled = {.fd = uffd, .events = POLLIN};
    uint64_t addr;

    for (;;) {
        if (!spins && poll(&polled, 1, -1) < 0)
            bench_fail("poll");
        if (bench_next_fault(uffd, &addr))
            bench_answer(uffd, addr, fetch(source, addr - client_addr));
    }
}

static void be_server(int helper_fd, const struct source *source, int spins, int cpu)
{
    uint64_t client_addr;
    uint32_t n_fds = 1;
    int uffd = -1;

    bench_pin(cpu);
    if (fd_message_receive(helper_fd, &client_addr, sizeof(client_addr), &uffd, &n_fds, 0) <= 0)
        bench_fail("receive");
    serve(uffd, client_addr, source, spins);
}

static void be_source(int socket_fd, int file, int cpu)
{
    static uint8_t bytes[BENCH_PAGE];
    uint64_t offset;

    bench_pin(cpu);
    for (;;) {
        read_all(socket_fd, (uint8_t *)&offset, sizeof(offset));
        if (pread(file, bytes, BENCH_PAGE, (off_t)offset) != BENCH_PAGE)
            bench_fail("pread");
        write_all(socket_fd, bytes, BENCH_PAGE);
    }
}

static void be_helper(int server_fd, uint64_t length, int cpu, uint64_t count)
{
    uint64_t pages = length / BENCH_PAGE, step = bench_stride(pages), n = count && count < pages ? count : pages;
    double *us = malloc(n * sizeof(*us));
    uint8_t *data;

    bench_pin(cpu);
    int uffd = bench_map_registered(bench_make_memfd(length, BENCH_PAGE), length, &data);
    uint64_t addr = (uint64_t)(uintptr_t)data;
    if (!us || fd_message_send(server_fd, &addr, sizeof(addr), &uffd, 1, 0) < 0)
        bench_fail("send");
    double begin_us = bench_now_us();
    for (uint64_t i = 0, at = 0; i < n; i++, at = (at + step) % pages) {
        double start_us = bench_now_us();
        (void)((volatile uint8_t *)data)[at * BENCH_PAGE];
        us[i] = bench_now_us() - start_us;
    }
    bench_print_times(n, (bench_now_us() - begin_us) / 1e6, us, n);
}

static void end_child(pid_t pid)
{
    if (pid <= 0)
        return;
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
}

struct chain {
    int source_cpu; /* of a source that is a process of ours */
    int server_cpu;
    int helper_cpu;
    int spins;
    uint64_t count;
};

/* source->fd of OF_PROCESS: the file that the process is to read. */
static int run_chain(const struct chain *chain, struct source *source, uint64_t length)
{
    int helpers[2], sources[2], status, file = source->fd;
    pid_t source_pid = 0;

    if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, helpers) < 0 || socketpair(AF_UNIX, SOCK_STREAM, 0, sources) < 0)
        bench_fail("socketpair");
    if (source->kind == OF_PROCESS) {
        source->fd = sources[0];
        if ((source_pid = bench_fork_child()) == 0)
            be_source(sources[1], file, chain->source_cpu);
    }
    pid_t server = bench_fork_child();
    if (server == 0)
        be_server(helpers[1], source, chain->spins, chain->server_cpu);
    pid_t helper = bench_fork_child();
    if (helper == 0) {
        be_helper(helpers[0], length, chain->helper_cpu, chain->count);
        fflush(stdout);
        _exit(EXIT_SUCCESS);
    }
    waitpid(helper, &status, 0);
    end_child(server);
    end_child(source_pid);
    return WIFEXITED(status) ? WEXITSTATUS(status) : EXIT_FAILURE;
}

static int run_with_file(const struct chain *chain, const char *path, int kind)
{
    uint64_t length;
    struct source source = {.kind = kind, .fd = bench_open_file(path, BENCH_PAGE, &length)};

    return run_chain(chain, &source, length);
}

static int run_with_nbd(const struct chain *chain, const char *path)
{
    uint64_t length;
    struct source source = {.kind = OF_NBD, .fd = nbd_connect(path, &length)};

    return run_chain(chain, &source, length);
}

/* ---- all of it ---- */

static int run_fill(const char *path, uint64_t page_size, int by_copy)
{
    uint64_t length, done = 0;
    int file = bench_open_file(path, PIECE, &length);
    uint8_t *bytes = mmap(NULL, PIECE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), *data = NULL;

    length = length / PIECE * PIECE;
    if (bytes == MAP_FAILED)
        bench_fail("mmap");
    memset(bytes, 0, PIECE);
    int memfd = bench_make_memfd(length, page_size), uffd = by_copy ? bench_map_registered(memfd, length, &data) : -1;
    double begin_us = bench_now_us();
    for (uint64_t at = 0; at < length; at += PIECE) {
        if (pread(file, bytes, PIECE, (off_t)at) != PIECE)
            bench_fail("pread");
        if (by_copy && uffd_copy(uffd, (uint64_t)(uintptr_t)data + at, bytes, PIECE, &done) < 0)
            bench_fail("UFFDIO_COPY");
        if (!by_copy && pwrite(memfd, bytes, PIECE, (off_t)at) != PIECE)
            bench_fail("pwrite");
    }
    bench_print_seconds(length, (bench_now_us() - begin_us) / 1e6);
    return EXIT_SUCCESS;
}

static int is_one_of(const char *word, const char *one, const char *other)
{
    return strcmp(word, one) == 0 || strcmp(word, other) == 0;
}

/* Both sides are there before: what a copy costs and nothing else. */
static int run_memcpy(const char *path)
{
    uint64_t length;
    int file = bench_open_file(path, PIECE, &length);

    length = length / PIECE * PIECE;
    void *from = mmap(NULL, length, PROT_READ, MAP_SHARED | MAP_POPULATE, file, 0);
    void *to = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (from == MAP_FAILED || to == MAP_FAILED)
        bench_fail("mmap");
    double begin_us = bench_now_us();
    memcpy(to, from, length);
    bench_print_seconds(length, (bench_now_us() - begin_us) / 1e6);
    return EXIT_SUCCESS;
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";

    if (strcmp(what, "server") == 0 && argc == 7 && is_one_of(argv[2], "blocks", "spins"))
        return run_with_file(&(struct chain){.spins = strcmp(argv[2], "spins") == 0, .server_cpu = atoi(argv[4]),
                                             .helper_cpu = atoi(argv[5]), .count = strtoull(argv[6], NULL, 10)},
                             argv[3], OF_FILE);
    if (strcmp(what, "chain") == 0 && argc == 7)
        return run_with_file(&(struct chain){.source_cpu = atoi(argv[3]), .server_cpu = atoi(argv[4]),
                                             .helper_cpu = atoi(argv[5]), .count = strtoull(argv[6], NULL, 10)},
                             argv[2], OF_PROCESS);
    if (strcmp(what, "nbd") == 0 && argc == 6)
        return run_with_nbd(&(struct chain){.server_cpu = atoi(argv[3]), .helper_cpu = atoi(argv[4]),
                                            .count = strtoull(argv[5], NULL, 10)},
                            argv[2]);
    if (strcmp(what, "copy") == 0 && argc == 4 && is_one_of(argv[3], "4096", "2097152"))
        return run_fill(argv[2], strtoull(argv[3], NULL, 10), 1);
    if (strcmp(what, "pwrite") == 0 && argc == 3)
        return run_fill(argv[2], BENCH_PAGE, 0);
    if (strcmp(what, "memcpy") == 0 && argc == 3)
        return run_memcpy(argv[2]);
    bench_refuse("usage: bench-limit server blocks|spins FILE SERVER_CPU HELPER_CPU COUNT | chain FILE SOURCE_CPU"
                 " SERVER_CPU HELPER_CPU COUNT | nbd SOCKET SERVER_CPU HELPER_CPU COUNT | copy FILE PAGE_SIZE |"
                 " pwrite FILE | memcpy FILE");
}
