"""What a simulation found, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_moecxl.control.simulator.bound import belady_hits
from vllm_moecxl.control.simulator.replay import Request
from vllm_moecxl.control.simulator.simulator import Options, Simulator
from vllm_moecxl.types import Cause


def simulate(simulator: Simulator) -> dict[str, Any]:
    """Serve the whole trace, and say how it went."""
    visits: list[list[npt.NDArray[np.int64]]] = [[] for _ in simulator.layers]
    simulator.visits = lambda layer_id, expert_ids: visits[layer_id].append(_distinct(expert_ids))
    requests = simulator.run()
    return {**report(simulator, requests), "belady_hit_rate": _belady_hit_rate(visits, simulator.options)}


def report(simulator: Simulator, requests: Sequence[Request]) -> dict[str, Any]:
    """How it went so far.

    Args:
        requests: those that have ended.
    """
    counts = [layer.counts for layer in simulator.layers]
    hits, pending, misses = (sum(getattr(one, key) for one in counts) for key in ("hits", "pending", "misses"))
    lookups = hits + pending + misses
    traffic, duration_s = simulator.mover.traffic, simulator.mover.now_s
    expected_count = sum(layer.slots.expected_count for layer in simulator.layers)
    ahead_count = sum(buffer.expected_count for buffer in simulator.buffers)
    token_count = sum(len(request.token_s) for request in requests)
    return {
        "label": "simulated",
        "requests": len(requests),
        "steps": simulator.step_count,
        "lookups": lookups,
        "hits": hits,
        "pending": pending,
        "misses": misses,
        "hit_rate": hits / lookups if lookups else None,
        "demand_bytes": traffic.by_cause[Cause.DEMAND],
        "prefetch_bytes": traffic.by_cause[Cause.PREFETCH] - traffic.ahead_bytes,
        "layer_buffer_ahead_bytes": traffic.ahead_bytes,
        "prefetch": {**vars(simulator.prefetch_counts), "unknown": expected_count},
        "layer_buffer_ahead": {**vars(simulator.ahead_counts), "unknown": ahead_count},
        "passes": {kind.value: sum(one.passes[kind] for one in counts) for kind in counts[0].passes},
        "ttft_s": _spread([one.token_s[0] - one.begun_s for one in requests]),
        "tpot_s": _spread([_tpot_s(one) for one in requests if len(one.token_s) > 1]),
        "tokens_per_s": token_count / duration_s if duration_s else None,
        "duration_s": duration_s,
        "stall_s": sum(layer.stall_s for layer in simulator.layers),
        "tier_share": _tier_share(simulator, hits, lookups),
        "bank_bytes": {bank.name: count for bank, count in zip(simulator.hardware.banks, traffic.by_bank, strict=True)},
    }


def _tier_share(simulator: Simulator, hits: int, lookups: int) -> dict[str, float]:
    """Share of the lookups that each tier answered; what is on its way comes from its home."""
    if not lookups:
        return {}
    banks, placement = simulator.hardware.banks, simulator.placement
    counts: dict[str, float] = {"device": hits, **dict.fromkeys((bank.tier for bank in banks), 0.0)}
    for layer, route_ids in zip(simulator.layers, placement.route_ids, strict=True):
        by_route = np.bincount(route_ids, weights=layer.counts.missing, minlength=len(placement.routes))
        for count, route in zip(by_route.tolist(), placement.routes, strict=True):
            for part in route:
                counts[banks[part.bank_index].tier] += count * part.share
    return {tier: count / lookups for tier, count in counts.items()}


def _belady_hit_rate(visits: Sequence[Sequence[npt.NDArray[np.int64]]], options: Options) -> float | None:
    lookups = sum(one.size for layer in visits for one in layer)
    hits = sum(belady_hits(layer, options.slot_count(layer_id)) for layer_id, layer in enumerate(visits))
    return hits / lookups if lookups else None


def _distinct(expert_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.sort(expert_ids[0]) if len(expert_ids) == 1 else np.unique(expert_ids)


def _tpot_s(request: Request) -> float:
    return (request.token_s[-1] - request.token_s[0]) / (len(request.token_s) - 1)


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    p50, p99 = np.quantile(values, [0.5, 0.99])
    return {"mean": float(np.mean(values)), "p50": float(p50), "p99": float(p99)}
