/* fault_home: on which CPU a helper runs, and which fault thread should therefore answer it; and who takes the answers
 * of a source that is asked over a socket.
 *
 * The fault thread on the CPU that faulted answers in half the time, because it and the helper wake each other without
 * an interrupt to another CPU; and waking the others as well costs again. So as long as a helper's faults come from one
 * CPU that has a fault thread, that one alone polls its uffd; else a few do. Beside a crowd (fault_crowd.c) nobody has
 * a home: it fills the run queue of a CPU, and the fault thread there comes too late. What is not polled for is never
 * lost: polling is level-triggered, and the new home polls before the others stop.
 *
 * The scheduler may put whom a fault thread wakes on an idle CPU. Where that one must be interrupted in its sleep, and
 * only there it matters, the wake-up takes several times as long as one on this CPU: then the fault thread looks at
 * once where the helper went, and is done before it faults again. Were this CPU to sleep now, the next wake-up would
 * put it back here. So the fault thread stays awake, as long as the helper faults, a few milliseconds at most. Where a
 * helper goes on in spite of that it is followed more and more seldom.
 *
 * Likewise with a channel: as long as one helper faults, and one fault thread does all the asking, it alone takes the
 * answers. Another one would be woken on the CPU of the server, in the middle of its answer, and take it to the wrong
 * CPU. Beside others nobody is to wait for one that answers somebody else.
 */
#include "fault_internal.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "thread.h"

enum {
    HOME_ANYWHERE = -1,
    HOME_ANYWHERE_THREADS = 4,      /* each fault of a helper without a home wakes them all */
    HOME_LOOK_NS = 100000000,       /* a look at /proc costs as much as two faults: seldom, */
    HOME_LOOK_SOON_NS = 1000000,    /* but soon where the helper may have moved, */
    HOME_AWAY_NS = 30000,           /* since it took so long from one fault to the next, */
    HOME_LOOK_BESIDE_NS = 10000000, /* less soon while others fault, for which it may have waited, */
    HOME_LOOK_FAULTS = 256,         /* and of one whose threads fault in turns, which may have no home */
    HOME_FAR_WAKE_NS = 3000,        /* a wake-up that took so long was one of another CPU, or a late one */
    HOME_PAUSE_NS = 100000,         /* after a look, at least: who becomes the home had slept, and is slow at first */
    HOME_STAY_NS = 1000000,         /* where a helper does not stay so long it was followed in vain, */
    HOME_IN_VAIN = 8,               /* and after so many times in a row later and later */
    HOME_AWAKE_NS = 4000000,        /* the CPU that it left stays awake for so long, */
    HOME_AWAKE_FAULT_NS = 200000,   /* if it faults as often */
    ASKED_IN_A_ROW = 16,            /* by one fault thread: then it is likely to ask next */
    HOME_STAT_FIELD = 39,           /* "processor" in proc(5): the CPU that a thread ran on last */
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

static int is_served(const struct fault_threads *ft, int32_t cpu)
{
    for (uint32_t i = 0; i < ft->n_workers; i++)
        if (ft->workers[i].cpu == cpu)
            return 1;
    return 0;
}

/* Threads of one helper on several CPUs have no home together. */
static int32_t home_for(const struct fault_threads *ft, const struct remote_fd *remote, uint32_t tid, int32_t cpu)
{
    if (cpu < 0 || !is_served(ft, cpu))
        return HOME_ANYWHERE;
    return tid == remote->home_tid || remote->home_tid == 0 || cpu == remote->home_cpu ? cpu : HOME_ANYWHERE;
}

int polls_anywhere(const struct fault_worker *worker)
{
    uint32_t n = worker->ft->n_workers, stride = (n + HOME_ANYWHERE_THREADS - 1) / HOME_ANYWHERE_THREADS;

    return stride <= 1 || worker->number % stride == 0;
}

static int polls_for(const struct fault_worker *worker, int32_t home)
{
    return home == HOME_ANYWHERE ? polls_anywhere(worker) : worker->cpu == home;
}

static void move_home(struct fault_threads *ft, struct remote_fd *remote, int32_t home)
{
    __atomic_store_n(&remote->home_cpu, home, __ATOMIC_RELAXED);
    for (int polls = 1; polls >= 0; polls--) /* who shall poll begins before the others stop */
        for (uint32_t i = 0; i < ft->n_workers; i++)
            if (polls_for(&ft->workers[i], home) == polls)
                change_polling(&ft->workers[i], remote, polls);
}

static int takes_answers(const struct fault_worker *worker, int32_t taker)
{
    return taker == TAKER_ANY ? polls_anywhere(worker) : taker == (int32_t)worker->number;
}

static void change_taker(struct fault_threads *ft, struct served_block *served, int32_t taker)
{
    if (__atomic_exchange_n(&served->taker_moves, 1, __ATOMIC_ACQUIRE))
        return;
    __atomic_store_n(&served->taker, taker, __ATOMIC_RELAXED);
    for (int polls = 1; polls >= 0; polls--)
        for (uint32_t i = 0; i < ft->n_workers; i++)
            if (polls_anywhere(&ft->workers[i]) && takes_answers(&ft->workers[i], taker) == polls)
                change_polling_channel(&ft->workers[i], served, polls);
    __atomic_store_n(&served->taker_moves, 0, __ATOMIC_RELEASE);
}

int home_note_asked(struct fault_worker *worker, struct served_block *served)
{
    int32_t taker = __atomic_load_n(&served->taker, __ATOMIC_RELAXED), wanted = TAKER_ANY;

    if (__atomic_exchange_n(&served->asked_last, worker->number, __ATOMIC_RELAXED) != worker->number)
        __atomic_store_n(&served->asked_in_a_row, 0, __ATOMIC_RELAXED);
    uint32_t in_a_row = __atomic_add_fetch(&served->asked_in_a_row, 1, __ATOMIC_RELAXED);
    if (in_a_row >= ASKED_IN_A_ROW && polls_anywhere(worker) && !is_beside_others(worker->ft, clock_ns()))
        wanted = (int32_t)worker->number;
    if (wanted != taker)
        change_taker(worker->ft, served, wanted);
    return takes_answers(worker, __atomic_load_n(&served->taker, __ATOMIC_RELAXED));
}

void home_poll_again(struct fault_worker *worker, struct remote_fd *remote)
{
    int is_mine = !__atomic_exchange_n(&remote->home_moves, 1, __ATOMIC_ACQUIRE);
    int polls = !is_mine || polls_for(worker, remote->home_cpu); /* while another moves it: rather twice than never */

    change_polling(worker, remote, polls);
    if (is_mine)
        __atomic_store_n(&remote->home_moves, 0, __ATOMIC_RELEASE);
}

/* Somebody holds home_moves. Whether the helper has moved. */
static int look(struct fault_threads *ft, struct remote_fd *remote, uint32_t tid, uint64_t now_ns)
{
    int knows = tid && !has_crowd(ft, now_ns);
    int32_t home = knows ? home_for(ft, remote, tid, cpu_of(remote->status->pid, tid)) : HOME_ANYWHERE;
    uint64_t far_ns = __atomic_exchange_n(&remote->home_far_ns, 0, __ATOMIC_RELAXED);
    int has_moved = home != remote->home_cpu;

    __atomic_store_n(&remote->home_tid, tid, __ATOMIC_RELAXED);
    __atomic_store_n(&remote->home_look_ns, now_ns, __ATOMIC_RELAXED);
    if (has_moved) {
        int has_stayed = (far_ns ? far_ns : now_ns) - remote->home_since_ns > HOME_STAY_NS;
        __atomic_store_n(&remote->home_in_vain, has_stayed ? 0 : remote->home_in_vain + 1, __ATOMIC_RELAXED);
        remote->home_since_ns = now_ns;
        move_home(ft, remote, home);
    }
    __atomic_store_n(&remote->home_fault_ns, clock_ns(), __ATOMIC_RELAXED); /* a look is no pause of the helper's */
    return has_moved;
}

void home_note_fault(struct fault_threads *ft, struct remote_fd *remote, uint32_t tid)
{
    if (!remote->status) /* the coordinator's own */
        return;
    uint64_t now_ns = clock_ns();
    uint64_t since_ns = now_ns - __atomic_load_n(&remote->home_look_ns, __ATOMIC_RELAXED);
    uint64_t pause_ns = now_ns - __atomic_exchange_n(&remote->home_fault_ns, now_ns, __ATOMIC_RELAXED);
    int is_beside = is_beside_others(ft, now_ns);

    if (is_beside)
        crowd_note_fault(ft, remote, tid, now_ns);
    uint32_t faults = __atomic_add_fetch(&remote->home_faults, 1, __ATOMIC_RELAXED);
    int has_moved = since_ns > (is_beside ? HOME_LOOK_BESIDE_NS : HOME_LOOK_SOON_NS) && pause_ns > HOME_AWAY_NS;
    int has_threads = faults >= HOME_LOOK_FAULTS && tid != __atomic_load_n(&remote->home_tid, __ATOMIC_RELAXED);
    int must_leave = has_crowd(ft, now_ns) && __atomic_load_n(&remote->home_cpu, __ATOMIC_RELAXED) != HOME_ANYWHERE;
    int due = since_ns > HOME_LOOK_NS || has_moved || has_threads || must_leave;

    if (!due || __atomic_exchange_n(&remote->home_moves, 1, __ATOMIC_ACQUIRE))
        return;
    (void)look(ft, remote, tid, now_ns);
    if (!is_beside || has_threads || since_ns > HOME_LOOK_NS)
        __atomic_store_n(&remote->home_faults, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&remote->home_moves, 0, __ATOMIC_RELEASE);
}

int home_may_leave(const struct fault_worker *worker, const struct remote_fd *remote, uint32_t tid, uint64_t now_ns)
{
    int is_here = worker->cpu >= 0 && __atomic_load_n(&remote->home_cpu, __ATOMIC_RELAXED) == worker->cpu;

    return is_here && tid == __atomic_load_n(&remote->home_tid, __ATOMIC_RELAXED) &&
           !is_beside_others(worker->ft, now_ns);
}

static uint64_t pause_after(uint32_t in_vain)
{
    uint64_t pause_ns = HOME_PAUSE_NS;

    for (uint32_t i = HOME_IN_VAIN; i < in_vain && pause_ns < HOME_LOOK_NS; i++)
        pause_ns *= 2;
    return pause_ns;
}

void home_note_wake(struct fault_worker *worker, struct remote_fd *remote, uint64_t since_ns)
{
    uint64_t now_ns = clock_ns();
    uint64_t looked_ns = now_ns - __atomic_load_n(&remote->home_look_ns, __ATOMIC_RELAXED);

    worker->left_id = 0;
    if (now_ns - since_ns <= HOME_FAR_WAKE_NS)
        return;
    if (!__atomic_load_n(&remote->home_far_ns, __ATOMIC_RELAXED))
        __atomic_store_n(&remote->home_far_ns, now_ns, __ATOMIC_RELAXED);
    if (looked_ns > pause_after(__atomic_load_n(&remote->home_in_vain, __ATOMIC_RELAXED)))
        worker->left_id = remote->id;
}

static int is_elsewhere(const struct fault_worker *worker, const struct remote_fd *remote)
{
    int32_t home = __atomic_load_n(&remote->home_cpu, __ATOMIC_RELAXED);

    return home != HOME_ANYWHERE && home != worker->cpu;
}

struct remote_fd *home_follow(struct fault_worker *worker)
{
    struct remote_fd *remote = remote_by_id(worker->ft, worker->left_id);
    uint64_t now_ns = clock_ns();
    int has_left = 0;

    if (!remote)
        return NULL;
    if (!__atomic_exchange_n(&remote->home_moves, 1, __ATOMIC_ACQUIRE)) {
        if (home_may_leave(worker, remote, remote->home_tid, now_ns)) { /* nobody has looked meanwhile */
            if (!look(worker->ft, remote, remote->home_tid, now_ns))
                __atomic_add_fetch(&remote->home_in_vain, 1, __ATOMIC_RELAXED);
            has_left = is_elsewhere(worker, remote);
        }
        __atomic_store_n(&remote->home_moves, 0, __ATOMIC_RELEASE);
    }
    if (has_left)
        return remote;
    remote_fd_put(remote);
    return NULL;
}

int home_keeps_awake(const struct fault_worker *worker, const struct remote_fd *remote, uint64_t left_ns,
                     uint64_t now_ns)
{
    uint64_t fault_ns = __atomic_load_n(&remote->home_fault_ns, __ATOMIC_RELAXED);
    int faults = fault_ns > now_ns || now_ns - fault_ns < HOME_AWAKE_FAULT_NS;

    return now_ns - left_ns < HOME_AWAKE_NS && faults && is_elsewhere(worker, remote) &&
           !is_beside_others(worker->ft, now_ns);
}
