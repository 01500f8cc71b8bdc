"""Semantic: past requests whose text resembles this one's say which experts it uses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from vllm_moecxl.control.prediction.base import Observation, Probabilities, Step, Target
from vllm_moecxl.control.prediction.history import BaseRate
from vllm_moecxl.control.prediction.requests import PerRequest

#: [tokens] int64 ids, none negative -> [tokens, dim] float32, or None where there are no embeddings.
Embed = Callable[[npt.NDArray[np.int64]], "npt.NDArray[np.float32] | None"]

#: Clusters of past requests: layers * experts * 512 bytes, and an embedding of each.
CLUSTER_COUNT = 128
#: Most requests that a cluster's averages count for, so that it follows its topic.
CLUSTER_REQUESTS_MAX = 16.0
#: Fewest tokens of a request that is learned from.
REQUEST_TOKENS_MIN = 8
#: A token weighs RARITY / (RARITY + its share of all tokens).
#: Source: Arora et al., "A Simple but Tough-to-Beat Baseline for Sentence Embeddings" (2017).
RARITY = 1e-3
#: Token ids are counted by their remainder.
VOCABULARY_BINS = 1 << 17
#: Weight of a past cluster is exp(SHARPNESS * cosine).
#: Source: log loss of decode replays on 2026-11-22: 20 beats 10, 40 and 80 on DeepSeek-V2-Lite by hash, and 40 and 80
#: on mixtral-mini with its own embeddings.
SHARPNESS = 20.0
#: Tokens of base rate in a request's map.
SHRINK_TOKENS = 10.0
#: Tokens over which the mean embedding is averaged.
MEAN_WINDOW_TOKENS = 4096
#: Numbers in an embedding by hash, a multiple of 64.
HASHED_DIM = 256
_LENGTH_MIN = 1e-6


def hashed_embedding(token_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Random signs by token id: without a model, texts are alike that share words. [tokens, HASHED_DIM] float32.

    Source: splitmix64, Steele et al., "Fast Splittable Pseudorandom Number Generators" (2014).
    """
    lanes = np.arange(1, HASHED_DIM // 64 + 1, dtype=np.uint64)
    bits = (token_ids.astype(np.uint64)[:, None] * np.uint64(len(lanes)) + lanes) * np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    return np.unpackbits(bits.view(np.uint8), axis=1).astype(np.float32) * 2 - 1


class Semantic:
    """Embeds the text of a request so far and weighs the expert maps of the nearest past requests.

    A request that ends joins a bounded collection. When that is full, the two nearest in it become one, weighted by
    the requests behind them: so what it holds turns from single requests into running clusters, domains.

    Memory: CLUSTER_COUNT maps and embeddings; one of each for a live request; a count by token id.

    Args:
        layer_count: MoE layers.
        expert_count: experts of each of them.
        topk: experts that a token uses.
        embed: token embeddings, the model's own where they are at hand.
    """

    def __init__(self, layer_count: int, expert_count: int, topk: int, *, embed: Embed = hashed_embedding) -> None:
        self._embed = embed
        self._shape = (layer_count, expert_count)
        self._base = BaseRate(layer_count, expert_count, topk)
        self._token_counts = np.zeros(VOCABULARY_BINS, np.float32)
        self._token_count = 0.0
        #: Known with the first embedding: the mean token, by request the sum of its tokens, the clusters' directions.
        self._mean = np.zeros(0, np.float32)
        self._sums = PerRequest((0,))
        self._directions = np.zeros((0, 0), np.float32)
        #: [layers, clusters, experts]: how much more often than everybody its requests used each expert.
        self._maps = np.zeros((layer_count, CLUSTER_COUNT, expert_count), np.float32)
        self._request_counts = np.zeros(CLUSTER_COUNT, np.float32)
        self._cluster_count = 0
        self._used = PerRequest(self._shape)
        self._tokens = PerRequest(())
        self._rows = self._step_rows = np.empty(0, np.int64)
        self._weights: npt.NDArray[np.float32] | None = None

    def begin(self, step: Step) -> None:
        self._rows = self._used.rows(step.request_ids)
        self._step_rows = step.rows
        rows = self._tokens.rows(step.request_ids)
        self._tokens.values[rows] += np.bincount(step.rows, minlength=len(rows))
        self._read(step)
        self._weights = None
        if self._cluster_count:
            rows = self._sums.rows(step.request_ids)
            sums = self._sums.values[rows]
            lengths = np.sqrt(np.maximum(np.einsum("rd,rd->r", sums, sums), _LENGTH_MIN))
            cosines = sums @ self._directions[: self._cluster_count].T / lengths[:, None]
            weights = np.exp(SHARPNESS * (cosines - cosines.max(axis=1, keepdims=True)))
            self._weights = weights / weights.sum(axis=1, keepdims=True)

    def observe(self, seen: Observation) -> None:
        self._base.observe(seen.layer_id, seen.expert_ids)
        expert_count = self._shape[1]
        cells = (self._step_rows * expert_count)[:, None] + seen.expert_ids
        used = np.bincount(cells.ravel(), minlength=len(self._rows) * expert_count)
        self._used.values[self._rows, seen.layer_id] += used.reshape(len(self._rows), expert_count)

    def predict(self, target: Target) -> Probabilities | None:
        if self._weights is None:
            return None
        rates = self._weights @ self._maps[target.layer_id, : self._cluster_count]
        rates += self._base.values[target.layer_id]
        return rates.clip(0, 1)

    def forget(self, request_id: str) -> None:
        used, token_count, total = (_of(kept, request_id) for kept in (self._used, self._tokens, self._sums))
        length = np.sqrt(np.vdot(total, total))
        if token_count >= REQUEST_TOKENS_MIN and length > _LENGTH_MIN:
            beyond = used - token_count * self._base.values
            self._learn(total / length, beyond / (token_count + SHRINK_TOKENS))
        for kept in (self._used, self._tokens, self._sums):
            kept.forget(request_id)

    def _read(self, step: Step) -> None:
        """Add the step's tokens to the sums of their requests."""
        known = step.token_ids >= 0
        token_ids = step.token_ids[known]
        vectors = self._embed(token_ids) if len(token_ids) else None
        if vectors is None:
            return
        if not self._directions.size:
            dim = vectors.shape[1]
            self._mean = np.zeros(dim, np.float32)
            self._sums = PerRequest((dim,))
            self._directions = np.zeros((CLUSTER_COUNT, dim), np.float32)
        bins = token_ids % VOCABULARY_BINS
        np.add.at(self._token_counts, bins, 1)
        self._token_count += len(token_ids)
        weights = RARITY / (RARITY + self._token_counts[bins] / self._token_count)
        seen = min(self._token_count, float(MEAN_WINDOW_TOKENS))
        self._mean += np.float32(len(token_ids) / max(seen, len(token_ids))) * (vectors.mean(axis=0) - self._mean)
        rows = self._sums.rows(step.request_ids)
        np.add.at(
            self._sums.values, rows[step.rows[known]], weights[:, None].astype(np.float32) * (vectors - self._mean)
        )

    def _learn(self, direction: npt.NDArray[np.float32], beyond: npt.NDArray[np.float32]) -> None:
        """A request of this direction and map has ended."""
        if self._cluster_count < CLUSTER_COUNT:
            place = self._cluster_count
            self._cluster_count += 1
        else:
            cosines = self._directions @ self._directions.T
            np.fill_diagonal(cosines, -np.inf)
            keep, place = divmod(int(cosines.argmax()), CLUSTER_COUNT)
            self._merge(keep, self._directions[place], self._maps[:, place], float(self._request_counts[place]))
        self._directions[place] = direction
        self._maps[:, place] = beyond
        self._request_counts[place] = 1

    def _merge(
        self, place: int, direction: npt.NDArray[np.float32], beyond: npt.NDArray[np.float32], request_count: float
    ) -> None:
        """Make another cluster, or a request, part of the one at `place`."""
        total = float(self._request_counts[place]) + request_count
        share = np.float32(request_count / total)
        mixed = self._directions[place] + share * (direction - self._directions[place])
        self._directions[place] = mixed / np.sqrt(max(np.vdot(mixed, mixed), _LENGTH_MIN))
        self._maps[:, place] += share * (beyond - self._maps[:, place])
        self._request_counts[place] = min(total, CLUSTER_REQUESTS_MAX)


def _of(kept: PerRequest, request_id: str) -> npt.NDArray[np.float32]:
    """What is kept of one request."""
    row = kept.rows((request_id,))[0]
    return np.asarray(kept.values[row], np.float32)
