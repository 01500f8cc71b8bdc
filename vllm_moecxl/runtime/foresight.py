"""What is made of the routing that forwards leave behind: a trace, a forecast, prefetches."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vllm_moecxl.control.prediction.base import Observation, Target
from vllm_moecxl.control.prefetching import Prefetching
from vllm_moecxl.control.recorder import TraceRecorder
from vllm_moecxl.errors import MoeOffloadError
from vllm_moecxl.runtime.lookahead import GateLookahead
from vllm_moecxl.runtime.ring import Begun, Ended, RoutingRing, Sighting

logger = logging.getLogger("vllm.moecxl")

#: Nothing seen for this long, a recording is written.
_QUIET_S = 1.0


class Recording:
    """A trace, and where it goes."""

    def __init__(self, recorder: TraceRecorder, path: Path) -> None:
        self.recorder = recorder
        self._path = path
        self._saved_bytes = 0

    def save(self) -> None:
        """Write what is new; a path or disk that fails is reported, and serving goes on."""
        if self.recorder.byte_count == self._saved_bytes:
            return
        self._saved_bytes = self.recorder.byte_count
        try:
            self.recorder.save(self._path)
        except MoeOffloadError as error:
            logger.error("MoE offload: %s", error)


class Foresight:
    """See the module. Any thread may `drain`; one at a time does.

    Args:
        ring: where forwards write.
        expert_count: experts of each layer.
        recording: None where nothing is to be recorded.
        prefetching: None where nothing is to be predicted.
        lookahead: gates to apply early to inputs that come without; None where there are none.
        clock: seconds, the ring's.
    """

    def __init__(
        self,
        ring: RoutingRing,
        expert_count: int,
        recording: Recording | None,
        prefetching: Prefetching | None,
        lookahead: GateLookahead | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.ring = ring
        self.prefetching = prefetching
        self._expert_count = expert_count
        self._recording = recording
        self._lookahead = lookahead
        self._clock = clock
        self._lock = threading.Lock()
        #: What `wait` took from the ring.
        self._waiting: deque[Begun | Sighting | Ended] = deque()
        #: Of the step under way; None where nobody could say what is in it.
        self._token_count: int | None = None
        self._latest_s = clock()

    def wait(self, period_s: float) -> None:
        """Return once something was seen, or the time is over."""
        if (entry := self.ring.take(period_s)) is not None:
            self._waiting.append(entry)

    def drain(self) -> None:
        """Take in all that was seen, then fetch for what comes next."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            targets: Sequence[Target] = ()
            while (entry := self._waiting.popleft() if self._waiting else self.ring.take()) is not None:
                self._latest_s = self._clock()
                targets = self._take(entry)
            if targets and self.prefetching is not None:
                self.prefetching.fetch(targets, self._clock())
            if self._recording is not None and self._clock() - self._latest_s > _QUIET_S:
                self._recording.save()
        finally:
            self._lock.release()

    def close(self) -> None:
        """Write what is left of the recording."""
        self.drain()
        if self._recording is not None:
            with self._lock:
                self._recording.save()

    def _take(self, entry: Begun | Sighting | Ended) -> Sequence[Target]:
        recorder = self._recording.recorder if self._recording is not None else None
        match entry:
            case Begun(step, positions, time_s):
                self._token_count = None if step is None else len(step.rows)
                if recorder is not None and step is not None:
                    recorder.begin(step, positions)
                if self.prefetching is None:
                    return ()
                targets = self.prefetching.begin(step, time_s)
                self.ring.is_wanted = self.prefetching.is_on or recorder is not None
                return targets
            case Sighting():
                # Fewer rows than tokens: some went elsewhere, and nobody knows which are which. An expert that the
                # layer does not have fails its forward, and is nothing to learn from.
                if (
                    self._token_count is None
                    or len(entry.expert_ids) < self._token_count
                    or entry.expert_ids.max() >= self._expert_count
                ):
                    return ()
                seen = self._complete(entry, self._token_count)
                if recorder is not None:
                    recorder.observe(seen.layer_id, seen.expert_ids, seen.weights, _choice(seen))
                if self.prefetching is None:
                    return ()
                observation = Observation(
                    seen.layer_id, seen.expert_ids.astype(np.int64), seen.weights, seen.ahead, seen.hidden
                )
                return self.prefetching.observe(observation, seen.time_s)
            case Ended(request_ids):
                for request_id in request_ids:
                    if recorder is not None:
                        recorder.finish(request_id)
                    if self.prefetching is not None:
                        self.prefetching.forecast.forget(request_id)
                return ()

    def _complete(self, seen: Sighting, token_count: int) -> Sighting:
        """Without the rows that an engine pads a step with, and with what the next gates make of it."""
        if len(seen.expert_ids) > token_count:
            seen = Sighting(
                seen.layer_id,
                seen.time_s,
                seen.expert_ids[:token_count],
                None if seen.weights is None else seen.weights[:token_count],
                None if seen.hidden is None else seen.hidden[:token_count],
                None if seen.ahead is None else seen.ahead[:, :token_count],
            )
        if seen.ahead is None and seen.hidden is not None and self._lookahead is not None:
            seen = seen._replace(ahead=self._lookahead.on_host(seen.layer_id, seen.hidden))
        return seen


def _choice(seen: Sighting) -> npt.NDArray[np.integer] | None:
    """[tokens, k] what the next layer's gate would choose from this layer's input, if that is known."""
    if seen.ahead is None:
        return None
    topk = seen.expert_ids.shape[1]
    return np.argsort(-seen.ahead[0], axis=1, kind="stable")[:, :topk]
