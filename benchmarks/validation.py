"""The simulator against the engine: one trace, one paced bank, the same hits, and how long a token takes.

Engines serve a few prompts from a cold start, one at a time, and record their routing. The simulator is given that
trace, the bank's figures and what a step of the resident engine takes. One figure of the machine is measured for it:
what a wait costs beside the copies (`miss_s`; waking a thread takes long on virtual machines). It comes from other
prompts and an engine of their own, before anything is compared, and serves for every row. Without prefetching each
look-up has to come out as simulated.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.common import Result, print_table, save, trained_model
from benchmarks.engines import call_in_child, make_engine, offload_stats
from benchmarks.pacing import copy_bytes_per_s, keeps_pace, paced_bank
from benchmarks.sessions import Session, text_prompts
from benchmarks.widen import widen

_PACE_SHARE = 0.5
_QUICK_WIDTH = 1024
_PROMPT_LENGTH = 32
#: Prompts of the run that measures what a wait costs; nothing else is taken from it.
_CALIBRATION_COUNT = 2
_HEADLINE = "50%"
_PREFETCHING = "50%, prefetching"
#: Slots and `prefetch` of the engines that are compared.
_ENGINES = {
    _HEADLINE: ("50%", "off"),
    "25%": ("25%", "off"),
    "75%": ("75%", "off"),
    _PREFETCHING: ("50%", "auto"),
}
#: How far the simulated time of a token may be off.
_TPOT_ERROR_MAX = 0.1
_PATIENCE_S = 30.0
_POLL_S = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--intermediate-size", type=int, default=8192, help="width that the model's experts get")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens that a sequence decodes")
    parser.add_argument("--prompts", type=int, default=6, help="sequences, one after the other")
    parser.add_argument("--quick", action="store_true", help="little work with narrow experts; nothing is saved")


def run(args: argparse.Namespace) -> Result:
    """Measure, simulate, print and save."""
    source = trained_model()
    width = _QUICK_WIDTH if args.quick else args.intermediate_size
    new_count, prompt_count = (16, 2) if args.quick else (args.new_tokens, args.prompts)
    copy_rate = copy_bytes_per_s()
    bank = paced_bank(_PACE_SHARE * copy_rate)
    with tempfile.TemporaryDirectory() as folder:
        widen(source, Path(folder), width)
        measured = call_in_child(
            "benchmarks.validation", "compare", model=folder, bank=bank, new_count=new_count, prompt_count=prompt_count
        )
    engines = measured["engines"]
    exact_ones = [figures for name, figures in engines.items() if name != _PREFETCHING]
    values = {
        **engines[_HEADLINE],
        "is_exact": all(figures["is_exact"] for figures in exact_ones),
        "is_within_goal": abs(engines[_HEADLINE]["tpot_ratio"] - 1) <= _TPOT_ERROR_MAX,
        "tpot_ratio_prefetch": engines[_PREFETCHING]["tpot_ratio"],
        **measured,
        "copy_bytes_per_s": round(copy_rate),
        "bank": bank,
        "model": f"{source.name}, experts widened to {width}",
        "prompts": prompt_count,
        "new_tokens": new_count,
    }
    _print(values)
    return values if args.quick else save("validation", "emulated-paced", values)


@dataclass
class Served:
    """What one of our engines did, and the resident one with the same prompts beside it.

    Attributes:
        tpot_s: seconds of a token after the first, by prompt.
        resident_tpot_s: the same of the resident engine.
        counters: of our engine, from its start on.
        trace: its recording.
        bank_keeps_pace: whether the emulated bank took no longer than it should.
    """

    trace: Path
    tpot_s: list[float] = field(default_factory=list)
    resident_tpot_s: list[float] = field(default_factory=list)
    counters: dict[str, float] = field(default_factory=dict)
    bank_keeps_pace: bool = True


def compare(model: str, bank: str, new_count: int, prompt_count: int) -> Result:
    """All engines in this process, one after the other, and the resident one beside each.

    Raises:
        RuntimeError: their tokens differ.
    """
    prompts = text_prompts(Path(model), _CALIBRATION_COUNT + prompt_count, _PROMPT_LENGTH)
    resident = make_engine(Path(model), slots=None)
    for prompt in prompts:  # its first sequences are slower than the others
        _decode(resident, prompt, new_count)
    with tempfile.TemporaryDirectory() as folder:

        def serve_with(name: str, chosen: Sequence[Sequence[int]], slots: str, prefetch: str) -> Served:
            options = {"in_place": "never", "prefetch": prefetch, "trace": str(Path(folder, f"{name}.npz"))}
            return _serve(Path(model), slots, bank, options, chosen, new_count, resident)

        calibration = serve_with("calibration", prompts[:_CALIBRATION_COUNT], *_ENGINES[_HEADLINE])
        miss_s = _calibrate(model, bank, calibration)
        engines = {}
        for name, (slots, prefetch) in _ENGINES.items():
            served = serve_with(name, prompts[_CALIBRATION_COUNT:], slots, prefetch)
            simulated = simulate(model, bank, slots, prefetch, served, miss_s)
            engines[name] = {**_figures(served, simulated), "bank_keeps_pace": served.bank_keeps_pace}
            if name == _HEADLINE:
                as_in_profile = simulate(model, bank, slots, prefetch, served, None)["tpot_s"]["mean"]
                engines[name]["tpot_simulated_uncalibrated_s"] = round(as_in_profile, 6)
    return {"miss_s": round(miss_s, 7), "engines": engines}


def simulate(model: str, bank: str, slots: str, prefetch: str, served: Served, miss_s: float | None) -> Result:
    """What the simulator makes of a recording.

    Args:
        miss_s: see `Device`; None for the profile's.
    """
    from vllm_moecxl.config import OffloadConfig, SlotSpec
    from vllm_moecxl.control.device_model import DeviceSpec
    from vllm_moecxl.control.prediction import DEFAULT_PREDICTORS, PREDICTORS
    from vllm_moecxl.control.simulator import machine, report
    from vllm_moecxl.control.simulator import model as models
    from vllm_moecxl.control.simulator.simulator import Options, Simulator
    from vllm_moecxl.control.trace import RoutingTrace

    shape = models.load(model)
    spec = DeviceSpec.parse(bank.removeprefix("emulated:"))
    hardware = machine.load("this-machine").with_banks([machine.BankModel.of(bank, "cxl", spec, reader_count=2)])
    if miss_s is not None:
        hardware = replace(hardware, device=replace(hardware.device, miss_s=miss_s))
    sizes = (shape.layer_count, shape.expert_count, shape.topk)
    options = Options(
        slot_counts=SlotSpec.parse(slots).count_for(shape.expert_count, shape.topk, slots),
        eviction=OffloadConfig().eviction,
        predictors={name: PREDICTORS[name](*sizes) for name in DEFAULT_PREDICTORS} if prefetch == "auto" else {},
        layer_s=_mean(served.resident_tpot_s) / shape.layer_count,
    )
    return report.simulate(Simulator(RoutingTrace.load(served.trace), shape, hardware, options))


def _serve(
    model: Path,
    slots: str,
    bank: str,
    options: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    new_count: int,
    resident: Any,
) -> Served:
    """An engine from a cold start to its end; the recording is complete then."""
    served = Served(Path(options["trace"]))
    llm = make_engine(model, slots=slots, banks=[bank], moe_offload=dict(options))
    try:
        for index, prompt in enumerate(prompts):
            outputs = {}
            # A B B A: what drifts hits both alike.
            for is_ours in (True, False) if index % 2 == 0 else (False, True):
                tpot_s, outputs[is_ours] = _decode(llm if is_ours else resident, prompt, new_count)
                (served.tpot_s if is_ours else served.resident_tpot_s).append(tpot_s)
            if outputs[True] != outputs[False]:
                raise RuntimeError("validation: the engine does not give the tokens of resident vLLM")
        served.counters = offload_stats(llm)
        served.bank_keeps_pace = llm.apply_model(keeps_pace)[0]
        _await_recording(served.trace, len(prompts) * (_PROMPT_LENGTH + new_count - 1))
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
    return served


def _await_recording(path: Path, token_count: int) -> None:
    """An engine writes its trace when it has had nothing to do for a while."""
    from vllm_moecxl.control.trace import RoutingTrace

    deadline_s = time.perf_counter() + _PATIENCE_S
    while not path.exists() or RoutingTrace.load(path).token_count < token_count:
        if time.perf_counter() > deadline_s:
            raise RuntimeError(f"validation: the recording has not all of the {token_count} tokens")
        time.sleep(_POLL_S)


def _decode(llm: Any, prompt: Sequence[int], new_count: int) -> tuple[float, list[int]]:
    """Seconds of a token after the first one, and all of them."""
    session = Session(llm)
    request = session.add(prompt, new_count)
    while not request.token_ids:
        session.step()
    started_s, first_count = time.perf_counter(), len(request.token_ids)
    while len(request.token_ids) < new_count:
        session.step()
    return (time.perf_counter() - started_s) / (new_count - first_count), request.token_ids


def _calibrate(model: str, bank: str, served: Served) -> float:
    """Seconds that a wait costs beside the copies: what makes the simulated time of a token the measured one."""
    slots, prefetch = _ENGINES[_HEADLINE]
    without_s, with_1ms_s = (
        simulate(model, bank, slots, prefetch, served, miss_s)["tpot_s"]["mean"] for miss_s in (0.0, 1e-3)
    )
    return max((_mean(served.tpot_s) - without_s) / (with_1ms_s - without_s) * 1e-3, 0.0)


def _figures(served: Served, simulated: Result) -> Result:
    kinds = {"hits": "hit", "pending": "pending", "misses": "miss"}
    engine = {name: round(served.counters[f"lookups_total.{label}"]) for name, label in kinds.items()}
    engine["lookups"] = sum(engine.values())
    tpot_s, tpot_simulated_s = _mean(served.tpot_s), simulated["tpot_s"]["mean"]
    return {
        **{f"{name}_engine": count for name, count in engine.items()},
        **{f"{name}_simulated": simulated[name] for name in engine},
        "is_exact": all(count == simulated[name] for name, count in engine.items()),
        "hit_rate_engine": round(engine["hits"] / engine["lookups"], 4),
        "hit_rate_simulated": round(simulated["hit_rate"], 4),
        "tpot_engine_s": round(tpot_s, 6),
        "tpot_simulated_s": round(tpot_simulated_s, 6),
        "tpot_ratio": round(tpot_simulated_s / tpot_s, 4),
        "tpot_resident_s": round(_mean(served.resident_tpot_s), 6),
        "stall_engine_s": round(served.counters["stall_seconds_total"], 4),
        "stall_simulated_s": round(simulated["stall_s"], 4),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _print(values: Result) -> None:
    columns = ["lookups", "hits", "pending", "misses", "tpot"]
    rows = []
    for name, figures in values["engines"].items():
        for side in ("engine", "simulated"):
            shown = [figures[f"{column}_{side}_s" if column == "tpot" else f"{column}_{side}"] for column in columns]
            rows.append([name, side, *shown, figures["tpot_ratio"] if side == "simulated" else "-"])
    print_table(["slots", "", *columns[:-1], "tpot_s", "ratio"], rows)
    pace = all(figures["bank_keeps_pace"] for figures in values["engines"].values())
    print(
        f"a wait costs {values['miss_s'] * 1e6:.0f} us beside the copies, measured on other prompts; {values['bank']}"
    )
    print(f"{'keeps' if pace else 'DOES NOT KEEP'} its pace; look-ups are {'' if values['is_exact'] else 'NOT '}exact")
