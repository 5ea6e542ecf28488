/* fuzz: what the fuzz programs share: the arguments COUNT SEED, random numbers that a seed repeats, changes to bytes, a
 * check that says where it failed, an end to what hangs, the number of open fds.
 *
 * Knows no protocol. Each program includes it once.
 */
#ifndef PCSHARE_TESTS_FUZZ_H
#define PCSHARE_TESTS_FUZZ_H

#include <dirent.h>
#include <endian.h>
#include <errno.h>
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

enum {
    FUZZ_HANG_S = 60,        /* for FUZZ_HANG_INPUTS: more by some powers of ten than they take */
    FUZZ_HANG_INPUTS = 1000, /* between two looks at fds and clock */
    FUZZ_COUNT_DEFAULT = 10000,
};

#define REQUIRE(condition)                                                                                             \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: input %" PRIu64 ", seed %" PRIu64 ": %s\n", __FILE__, __LINE__, fuzz_inputs,       \
                    fuzz_seed, #condition);                                                                            \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

enum { FUZZ_FDS_MAX = 6 }; /* more than any message may have, and than the core itself sends */

static uint64_t fuzz_inputs; /* so far */
static uint64_t fuzz_wanted;
static uint64_t fuzz_seed;
static uint64_t fuzz_random;
static int fuzz_fds; /* open when it began */

static inline uint64_t random_below(uint64_t n)
{
    fuzz_random ^= fuzz_random << 13;
    fuzz_random ^= fuzz_random >> 7;
    fuzz_random ^= fuzz_random << 17;
    return (fuzz_random >> 11) % n;
}

static inline int one_in(uint64_t n)
{
    return random_below(n) == 0;
}

/* One message with up to FUZZ_FDS_MAX fds. 0, or a negative errno. */
static inline int fuzz_send(int socket_fd, const void *bytes, size_t length, const int *fds, uint32_t n_fds, int flags)
{
    union {
        char bytes[CMSG_SPACE(sizeof(int) * FUZZ_FDS_MAX)];
        struct cmsghdr align;
    } control = {0};
    struct iovec vector = {.iov_base = (void *)bytes, .iov_len = length};
    struct msghdr header = {.msg_iov = &vector, .msg_iovlen = 1};

    if (n_fds) {
        header.msg_control = control.bytes;
        header.msg_controllen = CMSG_SPACE(sizeof(int) * n_fds);
        struct cmsghdr *rights = CMSG_FIRSTHDR(&header);
        *rights = (struct cmsghdr){
            .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof(int) * n_fds)};
        memcpy(CMSG_DATA(rights), fds, sizeof(int) * n_fds);
    }
    return sendmsg(socket_fd, &header, MSG_NOSIGNAL | flags) < 0 ? -errno : 0;
}

/* A number at or beside which mistakes are made. */
static inline uint64_t random_edge(void)
{
    static const uint64_t edges[] = {0, 1, 7, 8, 255, 4095, 4096, 65535, INT32_MAX, UINT32_MAX, INT64_MAX, UINT64_MAX};

    if (one_in(3))
        return (uint64_t)1 << random_below(64);
    return edges[random_below(sizeof(edges) / sizeof(*edges))] + random_below(3) - 1;
}

static inline void random_fill(void *bytes, uint64_t length)
{
    uint8_t *at = bytes;

    for (uint64_t i = 0; i < length; i++)
        at[i] = (uint8_t)random_below(256);
}

/* One small change: bits, a byte, an aligned word that is an edge or close to what it was. */
static inline void mutate_bytes(void *bytes, uint64_t length)
{
    uint8_t *at = bytes;
    uint64_t size = (uint64_t)1 << (1 + random_below(3)), word = 0;

    if (length == 0)
        return;
    if (one_in(3) || length < size) {
        at[random_below(length)] ^= (uint8_t)(1 << random_below(8));
        return;
    }
    if (one_in(4)) {
        at[random_below(length)] = (uint8_t)random_below(256);
        return;
    }
    at += random_below(length / size) * size;
    memcpy(&word, at, size);
    word = one_in(2) ? random_edge() : word + random_below(5) - 2;
    memcpy(at, &word, size);
}

static inline int count_fds(void)
{
    DIR *folder = opendir("/proc/self/fd");
    int n = -1; /* the folder's own */

    while (folder && readdir(folder))
        n++;
    if (folder)
        closedir(folder);
    return n;
}

/* After everything that stays open has been opened. */
static inline void fuzz_begin(void)
{
    fuzz_fds = count_fds();
    alarm(FUZZ_HANG_S);
}

/* 1: another input is wanted. What was opened for the last one must be closed by now. */
static inline int fuzz_more(void)
{
    static uint64_t look_at;

    if (fuzz_inputs >= look_at || fuzz_inputs >= fuzz_wanted) {
        REQUIRE(count_fds() == fuzz_fds);
        alarm(FUZZ_HANG_S); /* SIGALRM ends what hangs */
        look_at = fuzz_inputs + FUZZ_HANG_INPUTS;
    }
    return fuzz_inputs < fuzz_wanted;
}

static inline void fuzz_arguments(int argc, char **argv)
{
    fuzz_wanted = argc > 1 ? strtoull(argv[1], NULL, 10) : FUZZ_COUNT_DEFAULT;
    fuzz_seed = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    fuzz_random = fuzz_seed * 2654435761u + 1;
    for (int i = 0; i < 8; i++) /* small seeds are far from each other, too */
        (void)random_below(2);
}

#endif
