"""serve: what pcshare gives out over NBD: exports of files, of objects, and of a coordinator's blocks.

files · objects (both also by themselves) · blocks (the exporter: a helper process that answers for a coordinator) ·
extents. Says what the bytes are; how they are asked for is nbd's.
"""
