#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include "page_channel.h"

int page_channel_read_now(struct page_channel *channel, void *bytes, uint64_t length, uint64_t offset)
{
    return channel->ops->read_now(channel, bytes, length, offset);
}

void page_channel_submit(struct page_channel *channel, struct page_request *request)
{
    request->next = NULL;
    channel->ops->submit(channel, request);
}

int page_channel_poll_fd(struct page_channel *channel)
{
    return channel->ops->poll_fd ? channel->ops->poll_fd(channel) : PAGE_CHANNEL_POLL_NONE;
}

void page_channel_dispatch(struct page_channel *channel)
{
    channel->ops->dispatch(channel);
}

void page_channel_free(struct page_channel *channel)
{
    if (channel)
        channel->ops->free(channel);
}

void page_channel_zero_tail(uint8_t *bytes, uint64_t length, uint64_t end)
{
    if (length < end)
        memset(bytes + length, 0, end - length);
}

static int zero_read_now(struct page_channel *channel, void *bytes, uint64_t length, uint64_t offset)
{
    (void)channel;
    (void)offset;
    memset(bytes, 0, length);
    return PAGE_CHANNEL_DONE;
}

static void zero_submit(struct page_channel *channel, struct page_request *request)
{
    request->done(request, zero_read_now(channel, request->bytes, request->length, request->offset));
}

static void zero_free(struct page_channel *channel)
{
    free(channel);
}

static const struct page_channel_ops zero_ops = {
    .read_now = zero_read_now,
    .submit = zero_submit,
    .free = zero_free,
};

int page_channel_zero_new(struct page_channel **channelp)
{
    *channelp = malloc(sizeof(**channelp));
    if (!*channelp)
        return -ENOMEM;
    **channelp = (struct page_channel){.ops = &zero_ops,
                                       .stream_piece_bytes = PAGE_CHANNEL_PIECE_BYTES,
                                       .stream_piece_count = PAGE_CHANNEL_PIECES,
                                       .stream_piece_count_demand = PAGE_CHANNEL_PIECES_DEMAND,
                                       .demands_of_one = PAGE_CHANNEL_DEMANDS_OF_ONE};
    return 0;
}
