"""Recording of a routing trace while the engine serves: what steps interleave comes out request by request."""

from __future__ import annotations

import logging
from array import array
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_moecxl.control.prediction.base import Step
from vllm_moecxl.control.trace import RoutingTrace
from vllm_moecxl.units import MIB, format_bytes

logger = logging.getLogger("vllm.moecxl")

#: Memory that a recording may take. Enough for 10^5 tokens of 60 layers x 8 experts with weights and lookahead.
BYTES_MAX = 256 * MIB

_Ids = npt.NDArray[np.integer]
_Layers = list[npt.NDArray[Any] | None]


class _Request:
    """The tokens of one request, in the order of their positions; nothing is ever there twice."""

    def __init__(self) -> None:
        self.positions = array("q")
        self.token_ids = array("i")
        self.topk, self.weights, self.ahead = bytearray(), bytearray(), bytearray()
        self.prefill_count = 0
        self._has_decoded = False
        self._was_prompt = True
        self._next_position = 0

    def place(self, token_count: int, is_prompt: bool, position: int | None) -> tuple[int, int]:
        """Where the next tokens go, before they are recorded.

        Args:
            position: of the first of them, None where the engine does not say: then they follow those before, and
                a prompt after decode is that of a preempted request, which begins anew.

        Returns:
            Position of the first token, and how many of them are recorded already.
        """
        if position is None:
            is_again = is_prompt and not self._was_prompt
            position = 0 if is_again else self._next_position if is_prompt else self._end
        self._was_prompt = is_prompt
        self._next_position = position + token_count
        if not is_prompt:
            self._truncate(position)  # drafts that were rejected: what is at these positions now is what counts
        return position, min(max(self._end - position, 0), token_count)

    def add(self, position: int, token_ids: _Ids, is_prompt: bool) -> None:
        """The positions and token ids of what has been recorded."""
        self.positions.extend(range(position, position + len(token_ids)))
        self.token_ids.frombytes(token_ids.astype(np.int32).tobytes())
        self._has_decoded |= not is_prompt
        if not self._has_decoded:  # what a preempted request generated comes again with its prompt, and is none of it
            self.prefill_count += len(token_ids)

    @property
    def _end(self) -> int:
        return self.positions[-1] + 1 if self.positions else 0

    def _truncate(self, position: int) -> None:
        kept = bisect_left(self.positions, position)
        if kept == len(self.positions):
            return
        for buffer in (self.topk, self.weights, self.ahead):
            del buffer[len(buffer) // len(self.positions) * kept :]
        del self.positions[kept:], self.token_ids[kept:]
        self.prefill_count = min(self.prefill_count, kept)


class TraceRecorder:
    """Gathers the routing of an engine's steps, and writes it as a routing trace.

    It is told of a step and then of its layers, which costs a copy of a few numbers each. Not thread-safe. A step that
    is not finished (fewer layers than the model has) leaves nothing. Beyond `bytes_max` it stops, and says so once.

    Weights are in the trace where every step had them. So is lookahead, but prompts may do without: it serves decode
    only, and their rows then hold the router's own choice.

    Args:
        layer_count: MoE layers, each told once per step.
        expert_count: experts of each of them.
        topk_count: experts that a token uses in a layer.
        layer_ids: the model's numbers of its MoE layers; 0, 1, 2, ... where not given.
        meta: model, source, licence; what else a reader should know.
        bytes_max: memory that the recording may take.
    """

    def __init__(
        self,
        layer_count: int,
        expert_count: int,
        topk_count: int,
        *,
        layer_ids: Sequence[int] | None = None,
        meta: Mapping[str, Any] | None = None,
        bytes_max: int = BYTES_MAX,
    ) -> None:
        assert layer_count > 0 and 0 < topk_count <= expert_count
        self._shape = (layer_count, topk_count)
        self._dtype = np.dtype(np.uint8 if expert_count <= 1 << 8 else np.uint16)
        self._layer_ids = np.arange(layer_count) if layer_ids is None else np.array(layer_ids)
        self._meta = {**(meta or {}), "num_experts": expert_count}
        self._bytes_max = bytes_max
        self._requests: list[_Request] = []  # all of them, in the order of their arrival
        self._open: dict[str, _Request] = {}
        self._has_weights = self._has_ahead = True
        self._is_ahead_seen = False
        self._step: tuple[Step, npt.NDArray[np.int64] | None] | None = None
        self._topk: _Layers = []
        self._weights: _Layers = []
        self._ahead: _Layers = []
        self._missing: set[int] = set()
        self.byte_count = 0
        self.is_full = False

    def begin(self, step: Step, positions: npt.NDArray[np.int64] | None = None) -> None:
        """A step begins; of one before that did not end, nothing stays.

        Args:
            step: its requests and tokens.
            positions: [requests] int64, the place in its request of each one's first token: what the engine has
                computed of it before. With it, recomputed prompts and rejected drafts are recognised wherever they
                begin; without it, where a prompt follows decode.
        """
        if self.is_full:
            return
        layer_count = self._shape[0]
        self._step = step, positions
        self._topk, self._weights, self._ahead = [None] * layer_count, [None] * layer_count, [None] * layer_count
        self._missing = set(range(layer_count))

    def observe(
        self,
        layer_id: int,
        expert_ids: _Ids,
        weights: npt.NDArray[np.floating] | None = None,
        ahead: _Ids | None = None,
    ) -> None:
        """A layer of the step. The arrays are copied.

        Args:
            layer_id: its place among the MoE layers, from 0 on.
            expert_ids: [tokens, k] integer, the router's choice.
            weights: [tokens, k] float, the router's weights.
            ahead: [tokens, k] integer, what the gate of the next layer makes of this layer's input; ignored for the
                last layer.
        """
        if self._step is None:
            return
        token_count = len(self._step[0].rows)
        assert expert_ids.shape == (token_count, self._shape[1])
        self._topk[layer_id] = expert_ids.astype(np.uint16)
        self._weights[layer_id] = None if weights is None else weights.astype(np.float16)
        if layer_id + 1 < self._shape[0]:
            self._ahead[layer_id + 1] = None if ahead is None else ahead.astype(np.uint16)
        self._missing.discard(layer_id)
        if not self._missing:
            self._keep(*self._step)
            self._step = None

    def finish(self, request_id: str) -> None:
        """A request has ended: another one of its name is a new one."""
        self._open.pop(request_id, None)

    def trace(self) -> RoutingTrace:
        """What has been recorded up to now, in the order in which the requests came."""
        requests = [request for request in self._requests if request.positions]
        lengths = [len(request.positions) for request in requests]
        meta = {**self._meta, "recording": "ended early, for want of memory"} if self.is_full else self._meta
        lookahead = None
        if self._has_ahead and self._is_ahead_seen:
            lookahead = self._array([request.ahead for request in requests], self._dtype)
        return RoutingTrace(
            topk=self._array([request.topk for request in requests], self._dtype),
            weights=self._array([request.weights for request in requests], np.float16) if self._has_weights else None,
            lookahead=lookahead,
            req=np.cumsum([0, *lengths]),
            prefill=np.array([request.prefill_count for request in requests], np.int32),
            token_ids=np.concatenate([np.empty(0, np.int32), *(request.token_ids for request in requests)]),
            layer_ids=self._layer_ids,
            meta=meta,
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write what has been recorded up to now, requests that have not ended included.

        Raises:
            MoeOffloadError: there is no writing to that path, or the disk is full; the recording goes on.
        """
        self.trace().save(path)

    def _keep(self, step: Step, positions: npt.NDArray[np.int64] | None) -> None:
        """Give each request its rows of a step that has ended."""
        topk = np.stack([layer for layer in self._topk if layer is not None], axis=1)
        assert not topk.size or topk.max() < self._meta["num_experts"], "the router chose an expert that is not there"
        topk = topk.astype(self._dtype)
        weights, ahead = self._all_weights(), self._all_ahead(topk, bool(step.is_prompt.all()))
        bounds = np.searchsorted(step.rows, np.arange(len(step.request_ids) + 1)).tolist()
        token_bytes = sum(array[0].nbytes for array in (topk, weights, ahead) if array is not None and len(array)) + 12
        if self.byte_count + token_bytes * len(topk) > self._bytes_max:
            self._stop()
            return
        for row, request_id in enumerate(step.request_ids):
            start, stop = bounds[row], bounds[row + 1]
            if (request := self._open.get(request_id)) is None:
                request = self._open[request_id] = _Request()
                self._requests.append(request)
            before = len(request.positions)
            is_prompt = bool(step.is_prompt[row])
            place, known = request.place(stop - start, is_prompt, None if positions is None else int(positions[row]))
            new = slice(start + known, stop)
            request.add(place + known, step.token_ids[new], is_prompt)
            request.topk += topk[new].tobytes()
            if weights is not None:
                request.weights += weights[new].tobytes()
            if ahead is not None:
                request.ahead += ahead[new].tobytes()
            self.byte_count += token_bytes * (len(request.positions) - before)

    def _all_weights(self) -> npt.NDArray[Any] | None:
        """[tokens, layers, k], or None from the first step on that has none."""
        layers = [layer for layer in self._weights if layer is not None]
        self._has_weights &= len(layers) == self._shape[0]
        return np.stack(layers, axis=1) if self._has_weights else None

    def _all_ahead(self, topk: npt.NDArray[Any], is_prompt: bool) -> npt.NDArray[Any] | None:
        """The same for what gates said early. The first layer's own choice stands where nobody can say it early."""
        layers = [layer for layer in self._ahead if layer is not None]
        if not layers and is_prompt:
            return topk if self._has_ahead else None
        self._has_ahead &= len(layers) == self._shape[0] - 1
        self._is_ahead_seen |= bool(layers)
        return np.stack([topk[:, 0], *layers], axis=1).astype(self._dtype) if self._has_ahead else None

    def _array(self, buffers: Sequence[bytearray], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        return np.frombuffer(b"".join(buffers), dtype).reshape(-1, *self._shape)

    def _stop(self) -> None:
        self.is_full = True
        logger.warning(
            "MoE offload: the routing trace records no more, it would take more than %s; what it has is saved",
            format_bytes(self._bytes_max),
        )
