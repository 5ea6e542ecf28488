/* bitmap: one bit a page, changed by several threads and read by other processes at the same time.
 *
 * Every change is one atomic operation on a 64-bit word; nothing here takes a lock or allocates. A bitmap is only its
 * words: who owns the memory (a status segment, an anonymous mapping) says how long it lives.
 */
#ifndef PCSHARE_BITMAP_H
#define PCSHARE_BITMAP_H

#include <stdint.h>

int bitmap_test(const uint64_t *words, uint64_t bit);
/* Sets the bit, returns whether it was set before. */
int bitmap_test_and_set(uint64_t *words, uint64_t bit);
/* Clears the bit, returns whether it was set before. */
int bitmap_test_and_clear(uint64_t *words, uint64_t bit);
/* Sets the bits of [start, end), which lie in one word; returns those that were clear, at their places in it. */
uint64_t bitmap_set_in_word(uint64_t *words, uint64_t start, uint64_t end);
void bitmap_set_range(uint64_t *words, uint64_t start, uint64_t end);
void bitmap_clear_range(uint64_t *words, uint64_t start, uint64_t end);
/* How many bits of [start, end) are set. */
uint64_t bitmap_count(const uint64_t *words, uint64_t start, uint64_t end);
/* The first clear (set) bit in [start, end), or end. */
uint64_t bitmap_next_clear(const uint64_t *words, uint64_t start, uint64_t end);
uint64_t bitmap_next_set(const uint64_t *words, uint64_t start, uint64_t end);
/* Bytes that n bits need, rounded up to whole words. */
uint64_t bitmap_bytes(uint64_t bits);
/* A zeroed bitmap of its own that costs memory only where it is touched. */
int bitmap_new(uint64_t **wordsp, uint64_t bits);
void bitmap_free(uint64_t *words, uint64_t bits);

#endif
