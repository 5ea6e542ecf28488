/* thread: how the core starts its threads and reads its clock. Not part of what Python sees. */
#ifndef PCSHARE_THREAD_H
#define PCSHARE_THREAD_H

#include <pthread.h>
#include <stdint.h>

/* Starts a thread that takes no signals: those are for the threads of whoever embeds us. name: at most 15 bytes. */
int thread_new(pthread_t *threadp, const char *name, void *(*run)(void *), void *argument);
/* By a thread itself, where the kernel takes it: what it does can wait for whoever waits in a fault. */
void thread_step_back(void);
/* By a thread itself, where the kernel takes it: it works for microseconds and should then run at once, and wake from a
 * sleep when its time is over. */
void thread_be_prompt(void);
/* CLOCK_MONOTONIC in nanoseconds. */
uint64_t clock_ns(void);

#endif
