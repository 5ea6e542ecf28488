"""migration: QEMU's migration stream, the wire by which a live source pushes its memory.

wire (numbers, layouts and messages) · reader (what a receiver reads) · return_path (what it answers). No I/O anywhere:
parsers ask for bytes, builders return them. Page records are the core's (core/incoming); here is what may take its
time. Knows no block and no state of a migration.

Written from the format's behaviour: version 3, as QEMU 7.2 and later send it.
"""
