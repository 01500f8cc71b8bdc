"""Cutting rows into the parts of a stripe."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moecxl.control import striping
from vllm_moecxl.control.striping import cut

WEIGHTS = st.lists(st.floats(1e-3, 1e12), min_size=1, max_size=9)
ROWS = st.integers(0, 1 << 40) | st.integers(0, 300)
GRANULES = st.integers(1, 130) | st.sampled_from([4096, 2 << 20])


@pytest.mark.parametrize(
    ("byte_count", "weights", "granule", "expected"),
    [
        (100, [1], 64, [(0, 100)]),
        (192, [1, 1, 1], 64, [(0, 64), (64, 128), (128, 192)]),
        (192, [1 / 3, 1 / 3, 1 / 3], 64, [(0, 64), (64, 128), (128, 192)]),
        (1000, [3, 1], 64, [(0, 768), (768, 1000)]),
        (5, [9, 1], 8, [(0, 0), (0, 5)]),
        (0, [2, 5], 8, [(0, 0), (0, 0)]),
    ],
)
def test_a_row_is_cut_in_proportion(byte_count: int, weights: list[float], granule: int, expected: object) -> None:
    assert cut(byte_count, weights, granule) == expected


@given(ROWS, WEIGHTS, GRANULES)
@settings(max_examples=500, deadline=None, derandomize=True, database=None)
def test_the_pieces_cover_the_row_in_granules_near_their_shares(
    byte_count: int, weights: list[float], granule: int
) -> None:
    pieces = cut(byte_count, weights, granule)
    assert len(pieces) == len(weights)
    assert pieces[0][0] == 0 and pieces[-1][1] == byte_count
    assert all(before[1] == after[0] for before, after in pairwise(pieces))
    for (start, stop), weight in zip(pieces, weights, strict=True):
        assert start <= stop
        assert abs((stop - start) - byte_count * weight / sum(weights)) < 2 * granule + 1e-9 * byte_count
    assert all((stop - start) % granule == 0 for start, stop in pieces[:-1])


@pytest.mark.parametrize("arguments", [(-1, [1], 1), (1, [], 1), (1, [1, 0], 1), (1, [1], 0)])
def test_what_cannot_be_cut_is_a_bug_of_the_caller(arguments: tuple[int, list[float], int]) -> None:
    with pytest.raises(AssertionError):
        cut(*arguments)


def test_it_runs_where_nothing_is_installed() -> None:
    path = Path(striping.__file__)
    code = f"import runpy; print(runpy.run_path({str(path)!r})['cut'](8, [1, 1], 4))"
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, cwd=path.parent, check=False
    )
    assert result.stdout == "[(0, 4), (4, 8)]\n", result.stderr
