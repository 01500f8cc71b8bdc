"""What a long prefill does to others' inter-token times: half of the experts in slots, against resident vLLM.

A window: steady requests decode, a request as long as the model's context comes in and is prefilled in chunks beside
them, and they go on for a while. Both engines get the same steps, in turn, and have to give the same tokens.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import Result, print_table, quantile, save, trained_model
from benchmarks.engines import call_in_child, make_engine, offload_figures, offload_stats, offload_stats_since
from benchmarks.pacing import copy_bytes_per_s, paced_bank
from benchmarks.sessions import Session, text_prompts
from benchmarks.widen import widen

_SLOTS = "50%"
_PACE_SHARE = 0.5
_STEADY_COUNT = 4
_STEADY_PROMPT_LENGTH = 32
#: Tokens of the steady requests before the prefill comes in, and after it.
_BEFORE_COUNT = 12
_AFTER_COUNT = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--intermediate-size", type=int, default=8192, help="width that the model's experts get")
    parser.add_argument(
        "--chunk", type=int, default=256, help="max_num_batched_tokens: the prefill comes in such pieces"
    )
    parser.add_argument("--rounds", type=int, default=8, help="windows of each engine, in turn")
    parser.add_argument("--quick", action="store_true", help="two rounds with narrow experts; nothing is saved")


def run(args: argparse.Namespace) -> Result:
    """Measure, print and save."""
    source = trained_model()
    width = 1024 if args.quick else args.intermediate_size
    copy_rate = copy_bytes_per_s()
    bank = paced_bank(_PACE_SHARE * copy_rate)
    variants: dict[str, Result] = {
        "copying": {"banks": ["dram"], "in_place": "never"},
        "in_place": {"banks": ["dram"]},
        "paced": {"banks": [bank]},
    }
    with tempfile.TemporaryDirectory() as folder:
        widen(source, Path(folder), width)
        work = {"model": folder, "chunk": args.chunk, "round_count": 2 if args.quick else args.rounds}
        cases = {
            name: call_in_child("benchmarks.interference", "compare", moe_offload=options, **work)
            for name, options in variants.items()
        }
    values = {
        "itl_p99_ratio": cases["copying"]["itl_p99_ratio"],
        "itl_p99_ratio_in_place": cases["in_place"]["itl_p99_ratio"],
        "itl_p99_ratio_paced": cases["paced"]["itl_p99_ratio"],
        "ttft_ratio": cases["copying"]["ttft_ratio"],
        "copy_bytes_per_s": round(copy_rate),
        "paced_bank": bank,
        "labels": {"copying": "hardware", "in_place": "hardware", "paced": "emulated-paced"},
        "model": f"{source.name}, experts widened to {width}",
        "slots": _SLOTS,
        "steady_requests": _STEADY_COUNT,
        "chunk_tokens": args.chunk,
        "rounds": work["round_count"],
        "clock": "inter-token times of the steady requests from the arrival of the prefill to the end of the window",
        "cases": cases,
    }
    _print(values)
    return values if args.quick else save("interference", "hardware", values)


@dataclass(frozen=True)
class Window:
    """One window of one engine.

    Attributes:
        before_s, during_s, after_s: inter-token times of the steady requests: until the prefill comes in, until it has
            its first token, and from then on.
        ttft_s: of the request with the long prompt.
        token_ids: of all requests.
        prefill_counters: growth of our counters while the long prompt was prefilled; none of resident vLLM's.
    """

    before_s: list[float]
    during_s: list[float]
    after_s: list[float]
    ttft_s: float
    token_ids: list[list[int]]
    prefill_counters: dict[str, float]


def compare(model: str, moe_offload: Result, chunk: int, round_count: int) -> Result:
    """Resident vLLM and ours in this process, in turn.

    Raises:
        RuntimeError: their tokens differ.
    """
    config = json.loads(Path(model, "config.json").read_text())
    context = config["max_position_embeddings"]
    limits = {"max_model_len": context, "max_num_batched_tokens": chunk}
    resident = make_engine(Path(model), slots=None, **limits)
    ours = make_engine(Path(model), slots=_SLOTS, moe_offload=moe_offload, **limits)
    steady_prompts = text_prompts(Path(model), _STEADY_COUNT, _STEADY_PROMPT_LENGTH)
    # The warm-up's prompt is one of its own.
    first_prompt, *long_prompts = text_prompts(Path(model), round_count + 1, context - 1)
    readers: dict[int, Callable[[], dict[str, float]]] = {id(resident): dict, id(ours): partial(offload_stats, ours)}
    for llm in (resident, ours):
        _window(llm, steady_prompts, first_prompt, readers[id(llm)])
    before = offload_stats(ours)
    pairs: list[tuple[Window, Window]] = []
    for index, prompt in enumerate(long_prompts):
        # A B B A: what drifts hits both alike.
        order = (resident, ours) if index % 2 == 0 else (ours, resident)
        windows = {id(llm): _window(llm, steady_prompts, prompt, readers[id(llm)]) for llm in order}
        pairs.append((windows[id(resident)], windows[id(ours)]))
        if pairs[-1][0].token_ids != pairs[-1][1].token_ids:
            raise RuntimeError(f"interference: with {moe_offload} the tokens are not those of resident vLLM")
    theirs, mine = (_summary(windows) for windows in zip(*pairs, strict=True))
    p99_ratios = [_p99(mine) / _p99(theirs) for theirs, mine in pairs]
    return {
        "itl_p99_ratio": round(mine["itl_ms_p99"] / theirs["itl_ms_p99"], 4),
        "itl_p99_ratio_median": round(median(p99_ratios), 4),
        "itl_p99_ratio_by_round": [round(ratio, 4) for ratio in p99_ratios],
        "itl_ratio_before": round(mine["itl_ms_before"] / theirs["itl_ms_before"], 4),
        "itl_ratio_after": round(mine["itl_ms_after"] / theirs["itl_ms_after"], 4),
        "ttft_ratio": round(mine["ttft_ms"] / theirs["ttft_ms"], 4),
        "options": moe_offload,
        "resident": theirs,
        "ours": mine,
        "counters": offload_figures(offload_stats_since(ours, before)),
        "prefill_counters": offload_figures(_sum(window.prefill_counters for _, window in pairs)),
    }


def _window(
    llm: Any,
    steady_prompts: Sequence[Sequence[int]],
    long_prompt: Sequence[int],
    read_counters: Callable[[], dict[str, float]],
) -> Window:
    session = Session(llm)
    # More tokens than the window has steps: they are aborted at its end.
    steady = [session.add(prompt, len(long_prompt) - len(prompt)) for prompt in steady_prompts]
    while min(len(request.token_ids) for request in steady) < _BEFORE_COUNT:
        session.step()
    counters = read_counters()
    long = session.add(long_prompt, 1)
    while not long.token_ids:
        session.step()
    prefill_counters = {name: value - counters[name] for name, value in read_counters().items()}
    for _ in range(_AFTER_COUNT):
        session.step()
    session.abort()
    arrived_s, prefilled_s = long.added_s, long.times_s[0]

    def gaps_s(from_s: float, to_s: float) -> list[float]:
        return [
            gap_s
            for request in steady
            for time_s, gap_s in zip(request.times_s[1:], request.gaps_s, strict=True)
            if from_s < time_s <= to_s
        ]

    return Window(
        gaps_s(0.0, arrived_s),
        gaps_s(arrived_s, prefilled_s),
        gaps_s(prefilled_s, float("inf")),
        prefilled_s - arrived_s,
        [request.token_ids for request in (*steady, long)],
        prefill_counters,
    )


def _p99(window: Window) -> float:
    return quantile([*window.during_s, *window.after_s], 0.99)


def _summary(windows: Sequence[Window]) -> Result:
    """Milliseconds of all windows together; medians where nothing else is said."""
    during_s = [gap_s for window in windows for gap_s in window.during_s]
    after_s = [gap_s for window in windows for gap_s in window.after_s]
    all_s = [*during_s, *after_s]
    figures_s = {
        "itl_ms_p99": quantile(all_s, 0.99),
        "itl_ms_max": max(all_s),
        "itl_ms_median": median(all_s),
        "itl_ms_before": median(gap_s for window in windows for gap_s in window.before_s),
        "itl_ms_during": median(during_s),
        "itl_ms_after": median(after_s),
        "ttft_ms": median(window.ttft_s for window in windows),
    }
    return {name: round(1e3 * value_s, 3) for name, value_s in figures_s.items()} | {"itl_count": len(all_s)}


def _sum(counters: Iterable[dict[str, float]]) -> dict[str, float]:
    total: Counter[str] = Counter()
    for one in counters:
        total.update(one)
    return dict(total)


def _print(values: Result) -> None:
    columns = ["itl_ms_before", "itl_ms_during", "itl_ms_after", "itl_ms_p99", "ttft_ms"]
    rows = []
    for name, case in values["cases"].items():
        rows.append([f"{name}: resident", *(case["resident"][column] for column in columns), "", ""])
        ratios = [case["itl_p99_ratio"], case["ttft_ratio"]]
        rows.append([f"{name}: ours", *(case["ours"][column] for column in columns), *ratios])
    print_table(["engine", *columns, "itl p99 ratio", "ttft ratio"], rows)
    print(f"this machine copies {values['copy_bytes_per_s'] / 1e9:.3g} GB/s; paced: {values['paced_bank']}")
