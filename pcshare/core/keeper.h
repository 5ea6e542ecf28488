/* keeper: the tiny process that holds the writable mapping of every block.
 *
 * After FUTURE_WRITE nobody can map a block writable any more, and UFFDIO_COPY works only while the owner of the
 * registered mapping lives. So the mapping belongs to a process that does next to nothing: it makes, maps, registers
 * and seals blocks, and on request stores the right bytes into a foreign page. It never touches a page that may be
 * missing, knows no source and no helper, and is started by exec, so that no inherited, unregistered copy of its
 * mappings exists.
 *
 * The coordinator talks to it over a SEQPACKET socket pair with the fixed-size messages below; one request, one answer.
 */
#ifndef PCSHARE_KEEPER_H
#define PCSHARE_KEEPER_H

#include <stdint.h>

enum {
    KEEPER_VERSION = 2,
    KEEPER_BLOCKS_MAX = 1024,
    KEEPER_STAGING_BYTES = 2 << 20, /* the largest page size: one repair at most */
};

enum {
    KEEPER_HELLO = 1,    /* answer: keeper's pid; fds: the staging memfd */
    KEEPER_MAKE = 2,     /* answer: place_addr, ioctls; fds: memfd read-write, placing uffd; deferred: only the memfd */
    KEEPER_DROP = 3,     /* unregister, unmap, forget */
    KEEPER_REPAIR = 4,   /* copy length bytes of the staging memfd over [offset, + length): a present, sealed page */
    KEEPER_COMPLETE = 5, /* unregister: every page is in */
    KEEPER_LISTEN = 6,   /* of a deferred block: map, register, seal; answer: place_addr, ioctls; fds: placing uffd */
};

struct keeper_request {
    uint32_t version;
    uint32_t op;
    uint32_t block; /* DROP, REPAIR, COMPLETE, LISTEN: what MAKE answered */
    uint32_t writable;
    uint32_t deferred; /* MAKE: the memfd alone; it is neither mapped nor sealed before LISTEN */
    uint32_t reserved;
    uint64_t map_length; /* MAKE: bytes, a multiple of page_size */
    uint64_t page_size;
    uint64_t offset;
    uint64_t length;
    char idstr[64];
};

struct keeper_answer {
    int32_t status; /* 0 or a negative errno */
    uint32_t block;
    uint32_t pid;
    uint32_t reserved;
    uint64_t place_addr; /* of the block in the keeper */
    uint64_t ioctls;     /* what REGISTER offered on it */
    char text[256];
};

struct keeper;

/* Coordinator's side. socket_fd is consumed. */
int keeper_connect(struct keeper **kp, int socket_fd);
void keeper_free(struct keeper *k);
uint32_t keeper_pid(const struct keeper *k);
/* A new block's memfd and the placing uffd (both now the caller's). */
int keeper_make_block(struct keeper *k, const char *idstr, uint64_t map_length, uint64_t page_size, int writable,
                      struct keeper_answer *answer, int *memfdp, int *placing_uffdp);
/* The same in two steps, for memory that is written in place before anybody else has it: first its memfd (the
 * caller's), then, when nothing stores into it any more and no mapping of it is left, the rest. */
int keeper_defer_block(struct keeper *k, const char *idstr, uint64_t map_length, uint64_t page_size, int writable,
                       uint32_t *blockp, int *memfdp);
int keeper_listen_block(struct keeper *k, uint32_t block, struct keeper_answer *answer, int *placing_uffdp);
int keeper_drop_block(struct keeper *k, uint32_t block);
int keeper_complete_block(struct keeper *k, uint32_t block);
/* Stores bytes over a foreign page. Called by whoever placed it; serialised inside. */
int keeper_repair(struct keeper *k, uint32_t block, uint64_t offset, const void *bytes, uint64_t length);
/* The text of the last refusal. */
const char *keeper_error_text(const struct keeper *k);

/* Keeper's side: serves until the socket hangs up. */
int keeper_serve(int socket_fd);

#endif
