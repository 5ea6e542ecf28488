/* status_fuzz: status segments with mutations, given to the helper's side with a right WELCOME, beside a plain second
 * check: a segment must be taken or refused as that says, and what is taken must lie inside it, however it is read
 * later: progress, the received bitmap, waiting for progress, the end of the block.
 *
 * status_fuzz COUNT SEED. An input is one segment of which at least one field is mutated, or that is cut short, or
 * noise. stdout: how much was done.
 */
#define _GNU_SOURCE
#include "fuzz.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include "bitmap.h"
#include "fd_message.h"
#include "helper.h"
#include "helper_internal.h"
#include "status_segment.h"
#include "wire.h"

enum {
    PAGE = 4096,
    SEGMENT_BYTES = 3 * PAGE,
    PAGES_MAX = 4096,
    BLOCKS = 3,
    FIELDS_PER_INPUT = 3,
};

static uint8_t *segment; /* as the coordinator sees it */
static int segment_fd, memfd;
static uint64_t n_taken, n_refused, n_complete;

/* ---- segments ---- */

static struct status_block *block_at(uint64_t index)
{
    return (struct status_block *)(segment + (sizeof(struct status_header) + 7) / 8 * 8) + index;
}

static void make_segment(uint64_t page_count)
{
    uint64_t bitmap_offset = (uint64_t)((uint8_t *)block_at(BLOCKS) - segment);

    memset(segment, 0, SEGMENT_BYTES);
    *(struct status_header *)segment = (struct status_header){
        .magic = STATUS_MAGIC,
        .version = STATUS_VERSION,
        .size = SEGMENT_BYTES,
        .blocks_offset = (uint64_t)((uint8_t *)block_at(0) - segment),
        .blocks_max = BLOCKS,
    };
    for (uint64_t i = 0; i < BLOCKS; i++)
        *block_at(i) = (struct status_block){.in_use = 1,
                                             .state = (uint32_t)random_below(STATUS_STATE_END + 1),
                                             .page_size = PAGE,
                                             .page_count = i == 1 ? page_count : 1,
                                             .bitmap_offset = bitmap_offset};
    random_fill(segment + bitmap_offset, bitmap_bytes(page_count));
}

/* A field that the reader looks at. */
static void change_field(uint64_t *indexp)
{
    struct status_header *header = (struct status_header *)segment;
    struct status_block *block = block_at(random_below(BLOCKS));
    uint64_t *words[] = {&header->blocks_offset, &block->page_size,      &block->page_count,
                         &block->bitmap_offset,  &header->blocks_offset, &block->bitmap_offset};
    uint32_t *halves[] = {&header->magic, &header->version, &header->blocks_max, &block->in_use, &block->state};
    uint64_t *word = words[random_below(sizeof(words) / sizeof(*words))];
    uint32_t *half = halves[random_below(sizeof(halves) / sizeof(*halves))];

    switch (random_below(6)) {
    case 0:
        *word = random_edge();
        break;
    case 1:
        *word += 8 * (random_below(5) - 2);
        break;
    case 2:
        *word = SEGMENT_BYTES - random_below(2 * sizeof(struct status_block));
        break;
    case 3:
        *half = one_in(2) ? (uint32_t)random_edge() : *half + (uint32_t)random_below(3) - 1;
        break;
    case 4:
        *indexp = one_in(2) ? random_edge() & UINT32_MAX : random_below(BLOCKS + 2);
        break;
    default:
        mutate_bytes(segment, one_in(2) ? sizeof(*header) : SEGMENT_BYTES);
    }
}

/* Bytes of the file, and which block WELCOME names. */
static uint64_t mutate(uint64_t *indexp)
{
    fuzz_inputs++;
    if (one_in(32))
        random_fill(segment, SEGMENT_BYTES);
    for (uint64_t n = 1 + random_below(FIELDS_PER_INPUT); n > 0; n--)
        change_field(indexp);
    return one_in(6) ? random_below(SEGMENT_BYTES) : SEGMENT_BYTES;
}

/* ---- the second check ---- */

/* Whether [offset, offset + length) lies in the file, at a place where words may lie. */
static int lies_in(uint64_t offset, unsigned __int128 length, uint64_t size)
{
    return offset % 8 == 0 && offset + length <= size;
}

static int second_check(uint64_t size, uint64_t index, uint64_t page_count)
{
    struct status_header header;
    struct status_block block;

    if (size < sizeof(header))
        return 0;
    memcpy(&header, segment, sizeof(header));
    if (header.magic != STATUS_MAGIC || header.version != STATUS_VERSION || index >= header.blocks_max)
        return 0;
    if (!lies_in(header.blocks_offset, (unsigned __int128)header.blocks_max * sizeof(block), size))
        return 0;
    memcpy(&block, segment + header.blocks_offset + index * sizeof(block), sizeof(block));
    return block.in_use && block.page_size == PAGE && block.page_count == page_count &&
           lies_in(block.bitmap_offset, (page_count + 63) / 64 * 8, size);
}

/* ---- a helper that reads it ---- */

static int send_welcome(int fd, uint64_t index, uint64_t page_count)
{
    struct wire_welcome w = {
        .header = {.magic = WIRE_MAGIC, .version = WIRE_VERSION, .type = WIRE_WELCOME, .length = sizeof(w)},
        .mode = WIRE_MODE_RO,
        .block_index = (uint32_t)index,
        .used_length = page_count * PAGE,
        .page_size = PAGE,
        .map_length = page_count * PAGE,
        .idstr = "block",
    };
    int fds[] = {memfd, segment_fd};

    return fd_message_send(fd, &w, sizeof(w), fds, 2, 0);
}

static void check_inside(const struct pcshare_attachment *a)
{
    const uint8_t *base = a->view->base, *end = base + a->view->size;
    const uint8_t *block = (const uint8_t *)a->view->block, *bits = (const uint8_t *)a->view->received;

    REQUIRE(block >= base && block + sizeof(struct status_block) <= end);
    REQUIRE(bits >= base && bits + bitmap_bytes(a->info.map_length / a->info.page_size) <= end);
}

/* Everything that is read of it later, also after it has changed. */
static void read_all(struct pcshare_attachment *a, uint64_t page_count)
{
    struct pcshare_progress progress;

    check_inside(a);
    pcshare_get_progress(a, &progress);
    (void)pcshare_wait_progress(a, progress.seq + 1, 0);
    uint64_t length = page_count * PAGE, start = random_below(length + 1);
    int all = pcshare_is_received(a, 0, length), some = pcshare_is_received(a, start, random_below(length - start + 1));
    REQUIRE((all == 0 || all == 1) && (some == 0 || some == 1) && (!all || some));
    REQUIRE(pcshare_is_received(a, random_edge() | 1, UINT64_MAX) == -EINVAL);
    n_complete += progress.state == STATUS_STATE_END;
}

static void run(uint64_t page_count)
{
    struct pcshare_attachment *a = calloc(1, sizeof(*a));
    struct link_message message;
    uint64_t index = 1;
    int ends[2], is_complete = 0, rc;

    make_segment(page_count);
    uint64_t size = one_in(16) ? SEGMENT_BYTES : mutate(&index);
    REQUIRE(ftruncate(segment_fd, (off_t)size) == 0);
    int said = second_check(size, index, page_count);
    REQUIRE(a && socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) == 0);
    a->references = 1;
    a->socket = ends[0];
    a->memfd = a->device = a->uffd = -1;
    a->state = PCSHARE_ATTACHED;
    REQUIRE(send_welcome(ends[1], index, page_count) == 0);
    library_lock();
    rc = link_receive(a, &message);
    REQUIRE(rc == 0);
    rc = link_accept_welcome(a, &message, &is_complete);
    library_unlock();
    REQUIRE(said ? rc == 0 : rc < 0);
    if (rc == 0)
        read_all(a, page_count);
    n_taken += rc == 0;
    n_refused += rc < 0;
    library_lock();
    attachment_release(a, 0);
    library_unlock();
    attachment_put(a);
    close(ends[1]);
    REQUIRE(ftruncate(segment_fd, SEGMENT_BYTES) == 0);
}

int main(int argc, char **argv)
{
    fuzz_arguments(argc, argv);
    segment_fd = memfd_create("status", MFD_CLOEXEC);
    memfd = memfd_create("block", MFD_CLOEXEC);
    REQUIRE(segment_fd >= 0 && memfd >= 0);
    REQUIRE(ftruncate(segment_fd, SEGMENT_BYTES) == 0 && ftruncate(memfd, (off_t)PAGES_MAX * PAGE) == 0);
    segment = mmap(NULL, SEGMENT_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, segment_fd, 0);
    REQUIRE(segment != MAP_FAILED);
    fuzz_begin();
    while (fuzz_more())
        run(1 + random_below(one_in(2) ? 200 : PAGES_MAX));
    printf("%" PRIu64 " mutated segments: %" PRIu64 " taken, %" PRIu64 " refused; %" PRIu64 " said END\n", fuzz_inputs,
           n_taken, n_refused, n_complete);
    return 0;
}
