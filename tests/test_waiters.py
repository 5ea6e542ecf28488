"""Who waits for which page: c/waiters_test.c, a case a run, also under the sanitizers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from core_support import WAIT_S, compile_c

CORE_FILES = ["waiters.c", "remote_fd.c", "remote_maps.c", "read_ahead.c", "uffd.c"]
SANITIZERS = {"plain": None, "asan": "address,undefined", "tsan": "thread"}
CASES = {
    "one_request_a_page": "D3, C5",
    "thread_that_faults_again_is_no_second_waiter": "T13, G6",
    "range_is_taken_whole_and_nothing_beside_it": "E4",
    "waiters_keep_their_remote_fd": "C5",
    "own_waiters_stay_where_others_are_told_of_a_loss": "P3, E6",
    "page_whose_source_failed_is_asked_for_again": "D3",
    "each_unasked_page_is_found_once": "D3",
    "who_waits_without_asking_leaves_the_page_unasked": "D3, P3",
    "unasked_page_that_nobody_waits_for_is_forgotten": "D3, P3",
    "page_in_the_queue_of_one_is_asked_for_by_the_next": "P4",
    "queue_that_goes_leaves_its_pages_to_who_else_waits": "P3, P4",
    "page_is_late_once_until_it_is_asked_for_again": "P3",
    "remote_fd_that_goes_is_forgotten_and_no_other": "P4, C5",
    "block_that_goes_is_forgotten_and_no_other": "C5",
    "nobody_is_lost_between_threads": "P3",
}


@pytest.fixture(scope="module", params=sorted(SANITIZERS))
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("c") / f"waiters_test_{request.param}"
    return compile_c(target, "waiters_test.c", CORE_FILES, SANITIZERS[request.param])


@pytest.mark.parametrize("case", CASES)
def test_waiters(program: Path, case: str) -> None:
    """D3, E4, T13: one entry a page however many wait for it; the rows of CASES say which requirement each is for."""
    done = subprocess.run(
        ["setarch", "-R", str(program), case], capture_output=True, text=True, timeout=WAIT_S * 2, check=False
    )
    assert done.returncode == 0, done.stderr
