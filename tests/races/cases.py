"""All that the search runs."""

from __future__ import annotations

from functools import partial

from tests.races import engine, miniature
from tests.races.engine import Spec
from tests.races.search import Case
from vllm_moecxl.types import PassKind


def _engine(name: str, spec: Spec, *, is_small: bool = False) -> Case:
    return Case(name, partial(engine.run, spec), is_small)


ENGINE_CASES = [
    _engine("token-passes", Spec()),
    _engine("expert-passes", Spec(pass_kind=PassKind.EXPERT)),
    _engine("one-buffer", Spec(buffer_count=1, token_count_max=4)),
    _engine("two-buffers", Spec(pass_kind=PassKind.LAYER_BUFFER, buffer_count=2, layer_count=3, token_count_max=4)),
    _engine("staged", Spec(banks=("staged",), failure_rate=0.02)),
    _engine("staged-buffers", Spec(banks=("staged",), buffer_count=2, token_count_max=4, failure_rate=0.02)),
    _engine("striped", Spec(banks=("registered", "staged"), home="striped", failure_rate=0.02)),
    _engine("replicated", Spec(banks=("registered", "registered"), home="replicated", buffer_count=2)),
    _engine("checked", Spec(banks=("registered",), is_checked=True, layer_count=1)),
    _engine("hot", Spec(slot_count=4, expert_count=4, forward_count=6)),
]

CASES = [*miniature.CASES, *ENGINE_CASES]
