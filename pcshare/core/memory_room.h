/* memory_room: whether the memory control groups of this process leave room for pages, asked before they are placed.
 *
 * A group that is full does not refuse: the kernel's killer takes a process of it, and of ours it takes the keeper, on
 * whose mapping all pages are counted; nothing would be gained, for the pages live on in their memfd. So room is looked
 * for first, and where there is none placing fails with -ENOMEM. What the groups hold of files counts as room, since
 * the kernel gives that up first. Groups of version 1 and 2, up to the topmost one that can be seen.
 */
#ifndef PCSHARE_MEMORY_ROOM_H
#define PCSHARE_MEMORY_ROOM_H

#include <stdint.h>

enum {
    MEMORY_ROOM_LEVELS_MAX = 16,            /* groups within groups */
    MEMORY_ROOM_MARGIN_BYTES = 16 << 20,    /* left for everything else in the group, such as our own buffers */
    MEMORY_ROOM_MARGIN_PART = 8,            /* in a small group only this part of its limit */
    MEMORY_ROOM_UNCHECKED_BYTES = 64 << 20, /* taken between two looks at most: some 25 ms of placing */
};

/* Finds the groups of this process; without a call every amount is granted. As many calls of put let go of them. */
void memory_room_get(void);
void memory_room_put(void);
/* 0: there is room for so many bytes more, and they are counted as taken; -ENOMEM: there is not. Any thread. */
int memory_room_take(uint64_t length);

#endif
