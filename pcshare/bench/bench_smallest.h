/* bench_smallest: what the smallest servers are made of: a file to read, memory with a uffd, faults, processes that end
 * together.
 */
#ifndef PCSHARE_BENCH_SMALLEST_H
#define PCSHARE_BENCH_SMALLEST_H

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bench_common.h"
#include "uffd.h"

static inline int bench_open_file(const char *path, uint64_t least, uint64_t *lengthp)
{
    struct stat info;
    int fd = open(path, O_RDONLY | O_CLOEXEC);

    if (fd < 0 || fstat(fd, &info) < 0)
        bench_fail(path);
    *lengthp = (uint64_t)info.st_size / BENCH_PAGE * BENCH_PAGE;
    if (*lengthp < least)
        bench_refuse("the file is too small");
    return fd;
}

static inline int bench_make_memfd(uint64_t length, uint64_t page_size)
{
    int memfd = memfd_create("bench", MFD_CLOEXEC | (page_size > BENCH_PAGE ? MFD_HUGETLB : 0));

    if (memfd < 0 || ftruncate(memfd, (off_t)length) < 0)
        bench_fail("memfd");
    return memfd;
}

/* A uffd on a shared mapping of the memfd. */
static inline int bench_map_registered(int memfd, uint64_t length, uint8_t **datap)
{
    int user_mode_only, uffd;
    void *data = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);

    if (data == MAP_FAILED)
        bench_fail("mmap");
    *datap = data;
    uffd = uffd_open(-1, &user_mode_only);
    if (uffd < 0 || uffd_api(uffd, 0, NULL, NULL) < 0 ||
        uffd_register(uffd, (uint64_t)(uintptr_t)data, length, UFFD_MODE_MISSING, NULL) < 0)
        bench_fail("userfaultfd");
    return uffd;
}

/* The page of the next fault. Whether there was one. */
static inline int bench_next_fault(int uffd, uint64_t *addrp)
{
    struct uffd_message message;

    if (uffd_read(uffd, &message, 1) != 1)
        return 0;
    *addrp = message.fault_addr & ~(uint64_t)(BENCH_PAGE - 1);
    return 1;
}

static inline void bench_answer(int uffd, uint64_t addr, const uint8_t *bytes)
{
    uint64_t done;
    int rc = uffd_copy(uffd, addr, bytes, BENCH_PAGE, &done);

    if (rc < 0) {
        errno = -rc;
        bench_fail("UFFDIO_COPY");
    }
    uffd_wake(uffd, addr, BENCH_PAGE);
}

/* It never outlives its parent, which may have ended before it says so. */
static inline pid_t bench_fork_child(void)
{
    pid_t parent = getpid(), pid = fork();

    if (pid < 0)
        bench_fail("fork");
    if (pid == 0 && prctl(PR_SET_PDEATHSIG, SIGKILL) < 0)
        bench_fail("prctl");
    if (pid == 0 && getppid() != parent)
        _exit(EXIT_FAILURE);
    return pid;
}

#endif
