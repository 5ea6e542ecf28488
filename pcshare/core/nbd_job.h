/* nbd_job: a page request cut into the reads that a server takes, and queues of such reads.
 *
 * Knows no connection and has no lock: both are the channel's.
 */
#ifndef PCSHARE_NBD_JOB_H
#define PCSHARE_NBD_JOB_H

#include <stdint.h>

#include "nbd_connection.h"
#include "page_channel_nbd.h"

struct nbd_job {
    struct nbd_job *next; /* in a list of those that are over */
    struct page_request *request;
    uint8_t *bounce; /* where the server's alignment asks for more than the request */
    uint64_t bounce_offset;
    int result;
    uint32_t n_open;
    struct nbd_read reads[];
};

struct nbd_queue {
    struct nbd_read *head;
    struct nbd_read *tail;
};

void nbd_queue_push(struct nbd_queue *queue, struct nbd_read *read);
void nbd_queue_push_front(struct nbd_queue *queue, struct nbd_read *read);
struct nbd_read *nbd_queue_pop(struct nbd_queue *queue); /* NULL: none */

/* All its reads are open. -EINVAL: it is empty, or reaches beyond the size. */
int nbd_job_new(struct nbd_job **jobp, const struct nbd_settings *settings, struct page_request *request);
/* One read less is open. A job that is over goes to the list. */
void nbd_job_read_over(struct nbd_read *read, int result, struct nbd_job **overp);
/* Tells who requested it, who may take a while, and frees the job. */
void nbd_job_end(struct nbd_job *job);

#endif
