"""The routing ring: what forwards leave behind for the sidecar. Writing to it costs a copy of a few numbers."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from vllm_moecxl.control.prediction.base import Step
from vllm_moecxl.runtime.lookahead import GateLookahead

#: Entries that wait at most; what comes while a sidecar stalls for longer is lost, steps as a whole.
_ENTRY_COUNT_MAX = 4096
#: Inputs of layers are kept for forwards of up to so many tokens: wider ones are not predicted, they need nearly all
#: experts.
_TOKEN_COUNT_MAX = 32


class Begun(NamedTuple):
    """A forward begins.

    Attributes:
        step: its requests and tokens; None where nobody can say.
        positions: [requests] int64, the place in its request of each one's first token; None where nobody can say.
        time_s: when.
    """

    step: Step | None
    positions: npt.NDArray[np.int64] | None
    time_s: float


class Sighting(NamedTuple):
    """A layer's router has chosen.

    Attributes:
        layer_id: the layer.
        time_s: when.
        expert_ids: [tokens, k] uint32.
        weights: [tokens, k] float32; None where nobody wants them.
        hidden: [tokens, hidden] a copy of the layer's input; None for wide forwards, and where it is on a device.
        ahead: [distances, tokens, experts] float32, gates applied early on the device; None where that is still to be
            done from `hidden`, or cannot be done.
    """

    layer_id: int
    time_s: float
    expert_ids: npt.NDArray[np.uint32]
    weights: npt.NDArray[np.float32] | None
    hidden: torch.Tensor | None
    ahead: npt.NDArray[np.float32] | None


class Ended(NamedTuple):
    """Requests have ended."""

    request_ids: tuple[str, ...]


class RoutingRing:
    """See the module. The forward's thread writes, one thread at a time reads.

    Args:
        keeps_inputs: whether somebody predicts.
        keeps_weights: whether somebody wants the router's weights.
        lookahead: applies gates early on a device; None where that is not possible, or done by the reader.

    Attributes:
        describe: says what is in the forward that is running; set by whoever knows the engine.
        is_wanted: whether layers are to be put in at present; where not, only the beginnings of forwards are.
    """

    def __init__(
        self,
        *,
        keeps_inputs: bool,
        keeps_weights: bool,
        lookahead: GateLookahead | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.describe: Callable[[], Begun | None] = lambda: None
        self.is_wanted = True
        self._keeps_inputs = keeps_inputs
        self._keeps_weights = keeps_weights
        self._lookahead = lookahead
        self._clock = clock
        self._entries: deque[Begun | Sighting | Ended] = deque()
        #: Wakes the reader, which may be left with some when it comes back by itself: it wakes in vain then.
        self._calls: SimpleQueue[None] = SimpleQueue()
        self._is_awaited = False
        #: Whether a layer has been lost: then so is what follows of its step, which nobody could tell from the next.
        self._is_losing = False
        #: Of the forward under way: the latest one, -1 before the first one of a forward that was announced.
        self._layer_id = sys.maxsize

    def begin(self, begun: Begun) -> None:
        """A forward is about to begin of which all is known before its first layer."""
        self._layer_id = -1
        self._put(begun)

    def see(self, layer_id: int, routes: npt.NDArray[np.uint32], topk_weights: torch.Tensor, x: torch.Tensor) -> None:
        """A layer's router has chosen. Called before anything is fetched for the layer.

        Args:
            layer_id: the layer.
            routes: [tokens, k] uint32; copied, its memory may be used again.
            topk_weights: [tokens, k] on the device.
            x: [tokens, hidden] on the device, the layer's input.
        """
        if layer_id <= self._layer_id:
            self._put(self.describe() or Begun(None, None, self._clock()))
        self._layer_id = layer_id
        if not self.is_wanted:
            return
        hidden = ahead = weights = None
        if self._keeps_inputs and len(routes) <= _TOKEN_COUNT_MAX:
            if x.is_cpu:
                hidden = x.clone()
            elif self._lookahead is not None:
                ahead = self._lookahead.on_device(layer_id, x)
        if self._keeps_weights:
            weights = topk_weights.to("cpu", torch.float32, copy=True).numpy()
        self._put(Sighting(layer_id, self._clock(), routes.copy(), weights, hidden, ahead))

    def end(self, request_ids: Collection[str]) -> None:
        """Requests have ended."""
        self._put(Ended(tuple(request_ids)))

    def report(self, entry: Begun | Sighting) -> None:
        """What a device has found out by itself, in order. Its forwards call neither `begin` nor `see`."""
        self._put(entry)

    def wake(self) -> None:
        """Make the reader return from `wait`."""
        self._calls.put(None)

    def wait(self, timeout_s: float) -> None:
        """Return once there is an entry, the time is over, or `wake` was called. One thread does."""
        # Said before looking, as writers look after writing: one of the two sees the other.
        self._is_awaited = True
        if not self._entries:
            with suppress(Empty):
                self._calls.get(timeout=timeout_s)
        self._is_awaited = False

    def take(self) -> Begun | Sighting | Ended | None:
        """The next entry, if there is one."""
        return self._entries.popleft() if self._entries else None

    def _put(self, entry: Begun | Sighting | Ended) -> None:
        if not isinstance(entry, Ended):
            self._is_losing = len(self._entries) >= _ENTRY_COUNT_MAX or (
                self._is_losing and isinstance(entry, Sighting)
            )
            if self._is_losing:
                return
        self._entries.append(entry)
        if self._is_awaited:
            self._calls.put(None)
