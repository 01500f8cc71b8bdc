"""Placement on any banks: every expert has one home, no bank holds more than it can, and heat decides."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moecxl.control import placement as module
from vllm_moecxl.control.account import LayerNeed
from vllm_moecxl.control.placement import BankView, Placement, Route
from vllm_moecxl.control.striping import cut
from vllm_moecxl.errors import CapacityError
from vllm_moecxl.types import StripeMode, Tier

TIERS: tuple[Tier, ...] = ("cxl", "dram", "file")
KNOWN = st.booleans()
STRIPES: tuple[StripeMode, ...] = ("auto", "never", "all")
#: Below and above the size from which "auto" stripes.
SLABS = (module.STRIPE_BYTES_MIN // 2, module.STRIPE_BYTES_MIN, 3 * module.STRIPE_BYTES_MIN + 1)


@dataclass(frozen=True)
class Case:
    layers: list[LayerNeed]
    frequencies: list[npt.NDArray[np.float64]] | None
    banks: list[BankView]
    stripe: StripeMode
    slack_bytes: int

    def place(self, banks: list[BankView] | None = None) -> Placement:
        banks = self.banks if banks is None else banks
        return module.place(self.layers, self.frequencies, banks, self.stripe, part_slack_bytes=self.slack_bytes)


@st.composite
def cases(
    draw: st.DrawFn, *, stripes: tuple[StripeMode, ...] = STRIPES, known: st.SearchStrategy[bool] = KNOWN
) -> Case:
    counts = draw(st.lists(st.integers(1, 8), min_size=1, max_size=4))
    layers = [
        LayerNeed(f"layers.{i}", n, draw(st.integers(1, n)), draw(st.sampled_from(SLABS))) for i, n in enumerate(counts)
    ]
    frequencies = [
        np.array(draw(st.lists(st.integers(0, 5), min_size=n, max_size=n)), dtype=np.float64) for n in counts
    ]
    banks = [
        BankView(
            f"bank {i}",
            draw(st.sampled_from(TIERS)),
            draw(st.integers(0, 20 * SLABS[1])),
            draw(st.sampled_from([0.0, 200e-9, 1e-3])),
            draw(st.sampled_from([5e9, 20e9, 24e9, 60e9])),
        )
        for i in range(draw(st.integers(1, 5)))
    ]
    return Case(
        layers,
        frequencies if draw(known) else None,
        banks,
        draw(st.sampled_from(stripes)),
        draw(st.sampled_from([0, 4096])),
    )


def used_bytes(case: Case, placement: Placement) -> list[int]:
    used = [0] * len(case.banks)
    for layer, route_ids in zip(case.layers, placement.route_ids, strict=True):
        for route_id in route_ids.tolist():
            route = placement.routes[route_id]
            slack_bytes = case.slack_bytes if len(route) > 1 else 0
            for part, (start, stop) in zip(
                route, cut(layer.slab_bytes, [part.share for part in route], 1), strict=True
            ):
                used[part.bank_index] += stop - start + slack_bytes
    return used


def check_room(case: Case) -> None:
    """Homes fit their banks, or the refusal was not for want of trying."""
    slab_bytes = [layer.slab_bytes for layer in case.layers]
    total = sum(layer.home_bytes for layer in case.layers)
    try:
        placement = case.place()
    except CapacityError:
        # What can be left over: less than a slab and a part in each bank, and what the stripes' parts took in excess.
        expert_count = sum(layer.expert_count for layer in case.layers)
        excess = expert_count * len(case.banks) * case.slack_bytes
        waste = len(case.banks) * max(slab_bytes)
        assert sum(bank.capacity_bytes for bank in case.banks) < total + waste + excess
        return
    assert [ids.shape for ids in placement.route_ids] == [(layer.expert_count,) for layer in case.layers]
    assert set(np.concatenate(placement.route_ids).tolist()) == set(range(len(placement.routes)))
    assert len(set(placement.routes)) == len(placement.routes)
    for used, bank in zip(used_bytes(case, placement), case.banks, strict=True):
        assert used <= bank.capacity_bytes


@settings(max_examples=400)
@given(cases())
def test_no_bank_holds_more_than_it_can(case: Case) -> None:
    check_room(case)


def check_routes(case: Case) -> None:
    """A stripe is over memory only, of one tier unless all were asked for, in proportion to bandwidth."""
    for route in case.place(roomy(case.banks)).routes:
        banks = [case.banks[part.bank_index] for part in route]
        assert abs(sum(part.share for part in route) - 1) < 1e-12
        assert len({part.bank_index for part in route}) == len(route)
        if len(route) > 1:
            assert case.stripe != "never" and all(bank.tier != "file" for bank in banks)
            assert case.stripe == "all" or len({bank.tier for bank in banks}) == 1
            rates = sum(bank.read_bytes_per_s for bank in banks)
            for part, bank in zip(route, banks, strict=True):
                assert abs(part.share - bank.read_bytes_per_s / rates) < 1e-12


def roomy(banks: list[BankView]) -> list[BankView]:
    """The same banks with their room enlarged, so that a case without room is one with little."""
    return [BankView(b.identity, b.tier, b.capacity_bytes + (1 << 40), b.latency_s, b.read_bytes_per_s) for b in banks]


@settings(max_examples=200)
@given(cases())
def test_stripes_are_over_the_banks_that_were_asked_for(case: Case) -> None:
    check_routes(case)


def heat(case: Case) -> list[npt.NDArray[np.float64]]:
    assert case.frequencies is not None
    heats = []
    for layer, values in zip(case.layers, case.frequencies, strict=True):
        total = values.sum()
        heats.append(layer.topk * (values / total if total else np.full(values.size, 1 / values.size)))
    return heats


def rank(case: Case, route: Route, slab_bytes: int) -> tuple[int, float]:
    """How good a home is, less is better: its tier, then its fetch; a stripe is better than any part of itself."""
    banks = [case.banks[part.bank_index] for part in route]
    tiers = list(dict.fromkeys(bank.tier for bank in case.banks))
    rates = sum(bank.read_bytes_per_s for bank in banks)
    if len(route) > 1:
        return min(tiers.index(bank.tier) for bank in banks), -rates
    return tiers.index(banks[0].tier), banks[0].fetch_s(slab_bytes) / module.CLASS_RATIO


def check_heat(case: Case) -> None:
    """Of two experts with slabs of one size, the hotter has no worse home: tier, stripe's bandwidth, class of bank."""
    placement = case.place()
    homes: dict[int, list[tuple[float, int, float]]] = {}
    for layer, values, route_ids in zip(case.layers, heat(case), placement.route_ids, strict=True):
        for value, route_id in zip(values.tolist(), route_ids.tolist(), strict=True):
            tier, cost = rank(case, placement.routes[route_id], layer.slab_bytes)
            homes.setdefault(layer.slab_bytes, []).append((value, tier, cost))
    for alike in homes.values():
        for (hot, tier, cost), (cold, other_tier, other_cost) in permutations(alike, 2):
            if hot > cold * (1 + 1e-12):
                assert tier <= other_tier
                # Banks of one class are within the ratio of each other.
                assert tier < other_tier or cost <= other_cost * (module.CLASS_RATIO if cost > 0 else 1)


def with_endless_file(case: Case) -> Case:
    endless = BankView("endless", "file", 1 << 50, 1e-3, 1e9)
    return replace(case, banks=[*(bank for bank in case.banks if bank.tier != "file"), endless])


@settings(max_examples=300)
@given(cases(stripes=("auto", "never"), known=st.just(True)).map(with_endless_file))
def test_a_hotter_expert_never_has_a_worse_home_than_a_colder_one_of_its_size(case: Case) -> None:
    check_heat(case)


def check_removal(case: Case, gone: int) -> None:
    """Where nothing is full, a bank that leaves a class moves its own experts and no others."""
    alike = [BankView(f"bank {i}", "cxl", 1 << 40, 200e-9, 20e9 + i * 1e9) for i in range(5)]
    fewer = [bank for i, bank in enumerate(alike) if i != gone]
    case = Case(case.layers, case.frequencies, alike, "never", 0)
    before, after = case.place(), case.place(fewer)
    for old_ids, new_ids in zip(before.route_ids, after.route_ids, strict=True):
        for old_id, new_id in zip(old_ids.tolist(), new_ids.tolist(), strict=True):
            old, new = alike[before.routes[old_id][0].bank_index], fewer[after.routes[new_id][0].bank_index]
            assert old == new or old == alike[gone]


@given(cases(), st.integers(0, 4))
def test_a_bank_that_leaves_or_joins_moves_only_its_own(case: Case, gone: int) -> None:
    check_removal(case, gone)


@given(cases())
def test_placement_is_a_function_of_its_arguments(case: Case) -> None:
    banks = roomy(case.banks)
    one, other = case.place(banks), case.place(banks)
    assert one.routes == other.routes
    assert all(np.array_equal(a, b) for a, b in zip(one.route_ids, other.route_ids, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(one.hot, other.hot, strict=True))
