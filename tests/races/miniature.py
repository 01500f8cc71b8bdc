"""The data plane in miniature: small programs on the backend protocol alone, each right, or wrong in one way.

They show that the search finds what it looks for, whatever the runtime does today.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch

from tests.races.search import Case, World
from vllm_moecxl.data.devices.modelled import ModelledBackend, ModelledEvent

Bug = Literal[
    "",
    "missing wait",
    "early lease end",
    "event on the wrong stream",
    "slot reused before the read",
    "ring wrapped early",
]

_ROW_BYTES = 4


def _homes(count: int) -> torch.Tensor:
    """[experts, row bytes] uint8, a different row for each."""
    return torch.arange(1, count + 1, dtype=torch.uint8).repeat_interleave(_ROW_BYTES).view(count, _ROW_BYTES)


def _launch(backend: ModelledBackend, cells: torch.Tensor, cell_id: int, expert_id: int) -> None:
    """A kernel that needs an expert, and is told that it is in a cell."""
    bytes_of = memoryview(cells[cell_id].numpy())

    def check() -> None:
        if bytes_of.tobytes() != bytes([expert_id + 1]) * _ROW_BYTES:
            raise backend.violate(f"a kernel that needs expert {expert_id} finds {bytes_of.tolist()} in cell {cell_id}")

    backend.launch(f"kernel of expert {expert_id}", [(cells, [cell_id])], check)


def double_buffer(world: World, bug: Bug, layer_count: int) -> None:
    """Layers that are streamed through two buffers: one is filled while the other is read."""
    backend = world.make_backend()
    homes = _homes(layer_count)
    assert backend.register(homes)
    buffers = backend.allocate((2, _ROW_BYTES), torch.uint8)
    backend.label(buffers, "buffers")
    link, compute = backend.copy_stream(0), backend.compute_stream()
    read: list[ModelledEvent | None] = [None, None]
    for layer in range(layer_count):
        buffer_id = layer % 2
        if (last := read[buffer_id]) is not None and bug != "early lease end":
            backend.wait(link, last)
        backend.copy(homes[layer], buffers[buffer_id], link)
        filled = backend.record(compute if bug == "event on the wrong stream" else link)
        if bug != "missing wait":
            backend.wait(compute, filled)
        _launch(backend, buffers, buffer_id, layer)
        read[buffer_id] = backend.record(compute)
    backend.finish()


def slots(world: World, bug: Bug, forward_count: int, *, is_drawn: bool = True) -> None:
    """Forwards of one expert each, from two slots that are filled by two links, half a slab each."""
    expert_count = 4
    backend = world.make_backend()
    homes = _homes(expert_count)
    assert backend.register(homes)
    cells = backend.allocate((2, _ROW_BYTES), torch.uint8)
    backend.label(cells, "slots")
    links, compute = [backend.copy_stream(link_id) for link_id in range(2)], backend.compute_stream()
    expert_of: list[int | None] = [None, None]
    leases: list[ModelledEvent | None] = [None, None]
    last_slot_id = 0
    for number in range(forward_count):
        expert_id = world.rng.randrange(expert_count) if is_drawn else number % expert_count
        if expert_id not in expert_of:
            slot_id = 1 - last_slot_id
            lease = leases[slot_id]
            if bug == "slot reused before the read":
                slot_id = last_slot_id
            elif bug == "early lease end":
                pass
            elif lease is not None and not backend.query(lease):
                backend.synchronize(lease)
            expert_of[slot_id] = expert_id
            half = _ROW_BYTES // 2
            for link, start in zip(links, (0, half), strict=True):
                backend.copy(homes[expert_id][start : start + half], cells[slot_id][start : start + half], link)
                filled = backend.record(link if bug != "event on the wrong stream" else links[0])
                if bug != "missing wait" or start == 0:
                    backend.wait(compute, filled)
        last_slot_id = expert_of.index(expert_id)
        _launch(backend, cells, last_slot_id, expert_id)
        leases[last_slot_id] = backend.record(compute)
    backend.finish()


def ring(world: World, bug: Bug, copy_count: int) -> None:
    """Slabs from a bank that cannot be registered, through a ring of two staging cells."""
    backend = world.make_backend()
    homes = _homes(copy_count)
    staging = [backend.stage(_ROW_BYTES) for _ in range(2)]
    cells = backend.allocate((copy_count, _ROW_BYTES), torch.uint8)
    link, compute = backend.copy_stream(0), backend.compute_stream()
    copied: list[ModelledEvent | None] = [None, None]
    for number in range(copy_count):
        cell = staging[number % 2]
        if (last := copied[number % 2]) is not None and not backend.query(last) and bug != "ring wrapped early":
            backend.synchronize(last)
        cell.copy_(homes[number])
        backend.copy(cell, cells[number], link)
        copied[number % 2] = backend.record(link)
    for event in copied:
        assert event is not None
        backend.wait(compute, event)
    for number in range(copy_count):
        _launch(backend, cells, number, number)
    backend.finish()


Program = Callable[[World, Bug], None]

PROGRAMS: dict[str, tuple[Program, tuple[Bug, ...]]] = {
    "double-buffer": (
        partial(double_buffer, layer_count=3),
        ("missing wait", "early lease end", "event on the wrong stream"),
    ),
    "slots": (
        partial(slots, forward_count=3, is_drawn=False),
        ("missing wait", "early lease end", "event on the wrong stream", "slot reused before the read"),
    ),
    "ring": (partial(ring, copy_count=4), ("ring wrapped early",)),
}


def case(name: str, bug: Bug = "") -> Case:
    program, _ = PROGRAMS[name]
    return Case(f"miniature-{name}", partial(_run, program, bug), is_small=True)


def _run(program: Program, bug: Bug, world: World) -> None:
    program(world, bug)


CASES = [case(name) for name in PROGRAMS]
