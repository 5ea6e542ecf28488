# The compiled module. Loose on purpose: its types are those of the headers beside it; a second list would go stale.
from typing import Any

ffi: Any
lib: Any
