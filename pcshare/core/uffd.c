#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>
#include "uffd.h"

/* ZEROPAGE, CONTINUE and POISON share one layout; the last two are missing in the headers of older systems. */
struct range_verb {
    struct uffdio_range range;
    uint64_t mode;
    int64_t done; /* bytes, or a negative errno, or 0 */
};
_Static_assert(sizeof(struct range_verb) == sizeof(struct uffdio_zeropage), "the kernel's layout");

#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#ifndef UFFDIO_CONTINUE
#define UFFDIO_CONTINUE _IOWR(UFFDIO, UFFD_IOCTL_CONTINUE, struct range_verb)
#endif
#ifndef UFFDIO_POISON
#define UFFDIO_POISON _IOWR(UFFDIO, UFFD_IOCTL_POISON, struct range_verb)
#endif

#define FEATURE_INITIALIZED 0x80000000u /* the kernel's own mark in fdinfo: the handshake is done */
#define MODE_DONTWAKE 1u                /* the same bit in every verb that knows it */
#define SPACE_START 4096u
#define SPACE_LENGTH ((1ull << 47) - 12288) /* up to the guard page at the end of a 47-bit address space */

enum {
    FDINFO_MAX = 1024, /* a uffd's fdinfo has seven short lines */
    PROC_PATH_MAX = 64,
};

static int uffd_from_device(int device_fd)
{
    int uffd = ioctl(device_fd, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);

    return uffd < 0 ? -errno : uffd;
}

static int uffd_from_syscall(int flags)
{
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | flags);

    return uffd < 0 ? -errno : uffd;
}

static int uffd_from_device_path(void)
{
    int uffd, device_fd = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);

    if (device_fd < 0)
        return -errno;
    uffd = uffd_from_device(device_fd);
    close(device_fd);
    return uffd;
}

static int inherited_device_fd = -1;

void uffd_inherit_device(int device_fd)
{
    inherited_device_fd = device_fd;
}

int uffd_open(int device_fd, int *user_mode_onlyp)
{
    int uffd = -EBADF;

    *user_mode_onlyp = 0;
    if (device_fd >= 0)
        uffd = uffd_from_device(device_fd);
    if (uffd < 0)
        uffd = uffd_from_device_path();
    if (uffd < 0 && inherited_device_fd >= 0)
        uffd = uffd_from_device(inherited_device_fd);
    if (uffd < 0)
        uffd = uffd_from_syscall(0);
    if (uffd == -EPERM) {
        uffd = uffd_from_syscall(UFFD_USER_MODE_ONLY);
        *user_mode_onlyp = uffd >= 0;
    }
    return uffd;
}

int uffd_api(int uffd, uint64_t features, uint64_t *featuresp, uint64_t *ioctlsp)
{
    struct uffdio_api api = {.api = UFFD_API, .features = features};

    if (ioctl(uffd, UFFDIO_API, &api) < 0)
        return -errno;
    if (featuresp)
        *featuresp = api.features;
    if (ioctlsp)
        *ioctlsp = api.ioctls;
    return 0;
}

int uffd_probe(int device_fd, uint64_t *featuresp, uint64_t *ioctlsp, int *user_mode_onlyp)
{
    int rc, uffd = uffd_open(device_fd, user_mode_onlyp);

    if (uffd < 0)
        return uffd;
    rc = uffd_api(uffd, 0, featuresp, ioctlsp);
    close(uffd);
    return rc;
}

int uffd_register(int uffd, uint64_t addr, uint64_t length, uint64_t mode, uint64_t *ioctlsp)
{
    struct uffdio_register request = {.range = {.start = addr, .len = length}, .mode = mode};

    if (ioctl(uffd, UFFDIO_REGISTER, &request) < 0)
        return -errno;
    if (ioctlsp)
        *ioctlsp = request.ioctls;
    return 0;
}

int uffd_unregister(int uffd, uint64_t addr, uint64_t length)
{
    struct uffdio_range range = {.start = addr, .len = length};

    return ioctl(uffd, UFFDIO_UNREGISTER, &range) < 0 ? -errno : 0;
}

int uffd_copy(int uffd, uint64_t addr, const void *bytes, uint64_t length, uint64_t *donep)
{
    struct uffdio_copy request = {.dst = addr, .src = (uintptr_t)bytes, .len = length, .mode = MODE_DONTWAKE};
    int rc = ioctl(uffd, UFFDIO_COPY, &request) < 0 ? -errno : 0;

    *donep = request.copy > 0 ? (uint64_t)request.copy : 0;
    return rc;
}

static int range_verb(int uffd, unsigned long verb, uint64_t addr, uint64_t length, uint64_t mode, uint64_t *donep)
{
    struct range_verb request = {.range = {.start = addr, .len = length}, .mode = mode};
    int rc = ioctl(uffd, verb, &request) < 0 ? -errno : 0;

    *donep = request.done > 0 ? (uint64_t)request.done : 0;
    return rc;
}

int uffd_zeropage(int uffd, uint64_t addr, uint64_t length, uint64_t *donep)
{
    return range_verb(uffd, UFFDIO_ZEROPAGE, addr, length, MODE_DONTWAKE, donep);
}

int uffd_continue(int uffd, uint64_t addr, uint64_t length, uint64_t *donep)
{
    return range_verb(uffd, UFFDIO_CONTINUE, addr, length, MODE_DONTWAKE, donep);
}

int uffd_continue_wake(int uffd, uint64_t addr, uint64_t length, uint64_t *donep)
{
    return range_verb(uffd, UFFDIO_CONTINUE, addr, length, 0, donep);
}

int uffd_poison(int uffd, uint64_t addr, uint64_t length, uint64_t *donep)
{
    return range_verb(uffd, UFFDIO_POISON, addr, length, MODE_DONTWAKE, donep);
}

int uffd_wake(int uffd, uint64_t addr, uint64_t length)
{
    struct uffdio_range range = {.start = addr, .len = length};

    return ioctl(uffd, UFFDIO_WAKE, &range) < 0 ? -errno : 0;
}

int uffd_wake_all(int uffd)
{
    return uffd_wake(uffd, SPACE_START, SPACE_LENGTH);
}

/* For kernels whose uffd knows no RWF_NOWAIT (before 6.10): a plain read, as long as nobody has made the fd blocking.
 * Between the look and the read a helper still can; there it is the best there is. */
static ssize_t read_guarded(int uffd, void *buffer, size_t size)
{
    int flags = fcntl(uffd, F_GETFL);

    if (flags < 0)
        return -1;
    if (!(flags & O_NONBLOCK)) {
        errno = EBADFD;
        return -1;
    }
    return read(uffd, buffer, size);
}

static ssize_t read_nowait(int uffd, void *buffer, size_t size)
{
    struct iovec iov = {.iov_base = buffer, .iov_len = size};
    ssize_t n = preadv2(uffd, &iov, 1, -1, RWF_NOWAIT);

    if (n < 0 && (errno == EOPNOTSUPP || errno == ENOSYS))
        n = read_guarded(uffd, buffer, size);
    return n;
}

static void message_decode(struct uffd_message *message, const struct uffd_msg *raw)
{
    *message = (struct uffd_message){.event = raw->event, .fork_fd = -1};
    switch (raw->event) {
    case UFFD_EVENT_PAGEFAULT:
        message->fault_addr = raw->arg.pagefault.address;
        message->flags = (uint32_t)raw->arg.pagefault.flags;
        message->tid = raw->arg.pagefault.feat.ptid;
        break;
    case UFFD_EVENT_FORK:
        message->fork_fd = (int32_t)raw->arg.fork.ufd;
        break;
    case UFFD_EVENT_REMAP:
        message->fault_addr = raw->arg.remap.from;
        message->to_addr = raw->arg.remap.to;
        message->length = raw->arg.remap.len;
        break;
    case UFFD_EVENT_REMOVE:
    case UFFD_EVENT_UNMAP:
        message->fault_addr = raw->arg.remove.start;
        message->length = raw->arg.remove.end - raw->arg.remove.start;
        break;
    }
}

int uffd_read(int uffd, struct uffd_message *messages, uint32_t n)
{
    struct uffd_msg raw[UFFD_READ_MAX];
    ssize_t bytes;
    int count;

    if (n > UFFD_READ_MAX)
        n = UFFD_READ_MAX;
    bytes = read_nowait(uffd, raw, n * sizeof(raw[0]));
    if (bytes < 0) /* EINTR: polled level-triggered, so what waits is seen again */
        return errno == EAGAIN || errno == EINTR ? 0 : -errno;
    if (bytes == 0 || bytes % sizeof(raw[0]))
        return -EIO;
    count = (int)(bytes / sizeof(raw[0]));
    for (int i = 0; i < count; i++)
        message_decode(&messages[i], &raw[i]);
    return count;
}

static int link_is_uffd(int fd)
{
    char path[PROC_PATH_MAX], link[PROC_PATH_MAX];
    ssize_t n;

    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    n = readlink(path, link, sizeof(link) - 1);
    if (n < 0)
        return -errno;
    link[n] = '\0';
    return strcmp(link, "anon_inode:[userfaultfd]") == 0 ? 0 : -EBADF;
}

/* What the handshake enabled, with the kernel's mark in it. */
static int fdinfo_features(int fd, uint64_t *featuresp)
{
    char path[PROC_PATH_MAX], text[FDINFO_MAX];
    unsigned long long features;
    const char *line;
    ssize_t n;
    int info_fd;

    snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", fd);
    info_fd = open(path, O_RDONLY | O_CLOEXEC);
    if (info_fd < 0)
        return -errno;
    n = read(info_fd, text, sizeof(text) - 1);
    if (n < 0)
        n = -errno;
    close(info_fd);
    if (n < 0)
        return (int)n;
    text[n] = '\0';
    line = strstr(text, "\nAPI:\taa:");
    if (!line || sscanf(line, "\nAPI:\taa:%llx:", &features) != 1)
        return -EBADF;
    *featuresp = features;
    return 0;
}

/* Whether this kernel gives each uffd an inode of its own (older ones: one for all anonymous inodes). Asked once. */
static int inode_is_own(ino_t inode)
{
    static int answer; /* 0: not asked, 1: yes, 2: no */
    int known = __atomic_load_n(&answer, __ATOMIC_RELAXED), user_mode_only, uffd;
    struct stat fresh;

    if (known)
        return known == 1;
    uffd = uffd_open(-1, &user_mode_only);
    if (uffd < 0)
        return 0;
    if (fstat(uffd, &fresh) == 0) {
        known = fresh.st_ino != inode ? 1 : 2;
        __atomic_store_n(&answer, known, __ATOMIC_RELAXED);
    }
    close(uffd);
    return known == 1;
}

int uffd_inspect(int fd, uint64_t wanted_features, uint64_t *identityp)
{
    uint64_t features = 0;
    struct stat st;
    int rc;

    *identityp = 0;
    if (fstat(fd, &st) < 0)
        return -errno;
    rc = link_is_uffd(fd);
    if (rc == 0)
        rc = fdinfo_features(fd, &features);
    if (rc < 0)
        return rc;
    if (features == 0)
        return -EINVAL;
    if ((features & ~(uint64_t)FEATURE_INITIALIZED) != wanted_features)
        return -EPERM;
    *identityp = inode_is_own(st.st_ino) ? st.st_ino : 0;
    return 0;
}
