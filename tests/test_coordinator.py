"""x"""
from __future__ import annotations
import random
from pathlib import Path
from support_serving import *

def test_a(runtime_dir: Path, tmp_path: Path, rng: random.Random) -> None:
    p = make_file(tmp_path, rng, 100*PAGE+5)
    with serving(f"data={p}", stream_mode=LAZY) as served:
        h = served.helper()
        assert h.do("b = attach(); read(b, 5000)") == p.read_bytes()[5000:5001]
        print(served.status())
