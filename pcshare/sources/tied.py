"""tied: runs a command in its place that dies with the thread which started it: python -I -S tied.py PARENT WORD...

A program of its own, because what comes between fork and exec must not be Python in a process that has threads. It
imports nothing of pcshare, and is gone when the command runs.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND = 126, 127  # as shells say it
RESTORED = (signal.SIGPIPE, signal.SIGXFSZ)  # Python ignores them for itself; a command expects the default


def main() -> None:
    parent, *words = sys.argv[1:]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        return  # it died before we were tied to it
    for number in RESTORED:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the thread that started us blocks them all
    try:
        os.execvp(words[0], words)
    except OSError as error:
        os.write(2, os.fsencode(f"pcshare: cannot run {words[0]}: {error.strerror}\n"))
        not_found = isinstance(error, FileNotFoundError | NotADirectoryError)
        os._exit(EXIT_NOT_FOUND if not_found else EXIT_NOT_EXECUTABLE)


if __name__ == "__main__":
    main()
