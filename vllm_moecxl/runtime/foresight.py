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

from vllm_moecxl.control.layer_order import LayerOrder
from vllm_moecxl.control.prediction.base import Observation, Step, Target
from vllm_moecxl.control.prediction.forecast import Forecast
from vllm_moecxl.control.prefetch import PrefetchPlanner, Timing
from vllm_moecxl.control.recorder import TraceRecorder
from vllm_moecxl.errors import MoeOffloadError
from vllm_moecxl.runtime.lookahead import GateLookahead
from vllm_moecxl.runtime.ring import Begun, Ended, RoutingRing, Sighting
from vllm_moecxl.runtime.slots import SlotCache

logger = logging.getLogger("vllm.moecxl")

#: Weight of the latest observation in what is believed of the time between two layers.
_LEARNING_RATE = 0.1
#: Longer than this, the engine had nothing to do in between.
_PAUSE_S = 0.5
#: Nothing seen for this long, a recording is written.
_QUIET_S = 1.0
#: Requests whose end gives up what is on its way for them. Fetches of larger batches are nearly always wanted by the
#: others too, and not worth the book-keeping.
_WANTER_COUNT_MAX = 8


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


class Prefetching:
    """What is predicted, and who says what is worth fetching.

    Args:
        slots: by layer; None where a layer has none to fetch into.
        order: gives fetches their deadlines.
        queue_s: (layer) -> seconds until its links have done what is queued.
        fetch_s: by layer, seconds that a slab takes.
    """

    def __init__(
        self,
        forecast: Forecast,
        planner: PrefetchPlanner,
        slots: Sequence[SlotCache | None],
        order: LayerOrder,
        queue_s: Callable[[int], float],
        fetch_s: Sequence[float],
    ) -> None:
        self.forecast = forecast
        self.planner = planner
        self._slots = slots
        self._order = order
        self._queue_s = queue_s
        self._fetch_s = fetch_s
        self._step: Step | None = None
        #: By layer, seconds from the layer before it; of the first one, from the last layer of the step before.
        self._until_s = np.zeros(len(slots))
        #: Seconds from the beginning of a step to its first layer.
        self._head_s = 0.0
        self._seen: tuple[int, float] | None = None
        self._begun_s = 0.0

    def begin(self, step: Step | None, time_s: float) -> tuple[Target, ...]:
        """A step begins; what may be fetched for now."""
        self._step, self._begun_s = step, time_s
        return self.forecast.begin(step) if step is not None else ()

    def observe(self, seen: Sighting) -> tuple[Target, ...]:
        """A layer of the step; what may be fetched for now."""
        self._learn_times(seen)
        if self._step is None:
            return ()
        expert_ids = seen.expert_ids.astype(np.int64)
        needed = np.zeros(self.forecast.scores.shape[1], dtype=np.bool_)
        needed[expert_ids] = True
        self.planner.judge(seen.layer_id, needed)
        if (slots := self._slots[seen.layer_id]) is not None:
            slots.drop_prefetches(np.flatnonzero(needed).tolist())
        return self.forecast.observe(Observation(seen.layer_id, expert_ids, seen.weights, seen.ahead, seen.hidden))

    def fetch(self, targets: Sequence[Target], now_s: float) -> None:
        """Begin to fetch what is worth it."""
        assert self._step is not None
        request_ids = self._step.request_ids
        for target in targets:
            slots, scores = self._slots[target.layer_id], self.forecast.scores[target.layer_id]
            if slots is None:
                continue
            # More than fits goes through the layer buffer, which is brought ahead as a whole. One token always fits.
            if len(request_ids) > 1 and scores.sum() > slots.residency.slot_count:
                continue
            timing = Timing(self._lead_s(target, now_s), self._fetch_s[target.layer_id], self._queue_s(target.layer_id))
            order = self.planner.plan(target.layer_id, target.distance, scores, slots.view(), timing)
            if order is not None:
                wanters = request_ids if len(request_ids) <= _WANTER_COUNT_MAX else ()
                slots.prefetch(order.expert_ids, self._order.next_position(target.layer_id), wanters, order.keep)

    def _learn_times(self, seen: Sighting) -> None:
        if seen.layer_id == 0 and self._begun_s:
            self._head_s += _LEARNING_RATE * (min(seen.time_s - self._begun_s, _PAUSE_S) - self._head_s)
        if self._seen is not None:
            layer_id, time_s = self._seen
            if (layer_id + 1) % len(self._slots) == seen.layer_id and seen.time_s - time_s < _PAUSE_S:
                known_s = self._until_s[seen.layer_id]
                rate = _LEARNING_RATE if known_s else 1.0
                self._until_s[seen.layer_id] += rate * (seen.time_s - time_s - known_s)
        self._seen = seen.layer_id, seen.time_s

    def _lead_s(self, target: Target, now_s: float) -> float:
        """Seconds until the forward comes to a target."""
        layer_ids = np.arange(target.layer_id - target.distance + 1, target.layer_id + 1) % len(self._slots)
        if not target.is_next_step and target.layer_id - target.distance < 0:  # of a step whose first layer is to come
            return float(self._head_s + self._until_s[layer_ids[layer_ids > 0]].sum() - (now_s - self._begun_s))
        since_s = now_s - self._seen[1] if self._seen is not None else 0.0
        return float(self._until_s[layer_ids].sum() - since_s)


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
            targets: tuple[Target, ...] = ()
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

    def _take(self, entry: Begun | Sighting | Ended) -> tuple[Target, ...]:
        recorder = self._recording.recorder if self._recording is not None else None
        match entry:
            case Begun(step, positions, time_s):
                self._token_count = None if step is None else len(step.rows)
                if recorder is not None and step is not None:
                    recorder.begin(step, positions)
                return self.prefetching.begin(step, time_s) if self.prefetching is not None else ()
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
                return self.prefetching.observe(seen) if self.prefetching is not None else ()
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
