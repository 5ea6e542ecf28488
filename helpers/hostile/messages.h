/* messages: what is wrong on the wire. Every one of these must be answered by a refusal, and by nothing else. */
#ifndef PCSHARE_HOSTILE_MESSAGES_H
#define PCSHARE_HOSTILE_MESSAGES_H

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include "scene.h"

enum {
    GARBAGE_MESSAGES = 32,
    SLOW_STEP_MS = 500, /* well below any time limit of a step */
};

/* A new connection whose first message is this. */
static int try_first(struct scene *s, const void *bytes, size_t length, const char *what)
{
    struct raw r;
    TRY(scene_connect(s, &r));
    int rc = raw_send(r.control, bytes, length, NULL, 0);
    if (rc && rc != -EPIPE && rc != -ECONNRESET)
        return scene_end(s, CANNOT, "cannot", "%s: %s", what, strerror(-rc));
    TRY(scene_expect_refusal(s, &r, what));
    close(r.control);
    return 0;
}

static int hostile_wrong_version(struct scene *s)
{
    struct wire_hello none = raw_hello_message(s->idstr, s->mode), header = none, backwards = none;
    none.version_min = none.version_max = WIRE_VERSION + 1;
    header.header.version = WIRE_VERSION + 1;
    backwards.version_min = WIRE_VERSION + 1;
    backwards.version_max = WIRE_VERSION - 1;
    TRY(try_first(s, &header, sizeof header, "version of the header"));
    TRY(try_first(s, &backwards, sizeof backwards, "least version above the greatest"));
    TRY(try_first(s, &none, sizeof none, "versions that nobody speaks"));
    TRY(scene_others_go_on(s));
    return WELL;
}

static int hostile_wrong_magic(struct scene *s)
{
    struct wire_hello hello = raw_hello_message(s->idstr, s->mode);
    hello.header.magic = 0x54544547; /* "GETT" */
    TRY(try_first(s, &hello, sizeof hello, "magic"));
    TRY(scene_others_go_on(s));
    return WELL;
}

static int hostile_garbage(struct scene *s)
{
    static uint8_t bytes[RAW_MESSAGE_MAX];
    for (int i = 0; i < GARBAGE_MESSAGES; i++) {
        size_t length = 1 + scene_random(s) % (sizeof bytes - 1);
        for (size_t at = 0; at < length; at++)
            bytes[at] = (uint8_t)scene_random(s);
        TRY(try_first(s, bytes, length, "random bytes"));
    }
    TRY(scene_others_go_on(s));
    return WELL;
}

static int hostile_short_message(struct scene *s)
{
    struct wire_hello hello = raw_hello_message(s->idstr, s->mode);
    for (size_t length = 0; length < sizeof hello; length++)
        TRY(try_first(s, &hello, length, "HELLO cut short"));
    TRY(scene_others_go_on(s));
    return WELL;
}

static int hostile_long_message(struct scene *s)
{
    static uint8_t bytes[65536];
    struct wire_hello hello = raw_hello_message(s->idstr, s->mode);
    const size_t lengths[] = {
        sizeof hello + 1, sizeof hello + 8, sizeof(struct wire_attach), RAW_MESSAGE_MAX, sizeof bytes};
    memcpy(bytes, &hello, sizeof hello);
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++)
        TRY(try_first(s, bytes, lengths[i], "HELLO with more behind it"));
    TRY(scene_others_go_on(s));
    return WELL;
}

static int hostile_wrong_length(struct scene *s)
{
    struct wire_hello hello = raw_hello_message(s->idstr, s->mode);
    const uint32_t lengths[] = {0, 1, sizeof hello - 1, sizeof hello + 1, UINT32_MAX};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        hello.header.length = lengths[i];
        TRY(try_first(s, &hello, sizeof hello, "length in the header"));
    }
    TRY(scene_others_go_on(s));
    return WELL;
}

static int hostile_unknown_type(struct scene *s)
{
    struct wire_hello hello = raw_hello_message(s->idstr, s->mode);
    const uint16_t types[] = {0, WIRE_ADMIN + 1, 99, UINT16_MAX};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        struct raw r;
        struct wire_plain plain = {.header = raw_header(types[i], sizeof plain)};
        hello.header.type = types[i];
        TRY(try_first(s, &hello, sizeof hello, "type that does not exist, first"));
        TRY(scene_join(s, &r));
        raw_send(r.control, &plain, sizeof plain, NULL, 0);
        TRY(scene_expect_refusal(s, &r, "type that does not exist, after ACK"));
    }
    TRY(scene_others_go_on(s));
    return WELL;
}

static int hostile_wrong_order(struct scene *s)
{
    union {
        struct wire_header header;
        struct wire_welcome welcome;
        struct wire_attach attach;
        struct wire_error error;
    } message;
    static const struct {
        uint16_t type;
        size_t length;
    } others[] = {
        {WIRE_WELCOME, sizeof(struct wire_welcome)}, {WIRE_ATTACH, sizeof(struct wire_attach)},
        {WIRE_ACK, sizeof(struct wire_ack)},         {WIRE_REQUEST, sizeof(struct wire_request)},
        {WIRE_DONE, sizeof(struct wire_done)},       {WIRE_END, sizeof(struct wire_plain)},
        {WIRE_LEAVE, sizeof(struct wire_plain)},     {WIRE_BYE, sizeof(struct wire_plain)},
        {WIRE_ERROR, sizeof(struct wire_error)},
    };
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        char what[32];
        memset(&message, 0, sizeof message);
        message.header = raw_header(others[i].type, (uint32_t)others[i].length);
        snprintf(what, sizeof what, "type %u first", others[i].type);
        TRY(try_first(s, &message, others[i].length, what));
    }
    TRY(scene_others_go_on(s));
    return WELL;
}

static int hostile_wrong_name(struct scene *s)
{
    static const char *const names[] = {"no-such-block", "../data", "/etc/passwd", "\xff\xfe", "a b", "%n%s"};
    struct wire_hello hello = raw_hello_message("", s->mode);
    memset(hello.idstr, 'a', sizeof hello.idstr);
    TRY(try_first(s, &hello, sizeof hello, "name without an end"));
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        hello = raw_hello_message(names[i], s->mode);
        TRY(try_first(s, &hello, sizeof hello, "block that does not exist"));
    }
    TRY(scene_others_go_on(s));
    return WELL;
}

static int hostile_wrong_mode(struct scene *s)
{
    const uint32_t modes[] = {WIRE_MODE_RW, WIRE_MODE_COW + 1, 99, UINT32_MAX};
    for (size_t i = 0; i < sizeof modes / sizeof *modes; i++) {
        struct wire_hello hello = raw_hello_message(s->idstr, modes[i]);
        TRY(try_first(s, &hello, sizeof hello, i ? "a mode that does not exist" : "a read-only block for writing"));
    }
    TRY(scene_others_go_on(s));
    return WELL;
}

static int hostile_wrong_range(struct scene *s)
{
    struct raw r;
    TRY(scene_join(s, &r));
    uint64_t length = r.welcome.map_length;
    const struct wire_map ranges[] = {
        {.offset = length, .length = 1},         {.offset = 0, .length = length + 1},
        {.offset = length - 1, .length = 4096},  {.offset = 0, .length = UINT64_MAX},
        {.offset = UINT64_MAX, .length = 2},     {.offset = 4096, .length = UINT64_MAX - 4095},
    };
    for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++) {
        int status = raw_ensure(&r, ranges[i].offset, ranges[i].length);
        s->attempts++;
        if (status == 0 || status == -ETIMEDOUT)
            return scene_end(s, HARM, "harm", "bytes %#llx + %#llx: %s", (unsigned long long)ranges[i].offset,
                             (unsigned long long)ranges[i].length, status ? "no answer" : "granted");
        if (status == -ECONNRESET || status == -EPIPE)
            TRY(scene_join(s, &r));
    }
    return scene_end_if_others_go_on(s, "refused", "every range outside the block");
}

static int hostile_wrong_admin(struct scene *s)
{
    const uint32_t operations[] = {0, WIRE_ADMIN_STOP + 1, UINT32_MAX};
    struct wire_error answer;
    for (size_t i = 0; i < sizeof operations / sizeof *operations; i++) {
        struct raw r;
        struct wire_admin admin = {.header = raw_header(WIRE_ADMIN, sizeof admin), .op = operations[i]};
        TRY(scene_connect(s, &r));
        raw_send(r.control, &admin, sizeof admin, NULL, 0);
        int rc = raw_receive(r.control, &answer, sizeof answer, NULL, NULL, NOTICE_LIMIT_MS);
        s->attempts++;
        if (rc < 0 || (rc == (int)sizeof answer && answer.error == 0))
            return scene_end(s, HARM, "harm", "operation %u: %s", operations[i], rc < 0 ? strerror(-rc) : "done");
        close(r.control);
    }
    return scene_end_if_others_go_on(s, "refused", "every unknown operation");
}

static int hostile_double_attach_message(struct scene *s)
{
    struct raw r, second;
    TRY(scene_join(s, &r));
    second = r;
    int rc = raw_map(&second);
    if (!rc)
        rc = raw_open_uffd(&second, r.welcome.features);
    if (!rc)
        rc = raw_register(&second);
    if (rc)
        return scene_end(s, CANNOT, "cannot", "second uffd: %s", strerror(-rc));
    struct wire_attach attach = raw_attach_message(&second);
    rc = raw_send(r.control, &attach, sizeof attach, &second.uffd, 1);
    if (rc != -EPERM) /* refused to the sender at once, where the kernel can */
        TRY(scene_expect_refusal(s, &r, "second ATTACH"));
    TRY(scene_others_go_on(s));
    return WELL;
}

static void pause_a_step(void)
{
    const struct timespec step = {.tv_nsec = SLOW_STEP_MS * 1000000L};
    nanosleep(&step, NULL);
}

static int hostile_slow_sender(struct scene *s)
{
    struct raw r;
    TRY(scene_connect(s, &r));
    pause_a_step();
    int rc = raw_hello(&r, s->idstr, s->mode);
    pause_a_step();
    if (!rc)
        rc = raw_map(&r);
    if (!rc)
        rc = raw_open_uffd(&r, r.welcome.features);
    if (!rc)
        rc = raw_register(&r);
    if (!rc)
        rc = raw_attach(&r);
    if (rc)
        return scene_end(s, HARM, "harm", "a slow helper was not let in: %s", strerror(-rc));
    TRY(scene_use(s, &r, OTHERS_PAGES));
    return scene_end_if_others_go_on(s, "served", "slowly, and so were the others");
}

#endif
