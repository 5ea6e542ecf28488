/* thread: see thread.h. */
#define _GNU_SOURCE
#include "thread.h"

#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* A quarter of a CPU beside one busy thread: enough to go on, and whoever wakes for a fault goes first. */
enum { STEP_BACK_NICE = 5 };
static const uint64_t prompt_slice_ns = 100000;       /* the shortest that the kernel takes */
static const unsigned long prompt_timer_slack_ns = 1; /* of an ordinary thread 50,000 */

/* struct sched_attr, which older system headers lack. */
struct scheduling {
    uint32_t size;
    uint32_t policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime_ns; /* of an ordinary thread: its slice, Linux 6.12 and later */
    uint64_t deadline_ns;
    uint64_t period_ns;
};

int thread_new(pthread_t *threadp, const char *name, void *(*run)(void *), void *argument)
{
    sigset_t all, before;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* the new thread inherits it */
    int rc = pthread_create(threadp, NULL, run, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (rc == 0)
        pthread_setname_np(*threadp, name);
    return -rc;
}

void thread_step_back(void)
{
    id_t self = (id_t)syscall(SYS_gettid);

    (void)setpriority(PRIO_PROCESS, self, getpriority(PRIO_PROCESS, self) + STEP_BACK_NICE);
}

/* All else stays as it was: a policy that an administrator chose is not ours to change. */
void thread_be_prompt(void)
{
    struct scheduling scheduling = {.size = sizeof(scheduling)};

    (void)prctl(PR_SET_TIMERSLACK, prompt_timer_slack_ns);
    if (syscall(SYS_sched_getattr, 0, &scheduling, sizeof(scheduling), 0) < 0 || scheduling.policy != SCHED_OTHER)
        return;
    scheduling.runtime_ns = prompt_slice_ns;
    (void)syscall(SYS_sched_setattr, 0, &scheduling, 0);
}

uint64_t clock_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}
