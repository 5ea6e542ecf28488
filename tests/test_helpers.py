"""The programs in helpers/ run against a real coordinator, and find what expected.py finds in the source file alone."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pcshare_helpers import expected
from support_coordinator import Finished, Helper, Serving, coordinator, run_helper

DATA_BYTES = (2 << 20) + 12345  # no multiple of a page
PAGES_WITH_DELAY = "delay=200us"
COUNT = 200


@pytest.fixture
def data_file(tmp_path: Path, rng: random.Random) -> Path:
    path = tmp_path / "data.bin"
    path.write_bytes(rng.randbytes(DATA_BYTES))
    return path


@pytest.fixture(params=["lazy", "eager"])
def served(request: pytest.FixtureRequest, runtime_dir: Path, data_file: Path) -> Iterator[Serving]:
    sources = (f"data={data_file}#{PAGES_WITH_DELAY}", "results=zero:1M")
    with coordinator(*sources, options=[f"--stream={request.param}"]) as serving:
        yield serving


def check(finished: Finished, result: object) -> None:
    """A helper that ended well, with this result, and whose report has what the demo shows."""
    assert finished.returncode == 0, finished
    report = finished.report
    assert report["ok"] is True
    assert report["result"] == result
    assert 0 < report["first_result_s"] <= report["total_s"]
    assert report["bytes_checked"] > 0


@pytest.mark.parametrize("hash", ["sha256", "crc32"])
def test_scan_finds_the_digest_of_the_file(served: Serving, data_file: Path, hash: str) -> None:
    finished = run_helper(served, "scan", "--block=data", f"--hash={hash}")
    check(finished, expected.expected_scan(data_file, hash))
    assert finished.report["bytes_checked"] == DATA_BYTES


def test_scan_that_asks_for_ranges_finds_the_same(served: Serving, data_file: Path) -> None:
    check(run_helper(served, "scan", "--block=data", "--ensure"), expected.expected_scan(data_file))


def test_random_lookup_finds_the_sum_of_the_words(served: Serving, data_file: Path, seed: int) -> None:
    finished = run_helper(served, "random_lookup", "--block=data", f"--seed={seed}", f"--count={COUNT}")
    check(finished, expected.expected_random(data_file, seed, COUNT))


def test_reader_finds_what_the_writer_wrote(served: Serving, data_file: Path, seed: int) -> None:
    reader = Helper(served, "reader", "--block=data", f"--seed={seed}")
    writer = run_helper(served, "writer", "--block=data")
    check(writer, expected.expected_writer(data_file))
    check(reader.finish(), expected.expected_writer(data_file))


def test_reader_without_a_writer_says_so(served: Serving) -> None:
    finished = run_helper(served, "reader", "--block=data", "--timeout=0.1")
    assert finished.returncode == 1
    assert finished.report["ok"] is False
    assert "is a writer running?" in finished.stderr


def test_forking_pool_computes_on_what_its_workers_inherit(served: Serving, data_file: Path) -> None:
    finished = run_helper(served, "forking_pool", "--block=data", "--workers=3")
    check(finished, expected.expected_writer(data_file))


def test_numpy_user_finds_max_and_mean_of_the_bytes(served: Serving, data_file: Path) -> None:
    finished = run_helper(served, "numpy_user", "--block=data")
    check(finished, expected.expected_numpy(data_file))
    assert finished.report["result"]["dtype"] == "|u1"


@pytest.mark.parametrize("order", ["C", "F"])
def test_numpy_user_finds_the_array_of_an_npy_file(runtime_dir: Path, tmp_path: Path, order: str) -> None:
    path = tmp_path / "array.npy"
    values = np.random.default_rng(1).standard_normal((300, 401))
    np.save(path, np.asarray(values, order="C" if order == "C" else "F"))
    with coordinator(f"array={path}") as served:
        finished = run_helper(served, "numpy_user")
    check(finished, expected.expected_numpy(path))
    assert finished.report["result"]["shape"] == [300, 401]
    assert finished.report["result"]["max"] == values.max()


def of_all_kinds() -> dict[str, np.ndarray]:
    """Arrays that have no largest value, or none that JSON can say."""
    numbers = np.arange(40_000)
    return {
        "nan": np.where(numbers == 7, np.nan, numbers * 1.0),
        "infinities": np.where(numbers % 2 == 0, np.inf, -np.inf),
        "too large a sum": np.full(len(numbers), 1.7e308),
        "complex": numbers * 1j,
        "texts": numbers.astype("U8"),
        "structured": np.array([(1, 2.0)] * 999, dtype=[("a", "<i4"), ("b", "<f8")]),
        "times": numbers.astype("M8[s]"),
        "long double": numbers.astype(np.longdouble),
        "truth": numbers % 3 == 0,
        "nothing": numbers[:0],
    }


@pytest.mark.parametrize("kind", of_all_kinds())
def test_numpy_user_takes_any_array(runtime_dir: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "array.npy"
    np.save(path, of_all_kinds()[kind])
    with coordinator(f"array={path}") as served:
        finished = run_helper(served, "numpy_user")
    assert finished.returncode == 0, finished
    assert finished.report["result"] == expected.expected_numpy(path)
    json.dumps(finished.report, allow_nan=False)


def test_file_that_is_only_called_as_an_array_is_bytes(runtime_dir: Path, tmp_path: Path, rng: random.Random) -> None:
    path = tmp_path / "array.npy"
    path.write_bytes(rng.randbytes(9999))
    with coordinator(f"array={path}") as served:
        check(run_helper(served, "numpy_user"), expected.expected_numpy(path))


def test_touch_scans_every_page(served: Serving, data_file: Path) -> None:
    finished = run_helper(served, "touch", "--block=data")
    check(finished, expected.expected_touch(data_file))
    assert finished.report["bytes_checked"] == DATA_BYTES


def test_touch_at_random_places_measures_what_was_missing(served: Serving, data_file: Path, seed: int) -> None:
    arguments = ("--pattern=random", f"--seed={seed}", f"--count={COUNT}", "--latency")
    finished = run_helper(served, "touch", "--block=data", *arguments)
    check(finished, expected.expected_touch(data_file, "random", seed, COUNT))
    latency = finished.report["latency_us"]
    assert latency["count"] == sum(latency["buckets"]) == finished.report["missing_pages"] <= COUNT
    if served.status().stream == "lazy":
        assert latency["count"] > 0
        assert 200 <= latency["p50"] <= latency["p99"] <= latency["max"]


def test_helpers_name_what_they_cannot_attach_to(served: Serving) -> None:
    for program in ("scan", "touch"):
        finished = run_helper(served, program, "--block=no-such-block", "--attach-timeout=5")
        assert finished.returncode == 1
        assert finished.report["ok"] is False
        assert "no-such-block" in finished.stderr


def test_all_helpers_at_once_find_the_right_answers(served: Serving, data_file: Path, seed: int) -> None:
    touch = ("--pattern=random", f"--seed={seed}", f"--count={COUNT}")
    running = {
        "scan": Helper(served, "scan", "--block=data"),
        "random_lookup": Helper(served, "random_lookup", "--block=data", f"--seed={seed}", f"--count={COUNT}"),
        "writer": Helper(served, "writer", "--block=data"),
        "reader": Helper(served, "reader", "--block=data"),
        "forking_pool": Helper(served, "forking_pool", "--block=data"),
        "touch": Helper(served, "touch", "--block=data", *touch),
    }
    found = {name: helper.finish().report.get("result") for name, helper in running.items()}
    assert found == {
        "scan": expected.expected_scan(data_file),
        "random_lookup": expected.expected_random(data_file, seed, COUNT),
        "writer": expected.expected_writer(data_file),
        "reader": expected.expected_writer(data_file),
        "forking_pool": expected.expected_writer(data_file),
        "touch": expected.expected_touch(data_file, "random", seed, COUNT),
    }
    assert served.block("data").foreign_pages == 0
