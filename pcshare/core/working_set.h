/* working_set: which pages helpers were the first to wait for, in that order, as runs of pages in a file of memory that
 * outlives this process.
 *
 * Noted on the way of a fault: no system call, a lock only for a page that is new, each page at most once. Knows no
 * policy and no file format: Python reads the runs and writes them where they are to stay. What came before anybody
 * touched it the kernel tells nobody, and so it is not here. Some facts that shaped it:
 *  - whoever is killed leaves the file as it is: a run is there when n_runs counts it, and then only grows;
 *  - in a file of memory only what was written takes memory, so it is as long as it may ever get from the start.
 */
#ifndef PCSHARE_WORKING_SET_H
#define PCSHARE_WORKING_SET_H

#include <stdint.h>

enum {
    WORKING_SET_MAGIC = 0x53574350, /* "PCWS" */
    WORKING_SET_VERSION = 1,
    WORKING_SET_RUNS_MAX = 4 << 20, /* 64 MiB of them: 16 GiB touched at random in 4 KiB pages */
};

/* Pages of a block that follow each other and were touched one after the other. */
struct working_set_run {
    uint64_t page;
    uint32_t n_pages;
    uint32_t block_index;
};

struct fault_threads;
struct ramblock;

/* Records to a file of memory from here on, of which the caller keeps its fd: an empty one, or that of the coordinator
 * before this one, whose runs stay. When runs_max are there it records no more. Before there are blocks. */
int fault_threads_record(struct fault_threads *ft, int fd, uint64_t runs_max);
/* How many runs there are, and where: they stay there until ft is freed. The last one may still grow. */
uint64_t fault_threads_recorded(const struct fault_threads *ft, const struct working_set_run **runsp);
/* Notes them as if they had been touched now. -EINVAL: one names no page that there is; those before it are noted. */
int fault_threads_note_runs(struct fault_threads *ft, const struct working_set_run *runs, uint64_t n_runs);

#endif
