"""demo: the main job as a show: helpers compute on a file that has not arrived, and every result is judged.

source makes or chooses the file, cast says who takes part, stage runs them on one coordinator, judge compares with the
file itself, leftovers counts what stayed behind, show draws; play puts it together. editor and trespasser are programs.
It uses pcshare as anybody could: nothing here reaches into the core, and no figure is estimated.
"""
