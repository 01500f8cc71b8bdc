"""Stripes over two emulated devices: bytes a second of one fetch at a time, against the sum of their bandwidths."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from statistics import median

import torch

from benchmarks.common import Result, print_table, quantile, save
from vllm_moecxl.config import BankSpec
from vllm_moecxl.control.account import LayerNeed
from vllm_moecxl.control.placement import BankView, place
from vllm_moecxl.data.banks.base import Bank
from vllm_moecxl.data.banks.emulated import EmulatedBank
from vllm_moecxl.data.banks.make import make_banks
from vllm_moecxl.data.devices.cpu import CpuBackend
from vllm_moecxl.data.host import anonymous_tensor
from vllm_moecxl.data.layout import SlabLayout
from vllm_moecxl.data.mover import Mover
from vllm_moecxl.data.profiles import Profiles
from vllm_moecxl.data.slabs import STRIPE_GRANULE_BYTES, Cells, HomeBuilder
from vllm_moecxl.runtime.counters import Counters
from vllm_moecxl.types import Cause, StripeMode
from vllm_moecxl.units import KIB, MIB, format_bytes

SLAB_MIB = (1, 4, 16, 64)
_EXPERT_COUNT = 4
_BANK_BYTES = "1GiB"
#: Extents of a slab: two thirds and one third of it, as gate-and-up and down projections are.
_EXTENTS = {"w13": 2, "w2": 1}
#: Pacing in real time holds only well below the rate at which this machine copies: the copies come out of the wait.
_PACE_SHARE_MAX = 0.25
_COPY_BYTES = 64 * MIB
_COPY_COUNT = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument(
        "--devices", nargs=2, default=["1us,600MB/s", "1us,300MB/s"], metavar="DEVICE", help="as in emulated:DEVICE"
    )
    parser.add_argument("--seconds", type=float, default=1.5, help="about how long each case is fetched")


def run(args: argparse.Namespace) -> Result:
    """Measure, print and save."""
    torch.set_num_threads(1)
    specs = [BankSpec.parse(f"emulated:{device}={_BANK_BYTES}") for device in args.devices]
    sum_bytes_per_s = sum(bank.profile.read_bytes_per_s for bank in make_banks(specs, Profiles()))
    copy_bytes_per_s = _copy_bytes_per_s()
    pace_share = sum_bytes_per_s / copy_bytes_per_s
    print(
        f"this machine copies {copy_bytes_per_s / 1e9:.3g} GB/s, the devices together are paced at "
        f"{sum_bytes_per_s / 1e9:.3g} GB/s: {pace_share:.0%} of it"
    )
    if pace_share > _PACE_SHARE_MAX:
        raise SystemExit(f"striping: above {_PACE_SHARE_MAX:.0%} real-time pacing does not hold: name slower --devices")
    cases = [
        _measure(specs, slab_mib * MIB, stripe, args.seconds) for slab_mib in SLAB_MIB for stripe in ("auto", "never")
    ]
    striped = {case["slab_bytes"] // MIB: case for case in cases if case["stripe"] == "auto"}
    print_table(
        ["slab", "stripe", "banks", "fetches", "GB/s", "of the sum", "all fetches", "median ms", "p99 ms"],
        [
            [
                *(format_bytes(case["slab_bytes"]), case["stripe"], case["bank_count"], case["fetch_count"]),
                *(case["bytes_per_s"] / 1e9, case["efficiency"], case["efficiency_of_all"]),
                *(case["fetch_ms_median"], case["fetch_ms_p99"]),
            ]
            for case in cases
        ],
    )
    return save(
        "striping",
        "emulated-paced",
        {
            "devices": args.devices,
            "sum_bytes_per_s": sum_bytes_per_s,
            "copy_bytes_per_s": round(copy_bytes_per_s),
            "pace_share": round(pace_share, 3),
            **{f"efficiency_{slab_mib}mib": striped[slab_mib]["efficiency"] for slab_mib in SLAB_MIB},
            **{f"efficiency_of_all_{slab_mib}mib": striped[slab_mib]["efficiency_of_all"] for slab_mib in SLAB_MIB},
            "cases": cases,
        },
    )


def _copy_bytes_per_s() -> float:
    """What one thread copies from memory to memory."""
    source, target = (anonymous_tensor((_COPY_BYTES,), torch.uint8).fill_(value) for value in (1, 2))
    times_s = []
    for _ in range(_COPY_COUNT):
        start_s = time.perf_counter()
        target.copy_(source)
        times_s.append(time.perf_counter() - start_s)
    return _COPY_BYTES / median(times_s)


def _measure(specs: Sequence[BankSpec], slab_bytes: int, stripe: StripeMode, duration_s: float) -> Result:
    """Fetch one expert after the other into the slots of a layer.

    Rates are those of the median fetch. On a shared machine some fetches also wait for a CPU, which no device does:
    "of all" counts them in.
    """
    banks = make_banks(specs, Profiles())
    sum_bytes_per_s = sum(bank.profile.read_bytes_per_s for bank in banks)
    placement = place(
        [LayerNeed("layer", _EXPERT_COUNT, 1, slab_bytes)],
        None,
        [_view(bank) for bank in banks],
        stripe,
        part_slack_bytes=4 * STRIPE_GRANULE_BYTES,
    )
    mover = Mover(banks, CpuBackend(), Counters([bank.name for bank in banks]))
    tensors = _layer(slab_bytes)
    layout = SlabLayout.of(tensors)
    assert layout.slab_bytes == slab_bytes
    expected = [tensor[-1].clone() for tensor in tensors.values()]
    routes = [placement.routes[route_id] for route_id in placement.route_ids[0]]
    home = HomeBuilder(banks, "off").store("layer", tensors, routes)
    cells = Cells(layout, _EXPERT_COUNT, CpuBackend())

    def fetch(expert_id: int) -> None:
        mover.wait([mover.start(home, expert_id, cells.rows(expert_id), Cause.DEMAND, 0.0)])

    for expert_id in range(_EXPERT_COUNT):  # threads, and pages of the slots
        fetch(expert_id)
    fetch_s = []
    wanted = max(_EXPERT_COUNT, round(duration_s * sum_bytes_per_s / slab_bytes))
    started_s = time.perf_counter()
    for index in range(wanted):
        expert_id = index % _EXPERT_COUNT
        start_s = time.perf_counter()
        fetch(expert_id)
        fetch_s.append(time.perf_counter() - start_s)
    total_s = time.perf_counter() - started_s
    bytes_per_s = slab_bytes / median(fetch_s)
    assert all(torch.equal(cell[-1], row) for cell, row in zip(cells.tensors, expected, strict=True))
    mover.close()
    return {
        "slab_bytes": slab_bytes,
        "stripe": stripe,
        "bank_count": len(home.bytes_by_bank(range(_EXPERT_COUNT))),
        "fetch_count": wanted,
        "bytes_per_s": round(bytes_per_s),
        "efficiency": round(bytes_per_s / sum_bytes_per_s, 4),
        "efficiency_of_all": round(wanted * slab_bytes / total_s / sum_bytes_per_s, 4),
        "fetch_ms_median": round(1e3 * median(fetch_s), 3),
        "fetch_ms_p99": round(1e3 * quantile(fetch_s, 0.99), 3),
        "keeps_pace": all(bank.keeps_pace for bank in banks if isinstance(bank, EmulatedBank)),
    }


def _layer(slab_bytes: int) -> dict[str, torch.Tensor]:
    """[experts, rows, 1 KiB] uint8 tensors of random bytes, in the proportions of `_EXTENTS`."""
    row_count = slab_bytes // KIB
    w2_rows = row_count * _EXTENTS["w2"] // sum(_EXTENTS.values())
    rows = {"w13": row_count - w2_rows, "w2": w2_rows}
    return {name: torch.randint(256, (_EXPERT_COUNT, count, KIB), dtype=torch.uint8) for name, count in rows.items()}


def _view(bank: Bank) -> BankView:
    assert bank.capacity_bytes is not None
    return BankView(
        bank.identity, bank.tier, bank.capacity_bytes, bank.profile.latency_s, bank.profile.read_bytes_per_s
    )
