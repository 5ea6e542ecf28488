/* touch: a helper in plain C, without Python: touches pages of a block, in order or at random, and checksums them.
 *
 * The smallest complete user of helper.h. It also measures how long the touch of a page that was not received took,
 * which is what post-copy costs a program. Prints one JSON object as its last line. Knows nothing of the wire.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <getopt.h>
#include <glob.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include "helper.h"

enum {
    LATENCY_BUCKETS = 32,       /* bucket i counts touches of [2^(i-1), 2^i) us; bucket 0: under 1 us */
    ATTACH_TIMEOUT_MS = 10000,
    LOOK_AGAIN_MS = 20,         /* between two tries while no coordinator listens */
    COUNT_DEFAULT = 1000,       /* of --pattern random; a scan touches every page */
};

struct options {
    const char *name, *socket_path, *block;
    int is_random, latency, waits;
    uint64_t count, seed;
    int64_t attach_timeout_ms;
};

struct result {
    uint32_t crc;
    uint64_t bytes, n_latencies;
    double *latency_us; /* of each touch of a page that was not received */
    double first_result_s, total_s;
};

static uint32_t crc_table[256];

/* The crc32 of zlib and Ethernet: reflected, polynomial 0xEDB88320. */
static void crc32_init(void)
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t crc = i;
        for (int bit = 0; bit < 8; bit++)
            crc = crc & 1 ? crc >> 1 ^ 0xEDB88320u : crc >> 1;
        crc_table[i] = crc;
    }
}

static uint32_t crc32_add(uint32_t crc, const uint8_t *bytes, uint64_t n)
{
    crc = ~crc;
    for (uint64_t i = 0; i < n; i++)
        crc = crc >> 8 ^ crc_table[(crc ^ bytes[i]) & 0xff];
    return ~crc;
}

/* The index-th number of the sequence that seed starts; the Python helpers compute the same one. */
static uint64_t splitmix64(uint64_t seed, uint64_t index)
{
    uint64_t z = seed + (index + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static int compare_doubles(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* One page: waits for it if it is not here, notes for how long, and checksums it. */
static void touch_page(struct result *result, struct pcshare_attachment *a, const struct pcshare_info *info,
                       uint64_t page)
{
    const uint8_t *bytes = (const uint8_t *)pcshare_data(a) + page * info->page_size;
    uint64_t offset = page * info->page_size;
    uint64_t length = info->used_length - offset < info->page_size ? info->used_length - offset : info->page_size;
    if (!pcshare_is_received(a, offset, length)) {
        double start_s = now_s();
        (void)*(const volatile uint8_t *)bytes;
        result->latency_us[result->n_latencies++] = (now_s() - start_s) * 1e6;
    }
    result->crc = crc32_add(result->crc, bytes, length);
    result->bytes += length;
}

static int touch_all(struct result *result, struct pcshare_attachment *a, const struct options *options,
                     double start_s)
{
    struct pcshare_info info;
    pcshare_get_info(a, &info);
    uint64_t page_count = info.map_length / info.page_size;
    uint64_t count = options->count ? options->count : options->is_random ? COUNT_DEFAULT : page_count;
    if (!options->is_random && count > page_count)
        count = page_count;
    result->latency_us = calloc(count + 1, sizeof *result->latency_us);
    if (!result->latency_us)
        return -ENOMEM;
    for (uint64_t i = 0; i < count && page_count; i++) {
        touch_page(result, a, &info, options->is_random ? splitmix64(options->seed, i) % page_count : i);
        if (i == 0)
            result->first_result_s = now_s() - start_s;
    }
    return 0;
}

static int say_path(char *path, size_t size, const char *format, const char *directory, const char *name)
{
    return snprintf(path, size, format, directory, name) < (int)size ? 0 : -ENAMETOOLONG;
}

/* NAME.sock in the directory that is this user's alone. */
static int own_socket(char *path, size_t size, const char *name)
{
    const char *runtime = getenv("XDG_RUNTIME_DIR");
    char uid[16];
    snprintf(uid, sizeof uid, "%u", (unsigned)geteuid());
    if (runtime && *runtime == '/')
        return say_path(path, size, "%s/pcshare/%s.sock", runtime, name);
    if (!say_path(path, size, "/run/user/%s%s", uid, "") && !access(path, F_OK))
        return say_path(path, size, "/run/user/%s/pcshare/%s.sock", uid, name);
    return say_path(path, size, "/tmp/pcshare-%s/%s.sock", uid, name);
}

/* In a folder that root made for the user who serves. */
static int served_socket(char *path, size_t size, const char *name)
{
    char pattern[128];
    glob_t found;
    int rc = say_path(pattern, sizeof pattern, "%s%s.sock", "/run/pcshare/*/", name);
    if (!rc && glob(pattern, 0, NULL, &found))
        return -ENOENT;
    if (!rc) {
        rc = say_path(path, size, "%s%s", found.gl_pathv[0], "");
        globfree(&found);
    }
    return rc;
}

/* --socket; else NAME.sock, here or where coordinators that serve other users put it; else $PCSHARE_SOCKET. */
static int find_socket(char *path, size_t size, const struct options *options)
{
    const char *socket_path = options->socket_path;
    if (!socket_path && !options->name && !(socket_path = getenv("PCSHARE_SOCKET")))
        return -EDESTADDRREQ;
    if (socket_path)
        return say_path(path, size, "%s%s", socket_path, "");
    int rc = own_socket(path, size, options->name);
    if (rc || !access(path, F_OK))
        return rc;
    if (!say_path(path, size, "%s%s.sock", "/run/pcshare/", options->name) && !access(path, F_OK))
        return 0;
    if (!served_socket(path, size, options->name))
        return 0;
    return own_socket(path, size, options->name);
}

/* Nobody is there yet, or was on its way out, or another one took its place between two messages. */
static int is_worth_another_try(int rc)
{
    return rc == -ENOENT || rc == -ECONNREFUSED || rc == -ECONNRESET || rc == -EAGAIN || rc == -ESTALE;
}

/* Attaches; waits for the coordinator if it is not there yet, or has nothing or no room yet. */
static int attach(struct pcshare_attachment **ap, const char *socket_path, const struct options *options)
{
    double deadline_s = now_s() + (double)options->attach_timeout_ms / 1e3;
    const struct timespec nap = {.tv_nsec = LOOK_AGAIN_MS * 1000000L};
    int rc;

    while (is_worth_another_try(
        rc = pcshare_attach(ap, socket_path, options->block, 0, options->attach_timeout_ms, NULL, 0))) {
        if (now_s() > deadline_s)
            return rc;
        nanosleep(&nap, NULL);
    }
    return rc;
}

/* For whoever started many of these and holds the other end of one pipe. */
static void wait_for_end_of_input(void)
{
    char bytes[64];
    ssize_t n;
    do
        n = read(STDIN_FILENO, bytes, sizeof bytes);
    while (n > 0 || (n < 0 && errno == EINTR));
}

static void print_latency(const struct result *result)
{
    uint64_t buckets[LATENCY_BUCKETS] = {0}, n = result->n_latencies;
    for (uint64_t i = 0; i < n; i++) {
        int bucket = 0;
        for (double us = result->latency_us[i]; us >= 1 && bucket < LATENCY_BUCKETS - 1; us /= 2)
            bucket++;
        buckets[bucket]++;
    }
    qsort(result->latency_us, n, sizeof *result->latency_us, compare_doubles);
    printf(", \"latency_us\": {\"count\": %llu", (unsigned long long)n);
    if (n)
        printf(", \"p50\": %.3f, \"p99\": %.3f, \"max\": %.3f", result->latency_us[n / 2],
               result->latency_us[n * 99 / 100], result->latency_us[n - 1]);
    printf(", \"buckets\": [");
    for (int i = 0; i < LATENCY_BUCKETS; i++)
        printf("%s%llu", i ? ", " : "", (unsigned long long)buckets[i]);
    printf("]}");
}

static void print_result(const struct result *result, const struct options *options)
{
    printf("{\"helper\": \"touch\", \"ok\": true, \"result\": \"%08x\", \"first_result_s\": %.9f, \"total_s\": %.9f, "
           "\"bytes_checked\": %llu, \"seed\": %llu, \"pattern\": \"%s\", \"missing_pages\": %llu",
           result->crc, result->first_result_s, result->total_s, (unsigned long long)result->bytes,
           (unsigned long long)options->seed, options->is_random ? "random" : "scan",
           (unsigned long long)result->n_latencies);
    if (options->latency)
        print_latency(result);
    printf("}\n");
}

static int usage(FILE *to, int exit_code)
{
    fprintf(to, "usage: touch [--name NAME | --socket PATH] [--block BLOCK] [--pattern scan|random] [--count N]\n"
                "             [--seed S] [--attach-timeout S] [--latency] [--wait]\n"
                "Touches pages of a block and prints the crc32 over them, in the order they were touched, as JSON.\n"
                "--latency adds how long touches of pages that were not received took, in microseconds.\n"
                "--wait attaches, then waits for the end of its standard input: many of them begin at one moment.\n");
    return exit_code;
}

static int parse(struct options *options, int argc, char **argv)
{
    static const struct option names[] = {
        {"name", required_argument, NULL, 'n'},    {"socket", required_argument, NULL, 'S'},
        {"block", required_argument, NULL, 'b'},   {"pattern", required_argument, NULL, 'p'},
        {"count", required_argument, NULL, 'c'},   {"seed", required_argument, NULL, 's'},
        {"latency", no_argument, NULL, 'l'},       {"attach-timeout", required_argument, NULL, 't'},
        {"wait", no_argument, NULL, 'w'},          {"help", no_argument, NULL, 'h'},
        {NULL, 0, NULL, 0},
    };
    for (int c; (c = getopt_long(argc, argv, "", names, NULL)) != -1;) {
        switch (c) {
        case 'n': options->name = optarg; break;
        case 'S': options->socket_path = optarg; break;
        case 'b': options->block = optarg; break;
        case 'p': options->is_random = !strcmp(optarg, "random"); break;
        case 'c': options->count = strtoull(optarg, NULL, 0); break;
        case 's': options->seed = strtoull(optarg, NULL, 0); break;
        case 't': options->attach_timeout_ms = (int64_t)(strtod(optarg, NULL) * 1e3); break;
        case 'l': options->latency = 1; break;
        case 'w': options->waits = 1; break;
        default: return c == 'h' ? 1 : -EINVAL;
        }
        if (c == 'p' && !options->is_random && strcmp(optarg, "scan"))
            return -EINVAL;
    }
    return optind == argc ? 0 : -EINVAL;
}

int main(int argc, char **argv)
{
    struct options options = {.seed = 1, .attach_timeout_ms = ATTACH_TIMEOUT_MS};
    struct result result = {0};
    struct pcshare_attachment *a = NULL;
    char socket_path[128];
    int rc = parse(&options, argc, argv);
    if (rc || find_socket(socket_path, sizeof socket_path, &options))
        return rc > 0 ? usage(stdout, 0) : usage(stderr, 2);
    crc32_init();
    double start_s = now_s();
    rc = attach(&a, socket_path, &options);
    if (!rc && options.waits)
        wait_for_end_of_input();
    if (!rc)
        rc = touch_all(&result, a, &options, start_s);
    result.total_s = now_s() - start_s;
    if (rc) {
        fprintf(stderr, "touch: %s\n", a ? strerror(-rc) : pcshare_error_text());
        printf("{\"helper\": \"touch\", \"ok\": false, \"result\": null, \"errno\": %d}\n", -rc);
    } else {
        print_result(&result, &options);
    }
    if (a)
        pcshare_detach(a, 0);
    free(result.latency_us);
    return rc ? 1 : 0;
}
