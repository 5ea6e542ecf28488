/* incoming_fuzz: streams of page records with mutations, through the parser, beside a plain second parser over the same
 * bytes: both must come to the same end, at the same byte, and leave the same memory.
 *
 * Arguments: how many mutated records, the random seed. Built from the core's files but for the fault threads: pages
 * that are to be placed arrive in this file, which checks them as the kernel would. Says what it did on stdout.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "incoming.h"

enum {
    BLOCKS = 3,
    STREAM_MAX = 150 << 10, /* what a socket takes without a reader */
    RECORDS_MAX = 12,       /* of a stream, pages being at most so many */
    ROUNDS_PER_MIGRATION = 50,
    RAM_ID = 7,
    BLOCK_BYTES_MAX = 128 << 10,
    PARTS_MAX = 64,
};

enum { ZERO = 0x02, PAGE = 0x08, END = 0x10, CONTINUE = 0x20 };

#define REQUIRE(condition)                                                                                             \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "round %" PRIu64 ", line %d: %s\n", rounds, __LINE__, #condition);                        \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

/* A block, and what the second parser makes of it. */
struct model {
    char idstr[256];
    uint64_t length;
    uint64_t page_size;
    int memfd;
    uint8_t expected[BLOCK_BYTES_MAX];
    uint8_t placed[BLOCK_BYTES_MAX]; /* what fault_threads_place was given */
    uint8_t is_placed[BLOCK_BYTES_MAX / 1024];
    uint8_t is_expected[BLOCK_BYTES_MAX / 1024]; /* in post-copy: the host page was whole */
};

struct second_parser {
    const uint8_t *bytes;
    uint64_t length;
    uint64_t at;
    uint64_t error_at;
    int block; /* -1: none named */
    int half_block;
    uint64_t half_page;
    uint32_t n_seen;
    uint8_t seen[PARTS_MAX];
    uint8_t half[BLOCK_BYTES_MAX];
    int saw_end;
};

static uint64_t rounds;
static uint64_t random_state;
static uint32_t target_page_size;
static int places; /* after LISTEN */
static struct model models[BLOCKS];
static struct incoming *in;
static uint8_t stream[STREAM_MAX];
static uint64_t stream_length;

/* xorshift: the same on every machine. */
static uint64_t random_below(uint64_t n)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (random_state >> 11) % n;
}

/* ---- in the fault threads' place ---- */

int fault_threads_place(struct fault_threads *ft, uint32_t block_index, uint64_t page, uint64_t n_pages,
                        const void *bytes, int is_demand, uint64_t *placed_pagesp)
{
    struct model *model = &models[block_index];
    const uint8_t *from = bytes;

    REQUIRE(ft == NULL && places && block_index < BLOCKS && !is_demand);
    REQUIRE(n_pages > 0 && page + n_pages <= model->length / model->page_size);
    *placed_pagesp = 0;
    for (uint64_t i = 0; i < n_pages; i++) {
        uint8_t *to = model->placed + (page + i) * model->page_size;

        if (model->is_placed[page + i])
            continue;
        if (from)
            memcpy(to, from + i * model->page_size, model->page_size);
        else
            memset(to, 0, model->page_size);
        model->is_placed[page + i] = 1;
        ++*placed_pagesp;
    }
    return 0;
}

/* ---- the second parser: the format, as plainly as it can be said ---- */

static int second_has(struct second_parser *p, uint64_t n)
{
    return p->length - p->at >= n;
}

static void second_store(struct second_parser *p, uint64_t offset, const uint8_t *page)
{
    memcpy(models[p->block].expected + offset, page, target_page_size);
}

static int second_place(struct second_parser *p, uint64_t offset, const uint8_t *page)
{
    struct model *model = &models[p->block];
    uint64_t host_page = offset / model->page_size, part = offset % model->page_size / target_page_size;

    if (p->half_block >= 0 && (p->half_block != p->block || p->half_page != host_page))
        return -EPROTO;
    if (p->half_block < 0) {
        p->half_block = p->block;
        p->half_page = host_page;
        p->n_seen = 0;
        memset(p->seen, 0, sizeof(p->seen));
    }
    if (p->seen[part]++)
        return -EPROTO;
    memcpy(p->half + part * target_page_size, page, target_page_size);
    if (++p->n_seen < model->page_size / target_page_size)
        return 0;
    p->half_block = -1;
    if (!model->is_expected[host_page])
        memcpy(model->expected + host_page * model->page_size, p->half, model->page_size);
    model->is_expected[host_page] = 1;
    return 0;
}

static int second_name(struct second_parser *p)
{
    uint8_t length = p->bytes[p->at];

    if (length == 0)
        return -EPROTO;
    if (!second_has(p, 1 + (uint64_t)length))
        return -ECONNRESET;
    p->block = -1;
    for (int i = 0; i < BLOCKS; i++)
        if (strlen(models[i].idstr) == length && memcmp(models[i].idstr, p->bytes + p->at + 1, length) == 0)
            p->block = i;
    if (p->block < 0)
        return -EPROTO;
    p->at += 1 + length;
    return 0;
}

/* 1: the mark that ends a payload. */
static int second_record(struct second_parser *p)
{
    uint64_t word, mask = target_page_size - 1;
    uint8_t page[4096];

    if (!second_has(p, 8))
        return -ECONNRESET;
    memcpy(&word, p->bytes + p->at, 8);
    word = be64toh(word);
    uint64_t flags = word & mask, offset = word & ~mask;
    if (flags & 0x3c0)
        return -EPROTONOSUPPORT;
    if (flags != ZERO && flags != PAGE && flags != (ZERO | CONTINUE) && flags != (PAGE | CONTINUE) && word != END)
        return -EPROTO;
    p->at += 8;
    if (word == END)
        return 1;
    if (!(flags & CONTINUE)) {
        int rc = second_has(p, 1) ? second_name(p) : -ECONNRESET;
        if (rc < 0)
            return rc;
    }
    if (p->block < 0 || offset >= models[p->block].length)
        return -EPROTO;
    uint64_t need = flags & ZERO ? 1 : target_page_size;
    if (!second_has(p, need))
        return -ECONNRESET;
    if (flags & ZERO)
        memset(page, p->bytes[p->at], target_page_size);
    else
        memcpy(page, p->bytes + p->at, target_page_size);
    if (places) {
        int rc = second_place(p, offset, page);
        if (rc < 0)
            return rc;
    } else {
        second_store(p, offset, page);
    }
    p->at += need;
    return 0;
}

static int second_id_is(const struct second_parser *p, uint8_t type)
{
    uint32_t id;

    memcpy(&id, p->bytes + p->at + 1, 4);
    return p->bytes[p->at] == type && be32toh(id) == RAM_ID;
}

static int second_parse(struct second_parser *p, uint32_t section_type)
{
    for (;;) {
        int rc = 0;

        while (rc == 0) {
            p->error_at = p->at;
            if (p->at == p->length)
                return section_type ? -ECONNRESET : INCOMING_EOF;
            rc = second_record(p);
        }
        if (rc < 0)
            return rc;
        if (!section_type)
            return INCOMING_END_OF_PAYLOAD;
        p->error_at = p->at;
        if (!second_has(p, 5))
            return -ECONNRESET;
        if (!second_id_is(p, 0x7e) || (section_type == INCOMING_SECTION_END && p->half_block >= 0))
            return -EPROTO;
        p->at += 5;
        p->saw_end |= section_type == INCOMING_SECTION_END;
        if (p->at == p->length)
            return INCOMING_EOF;
        section_type = p->bytes[p->at];
        if (section_type != INCOMING_SECTION_PART && section_type != INCOMING_SECTION_END) {
            p->at++;
            return INCOMING_SECTION;
        }
        if (!second_has(p, 5))
            return -ECONNRESET;
        if (!second_id_is(p, (uint8_t)section_type)) {
            p->at++;
            return INCOMING_SECTION;
        }
        p->at += 5;
    }
}

/* ---- streams ---- */

static void put(const void *bytes, uint64_t length)
{
    REQUIRE(stream_length + length <= STREAM_MAX);
    memcpy(stream + stream_length, bytes, length);
    stream_length += length;
}

static void put_byte(uint8_t byte)
{
    put(&byte, 1);
}

static void put_word(uint64_t word)
{
    word = htobe64(word);
    put(&word, 8);
}

static void put_id(uint8_t type)
{
    uint32_t id = htobe32(RAM_ID);

    put_byte(type);
    put(&id, 4);
}

static void put_record(int block, int names, uint64_t offset)
{
    static uint8_t page[4096];
    int is_zero = random_below(3) == 0;

    put_word(offset | (is_zero ? ZERO : PAGE) | (names ? 0 : CONTINUE));
    if (names) {
        put_byte((uint8_t)strlen(models[block].idstr));
        put(models[block].idstr, strlen(models[block].idstr));
    }
    if (is_zero) {
        put_byte(random_below(4) ? 0 : (uint8_t)random_below(256));
        return;
    }
    memset(page, (int)random_below(256), target_page_size);
    memcpy(page, &random_state, sizeof(random_state));
    put(page, target_page_size);
}

/* How many target pages come in a row, so that host pages are whole more often than not. */
static uint64_t pages_in_a_row(const struct model *model)
{
    return places ? model->page_size / target_page_size : 1 + random_below(2);
}

/* What the source may send. *starts: where each record begins. */
static uint32_t make_stream(uint32_t section_type, uint64_t *starts)
{
    uint32_t n = 0;
    int last = -1;

    stream_length = 0;
    while (n < RECORDS_MAX && (n == 0 || random_below(8))) {
        int block = (int)random_below(BLOCKS);
        uint64_t row = pages_in_a_row(&models[block]), pages = models[block].length / target_page_size;
        uint64_t first = random_below(pages / row) * row;

        for (uint64_t i = 0; i < row && n < RECORDS_MAX; i++) {
            starts[n++] = stream_length;
            put_record(block, block != last, (first + i) * target_page_size);
            last = block;
        }
        if (section_type && random_below(4) == 0) {
            put_word(END);
            put_id(0x7e);
            put_id(INCOMING_SECTION_PART);
        }
    }
    put_word(END);
    if (section_type) {
        put_id(0x7e);
        put_byte((uint8_t)random_below(9));
    }
    return n;
}

static void flip_bits(uint64_t start, uint64_t length)
{
    for (uint64_t i = 1 + random_below(3); i > 0; i--)
        stream[start + random_below(length)] ^= (uint8_t)(1 << random_below(8));
}

static void set_word(uint64_t start)
{
    static const uint64_t words[] = {0, END, 4, 1, ZERO | PAGE, END | CONTINUE, UINT64_MAX, 0x40 | PAGE, 0x1000 | PAGE,
                                     0x80, 0x100, 0x200, (uint64_t)1 << 63 | PAGE, ~(uint64_t)4095 | ZERO | CONTINUE};
    uint64_t word = htobe64(words[random_below(sizeof(words) / sizeof(*words))]);

    memcpy(stream + start, &word, 8);
}

static void cut_out(uint64_t start, uint64_t length)
{
    memmove(stream + start, stream + start + length, stream_length - start - length);
    stream_length -= length;
}

static void double_up(uint64_t start, uint64_t length)
{
    if (stream_length + length > STREAM_MAX || start + length > stream_length)
        return;
    memmove(stream + start + length, stream + start, stream_length - start);
    stream_length += length;
}

/* One record is not what it should be; mostly in its first bytes, which say what it is. */
static void mutate(uint64_t start, uint64_t end)
{
    uint64_t length = end - start, head = length < 24 ? length : 24;

    switch (random_below(7)) {
    case 0:
        flip_bits(start, head);
        break;
    case 1:
        stream[start + random_below(head)] = (uint8_t)random_below(256);
        break;
    case 2:
        set_word(start);
        break;
    case 3:
        cut_out(start + random_below(head / 2), 1 + random_below(head / 2));
        break;
    case 4:
        double_up(start + random_below(head), 1 + random_below(length));
        break;
    case 5:
        stream_length = start + random_below(length);
        break;
    default:
        flip_bits(start, length);
        break;
    }
}

/* ---- a migration ---- */

static void add_model(int i, const char *idstr, uint64_t length, uint64_t page_size)
{
    struct model *model = &models[i];
    uint32_t index;

    memset(model, 0, sizeof(*model));
    snprintf(model->idstr, sizeof(model->idstr), "%s", idstr);
    model->length = length;
    model->page_size = page_size;
    model->memfd = memfd_create("fuzz", MFD_CLOEXEC);
    REQUIRE(model->memfd >= 0 && ftruncate(model->memfd, (off_t)length) == 0);
    REQUIRE(incoming_add_block(in, idstr, length, page_size, model->memfd, &index) == 0 && index == (uint32_t)i);
}

static struct page_channel *channels[BLOCKS];

static void listen_on(uint32_t i)
{
    uint64_t received[BLOCK_BYTES_MAX / 1024 / 64] = {0}, n_extents;
    struct ramblock_extent *extents;

    REQUIRE(incoming_unmap_block(in, i, received, &extents, &n_extents) == 0 && n_extents == 1 && !received[0]);
    incoming_free_extents(extents);
    REQUIRE(incoming_page_channel(in, i, &channels[i]) == 0);
    REQUIRE(incoming_listen_block(in, i, NULL, i) == 0);
}

static void begin_migration(void)
{
    char longest[256];

    memset(longest, 'n', 255);
    longest[255] = '\0';
    target_page_size = random_below(2) ? 4096 : 1024;
    places = (int)random_below(2);
    REQUIRE(incoming_new(&in, target_page_size) == 0);
    add_model(0, "pc.ram", 64 << 10, target_page_size);
    add_model(1, "huge", BLOCK_BYTES_MAX, (uint64_t)target_page_size * 4);
    add_model(2, longest, 8 << 10, target_page_size);
    for (uint32_t i = 0; places && i < BLOCKS; i++)
        listen_on(i);
}

static void end_migration(void)
{
    for (uint32_t i = 0; i < BLOCKS; i++) {
        if (places)
            page_channel_free(channels[i]);
        close(models[i].memfd);
    }
    incoming_free(in);
}

static void compare_memory(void)
{
    static uint8_t memory[BLOCK_BYTES_MAX];

    for (int i = 0; i < BLOCKS; i++) {
        const struct model *model = &models[i];

        if (!places)
            REQUIRE(pread(model->memfd, memory, model->length, 0) == (ssize_t)model->length);
        REQUIRE(memcmp(places ? model->placed : memory, model->expected, model->length) == 0);
        REQUIRE(memcmp(model->is_placed, model->is_expected, sizeof(model->is_placed)) == 0);
    }
}

static void compare_end(int rc, int second_rc, const struct incoming_result *result, const struct second_parser *p)
{
    if (rc != second_rc)
        fprintf(stderr, "%d (%s), not %d\n", rc, result->text, second_rc);
    REQUIRE(rc == second_rc);
    if (rc >= 0) {
        REQUIRE(result->offset == p->at && result->fault == INCOMING_FAULT_NONE && !result->text[0]);
        REQUIRE(result->saw_end == p->saw_end);
        return;
    }
    REQUIRE(result->text[0] && memchr(result->text, '\0', sizeof(result->text)));
    REQUIRE(result->fault == (uint32_t)(rc == -ECONNRESET ? INCOMING_FAULT_LINK : INCOMING_FAULT_PEER));
    REQUIRE(rc == -ECONNRESET ? result->offset <= stream_length : result->offset == p->error_at);
}

static void run_stream(uint32_t section_type)
{
    struct second_parser *p = malloc(sizeof(*p));
    struct incoming_stream *s;
    struct incoming_result result;
    int ends[2];

    REQUIRE(p && socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    REQUIRE(send(ends[1], stream, stream_length, MSG_DONTWAIT) == (ssize_t)stream_length || !stream_length);
    close(ends[1]);
    REQUIRE(incoming_stream_new(&s, in, ends[0]) == 0);
    *p = (struct second_parser){.bytes = stream, .length = stream_length, .block = -1, .half_block = -1};
    int rc = incoming_stream_records(s, section_type, RAM_ID, &result);
    compare_end(rc, second_parse(p, section_type), &result, p);
    compare_memory();
    incoming_stream_free(s);
    free(p);
}

int main(int argc, char **argv)
{
    uint64_t wanted = argc > 1 ? strtoull(argv[1], NULL, 10) : 10000, mutated = 0;
    uint64_t starts[RECORDS_MAX + 1];

    random_state = argc > 2 ? strtoull(argv[2], NULL, 10) * 2654435761u + 1 : 1;
    for (rounds = 0; mutated < wanted; rounds++) {
        static const uint32_t types[] = {INCOMING_SECTION_NONE, INCOMING_SECTION_PART, INCOMING_SECTION_END};
        uint32_t section_type = types[random_below(3)];

        if (rounds % ROUNDS_PER_MIGRATION == 0) {
            if (rounds)
                end_migration();
            begin_migration();
        }
        uint32_t n = make_stream(section_type, starts);
        starts[n] = stream_length;
        if (random_below(16)) { /* the rest are as they should be */
            uint32_t which = (uint32_t)random_below(n);
            mutate(starts[which], starts[which + 1]);
            mutated++;
        }
        run_stream(section_type);
    }
    if (rounds)
        end_migration();
    printf("%" PRIu64 " mutated records in %" PRIu64 " streams\n", mutated, rounds);
    return 0;
}
