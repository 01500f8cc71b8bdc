"""Routing traces for tests: small ones, and files that are not quite traces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_moecxl.control.trace import RoutingTrace

#: Two layers of four experts; two requests, of two and of one token.
LAYERS, EXPERTS = 2, 4
TOPK = np.array([[[0, 1], [2, 3]], [[0, 2], [2, 0]], [[3, 1], [1, 0]]], dtype=np.uint8)
META = {"model": "toy", "num_experts": EXPERTS, "source": "a test", "licence": "Apache-2.0"}


def write_trace(path: Path, *, meta: object = META, **changes: Any) -> Path:
    """A trace in the published format, written without our code; a change of None leaves a field out."""
    fields: dict[str, Any] = {
        "topk": TOPK,
        "weights": np.empty(0, dtype=np.float16),
        "req": np.array([0, 2, 3], dtype=np.int32),
        "prefill": np.zeros(2, dtype=np.int32),
        "token_ids": np.array([7, -1, 9], dtype=np.int32),
        "layer_ids": np.arange(LAYERS, dtype=np.int32),
        "meta": np.array(json.dumps(meta)),
    }
    np.savez(path, **{name: value for name, value in (fields | changes).items() if value is not None})
    return path


def make_trace(**changes: Any) -> RoutingTrace:
    """The same trace, with everything that a trace may have."""
    fields: dict[str, Any] = {
        "topk": TOPK,
        "weights": np.arange(TOPK.size).reshape(TOPK.shape).astype(np.float16),
        "lookahead": TOPK[::-1],
        "req": np.array([0, 2, 3]),
        "prefill": np.array([1, 0]),
        "token_ids": np.array([7, -1, 9]),
        "layer_ids": np.array([3, 5]),
        "domain": np.array(["prose", "c"]),
        "meta": META,
    }
    return RoutingTrace(**(fields | changes))


def assert_same(one: RoutingTrace, other: RoutingTrace) -> None:
    """Every field, with its type."""
    for name in ("topk", "weights", "lookahead", "req", "prefill", "token_ids", "layer_ids", "domain"):
        left, right = getattr(one, name), getattr(other, name)
        assert (left is None) == (right is None), name
        if left is not None:
            assert left.dtype.kind == right.dtype.kind and left.dtype.itemsize == right.dtype.itemsize, name
            assert np.array_equal(left, right), name
    assert one.meta == other.meta


def shared_traces() -> Path:
    """The folder of the published traces; skips the test where there is none."""
    folder = Path(__file__).parents[3] / "shared" / "traces"
    if not folder.is_dir():
        pytest.skip("no folder shared/traces beside the checkout")
    return folder
