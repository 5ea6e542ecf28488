/* incoming_record: page records and the framing of RAM sections, and where their pages go; see incoming.h.
 *
 * Pages that somebody waits for are placed at once, from where they were read; others gather into runs for as long as
 * more of them are there without waiting.
 */
#define _GNU_SOURCE
#include "incoming_internal.h"

#include <ctype.h>
#include <endian.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "bitmap.h"

/* The format's own numbers. */
enum {
    RECORD_ZERO = 0x02,
    RECORD_MEM_SIZE = 0x04,
    RECORD_PAGE = 0x08,
    RECORD_END = 0x10,
    RECORD_CONTINUE = 0x20,
    RECORD_HEADER_LENGTH = 8,
    SECTION_FOOTER = 0x7e,
    SECTION_ID_LENGTH = 5, /* a type or the footer's mark, and the section's id */
};

enum { NEXT_RECORD = 3 }; /* beside INCOMING_END_OF_PAYLOAD and INCOMING_EOF */

static const struct {
    uint64_t flag;
    const char *what;
} not_done[] = {
    {0x40, "xbzrle pages: switch the capability xbzrle off on the source"},
    {0x80, "RDMA: let the source migrate over tcp: or unix:"},
    {0x100, "compressed pages: switch the capability compress off on the source"},
    {0x200, "multifd: switch the capability multifd off on the source"},
};

/* ---- what went wrong ---- */

static int fail(struct incoming_stream *s, uint32_t fault, int error, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

static int fail(struct incoming_stream *s, uint32_t fault, int error, const char *format, ...)
{
    va_list arguments;

    s->result->fault = fault;
    s->result->offset = s->record_offset;
    va_start(arguments, format);
    vsnprintf(s->result->text, sizeof(s->result->text), format, arguments);
    va_end(arguments);
    return -error;
}

/* The bytes did not come, or could not be taken in. */
static int fail_input(struct incoming_stream *s, int rc)
{
    if (s->result->fault)
        return rc; /* a page could not be placed before we waited: that was told */
    s->record_offset = incoming_stream_offset(s);
    if (rc == -ECANCELED)
        return fail(s, INCOMING_FAULT_LOCAL, ECANCELED, "stopped");
    if (rc == INPUT_EOF || rc == -ECONNRESET)
        return fail(s, INCOMING_FAULT_LINK, ECONNRESET, "the source closed the connection in the middle");
    return fail(s, INCOMING_FAULT_LINK, -rc, "reading: %s", strerror(-rc));
}

static int need(struct incoming_stream *s, uint32_t n, const uint8_t **bytesp)
{
    int rc = input_need(s, n, bytesp);

    return rc ? fail_input(s, rc) : 0;
}

/* Names come from the peer: what a terminal would not show as it is does not reach one. */
static const char *printable(char *text, size_t size, const uint8_t *name, uint32_t length)
{
    size_t n = 0;

    for (uint32_t i = 0; i < length && n + 1 < size; i++)
        text[n++] = isprint(name[i]) ? (char)name[i] : '?';
    text[n] = '\0';
    return text;
}

/* ---- placing ---- */

/* Whether pages cannot be placed yet: LISTEN is half done, or another connection brings the same ones, and they are not
 * received before they are in memory. */
static int must_wait(const struct incoming_block *block, const struct placing *wanted)
{
    if (block->state == BLOCK_UNMAPPED)
        return 1;
    for (const struct placing *other = block->placing; other; other = other->next)
        if (other->page < wanted->page + wanted->n_pages && wanted->page < other->page + other->n_pages)
            return 1;
    return 0;
}

static int begin_placing(struct incoming_stream *s, struct incoming_block *block, struct placing *placing)
{
    struct incoming *in = s->in;
    int rc = -ECANCELED;

    pthread_mutex_lock(&in->lock);
    while (must_wait(block, placing) && !s->stopped)
        pthread_cond_wait(&in->changed, &in->lock);
    if (block->state == BLOCK_PLACES && !must_wait(block, placing)) {
        placing->next = block->placing;
        block->placing = placing;
        rc = 0;
    }
    pthread_mutex_unlock(&in->lock);
    return rc;
}

/* Requests are told before the channel may go. */
static void end_placing(struct incoming_block *block, const struct placing *placing, int is_placed)
{
    struct incoming *in = block->in;
    struct placing **at = &block->placing;

    pthread_mutex_lock(&in->lock);
    if (is_placed) {
        incoming_note_received(block, placing->page, placing->n_pages);
        struct outstanding *arrived = requests_take_arrived(block, placing->page, placing->n_pages);
        if (arrived) {
            pthread_mutex_unlock(&in->lock);
            requests_end(arrived, PAGE_CHANNEL_ARRIVED);
            pthread_mutex_lock(&in->lock);
        }
    }
    while (*at != placing)
        at = &(*at)->next;
    *at = placing->next;
    pthread_cond_broadcast(&in->changed);
    pthread_mutex_unlock(&in->lock);
}

/* bytes NULL: zeros. */
static int place(struct incoming_stream *s, struct incoming_block *block, uint64_t page, uint64_t n_pages,
                 const uint8_t *bytes, int is_demand)
{
    struct placing placing = {.page = page, .n_pages = n_pages};
    uint64_t placed = 0;
    int rc = begin_placing(s, block, &placing);

    if (rc < 0)
        return fail(s, INCOMING_FAULT_LOCAL, -rc, "block %.64s is served no more", block->idstr);
    rc = fault_threads_place(block->ft, block->block_index, page, n_pages, bytes, is_demand, &placed);
    end_placing(block, &placing, rc >= 0);
    if (rc < 0)
        return fail(s, INCOMING_FAULT_LOCAL, -rc, "placing %llu pages of block %.64s from offset %llu: %s",
                    (unsigned long long)n_pages, block->idstr, (unsigned long long)bytes_in_pages(block, page),
                    strerror(-rc));
    count_up(&s->counters.places, 1);
    count_up(&s->counters.repeat_pages, (n_pages - placed) * block->target_per_page);
    return 0;
}

static int flush_run(struct incoming_stream *s)
{
    struct run run = s->run;

    s->run.n_pages = 0;
    if (run.n_pages == 0)
        return 0;
    return place(s, run.block, run.page, run.n_pages, run.is_zero ? NULL : s->run_bytes, 0);
}

static int fits_run(const struct run *run, const struct incoming_block *block, uint64_t page, int is_zero)
{
    return run->n_pages && run->block == block && run->page + run->n_pages == page && run->is_zero == is_zero &&
           bytes_in_pages(block, run->n_pages + 1) <= INCOMING_RUN_BYTES;
}

/* A page that came is left alone, also a zero one that nobody looked at yet, and one of a block that is complete. */
static int is_repeat(struct incoming_stream *s, const struct incoming_block *block, uint64_t page)
{
    if (!incoming_is_received(block, page, 1))
        return 0;
    count_up(&s->counters.repeat_pages, block->target_per_page);
    return 1;
}

/* A host page that is one target page. */
static int place_or_gather(struct incoming_stream *s, struct incoming_block *block, uint64_t page, const uint8_t *bytes)
{
    int rc = 0;

    if (is_repeat(s, block, page))
        return 0;
    if (incoming_is_wanted(block, page))
        return place(s, block, page, 1, bytes, 1);
    if (!fits_run(&s->run, block, page, !bytes)) {
        rc = flush_run(s);
        s->run = (struct run){.block = block, .page = page, .is_zero = !bytes};
    }
    if (bytes)
        memcpy(s->run_bytes + bytes_in_pages(block, s->run.n_pages), bytes, block->page_size);
    s->run.n_pages++;
    return rc;
}

int incoming_before_waiting(struct incoming_stream *s)
{
    pthread_mutex_lock(&s->in->lock);
    path_ready(s->in); /* before LISTEN no fault thread would */
    pthread_mutex_unlock(&s->in->lock);
    return flush_run(s);
}

/* ---- host pages of several target pages ---- */

/* Whether the parts of another host page should have come first. */
static int check_half_page(struct incoming_stream *s, const struct incoming_block *block, uint64_t page)
{
    const struct half_page *half = &s->half;

    if (!half->block || (half->block == block && half->page == page))
        return 0;
    return fail(s, INCOMING_FAULT_PEER, EPROTO,
                "a page of block %.40s at %llu, while of the host page of %.40s at %llu %llu parts are missing",
                block->idstr, (unsigned long long)bytes_in_pages(block, page), half->block->idstr,
                (unsigned long long)bytes_in_pages(half->block, half->page),
                (unsigned long long)(half->block->target_per_page - half->n_seen));
}

static void add_to_half_page(struct incoming_stream *s, uint64_t part, const uint8_t *bytes)
{
    struct half_page *half = &s->half;
    uint64_t size = s->in->target_page_size;

    if (half->is_zero && bytes) {
        memset(s->half_bytes, 0, half->block->page_size);
        half->is_zero = 0;
    }
    if (bytes)
        memcpy(s->half_bytes + part * size, bytes, size);
    half->n_seen++;
}

static int assemble(struct incoming_stream *s, struct incoming_block *block, uint64_t target_page, const uint8_t *bytes)
{
    struct half_page *half = &s->half;
    uint64_t page = target_page / block->target_per_page, part = target_page % block->target_per_page;

    if (!half->block)
        *half = (struct half_page){.block = block, .page = page, .is_zero = 1};
    if (bitmap_test_and_set(half->seen, part))
        return fail(s, INCOMING_FAULT_PEER, EPROTO, "block %.64s: the page at offset %llu comes twice", block->idstr,
                    (unsigned long long)(target_page * s->in->target_page_size));
    add_to_half_page(s, part, bytes);
    if (half->n_seen < block->target_per_page)
        return 0;
    half->block = NULL;
    if (is_repeat(s, block, page))
        return 0;
    return place(s, block, page, 1, half->is_zero ? NULL : s->half_bytes, incoming_is_wanted(block, page));
}

/* ---- a record ---- */

/* bytes NULL: the page is all fill. */
static int handle_page(struct incoming_stream *s, struct incoming_block *block, uint64_t target_page,
                       const uint8_t *bytes, uint8_t fill)
{
    int rc = incoming_store(block, target_page, bytes, fill);

    if (rc < 0)
        return fail(s, INCOMING_FAULT_LOCAL, -rc, "storing a page of block %.64s at offset %llu: %s", block->idstr,
                    (unsigned long long)(target_page * s->in->target_page_size), strerror(-rc));
    if (rc == 0)
        return 0;
    if (!bytes && fill)
        bytes = memset(s->fill_bytes, fill, s->in->target_page_size);
    rc = check_half_page(s, block, target_page / block->target_per_page);
    if (rc < 0)
        return rc;
    if (block->target_per_page == 1)
        return place_or_gather(s, block, target_page, bytes);
    return assemble(s, block, target_page, bytes);
}

static int read_zero(struct incoming_stream *s, struct incoming_block *block, uint64_t target_page)
{
    const uint8_t *bytes;
    int rc = need(s, 1, &bytes);

    if (rc < 0)
        return rc;
    uint8_t fill = bytes[0];
    rc = handle_page(s, block, target_page, NULL, fill);
    input_consume(s, 1);
    count_up(fill ? &s->counters.fill_pages : &s->counters.zero_pages, 1);
    return rc;
}

static int read_page(struct incoming_stream *s, struct incoming_block *block, uint64_t target_page)
{
    const uint8_t *bytes;
    int rc = need(s, s->in->target_page_size, &bytes);

    if (rc < 0)
        return rc;
    rc = handle_page(s, block, target_page, bytes, 0);
    input_consume(s, s->in->target_page_size);
    count_up(&s->counters.data_pages, 1);
    return rc;
}

static int check_flags(struct incoming_stream *s, uint64_t flags)
{
    uint64_t kind = flags & ~(uint64_t)RECORD_CONTINUE;

    for (size_t i = 0; i < sizeof(not_done) / sizeof(*not_done); i++)
        if (flags & not_done[i].flag)
            return fail(s, INCOMING_FAULT_PEER, EPROTONOSUPPORT, "the source sends %s", not_done[i].what);
    if (kind == RECORD_ZERO || kind == RECORD_PAGE || flags == RECORD_END)
        return 0;
    if (flags == RECORD_MEM_SIZE)
        return fail(s, INCOMING_FAULT_PEER, EPROTO, "a list of blocks where records of pages should come");
    return fail(s, INCOMING_FAULT_PEER, EPROTO, "a record with the flags %#llx, which are none",
                (unsigned long long)flags);
}

static int read_name(struct incoming_stream *s)
{
    const uint8_t *bytes;
    char name[65];
    int rc = need(s, 1, &bytes);

    if (rc < 0)
        return rc;
    uint32_t length = bytes[0];
    if (length == 0)
        return fail(s, INCOMING_FAULT_PEER, EPROTO, "a record with an empty block name");
    rc = need(s, 1 + length, &bytes);
    if (rc < 0)
        return rc;
    s->block = incoming_find_block(s->in, bytes + 1, length);
    if (!s->block)
        return fail(s, INCOMING_FAULT_PEER, EPROTO, "a record for block %s, which was not announced",
                    printable(name, sizeof(name), bytes + 1, length));
    input_consume(s, 1 + length);
    return 0;
}

static int read_body(struct incoming_stream *s, uint64_t offset, uint64_t flags)
{
    int rc = flags & RECORD_CONTINUE ? 0 : read_name(s);

    if (rc < 0)
        return rc;
    if (!s->block)
        return fail(s, INCOMING_FAULT_PEER, EPROTO, "the first record of the connection names no block");
    if (offset >= s->block->used_length)
        return fail(s, INCOMING_FAULT_PEER, EPROTO, "a page of block %.64s at offset %llu: the block has %llu bytes",
                    s->block->idstr, (unsigned long long)offset, (unsigned long long)s->block->used_length);
    uint64_t target_page = offset / s->in->target_page_size;
    rc = flags & RECORD_ZERO ? read_zero(s, s->block, target_page) : read_page(s, s->block, target_page);
    return rc < 0 ? rc : NEXT_RECORD;
}

static int read_record(struct incoming_stream *s)
{
    const uint8_t *bytes;
    uint64_t word, mask = s->in->target_page_size - 1;

    s->record_offset = incoming_stream_offset(s);
    int rc = input_need(s, RECORD_HEADER_LENGTH, &bytes);
    if (rc == INPUT_EOF)
        return INCOMING_EOF;
    if (rc)
        return fail_input(s, rc);
    memcpy(&word, bytes, sizeof(word));
    word = be64toh(word);
    rc = check_flags(s, word & mask);
    if (rc < 0)
        return rc;
    if ((word & mask) == RECORD_END && word != RECORD_END)
        return fail(s, INCOMING_FAULT_PEER, EPROTO, "an end of records that names an offset");
    input_consume(s, RECORD_HEADER_LENGTH);
    return word == RECORD_END ? INCOMING_END_OF_PAYLOAD : read_body(s, word & ~mask, word & mask);
}

static int read_payload(struct incoming_stream *s)
{
    int rc;

    do
        rc = read_record(s);
    while (rc == NEXT_RECORD);
    return rc;
}

/* ---- sections ---- */

static uint32_t id_after(const uint8_t *bytes)
{
    uint32_t id;

    memcpy(&id, bytes + 1, sizeof(id));
    return be32toh(id);
}

static int read_footer(struct incoming_stream *s, uint32_t section_type, uint32_t id)
{
    const uint8_t *bytes;

    s->record_offset = incoming_stream_offset(s);
    int rc = need(s, SECTION_ID_LENGTH, &bytes);
    if (rc < 0)
        return rc;
    if (bytes[0] != SECTION_FOOTER || id_after(bytes) != id)
        return fail(s, INCOMING_FAULT_PEER, EPROTO, "where the footer of section %u should be stands %#x, id %u", id,
                    bytes[0], id_after(bytes));
    if (section_type == INCOMING_SECTION_END && s->half.block)
        return fail(s, INCOMING_FAULT_PEER, EPROTO, "the end of RAM, and the host page of %.64s at %llu is not whole",
                    s->half.block->idstr, (unsigned long long)bytes_in_pages(s->half.block, s->half.page));
    input_consume(s, SECTION_ID_LENGTH);
    count_up(&s->counters.sections, 1);
    s->result->saw_end |= section_type == INCOMING_SECTION_END;
    return 0;
}

/* The next section. 0: one of RAM, *typep; INCOMING_SECTION: another; INCOMING_EOF. */
static int begin_section(struct incoming_stream *s, uint32_t *typep, uint32_t ram_section_id)
{
    const uint8_t *bytes;

    s->record_offset = incoming_stream_offset(s);
    int rc = input_need(s, 1, &bytes);
    if (rc == INPUT_EOF)
        return INCOMING_EOF;
    if (rc)
        return fail_input(s, rc);
    *typep = bytes[0];
    if (*typep != INCOMING_SECTION_PART && *typep != INCOMING_SECTION_END) {
        input_consume(s, 1);
        return INCOMING_SECTION;
    }
    rc = need(s, SECTION_ID_LENGTH, &bytes);
    if (rc < 0)
        return rc;
    uint32_t id = id_after(bytes);
    input_consume(s, id == ram_section_id ? SECTION_ID_LENGTH : 1);
    return id == ram_section_id ? 0 : INCOMING_SECTION;
}

static int read_sections(struct incoming_stream *s, uint32_t section_type, uint32_t ram_section_id)
{
    for (;;) {
        int rc = read_payload(s);
        if (rc == INCOMING_END_OF_PAYLOAD && section_type == INCOMING_SECTION_NONE)
            return rc;
        if (rc == INCOMING_EOF && section_type != INCOMING_SECTION_NONE)
            return fail_input(s, INPUT_EOF);
        if (rc == INCOMING_END_OF_PAYLOAD)
            rc = read_footer(s, section_type, ram_section_id);
        if (rc == 0)
            rc = begin_section(s, &section_type, ram_section_id);
        if (rc) {
            s->result->section_type = section_type;
            return rc;
        }
    }
}

int incoming_stream_records(struct incoming_stream *s, uint32_t section_type, uint32_t ram_section_id,
                            struct incoming_result *result)
{
    struct incoming_result of_flush = {0};

    memset(result, 0, sizeof(*result));
    s->result = result;
    int rc = read_sections(s, section_type, ram_section_id);
    if (rc >= 0)
        result->offset = incoming_stream_offset(s);
    s->result = rc < 0 ? &of_flush : result; /* what came first is told */
    int flushed = flush_run(s);              /* what is wrong after these pages does not make them wrong */
    s->result = NULL;
    return rc >= 0 && flushed < 0 ? flushed : rc;
}
