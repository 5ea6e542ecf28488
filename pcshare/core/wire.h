/* wire: the control protocol between coordinator, helper and operator. Only layout; no I/O.
 *
 * One Unix socket of type SEQPACKET per attachment. Every message is one datagram of fixed size, little-endian,
 * naturally aligned, that begins with struct wire_header; fds travel beside it (SCM_RIGHTS) in the number the message's
 * row in docs/reference/control-protocol.md names. A change of layout is a new WIRE_VERSION.
 */
#ifndef PCSHARE_WIRE_H
#define PCSHARE_WIRE_H

#include <stdint.h>

enum {
    WIRE_MAGIC = 0x48534350, /* "PCSH" */
    WIRE_VERSION = 1,
    WIRE_IDSTR_MAX = 64,   /* bytes, with the final NUL */
    WIRE_TEXT_MAX = 256,   /* bytes of a message for people, with the final NUL */
    WIRE_DTYPE_MAX = 1024, /* bytes of a numpy dtype description, with the final NUL */
    WIRE_DIMS_MAX = 32,    /* numpy's own limit */
    WIRE_MAPS_MAX = 16,    /* maps of one uffd */
    WIRE_FDS_MAX = 4,      /* fds of one message */
    WIRE_WORDS_MAX = 3072, /* bytes of a command's words, each with its NUL */
};

/* Types. Helper to coordinator: HELLO ATTACH REQUEST LEAVE, and an operator's ADMIN and REPLACE.
 * Coordinator to helper: WELCOME ACK DONE END BYE ERROR. */
enum {
    WIRE_HELLO = 1,
    WIRE_WELCOME = 2,
    WIRE_ATTACH = 3,
    WIRE_ACK = 4,
    WIRE_REQUEST = 5,
    WIRE_DONE = 6,
    WIRE_END = 7,
    WIRE_LEAVE = 8,
    WIRE_BYE = 9,
    WIRE_ERROR = 10,
    WIRE_ADMIN = 11,
    WIRE_REPLACE = 12,
};

/* How a helper wants a block. */
enum {
    WIRE_MODE_DEFAULT = 0, /* what the block is */
    WIRE_MODE_RO = 1,
    WIRE_MODE_RW = 2,
    WIRE_MODE_COW = 3,
};

/* wire_welcome.flags */
enum {
    WIRE_WELCOME_COMPLETE = 1, /* every page is in: map it plainly, no uffd, no ATTACH */
    WIRE_WELCOME_WRITABLE = 2, /* the block may be mapped writable */
    WIRE_WELCOME_DEVICE = 4,   /* an open /dev/userfaultfd is the third fd */
    WIRE_WELCOME_ARRAY = 8,    /* dtype, dims and data_offset are filled in */
    WIRE_WELCOME_FORTRAN = 16, /* the array is in Fortran order */
    WIRE_WELCOME_STRICT = 32,  /* register for MINOR faults as well as for missing pages */
};

/* wire_request.flags */
enum {
    WIRE_REQUEST_WAIT = 1, /* ensure: answer DONE when all of it is received; without: prefetch, never answered */
};

/* wire_admin.op */
enum {
    WIRE_ADMIN_STREAM_EAGER = 1,
    WIRE_ADMIN_STREAM_LAZY = 2,
    WIRE_ADMIN_STREAM_RATE = 3, /* argument: bytes a second */
    WIRE_ADMIN_STREAM_PAUSE = 4,
    WIRE_ADMIN_STREAM_RESUME = 5,
    WIRE_ADMIN_RESUME = 6, /* ask a failed source again */
    WIRE_ADMIN_STOP = 7,
};

struct wire_header {
    uint32_t magic;
    uint16_t version;
    uint16_t type;
    uint32_t length; /* of the whole message, this header included */
    uint32_t cookie; /* DONE repeats the REQUEST's; else 0 */
};

/* First message on a connection. No fds. */
struct wire_hello {
    struct wire_header header;
    uint16_t version_min;
    uint16_t version_max;
    uint32_t mode;  /* WIRE_MODE_* */
    char idstr[64]; /* the block; empty: the only one */
};

/* Answer to HELLO. fds: the memfd (O_RDONLY unless mode is RW), the status segment (O_RDONLY), and, if flagged, the
 * device. */
struct wire_welcome {
    struct wire_header header;
    uint32_t flags;
    uint32_t mode;        /* what was granted */
    uint32_t block_index; /* in the status segment */
    uint32_t ndim;
    uint64_t used_length; /* bytes the source holds */
    uint64_t page_size;
    uint64_t map_length;        /* used_length rounded up to the page size */
    uint64_t features;          /* the handshake of the helper's uffd must ask for exactly these */
    uint64_t data_offset;       /* of the array in the block, bytes */
    uint64_t orphan_timeout_ms; /* how long to wait for a coordinator that went away; 0: for ever */
    uint64_t dims[32];
    char idstr[64];
    char dtype[1024];
};

struct wire_map {
    uint64_t client_addr; /* in the helper */
    uint64_t offset;      /* in the block */
    uint64_t length;
};

/* fds: the uffd, its handshake done and every map registered as WELCOME's flags say. */
struct wire_attach {
    struct wire_header header;
    uint32_t n_maps;
    uint32_t reserved;
    struct wire_map maps[16];
};

/* Somebody serves now. No fds. To a helper that is attached: it is another one that serves now, who knows of its uffd
 * and of no REQUEST; what has not been answered must be asked for again, with a new cookie. */
struct wire_ack {
    struct wire_header header;
    uint32_t helper_index; /* in the status segment */
    uint32_t flags;        /* WIRE_WELCOME_COMPLETE: it became complete meanwhile, no uffd was kept */
};

struct wire_request {
    struct wire_header header;
    uint32_t flags;
    uint32_t reserved;
    uint64_t offset; /* bytes in the block */
    uint64_t length;
};

/* Answer to a REQUEST with WAIT. status: 0, or a negative errno (-EIO: the source lost [offset, offset + length)). */
struct wire_done {
    struct wire_header header;
    int32_t status;
    uint32_t reserved;
    uint64_t offset;
    uint64_t length;
};

/* END: the block is complete: unregister, then LEAVE. BYE: the coordinator ends before the block is complete.
 * LEAVE: the helper has unregistered or unmapped everything. No fds, no body. */
struct wire_plain {
    struct wire_header header;
};

/* Either side before it hangs up, and the answer to ADMIN (error 0: done). */
struct wire_error {
    struct wire_header header;
    int32_t error; /* a positive errno, or 0 */
    uint32_t version_max;
    char text[256];
};

struct wire_admin {
    struct wire_header header;
    uint32_t op;
    uint32_t reserved;
    uint64_t argument;
};

/* Make way for another program that goes on where this one stops: the first n_program words start it, up to `pcshare
 * coordinator`; then come this one's own options, and then the rest of the words, which so have the last say. Answered
 * like ADMIN, before it happens. No fds. */
struct wire_replace {
    struct wire_header header;
    uint32_t n_program;
    uint32_t n_words;
    char words[3072];
};

#endif
