/* keeper: the tiny process that holds the writable mapping of every block.
 *
 * After FUTURE_WRITE nobody can map a block writable any more, and UFFDIO_COPY works only while the owner of the
 * registered mapping lives. So the mapping belongs to a process that does next to nothing: it makes, maps, registers
 * and seals blocks, and on request stores the right bytes into a foreign page. It never touches a page that may be
 * missing, knows no source and no helper, and is started by exec, so that no inherited, unregistered copy of its
 * mappings exists.
 *
 * The coordinator talks to it over a SEQPACKET socket pair with the fixed-size messages below; one request, one answer.
 * Blocks outlive the coordinator that made them: the next one says HELLO, takes those that it knows of and sweeps the
 * rest away. What else a coordinator leaves to the next one is the store's (keeper_store.h).
 */
#ifndef PCSHARE_KEEPER_H
#define PCSHARE_KEEPER_H

#include <stdint.h>
#include "uffd.h"

enum {
    KEEPER_VERSION = 3,
    KEEPER_BLOCKS_MAX = 1024,
    KEEPER_STAGING_BYTES = 2 << 20, /* the largest page size: one repair at most */
};

enum {
    KEEPER_HELLO = 1,    /* answer: keeper's pid; fds: the staging memfd. No block belongs to the one who says it */
    KEEPER_MAKE = 2,     /* answer: place_addr, ioctls; fds: memfd read-write, placing uffd; deferred: only the memfd */
    KEEPER_DROP = 3,     /* unregister, unmap, forget */
    KEEPER_REPAIR = 4,   /* copy length bytes of the staging memfd over [offset, + length): a present, sealed page */
    KEEPER_COMPLETE = 5, /* unregister: every page is in */
    KEEPER_LISTEN = 6,   /* of a deferred block: map, register, seal; answer: place_addr, ioctls; fds: placing uffd */
    KEEPER_TAKE = 7,     /* of a block that a dead coordinator made, by its idstr too; answer and fds as of MAKE */
    KEEPER_SWEEP = 8,    /* drops every block that has been neither made nor taken since HELLO */
};

struct keeper_request {
    uint32_t version;
    uint32_t op;
    uint32_t block; /* DROP, REPAIR, COMPLETE, LISTEN, TAKE: what MAKE answered */
    uint32_t writable;
    uint32_t deferred;   /* MAKE: the memfd alone; it is neither mapped nor sealed before LISTEN */
    uint32_t serial;     /* the answer repeats it: an answer that nobody took may still lie in the socket */
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
    uint32_t serial;
    uint64_t place_addr; /* of the block in the keeper */
    uint64_t ioctls;     /* what REGISTER offered on it */
    char text[256];
};

/* What the keeper has read from a writable helper's uffd while no coordinator was there; the file that the store calls
 * "events" is an array of these. */
struct keeper_event {
    uint32_t slot; /* the helper's, in the status segment */
    uint32_t reserved;
    struct uffd_message message; /* never a PAGEFAULT: that comes again when everybody is woken */
};

struct keeper;

/* Coordinator's side. socket_fd is consumed. */
int keeper_connect(struct keeper **kp, int socket_fd);
void keeper_free(struct keeper *k);
uint32_t keeper_pid(const struct keeper *k);
int keeper_socket(const struct keeper *k);
/* A new block's memfd and the placing uffd (both now the caller's). */
int keeper_make_block(struct keeper *k, const char *idstr, uint64_t map_length, uint64_t page_size, int writable,
                      struct keeper_answer *answer, int *memfdp, int *placing_uffdp);
/* The same in two steps, for memory that is written in place before anybody else has it: first its memfd (the
 * caller's), then, when nothing stores into it any more and no mapping of it is left, the rest. */
int keeper_defer_block(struct keeper *k, const char *idstr, uint64_t map_length, uint64_t page_size, int writable,
                       uint32_t *blockp, int *memfdp);
int keeper_listen_block(struct keeper *k, uint32_t block, struct keeper_answer *answer, int *placing_uffdp);
/* A block that the coordinator before this one made; its memfd and the placing uffd are the caller's. -ENOENT: the
 * keeper has no block of that number and idstr. */
int keeper_take_block(struct keeper *k, uint32_t block, const char *idstr, struct keeper_answer *answer, int *memfdp,
                      int *placing_uffdp);
/* What the coordinator before this one made and this one has not taken is given back. */
int keeper_sweep(struct keeper *k);
int keeper_drop_block(struct keeper *k, uint32_t block);
int keeper_complete_block(struct keeper *k, uint32_t block);
/* Stores bytes over a foreign page. Called by whoever placed it; serialised inside. */
int keeper_repair(struct keeper *k, uint32_t block, uint64_t offset, const void *bytes, uint64_t length);
/* The text of the last refusal. */
const char *keeper_error_text(const struct keeper *k);

#endif
