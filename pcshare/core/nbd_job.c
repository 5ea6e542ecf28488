/* nbd_job: see nbd_job.h. */
#include "nbd_job.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* ---- queues ---- */

void nbd_queue_push(struct nbd_queue *queue, struct nbd_read *read)
{
    read->next = NULL;
    if (queue->tail)
        queue->tail->next = read;
    else
        queue->head = read;
    queue->tail = read;
}

void nbd_queue_push_front(struct nbd_queue *queue, struct nbd_read *read)
{
    read->next = queue->head;
    queue->head = read;
    if (!queue->tail)
        queue->tail = read;
}

struct nbd_read *nbd_queue_pop(struct nbd_queue *queue)
{
    struct nbd_read *read = queue->head;

    if (read) {
        queue->head = read->next;
        if (!queue->head)
            queue->tail = NULL;
        read->next = NULL;
    }
    return read;
}

/* ---- jobs ---- */

static uint64_t align_down(uint64_t value, uint64_t alignment)
{
    return value & ~(alignment - 1);
}

/* The reads of a job, in order; on the wire each is as long as the server takes. */
static void cut_into_reads(struct nbd_job *job, uint64_t start, uint64_t end, uint8_t *bytes, uint32_t most)
{
    for (uint64_t at = start; at < end; at += most) {
        struct nbd_read *read = &job->reads[job->n_open++];

        read->job = job;
        read->offset = at;
        read->length = (uint32_t)(end - at < most ? end - at : most);
        read->bytes = bytes + (at - start);
    }
}

int nbd_job_new(struct nbd_job **jobp, const struct nbd_settings *settings, struct page_request *request)
{
    uint64_t alignment = settings->alignment, most = align_down(settings->length_max, alignment);
    uint64_t end = request->offset + request->length, start = align_down(request->offset, alignment);

    if (request->length == 0 || end < request->offset || end > settings->size)
        return -EINVAL;
    uint64_t aligned_end = align_down(end + alignment - 1, alignment);
    if (aligned_end > settings->size)
        aligned_end = settings->size;
    uint64_t count = (aligned_end - start + most - 1) / most;
    struct nbd_job *job = calloc(1, sizeof(*job) + count * sizeof(job->reads[0]));
    if (!job)
        return -ENOMEM;
    job->request = request;
    if (start != request->offset || aligned_end != end) {
        job->bounce = malloc(aligned_end - start);
        if (!job->bounce) {
            free(job);
            return -ENOMEM;
        }
        job->bounce_offset = request->offset - start;
    }
    cut_into_reads(job, start, aligned_end, job->bounce ? job->bounce : request->bytes, (uint32_t)most);
    *jobp = job;
    return 0;
}

void nbd_job_read_over(struct nbd_read *read, int result, struct nbd_job **overp)
{
    struct nbd_job *job = read->job;

    if (result < 0)
        job->result = result;
    if (--job->n_open == 0) {
        job->next = *overp;
        *overp = job;
    }
}

void nbd_job_end(struct nbd_job *job)
{
    struct page_request *request = job->request;
    int result = job->result;

    if (result == 0 && job->bounce)
        memcpy(request->bytes, job->bounce + job->bounce_offset, request->length);
    free(job->bounce);
    free(job);
    request->done(request, result);
}
