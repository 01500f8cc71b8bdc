"""Serve a routing trace on a machine that is only described: hit rates, bytes and times, by the engine's own policies.

The control plane is the engine's, in virtual time; memory devices, links and kernels are models. Every figure is
labelled "simulated".
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_moecxl.config import BankSpec, OffloadConfig, SlotSpec
from vllm_moecxl.errors import ConfigError
from vllm_moecxl.linux.topology import SYSFS, read_topology
from vllm_moecxl.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from vllm_moecxl.control.prediction.base import Predictor
    from vllm_moecxl.control.simulator.machine import BankModel, Hardware
    from vllm_moecxl.control.simulator.model import ModelShape
    from vllm_moecxl.control.trace import RoutingTrace

#: The profile whose banks are looked up among what was measured here.
_HERE = "this-machine"
_BATCH_MAX = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `moecxl simulate`."""
    add = parser.add_argument
    add("--trace", required=True, metavar="PATH", help="the routing trace to serve")
    add("--model", required=True, metavar="CONFIG", help="a config.json or its folder, or a model's name")
    add("--hardware", required=True, metavar="PROFILE", help="a profile's name, or a JSON file of that form")
    add("--slots", default="50%", help='a percentage of the experts, a count per layer, or bytes such as "24GiB"')
    add("--eviction", default=OffloadConfig().eviction, metavar="POLICY", help="an eviction policy of the engine's")
    add("--prefetch", default="auto", metavar="WHAT", help='"auto", "off", or predictors with commas between them')
    add("--batch", type=int, default=1, metavar="N", help="requests side by side; 1 if not given")
    add("--requests", type=int, metavar="N", help="only the first N requests of the trace")
    add("--decode-only", action="store_true", help="take prompts for decode, token by token")
    add(
        *("--banks",),
        nargs="+",
        metavar="BANK",
        help="instead of the profile's: the name of one of its banks, or emulated:DEVICE, each with an optional size "
        "such as cxl-d=64GiB",
    )
    add("--weights", metavar="FORMAT", help="of the experts, such as fp8 or int4; the checkpoint's if not given")
    add(
        *("--layer-s",),
        type=float,
        metavar="SECONDS",
        help="of a one-token step of the resident engine, divided by its MoE layers, as measured; a model of it if "
        "not given",
    )
    add("--seed", type=int, default=0, help="of the tails of the banks' latencies")
    add("--sysfs", type=Path, default=SYSFS, metavar="DIR", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Simulate, and say how it went."""
    from vllm_moecxl.control.simulator import machine
    from vllm_moecxl.control.simulator import model as models
    from vllm_moecxl.control.simulator.report import simulate
    from vllm_moecxl.control.simulator.simulator import Options, Simulator
    from vllm_moecxl.control.trace import RoutingTrace

    _require(args)
    model = models.load(args.model, args.weights)
    hardware = machine.load(args.hardware)
    if args.hardware == _HERE:
        hardware = _measured(hardware, args.sysfs)
    if args.banks:
        hardware = hardware.with_banks([_bank(text, hardware) for text in args.banks])
    trace = RoutingTrace.load(args.trace)
    _require_same_model(trace, model, args)
    trace = trace.cut(slice(args.requests))
    options = Options(
        slot_counts=_slot_count(args.slots, model),
        eviction=args.eviction,
        predictors=_predictors(args.prefetch, model),
        batch_size=args.batch,
        layer_s=args.layer_s,
        seed=args.seed,
    )
    simulator = Simulator(trace.as_decode() if args.decode_only else trace, model, hardware, options)
    result = {
        **simulate(simulator),
        "model": model.name,
        "hardware": hardware.name,
        "slot_count": options.slot_counts,
        "eviction": options.eviction,
        "predictors": list(options.predictors),
        "batch": options.batch_size,
        "seed": options.seed,
    }
    print(json.dumps(result) if args.json else "\n".join(in_words(result)))
    return 0


def in_words(result: dict[str, Any]) -> Iterator[str]:
    """A result, line by line."""
    yield f"simulated: {result['model']} on {result['hardware']}"
    yield f"  {result['requests']} requests in {result['steps']} forwards, {format_seconds(result['duration_s'])}"
    if not result["lookups"]:
        return
    yield f"  slots        {result['slot_count']} per layer, {result['eviction']}"
    yield (
        f"  hit rate     {result['hit_rate']:.1%} of {result['lookups']} lookups; with the future known "
        f"{result['belady_hit_rate']:.1%}"
    )
    yield f"  waited       {format_seconds(result['stall_s'])} in all"
    demand, ahead = format_bytes(result["demand_bytes"]), format_bytes(result["prefetch_bytes"])
    yield f"  fetched      {demand} on demand, {ahead} before"
    counts = result["prefetch"]
    if result["predictors"]:
        yield "  prefetches   " + ", ".join(f"{count} {name}" for name, count in counts.items())
    yield "  looked up in " + ", ".join(f"{tier} {share:.1%}" for tier, share in result["tier_share"].items())
    for key, name in (("ttft_s", "first token"), ("tpot_s", "each token")):
        if spread := result[key]:
            yield f"  {name:<12} " + ", ".join(f"{format_seconds(spread[one])} {one}" for one in ("mean", "p50", "p99"))
    yield f"  throughput   {result['tokens_per_s']:.4g} tokens/s"


def _require(args: argparse.Namespace) -> None:
    from vllm_moecxl.control.eviction import POLICIES
    from vllm_moecxl.control.simulator.model import WEIGHT_BYTES

    if args.eviction not in POLICIES:
        raise ConfigError(f"--eviction {args.eviction} is not possible: use one of {', '.join(POLICIES)}")
    if args.weights is not None and args.weights not in WEIGHT_BYTES:
        raise ConfigError(f"--weights {args.weights} is not possible: use one of {', '.join(WEIGHT_BYTES)}")
    if not 1 <= args.batch <= _BATCH_MAX:
        raise ConfigError(f"--batch {args.batch} is not possible: give a number from 1 to {_BATCH_MAX}")
    if args.requests is not None and args.requests < 1:
        raise ConfigError(f"--requests {args.requests} is not possible: give a number of at least 1")
    if args.layer_s is not None and not 0 < args.layer_s < 1e3:
        raise ConfigError(f"--layer-s {args.layer_s} is not possible: give seconds above 0, such as 0.0005")
    if not 0 <= args.seed < 1 << 63:
        raise ConfigError(f"--seed {args.seed} is not possible: give a number of at least 0")


def _require_same_model(trace: RoutingTrace, model: ModelShape, args: argparse.Namespace) -> None:
    wanted = (trace.layer_count, trace.topk_count)
    if wanted != (model.layer_count, model.topk) or trace.expert_count > model.expert_count:
        raise ConfigError(
            f"--model {args.model} is not possible: it has {model.layer_count} MoE layers of {model.expert_count} "
            f"experts, top-{model.topk}, and the trace {args.trace} is of {trace.layer_count} layers of "
            f"{trace.expert_count} experts, top-{trace.topk_count}: name the model that was traced"
        )


def _slot_count(text: str, model: ModelShape) -> int:
    try:
        spec = SlotSpec.parse(text)
    except ConfigError:
        spec = SlotSpec()
    if spec.is_auto:
        raise ConfigError(
            f'--slots {text} is not possible: use a percentage such as "25%", a count per layer such as 16, or bytes '
            'such as "24GiB"'
        )
    if spec.total_bytes is not None:
        count = min(spec.total_bytes // (model.layer_count * model.slab_bytes), model.expert_count)
    elif spec.count is not None:
        count = spec.count
    else:
        count = SlotSpec(share=spec.share).count_for(model.expert_count, 0, text)
    if not model.topk <= count <= model.expert_count:
        raise ConfigError(
            f"--slots {text} is not possible: that is {count} for each layer, and one token needs {model.topk} of the "
            f"{model.expert_count} experts at once; use a count from {model.topk} to {model.expert_count}"
        )
    return count


def _predictors(text: str, model: ModelShape) -> dict[str, Predictor]:
    from vllm_moecxl.control.prediction import DEFAULT_PREDICTORS, PREDICTORS

    if text == "off":
        return {}
    chosen = DEFAULT_PREDICTORS if text == "auto" else text.split(",")
    if any(name not in PREDICTORS for name in chosen):
        raise ConfigError(
            f'--prefetch {text} is not possible: use "auto", "off", or some of {", ".join(PREDICTORS)} with commas '
            "between them"
        )
    return {name: PREDICTORS[name](model.layer_count, model.expert_count, model.topk) for name in chosen}


def _bank(text: str, hardware: Hardware) -> BankModel:
    """One of the machine's banks, or an emulated one."""
    from vllm_moecxl.control.device_model import DeviceSpec
    from vllm_moecxl.control.simulator.machine import BankModel
    from vllm_moecxl.units import parse_bytes

    name, has_size, size = text.partition("=")
    capacity_bytes = parse_bytes(size) if has_size else None
    known = {bank.name: bank for bank in hardware.banks}
    if has_size and not capacity_bytes:
        raise ConfigError(f'--banks {text} is not possible: a size has a unit, such as "{name}=64GiB"')
    if name in known:
        bank = known[name]
    elif name.startswith("emulated:"):
        try:
            spec = DeviceSpec.parse(name.removeprefix("emulated:"))
        except ConfigError as error:
            raise ConfigError(
                f'--banks {text} is not possible: name a device or its figures, such as "emulated:300ns,2GB/s"'
            ) from error
        bank = BankModel.of(name, "cxl", spec, reader_count=2, capacity_bytes=spec.capacity_bytes)
    else:
        raise ConfigError(
            f'--banks {text} is not possible: use {", ".join(known)}, or a device such as "emulated:300ns,2GB/s"'
        )
    return replace(bank, capacity_bytes=capacity_bytes) if capacity_bytes else bank


def _measured(hardware: Hardware, sysfs: Path) -> Hardware:
    """This machine with its own banks, as far as `moecxl profile` has measured them."""
    from vllm_moecxl.control.device_model import DeviceSpec
    from vllm_moecxl.control.simulator.machine import BankModel
    from vllm_moecxl.data.banks.make import auto_specs, bank_identity
    from vllm_moecxl.data.profiles import load_profiles, machine_identity
    from vllm_moecxl.types import Tier

    topology = read_topology(sysfs)
    measured = load_profiles(machine_identity(topology)).measured
    banks: list[BankModel] = []
    for spec in auto_specs(topology):
        tier: Tier = "dram" if spec == BankSpec("dram") else "cxl"
        profile = measured.get(bank_identity(spec, topology))
        if profile is not None:
            banks.append(BankModel.of(spec.name, tier, DeviceSpec.of(profile.latency_s, profile.read_bytes_per_s)))
    if not banks:
        return hardware
    dram_rates = [bank.spec.read_bytes_per_s for bank in banks if bank.tier == "dram"]
    rate = dram_rates[0] if dram_rates else hardware.device.memory_bytes_per_s
    return replace(hardware.with_banks(banks), device=replace(hardware.device, memory_bytes_per_s=rate))
