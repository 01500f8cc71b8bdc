"""A Mixture-of-Experts layer small enough to compute directly, and the slots that serve it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tests.support.homes import banks_of, store
from vllm_moecxl.control.cost import LayerCosts
from vllm_moecxl.control.eviction import LeastRecentlyUsed
from vllm_moecxl.control.layer_order import LayerOrder
from vllm_moecxl.control.residency import Residency
from vllm_moecxl.data.devices.cpu import CpuBackend
from vllm_moecxl.data.layout import SlabLayout
from vllm_moecxl.data.mover import Mover
from vllm_moecxl.data.slabs import Cells, Home, LayerCells
from vllm_moecxl.runtime.counters import Counters
from vllm_moecxl.runtime.dispatch import Dispatch, Tensors
from vllm_moecxl.runtime.layer_buffer import LayerBuffer
from vllm_moecxl.runtime.slots import SlotCache
from vllm_moecxl.types import InPlaceMode, PassKind

HIDDEN_SIZE = 3


class KernelFailure(RuntimeError):
    """What the toy kernel raises when it is told to fail."""


class ToyMoe:
    """`expert_count` experts of two tensors each, and a kernel that reads whatever is bound.

    The kernel computes with element-wise operations in a fixed order, so the bits of a token's result depend on
    nothing but its own experts.
    """

    def __init__(self, expert_count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tensors = {
            "weight": torch.randn(expert_count, HIDDEN_SIZE, HIDDEN_SIZE, generator=generator),
            "scale": torch.randint(1, 200, (expert_count, HIDDEN_SIZE), dtype=torch.uint8, generator=generator),
        }
        self.bound: tuple[torch.Tensor, ...] = tuple(self.tensors.values())
        self.calls_until_failure: int | None = None
        self.reads_homes = True
        self.home_tensors: Tensors | None = None
        #: Called when the kernel runs, before it reads anything.
        self.meanwhile: Callable[[], None] = lambda: None

    def bind(self, rows: Tensors) -> None:
        assert self.reads_homes or rows is not self.home_tensors, "a kernel on its own device was given host memory"
        self.bound = tuple(rows)

    def kernel(self, x: torch.Tensor, topk_weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        assert ids.dtype is torch.int32 and ids.shape == topk_weights.shape and x.shape[0] == ids.shape[0]
        if self.calls_until_failure is not None:
            self.calls_until_failure -= 1
            if self.calls_until_failure < 0:
                raise KernelFailure
        self.meanwhile()
        return self.compute(self.bound, x, topk_weights, ids)

    def direct(self, x: torch.Tensor, topk_weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The result of the layer with all experts in place."""
        return self.compute(tuple(self.tensors.values()), x, topk_weights, ids)

    @staticmethod
    def compute(
        tensors: tuple[torch.Tensor, ...], x: torch.Tensor, topk_weights: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        weight, scale = (tensor[ids.long()] for tensor in tensors)  # [tokens, k, hidden, hidden], [tokens, k, hidden]
        rows = torch.zeros(*ids.shape, HIDDEN_SIZE)
        for i in range(HIDDEN_SIZE):
            rows += weight[..., i] * x[:, None, i, None]
        rows *= scale
        total = torch.zeros_like(x)
        for route in range(ids.shape[1]):
            total += rows[:, route] * topk_weights[:, route, None]
        return total


@dataclass
class SwitchedHelper:
    """Stands for the sidecar: up or not, as the test says."""

    is_up: bool = False


def _wait_for_nobody(timeout_s: float | None = None) -> bool:
    raise AssertionError("the only thread waits for others")


class Served:
    """A toy layer behind a `Dispatch`, carried by whoever waits: no threads.

    Args:
        has_buffer: whether there is a layer buffer.
        buffer_count: how many there are in all, for this layer and those `beside`.
        is_joined: whether the kernel reaches it behind the slots.
        copies_are_slow: whether copies, and kernels, take so long that it pays to do one while the other goes on.
        beside: layers that come before this one in the same engine.
        layer_count: of the engine, said by the first.
    """

    def __init__(
        self,
        toy: ToyMoe,
        slot_count: int,
        pass_kind: PassKind,
        *,
        has_buffer: bool = False,
        buffer_count: int = 1,
        is_joined: bool = False,
        is_host: bool = True,
        home: Home | None = None,
        in_place: InPlaceMode = "never",
        copies_are_slow: bool = False,
        has_hands: bool = False,
        beside: Sequence[Served] = (),
        layer_count: int = 1,
    ) -> None:
        first = beside[0] if beside else None
        backend = self.backend = first.backend if first else CpuBackend()
        # A kernel on a device of its own cannot read homes: the runtime has to go by the layer buffer then.
        backend.is_host = toy.reads_homes = is_host
        expert_count = len(toy.tensors["weight"])
        layout = SlabLayout.of(toy.tensors)
        self.toy = toy
        self.slab_bytes = layout.slab_bytes
        self.home = home or store(dict(toy.tensors), banks=first and first.banks)
        toy.home_tensors = self.home.tensors
        self.banks = banks_of(self.home)
        self.residency = Residency(expert_count, slot_count, LeastRecentlyUsed(slot_count))
        self.counters = first.counters if first else Counters([bank.name for bank in self.banks])
        for bank in self.banks:
            self.counters.values[self.counters.bank_up[bank.name]] = 1
        self.mover = first.mover if first else Mover(self.banks, backend, self.counters, has_hands=has_hands)
        if not has_hands:
            self.mover._changed.wait = _wait_for_nobody  # type: ignore[method-assign]
        self.buffer = None
        if has_buffer:
            # As in the runtime, the buffers that there are by turns.
            made = [one.buffer for one in beside if one.buffer is not None]
            self.buffer = made[-buffer_count] if len(made) >= buffer_count else self._make_buffer(layout, expert_count)
        behind = self.buffer.cells if self.buffer is not None and is_joined else None
        cells = Cells(layout, slot_count, backend, behind=behind)
        self.slots = SlotCache(self.residency, self.home, cells, backend, self.mover, self.counters)
        self.helper = first.helper if first else SwitchedHelper()
        self.order = first.order if first else LayerOrder(layer_count)
        rates = (0.5, 1.0) if copies_are_slow else (1e9, 2e9)
        costs = LayerCosts(expert_count, self.slab_bytes, *rates, in_place, is_addressable=is_host)
        if copies_are_slow:
            # By what it really takes, the kernel would be too short to copy anything meanwhile.
            costs.observe_kernel = lambda *_: None  # type: ignore[method-assign]
        self.dispatch = Dispatch(
            "toy",
            len(beside),
            self.slots,
            self.buffer,
            costs,
            self.order,
            self.helper,
            backend,
            self.counters,
            toy.kernel,
            toy.bind,
            pass_kind,
        )

    def _make_buffer(self, layout: SlabLayout, expert_count: int) -> LayerBuffer:
        rows = LayerCells(layout, expert_count, self.backend)
        return LayerBuffer(rows, self.backend, self.mover, self.counters)

    def spoil_layer_buffer(self) -> None:
        """Leave in the layer buffer what another layer would: nothing of this one."""
        if self.buffer is not None:
            self.buffer.abandon()
            for tensor in self.buffer.cells.tensors:
                tensor.view(torch.uint8).fill_(0xFF)  # NaNs, as floats

    def check(self, layers: Sequence[Served] = ()) -> None:
        """Assert what holds between forwards: nothing is held, and each slot has its expert's bytes.

        Args:
            layers: all of the engine, where there are others.
        """
        for layer in layers or [self]:
            layer.slots.settle()
        self.residency.check()
        assert all(map(operator.is_, self.toy.bound, self.slots.cells.tensors)), "the slots are not bound"
        for slot_id in range(self.residency.slot_count):
            assert not self.residency.is_held(slot_id)
        for expert_id in self.residency.resident_mask().nonzero()[0].tolist():
            slot_id = self.residency.resident_slot(expert_id)
            for cell, original in zip(self.slots.cells.tensors, self.toy.tensors.values(), strict=True):
                assert torch.equal(cell[slot_id], original[expert_id])
        counted = {state: self.counters.values[row] for state, row in self.counters.slots.items()}
        of_layers = [layer.residency.state_counts() for layer in layers or [self]]
        assert counted == {state: sum(counts[state] for counts in of_layers) for state in counted}
