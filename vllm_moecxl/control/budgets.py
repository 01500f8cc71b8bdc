"""How many slots each layer gets out of a common total: where one more removes the most misses.

Source: AdapMoE (Zhong et al., ICCAD 2024), which shares its cache out by dynamic programming; the curves are the stack
distances of Mattson et al., "Evaluation Techniques for Storage Hierarchies", IBM Systems Journal 9 (1970).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vllm_moecxl.control.trace import RoutingTrace
from vllm_moecxl.control.trace_stats import reuse_distances


def miss_curves(trace: RoutingTrace) -> npt.NDArray[np.int64]:
    """[layers, experts + 1] int64, LRU's misses in each layer with 0, 1, ... slots."""
    distances = reuse_distances(trace)
    use_counts = distances.counts.sum(axis=1) + distances.first_counts
    hit_counts = np.pad(np.cumsum(distances.counts, axis=1), ((0, 0), (1, 0)))
    misses: npt.NDArray[np.int64] = use_counts[:, None] - hit_counts
    return misses


def budgets(
    curves: Sequence[npt.NDArray[np.integer]], total_slot_count: int, least_slot_count: int
) -> npt.NDArray[np.int64]:
    """The split of `total_slot_count` slots over the layers with the fewest misses in all.

    Args:
        curves: by layer, [experts + 1] misses with 0, 1, ... slots.
        least_slot_count: what every layer gets, at least: its top-k.

    Returns:
        [layers] int64, slots of each layer, no more than it has experts; their sum is the total, or all experts.
    """
    assert curves and least_slot_count >= 1
    assert len(curves) * least_slot_count <= total_slot_count, "every layer needs as many slots as a token has experts"
    spare_count = min(total_slot_count, sum(len(curve) - 1 for curve in curves)) - len(curves) * least_slot_count
    # fewest[s]: misses of the layers so far with s of the spare slots in all; curves need not be convex.
    fewest = np.full(spare_count + 1, np.inf)
    fewest[0] = 0.0
    choices = []
    for curve in curves:
        costs = np.asarray(curve[least_slot_count:], dtype=np.float64)
        totals = np.full((len(costs), spare_count + 1), np.inf)
        for extra_count, cost in enumerate(costs[: spare_count + 1].tolist()):
            totals[extra_count, extra_count:] = fewest[: spare_count + 1 - extra_count] + cost
        choices.append(totals.argmin(axis=0))
        fewest = totals.min(axis=0)
    slot_counts = np.full(len(curves), least_slot_count, dtype=np.int64)
    left = spare_count
    for layer in reversed(range(len(curves))):
        slot_counts[layer] += choices[layer][left]
        left -= int(choices[layer][left])
    return slot_counts
