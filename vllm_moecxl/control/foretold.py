"""What prefetching makes of a routing trace: forecast, planner, slots and eviction as in the engine, but no time.

Decode at batch 1. What is ordered arrives before the next visit, however near that is. What a forecast says does not
depend on the slots, so that it is made once and replayed against many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_moecxl.control.prediction.base import Observation, Predictor, Step
from vllm_moecxl.control.prediction.forecast import Forecast
from vllm_moecxl.control.prefetch import LayerView, Mask, PrefetchPlanner, Scores, Timing
from vllm_moecxl.control.replay import MakePolicy
from vllm_moecxl.control.residency import Residency
from vllm_moecxl.control.simulator.replay import Replay
from vllm_moecxl.control.trace import RoutingTrace

#: Layers ahead that are predicted, as `Forecast` does.
REACH = 2
#: Whatever is ordered arrives in time, one thing as well as many.
_IN_TIME = Timing(lead_s=float("inf"), fetch_s=1.0, queue_s=0.0)


@dataclass(frozen=True)
class Foretold:
    """What was said of the coming visits while a trace was decoded, and what came.

    Attributes:
        expert_ids: [steps, layers, k] uint32, what each visit used.
        scores: [steps, layers + 1, reach, experts] float32: before the first layer of a step and after each of its
            layers, the probabilities for the next visits, nearest first.
    """

    expert_ids: npt.NDArray[np.uint32]
    scores: npt.NDArray[np.float32]

    def recall(self, from_step: int) -> float:
        """Share of a layer's experts that are among the k likeliest, by what the layer before it has shown."""
        used = self.expert_ids[from_step:, 1:]
        scores = self.scores[from_step:, 1:-1, 0]
        k = used.shape[2]
        picks = np.argpartition(scores, -k, axis=2)[:, :, -k:]
        return float((picks[..., None] == used[:, :, None]).any(3).mean()) if used.size else 0.0


@dataclass
class Outcome:
    """What slots and prefetches made of it, counted in slabs.

    Attributes:
        lookup_count: experts that visits asked for.
        demand_count: those that were not there.
        issued_count: prefetches.
        useful_count: of them, those that a visit used.
        wasted_count: those that were evicted before. Others are still waiting.
    """

    lookup_count: int = 0
    demand_count: int = 0
    issued_count: int = 0
    useful_count: int = 0
    wasted_count: int = 0

    @property
    def precision(self) -> float | None:
        """Share of the prefetches that were good for something; None without any."""
        known_count = self.useful_count + self.wasted_count
        return self.useful_count / known_count if known_count else None


def foretell(trace: RoutingTrace, predictors: Mapping[str, Predictor]) -> Foretold:
    """Decode a trace, one request after another, and note what the forecast says; prompts are learned from."""
    forecast = Forecast(trace.layer_count, trace.expert_count, trace.topk_count, predictors, reach=REACH)
    foretold = _nothing_foretold(trace)
    replay = Replay(trace, batch_size=1)
    step_index = 0
    for batch in replay.batches():
        is_decode = not batch.step.is_prompt.any()
        targets = forecast.begin(batch.step)
        for layer_id in range(-1, trace.layer_count):
            if layer_id >= 0:
                targets = forecast.observe(_observation(trace, batch.tokens, batch.step, layer_id))
            if is_decode:
                for target in targets:
                    said = foretold.scores[step_index, layer_id + 1, target.distance - 1]
                    said[:] = forecast.scores[target.layer_id]
        step_index += is_decode
        for request in replay.finish(batch, 0.0, 0.0):
            forecast.forget(request.id)
    return foretold


def foreseen(trace: RoutingTrace) -> Foretold:
    """What one who has read the trace says: the next visit of the layers within reach."""
    foretold = _nothing_foretold(trace)
    step_count, layer_count = foretold.expert_ids.shape[:2]
    visits = np.zeros((step_count * layer_count + REACH, trace.expert_count), np.float32)
    rows = foretold.expert_ids.reshape(step_count * layer_count, -1)
    np.put_along_axis(visits[: len(rows)], rows.astype(np.int64), 1.0, axis=1)
    first_visits = np.arange(step_count)[:, None] * layer_count + np.arange(layer_count + 1)
    for distance in range(1, REACH + 1):
        foretold.scores[:, :, distance - 1] = visits[first_visits + distance - 1]
    return foretold


def replay_foretold(
    foretold: Foretold,
    slot_count: int,
    make_policy: MakePolicy,
    planner: PrefetchPlanner | None,
    *,
    from_step: int = 0,
    reach: int = REACH,
) -> Outcome:
    """Replay all layers of what was foretold; slots are empty at first and never emptied.

    Args:
        planner: says what of it is fetched; None for demand fetches only.
        from_step: what went before is not counted.
        reach: how far ahead what was said is listened to.
    """
    step_count, layer_count = foretold.expert_ids.shape[:2]
    expert_count = foretold.scores.shape[3]
    layers = [
        _Layer(Residency(expert_count, slot_count, make_policy(slot_count, expert_count, layer_id)))
        for layer_id in range(layer_count)
    ]
    total = Outcome()
    for step_index in range(step_count):
        if step_index == from_step:
            total = Outcome()
        for layer_id in range(-1, layer_count):
            if layer_id >= 0:
                expert_ids = foretold.expert_ids[step_index, layer_id]
                if planner is not None:
                    planner.judge(layer_id, _mask(expert_ids, expert_count))
                layers[layer_id].visit(expert_ids, total)
            if planner is None:
                continue
            for distance in range(1, reach + 1):
                target_id = (layer_id + distance) % layer_count
                scores = foretold.scores[step_index, layer_id + 1, distance - 1]
                layers[target_id].prefetch(planner, target_id, distance, scores, total)
    return total


class _Layer:
    """The slots of one layer, where every fetch arrives at once."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._nothing = np.zeros(residency.expert_count, dtype=np.bool_)
        #: Experts that were prefetched and not asked for since.
        self._expected: set[int] = set()

    def visit(self, expert_ids: npt.NDArray[np.uint32], total: Outcome) -> None:
        """Serve one visit."""
        residency = self._residency
        total.lookup_count += expert_ids.size
        lease = residency.visit(expert_ids)
        if self._expected:
            met = self._expected.intersection(expert_ids.tolist())
            total.useful_count += len(met)
            self._expected -= met
        if lease is None:
            missing = expert_ids[~residency.resident_mask()[expert_ids]]
            total.demand_count += missing.size
            self._fetch(missing.tolist(), _mask(expert_ids, residency.expert_count), total, is_urgent=True)
            lease = residency.lease(expert_ids)
            assert lease is not None
        residency.release(lease)

    def prefetch(self, planner: PrefetchPlanner, layer_id: int, distance: int, scores: Scores, total: Outcome) -> None:
        """Fetch what is worth it."""
        resident = self._residency.resident_mask()
        slot_count = self._residency.slot_count
        free_count = slot_count - int(np.count_nonzero(resident))
        view = LayerView(resident, self._nothing, free_count, slot_count)
        order = planner.plan(layer_id, distance, scores, view, _IN_TIME)
        if order is not None:
            fetched = self._fetch(order.expert_ids, order.keep, total, is_urgent=False)
            total.issued_count += len(fetched)
            self._expected.update(fetched)

    def _fetch(self, expert_ids: Sequence[int], keep: Mask, total: Outcome, *, is_urgent: bool) -> list[int]:
        fetched = []
        for expert_id in expert_ids:
            slot_id = self._residency.begin_fill(expert_id, keep, is_urgent=is_urgent)
            if slot_id is None:
                break
            self._residency.complete_fill(slot_id)
            fetched.append(expert_id)
        if fetched and self._expected:
            resident = self._residency.resident_mask()
            gone = {expert_id for expert_id in self._expected if not resident[expert_id]}
            total.wasted_count += len(gone)
            self._expected -= gone
        return fetched


def _nothing_foretold(trace: RoutingTrace) -> Foretold:
    expert_ids = trace.topk[trace.decode_mask()].astype(np.uint32)
    shape = (len(expert_ids), trace.layer_count + 1, REACH, trace.expert_count)
    return Foretold(expert_ids, np.zeros(shape, np.float32))


def _observation(trace: RoutingTrace, tokens: npt.NDArray[np.int64], step: Step, layer_id: int) -> Observation:
    weights = None if trace.weights is None else trace.weights[tokens, layer_id].astype(np.float32)
    return Observation(
        layer_id, trace.topk[tokens, layer_id].astype(np.int64), weights, _ahead(trace, tokens, layer_id)
    )


def _ahead(trace: RoutingTrace, tokens: npt.NDArray[np.int64], layer_id: int) -> npt.NDArray[np.float32] | None:
    """[1, tokens, experts] float32, what the next layer's gate makes of this layer's input; the trace has its ranks."""
    if trace.lookahead is None or layer_id + 1 == trace.layer_count:
        return None
    chosen = trace.lookahead[tokens, layer_id + 1].astype(np.int64)
    scores = np.zeros((1, len(chosen), trace.expert_count), np.float32)
    np.put_along_axis(scores[0], chosen, np.arange(trace.topk_count, 0, -1, dtype=np.float32)[None], axis=1)
    return scores


def _mask(expert_ids: npt.NDArray[np.uint32], expert_count: int) -> npt.NDArray[np.bool_]:
    mask = np.zeros(expert_count, dtype=np.bool_)
    mask[expert_ids] = True
    return mask
