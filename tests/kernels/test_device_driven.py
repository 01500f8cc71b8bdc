"""The device-driven path of one layer on the modelled accelerator, with the real kernels interpreted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from moecxl_kernels.tables import ADOPTED

from tests.property.toy_moe import HIDDEN_SIZE, ToyMoe
from tests.support.homes import dram, random_bits, store
from tests.support.prompt_backend import PromptBackend, RandomChooser
from vllm_moecxl.config import OffloadConfig
from vllm_moecxl.control.layer_order import LayerOrder
from vllm_moecxl.control.placement import Part, Route
from vllm_moecxl.data import slabs
from vllm_moecxl.data.banks.base import Bank
from vllm_moecxl.data.banks.memory import MemoryRows
from vllm_moecxl.data.devices.modelled import ModelledBackend
from vllm_moecxl.data.layout import SlabLayout
from vllm_moecxl.data.mover import Mover
from vllm_moecxl.data.slabs import Cells, Home, LayerCells
from vllm_moecxl.errors import CapacityError, ConfigError, IntegrityError
from vllm_moecxl.runtime.counters import Counters
from vllm_moecxl.runtime.device_driven import layer as device_layer
from vllm_moecxl.runtime.device_driven import side as device_side
from vllm_moecxl.runtime.device_driven.dispatch import DeviceDispatch
from vllm_moecxl.runtime.device_driven.side import DeviceSide
from vllm_moecxl.runtime.layer_buffer import LayerBuffer
from vllm_moecxl.runtime.ring import Begun, RoutingRing, Sighting
from vllm_moecxl.types import Lookup, PassKind

EXPERT_COUNT, TOPK = 6, 2


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_layer, "GATHER_PROGRAM_COUNT", 2)  # they are interpreted one after the other


@dataclass
class Helped:
    """Stands for the sidecar."""

    is_up: bool = True


class Layer:
    """One layer behind a `DeviceDispatch`, with a toy kernel."""

    def __init__(
        self,
        slot_count: int,
        *,
        pass_kind: PassKind = PassKind.TOKEN,
        has_buffer: bool = False,
        prefetch: str = "off",
        routes: Sequence[Route] | None = None,
        bank_count: int = 1,
        registers: bool = True,
        is_up: bool = True,
        backend: ModelledBackend | None = None,
    ) -> None:
        self.backend = backend or PromptBackend()
        self.toy = ToyMoe(EXPERT_COUNT, seed=1)
        banks: list[Bank] = [dram(f"bank {index}") for index in range(bank_count)]
        with mock.patch.object(slabs, "STRIPE_GRANULE_BYTES", 4):
            self.home: Home = store(dict(self.toy.tensors), routes, banks)
        self.counters = Counters([bank.name for bank in banks])
        self.mover = Mover(banks, self.backend, self.counters, has_hands=False)
        registered = [bank.name for bank in banks] if registers else []
        for shard in self.home.shards:
            for rows in shard.rows:
                if isinstance(rows, MemoryRows) and registers:
                    assert self.backend.register(rows.tensor)
            self.mover.mark_registered(shard.bank.name)
        layout = SlabLayout.of(self.toy.tensors)
        buffer = None
        if has_buffer:
            cells = LayerCells(layout, EXPERT_COUNT, self.backend)
            buffer = LayerBuffer(cells, self.backend, self.mover, self.counters)
        self.cells = Cells(layout, slot_count, self.backend)
        config = OffloadConfig.parse({"mode": "cxl", "prefetch": prefetch})
        self.prepared_count = 0
        self.side = DeviceSide(
            config, self.backend, torch.device("cpu"), self.mover, LayerOrder(1), Helped(is_up), self.counters
        )
        self.dispatch: DeviceDispatch = self.side.make(
            "toy", 0, self.home, self.cells, TOPK, buffer, self.kernel, self.toy.bind, pass_kind, 1e-3, self.prepare
        )
        self.side.connect(registered)

    def prepare(self) -> None:
        self.prepared_count += 1

    def kernel(self, *arguments: torch.Tensor) -> torch.Tensor:
        if isinstance(self.backend, PromptBackend):
            self.backend.catch_up()
        return self.toy.kernel(*arguments)

    def check(self, ids: list[list[int]], padding: Sequence[int] = ()) -> None:
        """One forward; its output is that of all experts, but for rows of padding."""
        batch = batch_of(ids)
        is_padding = torch.zeros(len(ids), dtype=torch.bool)
        is_padding[list(padding)] = True
        routes = torch.where(is_padding[:, None], -1, batch[2])
        output = self.dispatch(*batch[:2], routes, is_padding=is_padding if padding else None)
        expected = self.toy.direct(*batch)
        assert torch.equal(output[~is_padding], expected[~is_padding])

    def count(self, outcome: Lookup) -> int:
        return int(self.counters.values[self.counters.lookup[outcome]])

    def begin(self) -> None:
        self.side.foresee(None, None)
        self.side.begin(None, 0.0)


def batch_of(ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(ids))
    routes = torch.tensor(ids, dtype=torch.int32).view(-1, TOPK)
    x = torch.randn(len(routes), HIDDEN_SIZE, generator=generator)
    return x, torch.rand(routes.shape, generator=generator), routes


def test_tokens_find_their_experts_whatever_was_there_before() -> None:
    layer = Layer(3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        layer.check([torch.randperm(EXPERT_COUNT, generator=generator)[:TOPK].tolist()])


STRIPED = (Part(0, 0.5), Part(1, 0.5))
WHOLE = (Part(0, 1.0),)


@pytest.mark.parametrize(
    "routes",
    [[STRIPED] * EXPERT_COUNT, [STRIPED, WHOLE] * (EXPERT_COUNT // 2), [WHOLE, (Part(1, 1.0),)] * (EXPERT_COUNT // 2)],
    ids=["striped", "some striped", "in two banks"],
)
def test_parts_of_slabs_come_from_wherever_they_are(routes: list[Route]) -> None:
    layer = Layer(2, routes=routes, bank_count=2)
    for expert_id in range(EXPERT_COUNT - 1):
        layer.check([[expert_id, expert_id + 1]])


def test_a_forward_that_is_wider_than_the_slots_is_cut_in_groups_of_tokens() -> None:
    layer = Layer(2)
    layer.check([[0, 1], [2, 3], [4, 5], [5, 0]])
    assert layer.backend.names.count("look-up") == 4


@pytest.mark.parametrize("captures", [False, True])
def test_where_every_expert_has_a_slot_no_forward_is_too_wide(captures: bool) -> None:
    layer = Layer(EXPERT_COUNT, has_buffer=True, pass_kind=PassKind.LAYER_BUFFER)
    assert isinstance(layer.backend, PromptBackend)
    layer.backend.captures = captures
    layer.check([[0, 1], [2, 3], [4, 5]] * 6)
    assert layer.backend.names.count("look-up") == 1
    layer.begin()
    layer.check([[5, 0]] * 20)
    layer.side.collect()
    assert (layer.count(Lookup.HIT), layer.count(Lookup.MISS)) == (2, 0)


@pytest.mark.parametrize("pass_kind", [PassKind.EXPERT, PassKind.LAYER_BUFFER])
def test_a_kernel_that_cannot_be_cut_needs_the_layer_buffer(pass_kind: PassKind) -> None:
    with pytest.raises(ConfigError, match=r"layer_buffer=False is not possible: the kernel of toy .* passes=\"fast\""):
        Layer(2, pass_kind=pass_kind)
    Layer(EXPERT_COUNT, pass_kind=pass_kind)


def test_a_forward_of_no_tokens_asks_for_nothing() -> None:
    layer = Layer(2)
    layer.check([])
    assert not layer.backend.names


def test_rows_of_padding_fetch_nothing() -> None:
    layer = Layer(4)
    layer.begin()
    layer.check([[0, 1], [2, 3]], padding=[1])
    layer.side.collect()
    assert layer.count(Lookup.MISS) == 2


@pytest.mark.parametrize("pass_kind", [PassKind.TOKEN, PassKind.LAYER_BUFFER])
def test_a_wide_forward_outside_of_graphs_takes_the_layer_buffer_and_leaves_the_slots(pass_kind: PassKind) -> None:
    layer = Layer(2, has_buffer=True, pass_kind=pass_kind)
    layer.check([[4, 5]])
    layer.check([[0, 1], [2, 3], [4, 5]])
    assert layer.backend.names.count("look-up") == 1
    assert layer.dispatch.layer.table.expert_of.tolist() == [4, 5]
    layer.check([[4, 5]])


@pytest.mark.parametrize(("pass_kind", "look_up_count"), [(PassKind.TOKEN, 2), (PassKind.LAYER_BUFFER, 0)])
def test_two_groups_run_from_slots_where_the_kernel_may_be_cut(pass_kind: PassKind, look_up_count: int) -> None:
    layer = Layer(2, has_buffer=True, pass_kind=pass_kind)
    layer.check([[0, 1], [2, 3]])
    assert layer.backend.names.count("look-up") == look_up_count


def beside(is_up: bool = True) -> tuple[Layer, Layer]:
    """Two layers, each with a buffer, the second one after the first; and whether there is a sidecar."""
    layer, following = Layer(2, has_buffer=True, is_up=is_up), Layer(2, has_buffer=True)
    layer.dispatch.following = following.dispatch
    return layer, following


def test_a_wide_forward_has_the_next_layers_experts_copied_into_the_other_buffer() -> None:
    layer, following = beside()
    layer.check([[0, 1], [2, 3], [4, 4]])
    assert not following.mover.is_idle
    following.check([[0, 1], [2, 0], [1, 2]])
    assert following.mover.is_idle, "what turns out not to be needed is not copied any more"


@pytest.mark.parametrize(("is_up", "ids"), [(False, [[0, 1], [2, 3], [4, 4]]), (True, [[0, 1], [0, 1], [0, 1]])])
def test_nothing_is_copied_ahead_without_a_sidecar_or_after_a_forward_of_few_experts(
    is_up: bool, ids: list[list[int]]
) -> None:
    layer, following = beside(is_up)
    layer.check(ids)
    assert following.mover.is_idle


def test_rows_of_padding_ask_the_layer_buffer_for_nothing_more() -> None:
    layer = Layer(2, has_buffer=True)
    layer.check([[0, 1], [0, 1], [0, 1], [0, 1]], padding=[2, 3])
    assert layer.backend.names == [] and layer.count(Lookup.MISS) == 2


def test_a_capture_takes_no_layer_buffer() -> None:
    layer = Layer(2, has_buffer=True)
    layer.backend.captures = True
    layer.check([[0, 1], [2, 3], [4, 5]])
    assert layer.backend.names.count("look-up") == 3


def test_a_capture_that_this_kernel_cannot_be_cut_for_is_refused() -> None:
    layer = Layer(2, has_buffer=True, pass_kind=PassKind.LAYER_BUFFER)
    layer.backend.captures = True
    with pytest.raises(ConfigError, match=r"too wide for the slots.*cudagraph_capture_sizes to at most 1"):
        layer.check([[0, 1], [2, 3]])


def test_a_bank_that_the_device_cannot_read_ends_the_start() -> None:
    with pytest.raises(CapacityError, match=r'cannot read bank bank 0.*lookup="host"'):
        Layer(2, registers=False)


def test_an_expert_that_does_not_exist_ends_the_next_forward_and_touches_no_memory() -> None:
    layer = Layer(3)
    layer.begin()
    x, weights, _ = batch_of([[0, 1]])
    layer.dispatch(x, weights, torch.tensor([[1, 77]]))
    layer.side.collect()
    with pytest.raises(IntegrityError, match="chose an expert that layer does not have"):
        layer.side.begin(None, 0.0)


def test_an_expert_that_does_not_exist_is_refused_before_the_layer_buffer_is_filled() -> None:
    layer = Layer(2, has_buffer=True)
    x, weights, _ = batch_of([[0, 1]] * 9)
    with pytest.raises(IntegrityError, match="77"):
        layer.dispatch(x, weights, torch.full((9, 2), 77))


def test_what_was_put_into_slots_before_is_found_there() -> None:
    layer = Layer(4)
    layer.dispatch.preload([5, 3, 0, 1, 2])
    layer.begin()
    layer.check([[5, 3], [0, 1]])
    layer.side.collect()
    assert (layer.count(Lookup.HIT), layer.count(Lookup.MISS)) == (4, 0)


def test_a_rehearsal_prepares_and_runs_the_kernels_for_nobody() -> None:
    layer = Layer(2)
    layer.dispatch.rehearse(*batch_of([[0, 5], [4, 2]]))
    assert layer.prepared_count and layer.backend.names == ["look-up", "gather", "remap"]
    assert set(layer.dispatch.layer.table.expert_of.tolist()) == {-1}


def test_what_was_looked_up_before_the_first_request_is_not_counted() -> None:
    layer = Layer(4)
    layer.check([[0, 1]])
    layer.begin()
    layer.check([[0, 2]])
    layer.side.collect()
    assert (layer.count(Lookup.HIT), layer.count(Lookup.MISS)) == (1, 1)


def test_what_was_looked_up_comes_with_the_forward_that_it_was_for() -> None:
    layer = Layer(4)
    ring = RoutingRing(keeps_inputs=True, keeps_weights=False)
    layer.side.foresee(ring, None)
    for time_s, ids in ((1.0, [0, 1]), (2.0, [2, 3])):
        layer.side.begin(Begun(None, None, time_s), 0.0)
        layer.check([ids])
    layer.side.collect()
    entries = [ring.take() for _ in range(4)]
    assert [entry.time_s for entry in entries if isinstance(entry, Begun)] == [1.0, 2.0]
    assert [entry.expert_ids.tolist() for entry in entries if isinstance(entry, Sighting)] == [[[0, 1]], [[2, 3]]]


@pytest.mark.parametrize(
    ("slot_count", "share", "prefetch", "lane_count"),
    [(4, 1 / 4, "auto", 1), (4, 1 / 8, "auto", 0), (4, 1 / 4, "off", 0), (6, 1 / 2, "auto", 0), (3, 2 / 3, "auto", 1)],
    ids=["a share", "less than one", "nobody prefetches", "every expert has a slot", "a token needs the others"],
)
def test_slots_are_lent_where_they_can_be_spared(
    monkeypatch: pytest.MonkeyPatch, slot_count: int, share: float, prefetch: str, lane_count: int
) -> None:
    monkeypatch.setattr(device_side, "_LANE_SHARE", share)
    assert Layer(slot_count, prefetch=prefetch).dispatch.layer.lane_count == lane_count


def test_an_offered_expert_is_found_in_its_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_side, "_LANE_SHARE", 1 / 4)
    layer = Layer(4, prefetch="auto")
    assert layer.dispatch.layer.lane_count == 1
    layer.begin()
    for ids in ([0, 1], [2, 0]):
        layer.check([ids])
    # The second one goes into a slot that the first one's adoption has freed, and that a gather wrote before.
    for expert_id, ids in ((4, [4, 0]), (5, [5, 4])):
        assert layer.dispatch.slots.prefetch([expert_id], 1.0) == 1
        while not layer.mover.is_idle:
            layer.mover.feed()
        layer.side.collect()
        layer.check([ids])
        layer.side.collect()
    assert (layer.count(Lookup.HIT), layer.count(Lookup.MISS)) == (5, 3)
    layer.backend.finish()


def test_a_slot_that_comes_back_may_be_written_although_nobody_waited_for_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device_side, "_LANE_SHARE", 1 / 4)
    backend = ModelledBackend(RandomChooser())
    layer = Layer(4, prefetch="auto", backend=backend)
    look_up, slots = layer.dispatch.layer.look_up, layer.dispatch.slots
    for ids in ([0, 1], [2, 0]):
        look_up(torch.tensor([ids]), None)
    for expert_id in (4, 5):
        while not slots.prefetch([expert_id], 1.0):
            slots.settle()
        while slots.view().pending[expert_id] and not layer.mover.is_idle:
            layer.mover.feed()
        slots.settle()
        look_up(torch.tensor([[expert_id, 0]]), None)
    backend.finish()
    assert layer.dispatch.layer.table.totals[ADOPTED] == 2


@pytest.mark.parametrize(("token_count", "is_applied"), [(1, True), (2, False)])
def test_gates_are_applied_early_to_as_many_tokens_as_there_are_words_for(token_count: int, is_applied: bool) -> None:
    layer = Layer(4)
    weight = torch.randn(1, EXPERT_COUNT, HIDDEN_SIZE, generator=torch.Generator().manual_seed(5))
    words = device_layer.staged_words(layer.backend, EXPERT_COUNT).view(1, EXPERT_COUNT)
    layer.dispatch.layer.early_gates = [device_layer.EarlyGate(weight, None, None, words, token_count_max=1)]
    layer.check([[0, 1]] * token_count)
    assert ("gate" in layer.backend.names) == is_applied == bool(words.any())
    if is_applied:
        scores = (words & 0xFFFF_FFFF).to(torch.uint32).view(torch.float32)
        torch.testing.assert_close(scores, batch_of([[0, 1]])[0] @ weight[0].T)


def test_every_tensor_of_a_quantised_slab_is_fetched() -> None:
    backend = PromptBackend()
    tensors: dict[str, Any] = {
        "qweight": random_bits((EXPERT_COUNT, 8, 17), torch.uint8),
        "scales": random_bits((EXPERT_COUNT, 5), torch.float16),
        "zeros": random_bits((EXPERT_COUNT, 3), torch.int8),
        "shape": random_bits((EXPERT_COUNT, 2), torch.int32),
    }
    originals = {name: tensor.clone() for name, tensor in tensors.items()}
    home = store(tensors)
    for rows in home.shards[0].rows:
        assert isinstance(rows, MemoryRows) and backend.register(rows.tensor)
    cells = Cells(home.layout, 3, backend)
    step = torch.zeros(1, dtype=torch.int32)
    layer = device_layer.DeviceLayer(home, cells, TOPK, 0, backend, torch.device("cpu"), step)
    layer.connect(["dram"])
    slot_ids = layer.look_up(torch.tensor([[5, 2]]), None)
    for cell, original in zip(cells.tensors, originals.values(), strict=True):
        assert torch.equal(cell[slot_ids[0].long()].view(torch.uint8), original[[5, 2]].view(torch.uint8))
