/* wake_cost: what it costs on this machine to wake a thread that sleeps on a CPU. Measures; decides nothing.
 *
 * On a virtual machine waking a CPU that has gone to sleep takes tens of microseconds, several times as long as all
 * else that a fault costs; on bare metal little more than waking a thread on one's own CPU.
 */
#ifndef PCSHARE_WAKE_COST_H
#define PCSHARE_WAKE_COST_H

#include <stdint.h>

enum { WAKE_COST_ROUNDS_MAX = 1000 };

/* One thread on each of the two CPUs (which may be one), asleep until the other one wakes it, so many times there and
 * back: the median of one wake, ns. Takes about rounds times 2 wakes. -EINVAL: the CPU is not ours to use, or rounds.
 */
int wake_cost_measure(int32_t cpu_a, int32_t cpu_b, uint32_t rounds, uint64_t *nsp);

#endif
