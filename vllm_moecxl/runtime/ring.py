"""The routing ring: what forwards leave behind for the sidecar. Writing to it costs a copy of a few numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from queue import Empty, SimpleQueue
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from vllm_moecxl.control.prediction.base import Step
from vllm_moecxl.runtime.lookahead import GateLookahead

#: Entries that wait at most; what comes while a sidecar stalls for longer is lost.
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
        hidden: [tokens, hidden] float32, the layer's input; None for wide forwards, and where it is on a device.
        ahead: [distances, tokens, experts] float32, gates applied early on the device; None where that is still to be
            done from `hidden`, or cannot be done.
    """

    layer_id: int
    time_s: float
    expert_ids: npt.NDArray[np.uint32]
    weights: npt.NDArray[np.float32] | None
    hidden: npt.NDArray[np.float32] | None
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
        self._entries: SimpleQueue[Begun | Sighting | Ended | None] = SimpleQueue()
        #: Of the forward under way.
        self._layer_id = -1

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
            if x.device.type == "cpu":
                hidden = x.to(torch.float32, copy=True).numpy()
            elif self._lookahead is not None:
                ahead = self._lookahead.on_device(layer_id, x)
        if self._keeps_weights:
            weights = topk_weights.to("cpu", torch.float32, copy=True).numpy()
        self._put(Sighting(layer_id, self._clock(), routes.copy(), weights, hidden, ahead))

    def end(self, request_ids: Collection[str]) -> None:
        """Requests have ended."""
        self._put(Ended(tuple(request_ids)))

    def wake(self) -> None:
        """Make the reader return from `take`."""
        self._entries.put(None)

    def take(self, timeout_s: float = 0.0) -> Begun | Sighting | Ended | None:
        """The next entry; None if there is none in this time, or `wake` was called."""
        try:
            return self._entries.get(timeout=timeout_s) if timeout_s else self._entries.get_nowait()
        except Empty:
            return None

    def _put(self, entry: Begun | Sighting | Ended) -> None:
        if self._entries.qsize() < _ENTRY_COUNT_MAX or isinstance(entry, Ended):
            self._entries.put(entry)
