"""Placement: which bank is chosen, what a stripe is made of, and how little moves."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from vllm_moecxl.control.account import LayerNeed
from vllm_moecxl.control.placement import CLASS_RATIO, STRIPE_BYTES_MIN, BankView, Part, Placement, Route, place
from vllm_moecxl.errors import CapacityError
from vllm_moecxl.types import StripeMode, Tier
from vllm_moecxl.units import MIB

SLAB = MIB
#: 4000 experts in 8 layers: enough for a hash's proportions to show.
LAYERS = [LayerNeed(f"layers.{i}", 500, 4, SLAB) for i in range(8)]
SMALL = [LayerNeed(f"layers.{i}", 8, 2, SLAB) for i in range(2)]
#: Expert 0 is the coldest of its layer, and layer 1 hotter than layer 0 at its hot end.
SKEWED = [np.arange(8.0) + 1, np.arange(8.0) ** 2 + 1]


def bank(
    identity: str,
    tier: Tier = "cxl",
    *,
    slabs: float = 10**6,
    latency_s: float = 200e-9,
    gb_per_s: float = 20.0,
) -> BankView:
    return BankView(identity, tier, int(slabs * SLAB), latency_s, gb_per_s * 1e9)


def route_of(placement: Placement, layer_id: int, expert_id: int) -> Route:
    return placement.routes[placement.route_ids[layer_id][expert_id]]


def homes(placement: Placement) -> list[int]:
    """Bank index of every expert, in the order of layers; stripes are no single home."""
    indices = []
    for route_ids in placement.route_ids:
        for route_id in route_ids:
            (part,) = placement.routes[route_id]
            assert part.share == 1
            indices.append(part.bank_index)
    return indices


def named(banks: list[BankView], placement: Placement) -> list[str]:
    return [banks[index].identity for index in homes(placement)]


# The order of preference.


def test_the_hottest_experts_of_all_layers_get_the_best_class_then_the_next_tier_then_the_file() -> None:
    banks = [
        bank("slow", gb_per_s=10, slabs=4),
        bank("fast", gb_per_s=30, slabs=4),
        bank("dram", "dram", gb_per_s=80, slabs=4),
        bank("file", "file", gb_per_s=3),
    ]
    names = np.array(named(banks, place(SMALL, SKEWED, banks, "never"))).reshape(2, 8)
    heat = np.stack([values / values.sum() for values in SKEWED])
    order = np.argsort(-heat, axis=None, kind="stable")
    assert names.reshape(-1)[order].tolist() == ["fast"] * 4 + ["slow"] * 4 + ["dram"] * 4 + ["file"] * 4


def test_tiers_are_used_in_the_order_in_which_the_user_names_them() -> None:
    banks = [bank("dram", "dram", slabs=5), bank("cxl", gb_per_s=90, slabs=5), bank("dram2", "dram", slabs=5)]
    counts = Counter(named(banks, place(SMALL[:1], None, banks, "never")))
    assert counts["dram"] + counts["dram2"] == 8 and counts["cxl"] == 0


@pytest.mark.parametrize(
    ("latency_s", "gb_per_s", "first"),
    [(200e-9, 20.0, "b"), (1e-3, 20.0, "a"), (200e-9, 5.0, "a")],
)
def test_latency_and_bandwidth_both_make_the_class(latency_s: float, gb_per_s: float, first: str) -> None:
    banks = [bank("a", gb_per_s=10), bank("b", latency_s=latency_s, gb_per_s=gb_per_s)]
    assert set(named(banks, place(SMALL, None, banks, "never"))) == {first}


def test_banks_within_the_class_ratio_are_one_class() -> None:
    near = bank("near", latency_s=0, gb_per_s=20 / CLASS_RATIO * 1.001)
    beyond = bank("beyond", latency_s=0, gb_per_s=20 / CLASS_RATIO * 0.999)
    banks = [bank("best", latency_s=0), near, beyond]
    assert set(named(banks, place(LAYERS, None, banks, "never"))) == {"best", "near"}


def test_what_counts_is_a_layers_share_and_not_its_traffic() -> None:
    banks = [bank("fast", "cxl", slabs=8), bank("dram", "dram")]
    busy = [SKEWED[0] * 1e6, SKEWED[1]]
    assert homes(place(SMALL, busy, banks, "never")) == homes(place(SMALL, SKEWED, banks, "never"))


def test_a_layer_that_routes_each_token_to_more_experts_is_hotter() -> None:
    layers = [replace(SMALL[0], topk=1), replace(SMALL[1], topk=3)]
    banks = [bank("fast", "cxl", slabs=8), bank("dram", "dram")]
    assert homes(place(layers, [np.ones(8), np.ones(8)], banks, "never")) == [1] * 8 + [0] * 8


@pytest.mark.parametrize("frequencies", [None, [np.full(8, 0.125), np.full(8, 0.125)], [np.zeros(8), np.zeros(8)]])
def test_where_nothing_is_known_each_layer_gets_its_share_of_the_fast_tier(
    frequencies: list[npt.NDArray[np.float64]] | None,
) -> None:
    banks = [bank("fast", "cxl", slabs=6), bank("dram", "dram")]
    placement = place(SMALL, frequencies, banks, "never")
    assert [homes(placement)[start : start + 8].count(0) for start in (0, 8)] == [3, 3]
    assert [hot.size for hot in placement.hot] == [0, 0]


def test_layers_of_unequal_size_get_equal_shares_where_nothing_is_known() -> None:
    layers = [LayerNeed("wide", 40, 2, SLAB), LayerNeed("narrow", 10, 2, SLAB)]
    placement = place(layers, None, [bank("fast", "cxl", slabs=25), bank("dram", "dram")], "never")
    assert homes(placement)[:40].count(0) == 20 and homes(placement)[40:].count(0) == 5


def test_a_layer_that_nobody_used_is_neither_hot_nor_cold() -> None:
    frequencies = [np.zeros(8), np.array([9.0, 9, 9, 9, 1, 1, 1, 1])]
    placement = place(SMALL, frequencies, [bank("fast", "cxl", slabs=12), bank("dram", "dram")], "never")
    assert homes(placement) == [0] * 12 + [1] * 4
    assert [hot.tolist() for hot in placement.hot] == [[], [0, 1, 2, 3, 4, 5, 6, 7]]


def test_hot_names_the_experts_of_a_layer_hottest_first() -> None:
    placement = place(SMALL, [np.array([1.0, 5, 5, 0, 2, 9, 1, 1]), np.ones(8)], [bank("a")], "never")
    assert placement.hot[0].tolist() == [5, 1, 2, 4, 0, 6, 7, 3] and placement.hot[1].tolist() == []


# Sharding over the banks of a class.


def test_banks_of_a_class_get_experts_in_proportion_to_their_bandwidth() -> None:
    banks = [bank("a", gb_per_s=20), bank("b", gb_per_s=25)]
    counts = Counter(named(banks, place(LAYERS, None, banks, "never")))
    share = 20 / 45
    deviation = (4000 * share * (1 - share)) ** 0.5
    assert abs(counts["a"] - 4000 * share) < 4 * deviation


def test_every_layer_is_spread_over_the_banks() -> None:
    banks = [bank("a"), bank("b")]
    spread = np.array(homes(place(LAYERS, None, banks, "never"))).reshape(8, 500).mean(axis=1)
    assert np.all(np.abs(spread - 0.5) < 0.1) and len(set(spread.tolist())) > 1


def test_a_bank_that_joins_a_class_takes_its_share_and_nothing_else_moves() -> None:
    banks = [bank("a"), bank("b"), bank("c")]
    before = named(banks, place(LAYERS, None, banks, "never"))
    more = [bank("new"), *banks]
    after = named(more, place(LAYERS, None, more, "never"))
    moved = [new for old, new in zip(before, after, strict=True) if old != new]
    assert set(moved) == {"new"} and abs(len(moved) - 1000) < 4 * 1000**0.5


def test_a_bank_that_leaves_gives_only_its_own_away() -> None:
    banks = [bank("a"), bank("b"), bank("c")]
    before = named(banks, place(LAYERS, None, banks, "never"))
    after = named(banks[1:], place(LAYERS, None, banks[1:], "never"))
    assert {old for old, new in zip(before, after, strict=True) if old != new} == {"a"} and "a" not in after


def test_little_more_moves_when_banks_are_nearly_full() -> None:
    """90 % full: experts that found their bank full come home when a new one makes room, few beside its own share."""
    banks = [bank(name, slabs=1111) for name in "abcd"]
    before = named(banks, place(LAYERS, None, banks, "never"))
    more = [*banks, bank("new", slabs=1111)]
    after = named(more, place(LAYERS, None, more, "never"))
    moved = sum(old != new for old, new in zip(before, after, strict=True))
    assert moved <= after.count("new") + 0.02 * 4000


def test_the_hash_knows_banks_and_layers_by_name() -> None:
    banks = [bank("a"), bank("b")]
    swapped = named(banks[::-1], place(LAYERS, None, banks[::-1], "never"))
    names = named(banks, place(LAYERS, None, banks, "never"))
    assert swapped == names, "the order of equal banks does not matter"
    assert names[:500] == named(banks, place(LAYERS[:1], None, banks, "never")), "nor do other layers"
    renamed = [bank("a"), bank("z")]
    assert named(renamed, place(LAYERS, None, renamed, "never")) != [name.replace("b", "z") for name in names]


def test_the_frequency_of_an_expert_does_not_move_it_within_a_class() -> None:
    banks = [bank("a"), bank("b")]
    heat = [np.random.default_rng(i).random(500) for i in range(8)]
    assert homes(place(LAYERS, heat, banks, "never")) == homes(place(LAYERS, None, banks, "never"))


def test_another_process_comes_to_the_same_placement() -> None:
    code = (
        "from tests.unit.test_placement import *\n"
        "print(homes(place(SMALL, SKEWED, [bank('a'), bank('b'), bank('c', slabs=2)], 'never')))"
    )
    expected = homes(place(SMALL, SKEWED, [bank("a"), bank("b"), bank("c", slabs=2)], "never"))
    out = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert out == f"{expected}\n"


# Capacity.


def test_a_full_bank_is_passed_over_for_the_next_of_its_class() -> None:
    banks = [bank("a", slabs=1.9), bank("b", slabs=20), bank("dram", "dram")]
    assert Counter(named(banks, place(SMALL, None, banks, "never"))) == {"a": 1, "b": 15}


def test_a_bank_is_filled_to_the_last_byte() -> None:
    banks = [bank("a", slabs=7), bank("b", slabs=9)]
    assert Counter(named(banks, place(SMALL, None, banks, "never"))) == {"a": 7, "b": 9}


def test_small_slabs_use_the_room_that_is_too_small_for_large_ones() -> None:
    layers = [LayerNeed("large", 4, 1, 4 * SLAB), LayerNeed("small", 4, 1, SLAB)]
    placement = place(layers, [np.ones(4), np.ones(4)], [bank("a", slabs=7), bank("dram", "dram")], "never")
    assert homes(placement)[:4].count(0) == 1 and homes(placement)[4:].count(0) >= 3


def test_what_does_not_fit_is_named_with_the_remedy_and_the_remedy_helps() -> None:
    banks = [bank("cxl-1", slabs=6.5), bank("dram", "dram", slabs=4)]
    with pytest.raises(CapacityError) as refused:
        place(SMALL, None, banks, "never")
    assert str(refused.value) == (
        "--moe-offload-config banks=['cxl-1', 'dram'] together give 10.50 MiB and the experts take 16.00 MiB, of which "
        '6.00 MiB do not fit: give the banks at least 6MiB more, or add one, such as "file:PATH"'
    )
    place(SMALL, None, [banks[0], bank("dram", "dram", slabs=4 + 6)], "never")
    place(SMALL, None, [*banks, bank("file", "file")], "never")


def test_no_bank_is_named_as_such() -> None:
    with pytest.raises(CapacityError, match=r"--moe-offload-config banks=\[\] leaves 16.00 MiB of experts without"):
        place(SMALL, None, [], "auto")


@pytest.mark.parametrize("banks", [[bank("a"), bank("a")], [replace(bank("a"), read_bytes_per_s=0.0)]])
def test_banks_that_cannot_be_told_apart_or_read_are_a_bug_of_the_caller(banks: list[BankView]) -> None:
    with pytest.raises(AssertionError):
        place(SMALL, None, banks, "never")


@pytest.mark.parametrize("values", [np.ones(7), np.full(8, np.nan), np.full(8, np.inf), np.arange(8.0) - 1])
def test_frequencies_of_another_shape_or_no_frequencies_are_a_bug_of_the_caller(
    values: npt.NDArray[np.float64],
) -> None:
    with pytest.raises(AssertionError):
        place(SMALL, [values, np.ones(8)], [bank("a")], "never")


# Stripes.

LARGE = [LayerNeed("layers.0", 12, 2, STRIPE_BYTES_MIN)]
#: Slabs of `LARGE` in slabs of `bank`.
UNIT = STRIPE_BYTES_MIN / SLAB


def members(route: Route) -> tuple[int, ...]:
    return tuple(part.bank_index for part in route)


@pytest.mark.parametrize(
    ("slab_bytes", "stripe", "expected"),
    [
        (STRIPE_BYTES_MIN, "auto", {(0, 1)}),
        (STRIPE_BYTES_MIN - 1, "auto", {(0,), (1,)}),
        (STRIPE_BYTES_MIN, "never", {(0,), (1,)}),
        (STRIPE_BYTES_MIN, "all", {(0, 1, 2, 4)}),
        (64, "all", {(0, 1, 2, 4)}),
    ],
)
def test_who_is_striped_over_what(slab_bytes: int, stripe: StripeMode, expected: set[tuple[int, ...]]) -> None:
    banks = [bank("a"), bank("b"), bank("d", "dram"), bank("f", "file"), bank("e", "dram")]
    placement = place([LayerNeed("layers.0", 12, 2, slab_bytes)], None, banks, stripe)
    assert {members(route) for route in placement.routes} == expected


def test_parts_are_in_proportion_to_bandwidth_whatever_the_class() -> None:
    banks = [bank("a", gb_per_s=30), bank("b", gb_per_s=10)]
    assert place(LARGE, None, banks, "auto").routes == ((Part(0, 0.75), Part(1, 0.25)),)


@pytest.mark.parametrize("stripe", ["auto", "all"])
def test_files_are_not_striped(stripe: StripeMode) -> None:
    banks = [bank("f", "file"), bank("g", "file")]
    assert {members(route) for route in place(LARGE, None, banks, stripe).routes} == {(0,), (1,)}


@pytest.mark.parametrize("stripe", ["auto", "all"])
def test_a_file_that_the_user_prefers_comes_before_the_stripe(stripe: StripeMode) -> None:
    banks = [bank("f", "file", slabs=2 * UNIT), bank("a"), bank("b")]
    placement = place(LARGE, [np.arange(12.0)], banks, stripe)
    assert [members(route_of(placement, 0, i)) for i in range(12)] == [(1, 2)] * 10 + [(0,)] * 2


def test_a_full_bank_leaves_the_stripe_and_the_last_one_goes_on_alone() -> None:
    """Thirds of 3 slabs fill `a`, halves of 4 fill `b`, `c` has room for 4 whole ones, and DRAM takes the last."""
    banks = [
        bank("a", slabs=UNIT + 0.01),  # a third of a slab is no whole number of bytes
        bank("b", slabs=3 * UNIT + 0.01),
        bank("c", slabs=7 * UNIT + 0.01),
        bank("d", "dram"),
    ]
    placement = place(LARGE, [12 - np.arange(12.0)], banks, "auto")
    lies = [members(route_of(placement, 0, i)) for i in range(12)]
    assert lies[:3] == [(0, 1, 2)] * 3
    assert lies[3:7] == [(1, 2)] * 4
    assert lies[7:11] == [(2,)] * 4
    assert lies[11:] == [(3,)]


def test_after_the_stripe_of_one_tier_comes_the_stripe_of_the_next() -> None:
    banks = [bank("a", slabs=UNIT), bank("b", slabs=UNIT), bank("d", "dram"), bank("e", "dram")]
    placement = place(LARGE, [12 - np.arange(12.0)], banks, "auto")
    assert [members(route_of(placement, 0, i)) for i in range(12)] == [(0, 1)] * 2 + [(2, 3)] * 10


def test_a_part_may_take_more_than_its_share_when_rows_are_cut_at_granules() -> None:
    banks = [bank("a", slabs=UNIT), bank("b", slabs=UNIT), bank("f", "file")]
    exact, slack = (place(LARGE, None, banks, "auto", part_slack_bytes=slack) for slack in (0, 4096))
    striped = [
        np.count_nonzero(one.route_ids[0] == one.routes.index((Part(0, 0.5), Part(1, 0.5)))) for one in (exact, slack)
    ]
    assert striped == [2, 1]


def test_a_slab_that_lies_whole_in_one_bank_needs_no_slack() -> None:
    banks = [bank("a", slabs=12 * UNIT)]
    assert place(LARGE, None, banks, "auto", part_slack_bytes=4096).routes == ((Part(0, 1.0),),)


def test_each_route_is_listed_once() -> None:
    placement = place(LAYERS, None, [bank("a"), bank("b")], "all")
    assert len(placement.routes) == 1 and all(not route_ids.any() for route_ids in placement.route_ids)
