"""Temporal reuse: what a request used lately, what it uses at all, and what everybody uses."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_moecxl.control.prediction.base import Observation, Probabilities, Step, Target
from vllm_moecxl.control.prediction.requests import Backlog, PerRequest, last_token_of
from vllm_moecxl.control.prediction.states import StateRates

#: Tokens that a history remembers, one bit each.
HISTORY_BITS = 8
#: Bounds between levels of how often a request uses an expert, as multiples of the base rate; only levels are chosen
#: here, what each is worth is learned.
LEVELS = (0.5, 1.0, 1.5, 2.0, 3.0)
#: Weight, in tokens, of everybody's habits in those of a request.
PRIOR_COUNT = 8.0
#: Tokens after which everybody's habits are mostly renewed.
WINDOW_COUNT = 2048.0
#: Most tokens of a prompt that count for a request's habits, evenly spread.
TOKEN_COUNT_MAX = 1024


class Temporal:
    """The last tokens of a request and its habits say whether it uses an expert again.

    An expert's state is a history of eight bits (used or not, by token) and how often the request has used it since it
    began, its prompt included and drawn towards what all requests do. The probability of each state is learned, so
    that no decay has to be chosen. It knows as much of the next step as of this one. All layers of a step are learned
    from and predicted at once.
    """

    def __init__(self, layer_count: int, expert_count: int, topk: int) -> None:
        self._base_rate = topk / expert_count
        self._levels = np.array(LEVELS, np.float32) * np.float32(self._base_rate)
        self._states = StateRates(np.full((len(LEVELS) + 1) << HISTORY_BITS, self._base_rate))
        self._histories = PerRequest((layer_count, expert_count), np.uint8)
        self._use_counts = PerRequest((layer_count, expert_count))
        self._token_counts = PerRequest((layer_count, 1))
        #: [layers, experts] float32, share of all requests' tokens that use each expert.
        self._popularity = np.full((layer_count, expert_count), self._base_rate, np.float32)
        self._seen_count = PRIOR_COUNT
        self._backlog = Backlog()
        self._step: Step | None = None
        self._is_narrow = False
        self._rows = np.empty(0, np.int64)
        #: [requests, layers, experts] int64 and float32: states as of the latest flush, and their probabilities; None
        #: unless somebody asks.
        self._current: npt.NDArray[np.int64] | None = None
        self._probabilities: Probabilities | None = None
        self._is_asked = False

    def begin(self, step: Step) -> None:
        self._flush()
        if not self._is_asked or self._step is None or step.request_ids != self._step.request_ids:
            self._current = None
        self._is_asked = False
        self._step = step
        self._is_narrow = len(step.rows) == len(step.request_ids)
        self._rows = self._histories.rows(step.request_ids)
        for table in (self._use_counts, self._token_counts):
            assert np.array_equal(self._rows, table.rows(step.request_ids))

    def observe(self, seen: Observation) -> None:
        if self._is_narrow:
            self._backlog.add(seen)
        else:
            self._learn_wide(seen)

    def predict(self, target: Target) -> Probabilities | None:
        self._is_asked = True
        if target.is_next_step:
            self._flush()
        if self._current is None:
            shape = (len(self._rows), *self._popularity.shape)
            self._current, self._probabilities = np.empty(shape, np.int64), np.empty(shape, np.float32)
            self._renew(slice(0, shape[1]))
        assert self._probabilities is not None
        return self._probabilities[:, target.layer_id]

    def forget(self, request_id: str) -> None:
        self._flush()
        self._step = None
        for table in (self._histories, self._use_counts, self._token_counts):
            table.forget(request_id)

    def _flush(self) -> None:
        """Learn from what has been seen of a step with one token of each request, and say what follows from it."""
        taken = self._backlog.take()
        if taken is None or self._step is None:
            return
        layers, by_layer = taken
        expert_ids = by_layer.transpose(1, 0, 2)  # [requests, layers, k]
        index = (self._rows[:, None, None], np.arange(layers.start, layers.stop)[:, None], expert_ids)
        if self._current is not None:
            current = self._current[:, layers]
            self._states.learn(current, np.take_along_axis(current, expert_ids, 2))
        self._histories.values[self._rows, layers] <<= 1
        self._histories.values[index] |= 1
        self._use_counts.values[index] += 1
        self._token_counts.values[self._rows, layers] += 1
        self._learn_popularity(layers, index[1:], len(expert_ids))
        if self._current is not None:
            self._renew(layers)

    def _learn_wide(self, seen: Observation) -> None:
        """A layer of a step with several tokens of a request; only the last eight of each remain in its history."""
        assert self._step is not None
        layer_id = np.array(seen.layer_id)
        self._current = None
        last = last_token_of(self._step)
        histories = self._histories.values
        for back in range(HISTORY_BITS - 1, -1, -1):
            tokens = last - back
            is_own = (tokens >= 0) & (self._step.rows[np.maximum(tokens, 0)] == np.arange(len(tokens)))
            rows, tokens = self._rows[is_own], tokens[is_own]
            histories[rows, layer_id] <<= 1
            histories[rows[:, None], layer_id, seen.expert_ids[tokens]] |= 1
        sample = slice(None, None, 1 + len(seen.expert_ids) // TOKEN_COUNT_MAX)
        rows, expert_ids = self._rows[self._step.rows[sample]], seen.expert_ids[sample]
        np.add.at(self._use_counts.values, (rows[:, None], layer_id, expert_ids), np.float32(1))
        np.add.at(self._token_counts.values, (rows, layer_id, np.array(0)), np.float32(1))
        self._learn_popularity(slice(seen.layer_id, seen.layer_id + 1), (layer_id, expert_ids), len(rows))

    def _learn_popularity(
        self, layers: slice, index: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]], token_count: int
    ) -> None:
        """Some layers of a step; `index` is of the used ones in `_popularity`."""
        layer_share = (layers.stop - layers.start) / len(self._popularity)
        self._seen_count = min(self._seen_count + token_count * layer_share, WINDOW_COUNT)
        # The latest tokens count for their share of the window, and for more while it is filling.
        share = min(1.0, token_count / self._seen_count)
        self._popularity[layers] *= 1 - share
        np.add.at(self._popularity, index, np.float32(share / token_count))

    def _renew(self, layers: slice) -> None:
        """States and probabilities of some layers."""
        assert self._current is not None and self._probabilities is not None
        rates = self._use_counts.values[self._rows, layers] + np.float32(PRIOR_COUNT) * self._popularity[layers]
        rates /= self._token_counts.values[self._rows, layers] + np.float32(PRIOR_COUNT)
        states = np.searchsorted(self._levels, rates)
        states <<= HISTORY_BITS
        states += self._histories.values[self._rows, layers]
        self._current[:, layers] = states
        self._probabilities[:, layers] = self._states.rates[states]
