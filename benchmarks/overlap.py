"""How much of the copying hides behind computing: half of the experts in slots, homes at half of this machine's pace.

In one process and in turn: plain vLLM, fetches by the forward itself, the same beside the forward (with the sidecar),
and that once more without a layer buffer, so that what does not fit the slots runs in token passes.

`hidden_share` is 1 - (seconds that forwards waited) / (seconds in which the bank had copies under way). Decode counts
from the first tokens on, with their prefill left out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import Result, print_table, quantile, save, trained_model
from benchmarks.engines import call_in_child, make_engine, offload_figures, offload_stats, offload_stats_since
from benchmarks.pacing import copy_bytes_per_s, keeps_pace, paced_bank
from benchmarks.sessions import Session, text_prompts
from benchmarks.widen import widen

_SLOTS = "50%"
_PACE_SHARE = 0.5
_QUICK_WIDTH = 1024
_PROMPT_LENGTH = 32
#: Prefills follow each other: a forward has room for one.
_PREFILL_COUNT = 4
_PREFILL_LENGTH = 512
#: Tokens that a sequence decodes before anything is measured.
_WARMUP_COUNT = 8
#: Sequences of each kind of decode.
_DECODES = {"decode_batch1": 1, "decode_batch4": 4, "decode_batch8": 8}
_PREFILL = "prefill"
#: Options of our engines; None is plain vLLM.
_ENGINES: dict[str, Result | None] = {
    "resident": None,
    "without": {"sidecar": False},
    "with": {"sidecar": True},
    "with_token_passes": {"sidecar": True, "layer_buffer": False},
}
_HEADLINE = "decode_batch8"
_SIDECAR_THREAD = "moecxl-sidecar"
#: The sidecar promises never to hold the GIL for longer.
_GIL_US_MAX = 200.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--intermediate-size", type=int, default=8192, help="width that the model's experts get")
    parser.add_argument("--new-tokens", type=int, default=48, help="tokens that a sequence decodes")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each engine and kind of work, in turn")
    parser.add_argument("--quick", action="store_true", help="little work with narrow experts; nothing is saved")


def run(args: argparse.Namespace) -> Result:
    """Measure, print and save."""
    source = trained_model()
    width = _QUICK_WIDTH if args.quick else args.intermediate_size
    work = (
        {"new_count": 8, "round_count": 2} if args.quick else {"new_count": args.new_tokens, "round_count": args.rounds}
    )
    copy_rate = copy_bytes_per_s()
    bank = paced_bank(_PACE_SHARE * copy_rate)
    with tempfile.TemporaryDirectory() as folder:
        widen(source, Path(folder), width)
        measured = call_in_child("benchmarks.overlap", "compare", model=folder, bank=bank, **work)
    works = measured["works"]
    values = {
        "hidden_share": works[_HEADLINE]["engines"]["with"]["hidden_share"],
        "hidden_share_token_passes": works[_HEADLINE]["engines"]["with_token_passes"]["hidden_share"],
        "hidden_share_prefill": works[_PREFILL]["engines"]["with"]["hidden_share"],
        "sidecar_speedup": works[_HEADLINE]["sidecar_speedup"],
        **{f"sidecar_speedup_{name}": figures["sidecar_speedup"] for name, figures in works.items()},
        **measured["sidecar"],
        "copy_bytes_per_s": round(copy_rate),
        "bank": bank,
        "bank_keeps_pace": measured["bank_keeps_pace"],
        "model": f"{source.name}, experts widened to {width}",
        "slots": _SLOTS,
        "rounds": work["round_count"],
        "new_tokens": work["new_count"],
        "works": works,
    }
    _print(values)
    return values if args.quick else save("overlap", "emulated-paced", values)


@dataclass(frozen=True)
class Engine:
    """An engine and our threads in it.

    Attributes:
        threads: those that it started.
    """

    llm: Any
    is_ours: bool
    threads: list[threading.Thread]

    @property
    def cpu_s(self) -> dict[str, float]:
        """Processor time of our threads by name, since they began."""
        return {
            thread.name: time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
            for thread in self.threads
            if thread.ident and thread.is_alive()
        }


@dataclass(frozen=True)
class Tick:
    """One tick of a sidecar.

    Attributes:
        thread_id: who ran it.
        cpu_us: its processor time.
        wall_us: from beginning to end.
    """

    thread_id: int
    cpu_us: float
    wall_us: float


@dataclass
class Measurements:
    """What one engine did with one kind of work, all rounds of it.

    Attributes:
        durations_s: of each round.
        token_count: of one round.
        token_ids: of the last round.
        counters: growth of our counters in all rounds.
        cpu_s: by the names of our threads, their processor time.
        ticks: of the sidecar.
    """

    token_count: int = 0
    durations_s: list[float] = field(default_factory=list)
    token_ids: list[list[int]] = field(default_factory=list)
    counters: dict[str, float] = field(default_factory=dict)
    cpu_s: dict[str, float] = field(default_factory=dict)
    ticks: list[Tick] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> list[float]:
        """Of each round."""
        return [self.token_count / duration_s for duration_s in self.durations_s]


def compare(model: str, bank: str, new_count: int, round_count: int) -> Result:
    """All engines in this process, in turn.

    Raises:
        RuntimeError: their tokens differ.
    """
    context = json.loads(Path(model, "config.json").read_text())["max_position_embeddings"]
    limits = {"max_model_len": context, "max_num_batched_tokens": _PREFILL_LENGTH}
    prompts = {name: text_prompts(Path(model), count, _PROMPT_LENGTH) for name, count in _DECODES.items()}
    prompts[_PREFILL] = text_prompts(Path(model), _PREFILL_COUNT, _PREFILL_LENGTH)
    with _recorded_ticks() as ticks:
        engines = {
            name: _start(Path(model), bank, options, limits, prompts[_HEADLINE]) for name, options in _ENGINES.items()
        }
        works = {}
        for work, work_prompts in prompts.items():
            results = {name: Measurements() for name in engines}
            count = 1 if work == _PREFILL else new_count
            for index in range(round_count):
                # A B B A: what drifts hits all alike.
                for name in list(engines)[:: 1 if index % 2 == 0 else -1]:
                    _measure(engines[name], work_prompts, count, results[name], ticks)
            if any(result.token_ids != results["resident"].token_ids for result in results.values()):
                raise RuntimeError(f"overlap: {work}: not all engines give the tokens of resident vLLM")
            works[work] = results
    pace = [engine.llm.apply_model(keeps_pace)[0] for engine in engines.values() if engine.is_ours]
    return {
        "works": {work: _figures(results) for work, results in works.items()},
        "sidecar": _sidecar_figures([works[work][name] for work in works for name in ("with", "with_token_passes")]),
        "bank_keeps_pace": all(pace),
    }


def _start(model: Path, bank: str, options: Result | None, limits: Result, prompts: Sequence[Sequence[int]]) -> Engine:
    """An engine with its slots and buffers filled and its threads running."""
    others = set(threading.enumerate())
    slots = None if options is None else _SLOTS
    llm = make_engine(model, slots=slots, banks=[bank], moe_offload=options, **limits)
    # One at a time fills the slots: what is wider may go past them. Then all together.
    for together in (*([prompt] for prompt in prompts), prompts):
        session = Session(llm)
        requests = [session.add(prompt, _WARMUP_COUNT) for prompt in together]
        while any(len(request.token_ids) < _WARMUP_COUNT for request in requests):
            session.step()
    ours = [one for one in threading.enumerate() if one not in others and one.name.startswith("moecxl-")]
    return Engine(llm, options is not None, ours)


def _measure(
    engine: Engine, prompts: Sequence[Sequence[int]], new_count: int, result: Measurements, ticks: Sequence[Tick]
) -> None:
    """One round of the work: prefill, if `new_count` is 1, else decode."""
    session = Session(engine.llm)
    requests = [session.add(prompt, new_count) for prompt in prompts]
    result.token_count = sum(map(len, prompts))
    if new_count > 1:
        while not all(request.token_ids for request in requests):
            session.step()
        result.token_count = sum(new_count - len(request.token_ids) for request in requests)
    counters = offload_stats(engine.llm) if engine.is_ours else {}
    cpu_s, tick_count = engine.cpu_s, len(ticks)
    started_s = time.perf_counter()
    while any(len(request.token_ids) < new_count for request in requests):
        session.step()
    result.durations_s.append(time.perf_counter() - started_s)
    thread_ids = {thread.ident for thread in engine.threads}
    result.ticks += [tick for tick in ticks[tick_count:] if tick.thread_id in thread_ids]
    for name, value_s in engine.cpu_s.items():
        result.cpu_s[name] = result.cpu_s.get(name, 0.0) + value_s - cpu_s[name]
    if engine.is_ours:
        for name, value in offload_stats_since(engine.llm, counters).items():
            result.counters[name] = result.counters.get(name, 0.0) + value
    result.token_ids = [request.token_ids for request in requests]


@contextmanager
def _recorded_ticks() -> Iterator[list[Tick]]:
    """All ticks of all sidecars from now on."""
    from vllm_moecxl.runtime.sidecar import Sidecar

    ticks: list[Tick] = []
    tick = Sidecar.tick

    @wraps(tick)
    def timed_tick(self: Sidecar, now_s: float) -> None:
        wall_ns, cpu_ns = time.perf_counter_ns(), time.thread_time_ns()
        try:
            tick(self, now_s)
        finally:
            cpu_us = (time.thread_time_ns() - cpu_ns) / 1e3
            ticks.append(Tick(threading.get_ident(), cpu_us, (time.perf_counter_ns() - wall_ns) / 1e3))

    Sidecar.tick = timed_tick  # type: ignore[method-assign]
    try:
        yield ticks
    finally:
        Sidecar.tick = tick  # type: ignore[method-assign]


def _figures(results: dict[str, Measurements]) -> Result:
    """Speeds of one kind of work, and what they come to."""
    speeds = {name: result.tokens_per_s for name, result in results.items()}
    pairs = list(zip(speeds["with"], speeds["without"], strict=True))
    return {
        "sidecar_speedup": round(median(mine / theirs for mine, theirs in pairs), 4),
        "sidecar_speedup_by_round": [round(mine / theirs, 4) for mine, theirs in pairs],
        "engines": {
            name: {"tokens_per_s": round(median(speeds[name]), 2), **_counted(result)}
            for name, result in results.items()
        },
    }


def _counted(result: Measurements) -> Result:
    if not (counters := result.counters):
        return {}
    busy_s, stall_s = counters["link_busy_seconds_total"], counters["stall_seconds_total"]
    total_s = sum(result.durations_s)
    hands_s = sum(value_s for name, value_s in result.cpu_s.items() if name != _SIDECAR_THREAD)
    return {
        "hidden_share": round(1 - stall_s / busy_s, 4) if busy_s else None,
        "stall_share": round(stall_s / total_s, 4),
        "link_busy_share": round(busy_s / total_s, 4),
        "link_bytes_per_s": round(counters["fetch_bytes_total"] / busy_s) if busy_s else None,
        "hands_cpu_share": round(hands_s / total_s, 4),
        **offload_figures(counters),
    }


def _sidecar_figures(results: Sequence[Measurements]) -> Result:
    """What the sidecar's thread costs, over all work that had one.

    It holds the GIL for no longer than a tick takes it in processor time; the time from beginning to end has waiting
    for the GIL and for a core in it, too.
    """
    ticks = [tick for result in results for tick in result.ticks]
    total_s = sum(duration_s for result in results for duration_s in result.durations_s)
    cpu_us, wall_us = [tick.cpu_us for tick in ticks], [tick.wall_us for tick in ticks]
    return {
        "sidecar_cpu_share": round(
            sum(result.counters["sidecar_cpu_seconds_total"] for result in results) / total_s, 5
        ),
        "sidecar_ticks": len(ticks),
        "sidecar_gil_us_p99": round(quantile(cpu_us, 0.99), 1),
        "sidecar_gil_us_max": round(max(cpu_us), 1),
        "sidecar_gil_over_limit": sum(time_us > _GIL_US_MAX for time_us in cpu_us),
        "sidecar_tick_us_p99": round(quantile(wall_us, 0.99), 1),
        "sidecar_tick_us_max": round(max(wall_us), 1),
    }


def _print(values: Result) -> None:
    columns = ["tokens_per_s", "hidden_share", "stall_share", "link_busy_share", "hands_cpu_share", "hit_rate"]
    print_table(
        ["work", "engine", *columns],
        [
            [work, name, *(engine.get(column, "-") for column in columns)]
            for work, figures in values["works"].items()
            for name, engine in figures["engines"].items()
        ],
    )
    speedups = {work: figures["sidecar_speedup"] for work, figures in values["works"].items()}
    print(f"with the sidecar / without: {speedups}; its share of a core {values['sidecar_cpu_share']:.2%}, a tick")
    print(
        f"takes {values['sidecar_gil_us_p99']} us of it (p99, max {values['sidecar_gil_us_max']}); copies at"
        f" {values['copy_bytes_per_s'] / 1e9:.3g} GB/s here, {values['bank']}"
        f" {'keeps' if values['bank_keeps_pace'] else 'DOES NOT KEEP'} its pace"
    )
