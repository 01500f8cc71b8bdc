"""What predictors are told and what they answer: the contract of all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

#: [requests, experts] float32, the probability that a request's next visit of a layer uses each expert.
Probabilities = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Step:
    """A forward, as far as it is known before its first layer.

    Attributes:
        request_ids: of its requests.
        rows: [tokens] int64, the request of each token as an index into `request_ids`, ascending.
        token_ids: [tokens] int64, -1 where unknown.
        is_prompt: [requests] bool, which requests' prompts (or parts of them) these tokens are.
    """

    request_ids: tuple[str, ...]
    rows: npt.NDArray[np.int64]
    token_ids: npt.NDArray[np.int64]
    is_prompt: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Observation:
    """What one layer of a step has shown.

    Attributes:
        layer_id: its place among the MoE layers, from 0 on.
        expert_ids: [tokens, k] int64, the router's choice, in the order of the step's tokens.
        weights: [tokens, k] float32, the router's weights; None where nobody recorded them.
        ahead: [distances, tokens, experts] float32: row d - 1 is what the gate of layer `layer_id` + d makes of this
            layer's input. Larger is likelier; scores of one token compare with each other, nothing else is promised.
            None where there are no gates at hand (and distances beyond the last layer are left out).
        hidden: [tokens, hidden] float32, this layer's input; None where it was not kept.
    """

    layer_id: int
    expert_ids: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32] | None = None
    ahead: npt.NDArray[np.float32] | None = None
    hidden: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Target:
    """The visit of a layer that a prediction is for.

    Attributes:
        layer_id: the layer.
        distance: how many layers it lies ahead of the latest observation, at least 1. Counted through the end of the
            step: after the last layer comes the first layer of the next step.
        is_next_step: whether it belongs to the next step, whose tokens nobody knows yet.
    """

    layer_id: int
    distance: int
    is_next_step: bool


class Predictor(Protocol):
    """Says which experts a layer will need. Not thread-safe: the sidecar, or the simulator, owns it.

    It is told every step (prompts too), and every layer of it in order. It is asked for narrow steps only: where a step
    has several tokens of a request, the answer is for the request's last one.
    """

    def begin(self, step: Step) -> None:
        """A step begins; the one before is over."""

    def observe(self, seen: Observation) -> None:
        """A layer of the current step."""

    def predict(self, target: Target) -> Probabilities | None:
        """Probabilities by request of the current step, in its order; None where it has nothing to go by."""

    def forget(self, request_id: str) -> None:
        """A request has ended."""
