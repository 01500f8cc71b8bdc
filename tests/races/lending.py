"""The lending protocol on the modelled accelerator: a layer that the device serves, and the lanes of the host's.

The host's side is the real one: lanes, mover, scheduler, and threads that are a `Crew`. The device's side is the
reference that the kernels are held against, queued as the runtime queues them: look up, gather, compute. What each of
them touches is known only when it runs. The forward queues them, and waits for nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from moecxl_kernels.tables import NONE, Mailbox, SlotTable, make_table

from tests.kernels import reference_ensure
from tests.races.crew import Crew, Ended
from tests.races.engine import Chancy, PausingBackend, Spec, content, homes_of
from tests.races.search import World
from vllm_moecxl.control.layer_order import LayerOrder
from vllm_moecxl.data import carrier, mover, staging
from vllm_moecxl.data.banks.memory import MemoryRows
from vllm_moecxl.data.devices.base import Event, Touches
from vllm_moecxl.data.slabs import Cells, Home
from vllm_moecxl.runtime.counters import Counters
from vllm_moecxl.runtime.device_driven import lanes
from vllm_moecxl.runtime.device_driven.lanes import DeviceSlots

_RING_CELL_COUNT = 2
_PATIENCE = 4
_WANTERS = ("request a", "request b")
#: Visits of more experts than fit.
_WIDE_RATE = 0.05
_EMPTY_RATE = 0.05
#: Steps at whose end the host waits for what was sampled; others are queued ahead.
_SAMPLING_RATE = 0.5
#: Of the places in a forward where the sidecar could go on, the share in which it may.
_TURN_RATE = 0.5


@dataclass(frozen=True)
class LendingSpec(Spec):
    """An engine whose layers the device serves; see `Spec`.

    Attributes:
        lane_count: of the slots of a layer, how many are lent to the host.
        forward_count: visits of each layer.
    """

    expert_count: int = 5
    slot_count: int = 4
    topk: int = 1
    forward_count: int = 6
    lane_count: int = 2


class LendingBackend(PausingBackend):
    """Finds a forward that waits for the device."""

    is_forward = False

    def synchronize(self, event: Event) -> None:
        if self.is_forward and self.crew.current_name == "main":
            raise self.violate("the forward waits for the device")
        super().synchronize(event)

    def write_word(self, words: torch.Tensor, index: int, word: int) -> None:
        self.crew.pause()
        super().write_word(words, index, word)
        self.crew.pause()


@dataclass
class Visit:
    """What the kernels of one visit hand on.

    Attributes:
        needed: distinct experts.
        slot_of: of each of them, its slot; empty where they are too many.
    """

    needed: list[int]
    slot_of: dict[int, int] = field(default_factory=dict)


def device_table(expert_count: int, slot_count: int, lane_count: int) -> SlotTable:
    """The table of a layer that nobody has visited."""
    return make_table(expert_count, slot_count, lane_count, "cpu")


class Layer:
    """One layer of the engine: the device's tables and kernels, and the host's lanes."""

    def __init__(self, engine: Engine, layer_id: int, home: Home) -> None:
        spec, backend = engine.spec, engine.backend
        self.layer_id = layer_id
        self.home = home
        self.last_needed: list[int] = []
        self._backend = backend
        self.cells = Cells(home.layout, spec.slot_count, backend)
        for tensor in self.cells.tensors:
            backend.label(tensor, f"slots of layer {layer_id}")
        self._bytes = [memoryview(tensor.numpy()).cast("B") for tensor in self.cells.tensors]
        self.table = device_table(spec.expert_count, spec.slot_count, spec.lane_count)
        self.mailbox = Mailbox(
            offers=backend.stage(spec.lane_count * 8).view(torch.int64),
            answers=backend.stage(spec.lane_count * 8).view(torch.int64),
            view=torch.full((spec.slot_count,), NONE, dtype=torch.int32),
            records=torch.zeros((2, 8), dtype=torch.int64),
        )
        #: The list of what is to be fetched: (expert, slot), and in the last row how many.
        self._copies = backend.allocate((spec.slot_count + 1, 2), torch.int32)
        backend.label(self._copies, f"list of layer {layer_id}")
        self.slots = DeviceSlots(
            home, self.cells, self.mailbox, backend, engine.mover, engine.counters, spec.lane_count
        )

    def visit(self, needed: list[int], pause: Callable[[], None]) -> None:
        """Queue all that a forward needs of the layer."""
        backend, visit = self._backend, Visit(needed)
        compute = backend.compute_stream()
        # One stream for all of it: the lanes rely on the order that this gives.
        gathering = reading = compute
        backend.run_on(compute, f"look-up of layer {self.layer_id}", lambda: self._look_up(visit), self._looked_up)
        pause()
        backend.run_on(gathering, f"gather of layer {self.layer_id}", self._gather, self._gathered)
        pause()
        gathered = backend.record(gathering)
        backend.wait(reading, gathered)
        backend.run_on(
            reading, f"kernel of layer {self.layer_id}", lambda: self._compute(visit), lambda: self._computed(visit)
        )
        self.last_needed = needed

    def check(self) -> None:
        """Assert what holds when the device has finished: each slot has one owner, and the expert that it says."""
        self.slots.settle()
        lent = self.table.is_host.nonzero().flatten().tolist()
        assert sorted(lane.slot_id for lane in self.slots._lanes) == lent, "a slot has two owners, or none"
        for slot_id, expert_id in enumerate(self.table.expert_of.tolist()):
            if expert_id != NONE:
                for row in self.cells.rows(slot_id):
                    assert row.tolist() == [content(self.layer_id, expert_id)] * len(row), "a slot holds another expert"

    def _look_up(self, visit: Visit) -> None:
        copies = reference_ensure.ensure(
            torch.tensor([visit.needed], dtype=torch.int32), None, self.table, self.mailbox
        )
        rows = self._copies.numpy()
        rows[-1, 0] = len(copies)
        if copies:
            rows[: len(copies)] = copies
        in_slots = [expert_id for expert_id in self.table.expert_of.tolist() if expert_id != NONE]
        if len(set(in_slots)) != len(in_slots):
            raise self._backend.violate(f"layer {self.layer_id} has an expert in two slots: {in_slots}")
        slot_of = self.table.slot_of.tolist()
        device_slot_count = len(self.cells.tensors[0]) - len(self.mailbox.offers)
        if len(visit.needed) <= device_slot_count:
            visit.slot_of = {expert_id: slot_of[expert_id] for expert_id in visit.needed}
            if NONE in visit.slot_of.values():
                raise self._backend.violate(f"layer {self.layer_id} needs {visit.needed} and has {visit.slot_of}")

    def _looked_up(self) -> Touches:
        lane_ids = range(len(self.mailbox.offers))
        return [(self.mailbox.offers, lane_ids)], [
            (self.mailbox.answers, lane_ids),
            (self._copies, range(len(self._copies))),
        ]

    def _listed(self) -> list[list[int]]:
        listed: list[list[int]] = self._copies[: int(self._copies[-1, 0])].tolist()
        return listed

    def _gather(self) -> None:
        for expert_id, slot_id in self._listed():
            targets = self.cells.rows(slot_id)
            for shard, place in self.home.parts(expert_id):
                for rows, (start, stop), target in zip(shard.rows, shard.cuts, targets, strict=True):
                    if isinstance(rows, MemoryRows):
                        target.numpy()[start:stop] = rows.as_bytes.numpy()[place.row_id]

    def _gathered(self) -> Touches:
        listed = self._listed()
        sources = [
            (rows.tensor, [place.row_id])
            for expert_id, _ in listed
            for shard, place in self.home.parts(expert_id)
            for rows in shard.rows
            if isinstance(rows, MemoryRows)
        ]
        slot_ids = [slot_id for _, slot_id in listed]
        reads = [(self._copies, [*range(len(listed)), len(self._copies) - 1]), *sources]
        return reads, [(tensor, slot_ids) for tensor in self.cells.tensors]

    def _compute(self, visit: Visit) -> None:
        """The kernel: find out whether the rows that it is given are those of its experts."""
        for expert_id, slot_id in visit.slot_of.items():
            expected = content(self.layer_id, expert_id)
            for rows, extent in zip(self._bytes, self.home.layout.extents, strict=True):
                found = rows[slot_id * extent.row_bytes : (slot_id + 1) * extent.row_bytes].tolist()
                if found != [expected] * extent.row_bytes:
                    raise self._backend.violate(
                        f"the kernel of layer {self.layer_id} needs expert {expert_id}, bytes of {expected}, and finds "
                        f"{found} in slot {slot_id}"
                    )

    def _computed(self, visit: Visit) -> Touches:
        return [(tensor, visit.slot_of.values()) for tensor in self.cells.tensors], []


class Engine(Chancy):
    """Layers that the device serves, and a sidecar."""

    spec: LendingSpec
    turn_lengths = (2, 8)

    def __init__(self, world: World, spec: LendingSpec, crew: Crew) -> None:
        super().__init__(world, spec, crew)
        banks, homes = homes_of(spec)
        self.backend = world.make_backend(LendingBackend, patience=_PATIENCE if spec.pause_rate else 1)
        self.backend.crew = crew
        self.backend.waits_for_ids = False
        self.counters = Counters([bank.name for bank in banks])
        self.mover = mover.Mover(banks, self.backend, self.counters, has_hands=spec.pause_rate > 0, clock=self._clock)
        self.order = LayerOrder(spec.layer_count)
        for bank, kind in zip(banks, spec.banks, strict=True):
            bank.engine = self  # type: ignore[assignment]
            if kind == "registered":
                self.mover.mark_registered(bank.name)
        for home in homes:  # the device gathers from all of them, however the host's copies go
            for shard in home.shards:
                for rows in shard.rows:
                    if isinstance(rows, MemoryRows):
                        assert self.backend.register(rows.tensor)
        self.layers = [Layer(self, layer_id, home) for layer_id, home in enumerate(homes)]
        self._is_closed = False
        if spec.pause_rate:
            crew.Thread(self._serve, name="sidecar").start()

    def forward(self) -> None:
        """Queue a step of the model."""
        self.backend.is_forward = True
        for layer in self.layers:
            layer.visit(self._routes(), self.tick)
            self.tick()
        self.backend.is_forward = False
        if self.spec.pause_rate and self.rng.random() < _SAMPLING_RATE:
            self.backend.synchronize(self.backend.record(self.backend.compute_stream()))

    def tick(self) -> None:
        """Time for the sidecar to do something, whenever it comes to."""
        if self.spec.pause_rate:
            self.crew.wake(self)
            if self.rng.random() < _TURN_RATE:
                self.crew.give_way()

    def close(self) -> None:
        """End all threads, and what the lanes have under way."""
        self._is_closed = True
        self.crew.wake(self)
        for layer in self.layers:
            layer.slots.drop_prefetches(())
        self.mover.close()
        self.crew.join()

    def help_alone(self, number: int) -> None:
        """What a sidecar does, where there is no other thread: the same each time."""
        for layer in self.layers:
            layer.slots.prefetch([(number + 1) % self.spec.expert_count], self.order.next_position(layer.layer_id))
            self.mover.feed()
            layer.slots.settle()

    def _routes(self) -> list[int]:
        spec, rng = self.spec, self.rng
        if not spec.pause_rate:
            return [0]
        chance = rng.random()
        if chance < _EMPTY_RATE:
            return []
        fitting = min(spec.slot_count - spec.lane_count, spec.topk * spec.token_count_max)
        count = spec.expert_count if chance > 1 - _WIDE_RATE else rng.randint(1, fitting)
        return sorted(rng.sample(range(spec.expert_count), count))

    def _help(self, layer: Layer) -> None:
        """Something that a sidecar does."""
        match self.rng.randrange(16):
            case 0 | 1 | 2 | 3:
                self.mover.feed()
            case 4:
                self.mover.forget(self.rng.choice(_WANTERS))
            case 5 | 6 | 7 | 8 | 9:
                layer.slots.settle()
            case 10:
                layer.slots.drop_prefetches(layer.last_needed)
            case _:
                absent = [one for one in range(self.spec.expert_count) if not layer.slots.view().resident[one]]
                expert_ids = self.rng.sample(absent, min(len(absent), self.rng.randint(1, 2)))
                deadline = self.order.next_position(layer.layer_id)
                layer.slots.prefetch(expert_ids, deadline, [self.rng.choice(_WANTERS)])


def run(spec: LendingSpec, world: World) -> None:
    """Forwards through all layers, whatever happens meanwhile."""
    crew = Crew(world.chooser, world.rng, spec.pause_rate, world.trace)
    carrier._STAGING_CELL_COUNT = _RING_CELL_COUNT
    logging.disable(logging.CRITICAL)  # threads that end say so
    try:
        with crew.replacing(mover, carrier, lanes, staging):
            engine = Engine(world, spec, crew)
            for number in range(spec.forward_count):
                if not spec.pause_rate:
                    engine.help_alone(number)
                engine.forward()
            engine.close()
            engine.backend.finish()
            for layer in engine.layers:
                layer.check()
    except Ended:
        assert crew.error is not None
        raise crew.error from None
    finally:
        logging.disable(logging.NOTSET)
