"""Every guard, seen biting: with it taken out of the source, the property that watches over it fails."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test

from tests.property import test_dispatch, test_layers, test_passes, test_prefetches
from tests.property.residency_machine import ResidencyMachine
from tests.unit import test_foresight, test_ring
from vllm_moecxl.control import passes
from vllm_moecxl.control.eviction import lru
from vllm_moecxl.control.residency import Residency
from vllm_moecxl.data.mover import Mover
from vllm_moecxl.errors import TransferError
from vllm_moecxl.runtime import foresight
from vllm_moecxl.runtime.dispatch import Dispatch
from vllm_moecxl.runtime.foresight import Foresight, Recording
from vllm_moecxl.runtime.layer_buffer import LayerBuffer
from vllm_moecxl.runtime.ring import RoutingRing
from vllm_moecxl.runtime.slots import SlotCache
from vllm_moecxl.types import PassKind

#: The first failure is enough: no shrinking, nothing kept.
_SEARCH = settings(max_examples=400, stateful_step_count=40, phases=[Phase.generate], report_multiple_bugs=False)
_BITES = (AssertionError, IndexError, KeyError, ValueError, RuntimeWarning, TransferError, pytest.fail.Exception)

Owner = type | ModuleType


def take_out(monkeypatch: pytest.MonkeyPatch, owner: Owner, name: str, guard: str, instead: str) -> None:
    """Replace `guard`, found once in the source of `owner.name`, by `instead`."""
    function = inspect.unwrap(getattr(owner, name))
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
        (Dispatch, "_slow", "distinct.size - missing.size"),
        (SlotCache, "_take_slot", "if self._unfinished:"),
        (LayerBuffer, "bring", "if cause is Cause.PREFETCH:"),
        (Mover, "wait", "if fetch.error is not None:"),
        (passes, "token_passes", "while remaining.size:"),
    ):
        take_out(monkeypatch, owner, name, guard, guard)
    run_state_machine_as_test(ResidencyMachine, settings=settings(_SEARCH, max_examples=15))
    settings(_SEARCH, max_examples=15)(given(test_dispatch.scenarios())(test_dispatch.check_scenario))()
    settings(_SEARCH, max_examples=15)(given(test_layers.stories())(test_layers.check_story))()


@pytest.mark.parametrize(
    ("owner", "name", "guard", "instead"),
    [
        pytest.param(
            Residency, "begin_fill", " & (self._stamp <= self._ended_epoch)", "", id="a held slot is not evicted"
        ),
        pytest.param(Residency, "begin_fill", "(self._state == _RESIDENT) & ", "", id="nor a filling one"),
        pytest.param(Residency, "begin_fill", " & ~keep[self._expert_of]", "", id="needed experts are kept"),
        pytest.param(
            *(Residency, "begin_fill", "if np.count_nonzero(dispensable) or not is_urgent:", "if True:"),
            id="needed ones are evicted at the very last",
        ),
        pytest.param(
            *(Residency, "begin_fill", " or not is_urgent:", ":"),
            id="and only if it is urgent",
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
        pytest.param(Residency, "visit", "self.policy.record(expert_ids)", "pass", id="the policy hears of a visit"),
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
            "self.policy.admit(slot_id, expert_id)",
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
            "self._state[slot_id] = _FREE",
            "self._state[slot_id] = _RESIDENT",
            id="a failed fill leaves the slot free",
        ),
        pytest.param(
            Residency, "_end_fill", "self._filling_slot_of[expert_id] = ABSENT", "pass", id="a fill ends being pending"
        ),
        pytest.param(lru, "least_recent", "argmin", "argmax", id="the least recently used is the victim"),
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
        pytest.param(
            *(test_passes.check_split, "split_resident", "if is_ready.all() or not is_ready.any():", "if False:"),
            id="a split has two parts",
        ),
        pytest.param(
            *(test_passes.check_split, "split_resident", ".all(axis=1)", ".any(axis=1)"),
            id="what goes first has all it needs",
        ),
        pytest.param(
            *(test_passes.check_fetch_counts, "fetch_counts", "chosen & ~resident", "chosen"),
            id="fetches are of what is absent",
        ),
        pytest.param(
            *(test_passes.check_fetch_counts, "fetch_counts", "resident = _after_pass", "_after_pass"),
            id="a pass finds what the one before has left",
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
    ("owner", "name", "guard", "instead"),
    [
        # Dispatch
        pytest.param(Dispatch, "__call__", "if not routes.size:", "if False:", id="an empty batch is nothing to lease"),
        pytest.param(
            *(Dispatch, "__call__", "self.slots.end(lease)", "pass"),
            id="a full hit ends its lease",
        ),
        pytest.param(Dispatch, "_run_resident", "self.slots.end(lease)", "pass", id="a pass ends its lease"),
        pytest.param(Dispatch, "_run_rows", "self._bind(rows)", "pass", id="the layer buffer is bound"),
        pytest.param(
            *(Dispatch, "_run_rows"),
            "self._bind(self.slots.cells.tensors if self._in_place_rows is None else self._in_place_rows)",
            *("pass",),
            id="the slots are bound again",
        ),
        pytest.param(
            *(Dispatch, "_run_layer_buffer"),
            "buffer.take(self.slots.cells, lease.slot_ids.tolist(), cached.tolist())",
            *("pass",),
            id="the layer buffer takes what is in slots",
        ),
        pytest.param(
            *(Dispatch, "_run_layer_buffer", "rows[cached] = lease.slot_ids", "pass"),
            id="behind the slots it is not asked for what they have",
        ),
        pytest.param(
            *(Dispatch, "_run_layer_buffer", "buffer.bring(absent, Cause.DEMAND, position)"),
            *("buffer.bring(distinct.tolist(), Cause.DEMAND, position)",),
            id="what is in slots is not fetched for the layer buffer",
        ),
        pytest.param(
            *(Dispatch, "_run_expert_passes"),
            *("torch.where(self._backend.to_device(mine), topk_weights, 0)", "topk_weights"),
            id="routes of other passes weigh nothing",
        ),
        pytest.param(
            *(Dispatch, "_run_token_passes", "output.index_copy_(0, rows, result)", "output[: len(rows)] = result"),
            id="token order",
        ),
        pytest.param(
            *(Dispatch, "_run_token_passes", "topk_weights[rows]", "topk_weights[: len(rows)]"),
            id="each token's weights",
        ),
        pytest.param(
            *(Dispatch, "rehearse"),
            *("self.slots.residency.require_known(np.unique(host_ids.numpy().view(np.uint32)))", "pass"),
            id="a rehearsal checks its ids too",
        ),
        pytest.param(
            *(Dispatch, "rehearse"),
            "self._kernel(x, topk_weights, self._backend.to_device(host_ids % self.slots.cells.cell_count))",
            *("self(x, topk_weights, topk_ids)",),
            id="a rehearsal leaves the slots alone",
        ),
        pytest.param(
            *(Dispatch, "rehearse"),
            "self._run_rows(self.buffer.cells.tensors, x, topk_weights, host_ids)",
            "self._run_layer_buffer(x, topk_weights, host_ids, np.unique(host_ids.numpy()).astype(np.int64), 0.0)",
            id="a rehearsal fetches nothing into the layer buffer",
        ),
        pytest.param(
            *(Dispatch, "rehearse", "host_ids % self.slots.cells.cell_count", "host_ids"),
            id="a rehearsal stays in the slots",
        ),
        pytest.param(Dispatch, "rehearse", "self._backend.is_host and ", "", id="a device cannot read homes"),
        pytest.param(
            Dispatch, "rehearse", "if not host_ids.numel():", "if False:", id="an empty batch rehearses nothing"
        ),
        # Slots
        pytest.param(
            *(SlotCache, "_begin", "holds.append(hold)", "self.residency.release(hold)"),
            id="what a pass has is held while it fetches the rest",
        ),
        pytest.param(
            *(SlotCache, "_begin", "promote(filling.fetch, Cause.DEMAND, deadline)"),
            "promote(filling.fetch, Cause.PREFETCH, deadline)",
            id="a prefetch that is waited for is as urgent as that",
        ),
        pytest.param(
            *(SlotCache, "hold_resident", "self._give_up(awaited)\n            self._end(holds)"),
            "self._give_up(awaited)",
            id="and holds nothing any more",
        ),
        pytest.param(
            *(SlotCache, "_give_up", "self.residency.abort_fill(filling.slot_id)"),
            "self.residency.complete_fill(filling.slot_id)",
            id="no half slab is resident",
        ),
        pytest.param(SlotCache, "_end", "self.residency.release(lease)", "pass", id="a hold ends"),
    ],
)
def test_the_dispatch_property_notices_a_dispatch_without(
    monkeypatch: pytest.MonkeyPatch, owner: Owner, name: str, guard: str, instead: str
) -> None:
    take_out(monkeypatch, owner, name, guard, instead)
    with pytest.raises(_BITES):
        search(test_dispatch.check_scenario, test_dispatch.scenarios())


@pytest.mark.parametrize(
    ("owner", "name", "guard", "instead"),
    [
        # What others do to slots meanwhile
        pytest.param(
            *(SlotCache, "hold_resident", "holds.append(lease)", "self.residency.release(lease)"),
            id="what has arrived for a pass is held until its kernel has read it",
        ),
        pytest.param(
            *(SlotCache, "_settle", "if filling.is_awaited:", "if False:"),
            id="what a forward waits for is left to it",
        ),
        pytest.param(
            *(SlotCache, "_settle", "elif filling.fetch.is_over:", "elif False:"),
            id="a slot whose prefetch was given up is free",
        ),
        pytest.param(
            *(SlotCache, "prefetch", "self._absent(np.fromiter(dict.fromkeys(expert_ids), "),
            "list(np.fromiter(dict.fromkeys(expert_ids), ",
            id="what is here or on its way is not fetched",
        ),
        pytest.param(
            *(SlotCache, "look_ahead", "self._absent(expert_ids)", "expert_ids.tolist()"), id="nor looked ahead for"
        ),
        pytest.param(
            *(SlotCache, "hold_resident", "self._give_up(awaited)", "pass"),
            id="a failed pass frees its slots",
        ),
        pytest.param(SlotCache, "settle", "self._count()", "pass", id="slots are counted"),
        # Layer buffers
        pytest.param(LayerBuffer, "claim", "self.abandon()", "pass", id="another layer's slabs are not this one's"),
        pytest.param(Dispatch, "_run_layer_buffer", "buffer.claim(self.home)", "pass", id="a layer claims the buffer"),
        pytest.param(
            *(Dispatch, "_bring_following", "not self._helper.is_up or ", ""),
            id="nothing is brought ahead without somebody who copies",
        ),
    ],
)
def test_the_property_of_layers_notices_an_engine_without(
    monkeypatch: pytest.MonkeyPatch, owner: Owner, name: str, guard: str, instead: str
) -> None:
    take_out(monkeypatch, owner, name, guard, instead)
    with pytest.raises(_BITES):
        search(test_layers.check_story, test_layers.stories())


@pytest.mark.parametrize(
    ("check", "owner", "name", "guard", "instead"),
    [
        pytest.param(
            *(test_layers.check_relinquishing, SlotCache, "relinquish", "filling.is_awaited = False", "pass"),
            id="what was begun and not needed is somebody's again",
        ),
        pytest.param(
            *(test_layers.check_relinquishing, Dispatch, "_slow", "self.slots.relinquish()", "pass"),
            id="also when the kernel fails",
        ),
        pytest.param(
            *(test_layers.check_joining, SlotCache, "_begin", "filling.is_awaited = True", "pass"),
            id="a joined prefetch is left to the forward",
        ),
        pytest.param(
            *(test_layers.check_trying_again, SlotCache, "_begin", "self._give_up({expert_id: filling})"),
            *("pass",),
            id="a slab that failed ahead gives its slot back",
        ),
        pytest.param(
            *(test_layers.check_trying_again, SlotCache, "_begin", "filling = None"),
            *("pass",),
            id="and is begun anew",
        ),
        pytest.param(
            *(test_layers.check_looking_ahead_for_a_pass, SlotCache, "look_ahead", ", is_urgent=False", ""),
            id="looking ahead takes no slot that is needed before",
        ),
        pytest.param(
            *(test_layers.check_victim, SlotCache, "_give_up"),
            *("self._mover.cancel([filling.fetch for filling in fillings.values()])", "pass"),
            id="nothing writes to a slot that was freed",
        ),
        pytest.param(
            *(test_layers.check_victim, SlotCache, "_take_slot", "victim = max(", "victim = min("),
            id="what is needed last is given up first",
        ),
        pytest.param(
            *(test_layers.check_claiming, LayerBuffer, "abandon"),
            *("self._mover.cancel(list(self._fetches.values()))", "pass"),
            id="nothing of another layer is still on its way",
        ),
        pytest.param(
            *(test_layers.check_looking_ahead, Dispatch, "bring_ahead", "self.buffer.claim(self.home)", "pass"),
            id="a layer claims its buffer ahead",
        ),
        pytest.param(
            *(test_layers.check_looking_ahead, Dispatch, "bring_ahead"),
            *("if distinct_count > self.slots.cells.cell_count:", "if False:"),
            id="the next layer is brought",
        ),
        pytest.param(
            *(test_layers.check_being_late, LayerBuffer, "bring"),
            "if self._mover.promote(fetch, cause, deadline):",
            "if self._mover.promote(fetch, Cause.PREFETCH, deadline):",
            id="what is needed now is urgent now",
        ),
        pytest.param(
            *(test_layers.check_being_late, LayerBuffer, "wait", "len(expected) - useful_count", "0"),
            id="what comes late is counted",
        ),
        pytest.param(
            *(test_layers.check_dropping, Dispatch, "_run_layer_buffer", "buffer.drop_all_but(absent)", "pass"),
            id="what is not needed is dropped",
        ),
        pytest.param(
            *(test_layers.check_only_buffer, Dispatch, "_bring_following", "following.buffer in (None, self.buffer)"),
            "following.buffer is None",
            id="the buffer that is in use is nobody else's",
        ),
    ],
)
def test_a_story_of_layers_notices_an_engine_without(
    monkeypatch: pytest.MonkeyPatch, check: Callable[..., None], owner: Owner, name: str, guard: str, instead: str
) -> None:
    given_to_it = (monkeypatch, PassKind.TOKEN) if inspect.signature(check).parameters.keys() >= {"monkeypatch"} else ()
    check(*given_to_it)
    take_out(monkeypatch, owner, name, guard, instead)
    with pytest.raises(_BITES):
        check(*given_to_it)


@pytest.mark.parametrize(
    ("name", "guard", "instead"),
    [
        pytest.param("_begin", "self.unused.remove(expert_id)", "pass", id="what is late is not judged again"),
        pytest.param("_count", "self.unused -= gone", "pass", id="nor what was for nothing"),
        pytest.param("_count", " and one not in self._filling", "", id="what is on its way is not lost yet"),
        pytest.param("_use", "self.unused -= used", "pass", id="nor what was useful"),
        pytest.param("visit", "self._use(routes.ravel().tolist())", "pass", id="a hit finds what was fetched ahead"),
        pytest.param("prefetch", "self.unused.add(expert_id)", "pass", id="what is fetched ahead is to be judged"),
        pytest.param("prefetch", ", is_urgent=False", "", id="what is kept is not displaced"),
        pytest.param("drop_prefetches", " and expert_id not in needed", "", id="what was needed is not dropped"),
        pytest.param("drop_prefetches", "self._mover.give_up(filling.fetch)", "pass", id="what was not is"),
        pytest.param("_settle", "elif filling.fetch.is_over:", "elif False:", id="and its slot is free"),
    ],
)
def test_the_property_of_prefetches_notices_slots_without(
    monkeypatch: pytest.MonkeyPatch, name: str, guard: str, instead: str
) -> None:
    take_out(monkeypatch, SlotCache, name, guard, instead)
    with pytest.raises(_BITES):
        search(test_prefetches.check_tale, test_prefetches.tales)


@pytest.mark.parametrize(
    ("check", "owner", "name", "guard", "instead"),
    [
        pytest.param(
            *(test_prefetches.check_arrival_in_between, SlotCache, "_begin"),
            *("self._use(expert_ids[resident].tolist())", "pass"),
            id="what arrives after the look-up was useful",
        ),
        pytest.param(
            *(test_prefetches.check_joined_prefetch, SlotCache, "drop_prefetches", "expert_id in self.unused and", ""),
            id="what a forward waits for is not dropped",
        ),
        pytest.param(
            *(test_prefetches.check_own_prefetch, SlotCache, "_begin"),
            *("missing.sort(key=self._filling.__contains__, reverse=True)", "pass"),
            id="a pass does not give up what it needs itself",
        ),
        pytest.param(
            *(test_ring.check_losing, RoutingRing, "_put", " and isinstance(entry, Sighting)", ""),
            id="after a loss the next step is whole",
        ),
        pytest.param(
            *(test_foresight.check_stall, RoutingRing, "_put", "self._is_losing and isinstance(entry, Sighting)"),
            *("False",),
            id="a step that lost a layer is lost",
        ),
        pytest.param(
            *(test_ring.check_wrapping, RoutingRing, "see", "if layer_id <= self._layer_id:", "if not layer_id:"),
            id="a forward begins with whatever layer is first",
        ),
        pytest.param(*(test_ring.check_copies, RoutingRing, "see", "x.clone()", "x"), id="inputs are copied"),
        pytest.param(
            *(test_ring.check_copies, RoutingRing, "see", "routes.copy()", "routes"), id="and so are expert ids"
        ),
        pytest.param(
            *(test_foresight.check_padding, Foresight, "_observation", "rows = slice(token_count)"),
            *("rows = slice(None)",),
            id="padding is no token",
        ),
        pytest.param(
            *(test_foresight.check_numbers, foresight, "_finite", "np.isfinite(values).all()", "True"),
            id="numbers that are none do no harm",
        ),
        pytest.param(
            *(test_foresight.check_fewer_rows, Foresight, "_take", "len(entry.expert_ids) < self._token_count"),
            *("False",),
            id="rows that are missing are noticed",
        ),
        pytest.param(
            *(test_foresight.check_unknown_expert, Foresight, "_take"),
            *("entry.expert_ids.max() >= self._expert_count", "False"),
            id="unknown experts are noticed",
        ),
        pytest.param(
            *(test_foresight.check_empty_batch, Foresight, "_take", "not self._token_count"),
            *("self._token_count is None",),
            id="an empty batch has no largest expert",
        ),
        pytest.param(
            *(test_foresight.check_draining_in_its_place, Foresight, "_take", " or not self._is_predicted", ""),
            id="a step is predicted from its beginning or not at all",
        ),
        pytest.param(
            *(test_foresight.check_full_disk, Recording, "_write", "if str(error) != self._reported:", "if True:"),
            id="a full disk is reported once",
        ),
    ],
)
def test_a_tale_of_the_sidecar_notices_an_engine_without(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    check: Callable[..., None],
    owner: Owner,
    name: str,
    guard: str,
    instead: str,
) -> None:
    fixtures = [one for one in inspect.signature(check).parameters if one in ("monkeypatch", "caplog")]
    run = partial(check, *map(request.getfixturevalue, fixtures))
    run()
    take_out(monkeypatch, owner, name, guard, instead)
    if "caplog" in fixtures:
        request.getfixturevalue("caplog").clear()
    with pytest.raises(_BITES):
        run()
