"""From what a layer has shown to fetches for the next ones: forecast, leads, orders. The engine's sidecar and the
simulator run it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vllm_moecxl.control.layer_order import LayerOrder
from vllm_moecxl.control.prediction.base import Observation, Step, Target
from vllm_moecxl.control.prediction.forecast import Forecast
from vllm_moecxl.control.prefetch import LayerView, PrefetchPlanner, Timing
from vllm_moecxl.control.trial import Trial

#: Weight of the latest observation in what is believed of the time between two layers.
_LEARNING_RATE = 0.1
#: Longer than this, the engine had nothing to do in between.
_PAUSE_S = 0.5
#: Requests whose end gives up what is on its way for them. Fetches of larger batches are nearly always wanted by the
#: others too, and not worth the book-keeping.
_WANTER_COUNT_MAX = 8


class Slots(Protocol):
    """The slots of a layer, as far as prefetching needs them."""

    @property
    def slot_count(self) -> int:
        """Slots that a forward of the layer finds its experts in."""

    def view(self) -> LayerView:
        """What is here, for whoever plans prefetches."""

    def prefetch(
        self,
        expert_ids: Collection[int],
        deadline: float,
        wanters: Collection[str] = (),
        keep: npt.NDArray[np.bool_] | None = None,
    ) -> int:
        """Begin to fetch experts that a later forward may need."""

    def drop_prefetches(self, needed: Collection[int]) -> None:
        """The layer has been visited: stop bringing what was expected there and is not needed."""


class Prefetching:
    """What is predicted, and who says what is worth fetching. Not thread-safe.

    Args:
        slots: by layer; None where a layer has none to fetch into.
        order: gives fetches their deadlines.
        queue_s: (layer) -> seconds until its links have done what is queued.
        fetch_s: by layer, seconds that a slab takes.
        forget_wanter: told of each request that has ended, after the last fetch that was begun for it.
    """

    def __init__(
        self,
        forecast: Forecast,
        planner: PrefetchPlanner,
        slots: Sequence[Slots | None],
        order: LayerOrder,
        queue_s: Callable[[int], float],
        fetch_s: Sequence[float],
        forget_wanter: Callable[[str], object] = lambda request_id: None,
    ) -> None:
        self.forecast = forecast
        self.planner = planner
        self._slots = slots
        self._order = order
        self._queue_s = queue_s
        self._fetch_s = fetch_s
        self._forget_wanter = forget_wanter
        self.trial = Trial()
        self._step: Step | None = None
        self._step_before: Step | None = None
        #: By layer, seconds from the layer before it; of the first one, from the last layer of the step before.
        self._until_s = [0.0] * len(slots)
        #: Seconds from the beginning of a step to its first layer.
        self._head_s = 0.0
        self._seen: tuple[int, float] | None = None
        self._begun_s = 0.0

    def begin(self, step: Step | None, time_s: float) -> Sequence[Target]:
        """A step begins; what may be fetched for now."""
        self._try(step, time_s)
        self._step, self._begun_s = step, time_s
        return self.forecast.begin(step) if step is not None and self.is_on else ()

    def observe(self, seen: Observation, time_s: float) -> Sequence[Target]:
        """A layer of the step; what may be fetched for now."""
        self._learn_times(seen.layer_id, time_s)
        if self._step is None or not self.is_on:
            return ()
        needed = np.zeros(self.forecast.scores.shape[1], dtype=np.bool_)
        needed[seen.expert_ids] = True
        self.planner.judge(seen.layer_id, needed)
        if (slots := self._slots[seen.layer_id]) is not None:
            slots.drop_prefetches(np.flatnonzero(needed).tolist())
        return self.forecast.observe(seen)

    def fetch(self, targets: Sequence[Target], now_s: float) -> None:
        """Begin to fetch what is worth it."""
        assert self._step is not None
        request_ids = self._step.request_ids
        for target in targets:
            slots, scores = self._slots[target.layer_id], self.forecast.scores[target.layer_id]
            if slots is None:
                continue
            # More than fits goes through the layer buffer, which is brought ahead as a whole. One token always fits.
            if len(request_ids) > 1 and scores.sum() > slots.slot_count:
                continue
            timing = Timing(self._lead_s(target, now_s), self._fetch_s[target.layer_id], self._queue_s(target.layer_id))
            order = self.planner.plan(target.layer_id, target.distance, scores, slots.view(), timing)
            if order is not None:
                self.trial.use()
                wanters = request_ids if len(request_ids) <= _WANTER_COUNT_MAX else ()
                slots.prefetch(order.expert_ids, self._order.next_position(target.layer_id), wanters, order.keep)

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self.forecast.forget(request_id)
        self._forget_wanter(request_id)

    def rest(self) -> None:
        """Nothing is going on: what is on its way is for nobody any more."""
        for slots in self._slots:
            if slots is not None:
                slots.drop_prefetches(())

    @property
    def is_on(self) -> bool:
        """Whether it is worth its time at present: if not, nothing is even predicted."""
        return self.trial.is_on

    def _try(self, step: Step | None, time_s: float) -> None:
        """Hold the time of the step that has ended against those without, or with, prefetching."""
        before, self._step_before = self._step_before, step
        if before is None or step is None or before.is_prompt.any() or step.is_prompt.any():
            return
        if 0 < (duration_s := time_s - self._begun_s) < _PAUSE_S:
            self.trial.observe(len(before.rows), duration_s)

    def _learn_times(self, seen_layer_id: int, time_s: float) -> None:
        if seen_layer_id == 0 and self._begun_s:
            head_s = min(max(time_s - self._begun_s, 0.0), _PAUSE_S)
            self._head_s += _LEARNING_RATE * (head_s - self._head_s)
        if self._seen is not None:
            layer_id, before_s = self._seen
            if (layer_id + 1) % len(self._slots) == seen_layer_id and 0 <= time_s - before_s < _PAUSE_S:
                known_s = self._until_s[seen_layer_id]
                rate = _LEARNING_RATE if known_s else 1.0
                self._until_s[seen_layer_id] += rate * (time_s - before_s - known_s)
        self._seen = seen_layer_id, time_s

    def _lead_s(self, target: Target, now_s: float) -> float:
        """Seconds until the forward comes to a target."""
        first = target.layer_id - target.distance + 1
        if not target.is_next_step and first <= 0:  # of a step whose first layer is to come
            return self._head_s + sum(self._until_s[1 : target.layer_id + 1]) - (now_s - self._begun_s)
        since_s = now_s - self._seen[1] if self._seen is not None else 0.0
        layer_count = len(self._slots)
        return sum(self._until_s[layer_id % layer_count] for layer_id in range(first, target.layer_id + 1)) - since_s
