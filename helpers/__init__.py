"""Small programs that run as helper processes, each short enough to be read as an example.

The demo, the stress and the tests run exactly these. Each attaches to a block, computes on it while it still arrives,
and prints one JSON object as its last line. What a helper must find is in expected.py, computed from the source file
alone. Nothing here may look behind pcshare's public interface; the programs under hostile/ break it on purpose.
"""
