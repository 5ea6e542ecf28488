/* leaving: helpers that die, stop or go silent at every step of the hand-over, and some that only say they left. */
#ifndef PCSHARE_HOSTILE_LEAVING_H
#define PCSHARE_HOSTILE_LEAVING_H

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#include "scene.h"

/* The deed is to be killed; whoever returns from it could not even come so far. */
static int end_if_killed(struct scene *s, int (*deed)(struct scene *s), const char *detail)
{
    int status = scene_wait(scene_spawn(s, deed), 0);
    s->attempts++;
    if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL)
        return scene_end(s, CANNOT, "cannot", "it was not killed (wait status %#x)", (unsigned)status);
    return scene_end_if_others_go_on(s, "died", detail);
}

static int die(void)
{
    return kill(getpid(), SIGKILL);
}

static int die_after_connect(struct scene *s)
{
    struct raw r;
    TRY(scene_connect(s, &r));
    return die();
}

static int hostile_dies_after_connect(struct scene *s)
{
    return end_if_killed(s, die_after_connect, "before HELLO");
}

static int die_after_hello(struct scene *s)
{
    struct wire_hello hello = raw_hello_message(s->idstr, s->mode);
    struct raw r;
    TRY(scene_connect(s, &r));
    raw_send(r.control, &hello, sizeof hello, NULL, 0);
    return die();
}

static int hostile_dies_after_hello(struct scene *s)
{
    return end_if_killed(s, die_after_hello, "after HELLO");
}

static int die_after_welcome(struct scene *s)
{
    struct raw r;
    TRY(scene_hello(s, &r));
    return die();
}

static int hostile_dies_after_welcome(struct scene *s)
{
    return end_if_killed(s, die_after_welcome, "after WELCOME");
}

static int die_after_attach(struct scene *s)
{
    struct raw r;
    TRY(scene_map(s, &r));
    struct wire_attach attach = raw_attach_message(&r);
    raw_send(r.control, &attach, sizeof attach, &r.uffd, 1);
    return die();
}

static int hostile_dies_after_attach(struct scene *s)
{
    return end_if_killed(s, die_after_attach, "after ATTACH, before ACK");
}

static int die_while_waiting(struct scene *s)
{
    struct raw r;
    struct toucher t;
    uint64_t page;
    TRY(scene_join(s, &r));
    TRY(scene_missing_page(s, &r, &page));
    toucher_start(&t, r.data + page * r.welcome.page_size);
    return raw_wait_for_fault(&r) ? CANNOT : die();
}

static int hostile_dies_while_waiting(struct scene *s)
{
    return end_if_killed(s, die_while_waiting, "while it waited for a page");
}

static int stop_for_ever(struct scene *s)
{
    struct raw r;
    struct toucher t;
    uint64_t page;
    TRY(scene_join(s, &r));
    TRY(scene_missing_page(s, &r, &page));
    toucher_start(&t, r.data + page * r.welcome.page_size);
    return raw_wait_for_fault(&r) ? CANNOT : kill(getpid(), SIGSTOP);
}

static int hostile_stops_for_ever(struct scene *s)
{
    pid_t pid = scene_spawn(s, stop_for_ever);
    int stopped = scene_wait(pid, WUNTRACED), verdict = scene_others_go_on(s);
    s->attempts++;
    kill(pid, SIGKILL);
    if (WIFSTOPPED(stopped))
        scene_wait(pid, 0);
    if (verdict)
        return verdict;
    if (!WIFSTOPPED(stopped))
        return scene_end(s, CANNOT, "cannot", "it did not come so far as to stop");
    return scene_end(s, WELL, "stopped", "while the others went on");
}

static int hostile_never_speaks(struct scene *s)
{
    struct raw r;
    TRY(scene_connect(s, &r));
    TRY(scene_others_go_on(s));
    return scene_expect_refusal(s, &r, "silence before HELLO");
}

static int hostile_never_attaches(struct scene *s)
{
    struct raw r;
    TRY(scene_map(s, &r));
    TRY(scene_others_go_on(s));
    return scene_expect_refusal(s, &r, "silence after WELCOME");
}

/* The coordinator's copy keeps the registration alive. */
static int hostile_closes_uffd(struct scene *s)
{
    struct raw r;
    TRY(scene_join(s, &r));
    close(r.uffd);
    TRY(scene_use(s, &r, OTHERS_PAGES));
    return scene_end_if_others_go_on(s, "served", "with the coordinator's copy of the uffd");
}

/* Touches when the coordinator was made to believe that nobody is there: right bytes, or a wait, never zeros. */
static int touch_unserved(struct scene *s, const struct raw *r)
{
    struct toucher t;
    uint64_t page;
    TRY(scene_others_go_on(s)); /* also gives the coordinator the time to act on it */
    TRY(scene_missing_page(s, r, &page));
    const uint8_t *bytes = r->data + page * r->welcome.page_size;
    toucher_start(&t, bytes);
    if (toucher_join(&t, UNSERVED_WAIT_MS))
        return scene_end_if_others_go_on(s, "waits", "its own thread does, which nobody serves any more");
    if (!scene_is_right(s, r, bytes, page))
        return scene_end(s, HARM, "harm", "page %llu holds wrong bytes", (unsigned long long)page);
    return scene_end_if_others_go_on(s, "served", "all the same");
}

static int hostile_lies_leave(struct scene *s)
{
    struct wire_plain leave = {.header = raw_header(WIRE_LEAVE, sizeof leave)};
    struct raw r;
    TRY(scene_join(s, &r));
    raw_send(r.control, &leave, sizeof leave, NULL, 0);
    return touch_unserved(s, &r);
}

static int hostile_closes_control(struct scene *s)
{
    struct raw r;
    TRY(scene_join(s, &r));
    close(r.control);
    return touch_unserved(s, &r);
}

#endif
