"""What a routing trace says about caching: how the load spreads over experts, and when each is used again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_moecxl.control.trace import RoutingTrace


def heat(trace: RoutingTrace) -> npt.NDArray[np.float64]:
    """[layers, experts] float64, each expert's share of its layer's activations; zeros where there are none."""
    counts = trace.counts()
    shares: npt.NDArray[np.float64] = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return shares


def hottest_share(shares: npt.NDArray[np.float64], expert_share: float) -> float:
    """The activations that the hottest experts of each layer have, as a share of all.

    Args:
        shares: [layers, experts], see `heat`.
        expert_share: which part of a layer's experts is meant; at least one.
    """
    count = max(1, round(expert_share * shares.shape[1]))
    return float(np.sort(shares, axis=1)[:, -count:].sum(axis=1).mean())


def distinct_counts(trace: RoutingTrace) -> npt.NDArray[np.int64]:
    """[requests, layers] int64, how many different experts each request uses."""
    counts = np.zeros((trace.request_count, trace.layer_count), np.int64)
    for number, tokens in trace.requests():
        counts[number] = np.count_nonzero(trace.counts(tokens), axis=1)
    return counts


@dataclass(frozen=True)
class ReuseDistances:
    """How many other experts of a layer are used between two uses of one, counted over a trace.

    Attributes:
        counts: [layers, experts] int64: column d counts the uses with d distinct other experts since the use before.
        first_counts: [layers] int64, uses that are an expert's first.
    """

    counts: npt.NDArray[np.int64]
    first_counts: npt.NDArray[np.int64]

    @property
    def lookup_count(self) -> int:
        """All uses."""
        return int(self.counts.sum() + self.first_counts.sum())

    def lru_hit_rates(self) -> npt.NDArray[np.float64]:
        """[experts + 1] float64, the hit rate of an LRU cache with 0, 1, ... slots in every layer.

        Exact from as many slots as a token uses experts on: with fewer, a layer cannot run.
        """
        hits = np.cumsum(self.counts.sum(axis=0))
        return np.concatenate([[0], hits]) / max(self.lookup_count, 1)


def reuse_distances(trace: RoutingTrace) -> ReuseDistances:
    """Reuse distances of a trace, token after token as in decode with one request, the cache kept across requests.

    A token's experts are looked up together, and then count as used in the router's order. A cache with `s` slots that
    evicts the least recently used expert, and none that the token needs, holds the first `s` of that order: so a use
    hits where its distance is below `s`, whatever `s` is.

    Source: Mattson et al., Evaluation techniques for storage hierarchies, IBM Systems Journal 9(2), 1970.
    """
    layer_count, expert_count, topk_count = trace.layer_count, trace.expert_count, trace.topk_count
    layers = np.arange(layer_count)[:, None]
    last_use = np.full((layer_count, expert_count), -1, np.int64)
    distances = np.empty(trace.topk.shape, np.int64)
    moments = np.arange(topk_count)
    for number, expert_ids in enumerate(trace.topk.astype(np.int64)):
        used = last_use[layers, expert_ids]
        later = np.count_nonzero(last_use[:, None, :] > used[:, :, None], axis=2)
        distances[number] = np.where(used < 0, expert_count, later)
        last_use[layers, expert_ids] = number * topk_count + moments
    flat = (distances + layers * (expert_count + 1)).ravel()
    counts = np.bincount(flat, minlength=layer_count * (expert_count + 1)).reshape(layer_count, expert_count + 1)
    return ReuseDistances(counts[:, :-1], counts[:, -1])
