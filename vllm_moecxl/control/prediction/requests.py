"""What a predictor keeps by live request, and which tokens and layers of a step belong to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_moecxl.control.prediction.base import Observation, Step


class PerRequest:
    """One array with a row for each live request; rows are handed out on first sight and reused after `forget`.

    Args:
        shape: of a row.
        dtype: of the array; rows start at zero.
    """

    def __init__(self, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> None:
        #: [capacity, *shape]; replaced by a larger one when requests exceed it, so do not hold on to it.
        self.values: npt.NDArray[Any] = np.zeros((8, *shape), dtype)
        self._row_of: dict[str, int] = {}
        self._free_rows = list(range(7, -1, -1))
        self._last_ids: tuple[str, ...] = ()
        self._last_rows: npt.NDArray[np.int64] = np.empty(0, np.int64)

    def rows(self, request_ids: tuple[str, ...]) -> npt.NDArray[np.int64]:
        """[requests] int64, the row of each, new ones zeroed."""
        if request_ids != self._last_ids:
            self._last_rows = np.array([self._row(request_id) for request_id in request_ids], np.int64)
            self._last_ids = request_ids
        return self._last_rows

    def forget(self, request_id: str) -> None:
        """The request's row may be given to another one."""
        row = self._row_of.pop(request_id, None)
        if row is not None:
            self._free_rows.append(row)
            self._last_ids = ()

    def _row(self, request_id: str) -> int:
        row = self._row_of.get(request_id)
        if row is None:
            if not self._free_rows:
                count = len(self.values)
                self.values = np.concatenate([self.values, np.zeros_like(self.values)])
                self._free_rows = list(range(2 * count - 1, count - 1, -1))
            row = self._row_of[request_id] = self._free_rows.pop()
            self.values[row] = 0
        return row


class Backlog:
    """Layers of a step that were seen and not learned from yet, so that many are learned from in one go."""

    def __init__(self) -> None:
        self._first_id = 0
        self._expert_ids: list[npt.NDArray[np.int64]] = []

    def add(self, seen: Observation) -> None:
        """A layer more; one that does not follow the others starts anew."""
        if seen.layer_id != self._first_id + len(self._expert_ids):
            self._first_id = seen.layer_id
            self._expert_ids.clear()
        self._expert_ids.append(seen.expert_ids)

    def take(self) -> tuple[slice, npt.NDArray[np.int64]] | None:
        """The layers and their [layers, tokens, k] int64; None where there are none."""
        if not self._expert_ids:
            return None
        layers = slice(self._first_id, self._first_id + len(self._expert_ids))
        expert_ids = np.array(self._expert_ids)
        self._first_id = layers.stop
        self._expert_ids.clear()
        return layers, expert_ids


def last_token_of(step: Step) -> npt.NDArray[np.int64]:
    """[requests] int64, the place of each request's last token among the step's tokens; every request has one."""
    request_count = len(step.request_ids)
    if len(step.rows) == request_count:
        return step.rows
    return np.searchsorted(step.rows, np.arange(request_count), side="right") - 1
