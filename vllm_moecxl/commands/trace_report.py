"""What `moecxl trace` says about a routing trace: values for JSON, the same in words, and as an image."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from vllm_moecxl.control.trace import RoutingTrace
from vllm_moecxl.control.trace_stats import distinct_counts, heat, hottest_share, reuse_distances

#: Slots per layer that hit rates are given for, as a share of its experts.
SLOT_SHARES = (0.25, 0.5, 0.75)
_HOT_SHARE = 0.25


class TraceReport:
    """A trace and what it means for a cache.

    A cache is judged by decode. Where a source ran whole texts at once there is none, and prompts stand for it.
    """

    def __init__(self, trace: RoutingTrace) -> None:
        self._trace = trace
        decode = trace.decode_only()
        self._basis = "decode" if decode.token_count else "prompts as if decoded"
        self._decode = decode if decode.token_count else trace.as_decode()
        self._shares = heat(self._decode)
        self._distances = reuse_distances(self._decode)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON. Hit rates are None where a token's experts do not fit in the slots."""
        trace = self._trace
        prefill_count = int(trace.prefill.sum())
        domains = [] if trace.domain is None else trace.domain.tolist()
        return {
            **{name: trace.meta.get(name) for name in ("model", "source", "licence")},
            "request_count": trace.request_count,
            "token_count": trace.token_count,
            "prefill_token_count": prefill_count,
            "decode_token_count": trace.token_count - prefill_count,
            "layer_count": trace.layer_count,
            "expert_count": trace.expert_count,
            "topk_count": trace.topk_count,
            "has_weights": trace.weights is not None,
            "has_lookahead": trace.lookahead is not None,
            "has_token_ids": bool((trace.token_ids >= 0).any()),
            "domains": dict(Counter(domains)),
            "caching": self._caching(),
        }

    def draw(self, suffix: str) -> bytes:
        """An image: how hot each expert is, how far its uses lie apart, and what an LRU cache makes of that.

        Args:
            suffix: ".png" or ".svg".
        """
        from matplotlib.figure import Figure

        expert_count = self._trace.expert_count
        figure = Figure(figsize=(12, 5), layout="constrained")
        figure.suptitle(str(self._trace.meta.get("model", "routing trace")))
        left, right = figure.subplots(1, 2)
        image = left.imshow(self._shares * expert_count, aspect="auto", interpolation="nearest", cmap="magma", vmin=0)
        left.set(title="Expert heat", xlabel="expert", ylabel="MoE layer")
        figure.colorbar(image, ax=left, label="activations, 1 = as many as the average expert")
        uses = self._distances.counts.sum(axis=0) / max(self._distances.lookup_count, 1)
        hit_rates = self._distances.lru_hit_rates()
        right.bar(np.arange(expert_count), uses, color="tab:orange", label="uses at this distance")
        right.plot(np.arange(expert_count + 1), hit_rates, color="tab:blue", label="LRU hit rate, as many slots")
        right.set(title="Reuse distance", xlabel="other experts of the layer used in between", ylabel="share of uses")
        right.set(ylim=(0, 1))
        right.legend()
        content = io.BytesIO()
        figure.savefig(content, format=suffix[1:], dpi=120)
        return content.getvalue()

    def _caching(self) -> dict[str, Any]:
        trace, hit_rates = self._decode, self._distances.lru_hit_rates()
        slots = {share: math.ceil(share * trace.expert_count) for share in SLOT_SHARES}
        distinct = distinct_counts(trace)
        return {
            "label": "simulated",
            "basis": self._basis,
            "used_expert_count": int(np.count_nonzero(self._shares)),
            "distinct_experts_per_request": float(distinct.mean()) if distinct.size else 0.0,
            "hottest_quarter_share": hottest_share(self._shares, _HOT_SHARE),
            "lru_hit_rate": {
                f"{share:.0%}": float(hit_rates[count]) if count >= trace.topk_count else None
                for share, count in slots.items()
            },
        }


def in_words(summary: dict[str, Any]) -> Iterator[str]:
    """The summary, line by line."""
    caching = summary["caching"]
    yield f"{' + '.join(summary['files'])}: {summary['model'] or 'a model without a name'}"
    yield f"  source      {summary['source'] or 'unknown'}; licence {summary['licence'] or 'unknown'}"
    domains = ", ".join(f"{name or 'unnamed'} {count}" for name, count in summary["domains"].items())
    yield f"  requests    {summary['request_count']}{f': {domains}' if domains else ''}"
    prompt, decode = summary["prefill_token_count"], summary["decode_token_count"]
    yield f"  tokens      {summary['token_count']}: {prompt} of prompts, {decode} of decode"
    yield (
        f"  layers      {summary['layer_count']}, each {summary['topk_count']} of {summary['expert_count']} experts a "
        f"token; {caching['used_expert_count']} of {summary['layer_count'] * summary['expert_count']} are ever used"
    )
    extras = [name for name in ("weights", "lookahead", "token_ids") if summary[f"has_{name}"]]
    yield f"  with        {', '.join(extras) or 'routing alone'}"
    yield f"Caching, simulated, {caching['basis']}, one request at a time:"
    yield f"  a request uses {caching['distinct_experts_per_request']:.1f} different experts a layer"
    yield f"  the hottest quarter of experts has {caching['hottest_quarter_share']:.1%} of the activations"
    rates = [
        f"{name} of the experts {'too few for one token' if rate is None else f'{rate:.1%}'}"
        for name, rate in caching["lru_hit_rate"].items()
    ]
    yield f"  LRU hit rate with slots for {', '.join(rates)}"
    for path in summary["written"]:
        yield f"wrote {path}"
