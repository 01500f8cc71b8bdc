"""Token tables: the experts that a token id used the last times it was the input."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_moecxl.control.prediction.base import Observation, Probabilities, Step, Target
from vllm_moecxl.control.prediction.requests import Backlog, last_token_of
from vllm_moecxl.control.prediction.states import StateRates

#: Latest occurrences of a token that are remembered.
OCCURRENCE_COUNT = 6
#: Memory for the table; the token ids that came first make room for new ones.
TABLE_BYTES_MAX = 64 << 20
#: Most rows, however small they are: more token ids than this are rare ones.
ROW_COUNT_MAX = 32768
#: Most tokens of a step that are learned from, the last ones: a longer prompt repeats its frequent tokens anyway.
TOKEN_COUNT_MAX = 1024


class Tokens:
    """Remembers the choices of each token id's latest occurrences, and counts what those are worth.

    An expert's state is how often the token occurred and how many of these used it; the probability of each state is
    learned. The input token is known from the start of a step, so a whole step is predicted at its first moment; the
    next step's is unknown. All layers of a step are learned from at once, when the next one begins.
    """

    def __init__(self, layer_count: int, expert_count: int, topk: int) -> None:
        self._layer_count = layer_count
        self._expert_count = expert_count
        row_bytes = layer_count * OCCURRENCE_COUNT * topk * 2
        self._row_count = min(ROW_COUNT_MAX, max(1024, TABLE_BYTES_MAX // row_bytes))
        self._row_of: dict[int, int] = {}
        self._token_ids = np.full(self._row_count, -1, np.int64)
        self._latest_row = 0
        #: [rows, layers, occurrences, k] int16, `expert_count` where there is none yet; and how often each was seen.
        #: Row 0 stands for unknown tokens and stays empty.
        self._chosen = np.full((self._row_count, layer_count, OCCURRENCE_COUNT, topk), expert_count, np.int16)
        self._seen_counts = np.zeros(self._row_count, np.int64)
        seen_counts, use_counts = np.divmod(np.arange((OCCURRENCE_COUNT + 1) ** 2), OCCURRENCE_COUNT + 1)
        guesses = (np.minimum(use_counts, seen_counts) + topk / expert_count) / (seen_counts + 1)
        #: A state is seen count * (OCCURRENCE_COUNT + 1) + use count.
        self._states = StateRates(guesses)
        self._backlog = Backlog()
        self._is_narrow = self._is_seen = False
        #: Tokens of the step that are learned from, as places in it; their rows, and where in these they are kept.
        self._known = np.empty(0, np.int64)
        self._rows = self._places = self._last_rows = self._known
        #: [requests, layers, experts] int64 and float32: the last tokens' states and their probabilities, once asked.
        self._current: npt.NDArray[np.int64] | None = None
        self._probabilities: Probabilities | None = None

    def begin(self, step: Step) -> None:
        self._end()
        self._current = None
        token_ids = step.token_ids
        first = max(0, len(token_ids) - TOKEN_COUNT_MAX)
        self._known = np.flatnonzero(token_ids[first:] >= 0) + first
        self._rows = np.array([self._row(token_id) for token_id in token_ids[self._known].tolist()], np.int64)
        self._is_narrow = len(step.rows) == len(step.request_ids)
        last_ids = token_ids[last_token_of(step)].tolist()
        self._last_rows = np.array([self._row_of.get(token_id, 0) for token_id in last_ids], np.int64)
        places = self._seen_counts[self._rows]
        if len(self._rows) > 1:
            places = places + _repeats(self._rows)
        self._places = places % OCCURRENCE_COUNT

    def observe(self, seen: Observation) -> None:
        self._is_seen = True
        if self._is_narrow:
            self._backlog.add(seen)
        else:
            self._chosen[self._rows, seen.layer_id, self._places] = seen.expert_ids[self._known]

    def predict(self, target: Target) -> Probabilities | None:
        if target.is_next_step:
            return None
        if self._current is None:
            self._look_up()
        assert self._probabilities is not None
        return self._probabilities[:, target.layer_id]

    def forget(self, request_id: str) -> None:
        """Nothing is kept by request."""

    def _look_up(self) -> None:
        """The states of all layers' experts for the last tokens."""
        count = len(self._last_rows) * self._layer_count
        width = self._expert_count + 1
        chosen = self._chosen[self._last_rows].reshape(count, -1)
        flat = chosen + (np.arange(count) * width)[:, None]
        states = np.bincount(flat.ravel(), minlength=count * width).reshape(-1, self._layer_count, width)[:, :, :-1]
        seen_counts = np.minimum(self._seen_counts[self._last_rows], OCCURRENCE_COUNT)
        self._current = states + (seen_counts * (OCCURRENCE_COUNT + 1))[:, None, None]
        self._probabilities = self._states.rates[self._current]

    def _end(self) -> None:
        """A step is over."""
        taken = self._backlog.take()
        if taken is not None:
            layers, by_layer = taken
            expert_ids = by_layer.transpose(1, 0, 2)  # [requests, layers, k]
            if self._current is not None:
                is_known = self._last_rows > 0
                current = self._current[is_known, layers]
                self._states.learn(current, np.take_along_axis(current, expert_ids[is_known], 2))
            self._chosen[self._rows, layers, self._places] = expert_ids[self._known]
        if self._is_seen:
            np.add.at(self._seen_counts, self._rows, 1)
        self._is_seen = False

    def _row(self, token_id: int) -> int:
        row = self._row_of.get(token_id)
        if row is None:
            self._latest_row = row = self._latest_row % (self._row_count - 1) + 1
            self._row_of.pop(int(self._token_ids[row]), None)
            self._row_of[token_id] = row
            self._token_ids[row] = token_id
            self._chosen[row] = self._expert_count
            self._seen_counts[row] = 0
        return row


def _repeats(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """[tokens] int64: how many tokens before it, of the same step, have the same row."""
    order = np.argsort(rows, kind="stable")
    ordered = rows[order]
    is_first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    places = np.arange(len(rows))
    repeats = np.empty(len(rows), np.int64)
    repeats[order] = places - np.maximum.accumulate(np.where(is_first, places, 0))
    return repeats
