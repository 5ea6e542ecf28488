"""nbd: the network block device protocol, the one wire between a source and whoever pulls from it.

wire (numbers and layouts, no I/O) · address (where a server listens) · client (the handshake and a synchronous reader)
· server (answers for exports that it is given). The transmission phase of a page channel is the core's
(core/page_channel_nbd); here is what may take its time. Knows no block, no helper and no kind of source.

Written from the protocol's public description: fixed newstyle only, no TLS, read-only.
"""
