"""core: the door to the compiled C: `from pcshare.core import ffi, lib`. Only skins, status, protocol, client use it.

Nothing but that door: no checks of the host, no wrappers.
"""

from __future__ import annotations

from pcshare.errors import HostError

__all__ = ["CoreNotBuilt", "ffi", "lib"]


class CoreNotBuilt(HostError, ImportError):
    """The compiled module is not there or does not load; the message holds the loader's reason."""


try:
    from pcshare.core._core import ffi, lib
except ImportError as error:
    not_built = CoreNotBuilt(
        f"the compiled core of pcshare does not load: {error}",
        hint="build it with a C compiler at hand: `pip install .` in the checkout, else `pip install -I pcshare`",
    )
    not_built.name = "pcshare.core._core"
    raise not_built from error
