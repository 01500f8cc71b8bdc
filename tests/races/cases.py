"""All that the search runs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from tests.races import engine, lending, miniature
from tests.races.engine import Spec
from tests.races.lending import LendingSpec
from tests.races.search import Batch, Case, Tally, run_batch
from vllm_moecxl.types import PassKind


def _engine(name: str, spec: Spec, *, is_small: bool = False) -> Case:
    return Case(name, partial(engine.run, spec), is_small)


_BUFFERS = Spec(pass_kind=PassKind.LAYER_BUFFER, layer_count=3, forward_count=2)

ENGINE_CASES = [
    _engine("token-passes", Spec()),
    _engine("expert-passes", Spec(pass_kind=PassKind.EXPERT)),
    _engine("two-layers", Spec(layer_count=2, forward_count=2)),
    _engine("one-buffer", replace(_BUFFERS, buffer_count=1, layer_count=2)),
    _engine("two-buffers", replace(_BUFFERS, buffer_count=2)),
    _engine("passes-or-buffers", replace(_BUFFERS, pass_kind=PassKind.TOKEN, buffer_count=2)),
    _engine("staged", Spec(banks=("staged",), failure_rate=0.02)),
    _engine("staged-buffers", replace(_BUFFERS, buffer_count=2, banks=("staged",), failure_rate=0.02)),
    _engine("striped", Spec(banks=("registered", "staged"), home="striped", failure_rate=0.02)),
    _engine("replicated", Spec(banks=("registered", "staged"), home="replicated", failure_rate=0.02)),
    _engine("dying-hands", Spec(banks=("staged", "staged"), home="striped", death_rate=0.1)),
    _engine("checked", Spec(is_checked=True, failure_rate=0.02)),
    _engine("ids-at-once", Spec(waits_for_ids=False)),
    _engine("ids-at-once-buffers", replace(_BUFFERS, buffer_count=2, waits_for_ids=False)),
    _engine("hot", Spec(slot_count=4, forward_count=5)),
]

_SMALL = Spec(pause_rate=0, forward_count=2, topk=1)

SMALL_CASES = [
    _engine("small-eviction", replace(_SMALL, expert_count=2, slot_count=1), is_small=True),
    _engine("small-ids-at-once", replace(_SMALL, expert_count=3, waits_for_ids=False), is_small=True),
    _engine("small-staged", replace(_SMALL, expert_count=3, banks=("staged",), forward_count=1), is_small=True),
]


def _lending(name: str, spec: LendingSpec, *, is_small: bool = False) -> Case:
    return Case(f"lending-{name}", partial(lending.run, spec), is_small)


LENDING_CASES = [
    _lending("small", LendingSpec(2, 2, 1, lane_count=1, forward_count=2, pause_rate=0), is_small=True),
    _lending("one-lane", LendingSpec(slot_count=3, lane_count=1)),
    _lending("lanes", LendingSpec()),
    _lending("two-layers", LendingSpec(layer_count=2, forward_count=3)),
    _lending("staged", LendingSpec(banks=("staged",), failure_rate=0.02)),
    _lending("striped", LendingSpec(banks=("registered", "staged"), home="striped", failure_rate=0.02)),
    _lending("replicated", LendingSpec(banks=("registered", "staged"), home="replicated", failure_rate=0.02)),
    _lending("checked", LendingSpec(is_checked=True, failure_rate=0.02)),
    _lending("dying-hands", LendingSpec(banks=("staged", "staged"), home="striped", death_rate=0.1)),
]

CASES = [*miniature.CASES, *SMALL_CASES, *ENGINE_CASES, *LENDING_CASES]
CASES_BY_NAME = {case.name: case for case in CASES}


def run_named(batch: Batch, *, checks_order: bool) -> Tally:
    """Run a batch, in a process of its own or here."""
    torch.set_num_threads(1)
    return run_batch(CASES_BY_NAME[batch[0]], batch, checks_order=checks_order)
