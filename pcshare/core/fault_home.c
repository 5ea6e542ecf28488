/* fault_home: on which CPU a helper runs, and which fault thread should therefore answer it.
 *
 * Every fault wakes the fault threads of all CPUs. The one on the CPU that faulted answers in half the time, because it
 * and the helper wake each other without an interrupt to another CPU; but one on a CPU that idles without sleeping is
 * often there first. So a thread that is not at home lets the one that is go first, for a few microseconds. Only a
 * hint: a fault is answered by whoever still finds it.
 */
#include "fault_internal.h"

#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "thread.h"

enum {
    HOME_LOOK_FAULTS =
        256, /* one look at /proc in so many faults: it costs as much as a fault, so less than 1 in 100 */
    HOME_GIVE_WAY_NS = 6000, /* from a fault to the read of its message by a thread on the same CPU: 3 to 4 us */
    HOME_STAT_FIELD = 39,    /* "processor" in proc(5): the CPU that a thread ran on last */
    HOME_STAT_BYTES = 1024,
};

/* Field n of a stat line counted behind the command's name, which is field 2 and may hold anything. */
static int stat_field(const char *line, int n)
{
    const char *at = strrchr(line, ')');

    for (int field = 2; at && field < n; field++)
        at = strchr(at + 1, ' ');
    return at ? atoi(at + 1) : -1;
}

static int cpu_of(uint32_t pid, uint32_t tid)
{
    char path[64], line[HOME_STAT_BYTES];

    snprintf(path, sizeof(path), "/proc/%u/task/%u/stat", pid, tid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -1; /* another pid namespace, or gone */
    ssize_t got = read(fd, line, sizeof(line) - 1);
    close(fd);
    if (got <= 0)
        return -1;
    line[got] = '\0';
    return stat_field(line, HOME_STAT_FIELD);
}

void home_note_fault(struct remote_fd *remote, uint32_t tid)
{
    uint32_t faults = __atomic_fetch_add(&remote->home_faults, 1, __ATOMIC_RELAXED);

    if (faults % HOME_LOOK_FAULTS == 0 && remote->status && tid)
        __atomic_store_n(&remote->home_cpu, cpu_of(remote->status->pid, tid), __ATOMIC_RELAXED);
}

static int is_served_at_home(const struct fault_threads *ft, int32_t cpu)
{
    for (uint32_t i = 0; i < ft->n_workers; i++)
        if (ft->workers[i].cpu == cpu)
            return 1;
    return 0;
}

int home_gives_way(const struct fault_worker *worker, const struct remote_fd *remote)
{
    int32_t home = __atomic_load_n(&remote->home_cpu, __ATOMIC_RELAXED);
    struct pollfd polled = {.fd = remote->uffd, .events = POLLIN};

    if (home < 0 || worker->cpu < 0 || home == worker->cpu || !is_served_at_home(worker->ft, home))
        return 0;
    for (uint64_t until_ns = clock_ns() + HOME_GIVE_WAY_NS; clock_ns() < until_ns;)
        if (poll(&polled, 1, 0) == 0)
            return 1;
    return 0;
}
