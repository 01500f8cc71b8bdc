"""What to fetch before it is asked for: expected time saved against bytes and against what is displaced.

All of it is arithmetic on calibrated probabilities. A fetch that is begun now saves its forward the wait, as far as it
arrives in time; it costs the link its bytes and the slot's present expert its place. What saves more than it costs is
ordered, nearest and surest first. Every pick is judged when its layer is visited, ordered or not: picks that lose are
no longer ordered, and are again once they would have won.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
Scores = npt.NDArray[np.float32]

#: Experts that are less sure than this are not worth their bytes, however idle the link is; and how sure is sure
#: enough, whatever has gone wrong.
PROBABILITY_MIN = 0.4
PROBABILITY_MAX = 0.9
#: Between them, the threshold is moved until this share of the picks is needed by the very next visit.
#: Source: `python -m benchmarks prefetch`, 2026-11-22: the least that leaves no shared trace below 85 % precision.
PRECISION_AIM = 0.85
#: Of a pick, in probability.
_THRESHOLD_STEP = 0.005
#: What is ordered after the next layer has to be able to arrive in this share of the time that is left then, to wait.
_WAIT_SHARE = 0.5
#: A prefetch has to promise this much more than what it displaces, or near equals would chase each other.
_MARGIN = 0.05
#: It has to arrive this much of its own time before it would if it were asked for in time.
_SAVED_SHARE_MIN = 0.5
#: Weight of the latest pick in the precision that is believed, for each distance.
_LEARNING_RATE = 0.02
#: Picks of a distance that are judged in the shadow before they are ordered, or ordered again.
_TRIAL_COUNT = 32
#: Off below this precision, on again above the other.
#: Source: a fetch that is wrong costs about what one that is right saves, where the link has other work.
_PRECISION_OFF = 0.4
_PRECISION_ON = 0.5


class LayerView(NamedTuple):
    """The slots of a layer, as the planner sees them.

    Attributes:
        resident: [experts] bool, in slots.
        pending: [experts] bool, on their way there.
        free_count: slots with nothing in them.
        slot_count: all of them.
    """

    resident: Mask
    pending: Mask
    free_count: int
    slot_count: int


class Timing(NamedTuple):
    """How long things take, in seconds.

    Attributes:
        lead_s: until the layer is visited.
        fetch_s: one slab over an idle link.
        queue_s: until the link has done what goes before a new prefetch.
    """

    lead_s: float
    fetch_s: float
    queue_s: float


@dataclass(frozen=True)
class Order:
    """Experts to fetch into one layer.

    Attributes:
        layer_id: the layer.
        expert_ids: most valuable first.
        keep: [experts] bool, what must not be evicted for them.
    """

    layer_id: int
    expert_ids: Sequence[int]
    keep: Mask


class _Record:
    """How picks of one distance have done.

    Attributes:
        precision: share of them that the visit needed.
        threshold: probability from which on there are picks.
        is_on: whether they are ordered.
    """

    def __init__(self, probability_min: float) -> None:
        self.precision = 0.0
        self.threshold = probability_min
        self._probability_min = probability_min
        self.judged_count = 0
        self.is_on = False

    def judge(self, right_count: int, wrong_count: int) -> None:
        # In balance where the share of right ones is what is aimed at.
        moved = _THRESHOLD_STEP * (PRECISION_AIM * wrong_count - (1 - PRECISION_AIM) * right_count)
        self.threshold = min(max(self.threshold + moved, self._probability_min), PROBABILITY_MAX)
        for count, value in ((right_count, 1.0), (wrong_count, 0.0)):
            for _ in range(count):
                self.judged_count += 1
                # An exact mean to begin with, so that the first picks do not count for ever.
                self.precision += max(_LEARNING_RATE, 1 / self.judged_count) * (value - self.precision)
        if self.is_on:
            self.is_on = self.precision >= _PRECISION_OFF
        else:
            self.is_on = self.judged_count >= _TRIAL_COUNT and self.precision >= _PRECISION_ON


class PrefetchPlanner:
    """See the module. Not thread-safe: the sidecar, or the simulator, owns it.

    Args:
        layer_count: MoE layers.
        probability_min: experts that are less sure are never picked.
    """

    def __init__(self, layer_count: int, *, probability_min: float = PROBABILITY_MIN) -> None:
        self._probability_min = probability_min
        #: By distance.
        self._records: dict[int, _Record] = {}
        #: By layer, what was picked for its next visit: by distance, expert ids.
        self._picks: list[dict[int, npt.NDArray[np.int64]]] = [{} for _ in range(layer_count)]

    def is_on(self, distance: int) -> bool:
        """Whether picks so many layers ahead are ordered."""
        return (record := self._records.get(distance)) is not None and record.is_on

    def precision(self, distance: int) -> float:
        """Share of the latest picks that the visit needed."""
        return self._records[distance].precision if distance in self._records else 0.0

    def plan(self, layer_id: int, distance: int, scores: Scores, view: LayerView, timing: Timing) -> Order | None:
        """What to fetch for a layer's next visit.

        Args:
            layer_id: the layer.
            distance: how many layers ahead it is.
            scores: [experts] float32, probability that the visit needs each.
            view: its slots.
            timing: of the link and of the forward.

        Returns:
            None where nothing is worth its cost, or where picks of this distance have been losing.
        """
        is_candidate = (scores >= self._record(distance).threshold) & ~(view.resident | view.pending)
        absent = np.flatnonzero(is_candidate)
        # Judged whether they are ordered or not: that is how picks that have been losing come back.
        self._picks[layer_id][distance] = absent
        if not absent.size or not self.is_on(distance):
            return None
        absent = absent[np.argsort(-scores[absent], kind="stable")]
        residents = np.flatnonzero(view.resident)
        victims = residents[np.argsort(scores[residents], kind="stable")]
        keep = np.ones(scores.size, dtype=np.bool_)
        chosen: list[int] = []
        for expert_id in absent.tolist():
            arrival_s = timing.queue_s + (len(chosen) + 1) * timing.fetch_s
            if distance > 1 and arrival_s <= _WAIT_SHARE * timing.lead_s * (distance - 1) / distance:
                break  # there is time until more is known
            saved_s = timing.fetch_s - max(arrival_s - timing.lead_s, 0.0)
            if saved_s < _SAVED_SHARE_MIN * timing.fetch_s:
                break  # mostly waited for, whether it is begun now or then; those that follow even more so
            displaced = 0.0
            victim_index = len(chosen) - view.free_count
            if victim_index >= 0:
                if victim_index >= victims.size:
                    break
                displaced = float(scores[victims[victim_index]]) + _MARGIN
            if float(scores[expert_id]) * saved_s <= displaced * timing.fetch_s:
                break  # those that follow are less likely, and later
            if victim_index >= 0:
                keep[victims[victim_index]] = False
            chosen.append(expert_id)
        return Order(layer_id, chosen, keep) if chosen else None

    def judge(self, layer_id: int, needed: Mask) -> None:
        """A layer is visited: say how the picks for it have done.

        Args:
            layer_id: the layer.
            needed: [experts] bool.
        """
        picks = self._picks[layer_id]
        for distance, expert_ids in picks.items():
            if expert_ids.size:
                right_count = int(np.count_nonzero(needed[expert_ids]))
                self._record(distance).judge(right_count, expert_ids.size - right_count)
        picks.clear()

    def _record(self, distance: int) -> _Record:
        return self._records.setdefault(distance, _Record(self._probability_min))
