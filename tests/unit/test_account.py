"""The byte account: what is planned, what is refused, and that the remedy in a refusal helps."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from vllm_moecxl.config import OffloadConfig
from vllm_moecxl.control import account as accounts
from vllm_moecxl.control.account import (
    Account,
    Holding,
    LayerNeed,
    Machine,
    require_host_room,
    sum_home_bytes,
    wanted_device_bytes,
)
from vllm_moecxl.errors import CapacityError, ConfigError
from vllm_moecxl.units import GIB, MIB

#: Two layers of 8 experts, top-2, 10 MiB each: 80 MiB a layer.
LAYERS = [LayerNeed(f"layers.{i}", expert_count=8, topk=2, slab_bytes=10 * MIB) for i in range(2)]
#: The second layer needs a larger share of its experts for one token.
UNEVEN = [LayerNeed("a", 16, 2, 10 * MIB), LayerNeed("b", 4, 2, 10 * MIB)]


def plan(
    config: OffloadConfig, layers: Sequence[LayerNeed], machine: Machine, holdings: Sequence[Holding] | None = None
) -> Account:
    """The account with all homes in DRAM, where a test says nothing else."""
    in_dram = [Holding("dram", sum_home_bytes(layers), on_host=True)]
    return accounts.plan(config, layers, machine, in_dram if holdings is None else holdings)


def config(**options: Any) -> OffloadConfig:
    return OffloadConfig.parse({"mode": "cxl", **options})


def machine(device_mib: int, host_mib: int = 10_000, *, shared: bool = False, kv: int | None = None) -> Machine:
    return Machine(host_mib * MIB, device_mib * MIB, shared, kv)


def test_the_account_adds_up() -> None:
    account = plan(config(slots="50%"), LAYERS, machine(1000, kv=GIB))
    assert account == Account(
        slot_counts=(4, 4),
        holdings=(Holding("dram", 160 * MIB, on_host=True),),
        slot_bytes=80 * MIB,
        layer_buffer_count=2,
        layer_buffer_bytes=160 * MIB,
        largest_layer_bytes=80 * MIB,
        kv_cache_bytes=GIB,
    )


@pytest.mark.parametrize(("kv", "told"), [(GIB, "1.00 GiB"), (None, "what vLLM finds free")])
def test_the_account_in_words_names_every_quantity(kv: int | None, told: str) -> None:
    text = "\n".join(plan(config(slots="25%"), LAYERS, machine(1000, kv=kv)).lines(LAYERS))
    assert re.search(r"^experts +16 in 2 layers, 160.00 MiB$", text, re.M)
    assert re.search(r"^homes +bank dram: 160.00 MiB$", text, re.M)
    assert re.search(r"^slots +4 \(25% of the experts\), 40.00 MiB on the device$", text, re.M)
    assert re.search(r"^layer buffers +2, 160.00 MiB on the device$", text, re.M)
    assert re.search(r"^loading +one layer at a time, 80.00 MiB on the device$", text, re.M)
    assert re.search(rf"^KV cache +{re.escape(told)}$", text, re.M)


@pytest.mark.parametrize(
    ("slots", "expected"), [(2, (2, 2)), ("100%", (8, 8)), ("90MiB", (5, 4)), ("40MiB", (2, 2)), ("10GiB", (8, 8))]
)
def test_slots_are_resolved_for_each_layer(slots: object, expected: tuple[int, ...]) -> None:
    assert plan(config(slots=slots), LAYERS, machine(1000)).slot_counts == expected


@pytest.mark.parametrize(("slots", "expected"), [("80MiB", (2, 6)), ("50%", (4, 4)), (4, (4, 4))])
def test_slots_for_all_layers_together_go_where_a_trace_says_that_they_save_most(
    slots: object, expected: tuple[int, ...]
) -> None:
    curves = np.array([[9, 8, 8, 8, 8, 8, 8, 8, 8], [90, 80, 70, 60, 50, 40, 30, 29, 28]])
    holdings = [Holding("dram", sum_home_bytes(LAYERS), on_host=True)]
    account = accounts.plan(config(slots=slots, layer_buffer=False), LAYERS, machine(1000), holdings, curves)
    assert account.slot_counts == expected


def test_a_share_follows_each_layers_own_expert_count() -> None:
    assert plan(config(slots="50%"), UNEVEN, machine(1000)).slot_counts == (8, 2)


@pytest.mark.parametrize(("device_mib", "expected"), [(180, (8, 8)), (150, (4, 3)), (1000, (8, 8)), (120, (2, 2))])
def test_auto_on_a_device_of_its_own_fills_what_the_layer_buffer_leaves(device_mib: int, expected: object) -> None:
    account = plan(config(), LAYERS, machine(device_mib))
    assert account.slot_counts == expected
    assert account.slot_bytes + account.layer_buffer_bytes <= device_mib * MIB


@pytest.mark.parametrize(("device_mib", "expected"), [(10_000, (4, 4)), (300, (3, 3)), (280, (2, 2))])
def test_auto_on_the_host_spends_at_most_half_of_the_homes_again(device_mib: int, expected: object) -> None:
    assert plan(config(), LAYERS, machine(device_mib, shared=True)).slot_counts == expected


def test_auto_never_plans_fewer_slots_than_one_token_needs() -> None:
    assert plan(config(), LAYERS, machine(40)).slot_counts == (2, 2)


@pytest.mark.parametrize(
    ("wish", "device_mib", "expected_mib"),
    [("auto", 120, 80), ("auto", 119, 0), (True, 120, 80), (False, 1000, 0)],
)
def test_the_layer_buffer_is_there_where_it_is_asked_for_or_fits(
    wish: object, device_mib: int, expected_mib: int
) -> None:
    account = plan(config(slots="25%", layer_buffer=wish), LAYERS, machine(device_mib))
    assert account.layer_buffer_bytes == expected_mib * MIB


@pytest.mark.parametrize(
    ("options", "layers", "device_mib", "expected"),
    [
        pytest.param({}, LAYERS, 200, 2, id="it fits"),
        pytest.param({}, LAYERS, 199, 1, id="it does not fit"),
        pytest.param({"layer_buffer": True}, LAYERS, 199, 1, id="one was asked for"),
        pytest.param({"sidecar": False}, LAYERS, 1000, 1, id="nobody fills it meanwhile"),
        pytest.param({}, LAYERS[:1], 1000, 1, id="no layer comes after"),
        pytest.param({}, UNEVEN, 1000, 1, id="none of the same shape does"),
        pytest.param({"layer_buffer": False}, LAYERS, 1000, 0, id="not even one"),
    ],
)
def test_a_second_layer_buffer_is_there_where_the_next_layer_is_streamed_into_it_and_it_fits(
    options: dict[str, Any], layers: list[LayerNeed], device_mib: int, expected: int
) -> None:
    account = plan(config(slots=2, **options), layers, machine(device_mib))
    assert account.layer_buffer_count == expected
    one_bytes = plan(config(slots=2, sidecar=False), layers, machine(10_000)).layer_buffer_bytes
    assert account.layer_buffer_bytes == expected * one_bytes


@pytest.mark.parametrize(
    ("options", "device_mib", "expected"),
    [({}, 800, (2, 640)), ({}, 799, (1, 710)), ({"sidecar": False}, 800, (1, 720))],
)
def test_auto_leaves_room_for_a_second_layer_buffer_where_it_takes_a_tenth_or_less(
    options: dict[str, Any], device_mib: int, expected: tuple[int, int]
) -> None:
    layers = [LayerNeed(f"layers.{i}", expert_count=8, topk=2, slab_bytes=10 * MIB) for i in range(20)]
    account = plan(config(**options), layers, machine(device_mib))
    assert (account.layer_buffer_count, account.slot_bytes // MIB) == expected


def test_no_layer_buffer_where_every_expert_has_a_slot() -> None:
    assert plan(config(slots="100%", layer_buffer=True), LAYERS, machine(160)).layer_buffer_bytes == 0


def test_every_bank_has_a_line_with_what_it_homes() -> None:
    holdings = [Holding("numa:1", 100 * MIB, on_host=False), Holding("dram", 60 * MIB, on_host=True)]
    account = plan(config(slots="25%"), LAYERS, machine(1000), holdings)
    assert account.holdings == tuple(holdings)
    homes = [line.split(maxsplit=1)[1] for line in account.lines(LAYERS) if line.startswith("homes")]
    assert homes == ["bank numa:1: 100.00 MiB", "bank dram: 60.00 MiB"]


def test_homes_that_do_not_fit_the_host_are_refused_with_all_that_would_help() -> None:
    with pytest.raises(CapacityError, match=r"homes take 160.00 MiB of host memory and only 159.00 MiB are free") as no:
        plan(config(), LAYERS, machine(1000, host_mib=159))
    assert "add a bank elsewhere (CXL memory, or a slab file made by moecxl pack)" in str(no.value)
    require_host_room(159 * MIB, machine(0, host_mib=159))


def test_only_homes_in_the_hosts_dram_take_the_hosts_memory() -> None:
    outside = [Holding("numa:1", 160 * MIB, on_host=False)]
    assert plan(config(slots="25%"), LAYERS, machine(40, host_mib=0, shared=True), outside).slot_bytes == 40 * MIB
    both = [Holding("file:a", 100 * MIB, on_host=False), Holding("dram", 60 * MIB, on_host=True)]
    assert plan(config(slots="25%"), LAYERS, machine(100, host_mib=60, shared=True), both).slot_bytes == 40 * MIB
    with pytest.raises(CapacityError, match=r"39.00 MiB are left for them"):
        plan(config(slots="25%"), LAYERS, machine(99, host_mib=60, shared=True), both)


def test_auto_spends_what_there_is_where_no_home_is_in_the_hosts_dram() -> None:
    outside = [Holding("file:a", 160 * MIB, on_host=False)]
    assert plan(config(), LAYERS, machine(160, shared=True), outside).slot_counts == (8, 8)
    assert plan(config(), LAYERS, machine(140, shared=True), outside).slot_counts == (3, 3)


@pytest.mark.parametrize(
    ("options", "expected_mib"),
    [
        ({"slots": "70MiB"}, 150),
        ({"slots": "70MiB", "layer_buffer": False}, 70),
        ({"slots": "50%"}, 160),
        ({"slots": 3, "layer_buffer": False}, 60),
        ({"slots": "auto"}, 120),
        ({}, 120),
    ],
)
def test_what_the_device_has_to_give_at_least(options: dict[str, Any], expected_mib: int) -> None:
    assert wanted_device_bytes(config(**options), LAYERS) == expected_mib * MIB


def test_homes_and_slots_share_the_memory_of_the_host() -> None:
    assert plan(config(slots="25%"), LAYERS, machine(200, shared=True)).slot_bytes == 40 * MIB
    with pytest.raises(CapacityError, match=r"39.00 MiB are left for them"):
        plan(config(slots="25%"), LAYERS, machine(199, shared=True))


@pytest.mark.parametrize("layers", [LAYERS, UNEVEN], ids=["even", "uneven"])
def test_bytes_too_few_for_one_token_are_refused_and_the_least_they_name_is_accepted(layers: list[LayerNeed]) -> None:
    with pytest.raises(
        ConfigError, match=r"slots='15MiB' is not possible: every layer needs slots for the top-k"
    ) as no:
        plan(config(slots="15MiB"), layers, machine(1000))
    least = str(no.value).rpartition(" ")[2]
    account = plan(config(slots=least), layers, machine(1000))
    assert all(count >= layer.topk for count, layer in zip(account.slot_counts, layers, strict=True))


@pytest.mark.parametrize("layer_buffer", [True, False])
@pytest.mark.parametrize("room_mib", [130, 137, 145, 155])
def test_slots_that_do_not_fit_are_refused_and_what_the_sentence_names_fits(
    room_mib: int, *, layer_buffer: bool
) -> None:
    wish = {"layer_buffer": layer_buffer}
    slots = "75%" if layer_buffer else "100%"
    with pytest.raises(
        CapacityError, match=rf"slots='{slots}' takes .*{room_mib}.00 MiB are left for them: use "
    ) as no:
        plan(config(slots=slots, **wish), LAYERS, machine(room_mib))
    advice = re.search(r'use slots="([^"]+)" or less$', str(no.value))
    assert advice
    account = plan(config(slots=advice[1], **wish), LAYERS, machine(room_mib))
    assert min(account.slot_counts) >= 2


@pytest.mark.parametrize("room_mib", [0, 39, 100])
def test_a_device_without_room_for_one_token_is_refused(room_mib: int) -> None:
    with pytest.raises(CapacityError, match=r"not even the top-k of one token fits, lower the KV cache or turn off"):
        plan(config(layer_buffer=True), LAYERS, machine(room_mib))
