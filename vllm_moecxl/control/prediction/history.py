"""Request-level activation history: past stretches of requests that routed alike say which experts a request uses."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_moecxl.control.prediction.base import Observation, Probabilities, Step, Target
from vllm_moecxl.control.prediction.requests import PerRequest, last_token_of

#: Most tokens that the base rate averages over.
BASE_WINDOW_TOKENS = 4096
#: Maps in the collection: layers * experts * 512 bytes.
MAP_COUNT = 128
#: What is left of a token's activations one token later: a map tells of about 10 tokens.
TOKEN_DECAY = 0.9
#: Tokens after which a request's map goes into the collection; and fewest tokens of one that ends.
STRETCH_TOKENS = 16
STRETCH_TOKENS_MIN = 8
#: Weight of a past map is exp(SHARPNESS * cosine).
SHARPNESS = 20.0
#: Tokens that the matched maps count for beside the request's own recent ones.
MATCH_TOKENS = 16.0
#: Tokens of base rate in a map that goes into the collection.
SHRINK_TOKENS = 10.0
#: Squared length below which a map says nothing.
LENGTH_MIN = 1e-6


class BaseRate:
    """How often a token uses each expert, whoever sends it: an average over the latest tokens.

    Attributes:
        values: [layers, experts] float32; each row adds up to top-k.
    """

    def __init__(self, layer_count: int, expert_count: int, topk: int) -> None:
        self.values = np.full((layer_count, expert_count), topk / expert_count, np.float32)
        self._token_counts = [16.0] * layer_count

    def observe(self, layer_id: int, expert_ids: npt.NDArray[np.int64]) -> None:
        """Take in [tokens, k] expert ids of a layer."""
        count = len(expert_ids)
        seen = min(self._token_counts[layer_id] + count, float(BASE_WINDOW_TOKENS + count))
        self._token_counts[layer_id] = seen
        values = self.values[layer_id]
        values *= np.float32(1 - count / seen)
        values += np.bincount(expert_ids.ravel(), minlength=len(values)) * np.float32(1 / seen)


class History:
    """Matches what a request used lately with a collection of maps of what requests used, and trusts the nearest.

    A map is [layers, experts]: how much more often than everybody a stretch of a request used each expert. Beside what
    the nearest maps say, the request's own recent map counts. The collection is kept diverse: once it is full, a new
    map takes the place of the one that is most like another.

    Memory: MAP_COUNT maps, and one for each live request.
    Source: Xue et al., "MoE-Infinity: Efficient MoE Inference on Personal Machines with Sparsity-Aware Expert Cache"
    (2024). There a map is a whole request; stretches of it match better. Constants: recall and log loss of decode
    replays of DeepSeek-V2-Lite and Mixtral, 2026-11-22.
    """

    def __init__(self, layer_count: int, expert_count: int, topk: int) -> None:
        self._base = BaseRate(layer_count, expert_count, topk)
        #: The collection: [layers, experts, maps], their lengths, and their cosines to each other (-inf: to itself).
        self._maps = np.zeros((layer_count, expert_count, MAP_COUNT), np.float32)
        self._lengths = np.ones(MAP_COUNT, np.float32)
        self._cosines = np.full((MAP_COUNT, MAP_COUNT), -np.inf, np.float32)
        self._map_count = 0
        #: By request: its recent activations beyond the base rate, their squared length, their products with each map,
        #: and the tokens behind them: recent ones (decayed), and those since a map of it was collected.
        self._recent = PerRequest((layer_count, expert_count))
        self._squares = PerRequest(())
        self._products = PerRequest((MAP_COUNT,))
        self._tokens = PerRequest(())
        self._fresh_tokens = PerRequest(())
        self._state = (self._recent, self._squares, self._products, self._tokens, self._fresh_tokens)
        #: The step's requests: their rows in the above, and what their tokens count for, in all and one by one.
        self._rows = np.empty(0, np.int64)
        self._step_tokens = self._token_weights = np.empty(0, np.float32)
        self._step_rows = self._rows

    def begin(self, step: Step) -> None:
        rows = self._rows = self._rows_of(step.request_ids)
        for row in rows[self._fresh_tokens.values[rows] >= STRETCH_TOKENS]:
            self._collect(row)
        self._step_rows = step.rows
        ages = last_token_of(step)[step.rows] - np.arange(len(step.rows))
        self._token_weights = (TOKEN_DECAY**ages).astype(np.float32)
        self._step_tokens = np.bincount(step.rows, self._token_weights, minlength=len(rows)).astype(np.float32)
        counts = np.bincount(step.rows, minlength=len(rows))
        left = (TOKEN_DECAY**counts).astype(np.float32)
        self._recent.values[rows] *= left[:, None, None]
        self._squares.values[rows] *= left * left
        self._products.values[rows] *= left[:, None]
        self._tokens.values[rows] = self._tokens.values[rows] * left + self._step_tokens
        self._fresh_tokens.values[rows] += counts

    def observe(self, seen: Observation) -> None:
        layer_id, rows = seen.layer_id, self._rows
        self._base.observe(layer_id, seen.expert_ids)
        base = self._base.values[layer_id]
        cells = (self._step_rows * len(base))[:, None] + seen.expert_ids
        weights = np.broadcast_to(self._token_weights[:, None], cells.shape)
        used = np.bincount(cells.ravel(), weights.ravel(), minlength=len(rows) * len(base)).astype(np.float32)
        new = used.reshape(len(rows), len(base)) - self._step_tokens[:, None] * base
        before = self._recent.values[rows, layer_id]
        self._recent.values[rows, layer_id] = before + new
        self._squares.values[rows] += np.einsum("re,re->r", new, new + 2 * before)
        self._products.values[rows] += new @ self._maps[layer_id]

    def predict(self, target: Target) -> Probabilities | None:
        count, rows = self._map_count, self._rows
        tokens = self._tokens.values[rows]
        if not target.is_next_step:  # this step has not come to the target yet
            tokens = tokens - self._step_tokens
        if not count and not tokens.any():
            return None
        beyond = self._recent.values[rows, target.layer_id]
        if count:
            lengths = np.sqrt(np.maximum(self._squares.values[rows], LENGTH_MIN))
            cosines = self._products.values[rows, :count] / (lengths[:, None] * self._lengths[:count])
            weights = np.exp(SHARPNESS * (cosines - cosines.max(axis=1, keepdims=True)))
            weights /= weights.sum(axis=1, keepdims=True)
            beyond = beyond + MATCH_TOKENS * (weights @ self._maps[target.layer_id, :, :count].T)
        rates: Probabilities = self._base.values[target.layer_id] + beyond / (tokens + MATCH_TOKENS)[:, None]
        return rates.clip(0, 1)

    def forget(self, request_id: str) -> None:
        row = int(self._rows_of((request_id,))[0])
        if self._fresh_tokens.values[row] >= STRETCH_TOKENS_MIN:
            self._collect(row)
        for kept in self._state:
            kept.forget(request_id)

    def _rows_of(self, request_ids: tuple[str, ...]) -> npt.NDArray[np.int64]:
        """Rows of the requests, the same in every array: all of them are always asked together."""
        rows = [kept.rows(request_ids) for kept in self._state]
        return rows[0]

    def _collect(self, row: int) -> None:
        """Put a request's recent map into the collection."""
        self._fresh_tokens.values[row] = 0
        new = self._recent.values[row] / (self._tokens.values[row] + SHRINK_TOKENS)
        length = np.sqrt(max(np.vdot(new, new), LENGTH_MIN))
        cosines = new.ravel() @ self._maps.reshape(-1, MAP_COUNT) / (length * self._lengths)
        if self._map_count < MAP_COUNT:
            place = self._map_count
            self._map_count += 1
        elif cosines.max() >= self._cosines.max():
            place = int(cosines.argmax())
        else:
            place = int(self._cosines.argmax() // MAP_COUNT)
        cosines[self._map_count :] = -np.inf
        cosines[place] = -np.inf
        self._maps[:, :, place] = new
        self._lengths[place] = length
        self._cosines[place] = self._cosines[:, place] = cosines
        live = self._recent.values
        self._products.values[:, place] = live.reshape(len(live), -1) @ new.ravel()
