"""How precise prefetching is and how much demand it takes away, on the shared traces: each predictor, and all together.

Decode at batch 1 through the engine's own forecast, planner, slots and eviction policy, without time: what is ordered
a layer ahead arrives. Bytes are counted in slabs, which are of one size in a trace. The first half of each trace is
learned from, and figures are of the second.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from benchmarks.common import Result, print_table, save
from benchmarks.policies import OURS, shared_traces, slot_count_of
from vllm_moecxl.control.eviction import POLICIES
from vllm_moecxl.control.foretold import REACH, Foretold, Outcome, foreseen, foretell, replay_foretold
from vllm_moecxl.control.prediction import DEFAULT_PREDICTORS, PREDICTORS
from vllm_moecxl.control.prefetch import PROBABILITY_MIN, PrefetchPlanner
from vllm_moecxl.control.replay import replayable
from vllm_moecxl.control.trace import RoutingTrace

ENSEMBLE = "ensemble"
#: The ensemble, and of what it says only what it says of the very next layer.
NEAREST = f"{ENSEMBLE} (next layer only)"
WITH_ATTENTION = f"{ENSEMBLE} + attention"
WITHOUT = f"{ENSEMBLE} - "
PERFECT = "perfect"
#: Tokens of a request, its prompt included, or one long text would be all that is looked at.
_REQUEST_TOKENS_MAX = 256
_SWEEP = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_SHARES = (0.25, 0.5)
#: Goals: precision everywhere; precision and share of demand removed where a trace has gates applied early.
_PRECISION_GOAL = 0.85
_AHEAD_PRECISION_GOAL, _AHEAD_REMOVED_GOAL = 0.9, 0.75
#: Best single predictor of the table beside the shared traces, recall at k for the next layer.
#: Source: the traces' own README; mixtral-mini's without the gate.
_RECALL_TO_BEAT = {"DeepSeek-V2-Lite": 0.45, "Mixtral-8x7B": 0.40, "mixtral-mini": 0.73}


@dataclass(frozen=True)
class Case:
    """One forecast of a trace, and all replays of what it says.

    Attributes:
        name: of the set of predictors.
        predictors: their names; none for the perfect one.
    """

    trace: Path
    visit_count: int
    name: str
    predictors: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    parser.add_argument(
        "--traces", type=Path, nargs="+", metavar="FILE", help="routing traces; default: the shared ones"
    )
    parser.add_argument(
        "--visits",
        type=int,
        default=9_000,
        metavar="N",
        help="layer visits of each trace, by requests from all over it (default: %(default)s)",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="forecasts side by side")


def run(args: argparse.Namespace) -> Result:
    """Forecast and replay every trace."""
    paths = args.traces or shared_traces()
    if not paths:
        raise SystemExit("prefetch: there are no shared traces beside the checkout: name some with --traces FILE...")
    cases = [case for path in paths for case in _cases(path, args.visits)]
    with ProcessPoolExecutor(args.jobs) as pool:
        found = dict(zip(cases, pool.map(measure, cases), strict=True))
    cells = [_cell(path, share, found) for path in paths for share in _SHARES]
    recalls = {path.stem: _recalls(path, found) for path in paths}
    _print(cells)
    values = {
        "probability_min": PROBABILITY_MIN,
        "eviction": OURS,
        "predictors": list(DEFAULT_PREDICTORS),
        "goal": _goal(cells, recalls),
        "visits": {path.stem: _visit_counts(path, args.visits) for path in paths},
        "precision": _by_trace(cells, "precision"),
        "demand_bytes_removed": _by_trace(cells, "demand_bytes_removed"),
        "recall": recalls,
        "sweep": _sweep(cells),
        "cells": cells,
    }
    return save("prefetch", "simulated", values)


def measure(case: Case) -> Result:
    """Forecast once; replay with each number of slots, by slot share."""
    trace = _load(case.trace, case.visit_count)
    shape = (trace.layer_count, trace.expert_count, trace.topk_count)
    predictors = {name: PREDICTORS[name](*shape) for name in case.predictors}
    foretold = foretell(trace, predictors) if predictors else foreseen(trace)
    result: Result = {"recall": _rounded(foretold.recall(len(foretold.expert_ids) // 2))}
    for share in _SHARES:
        slot_count = slot_count_of(trace, share)
        without = _replay(foretold, slot_count, None)
        rows = {"": _row(_replay(foretold, slot_count, PROBABILITY_MIN), without)}
        if case.name == ENSEMBLE:
            rows[NEAREST] = _row(_replay(foretold, slot_count, PROBABILITY_MIN, reach=1), without)
            rows |= {str(least): _row(_replay(foretold, slot_count, least), without) for least in _SWEEP}
        result[_percent(share)] = {"slot_count": slot_count, "demand_count": without.demand_count, "rows": rows}
    return result


def _replay(foretold: Foretold, slot_count: int, probability_min: float | None, reach: int = REACH) -> Outcome:
    planner = None
    if probability_min is not None:
        planner = PrefetchPlanner(foretold.expert_ids.shape[1], probability_min=probability_min)
    return replay_foretold(
        foretold,
        slot_count,
        lambda slots, experts, layer: POLICIES[OURS](slots, experts),
        planner,
        from_step=len(foretold.expert_ids) // 2,
        reach=reach,
    )


def _row(found: Outcome, without: Outcome) -> Result:
    return {
        "precision": None if found.precision is None else _rounded(found.precision),
        "demand_bytes_removed": _rounded(1 - found.demand_count / without.demand_count),
        # What the link carries, prefetches included, against demand fetches alone.
        "fetched_bytes_ratio": _rounded((found.demand_count + found.issued_count) / without.demand_count),
        "prefetch_count": found.issued_count,
    }


def _cases(path: Path, visit_count: int) -> Iterator[Case]:
    has_gates = _load(path, visit_count).lookahead is not None
    names = [name for name in PREDICTORS if name != "gate" or has_gates]
    ensemble = tuple(name for name in DEFAULT_PREDICTORS if name in names)
    sets: dict[str, Sequence[str]] = {
        ENSEMBLE: ensemble,
        WITH_ATTENTION: (*ensemble, "attention"),
        PERFECT: (),
        **{name: (name,) for name in names},
        **{WITHOUT + name: [other for other in ensemble if other != name] for name in ensemble},
    }
    for name, predictors in sets.items():
        yield Case(path, visit_count, name, tuple(predictors))


@lru_cache(maxsize=1)
def _load(path: Path, visit_count: int) -> RoutingTrace:
    """Requests that are evenly spread over a trace, of as many visits as are wanted."""
    trace = replayable(RoutingTrace.load(path)).cut(tokens_per_request=_REQUEST_TOKENS_MAX)
    decode_counts = np.diff(trace.req) - trace.prefill
    for request_count in range(1, trace.request_count):
        chosen = np.linspace(0, trace.request_count - 1, request_count).round().astype(int)
        if decode_counts[chosen].sum() * trace.layer_count >= visit_count:
            return RoutingTrace.merge([trace.cut(slice(number, number + 1)) for number in chosen.tolist()])
    return trace


def _visit_counts(path: Path, visit_count: int) -> Result:
    trace = _load(path, visit_count)
    step_count = int(np.count_nonzero(trace.decode_mask()))
    return {
        "requests": trace.request_count,
        "decode_tokens": step_count,
        "visits": step_count * trace.layer_count,
        "counted_visits": (step_count - step_count // 2) * trace.layer_count,
    }


def _cell(path: Path, share: float, found: Mapping[Case, Result]) -> Result:
    sets = {case.name: result[_percent(share)] for case, result in found.items() if case.trace == path}
    ensemble = sets[ENSEMBLE]
    rows = {name: one["rows"][""] for name, one in sets.items()}
    rows[NEAREST] = ensemble["rows"][NEAREST]
    singles = [name for name in rows if name in PREDICTORS]
    return {
        "trace": path.stem,
        "slots": _percent(share),
        "slot_count": ensemble["slot_count"],
        "has_lookahead": "gate" in singles,
        "demand_count_without": ensemble["demand_count"],
        "precision": rows[ENSEMBLE]["precision"],
        "demand_bytes_removed": rows[ENSEMBLE]["demand_bytes_removed"],
        "ensembles": {name: rows[name] for name in (ENSEMBLE, NEAREST, WITH_ATTENTION)},
        "predictors": {name: rows[name] for name in singles},
        "ablation": {name: row for name, row in rows.items() if name.startswith(WITHOUT)},
        "perfect": rows[PERFECT],
        "sweep": {str(least): ensemble["rows"][str(least)] for least in _SWEEP},
    }


def _recalls(path: Path, found: Mapping[Case, Result]) -> Result:
    return {case.name: result["recall"] for case, result in found.items() if case.trace == path}


def _by_trace(cells: Sequence[Result], key: str) -> Result:
    values: Result = {}
    for cell in cells:
        values.setdefault(cell["trace"], {})[cell["slots"]] = cell[key]
    return values


def _sweep(cells: Sequence[Result]) -> list[Result]:
    """For each threshold, how the worst cell of each kind does."""
    rows = []
    for least in _SWEEP:
        found = [(cell["has_lookahead"], cell["sweep"][str(least)]) for cell in cells]
        ahead = [row for has_lookahead, row in found if has_lookahead]
        blind = [row for has_lookahead, row in found if not has_lookahead]
        row: Result = {"probability_min": least}
        for kind, some in (("lookahead", ahead), ("without_lookahead", blind)):
            row[f"{kind}_precision_min"] = min((one["precision"] or 0.0 for one in some), default=None)
            row[f"{kind}_removed_min"] = min((one["demand_bytes_removed"] for one in some), default=None)
        rows.append(row)
    return rows


def _goal(cells: Sequence[Result], recalls: Mapping[str, Result]) -> Result:
    """How many cells, or traces, reach what is aimed at."""
    ahead = [cell for cell in cells if cell["has_lookahead"]]
    models = {trace: next((one for one in _RECALL_TO_BEAT if _key(one) in _key(trace)), None) for trace in recalls}
    known = {trace: _RECALL_TO_BEAT[model] for trace, model in models.items() if model is not None}
    return {
        "cells": len(cells),
        "precision_at_least_85_percent": sum((cell["precision"] or 0.0) >= _PRECISION_GOAL for cell in cells),
        "cells_with_lookahead": len(ahead),
        "of_them_90_percent_precise": sum((cell["precision"] or 0.0) >= _AHEAD_PRECISION_GOAL for cell in ahead),
        "of_them_75_percent_removed": sum(cell["demand_bytes_removed"] >= _AHEAD_REMOVED_GOAL for cell in ahead),
        "recall_to_beat": known,
        "recall_above_it": sum(recalls[trace][ENSEMBLE] > best for trace, best in known.items()),
        "recall_above_our_own_single_predictors": sum(
            recall[ENSEMBLE] > max(value for name, value in recall.items() if name in PREDICTORS)
            for recall in recalls.values()
        ),
    }


def _print(cells: Sequence[Result]) -> None:
    rows: list[list[object]] = []
    for cell in cells:
        named = {**cell["ensembles"], **cell["predictors"], **cell["ablation"], PERFECT: cell["perfect"]}
        named |= {f"probability >= {least}": row for least, row in cell["sweep"].items()}
        for name, row in named.items():
            precision = "-" if row["precision"] is None else f"{100 * row['precision']:.1f}"
            removed, ratio = f"{100 * row['demand_bytes_removed']:.1f}", f"{row['fetched_bytes_ratio']:.2f}"
            rows.append([cell["trace"], cell["slots"], name, precision, removed, ratio])
    print_table(["trace", "slots", "predictors", "precision", "removed", "bytes"], rows)


def _key(name: str) -> str:
    return name.lower().replace("-", "")


def _percent(share: float) -> str:
    return f"{100 * share:g}%"


def _rounded(value: float) -> float:
    return round(value, 4)
