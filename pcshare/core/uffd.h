/* uffd: the verbs of userfaultfd, one function a verb, with the kernel's oddities taken out of the answers.
 *
 * Knows nothing of blocks, helpers or policy; never retries, never logs. Some facts about userfaultfd that shaped it:
 *  - "nothing copied" has two encodings in the ioctl's result field, 0 and a negative errno; here bytes done and errno
 *    are always apart;
 *  - EAGAIN with bytes done is a partial copy, EAGAIN without is an address space in motion;
 *  - the API handshake is allowed once per fd: features are probed on a throw-away fd;
 *  - O_NONBLOCK belongs to the open file, which a helper shares: reads use RWF_NOWAIT, which it cannot take away.
 */
#ifndef PCSHARE_UFFD_H
#define PCSHARE_UFFD_H

#include <stdint.h>

enum {
    UFFD_MODE_MISSING = 1,
    UFFD_MODE_WP = 2,
    UFFD_MODE_MINOR = 4,
};

/* Feature bits that pcshare names; the kernel's own values. */
enum {
    UFFD_FEATURE_BIT_PAGEFAULT_WP = 1 << 0,
    UFFD_FEATURE_BIT_EVENT_FORK = 1 << 1,
    UFFD_FEATURE_BIT_EVENT_REMAP = 1 << 2,
    UFFD_FEATURE_BIT_EVENT_REMOVE = 1 << 3,
    UFFD_FEATURE_BIT_MISSING_HUGETLBFS = 1 << 4,
    UFFD_FEATURE_BIT_MISSING_SHMEM = 1 << 5,
    UFFD_FEATURE_BIT_EVENT_UNMAP = 1 << 6,
    UFFD_FEATURE_BIT_SIGBUS = 1 << 7,
    UFFD_FEATURE_BIT_THREAD_ID = 1 << 8,
    UFFD_FEATURE_BIT_MINOR_HUGETLBFS = 1 << 9,
    UFFD_FEATURE_BIT_MINOR_SHMEM = 1 << 10,
    UFFD_FEATURE_BIT_EXACT_ADDRESS = 1 << 11,
    UFFD_FEATURE_BIT_WP_HUGETLBFS_SHMEM = 1 << 12,
    UFFD_FEATURE_BIT_WP_UNPOPULATED = 1 << 13,
    UFFD_FEATURE_BIT_POISON = 1 << 14,
    UFFD_FEATURE_BIT_WP_ASYNC = 1 << 15,
    UFFD_FEATURE_BIT_MOVE = 1 << 16,
};

/* Bits in the ioctls masks that API and REGISTER answer with. */
enum {
    UFFD_IOCTL_REGISTER = 0x00,
    UFFD_IOCTL_UNREGISTER = 0x01,
    UFFD_IOCTL_WAKE = 0x02,
    UFFD_IOCTL_COPY = 0x03,
    UFFD_IOCTL_ZEROPAGE = 0x04,
    UFFD_IOCTL_MOVE = 0x05,
    UFFD_IOCTL_WRITEPROTECT = 0x06,
    UFFD_IOCTL_CONTINUE = 0x07,
    UFFD_IOCTL_POISON = 0x08,
    UFFD_IOCTL_API = 0x3f,
};

/* Kinds of message; the kernel's own values. */
enum {
    UFFD_MESSAGE_PAGEFAULT = 0x12,
    UFFD_MESSAGE_FORK = 0x13,
    UFFD_MESSAGE_REMAP = 0x14,
    UFFD_MESSAGE_REMOVE = 0x15,
    UFFD_MESSAGE_UNMAP = 0x16,
};

enum { UFFD_READ_MAX = 16 };

struct uffd_message {
    uint64_t fault_addr; /* PAGEFAULT: where; REMOVE, UNMAP, REMAP: start */
    uint64_t length;     /* REMOVE, UNMAP, REMAP: bytes */
    uint64_t to_addr;    /* REMAP: where it lies now */
    uint32_t event;      /* UFFD_MESSAGE_* */
    uint32_t tid;        /* PAGEFAULT with THREAD_ID */
    uint32_t flags;      /* PAGEFAULT: the kernel's UFFD_PAGEFAULT_FLAG_* */
    int32_t fork_fd;     /* FORK: the child's uffd, now owned by the reader; else -1 */
};

/* Opens a uffd, non-blocking and close-on-exec: through device_fd (an open /dev/userfaultfd) if it is not -1, then
 * through /dev/userfaultfd, then the system call, then the system call for user-mode faults only. *user_mode_onlyp says
 * which. */
int uffd_open(int device_fd, int *user_mode_onlyp);
/* From now on uffd_open() takes this one where the process may not open the device itself: it was opened before root
 * was given up. It stays the caller's, and open. Before any thread. */
void uffd_inherit_device(int device_fd);
/* The API handshake with exactly these features; featuresp and ioctlsp (each may be NULL) get what the kernel offers.
 */
int uffd_api(int uffd, uint64_t features, uint64_t *featuresp, uint64_t *ioctlsp);
/* What this kernel offers, asked on a throw-away uffd. */
int uffd_probe(int device_fd, uint64_t *featuresp, uint64_t *ioctlsp, int *user_mode_onlyp);
int uffd_register(int uffd, uint64_t addr, uint64_t length, uint64_t mode, uint64_t *ioctlsp);
int uffd_unregister(int uffd, uint64_t addr, uint64_t length);
/* COPY without waking. 0 when all was done, else a negative errno; *donep is the bytes done in either case. */
int uffd_copy(int uffd, uint64_t addr, const void *bytes, uint64_t length, uint64_t *donep);
int uffd_zeropage(int uffd, uint64_t addr, uint64_t length, uint64_t *donep);
int uffd_continue(int uffd, uint64_t addr, uint64_t length, uint64_t *donep);
/* The same, and wakes who waits there. */
int uffd_continue_wake(int uffd, uint64_t addr, uint64_t length, uint64_t *donep);
int uffd_poison(int uffd, uint64_t addr, uint64_t length, uint64_t *donep);
int uffd_wake(int uffd, uint64_t addr, uint64_t length);
/* Wakes every waiter of the address space this uffd belongs to. */
int uffd_wake_all(int uffd);
/* Reads up to n messages without ever blocking: how many (0: none waiting), or a negative errno. */
int uffd_read(int uffd, struct uffd_message *messages, uint32_t n);
/* 0 if fd is a userfaultfd with its handshake done and features wanted_features and no others; -EBADF: no uffd;
 * -EINVAL: no handshake; -EPERM: other features than these. *identityp is equal for copies of the same uffd and for
 * those only. */
int uffd_inspect(int fd, uint64_t wanted_features, uint64_t *identityp);

#endif
