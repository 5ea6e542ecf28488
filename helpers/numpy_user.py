"""Takes a block as a numpy array and computes its largest value and its mean.

For an .npy file the array has the file's dtype and shape, for anything else it is bytes; so it is where its values are
no real numbers, or wider than a double. Works through the array in steps, in the order in which it lies in memory, so
that there is a first value long before the last page.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _common

REAL_KINDS = "biuf"
DOUBLE_BYTES = 8


def describe(array: npt.NDArray[Any], computed: Callable[[int], None]) -> dict[str, object]:
    """dtype, shape, max and mean of the array, the latter "nan", "inf" or "-inf" where they are none; computed is
    called with the bytes of each step."""
    flat = array.ravel(order="K")
    if flat.dtype.kind not in REAL_KINDS or flat.itemsize > DOUBLE_BYTES:
        flat = flat.view(np.uint8)
    step = max(1, _common.STEP_BYTES // flat.itemsize)
    largest: list[float] = []
    sums: list[float] = []
    with np.errstate(all="ignore"):
        for start in range(0, flat.size, step):
            part = flat[start : start + step]
            largest.append(part.max().item())
            sums.append(part.sum(dtype=np.float64).item())
            computed(part.nbytes)
    mean = _told(_sum(sums) / flat.size) if flat.size else None
    peak = _told(next((value for value in largest if math.isnan(value)), max(largest))) if largest else None
    return {"dtype": array.dtype.str, "shape": list(array.shape), "max": peak, "mean": mean}


def _sum(values: list[float]) -> float:
    try:
        return math.fsum(values)
    except (ValueError, OverflowError):  # infinities of both signs, or beyond what a double holds
        return sum(values)


def _told(value: float) -> float | str:
    """JSON has no infinity, and nothing that is no number."""
    return value if math.isfinite(value) else str(value)


def numpy_user(run: _common.Run) -> dict[str, object]:
    """What describe() finds in the block."""
    with run.attach() as block:
        return describe(block.asarray(), run.computed)


if __name__ == "__main__":
    sys.exit(_common.main("numpy_user", numpy_user, _common.parser(__doc__).parse_args()))
