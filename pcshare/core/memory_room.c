/* memory_room: see memory_room.h. Looks are rare: what a look found is taken by halves before the next. */
#define _GNU_SOURCE
#include "memory_room.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { STAT_BYTES_MAX = 16 << 10, NUMBER_BYTES_MAX = 32, LINE_BYTES_MAX = PATH_MAX + 64 };

/* How one version of control groups names things. */
struct naming {
    const char *root, *limit, *usage, *files[2];
};
static const struct naming version_1 = {.root = "/sys/fs/cgroup/memory",
                                        .limit = "memory.limit_in_bytes",
                                        .usage = "memory.usage_in_bytes",
                                        .files = {"\ntotal_inactive_file ", "\ntotal_active_file "}};
static const struct naming version_2 = {.root = "/sys/fs/cgroup",
                                        .limit = "memory.max",
                                        .usage = "memory.current",
                                        .files = {"\ninactive_file ", "\nactive_file "}};

struct group {
    const struct naming *naming;
    int limit_fd;
    int usage_fd;
    int stat_fd;
};

static struct group groups[MEMORY_ROOM_LEVELS_MAX];
static uint32_t n_groups;
static uint32_t n_users;
static int64_t unchecked_bytes; /* may be taken before the next look */
static pthread_mutex_t look_lock = PTHREAD_MUTEX_INITIALIZER;

/* ---- one group ---- */

static int read_text(int fd, char *text, size_t size)
{
    ssize_t n = pread(fd, text, size - 1, 0);

    text[n > 0 ? n : 0] = '\0';
    return n > 0 ? 0 : -EIO;
}

/* "max" and what cannot be read: no limit. */
static uint64_t read_number(int fd)
{
    char text[NUMBER_BYTES_MAX], *end;

    if (read_text(fd, text, sizeof(text)) < 0)
        return UINT64_MAX;
    uint64_t number = strtoull(text, &end, 10);
    return end == text ? UINT64_MAX : number;
}

static uint64_t bytes_of_files(const struct group *group)
{
    static char text[STAT_BYTES_MAX]; /* under look_lock */
    uint64_t sum = 0;

    text[0] = '\n';
    if (read_text(group->stat_fd, text + 1, sizeof(text) - 1) < 0)
        return 0;
    for (int i = 0; i < 2; i++) {
        const char *at = strstr(text, group->naming->files[i]);
        sum += at ? strtoull(at + strlen(group->naming->files[i]), NULL, 10) : 0;
    }
    return sum;
}

static uint64_t room_of(const struct group *group)
{
    uint64_t limit = read_number(group->limit_fd);

    if (limit >= INT64_MAX / 2) /* version 1 says "none" by a number near the largest */
        return INT64_MAX;
    uint64_t usage = read_number(group->usage_fd), files = bytes_of_files(group);
    uint64_t margin = limit / MEMORY_ROOM_MARGIN_PART;
    if (margin > MEMORY_ROOM_MARGIN_BYTES)
        margin = MEMORY_ROOM_MARGIN_BYTES;
    uint64_t used = (usage > files ? usage - files : 0) + margin;
    return used < limit ? limit - used : 0;
}

/* ---- which groups ---- */

static int open_in(const char *folder, const char *name)
{
    char path[LINE_BYTES_MAX];

    if (snprintf(path, sizeof(path), "%s/%s", folder, name) >= (int)sizeof(path))
        return -1;
    return open(path, O_RDONLY | O_CLOEXEC);
}

static void close_group(struct group *group)
{
    int fds[] = {group->limit_fd, group->usage_fd, group->stat_fd};

    for (size_t i = 0; i < sizeof(fds) / sizeof(*fds); i++)
        if (fds[i] >= 0)
            close(fds[i]);
}

/* The topmost group has no files of its own; so has one that only passes memory on. */
static void add_group(const struct naming *naming, const char *folder)
{
    struct group *group = &groups[n_groups];

    *group = (struct group){.naming = naming,
                            .limit_fd = open_in(folder, naming->limit),
                            .usage_fd = open_in(folder, naming->usage),
                            .stat_fd = open_in(folder, "memory.stat")};
    if (group->limit_fd < 0 || group->usage_fd < 0 || group->stat_fd < 0)
        close_group(group);
    else
        n_groups++;
}

/* The group at that place and all that it lies in. */
static void add_groups(const struct naming *naming, const char *place)
{
    char folder[LINE_BYTES_MAX];
    size_t root_length = strlen(naming->root);

    if (snprintf(folder, sizeof(folder), "%s%s", naming->root, strcmp(place, "/") ? place : "") >= (int)sizeof(folder))
        return;
    while (n_groups < MEMORY_ROOM_LEVELS_MAX) {
        add_group(naming, folder);
        if (strlen(folder) <= root_length)
            return;
        *strrchr(folder, '/') = '\0';
    }
}

/* Lines of /proc/self/cgroup: NUMBER:CONTROLLERS:PLACE; version 2 has the number 0 and no controllers. */
static void add_groups_of_line(char *line)
{
    char *controllers = strchr(line, ':'), *place = controllers ? strchr(controllers + 1, ':') : NULL;

    if (!place)
        return;
    *controllers++ = *place++ = '\0';
    place[strcspn(place, "\n")] = '\0';
    if (strcmp(controllers, "memory") == 0)
        add_groups(&version_1, place);
    else if (strcmp(line, "0") == 0 && !controllers[0])
        add_groups(&version_2, place);
}

void memory_room_get(void)
{
    char line[LINE_BYTES_MAX];

    pthread_mutex_lock(&look_lock);
    FILE *file = n_users++ ? NULL : fopen("/proc/self/cgroup", "re");
    while (file && fgets(line, sizeof(line), file))
        add_groups_of_line(line);
    if (file)
        fclose(file);
    pthread_mutex_unlock(&look_lock);
}

void memory_room_put(void)
{
    pthread_mutex_lock(&look_lock);
    if (--n_users == 0)
        while (n_groups)
            close_group(&groups[--n_groups]);
    pthread_mutex_unlock(&look_lock);
}

/* ---- taking ---- */

static uint64_t least_room(void)
{
    uint64_t least = INT64_MAX;

    for (uint32_t i = 0; i < n_groups; i++) {
        uint64_t room = room_of(&groups[i]);
        least = room < least ? room : least;
    }
    return least;
}

static int try_take(uint64_t length)
{
    if (__atomic_sub_fetch(&unchecked_bytes, (int64_t)length, __ATOMIC_RELAXED) >= 0)
        return 1;
    __atomic_add_fetch(&unchecked_bytes, (int64_t)length, __ATOMIC_RELAXED);
    return 0;
}

int memory_room_take(uint64_t length)
{
    int rc = 0;

    if (!n_groups || try_take(length))
        return 0;
    pthread_mutex_lock(&look_lock);
    if (!try_take(length)) { /* nobody has looked meanwhile */
        uint64_t room = least_room(), half = room / 2;

        if (half > MEMORY_ROOM_UNCHECKED_BYTES)
            half = MEMORY_ROOM_UNCHECKED_BYTES;
        rc = room < length ? -ENOMEM : 0;
        if (rc == 0)
            __atomic_store_n(&unchecked_bytes, half > length ? (int64_t)(half - length) : 0, __ATOMIC_RELAXED);
    }
    pthread_mutex_unlock(&look_lock);
    return rc;
}
