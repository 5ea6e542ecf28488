/* place_gate: see place_gate.h. */
#include "place_gate.h"

#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

struct place_gate {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    uint32_t inside;   /* placers */
    uint32_t outside;  /* placers that wait */
    uint32_t admitted; /* of those, how many may enter before the next reader closes */
    uint32_t readers;  /* that want it closed */
    int closed;
};

int place_gate_new(struct place_gate **gp)
{
    struct place_gate *g = calloc(1, sizeof(*g));

    *gp = g;
    if (!g)
        return -ENOMEM;
    pthread_mutex_init(&g->lock, NULL);
    pthread_cond_init(&g->changed, NULL);
    return 0;
}

void place_gate_free(struct place_gate *g)
{
    if (!g)
        return;
    pthread_cond_destroy(&g->changed);
    pthread_mutex_destroy(&g->lock);
    free(g);
}

static int must_wait_outside(const struct place_gate *g)
{
    return g->closed || (g->readers && !g->admitted);
}

void place_gate_enter(struct place_gate *g)
{
    pthread_mutex_lock(&g->lock);
    if (must_wait_outside(g)) {
        g->outside++;
        while (must_wait_outside(g))
            pthread_cond_wait(&g->changed, &g->lock);
        g->outside--;
    }
    if (g->admitted)
        g->admitted--;
    g->inside++;
    pthread_mutex_unlock(&g->lock);
}

void place_gate_leave(struct place_gate *g)
{
    pthread_mutex_lock(&g->lock);
    if (--g->inside == 0 && g->readers)
        pthread_cond_broadcast(&g->changed);
    pthread_mutex_unlock(&g->lock);
}

void place_gate_close(struct place_gate *g)
{
    pthread_mutex_lock(&g->lock);
    g->readers++;
    while (g->closed || g->inside || g->admitted)
        pthread_cond_wait(&g->changed, &g->lock);
    g->closed = 1;
    pthread_mutex_unlock(&g->lock);
}

void place_gate_open(struct place_gate *g)
{
    pthread_mutex_lock(&g->lock);
    g->closed = 0;
    g->readers--;
    g->admitted = g->outside;
    if (g->readers || g->outside)
        pthread_cond_broadcast(&g->changed);
    pthread_mutex_unlock(&g->lock);
}
