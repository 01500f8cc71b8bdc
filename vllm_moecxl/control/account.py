"""The byte account: what slots, homes and KV cache take, and whether it fits. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_moecxl.config import OffloadConfig
from vllm_moecxl.control.budgets import budgets
from vllm_moecxl.errors import CapacityError, ConfigError
from vllm_moecxl.units import MIB, format_bytes

#: Part of the room for slots that a second layer buffer may take where the number of slots is left to us.
_SECOND_BUFFER_SHARE_MAX = 0.1


@dataclass(frozen=True)
class LayerNeed:
    """What one MoE layer is made of, on this rank.

    Attributes:
        name: vLLM's name of the layer.
        expert_count: its experts.
        topk: experts of one token.
        slab_bytes: bytes of one expert.
    """

    name: str
    expert_count: int
    topk: int
    slab_bytes: int

    @property
    def home_bytes(self) -> int:
        return self.expert_count * self.slab_bytes


@dataclass(frozen=True)
class Machine:
    """What there is to give, in bytes.

    Attributes:
        host_free_bytes: host memory that experts' homes may take.
        device_free_bytes: compute-device memory for slots and layer buffer, with KV cache and activations taken off.
        shared: whether the device is the host, as on the CPU engine: slots and homes then come out of the same memory.
        kv_cache_bytes: what vLLM was asked to give the KV cache; None where it takes what is left.
    """

    host_free_bytes: int
    device_free_bytes: int
    shared: bool
    kv_cache_bytes: int | None


@dataclass(frozen=True)
class Holding:
    """What one bank homes.

    Attributes:
        bank_name: its label.
        byte_count: of slabs.
        on_host: whether they come out of the host's DRAM.
    """

    bank_name: str
    byte_count: int
    on_host: bool


@dataclass(frozen=True)
class Account:
    """The plan for one rank: slots of each layer in order, and where the bytes go.

    Attributes:
        layer_buffer_count: of each shape: none, one, or two that take turns.
        layer_buffer_bytes: of all of them.
    """

    slot_counts: tuple[int, ...]
    holdings: tuple[Holding, ...]
    slot_bytes: int
    layer_buffer_count: int
    layer_buffer_bytes: int
    largest_layer_bytes: int
    kv_cache_bytes: int | None

    def lines(self, layers: Sequence[LayerNeed]) -> list[str]:
        """The account in words, a line each."""
        expert_count = sum(layer.expert_count for layer in layers)
        slot_count = sum(self.slot_counts)
        kv = "what vLLM finds free" if self.kv_cache_bytes is None else format_bytes(self.kv_cache_bytes)
        return [
            f"experts       {expert_count:>8} in {len(layers)} layers, {format_bytes(sum_home_bytes(layers))}",
            *(f"homes         bank {one.bank_name}: {format_bytes(one.byte_count)}" for one in self.holdings),
            f"slots         {slot_count:>8} ({100 * slot_count / expert_count:.0f}% of the experts), "
            f"{format_bytes(self.slot_bytes)} on the device",
            f"layer buffers {self.layer_buffer_count:>8}, {format_bytes(self.layer_buffer_bytes)} on the device",
            f"loading       one layer at a time, {format_bytes(self.largest_layer_bytes)} on the device",
            f"KV cache      {kv}",
        ]


def sum_home_bytes(layers: Sequence[LayerNeed]) -> int:
    """Bytes of all experts."""
    return sum(layer.home_bytes for layer in layers)


def wanted_device_bytes(config: OffloadConfig, layers: Sequence[LayerNeed]) -> int:
    """What slots and layer buffer take at least: as the user asked, or the smallest that works where left to us."""
    spec = config.slots
    if spec.total_bytes is not None:
        slot_bytes = spec.total_bytes
    elif spec.is_auto:
        slot_bytes = _slot_bytes(layers, [layer.topk for layer in layers])
    else:
        slot_bytes = _slot_bytes(
            layers, [spec.count_for(layer.expert_count, layer.topk, config.slots_text) for layer in layers]
        )
    return slot_bytes + (_buffer_bytes(layers) if config.layer_buffer is not False else 0)


def require_host_room(host_home_bytes: int, machine: Machine) -> None:
    """Refuse homes that the host's DRAM cannot take.

    Raises:
        CapacityError: one sentence.
    """
    if host_home_bytes > machine.host_free_bytes:
        raise CapacityError(
            f"the experts' homes take {format_bytes(host_home_bytes)} of host memory and only "
            f"{format_bytes(machine.host_free_bytes)} are free: free memory, add a bank elsewhere (CXL memory, or a "
            "slab file made by moecxl pack), use a quantised checkpoint, or more tensor-parallel ranks on other "
            "machines"
        )


def plan(
    config: OffloadConfig,
    layers: Sequence[LayerNeed],
    machine: Machine,
    holdings: Sequence[Holding],
    curves: npt.NDArray[np.int64] | None = None,
) -> Account:
    """Resolve `slots` and `layer_buffer` for these layers and check that everything fits.

    Args:
        holdings: what each bank will home.
        curves: [layers, experts + 1] misses of each layer with 0, 1, ... slots, by which slots that are given for all
            layers together are shared out; None for equal shares.

    Raises:
        ConfigError: a slot count that these layers cannot have.
        CapacityError: the homes or the slots do not fit; the sentence says what would.
    """
    host_home_bytes = sum(holding.byte_count for holding in holdings if holding.on_host)
    require_host_room(host_home_bytes, machine)
    room_bytes = machine.device_free_bytes - (host_home_bytes if machine.shared else 0)
    # Where the device is the host, a slot costs the memory of a home: not worth more than half of it again.
    auto_bytes_max = host_home_bytes // 2 if machine.shared and host_home_bytes else sum_home_bytes(layers)
    slot_counts = _slot_counts(config, layers, room_bytes, auto_bytes_max)
    is_total = config.slots.is_auto or config.slots.total_bytes is not None
    if curves is not None and is_total and len({(layer.topk, layer.slab_bytes) for layer in layers}) == 1:
        slot_counts = tuple(budgets(list(curves), sum(slot_counts), layers[0].topk).tolist())
    slot_bytes = _slot_bytes(layers, slot_counts)
    layer_buffer_count = _layer_buffer_count(config, layers, slot_counts, room_bytes - slot_bytes)
    layer_buffer_bytes = layer_buffer_count * _buffer_bytes(layers)
    if slot_bytes + layer_buffer_bytes > room_bytes:
        raise CapacityError(
            f"--moe-offload-config: slots={config.slots_text!r} takes {format_bytes(slot_bytes)} and the layer buffer "
            f"{format_bytes(layer_buffer_bytes)} of device memory but {format_bytes(max(room_bytes, 0))} are left for "
            f"them: {_what_fits(layers, room_bytes - layer_buffer_bytes)}"
        )
    largest_layer_bytes = max(layer.home_bytes for layer in layers)
    return Account(
        slot_counts,
        tuple(holdings),
        slot_bytes,
        layer_buffer_count,
        layer_buffer_bytes,
        largest_layer_bytes,
        machine.kv_cache_bytes,
    )


def _slot_counts(
    config: OffloadConfig, layers: Sequence[LayerNeed], room_bytes: int, auto_bytes_max: int
) -> tuple[int, ...]:
    spec = config.slots
    if spec.total_bytes is not None:
        counts = _counts_within(layers, spec.total_bytes)
        if any(count < layer.topk for count, layer in zip(counts, layers, strict=True)):
            # Every layer gets the same share, so the one whose token needs the largest share decides.
            home_bytes = sum_home_bytes(layers)
            least = max(-(-layer.topk * home_bytes // layer.expert_count) for layer in layers)
            raise ConfigError(
                f"--moe-offload-config: slots={config.slots_text!r} is not possible: every layer needs slots for the "
                f"top-k of one token, use at least {-(-least // MIB)}MiB"
            )
        return counts
    if not spec.is_auto:
        return tuple(spec.count_for(layer.expert_count, layer.topk, config.slots_text) for layer in layers)
    if sum_home_bytes(layers) <= min(room_bytes, auto_bytes_max):
        return tuple(layer.expert_count for layer in layers)
    # The layer buffer comes first: without it a long prompt would be cut into very many passes. A second one, where it
    # takes little of what slots could have.
    buffer_bytes = _buffer_bytes(layers) if config.layer_buffer is not False else 0
    if config.sidecar and buffer_bytes <= room_bytes * _SECOND_BUFFER_SHARE_MAX:
        buffer_bytes *= 2
    budget = room_bytes - buffer_bytes
    counts = _counts_within(layers, min(budget, auto_bytes_max))
    return tuple(max(count, layer.topk) for count, layer in zip(counts, layers, strict=True))


def _buffer_bytes(layers: Sequence[LayerNeed]) -> int:
    """Layers of one shape share a buffer."""
    shapes = {(layer.expert_count, layer.slab_bytes) for layer in layers}
    return sum(expert_count * slab_bytes for expert_count, slab_bytes in shapes)


def _counts_within(layers: Sequence[LayerNeed], total_bytes: int) -> tuple[int, ...]:
    """As nearly the same share of every layer's experts as whole slots allow, as large as `total_bytes` allows."""
    share = min(max(total_bytes, 0) / sum_home_bytes(layers), 1.0)
    counts = [int(share * layer.expert_count + 1e-9) for layer in layers]
    left_bytes = total_bytes - _slot_bytes(layers, counts)
    # What rounding down left over: a slot more for as many layers as it pays.
    for index, layer in enumerate(layers):
        if counts[index] < layer.expert_count and layer.slab_bytes <= left_bytes:
            counts[index] += 1
            left_bytes -= layer.slab_bytes
    return tuple(counts)


def _slot_bytes(layers: Sequence[LayerNeed], slot_counts: Sequence[int]) -> int:
    return sum(count * layer.slab_bytes for count, layer in zip(slot_counts, layers, strict=True))


def _layer_buffer_count(
    config: OffloadConfig, layers: Sequence[LayerNeed], slot_counts: Sequence[int], left_bytes: int
) -> int:
    """How many layer buffers of each shape there are to be; a second one only where it is used and fits."""
    is_cut = any(count < layer.expert_count for count, layer in zip(slot_counts, layers, strict=True))
    if not is_cut or config.layer_buffer is False:
        return 0
    fitting = left_bytes // _buffer_bytes(layers)
    has_following = len(layers) > len({(layer.expert_count, layer.slab_bytes) for layer in layers})
    wanted = 2 if config.sidecar and has_following else 1
    least = 1 if config.layer_buffer is True else 0
    return max(min(wanted, fitting), least)


def _what_fits(layers: Sequence[LayerNeed], room_bytes: int) -> str:
    # Bytes, since they are rounded down to whole slots: a percentage is rounded up, and could be refused again.
    fitting_mib = max(room_bytes, 0) // MIB
    counts = _counts_within(layers, fitting_mib * MIB)
    if any(count < layer.topk for count, layer in zip(counts, layers, strict=True)):
        return "not even the top-k of one token fits, lower the KV cache or turn off layer_buffer"
    return f'use slots="{fitting_mib}MiB" or less'
