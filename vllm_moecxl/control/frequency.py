"""How often each expert is activated: an exponential moving average over requests, from serving or from a trace."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike

import numpy as np
import numpy.typing as npt

from vllm_moecxl.control.trace import RoutingTrace, TraceError
from vllm_moecxl.errors import ConfigError

#: Requests after which an observation counts half. Long enough to average over requests of one kind, short enough to
#: follow a change of domain.
#: Source: share of a request's routes on the quarter of experts ranked highest by the requests before it, replayed on
#: 2026-11-22: DeepSeek-V2-Lite, shuffled prompts, 28.9 % at 32 (28.2 % at 8, 29.0 % for ever); mixtral-mini, domains in
#: blocks, 30.3 % at 32 (35.9 % at 8, 27.4 % for ever).
HALF_LIFE_REQUESTS = 32.0


class ActivationFrequency:
    """The share of each layer's activations that each expert has; uniform before the first request.

    Args:
        layer_count: MoE layers.
        expert_count: experts of each of them.
        half_life_requests: requests after which an observation counts half.
    """

    def __init__(self, layer_count: int, expert_count: int, *, half_life_requests: float = HALF_LIFE_REQUESTS) -> None:
        assert half_life_requests > 0
        self._step = 1 - 2 ** (-1 / half_life_requests)
        self._values = np.full((layer_count, expert_count), 1 / expert_count)

    @property
    def values(self) -> npt.NDArray[np.float64]:
        """[layers, experts] float64, each row adds up to 1. A copy."""
        return self._values.copy()

    def observe(self, request_counts: npt.NDArray[np.integer]) -> None:
        """Take in one request. However long it was, it counts as one: its counts are normalised per layer.

        Args:
            request_counts: [layers, experts] activations by the request; a layer without any keeps its average.
        """
        assert request_counts.shape == self._values.shape and request_counts.min() >= 0
        totals = request_counts.sum(axis=1)
        seen = totals > 0
        shares = request_counts[seen] / totals[seen, None]
        self._values[seen] += self._step * (shares - self._values[seen])

    @classmethod
    def from_trace(
        cls,
        path: str | PathLike[str],
        layer_count: int,
        expert_count: int,
        *,
        half_life_requests: float = HALF_LIFE_REQUESTS,
    ) -> ActivationFrequency:
        """Replay a routing trace, request after request in its order.

        Raises:
            ConfigError: the file cannot be read, is no routing trace, or is one of another model.
        """
        frequency = cls(layer_count, expert_count, half_life_requests=half_life_requests)
        try:
            trace = RoutingTrace.load(path)
        except TraceError as error:
            raise _refuse(path, error.finding) from error
        if misfit := _misfit(trace, layer_count, expert_count):
            raise _refuse(path, misfit)
        trace = replace(trace, meta={**trace.meta, "num_experts": expert_count})  # one that does not say how many
        for _, tokens in trace.requests():
            frequency.observe(trace.counts(tokens))
        return frequency


def _refuse(path: str | PathLike[str], finding: str) -> ConfigError:
    return ConfigError(
        f"--moe-offload-config: placement_trace={str(path)!r} is not possible: {finding}; record one of this model "
        "with the option trace, or drop the option"
    )


def _misfit(trace: RoutingTrace, layer_count: int, expert_count: int) -> str:
    """Why a trace cannot be one of the model; empty where it can."""
    if trace.layer_count != layer_count:
        return f"it has {trace.layer_count} MoE layers and the model has {layer_count}"
    if (declared := trace.meta.get("num_experts", expert_count)) != expert_count:
        return f"its model has {declared} experts a layer and this one has {expert_count}"
    if trace.expert_count > expert_count:
        return f"it routes to expert {trace.expert_count - 1} and a layer has {expert_count}"
    return ""
