"""Takes a block as a numpy array and computes its largest value and its mean.

For an .npy file the array has the file's dtype and shape, for anything else it is bytes. Works through the array in
steps, in the order in which it lies in memory, so that there is a first value long before the last page.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _common


def describe(array: npt.NDArray[Any], computed: Callable[[int], None]) -> dict[str, object]:
    """dtype, shape, max and mean of the array; computed is called with the bytes of each step."""
    flat = array.ravel(order="K")
    step = max(1, _common.STEP_BYTES // flat.itemsize)
    largest: list[float] = []
    sums: list[float] = []
    for start in range(0, flat.size, step):
        part = flat[start : start + step]
        largest.append(part.max().item())
        sums.append(part.sum(dtype=np.float64).item())
        computed(part.nbytes)
    mean = math.fsum(sums) / flat.size if flat.size else None
    return {"dtype": array.dtype.str, "shape": list(array.shape), "max": max(largest, default=None), "mean": mean}


def numpy_user(run: _common.Run) -> dict[str, object]:
    """What describe() finds in the block."""
    with run.attach() as block:
        return describe(block.asarray(), run.computed)


if __name__ == "__main__":
    sys.exit(_common.main("numpy_user", numpy_user, _common.parser(__doc__).parse_args()))
