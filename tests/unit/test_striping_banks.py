"""Stripes over emulated banks: the parts of a slab end together and at the same time, so that bandwidths add up.

Every bank has a clock of its own: nothing here depends on how fast this machine is.
"""

import threading
from collections.abc import Callable

import pytest
import torch

from tests.support.homes import fetch
from vllm_moecxl.config import BankSpec
from vllm_moecxl.control.account import LayerNeed
from vllm_moecxl.control.device_model import DeviceModel, DeviceSpec
from vllm_moecxl.control.placement import BankView, Part, Route, place
from vllm_moecxl.data.banks.base import BankProfile
from vllm_moecxl.data.banks.emulated import EmulatedBank
from vllm_moecxl.data.banks.make import make_banks
from vllm_moecxl.data.devices.cpu import CpuBackend
from vllm_moecxl.data.profiles import Profiles
from vllm_moecxl.data.slabs import STRIPE_GRANULE_BYTES, Cells, Home, HomeBuilder
from vllm_moecxl.units import KIB, MIB

_LATENCY_S = 1e-6
_EXPERT_COUNT = 2


class Time:
    """A clock that moves when somebody sleeps."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s


def bank(name: str, bytes_per_s: float, time: Time, sleep: Callable[[float], None] | None = None) -> EmulatedBank:
    spec = DeviceSpec(_LATENCY_S, bytes_per_s, bytes_per_s)
    profile = BankProfile(spec.latency_s, spec.read_bytes_per_s, "emulated")
    return EmulatedBank(name, None, DeviceModel(spec, seed=1), profile, time, sleep or time.sleep)


def auto_routes(banks: list[EmulatedBank], slab_bytes: int) -> list[Route]:
    """Where "auto" would put each expert's slab."""
    views = [BankView(b.identity, b.tier, 1 << 40, b.profile.latency_s, b.profile.read_bytes_per_s) for b in banks]
    placement = place([LayerNeed("layer", _EXPERT_COUNT, 1, slab_bytes)], None, views, "auto")
    return [placement.routes[route_id] for route_id in placement.route_ids[0]]


def stored(banks: list[EmulatedBank], slab_bytes: int) -> tuple[Home, dict[str, torch.Tensor]]:
    """A layer of random bytes, its slabs of three tensors, where "auto" puts it; and what it was made of."""
    generator = torch.Generator().manual_seed(1)
    sizes = {"w13": slab_bytes * 2 // 3 // KIB * KIB, "scale": 5 * KIB + 3}
    sizes["w2"] = slab_bytes - sum(sizes.values())
    tensors = {
        name: torch.randint(256, (_EXPERT_COUNT, size), dtype=torch.uint8, generator=generator)
        for name, size in sizes.items()
    }
    routes = auto_routes(banks, slab_bytes)
    return HomeBuilder(banks, "off").store("layer", dict(tensors), routes), tensors


@pytest.mark.parametrize("slab_bytes", [4 * MIB, 16 * MIB, 64 * MIB])
@pytest.mark.parametrize("rates", [(600e6, 300e6), (52e9, 26e9), (32e9, 26e9, 18e9), (1e9, 1e9)])
def test_the_parts_of_a_stripe_end_together_and_bandwidths_add_up(slab_bytes: int, rates: tuple[float, ...]) -> None:
    times = [Time() for _ in rates]
    banks = [bank(f"emulated:{i}", rate, time) for i, (rate, time) in enumerate(zip(rates, times, strict=True))]
    home, tensors = stored(banks, slab_bytes)
    assert len(home.bytes_by_bank([0])) == len(rates), "striped"
    cells = Cells(home.layout, 1, CpuBackend())
    fetch(home, cells, [1], [0])
    for cell, tensor in zip(cells.tensors, tensors.values(), strict=True):
        assert torch.equal(cell[0], tensor[1])
    fetch_s = max(time.now_s for time in times)
    # Each of the three tensors is cut at granules, so that a part is off its share by less than two of them.
    granules_s = [3 * 2 * STRIPE_GRANULE_BYTES / rate for rate in rates]
    ideal_s = slab_bytes / sum(rates)
    shard_ids = [piece.places[0].shard_id for piece in home.pieces(1)]
    for index, (time, error_s) in enumerate(zip(times, granules_s, strict=True)):
        # Each chunk waits for the one before: one reader, where there are two in the Mover's hands.
        assert time.now_s == pytest.approx(shard_ids.count(index) * _LATENCY_S + ideal_s, abs=error_s)
    if slab_bytes >= 16 * MIB:
        assert slab_bytes / fetch_s >= 0.9 * sum(rates)


def test_a_small_slab_has_one_bank_and_its_bandwidth() -> None:
    times = [Time(), Time()]
    banks = [bank("emulated:a", 600e6, times[0]), bank("emulated:b", 300e6, times[1])]
    home, _ = stored(banks, MIB)
    fetch(home, Cells(home.layout, 1, CpuBackend()), [0], [0])
    assert (times[0].now_s, times[1].now_s) == (pytest.approx(len(home.pieces(0)) * _LATENCY_S + MIB / 600e6), 0.0)


def test_the_banks_of_a_stripe_are_read_at_the_same_time() -> None:
    """Each bank, in the middle of its first read, waits for the other to get there: one after the other never does."""
    meeting = threading.Barrier(2, timeout=20)
    banks = []
    for index in range(2):
        time, has_met = Time(), threading.Event()

        def sleep(duration_s: float, time: Time = time, has_met: threading.Event = has_met) -> None:
            if not has_met.is_set():
                has_met.set()
                meeting.wait()
            time.sleep(duration_s)

        banks.append(bank(f"emulated:{index}", 1e9, time, sleep))
    home, _ = stored(banks, 4 * MIB)
    fetch(home, Cells(home.layout, 1, CpuBackend()), [0], [0], has_hands=True)
    assert not meeting.broken


def test_a_bank_says_that_it_is_slow_only_after_enough_bytes() -> None:
    time = Time()
    slow = bank("emulated:slow", 1e9, time)
    target = torch.empty(16 * MIB, dtype=torch.uint8)
    home = HomeBuilder([slow], "off").store(
        "layer", {"w": torch.zeros(1, 16 * MIB, dtype=torch.uint8)}, [(Part(0, 1.0),)]
    )
    slow._sleep = lambda duration_s: time.sleep(duration_s + 1.0)  # a machine that is behind by a second
    for read_count in range(1, 7):
        home.read(0, [target])
        assert slow.keeps_pace is (read_count < 4)
        assert ("too slow" in slow.describe()) is (read_count >= 4)


def test_a_bank_in_words_names_its_device() -> None:
    (made,) = make_banks([BankSpec.parse("emulated:1us,1GB/s=1GiB")], Profiles())
    assert made.describe() == (
        "bank emulated:1us,1GB/s: 0 B in use, EMULATED: DRAM at the pace of a device of 1 us, 1 GB/s"
    )


def test_tails_of_two_devices_do_not_strike_in_lockstep() -> None:
    made = make_banks([BankSpec.parse("emulated:cxl-a=1GiB"), BankSpec.parse("emulated:cxl-b=1GiB")], Profiles())
    again = make_banks([BankSpec.parse("emulated:cxl-a=1GiB")], Profiles())

    def in_tail(index: int, of: list[EmulatedBank]) -> list[bool]:
        model, base_s = of[index]._model, of[index].profile.latency_s
        return [model.submit(float(i), 0) - i > 1.001 * base_s for i in range(2000)]

    first = in_tail(0, made)  # type: ignore[arg-type]
    assert any(first) and first != in_tail(1, made)  # type: ignore[arg-type]
    assert first == in_tail(0, again)  # type: ignore[arg-type]
