"""Predictors of the experts that layers will need, and the ensemble that mixes them."""

from __future__ import annotations

from collections.abc import Callable

from vllm_moecxl import config
from vllm_moecxl.control.prediction.attention import Attention
from vllm_moecxl.control.prediction.base import Predictor
from vllm_moecxl.control.prediction.gate import Gate
from vllm_moecxl.control.prediction.history import History
from vllm_moecxl.control.prediction.learned import Learned
from vllm_moecxl.control.prediction.semantic import Semantic
from vllm_moecxl.control.prediction.temporal import Temporal
from vllm_moecxl.control.prediction.tokens import Tokens
from vllm_moecxl.control.prediction.transitions import Transitions

#: By name, what makes one from a model's layers, experts and top-k.
PREDICTORS: dict[str, Callable[[int, int, int], Predictor]] = {
    "gate": Gate,
    "learned": Learned,
    "tokens": Tokens,
    "temporal": Temporal,
    "transitions": Transitions,
    "attention": Attention,
    "history": History,
    "semantic": Semantic,
}
assert tuple(PREDICTORS) == config.PREDICTORS
#: Those that win on the published traces and cost little.
DEFAULT_PREDICTORS = ("gate", "learned", "tokens", "temporal")
