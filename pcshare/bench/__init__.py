"""bench: how fast pcshare is, as ratios against a limit or a peer that is measured in the same run, in turns with it.

Each sub-benchmark is a file of its own with a function contests(lab), which names what competes, and a text of what it
does not measure. contest.py says what a contest is and what follows from its figures, without running anything; lab.py
has what all of them need (warm memory, sources, programs); run.py plays the rounds. The C programs here are the limits
and the measuring helper; they become bench-limit and bench-touch.
"""
