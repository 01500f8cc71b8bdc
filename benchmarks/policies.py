"""What each eviction policy makes of the shared routing traces, beside libcachesim's policies and Belady's bound.

Decode at batch 1, demand fetches only; slots keep what they hold from request to request. Hit rates are shares of the
experts that tokens ask for; bytes are what the misses would fetch from an unquantised model.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.common import Result, print_table, save
from vllm_moecxl.config import OffloadConfig
from vllm_moecxl.control.budgets import budgets, miss_curves
from vllm_moecxl.control.eviction import POLICIES
from vllm_moecxl.control.replay import Hits, belady, replay, replayable
from vllm_moecxl.control.trace import RoutingTrace

OURS = OffloadConfig.__dataclass_fields__["eviction"].default
BOUND = "belady"
#: Our default with the same number of slots in all, shared out over the layers by the trace's first tokens.
BUDGETS = f"{OURS}-budgets"
#: Share of a trace's tokens that the budgets are made from; figures include them.
_BUDGET_SHARE = 0.25
#: Beside these, without predictions `next-use` is `lfru`, and without prompts `prefill-protecting` is what it protects.
_OWN = tuple(name for name in POLICIES if name not in ("next-use", "prefill-protecting"))
_PEER = "libcachesim-"
#: Its W-TinyLFU divides the main cache into four segments.
_SEGMENTED_COUNT_MIN = 8
#: libcachesim's classes, and what they need at a handful of slots: queues of less than a slot or two hit nothing.
_PEERS: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "lru": ("LRU", lambda slot_count: {}),
    "lfu": ("LFU", lambda slot_count: {}),
    "arc": ("ARC", lambda slot_count: {}),
    "s3-fifo": ("S3FIFO", lambda slot_count: {"small_size_ratio": min(0.5, max(0.1, 2 / slot_count))}),
    "sieve": ("Sieve", lambda slot_count: {}),
    "w-tinylfu": (
        "WTinyLFU",
        lambda slot_count: {
            "window_size": max(0.01, 1 / slot_count),
            **({"main_cache": "LRU"} if slot_count < _SEGMENTED_COUNT_MIN else {}),
        },
    ),
    "belady": ("Belady", lambda slot_count: {}),
}
_BOUNDS = (BOUND, _PEER + BOUND)
_POLICY_NAMES = (*_OWN, BUDGETS, BOUND, *(_PEER + name for name in _PEERS))
#: Hidden and expert sizes of the models whose traces are shared; a slab is three such matrices in bfloat16.
_SIZES = {"DeepSeek-V2-Lite": (2048, 1408), "Mixtral-8x7B": (4096, 14336), "mixtral-mini": (256, 512)}

#: One request of libcachesim's binary traces; `next_request` serves its Belady.
_REQUEST = np.dtype([("time", "<u4"), ("object", "<u8"), ("size", "<u4"), ("next_request", "<i8")])
#: Where the shared traces lie beside a checkout.
_SHARED_TRACES = Path(__file__).parent.parent.parent / "shared" / "traces"


@dataclass(frozen=True)
class Case:
    """One replay of a whole trace.

    Attributes:
        slots: share of a layer's experts.
    """

    trace: Path
    slots: float
    policy: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--traces", type=Path, nargs="+", metavar="FILE", help="routing traces; default: the shared ones"
    )
    parser.add_argument("--slots", type=_share, nargs="+", default=[0.25, 0.5, 0.75], metavar="SHARE", help="25%% ...")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="replays side by side")


def _share(text: str) -> float:
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = 0.0
    if not text.endswith("%") or not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share of a layer's experts: give one like 25%")
    return share


def shared_traces() -> list[Path]:
    """The routing traces beside the checkout; files of other things have no `topk`."""
    traces = []
    for path in sorted(_SHARED_TRACES.glob("*/*.npz")):
        with np.load(path) as file:
            if "topk" in file:
                traces.append(path)
    return traces


def run(args: argparse.Namespace) -> Result:
    paths = args.traces or shared_traces()
    if not paths:
        raise SystemExit("policies: there are no shared traces beside the checkout: name some with --traces FILE...")
    cases = [Case(path, share, policy) for path in paths for share in args.slots for policy in _POLICY_NAMES]
    with ProcessPoolExecutor(args.jobs) as pool:
        outcomes = dict(zip(cases, pool.map(measure, cases), strict=True))
    cells = [
        _cell(path, share, {name: outcomes[Case(path, share, name)] for name in _POLICY_NAMES})
        for path in paths
        for share in args.slots
    ]
    print_table(
        ["trace", "slots", *_POLICY_NAMES],
        [
            [cell["trace"], cell["slots"], *(f"{100 * cell['policies'][n]['hit_rate']:.1f}" for n in _POLICY_NAMES)]
            for cell in cells
        ],
    )
    return save("policies", "simulated", {"default": OURS, "goal": _goal(cells), "cells": cells})


def measure(case: Case) -> Hits:
    """Replay one case."""
    trace = _load(case.trace)
    slot_counts = [slot_count_of(trace, case.slots)] * trace.layer_count
    if case.policy.startswith(_PEER):
        return _measure_peer(trace, slot_counts[0], case.policy.removeprefix(_PEER))
    if case.policy == BOUND:
        return replay(trace, slot_counts, belady(trace))
    if case.policy == BUDGETS:
        slot_counts = _budgets(trace, slot_counts)
    make = POLICIES[OURS if case.policy == BUDGETS else case.policy]
    return replay(trace, slot_counts, lambda slot_count, expert_count, layer: make(slot_count, expert_count))


def slot_count_of(trace: RoutingTrace, share: float) -> int:
    """Slots of a layer, as the option `slots` counts them."""
    return max(trace.topk_count, int(trace.expert_count * share + 1e-9))


@lru_cache(maxsize=1)
def _load(path: Path) -> RoutingTrace:
    return replayable(RoutingTrace.load(path))


def _budgets(trace: RoutingTrace, slot_counts: Sequence[int]) -> list[int]:
    mask = trace.decode_mask()
    count = max(1, int(_BUDGET_SHARE * np.count_nonzero(mask)))
    seen = replace(
        trace,
        topk=trace.topk[mask][:count],
        weights=None,
        lookahead=None,
        req=np.array([0, count]),
        prefill=np.zeros(1, np.int32),
        token_ids=trace.token_ids[mask][:count],
        domain=None,
    )
    return budgets(list(miss_curves(seen)), sum(slot_counts), trace.topk_count).tolist()


def _measure_peer(trace: RoutingTrace, slot_count: int, name: str) -> Hits:
    """Hits of a policy of libcachesim: a cache a layer, whose experts are asked for one after the other."""
    rows = trace.topk[trace.decode_mask()]
    hit_count = 0
    with tempfile.TemporaryDirectory() as folder:
        for layer in range(trace.layer_count):
            path = Path(folder) / f"{layer}.oracleGeneral.bin"
            requests = _requests(rows[:, layer].ravel().astype(np.int64))
            requests.tofile(path)
            hit_count += round(len(requests) * (1 - _peer_miss_rate(path, slot_count, name)))
            path.unlink()
    return Hits(rows.size, hit_count)


def _peer_miss_rate(path: Path, slot_count: int, name: str) -> float:
    import libcachesim  # only this benchmark needs it: pip install libcachesim==0.3.5

    class_name, options = _PEERS[name]
    reader = libcachesim.TraceReader(
        str(path), libcachesim.TraceType.ORACLE_GENERAL_TRACE, libcachesim.ReaderInitParam(ignore_obj_size=True)
    )
    cache: Any = getattr(libcachesim, class_name)(slot_count, hashpower=10, **options(slot_count))
    miss_rate: float = cache.process_trace(reader)[0]
    return miss_rate


def _requests(expert_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.void]:
    """[requests] `_REQUEST`, one for each expert id."""
    order = np.argsort(expert_ids, kind="stable")
    is_followed = expert_ids[order[1:]] == expert_ids[order[:-1]]
    requests = np.zeros(len(expert_ids), dtype=_REQUEST)
    requests["time"] = np.arange(len(expert_ids))
    requests["object"] = expert_ids
    requests["size"] = 1
    requests["next_request"] = -1
    requests["next_request"][order[:-1][is_followed]] = order[1:][is_followed]
    return requests


def _cell(path: Path, share: float, outcomes: dict[str, Hits]) -> Result:
    trace = _load(path)
    # What splits the slots unevenly is no other policy: it would serve any of them.
    others = [name for name in outcomes if name not in (OURS, BUDGETS, *_BOUNDS)]
    best_other = max(others, key=lambda name: outcomes[name].hit_rate)
    ours, bound = outcomes[OURS].hit_rate, outcomes[BOUND].hit_rate
    return {
        "trace": path.stem,
        "slots": f"{100 * share:g}%",
        "slot_count": slot_count_of(trace, share),
        "lookups": outcomes[OURS].lookup_count,
        "ours": round(ours, 4),
        "best_other": round(outcomes[best_other].hit_rate, 4),
        "best_other_name": best_other,
        "belady": round(bound, 4),
        "share_of_belady": round(ours / bound, 4),
        "policies": {
            name: {"hit_rate": round(hits.hit_rate, 4), "fetch_bytes": _fetch_bytes(trace, hits)}
            for name, hits in outcomes.items()
        },
    }


def _fetch_bytes(trace: RoutingTrace, hits: Hits) -> int | None:
    """None where the model's sizes are unknown."""
    model = str(trace.meta.get("model"))
    for name, (hidden_size, expert_size) in _SIZES.items():
        if name in model:
            return hits.fetch_bytes(3 * 2 * hidden_size * expert_size)
    return None


def _goal(cells: Sequence[Result]) -> Result:
    """How many cells reach what the default is meant to reach."""
    return {
        "cells": len(cells),
        "at_least_as_good_as_the_best_other": sum(cell["ours"] >= cell["best_other"] for cell in cells),
        "at_least_90_percent_of_belady": sum(cell["share_of_belady"] >= 0.9 for cell in cells),
    }
