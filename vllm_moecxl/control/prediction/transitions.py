"""Layer-to-layer tables: which experts follow the ones that this token has just used."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_moecxl.control.prediction.base import Observation, Probabilities, Step, Target
from vllm_moecxl.control.prediction.requests import PerRequest, last_token_of

#: Weight of the base rate, in observations, while an expert has not been seen often.
PRIOR_COUNT = 4.0
#: Most tokens of a step that are learned from, the last ones.
TOKEN_COUNT_MAX = 1024


class Transitions:
    """Counts how often expert b of a layer follows expert a of a layer before, along one token.

    The layers are a ring: before the first layer of a token comes the last one of the request's token before. Only
    distances that were asked for are counted.
    """

    def __init__(self, layer_count: int, expert_count: int, topk: int) -> None:
        self._layer_count = layer_count
        self._expert_count = expert_count
        self._prior = np.float32(PRIOR_COUNT * topk / expert_count)
        #: By distance and target layer: [experts + 1, experts + 1] float32, a row by source, row 0 for "none yet";
        #: a row's last number is how often its source was seen.
        self._tables: dict[tuple[int, int], npt.NDArray[np.float32]] = {}
        #: Chosen experts + 1, 0 where there are none yet.
        self._chosen = PerRequest((layer_count, topk), np.int64)
        self._distances: set[int] = set()
        self._rows = self._last = np.empty(0, np.int64)
        self._seen: dict[int, npt.NDArray[np.int64]] = {}

    def begin(self, step: Step) -> None:
        self._rows = self._chosen.rows(step.request_ids)
        self._last = last_token_of(step)
        self._seen.clear()

    def observe(self, seen: Observation) -> None:
        layer_id, expert_ids = seen.layer_id, seen.expert_ids
        self._seen[layer_id] = expert_ids + 1
        for distance in self._distances:
            source_id = layer_id - distance
            if source_id < 0 and len(expert_ids) == len(self._rows):
                self._learn(distance, layer_id, self._chosen.values[self._rows, source_id], expert_ids)
            elif source_id in self._seen:
                self._learn(distance, layer_id, self._seen[source_id], expert_ids)
        self._chosen.values[self._rows, layer_id] = self._seen[layer_id][self._last]

    def predict(self, target: Target) -> Probabilities | None:
        self._distances.add(target.distance)
        table = self._tables.get((target.distance, target.layer_id))
        if table is None:
            return None
        source_id = (target.layer_id - target.distance) % self._layer_count
        rows = table[self._chosen.values[self._rows, source_id]]
        rates = (rows[..., :-1] + self._prior) / (rows[..., -1:] + np.float32(PRIOR_COUNT))
        probabilities: Probabilities = rates.mean(1)
        return probabilities

    def forget(self, request_id: str) -> None:
        self._chosen.forget(request_id)

    def _learn(
        self, distance: int, layer_id: int, sources: npt.NDArray[np.int64], expert_ids: npt.NDArray[np.int64]
    ) -> None:
        """Count pairs: `sources` [tokens, k], experts + 1, and `expert_ids` [tokens, k] are of the same tokens."""
        width = self._expert_count + 1
        table = self._tables.get((distance, layer_id))
        if table is None:
            table = self._tables[distance, layer_id] = np.zeros((width, width), np.float32)
        starts = sources[-TOKEN_COUNT_MAX:] * width
        counts = table.reshape(-1)
        pairs = starts[:, :, None] + expert_ids[-TOKEN_COUNT_MAX:, None, :]
        np.add.at(counts, pairs.ravel(), np.float32(1))
        np.add.at(counts, (starts + self._expert_count).ravel(), np.float32(1))
