/* helper_welcome: what the coordinator's answers to HELLO and ATTACH bring, checked before anybody believes it.
 *
 * Sizes and offsets must fit each other, the fds and the status segment; on a later attachment it must be the same
 * block in the same memory, or a page of another block would appear in the middle of this one. Takes the fds over or
 * closes them. Sends nothing.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include "bitmap.h"
#include "helper_internal.h"

_Static_assert(sizeof(((struct wire_welcome *)0)->idstr) == sizeof(((struct pcshare_info *)0)->idstr), "idstr fits");
_Static_assert(sizeof(((struct wire_welcome *)0)->dtype) == sizeof(((struct pcshare_info *)0)->dtype), "dtype fits");
_Static_assert((int)WIRE_MODE_RO == (int)PCSHARE_RO && (int)WIRE_MODE_RW == (int)PCSHARE_RW &&
                   (int)WIRE_MODE_COW == (int)PCSHARE_COW,
               "modes go over the wire as they are");

static int fd_steal(int *fdp)
{
    int fd = *fdp;

    *fdp = -1;
    return fd;
}

/* ---- the status segment ---- */

static int fits(uint64_t offset, uint64_t count, uint64_t size_of_one, uint64_t size)
{
    return offset % 8 == 0 && offset <= size && count <= (size - offset) / size_of_one;
}

/* NULL: it is our block's; else what is wrong. */
static const char *status_find_block(struct status_view *view, const struct wire_welcome *w)
{
    const struct status_header *header = view->base;
    const struct status_block *block;

    if (header->magic != STATUS_MAGIC)
        return "it is no status segment";
    if (header->version != STATUS_VERSION)
        return "its layout is of another version: install the same pcshare";
    if (w->block_index >= header->blocks_max ||
        !fits(header->blocks_offset, header->blocks_max, sizeof(struct status_block), view->size))
        return "the block lies outside it";
    block = (const struct status_block *)((const char *)view->base + header->blocks_offset) + w->block_index;
    if (!block->in_use || block->page_size != w->page_size || block->page_count != w->map_length / w->page_size)
        return "it describes another block";
    if (!fits(block->bitmap_offset, bitmap_bytes(block->page_count), 1, view->size))
        return "the received bitmap lies outside it";
    view->block = block;
    view->received = (const uint64_t *)((const char *)view->base + block->bitmap_offset);
    return NULL;
}

static int status_view_map(struct status_view *view, int fd)
{
    struct stat st;

    if (fstat(fd, &st) < 0)
        return -errno;
    if (st.st_size < (off_t)sizeof(struct status_header))
        return -EPROTO;
    view->base = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, fd, 0);
    if (view->base == MAP_FAILED)
        return -errno;
    view->references = 1;
    view->size = (uint64_t)st.st_size;
    view->device = st.st_dev;
    view->inode = st.st_ino;
    return 0;
}

static int status_view_new(struct status_view **viewp, const struct pcshare_attachment *a, const struct wire_welcome *w,
                           int fd)
{
    struct status_view *view = calloc(1, sizeof(*view));
    const char *wrong;
    int rc;

    if (!view)
        return helper_fail(ENOMEM, "%s: no memory for a view of the status segment", a->socket_path);
    rc = status_view_map(view, fd);
    if (rc < 0) {
        free(view);
        return helper_fail(-rc, "%s: mapping the coordinator's status segment: %s", a->socket_path, strerror(-rc));
    }
    wrong = status_find_block(view, w);
    if (wrong) {
        status_view_put(view);
        return helper_fail(EPROTO, "%s: the coordinator's status segment does not fit: %s", a->socket_path, wrong);
    }
    *viewp = view;
    return 0;
}

struct status_view *status_view_get(struct pcshare_attachment *a)
{
    if (a->view)
        a->view->references++;
    return a->view;
}

void status_view_put(struct status_view *view)
{
    if (!view || --view->references > 0)
        return;
    munmap(view->base, view->size);
    free(view);
}

/* ---- WELCOME ---- */

static int is_power_of_two(uint64_t n)
{
    return n && (n & (n - 1)) == 0;
}

/* NULL, or what is wrong with the sizes. */
static const char *welcome_wrong_sizes(const struct wire_welcome *w, int memfd, struct stat *memfd_stat)
{
    if (!is_power_of_two(w->page_size) || w->page_size % (uint64_t)sysconf(_SC_PAGESIZE))
        return "the page size is no multiple of this host's that is a power of two";
    if (w->map_length == 0 || w->map_length % w->page_size || w->map_length > INT64_MAX)
        return "the mapped length is no multiple of the page size";
    if (w->used_length > w->map_length || w->map_length - w->used_length >= w->page_size)
        return "the mapped length is not the used length rounded up to the page size";
    if (fstat(memfd, memfd_stat) < 0 || !S_ISREG(memfd_stat->st_mode) || (uint64_t)memfd_stat->st_size < w->map_length)
        return "the block's memory is shorter than the block";
    return NULL;
}

/* NULL, or what is wrong with the rest. */
static const char *welcome_wrong_words(const struct pcshare_attachment *a, const struct link_message *m)
{
    const struct wire_welcome *w = &m->body.welcome;

    if (m->n_fds != ((w->flags & WIRE_WELCOME_DEVICE) ? 3u : 2u))
        return "the number of fds is not the one it announces";
    if (!link_is_text(w->idstr, sizeof(w->idstr)) || !link_is_text(w->dtype, sizeof(w->dtype)))
        return "a text has no end";
    if (a->info.idstr[0] && strcmp(a->info.idstr, w->idstr) != 0)
        return "it is for another block";
    if (w->mode < PCSHARE_RO || w->mode > PCSHARE_COW || (a->info.mode && a->info.mode != w->mode))
        return "it grants another mode than asked for";
    if (w->mode == PCSHARE_RW && !(w->flags & WIRE_WELCOME_WRITABLE))
        return "it grants rw for a block that is not writable";
    if ((w->flags & WIRE_WELCOME_ARRAY) && (w->ndim > WIRE_DIMS_MAX || w->data_offset > w->used_length))
        return "its array does not fit the block";
    return NULL;
}

static int check_welcome(const struct pcshare_attachment *a, const struct link_message *m, struct stat *memfd_stat)
{
    const char *wrong;

    if (m->body.header.type != WIRE_WELCOME)
        return helper_fail(EPROTO, "%s: the coordinator answered HELLO with %s", a->socket_path,
                           link_message_name(m->body.header.type));
    wrong = welcome_wrong_sizes(&m->body.welcome, m->fds[0], memfd_stat);
    if (!wrong)
        wrong = welcome_wrong_words(a, m);
    return wrong ? helper_fail(EPROTO, "%s: the coordinator sent a WELCOME that cannot be: %s", a->socket_path, wrong)
                 : 0;
}

/* What no clock can count is for ever. */
static uint64_t orphan_timeout_of(const struct wire_welcome *w)
{
    return w->orphan_timeout_ms > INT64_MAX / 2 ? 0 : w->orphan_timeout_ms;
}

static void fill_info(struct pcshare_info *info, const struct wire_welcome *w)
{
    *info = (struct pcshare_info){
        .used_length = w->used_length,
        .map_length = w->map_length,
        .page_size = w->page_size,
        .mode = w->mode,
        .writable = (w->flags & WIRE_WELCOME_WRITABLE) != 0,
        .block_index = w->block_index,
    };
    memcpy(info->idstr, w->idstr, sizeof(info->idstr));
    if (!(w->flags & WIRE_WELCOME_ARRAY))
        return;
    info->has_array = 1;
    info->fortran = (w->flags & WIRE_WELCOME_FORTRAN) != 0;
    info->data_offset = w->data_offset;
    info->ndim = w->ndim;
    memcpy(info->dims, w->dims, sizeof(info->dims));
    memcpy(info->dtype, w->dtype, sizeof(info->dtype));
}

int link_accept_welcome(struct pcshare_attachment *a, struct link_message *m, int *is_completep)
{
    const struct wire_welcome *w = &m->body.welcome;
    struct stat st;
    int rc = check_welcome(a, m, &st);

    if (rc == 0)
        rc = status_view_new(&a->view, a, w, m->fds[1]);
    if (rc == 0) {
        fill_info(&a->info, w);
        a->features = w->features;
        a->is_strict = (w->flags & WIRE_WELCOME_STRICT) != 0;
        a->orphan_timeout_ms = orphan_timeout_of(w);
        a->memfd_device = st.st_dev;
        a->memfd_inode = st.st_ino;
        a->memfd = fd_steal(&m->fds[0]);
        a->device = m->n_fds > 2 ? fd_steal(&m->fds[2]) : -1;
        *is_completep = (w->flags & WIRE_WELCOME_COMPLETE) != 0;
    }
    link_message_close(m);
    return rc;
}

/* A restarted coordinator goes on with the old status segment, or it has made a new one. */
static int renew_view(struct pcshare_attachment *a, const struct link_message *m)
{
    const struct wire_welcome *w = &m->body.welcome;
    struct status_view *view;
    struct stat st;
    int rc;

    if (w->block_index == a->info.block_index && fstat(m->fds[1], &st) == 0 && st.st_dev == a->view->device &&
        st.st_ino == a->view->inode)
        return 0;
    rc = status_view_new(&view, a, w, m->fds[1]);
    if (rc < 0)
        return rc;
    status_view_put(a->view);
    a->view = view;
    a->info.block_index = w->block_index;
    return 0;
}

static int is_same_block(const struct pcshare_attachment *a, const struct wire_welcome *w,
                         const struct stat *memfd_stat)
{
    return memfd_stat->st_dev == a->memfd_device && memfd_stat->st_ino == a->memfd_inode &&
           w->map_length == a->info.map_length && w->used_length == a->info.used_length &&
           w->page_size == a->info.page_size && w->features == a->features &&
           ((w->flags & WIRE_WELCOME_STRICT) != 0) == a->is_strict;
}

int link_recognise_welcome(struct pcshare_attachment *a, struct link_message *m, int *is_completep)
{
    struct stat st;
    int rc = check_welcome(a, m, &st);

    if (rc == 0 && !is_same_block(a, &m->body.welcome, &st))
        rc = helper_fail(ESTALE, "another coordinator listens at %s, with another block %s", a->socket_path,
                         a->info.idstr);
    if (rc == 0)
        rc = renew_view(a, m);
    if (rc == 0) {
        a->orphan_timeout_ms = orphan_timeout_of(&m->body.welcome);
        *is_completep = (m->body.welcome.flags & WIRE_WELCOME_COMPLETE) != 0;
    }
    link_message_close(m);
    return rc;
}

/* ---- ACK ---- */

int link_accept_ack(struct pcshare_attachment *a, struct link_message *m, int *is_completep)
{
    uint16_t type = m->body.header.type;

    link_message_close(m);
    if (type != WIRE_ACK)
        return helper_fail(EPROTO, "%s: the coordinator answered ATTACH with %s", a->socket_path,
                           link_message_name(type));
    a->info.helper_index = m->body.ack.helper_index;
    a->link = LINK_UP;
    *is_completep = (m->body.ack.flags & WIRE_WELCOME_COMPLETE) != 0;
    return 0;
}
