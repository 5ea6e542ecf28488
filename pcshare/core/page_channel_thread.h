/* page_channel_thread: how the page channels start their threads. Not part of what Python sees.
 */
#ifndef PCSHARE_PAGE_CHANNEL_THREAD_H
#define PCSHARE_PAGE_CHANNEL_THREAD_H

#include <pthread.h>

/* Starts a thread that takes no signals: those are for the threads of whoever embeds us. name: at most 15 bytes. */
int page_channel_thread_new(pthread_t *threadp, const char *name, void *(*run)(void *), void *argument);

#endif
