"""The runtime on the modelled accelerator: the real dispatch, slots, layer buffers, mover, ring and scheduler.

Their threads are a `Crew`: the forward, the mover's hands, and a sidecar that feeds the mover, prefetches, and hears of
requests that are gone.

A kernel's result is never needed. Instead of activations tokens carry the experts that their routes ask for, and the
kernel, when the device runs it, finds out whether the rows that it was given are theirs.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch

from tests.races.crew import Crew, Ended
from tests.races.search import World
from tests.support.homes import PROFILE
from vllm_moecxl.control.cost import LayerCosts
from vllm_moecxl.control.eviction import LeastRecentlyUsed
from vllm_moecxl.control.layer_order import LayerOrder
from vllm_moecxl.control.placement import Part
from vllm_moecxl.control.residency import Residency
from vllm_moecxl.data import carrier, mover, slabs, staging
from vllm_moecxl.data.banks.base import RowCopy
from vllm_moecxl.data.banks.memory import DramBank, MemoryRows
from vllm_moecxl.data.devices.base import Event, Stream
from vllm_moecxl.data.devices.modelled import ModelledBackend, ModelledEvent
from vllm_moecxl.data.slabs import Cells, Home, HomeBuilder, LayerCells, Place
from vllm_moecxl.errors import TransferError
from vllm_moecxl.runtime import slots
from vllm_moecxl.runtime.counters import Counters
from vllm_moecxl.runtime.dispatch import Dispatch, Tensors
from vllm_moecxl.runtime.layer_buffer import LayerBuffer
from vllm_moecxl.runtime.slots import SlotCache
from vllm_moecxl.types import PassKind

#: A slab is two rows of these many bytes, and two chunks.
_ROW_BYTES = (6, 3)
_CHUNK_BYTES = 6
_RING_CELL_COUNT = 2
#: A cost of copying at which it pays to let tokens go first whose experts are there.
_SLAB_BYTES_COSTED = 1 << 30
#: Engines that start with experts in their slots.
_PRELOAD_RATE = 0.3
#: Forwards without tokens.
_EMPTY_RATE = 0.05
#: How often in a row the host finds an event incomplete although the device could go on.
_PATIENCE = 4
_WANTERS = ("request a", "request b")


@dataclass(frozen=True)
class Spec:
    """An engine and its load.

    Attributes:
        banks: whether the device reads each of them by itself, or through the staging ring.
        home: where the slabs are: in the first bank, striped over all, or in the first with a replica in the second.
        is_checked: whether slabs are held against their digests when they are fetched.
        buffer_count: layer buffers.
        token_count_max: of a forward.
        waits_for_ids: whether the host waits for the device to get the router's ids. It does, with the devices that we
            have; without, more can be under way, and the runtime has to be right nevertheless.
        failure_rate: of reads and of kernels.
        death_rate: of reads, how many are the end of the hand that does them.
        pause_rate: of the places where another thread could go on, the share in which one may; without any there is
            one thread only.
    """

    expert_count: int = 4
    slot_count: int = 2
    topk: int = 2
    layer_count: int = 1
    pass_kind: PassKind = PassKind.TOKEN
    banks: tuple[Literal["registered", "staged"], ...] = ("registered",)
    home: Literal["whole", "striped", "replicated"] = "whole"
    is_checked: bool = False
    buffer_count: int = 0
    forward_count: int = 3
    token_count_max: int = 2
    waits_for_ids: bool = True
    failure_rate: float = 0.0
    death_rate: float = 0.0
    pause_rate: float = 0.15


class ReadFailure(TransferError):
    """What a bank raises that is told to fail."""


class KernelFailure(RuntimeError):
    """What a kernel raises that is told to fail."""


class Death(BaseException):
    """What ends a thread."""


class TinyBank(DramBank):
    """A bank of small chunks, and the engine that it serves now."""

    chunk_bytes = _CHUNK_BYTES
    engine: Engine

    def __init__(self, name: str) -> None:
        super().__init__(name, name, None, PROFILE)

    def read(self, copies: Sequence[RowCopy]) -> None:
        engine = self.engine
        engine.crew.pause()
        if engine.fails():
            raise ReadFailure("the bank is told to fail")
        if engine.dies():
            raise Death
        super().read(copies)
        engine.crew.pause()


class PausingBackend(ModelledBackend):
    """Lets other threads go on around each call that queues or observes something."""

    crew: Crew
    waits_for_ids: bool

    def copy(self, source: torch.Tensor, target: torch.Tensor, stream: Stream) -> None:
        super().copy(source, target, stream)
        self.crew.pause()

    def record(self, stream: Stream) -> ModelledEvent:
        self.crew.pause()
        return super().record(stream)

    def wait(self, stream: Stream, event: Event) -> None:
        super().wait(stream, event)
        self.crew.pause()

    def route_ids(self, topk_ids: torch.Tensor) -> torch.Tensor:
        return super().route_ids(topk_ids) if self.waits_for_ids else topk_ids

    def synchronize(self, event: Event) -> None:
        self.crew.pause()
        super().synchronize(event)


def content(layer_id: int, expert_id: int) -> int:
    """The byte that an expert's slab is full of."""
    return 1 + layer_id * 32 + expert_id


@functools.cache
def homes_of(spec: Spec) -> tuple[list[TinyBank], list[Home]]:
    """The banks of an engine, and the home of each layer; made once, as nobody writes to them."""
    banks = [TinyBank(f"bank {index}") for index in range(len(spec.banks))]
    return banks, [_home(spec, banks, layer_id) for layer_id in range(spec.layer_count)]


def _home(spec: Spec, banks: list[TinyBank], layer_id: int) -> Home:
    def tensors() -> dict[str, torch.Tensor]:
        bytes_of = torch.tensor([content(layer_id, expert_id) for expert_id in range(spec.expert_count)])
        return {
            f"extent {index}": bytes_of.to(torch.uint8).repeat_interleave(row_bytes).view(-1, row_bytes)
            for index, row_bytes in enumerate(_ROW_BYTES)
        }

    def store(route: tuple[Part, ...]) -> Home:
        builder = HomeBuilder(banks, "fetch" if spec.is_checked else "off")
        return builder.store(f"layer {layer_id}", tensors(), [route] * spec.expert_count)

    whole = (Part(0, 1.0),)
    match spec.home:
        case "whole":
            return store(whole)
        case "striped":
            with mock.patch.object(slabs, "STRIPE_GRANULE_BYTES", 1):
                return store(tuple(Part(index, 1 / len(banks)) for index in range(len(banks))))
        case "replicated":
            home, replica = store(whole), store((Part(1, 1.0),)).shards[0]
            places = [[Place(0, expert_id)] for expert_id in range(spec.expert_count)]
            return Home(home.name, home.layout, home.shards, places, "off", None, replica)


@functools.cache
def _counters(bank_names: tuple[str, ...]) -> Counters:
    """Nothing depends on what they have counted before."""
    return Counters(list(bank_names))


class Helped:
    """A sidecar that is up, or not."""

    def __init__(self, is_up: bool) -> None:
        self.is_up = is_up


class Layer:
    """One layer of the engine, with its kernel."""

    def __init__(self, engine: Engine, layer_id: int, home: Home, buffer: LayerBuffer | None) -> None:
        spec, backend = engine.spec, engine.backend
        self.layer_id = layer_id
        self._engine = engine
        self._bound: Tensors = ()
        cells = Cells(home.layout, spec.slot_count, backend)
        for tensor in cells.tensors:
            backend.label(tensor, f"slots of layer {layer_id}")
        residency = Residency(spec.expert_count, spec.slot_count, LeastRecentlyUsed(spec.slot_count))
        self.slots = SlotCache(residency, home, cells, backend, engine.mover, engine.counters)
        self.dispatch = Dispatch(
            home.name,
            layer_id,
            self.slots,
            buffer,
            LayerCosts(spec.expert_count, _SLAB_BYTES_COSTED, 1e9, 1e10),
            engine.order,
            engine.helper,
            backend,
            engine.counters,
            self.kernel,
            self.bind,
            spec.pass_kind,
        )

    def bind(self, rows: Tensors) -> None:
        self._bound = rows

    def kernel(self, x: torch.Tensor, topk_weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Queue a kernel that looks for the experts `x` in the rows `ids`; routes of weight zero need none."""
        engine, backend = self._engine, self._engine.backend
        if engine.fails():
            raise KernelFailure
        engine.tick()
        rows = ids.tolist()
        needed = {
            (row_id, int(expert_id))
            for row_ids, expert_ids, weights in zip(rows, x.tolist(), topk_weights.tolist(), strict=True)
            for row_id, expert_id, weight in zip(row_ids, expert_ids, weights, strict=True)
            if weight
        }
        bound = [memoryview(tensor.numpy()).cast("B") for tensor in self._bound]

        def check() -> None:
            for row_id, expert_id in needed:
                for rows, row_bytes in zip(bound, _ROW_BYTES, strict=True):
                    found = rows[row_id * row_bytes : (row_id + 1) * row_bytes].tolist()
                    if found != [content(self.layer_id, expert_id)] * row_bytes:
                        raise backend.violate(
                            f"the kernel of layer {self.layer_id} needs expert {expert_id}, bytes of "
                            f"{content(self.layer_id, expert_id)}, and finds {found} in row {row_id}"
                        )

        read = {row_id for row_ids in rows for row_id in row_ids}
        backend.launch(f"kernel of layer {self.layer_id}", [(tensor, read) for tensor in self._bound], check)
        engine.tick()
        return x * topk_weights

    def check(self) -> None:
        """Assert what holds when the device has finished: every lease has ended, and slots have their experts."""
        self.slots.settle()
        residency = self.slots.residency
        residency.check()
        for slot_id in range(residency.slot_count):
            assert not residency.is_held(slot_id), "a lease has not ended"
        for expert_id in residency.resident_mask().nonzero()[0].tolist():
            for row in self.slots.cells.rows(residency.resident_slot(expert_id)):
                assert row.tolist() == [content(self.layer_id, expert_id)] * len(row)


class Chancy:
    """What the engines of the search have in common: chance, a clock, and the life of a sidecar.

    Attributes:
        turn_lengths: least and most that the sidecar does when it comes to do something.
    """

    turn_lengths: tuple[int, int]
    layers: list[Any]
    _is_closed: bool
    _help: Callable[[Any], None]

    def __init__(self, world: World, spec: Any, crew: Crew) -> None:
        self.spec = spec
        self.crew = crew
        self.rng = world.rng
        self._now_s = 0.0

    def fails(self) -> bool:
        """Whether what comes now is to fail."""
        return self.spec.failure_rate > 0 and self.rng.random() < self.spec.failure_rate

    def dies(self) -> bool:
        """Whether the thread that is at work now is to end, if it is one that may."""
        rate = self.spec.death_rate
        return rate > 0 and self.crew.current_name.startswith("moecxl-") and self.rng.random() < rate

    def _clock(self) -> float:
        self._now_s += 1e-6
        return self._now_s

    def _serve(self) -> None:
        """The life of the sidecar."""
        while True:
            if not self._is_closed:
                self.crew.wait_for(self)
            if self._is_closed:
                return
            for _ in range(self.rng.randint(*self.turn_lengths)):
                self._help(self.rng.choice(self.layers))


class Engine(Chancy):
    """Layers, their slots and buffers, and what feeds them."""

    spec: Spec
    turn_lengths = (1, 3)

    def __init__(self, world: World, spec: Spec, crew: Crew) -> None:
        super().__init__(world, spec, crew)
        banks, homes = homes_of(spec)
        self.backend = world.make_backend(PausingBackend, patience=_PATIENCE if spec.pause_rate else 1)
        self.backend.crew = crew
        self.backend.waits_for_ids = spec.waits_for_ids
        self.counters = _counters(tuple(bank.name for bank in banks))
        self.mover = mover.Mover(banks, self.backend, self.counters, has_hands=spec.pause_rate > 0, clock=self._clock)
        self.order = LayerOrder(spec.layer_count)
        self.helper = Helped(spec.pause_rate == 0 or self.rng.random() < 0.8)
        for bank, kind in zip(banks, spec.banks, strict=True):
            bank.engine = self
            if kind == "registered":
                self._register(bank, homes)
        buffers = self._make_buffers(homes[0]) or [None]
        self.layers = [
            Layer(self, layer_id, home, buffers[layer_id % len(buffers)]) for layer_id, home in enumerate(homes)
        ]
        for index, layer in enumerate(self.layers):
            layer.dispatch.following = self.layers[(index + 1) % len(self.layers)].dispatch
        self._is_closed = False
        if spec.pause_rate:
            crew.Thread(self._serve, name="sidecar").start()

    def tick(self) -> None:
        """Time for the sidecar to do something, whenever it comes to."""
        if self.spec.pause_rate:
            self.crew.wake(self)
            self.crew.pause()

    def close(self) -> None:
        """End all threads."""
        self._is_closed = True
        self.crew.wake(self)
        self.mover.close()
        self.crew.join()

    def _help(self, layer: Layer) -> None:
        """Something that a sidecar does."""
        match self.rng.randrange(6):
            case 0 | 1:
                self.mover.feed()
            case 2:
                self.mover.forget(self.rng.choice(_WANTERS))
            case 3:
                layer.slots.settle()
            case _:
                expert_ids = self.rng.sample(range(self.spec.expert_count), self.rng.randint(1, 2))
                deadline = self.order.next_position(layer.layer_id)
                layer.slots.prefetch(expert_ids, deadline, [self.rng.choice(_WANTERS)])

    def _register(self, bank: TinyBank, homes: Sequence[Home]) -> None:
        for home in homes:
            for shard in home.shards:
                for rows in shard.rows:
                    if shard.bank is bank and isinstance(rows, MemoryRows):
                        assert self.backend.register(rows.tensor)
        self.mover.mark_registered(bank.name)

    def _make_buffers(self, home: Home) -> list[LayerBuffer | None]:
        buffers: list[LayerBuffer | None] = []
        for index in range(self.spec.buffer_count):
            cells = LayerCells(home.layout, self.spec.expert_count, self.backend)
            for tensor in cells.tensors:
                self.backend.label(tensor, f"layer buffer {index}")
            buffers.append(LayerBuffer(cells, self.backend, self.mover, self.counters))
        return buffers


def run(spec: Spec, world: World) -> None:
    """Forwards through all layers, whatever happens meanwhile."""
    crew = Crew(world.chooser, world.rng, spec.pause_rate, world.trace)
    carrier._STAGING_CELL_COUNT = _RING_CELL_COUNT
    logging.disable(logging.CRITICAL)  # threads that end say so
    try:
        with crew.replacing(mover, carrier, slots, staging):
            engine = Engine(world, spec, crew)
            if engine.rng.random() < _PRELOAD_RATE:
                for layer in engine.layers:
                    preload(layer)
            for _ in range(spec.forward_count):
                is_empty = engine.rng.random() < _EMPTY_RATE
                token_count = 0 if is_empty else engine.rng.randint(1, spec.token_count_max)
                for layer in engine.layers:
                    if not forward(layer, _routes(engine, token_count)):
                        break
                engine.tick()
            engine.close()
            for layer in engine.layers:
                layer.slots.settle()
            engine.backend.finish()
            for layer in engine.layers:
                layer.check()
    except Ended:
        assert crew.error is not None
        raise crew.error from None
    finally:
        logging.disable(logging.NOTSET)


def _routes(engine: Engine, token_count: int) -> torch.Tensor:
    spec = engine.spec
    ids = [engine.rng.sample(range(spec.expert_count), spec.topk) for _ in range(token_count)]
    return torch.tensor(ids, dtype=torch.int32).view(token_count, spec.topk)


def preload(layer: Layer) -> None:
    """Fill a layer's slots before the first forward, if the bank lets it."""
    with contextlib.suppress(ReadFailure):
        layer.dispatch.preload(range(layer.slots.residency.expert_count))


def forward(layer: Layer, ids: torch.Tensor) -> bool:
    """One layer of a forward; whether it came off."""
    x = ids.float()
    try:
        output = layer.dispatch(x, torch.ones_like(x), ids)
    except (ReadFailure, KernelFailure):
        return False
    assert torch.equal(output, x), "some routes were computed twice, or not at all"
    return True
