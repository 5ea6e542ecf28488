"""`python -m pcshare`: the same as the command `pcshare`."""

import sys

from pcshare.cli import main

if __name__ == "__main__":
    sys.exit(main())
