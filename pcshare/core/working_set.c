/* working_set: see working_set.h. */
#include "fault_internal.h"

#include <errno.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bitmap.h"

enum { WORD_PAGES = 64 }; /* a word of a bitmap */
#define WORD_ALL UINT64_MAX

/* The file. */
struct working_set_log {
    uint32_t magic;
    uint32_t version;
    uint64_t runs_max;
    uint64_t n_runs;
    uint8_t reserved[40];
    struct working_set_run runs[];
};

/* ---- the file ---- */

static uint64_t bytes_of(uint64_t runs_max)
{
    return sizeof(struct working_set_log) + runs_max * sizeof(struct working_set_run);
}

static int is_ours(const struct working_set_log *log, uint64_t length)
{
    return log->magic == WORKING_SET_MAGIC && log->version == WORKING_SET_VERSION &&
           log->runs_max <= WORKING_SET_RUNS_MAX && bytes_of(log->runs_max) == length && log->n_runs <= log->runs_max;
}

int fault_threads_record(struct fault_threads *ft, int fd, uint64_t runs_max)
{
    struct working_set *set = &ft->working_set;
    struct stat found;

    if (set->log || runs_max == 0 || runs_max > WORKING_SET_RUNS_MAX)
        return -EINVAL;
    if (fstat(fd, &found) < 0)
        return -errno;
    uint64_t length = found.st_size ? (uint64_t)found.st_size : bytes_of(runs_max);
    if (length < sizeof(struct working_set_log))
        return -EPROTO;
    if (!found.st_size && ftruncate(fd, (off_t)length) < 0)
        return -errno;
    struct working_set_log *log = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (log == MAP_FAILED)
        return -errno;
    if (!found.st_size)
        *log = (struct working_set_log){
            .magic = WORKING_SET_MAGIC, .version = WORKING_SET_VERSION, .runs_max = runs_max};
    if (!is_ours(log, length)) {
        munmap(log, length);
        return -EPROTO;
    }
    set->log = log;
    return 0;
}

uint64_t fault_threads_recorded(const struct fault_threads *ft, const struct working_set_run **runsp)
{
    const struct working_set_log *log = ft->working_set.log;

    *runsp = log ? log->runs : NULL;
    return log ? __atomic_load_n(&log->n_runs, __ATOMIC_ACQUIRE) : 0;
}

/* ---- noting ---- */

static int continues(const struct working_set_run *run, uint32_t block_index, uint64_t page)
{
    return run->block_index == block_index && run->page + run->n_pages == page && run->n_pages < UINT32_MAX;
}

static void append(struct working_set *set, uint32_t block_index, uint64_t page, uint64_t n_pages)
{
    struct working_set_log *log = set->log;

    pthread_mutex_lock(&set->lock);
    while (n_pages) {
        struct working_set_run *last = log->n_runs ? &log->runs[log->n_runs - 1] : NULL;
        int goes_on = last && continues(last, block_index, page);
        uint64_t most = UINT32_MAX - (goes_on ? last->n_pages : 0), n = n_pages < most ? n_pages : most;

        if (goes_on) {
            __atomic_store_n(&last->n_pages, last->n_pages + (uint32_t)n, __ATOMIC_RELAXED);
        } else if (log->n_runs < log->runs_max) {
            log->runs[log->n_runs] =
                (struct working_set_run){.page = page, .n_pages = (uint32_t)n, .block_index = block_index};
            __atomic_store_n(&log->n_runs, log->n_runs + 1, __ATOMIC_RELEASE);
        } else {
            break;
        }
        page += n;
        n_pages -= n;
    }
    pthread_mutex_unlock(&set->lock);
}

/* A range, word by word: each part of it that nobody had noted before is one run. */
static void note_range(struct working_set *set, uint64_t *noted, uint32_t block_index, uint64_t page, uint64_t end)
{
    uint64_t first = end; /* of what is new and not appended yet; end: nothing */

    for (uint64_t at = page, stop; at < end; at = stop) {
        stop = (at | (WORD_PAGES - 1)) + 1;
        stop = stop < end ? stop : end;
        uint64_t fresh = bitmap_set_in_word(noted, at, stop);
        if (fresh == WORD_ALL || (!fresh && first == end)) { /* most words of a large range are one or the other */
            first = fresh && first == end ? at : first;
            continue;
        }
        for (uint64_t i = at; i < stop; i++) {
            int is_fresh = (int)(fresh >> (i % WORD_PAGES) & 1);
            if (is_fresh && first == end)
                first = i;
            if (is_fresh || first == end)
                continue;
            append(set, block_index, first, i - first);
            first = end;
        }
    }
    if (first < end)
        append(set, block_index, first, end - first);
}

void working_set_note(struct fault_threads *ft, const struct ramblock *block, uint64_t page, uint64_t n_pages)
{
    struct working_set *set = &ft->working_set;
    uint64_t *noted = set->noted[block->index];

    if (!noted || (n_pages == 1 && bitmap_test(noted, page)))
        return;
    note_range(set, noted, block->index, page, page + n_pages);
}

struct served_block *working_set_block_of(const struct fault_threads *ft, const struct working_set_run *run)
{
    struct served_block *served = run->block_index < STATUS_BLOCKS_MAX ? ft->blocks[run->block_index] : NULL;
    uint64_t page_count = served ? served->block->page_count : 0;
    int is_in = run->n_pages && run->page < page_count && run->n_pages <= page_count - run->page;

    return is_in ? served : NULL;
}

int fault_threads_note_runs(struct fault_threads *ft, const struct working_set_run *runs, uint64_t n_runs)
{
    for (uint64_t i = 0; i < n_runs; i++) {
        const struct served_block *served = working_set_block_of(ft, &runs[i]);
        if (!served)
            return -EINVAL;
        working_set_note(ft, served->block, runs[i].page, runs[i].n_pages);
    }
    return 0;
}

/* ---- life ---- */

void working_set_init(struct working_set *set)
{
    pthread_mutex_init(&set->lock, NULL);
}

void working_set_deinit(struct working_set *set)
{
    if (set->log)
        munmap(set->log, bytes_of(set->log->runs_max));
    set->log = NULL;
    pthread_mutex_destroy(&set->lock);
}

int working_set_add_block(struct fault_threads *ft, const struct ramblock *block)
{
    return ft->working_set.log ? bitmap_new(&ft->working_set.noted[block->index], block->page_count) : 0;
}

void working_set_drop_block(struct fault_threads *ft, const struct ramblock *block)
{
    bitmap_free(ft->working_set.noted[block->index], block->page_count);
    ft->working_set.noted[block->index] = NULL;
}

void working_set_know_kept(struct fault_threads *ft)
{
    const struct working_set_run *runs;
    uint64_t n_runs = fault_threads_recorded(ft, &runs);

    for (uint64_t i = 0; i < n_runs; i++) {
        uint64_t *noted = working_set_block_of(ft, &runs[i]) ? ft->working_set.noted[runs[i].block_index] : NULL;
        if (noted)
            bitmap_set_range(noted, runs[i].page, runs[i].page + runs[i].n_pages);
    }
}
