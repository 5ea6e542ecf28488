/* late_waits: preloaded, it makes the main thread linger before it waits for another thread. A signal that comes
 * meanwhile has been looked for before, and ends no wait. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <semaphore.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static const struct timespec lingering = {.tv_nsec = 300 * 1000000};

static void *real(const char *name)
{
    if (syscall(SYS_gettid) == getpid())
        nanosleep(&lingering, NULL);
    return dlsym(RTLD_NEXT, name);
}

int sem_wait(sem_t *sem)
{
    int (*wait)(sem_t *) = (int (*)(sem_t *))real("sem_wait");

    return wait(sem);
}

int sem_timedwait(sem_t *sem, const struct timespec *deadline)
{
    int (*wait)(sem_t *, const struct timespec *) = (int (*)(sem_t *, const struct timespec *))real("sem_timedwait");

    return wait(sem, deadline);
}

int sem_clockwait(sem_t *sem, clockid_t clock, const struct timespec *deadline)
{
    int (*wait)(sem_t *, clockid_t, const struct timespec *) =
        (int (*)(sem_t *, clockid_t, const struct timespec *))real("sem_clockwait");

    return wait(sem, clock, deadline);
}
