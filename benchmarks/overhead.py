"""What offloading costs where nothing is missing: every expert in a slot, against plain vLLM, and our Python alone."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.common import FIXTURE_MODEL, Result, print_table, quantile, save
from benchmarks.engines import call_in_child, make_engine
from benchmarks.widen import widen

_SEED = 5
_VOCABULARY_SIZE = 2000
_BOOTSTRAP_COUNT = 2_000

#: Work of one measurement: (sequences, prompt tokens of each, tokens to generate).
_WORK = {
    "decode": (8, 4, 6),
    "decode_batch1": (1, 4, 16),
    "prefill": (1, 256, 1),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--intermediate-size", type=int, default=8192, help="width that the fixture's experts get")
    parser.add_argument("--pairs", type=int, default=150, help="measurements of each engine and kind of work")
    parser.add_argument("--calls", type=int, default=4_000, help="calls of one round of the control path")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of the control path")


def run(args: argparse.Namespace) -> Result:
    """Measure, print and save."""
    counts = {"call_count": args.calls, "round_count": args.rounds}
    control = call_in_child("benchmarks.overhead", "control_path", **counts)["cases"]
    with tempfile.TemporaryDirectory() as folder:
        widen(FIXTURE_MODEL, Path(folder), args.intermediate_size)
        ratios = call_in_child("benchmarks.overhead", "compare", model=folder, pair_count=args.pairs)
    in_engine = ratios.pop("in_engine")
    result = save(
        "overhead",
        "hardware",
        {
            **{f"{work}_ratio": ratios[work]["ratio"] for work in _WORK},
            "control_us_median": max(case["us_median"] for case in control),
            "control_us_p99": max(case["us_p99"] for case in control),
            "control": control,
            "control_in_engine": in_engine,
            "throughput": ratios,
            "model": f"{FIXTURE_MODEL.name}, experts widened to {args.intermediate_size}",
            "pairs": args.pairs,
        },
    )
    print_table(list(control[0]), [list(case.values()) for case in control])
    print(f"in the engine: {in_engine}\n")
    print_table(["work", *ratios["decode"]], [[work, *values.values()] for work, values in ratios.items()])
    return result


def control_path(call_count: int, round_count: int) -> Result:
    """The microseconds of our control path, by case; in a child, for its environment."""
    from benchmarks.control_path import measure_all

    return {"cases": measure_all(call_count, round_count)}


def compare(model: str, pair_count: int) -> Result:
    """Both engines side by side in this process, in turn: each pair of neighbours gives one ratio."""
    plain = make_engine(Path(model), slots=None)
    offloaded = make_engine(Path(model), slots="100%", moe_offload={"in_place": "never"})
    _require_full_hits(offloaded)
    results = {}
    for work, (sequence_count, prompt_length, new_count) in _WORK.items():
        prompts = _prompts(sequence_count, prompt_length)
        token_count = sequence_count * (new_count if new_count > 1 else prompt_length)
        results[work] = _pairs(
            lambda prompts=prompts, count=new_count: _seconds(plain, prompts, count),
            lambda prompts=prompts, count=new_count: _seconds(offloaded, prompts, count),
            pair_count,
            token_count,
        )
    results["in_engine"] = _control_in_engine(offloaded)
    return results


def _control_in_engine(llm: Any) -> Result:
    """Microseconds of dispatch beside the kernel in decode steps of a real engine, its caches full of weights."""
    from vllm_moecxl.runtime.dispatch import Dispatch

    clock = time.perf_counter_ns
    added_ns: list[int] = []
    kernel_ns = [0]
    call = Dispatch.__call__

    def timed_call(self: Dispatch, *args: Any) -> Any:
        started = clock()
        output = call(self, *args)
        added_ns.append(clock() - started - kernel_ns[0])
        return output

    def timed(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def timed_kernel(*args: Any) -> Any:
            started = clock()
            output = kernel(*args)
            kernel_ns[0] = clock() - started
            return output

        return timed_kernel

    def instrument(model: Any) -> None:
        for dispatch in model.moe_offload_runtime.dispatches.values():
            dispatch._kernel = timed(dispatch._kernel)

    llm.apply_model(instrument)
    Dispatch.__call__ = timed_call  # type: ignore[method-assign]
    _seconds(llm, _prompts(8, 4), 200)
    added_us = [time_ns / 1e3 for time_ns in added_ns]
    return {
        "tokens": 8,
        "us_median": round(median(added_us), 2),
        "us_p99": round(quantile(added_us, 0.99), 2),
        "calls": len(added_us),
    }


def _pairs(plain: Callable[[], float], offloaded: Callable[[], float], pair_count: int, token_count: int) -> Result:
    for _ in range(3):
        plain(), offloaded()
    plain_s, offloaded_s = [], []
    for index in range(pair_count):
        # A B B A: what drifts hits both alike.
        for is_plain in (True, False) if index % 2 == 0 else (False, True):
            (plain_s if is_plain else offloaded_s).append((plain if is_plain else offloaded)())
    ratios = np.array(plain_s) / np.array(offloaded_s)
    medians = np.median(np.random.default_rng(_SEED).choice(ratios, (_BOOTSTRAP_COUNT, pair_count)), axis=1)
    return {
        "ratio": round(float(np.median(ratios)), 4),
        "ratio_low": round(float(np.quantile(medians, 0.025)), 4),
        "ratio_high": round(float(np.quantile(medians, 0.975)), 4),
        "ratio_p25": round(float(np.quantile(ratios, 0.25)), 4),
        "ratio_p75": round(float(np.quantile(ratios, 0.75)), 4),
        "ratio_when_quiet": round(quantile(plain_s, 0.1) / quantile(offloaded_s, 0.1), 4),
        "plain_tokens_per_s": round(token_count / median(plain_s), 1),
        "offloaded_tokens_per_s": round(token_count / median(offloaded_s), 1),
    }


def _prompts(count: int, length: int) -> list[dict[str, list[int]]]:
    rng = np.random.default_rng(_SEED)
    return [{"prompt_token_ids": rng.integers(1, _VOCABULARY_SIZE, length).tolist()} for _ in range(count)]


def _seconds(llm: Any, prompts: list[dict[str, list[int]]], new_count: int) -> float:
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=new_count, ignore_eos=True)
    started = time.perf_counter()
    llm.generate(prompts, parameters, use_tqdm=False)
    return time.perf_counter() - started


def _require_full_hits(llm: Any) -> None:
    """Fill all slots, and check that nothing is missed from then on."""
    _seconds(llm, _prompts(8, 512), 1)
    before = _lookups(llm)
    _seconds(llm, _prompts(8, 64), 4)
    after = _lookups(llm)
    assert after["miss"] == before["miss"] and after["hit"] > before["hit"], (before, after)


def _lookups(llm: Any) -> dict[str, float]:
    rows = llm.collective_rpc("moe_offload_stats")[0]
    return {labels["outcome"]: value for name, labels, value in rows if name.endswith("lookups_total")}
