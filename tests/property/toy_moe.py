"""A Mixture-of-Experts layer small enough to compute directly, and the slots that serve it."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch

from tests.support.homes import store
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

    def bind(self, rows: Tensors) -> None:
        assert self.reads_homes or rows is not self.home_tensors, "a kernel on its own device was given host memory"
        self.bound = tuple(rows)

    def kernel(self, x: torch.Tensor, topk_weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        assert ids.dtype is torch.int32 and ids.shape == topk_weights.shape and x.shape[0] == ids.shape[0]
        if self.calls_until_failure is not None:
            self.calls_until_failure -= 1
            if self.calls_until_failure < 0:
                raise KernelFailure
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


class Served:
    """A toy layer behind a `Dispatch`, carried by whoever waits: no threads.

    Args:
        has_buffer: whether there is a layer buffer.
        is_joined: whether the kernel reaches it behind the slots.
        copies_are_slow: whether it pays to compute anything at all while a slab is copied.
    """

    def __init__(
        self,
        toy: ToyMoe,
        slot_count: int,
        pass_kind: PassKind,
        *,
        has_buffer: bool = False,
        is_joined: bool = False,
        is_host: bool = True,
        home: Home | None = None,
        in_place: InPlaceMode = "never",
        copies_are_slow: bool = False,
        has_hands: bool = False,
    ) -> None:
        backend = CpuBackend()
        # A kernel on a device of its own cannot read homes: the runtime has to go by the layer buffer then.
        backend.is_host = toy.reads_homes = is_host
        expert_count = len(toy.tensors["weight"])
        layout = SlabLayout.of(toy.tensors)
        self.toy = toy
        self.slab_bytes = layout.slab_bytes
        self.home = home or store(dict(toy.tensors))
        toy.home_tensors = self.home.tensors
        banks = {shard.bank.name: shard.bank for shard in self.home.shards}
        self.residency = Residency(expert_count, slot_count, LeastRecentlyUsed(slot_count))
        self.counters = Counters(list(banks))
        for name in banks:
            self.counters.values[self.counters.bank_up[name]] = 1
        self.mover = Mover(list(banks.values()), backend, self.counters, has_hands=has_hands)
        rows = LayerCells(layout, expert_count, backend) if has_buffer else None
        cells = Cells(layout, slot_count, backend, behind=rows if is_joined else None)
        self.slots = SlotCache(self.residency, self.home, cells, backend, self.mover, self.counters)
        self.buffer = rows and LayerBuffer(rows, backend, self.mover, self.counters)
        self.helper = SwitchedHelper()
        home_bytes_per_s = 1.0 if copies_are_slow else 1e9
        self.dispatch = Dispatch(
            "toy",
            0,
            self.slots,
            self.buffer,
            LayerCosts(expert_count, self.slab_bytes, home_bytes_per_s, 2e9, in_place, is_addressable=is_host),
            LayerOrder(1),
            self.helper,
            backend,
            self.counters,
            toy.kernel,
            toy.bind,
            pass_kind,
        )

    def spoil_layer_buffer(self) -> None:
        """Leave in the layer buffer what another layer would: nothing of this one."""
        if self.buffer is not None:
            self.buffer.abandon()
            for tensor in self.buffer.cells.tensors:
                tensor.view(torch.uint8).fill_(0xFF)  # NaNs, as floats

    def check(self) -> None:
        """Assert what holds between forwards: nothing is held, and each slot has its expert's bytes."""
        self.slots.settle()
        self.residency.check()
        assert all(map(operator.is_, self.toy.bound, self.slots.cells.tensors)), "the slots are not bound"
        for slot_id in range(self.residency.slot_count):
            assert not self.residency.is_held(slot_id)
        for expert_id in self.residency.resident_mask().nonzero()[0].tolist():
            slot_id = self.residency.resident_slot(expert_id)
            for cell, original in zip(self.slots.cells.tensors, self.toy.tensors.values(), strict=True):
                assert torch.equal(cell[slot_id], original[expert_id])
        counted = {state: self.counters.values[row] for state, row in self.counters.slots.items()}
        assert counted == self.residency.state_counts()
