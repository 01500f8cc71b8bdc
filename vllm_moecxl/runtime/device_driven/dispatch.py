"""The hot path of a layer that the device serves: queue look-up, gather, remap and kernel, and wait for nothing.

So it can be captured in a CUDA graph and replayed without Python. What is wider than the slots is cut in groups of
tokens, always the same ones for a width, or, outside of graphs, goes through the layer buffer, which the host fills.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import numpy as np
import torch

from vllm_moecxl.control.forward import expects_all
from vllm_moecxl.control.layer_order import LayerOrder
from vllm_moecxl.data.devices.base import DeviceBackend
from vllm_moecxl.data.mover import Mover
from vllm_moecxl.data.slabs import Home
from vllm_moecxl.errors import ConfigError, IntegrityError
from vllm_moecxl.runtime.counters import Counters
from vllm_moecxl.runtime.device_driven.lanes import DeviceSlots
from vllm_moecxl.runtime.device_driven.layer import DeviceLayer
from vllm_moecxl.runtime.dispatch import Bind, Dispatch, Helper, Kernel, over_padding
from vllm_moecxl.runtime.layer_buffer import LayerBuffer
from vllm_moecxl.types import Cause, Lookup, PassKind

#: Groups of tokens up to which a forward outside of graphs runs from slots although there is a layer buffer: the
#: experts of a few more tokens are fewer than a layer's.
_GROUP_COUNT_MAX = 2


class DeviceDispatch:
    """Runs one layer from slots that the device fills.

    Args:
        name: the layer's name, for messages.
        layer_id: its place among the MoE layers.
        layer: tables and kernels.
        slots: the host's side of them.
        buffer: shared rows, one per expert; None where there are none.
        order: where the forward is; what runs from slots tells it when it is reported.
        helper: copies beside the forward.
        pass_kind: how to run what does not fit the slots. Only TOKEN can be cut without asking which experts are there.
        prepare: called before the first forward of all, when the model is complete.

    Attributes:
        following: the layer that comes after this one.

    Raises:
        ConfigError: there is no exact way to run a wide forward.
    """

    is_always_in_place = False

    def __init__(
        self,
        name: str,
        layer_id: int,
        layer: DeviceLayer,
        slots: DeviceSlots,
        buffer: LayerBuffer | None,
        order: LayerOrder,
        helper: Helper,
        mover: Mover,
        backend: DeviceBackend,
        counters: Counters,
        kernel: Kernel,
        bind: Bind,
        pass_kind: PassKind,
        fetch_s: float,
        prepare: Callable[[], None],
    ) -> None:
        self.name = name
        self.layer_id = layer_id
        self.layer = layer
        self.slots = slots
        self.buffer = buffer
        self.pass_kind = pass_kind
        #: Seconds that a slab takes from its home, by the profile.
        self.fetch_s = fetch_s
        self.following: DeviceDispatch | None = None
        self._order = order
        self._helper = helper
        self._mover = mover
        self._backend = backend
        self._counters = counters
        self._kernel = kernel
        self._bind = bind
        self._prepare = prepare
        self._token_count_max = layer.token_count_max
        if buffer is None and pass_kind is not PassKind.TOKEN and layer.token_count_max < sys.maxsize:
            raise ConfigError(
                f"--moe-offload-config: layer_buffer=False is not possible: the kernel of {name} keeps its result only "
                "when a wide forward runs in one pass, and the device cannot fetch so many experts into slots; drop "
                'the option, or accept a changed last bit with passes="fast"'
            )
        bind(layer.cells.tensors)

    @property
    def home(self) -> Home:
        """Its slabs."""
        return self.layer.home

    def __call__(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *,
        is_padding: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the layer.

        Args:
            x: [tokens, hidden] activations on the device.
            topk_weights: [tokens, k] router weights.
            topk_ids: [tokens, k] expert ids of this rank.
            is_padding: [tokens] bool on the device, rows that a graph pads its batch with; None where there are none.

        Returns:
            The kernel's output for all tokens.

        Raises:
            ConfigError: the graph under capture is too wide for this kernel and these slots.
            IntegrityError: an id that the layer does not have. From slots that is found out later, see `DeviceRing`.
        """
        if not topk_ids.numel():
            return torch.empty_like(x)
        self._prepare()
        group_count = -(-len(x) // self._token_count_max)
        if group_count == 1:
            return self._run_group(x, topk_weights, topk_ids, is_padding)
        if not self.is_capturing() and self.buffer is not None:
            if self.pass_kind is not PassKind.TOKEN or group_count > _GROUP_COUNT_MAX:
                return self._run_layer_buffer(self.buffer, x, topk_weights, over_padding(topk_ids, is_padding))
        elif self.pass_kind is not PassKind.TOKEN:
            raise ConfigError(
                f"--compilation-config: a graph of {len(x)} tokens is too wide for the slots of {self.name}, whose "
                f"kernel keeps its result only in one pass: set cudagraph_capture_sizes to at most "
                f'{self._token_count_max}, ask for more slots, or use --moe-offload-config.lookup "host"'
            )
        return self._run_groups(x, topk_weights, topk_ids, is_padding)

    def is_capturing(self) -> bool:
        """Whether what is called now goes into a graph."""
        return self._backend.is_capturing()

    def rehearse(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """Compute a forward that no request asked for, on what the slots happen to hold; nobody looks at the result.

        A graph may be captured next: our kernels run once before, for nobody, so that they are compiled by then.
        """
        self._prepare()
        if not topk_ids.numel():
            return torch.empty_like(x)
        nobody = torch.ones(1, dtype=torch.bool, device=topk_ids.device)
        self._run_group(x[:1], topk_weights[:1], topk_ids[:1], nobody)
        return self._kernel(x, topk_weights, (topk_ids % self.layer.cells.cell_count).to(torch.int32))

    def preload(self, expert_ids: list[int]) -> None:
        """Fetch experts that are likely to be needed first, as far as there are slots; before the first forward."""
        wanted = expert_ids[: self.layer.own_count]
        fetches = [
            self._mover.start(self.home, expert_id, self.layer.cells.rows(slot_id), Cause.DEMAND, 0.0)
            for slot_id, expert_id in enumerate(wanted)
        ]
        try:
            self._mover.wait(fetches)
        except BaseException:
            self._mover.cancel(fetches)
            raise
        self.layer.admit(wanted)

    def _run_group(
        self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, is_padding: torch.Tensor | None
    ) -> torch.Tensor:
        slot_ids = self.layer.look_up(topk_ids, is_padding)
        self.layer.look_ahead(x)
        return self._kernel(x, topk_weights, slot_ids)

    def _run_groups(
        self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, is_padding: torch.Tensor | None
    ) -> torch.Tensor:
        """Tokens in groups whose experts fit whatever they are: the same groups each time, as a graph needs them."""
        outputs = [
            self._run_group(
                x[rows], topk_weights[rows], topk_ids[rows], is_padding[rows] if is_padding is not None else None
            )
            for rows in self._groups(len(x))
        ]
        return torch.cat(outputs)

    def _groups(self, token_count: int) -> Iterator[slice]:
        for start in range(0, token_count, self._token_count_max):
            yield slice(start, min(start + self._token_count_max, token_count))

    def _run_layer_buffer(
        self, buffer: LayerBuffer, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> torch.Tensor:
        """One exact pass from a row per expert. Waits for the ids, and leaves the slots as they are."""
        host_ids = self._backend.route_ids(topk_ids)
        distinct = np.unique(host_ids.numpy().view(np.uint32))
        if distinct[-1] >= self.home.expert_count:
            raise IntegrityError(f"{self.name} was asked for expert {distinct[-1]} of {self.home.expert_count}")
        counters = self._counters
        needed = distinct.tolist()
        buffer.claim(self.home)
        buffer.drop_all_but(needed)
        buffer.bring(needed, Cause.DEMAND, self._order.arrive(self.layer_id))
        self._bring_following(len(needed))
        counters.add({counters.lookup[Lookup.MISS]: len(needed), counters.passes[PassKind.LAYER_BUFFER]: 1})
        buffer.wait(needed)
        self._bind(buffer.cells.tensors)
        try:
            return self._kernel(x, topk_weights, self._backend.to_device(host_ids))
        finally:
            self._bind(self.layer.cells.tensors)
            buffer.was_read()

    def _bring_following(self, distinct_count: int) -> None:
        """Have the next layer's experts copied into the other buffer, if it will very likely need them all."""
        following = self.following
        if following is None or following.buffer in (None, self.buffer) or not self._helper.is_up:
            return
        if expects_all(distinct_count, self.home.expert_count):
            assert following.buffer is not None
            following.buffer.claim(following.home)
            deadline = self._order.next_position(following.layer_id)
            following.buffer.bring(range(following.home.expert_count), Cause.PREFETCH, deadline)


#: A layer, whoever looks its experts up.
AnyDispatch = Dispatch | DeviceDispatch
