/* place_gate: keeps placing a page and reading a writable helper's uffd apart, for one block.
 *
 * A helper that removes pages (MADV_REMOVE) waits until its event is read, and goes on at that moment. A COPY of old
 * bytes that was under way then could land after the removal, and nobody could tell it from what the helper wrote
 * since. So whoever places is counted in for one COPY of at most PLACE_GATE_BYTES, and whoever reads waits until
 * nobody is inside, and keeps the gate closed until what was read is marked in the received bitmap.
 *
 * No lock is held over a system call: who is kept out sleeps. Both sides get their turn: a reader that waits keeps new
 * placers out, and lets those in that waited before the next reader.
 */
#ifndef PCSHARE_PLACE_GATE_H
#define PCSHARE_PLACE_GATE_H

enum { PLACE_GATE_BYTES = 64 << 10 }; /* of one COPY: what a fault of a writable helper waits for, some 25 us */

struct place_gate;

int place_gate_new(struct place_gate **gp);
void place_gate_free(struct place_gate *g);
/* Around one COPY. */
void place_gate_enter(struct place_gate *g);
void place_gate_leave(struct place_gate *g);
/* Around reading and marking. */
void place_gate_close(struct place_gate *g);
void place_gate_open(struct place_gate *g);

#endif
