/* handover: what is wrong with the uffd and its maps. Refused at ATTACH, or cut off at the first fault that tells. */
#ifndef PCSHARE_HOSTILE_HANDOVER_H
#define PCSHARE_HOSTILE_HANDOVER_H

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>
#include "uffd.h"
#include "scene.h"

enum {
    EXTRA_FDS_MAX = 32,
    QUEUED_TRIES = 8,  /* several fault threads read what waits, in turns */
    ADDRESS_BITS = 47, /* of an address space that every kernel grants */
};

/* A hand-over that is right up to ATTACH, then this ATTACH with these fds. */
static int try_attach(struct scene *s, struct raw *r, const struct wire_attach *attach, const int *fds, uint32_t n_fds,
                      const char *what)
{
    raw_send(r->control, attach, sizeof *attach, fds, n_fds);
    TRY(scene_expect_refusal(s, r, what));
    close(r->control);
    close(r->uffd);
    return 0;
}

static int hostile_no_fd(struct scene *s)
{
    struct raw r;
    TRY(scene_map(s, &r));
    struct wire_attach attach = raw_attach_message(&r);
    TRY(try_attach(s, &r, &attach, NULL, 0, "ATTACH without an fd"));
    TRY(scene_others_go_on(s));
    return WELL;
}

static int extra_fds_on_hello(struct scene *s, const int *fds)
{
    struct wire_hello hello = raw_hello_message(s->idstr, s->mode);
    struct raw r;
    TRY(scene_connect(s, &r));
    int rc = raw_send(r.control, &hello, sizeof hello, fds, 1);
    s->attempts++;
    if (rc != -EPERM) /* refused to the sender at once, where the kernel can */
        TRY(scene_expect_refusal(s, &r, "HELLO with an fd"));
    return close(r.control);
}

/* Once attached: cut off, or the fds are thrown away and it is answered; the test counts the coordinator's fds. */
static int extra_fds_on_request(struct scene *s, const int *fds)
{
    struct raw r;
    struct wire_request request = {.header = raw_header(WIRE_REQUEST, sizeof request), .length = 1};
    TRY(scene_join(s, &r));
    raw_send(r.control, &request, sizeof request, fds, WIRE_FDS_MAX);
    int rc = raw_ensure(&r, 0, 1);
    s->attempts++;
    if (rc && rc != -ECONNRESET && rc != -EPIPE && rc != -EPROTO)
        return scene_end(s, HARM, "harm", "REQUEST with fds: %s", strerror(-rc));
    return close(r.control);
}

static int hostile_extra_fds(struct scene *s)
{
    int fds[EXTRA_FDS_MAX];
    for (int i = 0; i < EXTRA_FDS_MAX; i++)
        fds[i] = eventfd(0, EFD_CLOEXEC);
    TRY(extra_fds_on_hello(s, fds));
    TRY(extra_fds_on_request(s, fds));
    for (uint32_t n_fds = 2; n_fds <= EXTRA_FDS_MAX; n_fds *= 2) {
        struct raw r;
        TRY(scene_map(s, &r));
        struct wire_attach attach = raw_attach_message(&r);
        fds[0] = r.uffd;
        TRY(try_attach(s, &r, &attach, fds, n_fds, "ATTACH with more than one fd"));
    }
    TRY(scene_others_go_on(s));
    return WELL;
}

static int hostile_not_a_uffd(struct scene *s)
{
    int pipe_fds[2], kinds[5];
    if (pipe2(pipe_fds, O_CLOEXEC))
        return scene_end(s, CANNOT, "cannot", "pipe2");
    kinds[0] = pipe_fds[0];
    kinds[1] = eventfd(0, EFD_CLOEXEC);
    kinds[2] = open("/dev/zero", O_RDONLY | O_CLOEXEC);
    kinds[3] = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    kinds[4] = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds + 2; i++) {
        struct raw r;
        TRY(scene_map(s, &r));
        struct wire_attach attach = raw_attach_message(&r);
        int fd = i < 5 ? kinds[i] : i == 5 ? r.memfd : r.control;
        if (fd >= 0)
            TRY(try_attach(s, &r, &attach, &fd, 1, "an fd that is no uffd"));
    }
    TRY(scene_others_go_on(s));
    return WELL;
}

static int hostile_uffd_no_handshake(struct scene *s)
{
    struct raw r;
    int user_mode_only;
    TRY(scene_map(s, &r));
    struct wire_attach attach = raw_attach_message(&r);
    int uffd = uffd_open(r.device_fd, &user_mode_only);
    TRY(try_attach(s, &r, &attach, &uffd, 1, "a uffd before its handshake"));
    TRY(scene_others_go_on(s));
    return WELL;
}

static int hostile_uffd_with_events(struct scene *s)
{
    const uint64_t events[] = {UFFD_FEATURE_BIT_EVENT_FORK, UFFD_FEATURE_BIT_EVENT_REMAP, UFFD_FEATURE_BIT_EVENT_REMOVE,
                               UFFD_FEATURE_BIT_EVENT_UNMAP, UFFD_FEATURE_BIT_SIGBUS};
    for (size_t i = 0; i < sizeof events / sizeof *events; i++) {
        struct raw r;
        TRY(scene_hello(s, &r));
        int rc = raw_map(&r);
        if (!rc && raw_open_uffd(&r, r.welcome.features | events[i]))
            continue; /* FORK wants a capability */
        if (!rc)
            rc = raw_register(&r);
        if (rc)
            return scene_end(s, CANNOT, "cannot", "uffd: %s", strerror(-rc));
        struct wire_attach attach = raw_attach_message(&r);
        TRY(try_attach(s, &r, &attach, &r.uffd, 1, "a uffd with other features than WELCOME asked for"));
    }
    TRY(scene_others_go_on(s));
    return WELL;
}

/* Each of these maps, alone, in an ATTACH that is else right. offset and length are added to the right ones. */
static int try_maps(struct scene *s, const struct wire_map *wrong, size_t n, const char *what)
{
    for (size_t i = 0; i < n; i++) {
        struct raw r;
        TRY(scene_map(s, &r));
        struct wire_attach attach = raw_attach_message(&r);
        attach.maps[0].client_addr += wrong[i].client_addr;
        attach.maps[0].offset += wrong[i].offset;
        attach.maps[0].length += wrong[i].length;
        TRY(try_attach(s, &r, &attach, &r.uffd, 1, what));
    }
    TRY(scene_others_go_on(s));
    return WELL;
}

static int hostile_outside_offsets(struct scene *s)
{
    const struct wire_map wrong[] = {
        {.offset = 1 << 21},                     /* right length, so the end is behind the block's */
        {.length = 1 << 21},                     /* longer than the block */
        {.offset = 1, .length = (uint64_t)-1},   /* no page begins there */
        {.client_addr = 1},                      /* nor there */
        {.length = (uint64_t)-1},                /* not whole pages */
        {.offset = (uint64_t)-4096},             /* offset + length wraps around */
        {.client_addr = 1ull << 63},             /* the kernel's half */
    };
    return try_maps(s, wrong, sizeof wrong / sizeof *wrong, "a map outside the block");
}

static int hostile_maps_beyond(struct scene *s)
{
    const uint64_t end = 1ull << ADDRESS_BITS;
    struct raw r;
    TRY(scene_map(s, &r));
    const uint64_t starts[] = {end - r.welcome.map_length, end, 1ull << 50, (1ull << 56) - r.welcome.map_length};
    for (size_t i = 0; i < sizeof starts / sizeof *starts; i++) {
        TRY(scene_map(s, &r));
        struct wire_attach attach = raw_attach_message(&r);
        attach.maps[0].client_addr = starts[i];
        TRY(try_attach(s, &r, &attach, &r.uffd, 1, "a map at an address that no address space has"));
    }
    TRY(scene_others_go_on(s));
    return WELL;
}

static int hostile_zero_length_map(struct scene *s)
{
    struct raw r;
    TRY(scene_map(s, &r));
    const struct wire_map wrong[] = {{.length = -r.welcome.map_length}};
    return try_maps(s, wrong, 1, "a map of nothing");
}

static int hostile_overlapping_maps(struct scene *s)
{
    struct raw r;
    uint64_t page_size;
    TRY(scene_map(s, &r));
    page_size = r.welcome.page_size;
    struct wire_attach attach = raw_attach_message(&r);
    attach.n_maps = 2;
    attach.maps[1] = attach.maps[0];
    TRY(try_attach(s, &r, &attach, &r.uffd, 1, "the same map twice"));
    TRY(scene_map(s, &r));
    attach = raw_attach_message(&r);
    attach.n_maps = 2;
    attach.maps[0].length = 2 * page_size;
    attach.maps[1] = attach.maps[0];
    attach.maps[1].client_addr += page_size; /* one address, two pages of the block */
    TRY(try_attach(s, &r, &attach, &r.uffd, 1, "two maps of one address"));
    TRY(scene_others_go_on(s));
    return WELL;
}

static int hostile_too_many_maps(struct scene *s)
{
    const uint32_t counts[] = {0, WIRE_MAPS_MAX + 1, UINT32_MAX};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        struct raw r;
        TRY(scene_map(s, &r));
        struct wire_attach attach = raw_attach_message(&r);
        attach.n_maps = counts[i];
        TRY(try_attach(s, &r, &attach, &r.uffd, 1, "a count of maps that cannot be"));
    }
    TRY(scene_others_go_on(s));
    return WELL;
}

static int hostile_outside_addresses(struct scene *s)
{
    struct raw r, hidden;
    struct toucher t;
    uint64_t page;
    TRY(scene_map(s, &r));
    hidden = r;
    int rc = raw_map(&hidden);
    if (!rc)
        rc = raw_register(&hidden);
    if (!rc)
        rc = raw_attach(&r);
    if (rc)
        return scene_end(s, CANNOT, "cannot", "second mapping: %s", strerror(-rc));
    TRY(scene_missing_page(s, &r, &page));
    toucher_start(&t, hidden.data + page * r.welcome.page_size);
    TRY(scene_expect_refusal(s, &r, "a fault outside every map"));
    TRY(scene_others_go_on(s));
    return scene_end(s, WELL, "cut-off", "at its first fault outside every map; its thread waits");
}

/* A fault that nobody reads, on one of these pages, so that n wait: 0 or CANNOT. */
static int queue_fault(struct scene *s, const struct raw *r, struct toucher *t, uint64_t first, uint64_t n_pages,
                       unsigned n, uint64_t *pagep)
{
    for (int i = 0; i < QUEUED_TRIES; i++) {
        TRY(scene_missing_page_of(s, r, first, n_pages, pagep));
        toucher_start(t, r->data + *pagep * r->welcome.page_size);
        while (toucher_join(t, LOOK_AGAIN_MS)) /* it ends if somebody else has just brought the page */
            if (raw_pending(r) >= n)
                return 0;
    }
    return scene_end(s, CANNOT, "cannot", "no fault waits");
}

/* Its faults wait when it attaches: one outside the half that it names, and behind that one on a page that another
 * helper wants. The other must get the page whatever comes of this one. */
static int queue_and_attach(struct scene *s, const struct raw *other)
{
    static struct toucher outside, inside;
    struct raw r;
    uint64_t page, half = raw_status_block(other)->page_count / 2;
    TRY(scene_map(s, &r));
    TRY(queue_fault(s, &r, &outside, half, half, 1, &page));
    TRY(queue_fault(s, &r, &inside, 0, half, 2, &page));
    struct wire_attach attach = raw_attach_message(&r);
    attach.maps[0].length = half * r.welcome.page_size;
    raw_send(r.control, &attach, sizeof attach, &r.uffd, 1);
    TRY(scene_expect_cut_off(s, &r, "faults from before ATTACH, one outside its maps"));
    return scene_use_page(s, other, page);
}

static int hostile_faults_before_attach(struct scene *s)
{
    struct raw other;
    TRY(scene_join(s, &other));
    for (int i = 0; i < QUEUED_TRIES; i++)
        TRY(queue_and_attach(s, &other));
    TRY(scene_others_go_on(s));
    return WELL;
}

static int hostile_foreign_uffd(struct scene *s)
{
    struct raw r, second;
    TRY(scene_join(s, &r));
    TRY(scene_hello(s, &second));
    struct wire_attach attach = raw_attach_message(&r);
    raw_send(second.control, &attach, sizeof attach, &r.uffd, 1);
    TRY(scene_expect_refusal(s, &second, "a uffd that is served already"));
    TRY(scene_use(s, &r, OTHERS_PAGES)); /* the first connection has not suffered */
    TRY(scene_others_go_on(s));
    return WELL;
}

static struct raw lent;

static int hand_over(struct scene *s)
{
    (void)s;
    return raw_attach(&lent) ? CANNOT : WELL;
}

/* The uffd is the parent's, the credentials and the death are the child's. The parent's fault must not read zeros. */
static int hostile_lent_uffd(struct scene *s)
{
    struct toucher t;
    uint64_t page;
    TRY(scene_map(s, &lent));
    if (scene_wait(scene_spawn(s, hand_over), 0))
        return scene_end(s, CANNOT, "cannot", "the child could not attach");
    close(lent.control);
    TRY(scene_missing_page(s, &lent, &page));
    const uint8_t *bytes = lent.data + page * lent.welcome.page_size;
    toucher_start(&t, bytes);
    if (toucher_join(&t, FAULT_LIMIT_MS))
        return scene_end_if_others_go_on(s, "waits", "its fault waits");
    if (!scene_is_right(s, &lent, bytes, page))
        return scene_end(s, HARM, "harm", "page %llu holds wrong bytes", (unsigned long long)page);
    return scene_end_if_others_go_on(s, "served", "its fault was answered");
}

#endif
