"""Every guard, seen biting: with it taken out of the source, the property that watches over it fails."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test

from tests.property import test_dispatch, test_passes
from tests.property.residency_machine import ResidencyMachine
from vllm_moecxl.control import passes
from vllm_moecxl.control.eviction import LeastRecentlyUsed
from vllm_moecxl.control.residency import Residency
from vllm_moecxl.errors import TransferError
from vllm_moecxl.runtime.dispatch import Dispatch

#: The first failure is enough: no shrinking, nothing kept.
_SEARCH = settings(max_examples=400, stateful_step_count=40, phases=[Phase.generate], report_multiple_bugs=False)
_BITES = (AssertionError, IndexError, KeyError, ValueError, TransferError, pytest.fail.Exception)

Owner = type | ModuleType


def take_out(monkeypatch: pytest.MonkeyPatch, owner: Owner, name: str, guard: str, instead: str) -> None:
    """Replace `guard`, found once in the source of `owner.name`, by `instead`."""
    function = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(guard) == 1, f"{guard!r} is not in {name} exactly once: the test lags behind the source"
    # `compile` inherits this file's future import, so that annotations stay text.
    code = compile(source.replace(guard, instead), f"<{name} without {guard}>", "exec")
    namespace: dict[str, Any] = {}
    exec(code, function.__globals__, namespace)
    monkeypatch.setattr(owner, name, namespace[name])


def search(check: Callable[[Any], None], inputs: st.SearchStrategy[Any]) -> None:
    _SEARCH(given(inputs)(check))()


def test_a_function_that_is_compiled_again_unchanged_bites_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name, guard in (
        (Residency, "begin_fill", "return slot_id"),
        (Dispatch, "_make_resident", "if not missing:"),
        (passes, "token_passes", "while remaining.size:"),
    ):
        take_out(monkeypatch, owner, name, guard, guard)
    run_state_machine_as_test(ResidencyMachine, settings=settings(_SEARCH, max_examples=15))
    settings(_SEARCH, max_examples=15)(given(test_dispatch.scenarios())(test_dispatch.check_scenario))()


@pytest.mark.parametrize(
    ("owner", "name", "guard", "instead"),
    [
        pytest.param(
            Residency, "begin_fill", " & (self._stamp <= self._ended_epoch)", "", id="a held slot is not evicted"
        ),
        pytest.param(Residency, "begin_fill", "(self._state == SlotState.RESIDENT) & ", "", id="nor a filling one"),
        pytest.param(Residency, "begin_fill", " & ~keep[self._expert_of]", "", id="needed experts are kept"),
        pytest.param(
            Residency, "begin_fill", "if dispensable.any():", "if True:", id="needed ones are evicted at the very last"
        ),
        pytest.param(
            Residency,
            "begin_fill",
            "self._resident_slot_of[self._expert_of[slot_id]] = ABSENT",
            "pass",
            id="an evicted expert is absent",
        ),
        pytest.param(
            Residency, "begin_fill", "self._filling_slot_of[expert_id] = slot_id", "pass", id="a filling one is pending"
        ),
        pytest.param(Residency, "lease", "self._stamp[slot_ids] = epoch", "pass", id="a lease stamps its slots"),
        pytest.param(Residency, "lease", "slot_ids.argmin()", "slot_ids.argmax()", id="all of them or none"),
        pytest.param(Residency, "lease", "self._policy.record(slot_ids)", "pass", id="the policy hears of a read"),
        pytest.param(
            Residency,
            "lease",
            "self._resident_slot_of.take(expert_ids)",
            "self._resident_slot_of.take(expert_ids.view(np.int32))",
            id="a negative id does not wrap around",
        ),
        pytest.param(
            Residency, "lease", "np.count_nonzero(self._stamp == epoch)", "slot_ids.size", id="repeats count once"
        ),
        pytest.param(
            Residency,
            "release",
            "next(iter(self._open_epochs)) - 1 if self._open_epochs else self._epoch",
            "self._epoch",
            id="one release does not end the others",
        ),
        pytest.param(
            Residency,
            "release",
            "next(iter(self._open_epochs)) - 1 if self._open_epochs else self._epoch",
            "lease.epoch",
            id="a younger release does not end older leases",
        ),
        pytest.param(
            Residency,
            "release",
            "next(iter(self._open_epochs)) - 1 if self._open_epochs else self._epoch",
            "max(self._ended_epoch, min(self._open_epochs, default=1) - 1)",
            id="when all leases have ended nothing is held",
        ),
        pytest.param(
            Residency,
            "complete_fill",
            "self._policy.admit(slot_id, expert_id)",
            "pass",
            id="the policy hears of a fetch",
        ),
        pytest.param(
            Residency,
            "complete_fill",
            "self._stamp[slot_id] = self._ended_epoch",
            "pass",
            id="a fetch counts as a read",
        ),
        pytest.param(
            Residency,
            "complete_fill",
            "self._stamp[slot_id] = self._ended_epoch",
            "self._stamp[slot_id] = self._epoch",
            id="a fetched slot is not held by leases that it never had",
        ),
        pytest.param(
            Residency, "require_known", "(worst := int(expert_ids.max()))", "0", id="an unknown id is refused by itself"
        ),
        pytest.param(
            Residency,
            "abort_fill",
            "self._state[slot_id] = SlotState.FREE",
            "self._state[slot_id] = SlotState.RESIDENT",
            id="a failed fill leaves the slot free",
        ),
        pytest.param(
            Residency, "_end_fill", "self._filling_slot_of[expert_id] = ABSENT", "pass", id="a fill ends being pending"
        ),
        pytest.param(LeastRecentlyUsed, "victim", "argmin", "argmax", id="the least recently used is the victim"),
    ],
)
def test_the_state_machine_notices_a_residency_without(
    monkeypatch: pytest.MonkeyPatch, owner: Owner, name: str, guard: str, instead: str
) -> None:
    take_out(monkeypatch, owner, name, guard, instead)
    with pytest.raises(_BITES):
        run_state_machine_as_test(ResidencyMachine, settings=_SEARCH)


@pytest.mark.parametrize(
    ("check", "name", "guard", "instead"),
    [
        pytest.param(test_passes.check_cover, "_fill_pass", " | (size > room)", "", id="a pass fits the slots"),
        pytest.param(
            test_passes.check_cover,
            "token_passes",
            "remaining = remaining[~taken]",
            "remaining = remaining[1:]",
            id="coverage",
        ),
        pytest.param(
            test_passes.check_limit, "token_passes", "if fetch_count > fetch_limit:", "if False:", id="the fetch limit"
        ),
        pytest.param(
            test_passes.check_limit,
            "token_passes",
            "chosen & ~resident",
            "chosen",
            id="what is resident is not fetched",
        ),
        pytest.param(
            test_passes.check_limit, "_after_pass", "~wanted[earlier]", "wanted[earlier]", id="what is wanted stays"
        ),
        pytest.param(
            test_passes.check_expert_passes,
            "expert_passes",
            "~resident[expert_ids]",
            "resident[expert_ids]",
            id="resident first",
        ),
    ],
)
def test_the_pass_properties_notice_a_plan_without(
    monkeypatch: pytest.MonkeyPatch, check: Callable[[Any], None], name: str, guard: str, instead: str
) -> None:
    take_out(monkeypatch, passes, name, guard, instead)
    with pytest.raises(_BITES):
        search(check, test_passes.cases())


@pytest.mark.parametrize(
    ("name", "guard", "instead"),
    [
        pytest.param(
            "_make_resident",
            "self.residency.lease(cached) if cached.size else None",
            "None",
            id="what a pass has is held while it fetches the rest",
        ),
        pytest.param(
            "_make_resident", "self.residency.abort_fill(slot_id)", "pass", id="a failed fetch frees its slots"
        ),
        pytest.param(
            "_make_resident",
            "self.residency.abort_fill(slot_id)",
            "self.residency.complete_fill(slot_id)",
            id="a failed fetch leaves no half slab resident",
        ),
        pytest.param("_make_resident", "self.residency.release(hold)", "pass", id="that hold ends"),
        pytest.param("_make_resident", "self._count_slots()", "pass", id="slots are counted"),
        pytest.param("_run_resident", "self.residency.release(lease)", "pass", id="a pass ends its lease"),
        pytest.param("__call__", "self.residency.release(lease)", "pass", id="a full hit ends its lease"),
        pytest.param("_run_rows", "self._bind(self.slots.tensors)", "pass", id="the slots are bound again"),
        pytest.param("_run_rows", "self._bind(rows)", "pass", id="the layer buffer is bound"),
        pytest.param(
            "_run_layer_buffer",
            "buffer.take(self.slots, [self.residency.resident_slot(expert_id) for expert_id in cached], cached)",
            "pass",
            id="the layer buffer takes what is in slots",
        ),
        pytest.param(
            "_run_expert_passes",
            "torch.where(self._backend.to_device(mine), topk_weights, 0)",
            "topk_weights",
            id="routes of other passes weigh nothing",
        ),
        pytest.param(
            "_run_token_passes", "output.index_copy_(0, rows, result)", "output[: len(rows)] = result", id="token order"
        ),
        pytest.param("_run_token_passes", "topk_weights[rows]", "topk_weights[: len(rows)]", id="each token's weights"),
        pytest.param("__call__", "if not routes.size:", "if False:", id="an empty batch is nothing to lease"),
        pytest.param(
            "rehearse",
            "self.residency.require_known(np.unique(host_ids.numpy().view(np.uint32)))",
            "pass",
            id="a rehearsal checks its ids too",
        ),
        pytest.param(
            "rehearse",
            "self._kernel(x, topk_weights, self._backend.to_device(host_ids % self.slots.cell_count))",
            "self(x, topk_weights, topk_ids)",
            id="a rehearsal leaves the slots alone",
        ),
        pytest.param(
            "rehearse",
            "self._run_rows(self.layer_buffer.tensors, x, topk_weights, host_ids)",
            "self._run_layer_buffer(x, topk_weights, host_ids, np.unique(host_ids.numpy()).astype(np.int64))",
            id="a rehearsal fetches nothing into the layer buffer",
        ),
        pytest.param("rehearse", "host_ids % self.slots.cell_count", "host_ids", id="a rehearsal stays in the slots"),
        pytest.param("rehearse", "self._backend.is_host and ", "", id="a device cannot read homes"),
        pytest.param("rehearse", "if not host_ids.numel():", "if False:", id="an empty batch rehearses nothing"),
        pytest.param(
            "_fetch",
            "self._counters.values[self._counters.bank_up[bank_name]] = 0",
            "pass",
            id="a bank that cannot be read is down in the metrics",
        ),
    ],
)
def test_the_dispatch_property_notices_a_dispatch_without(
    monkeypatch: pytest.MonkeyPatch, name: str, guard: str, instead: str
) -> None:
    take_out(monkeypatch, Dispatch, name, guard, instead)
    with pytest.raises(_BITES):
        search(test_dispatch.check_scenario, test_dispatch.scenarios())
