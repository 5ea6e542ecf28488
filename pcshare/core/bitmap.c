#define _GNU_SOURCE
#include <errno.h>
#include <stddef.h>
#include <sys/mman.h>
#include "bitmap.h"

enum { WORD_BITS = 64 };

static uint64_t word_load(const uint64_t *words, uint64_t index)
{
    return __atomic_load_n(&words[index], __ATOMIC_ACQUIRE);
}

static uint64_t bit_mask(uint64_t bit)
{
    return (uint64_t)1 << (bit % WORD_BITS);
}

/* The bits of word index that lie in [start, end), which must touch that word. */
static uint64_t range_mask(uint64_t index, uint64_t start, uint64_t end)
{
    uint64_t first = index * WORD_BITS, mask = ~(uint64_t)0;

    if (start > first)
        mask &= ~(uint64_t)0 << (start - first);
    if (end - first < WORD_BITS)
        mask &= ~(~(uint64_t)0 << (end - first));
    return mask;
}

int bitmap_test(const uint64_t *words, uint64_t bit)
{
    return (word_load(words, bit / WORD_BITS) & bit_mask(bit)) != 0;
}

int bitmap_test_and_set(uint64_t *words, uint64_t bit)
{
    return (__atomic_fetch_or(&words[bit / WORD_BITS], bit_mask(bit), __ATOMIC_ACQ_REL) & bit_mask(bit)) != 0;
}

int bitmap_test_and_clear(uint64_t *words, uint64_t bit)
{
    return (__atomic_fetch_and(&words[bit / WORD_BITS], ~bit_mask(bit), __ATOMIC_ACQ_REL) & bit_mask(bit)) != 0;
}

uint64_t bitmap_set_in_word(uint64_t *words, uint64_t start, uint64_t end)
{
    uint64_t index = start / WORD_BITS, mask = range_mask(index, start, end);

    if ((__atomic_load_n(&words[index], __ATOMIC_ACQUIRE) & mask) == mask)
        return 0;
    return mask & ~__atomic_fetch_or(&words[index], mask, __ATOMIC_ACQ_REL);
}

void bitmap_set_range(uint64_t *words, uint64_t start, uint64_t end)
{
    if (start >= end)
        return;
    for (uint64_t i = start / WORD_BITS; i <= (end - 1) / WORD_BITS; i++)
        __atomic_fetch_or(&words[i], range_mask(i, start, end), __ATOMIC_ACQ_REL);
}

/* Words that are clear already are only read: clearing a sparse bitmap must not make its memory real. */
void bitmap_clear_range(uint64_t *words, uint64_t start, uint64_t end)
{
    if (start >= end)
        return;
    for (uint64_t i = start / WORD_BITS; i <= (end - 1) / WORD_BITS; i++)
        if (word_load(words, i) & range_mask(i, start, end))
            __atomic_fetch_and(&words[i], ~range_mask(i, start, end), __ATOMIC_ACQ_REL);
}

uint64_t bitmap_count(const uint64_t *words, uint64_t start, uint64_t end)
{
    uint64_t count = 0;

    if (start >= end)
        return 0;
    for (uint64_t i = start / WORD_BITS; i <= (end - 1) / WORD_BITS; i++)
        count += (uint64_t)__builtin_popcountll(word_load(words, i) & range_mask(i, start, end));
    return count;
}

/* The first bit of [start, end) that is set after every word was xored with flip, or end. */
static uint64_t next_bit(const uint64_t *words, uint64_t start, uint64_t end, uint64_t flip)
{
    if (start >= end)
        return end;
    for (uint64_t i = start / WORD_BITS; i <= (end - 1) / WORD_BITS; i++) {
        uint64_t found = (word_load(words, i) ^ flip) & range_mask(i, start, end);

        if (found)
            return i * WORD_BITS + (uint64_t)__builtin_ctzll(found);
    }
    return end;
}

uint64_t bitmap_next_clear(const uint64_t *words, uint64_t start, uint64_t end)
{
    return next_bit(words, start, end, ~(uint64_t)0);
}

uint64_t bitmap_next_set(const uint64_t *words, uint64_t start, uint64_t end)
{
    return next_bit(words, start, end, 0);
}

uint64_t bitmap_bytes(uint64_t bits)
{
    return (bits / WORD_BITS + (bits % WORD_BITS != 0)) * sizeof(uint64_t);
}

int bitmap_new(uint64_t **wordsp, uint64_t bits)
{
    void *words;

    *wordsp = NULL;
    if (bits == 0)
        return -EINVAL;
    words = mmap(NULL, bitmap_bytes(bits), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (words == MAP_FAILED)
        return -errno;
    *wordsp = words;
    return 0;
}

void bitmap_free(uint64_t *words, uint64_t bits)
{
    if (words)
        munmap(words, bitmap_bytes(bits));
}
