"""What the device-driven layers of one runtime have in common: how they are made, and what they tell the host."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle

import torch

from vllm_moecxl.config import OffloadConfig
from vllm_moecxl.control.layer_order import LayerOrder
from vllm_moecxl.data.devices.base import DeviceBackend
from vllm_moecxl.data.mover import Mover
from vllm_moecxl.data.slabs import Cells, Home
from vllm_moecxl.runtime.counters import Counters
from vllm_moecxl.runtime.device_driven.dispatch import DeviceDispatch
from vllm_moecxl.runtime.device_driven.lanes import DeviceSlots
from vllm_moecxl.runtime.device_driven.layer import DeviceLayer, EarlyGate, staged_words
from vllm_moecxl.runtime.device_driven.ring import DeviceRing
from vllm_moecxl.runtime.dispatch import Bind, Helper, Kernel
from vllm_moecxl.runtime.layer_buffer import LayerBuffer
from vllm_moecxl.runtime.lookahead import GateLookahead
from vllm_moecxl.runtime.ring import Begun, RoutingRing
from vllm_moecxl.types import PassKind

#: Slots of a layer that are lent to the host, for one prefetch each: so many at most, and this share. Where that is
#: less than one there is none, and nothing is prefetched: of few slots each is worth more to the device.
_LANE_COUNT_MAX = 4
_LANE_SHARE = 1 / 8
#: Forwards of more tokens are not predicted: they need nearly all experts.
_LOOKAHEAD_TOKEN_COUNT_MAX = 32
#: Visits whose early gates' scores are kept for the sidecar: a power of two, of a few megabytes for a whole model.
_LOOKAHEAD_DEPTH = 4
#: Forwards are numbered from 1 to here, and again.
_STEP_MAX = (1 << 31) - 1


class DeviceSide:
    """See the module. It knows no kernel and no model: the sidecar's thread, which holds it, keeps neither alive."""

    def __init__(
        self,
        config: OffloadConfig,
        backend: DeviceBackend,
        device: torch.device,
        mover: Mover,
        order: LayerOrder,
        helper: Helper,
        counters: Counters,
    ) -> None:
        self._config = config
        self._backend = backend
        self._device = device
        self._mover = mover
        self._order = order
        self._helper = helper
        self._counters = counters
        self._layers: list[DeviceLayer] = []
        self._slots: list[DeviceSlots] = []
        self._step = 0
        self._step_word = torch.zeros(1, dtype=torch.int32, device=device)
        self._ring: DeviceRing | None = None
        self._turns: Iterator[DeviceSlots] = iter(())
        self._lock = threading.Lock()

    def make(
        self,
        name: str,
        layer_id: int,
        home: Home,
        cells: Cells,
        topk: int,
        buffer: LayerBuffer | None,
        kernel: Kernel,
        bind: Bind,
        pass_kind: PassKind,
        fetch_s: float,
        prepare: Callable[[], None],
    ) -> DeviceDispatch:
        """A layer; to be made in order, and connected before the first forward.

        Args:
            prepare: called before the first forward, when the model is complete and nothing is captured yet.
        """
        layer = DeviceLayer(
            home, cells, topk, self._lane_count(home, cells, topk), self._backend, self._device, self._step_word
        )
        slots = DeviceSlots(home, cells, layer.mailbox, self._backend, self._mover, self._counters, layer.lane_count)
        self._layers.append(layer)
        self._slots.append(slots)
        return DeviceDispatch(
            name,
            layer_id,
            layer,
            slots,
            buffer,
            self._order,
            self._helper,
            self._mover,
            self._backend,
            self._counters,
            kernel,
            bind,
            pass_kind,
            fetch_s,
            prepare,
        )

    @property
    def token_count_max(self) -> int:
        """Tokens whose experts fit the slots of every layer, whichever they are."""
        return min(layer.token_count_max for layer in self._layers)

    def connect(self, registered: Sequence[str]) -> None:
        """Let the device find the slabs in these banks.

        Raises:
            CapacityError: one of them is not registered with the device.
        """
        for layer in self._layers:
            layer.connect(registered)

    def foresee(self, ring: RoutingRing | None, lookahead: GateLookahead | None) -> None:
        """From now on the routing goes to `ring`, with what `lookahead` says of the next layers."""
        if lookahead is not None:
            for layer_id, layer in enumerate(self._layers):
                layer.early_gates = [self._early_gate(*gate) for gate in lookahead.following(layer_id)]
        self._turns = cycle(self._slots)
        self._ring = DeviceRing(self._layers, self._order, self._counters, ring)

    def begin(self, begun: Begun | None, ring_time_s: float) -> None:
        """A forward that requests asked for is about to be queued.

        Args:
            begun: what is in it; None where nobody can say.
            ring_time_s: now.

        Raises:
            IntegrityError: an earlier one was asked for experts that do not exist.
        """
        assert self._ring is not None
        if not self._step:
            # Captures and warm-ups have to be over before what they left can be told from what is to come.
            self._backend.synchronize(self._backend.record(self._backend.compute_stream()))
            with self._lock:
                self._ring.skip()
        self._ring.raise_failure()
        self._step = self._step % _STEP_MAX + 1
        # In order with the kernels: the host may be a step ahead of them.
        self._step_word.fill_(self._step)
        with self._lock:
            self._ring.begin(self._step, begun or Begun(None, None, ring_time_s))

    def collect(self) -> None:
        """Take in what the device has told; move on what is lent to the host. Any thread."""
        if self._ring is not None and self._lock.acquire(blocking=False):
            try:
                self._ring.collect()
            finally:
                self._lock.release()
            # Asked many times a millisecond: of those with nothing under way, one each time.
            for slots in [one for one in self._slots if one.is_busy] or [next(self._turns)]:
                slots.settle()

    def _early_gate(self, weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None) -> EarlyGate:
        word_count = _LOOKAHEAD_TOKEN_COUNT_MAX * len(weight)
        return EarlyGate(
            weight[None].contiguous(),  # the parameter itself, nearly always
            None if scale is None else scale[None].contiguous(),
            None if bias is None else bias[None].contiguous(),
            staged_words(self._backend, _LOOKAHEAD_DEPTH * word_count).view(_LOOKAHEAD_DEPTH, word_count),
            _LOOKAHEAD_TOKEN_COUNT_MAX,
        )

    def _lane_count(self, home: Home, cells: Cells, topk: int) -> int:
        """Slots that are lent, for prefetches; none where there are none, or none to spare."""
        if self._config.prefetch == "off" or not self._config.sidecar or cells.cell_count == home.expert_count:
            return 0
        wanted = min(_LANE_COUNT_MAX, int(cells.cell_count * _LANE_SHARE))
        return max(0, min(wanted, cells.cell_count - topk))
