"""Decode speed with half and a quarter of the experts in slots, as a share of the resident model's.

In one process and in turn: plain vLLM, ours at 50 % and at 25 % slots, both with prefetching that is never given up,
and both without any. Homes are at half of this machine's copy rate. One sequence at a time, counted from its first
token on; every engine has to give the same tokens.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import Result, print_table, save, trained_model
from benchmarks.engines import call_in_child, make_engine, offload_figures, offload_stats, offload_stats_since
from benchmarks.pacing import copy_bytes_per_s, keeps_pace, paced_bank
from benchmarks.sessions import Session, text_prompts
from benchmarks.widen import widen

_PACE_SHARE = 0.5
_QUICK_WIDTH = 1024
_PROMPT_LENGTH = 32
#: Sequences that run before anything is measured: predictors learn while they serve.
_WARMUP_COUNT = 4
_RESIDENT = "resident"
#: Slots and options of our engines.
_ENGINES: dict[str, tuple[str | None, Result]] = {
    _RESIDENT: (None, {}),
    "50%": ("50%", {}),
    "25%": ("25%", {}),
    "50% always": ("50%", {}),
    "25% always": ("25%", {}),
    "50% on demand": ("50%", {"prefetch": "off"}),
    "25% on demand": ("25%", {"prefetch": "off"}),
}
#: Engines whose prefetching is not given up where it makes steps no faster.
_ALWAYS = "always"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--intermediate-size", type=int, default=8192, help="width that the model's experts get")
    parser.add_argument("--new-tokens", type=int, default=96, help="tokens that a sequence decodes")
    parser.add_argument("--rounds", type=int, default=5, help="sequences that are measured, each by every engine")
    parser.add_argument("--quick", action="store_true", help="little work with narrow experts; nothing is saved")


def run(args: argparse.Namespace) -> Result:
    """Measure, print and save."""
    source = trained_model()
    width = _QUICK_WIDTH if args.quick else args.intermediate_size
    new_count, round_count = (8, 2) if args.quick else (args.new_tokens, args.rounds)
    copy_rate = copy_bytes_per_s()
    bank = paced_bank(_PACE_SHARE * copy_rate)
    with tempfile.TemporaryDirectory() as folder:
        widen(source, Path(folder), width)
        measured = call_in_child(
            "benchmarks.slots", "compare", model=folder, bank=bank, new_count=new_count, round_count=round_count
        )
    engines = measured["engines"]
    values = {
        "ratio_50": engines["50%"]["ratio"],
        "ratio_25": engines["25%"]["ratio"],
        "ratio_50_always": engines["50% always"]["ratio"],
        "ratio_25_always": engines["25% always"]["ratio"],
        "ratio_50_on_demand": engines["50% on demand"]["ratio"],
        "ratio_25_on_demand": engines["25% on demand"]["ratio"],
        **measured,
        "copy_bytes_per_s": round(copy_rate),
        "bank": bank,
        "model": f"{source.name}, experts widened to {width}",
        "rounds": round_count,
        "new_tokens": new_count,
    }
    _print(values)
    return values if args.quick else save("slots", "emulated-paced", values)


@dataclass
class Measurements:
    """What one engine did.

    Attributes:
        tokens_per_s: of each round.
        counters: growth of our counters in all rounds.
    """

    tokens_per_s: list[float] = field(default_factory=list)
    counters: dict[str, float] = field(default_factory=dict)


def compare(model: str, bank: str, new_count: int, round_count: int) -> Result:
    """All engines in this process, in turn.

    Raises:
        RuntimeError: their tokens differ.
    """
    engines = {
        name: make_engine(Path(model), slots=slots, banks=[bank], moe_offload={"in_place": "never", **options})
        for name, (slots, options) in _ENGINES.items()
    }
    prompts = text_prompts(Path(model), _WARMUP_COUNT + round_count, _PROMPT_LENGTH)
    results = {name: Measurements() for name in engines}
    for name, llm in engines.items():
        _decode(llm, prompts[0], new_count)
        if name.endswith(_ALWAYS):
            llm.apply_model(_prefetch_always)
    for prompt in prompts[1:_WARMUP_COUNT]:
        for llm in engines.values():
            _decode(llm, prompt, new_count)
    for index, prompt in enumerate(prompts[_WARMUP_COUNT:]):
        token_ids = {}
        # A B B A: what drifts hits all alike.
        for name in list(engines)[:: 1 if index % 2 == 0 else -1]:
            token_ids[name] = _measure(engines[name], name, prompt, new_count, results[name])
        if any(ids != token_ids[_RESIDENT] for ids in token_ids.values()):
            raise RuntimeError("slots: not all engines give the tokens of resident vLLM")
    pace = [llm.apply_model(keeps_pace)[0] for name, llm in engines.items() if name != _RESIDENT]
    reference = results[_RESIDENT].tokens_per_s
    return {
        "engines": {name: _figures(result, reference) for name, result in results.items()},
        "bank_keeps_pace": all(pace),
    }


def _measure(llm: Any, name: str, prompt: Sequence[int], new_count: int, result: Measurements) -> list[int]:
    before = {} if name == _RESIDENT else offload_stats(llm)
    tokens_per_s, token_ids = _decode(llm, prompt, new_count)
    result.tokens_per_s.append(tokens_per_s)
    if name != _RESIDENT:
        for key, value in offload_stats_since(llm, before).items():
            result.counters[key] = result.counters.get(key, 0.0) + value
    return token_ids


def _decode(llm: Any, prompt: Sequence[int], new_count: int) -> tuple[float, list[int]]:
    """Tokens per second after the first one, and all of them."""
    session = Session(llm)
    request = session.add(prompt, new_count)
    while not request.token_ids:
        session.step()
    started_s, first_count = time.perf_counter(), len(request.token_ids)
    while len(request.token_ids) < new_count:
        session.step()
    return (new_count - first_count) / (time.perf_counter() - started_s), request.token_ids


def _figures(result: Measurements, reference: Sequence[float]) -> Result:
    ratios = [mine / theirs for mine, theirs in zip(result.tokens_per_s, reference, strict=True)]
    return {
        "tokens_per_s": round(median(result.tokens_per_s), 2),
        "ratio": round(median(ratios), 4),
        "ratio_by_round": [round(ratio, 4) for ratio in ratios],
        **(offload_figures(result.counters) if result.counters else {}),
    }


def _prefetch_always(model: Any) -> None:
    model.moe_offload_runtime.prefetching.trial.pin()


def _print(values: Result) -> None:
    columns = ["tokens_per_s", "ratio", "hit_rate", "stall_s", "prefetches"]
    print_table(
        ["engine", *columns],
        [[name, *(figures.get(column, "-") for column in columns)] for name, figures in values["engines"].items()],
    )
    pace = "keeps" if values["bank_keeps_pace"] else "DOES NOT KEEP"
    print(f"copies at {values['copy_bytes_per_s'] / 1e9:.3g} GB/s here, {values['bank']} {pace} its pace")
