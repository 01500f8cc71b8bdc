"""`Dispatch` as a whole, with a toy kernel: whatever the slots, the result is that of the layer with all experts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.property.toy_moe import HIDDEN_SIZE, KernelFailure, Served, ToyMoe
from vllm_moecxl.data.slabs import Home, Piece
from vllm_moecxl.errors import IntegrityError, TransferError
from vllm_moecxl.types import Cause, InPlaceMode, Lookup, PassKind

Ids = list[list[int]]
Event = Literal["", "rehearsal", "fetch fails", "kernel fails", "bad id"]

torch.set_num_threads(1)


class FetchFailure(TransferError):
    """What a broken bank raises."""


@dataclass(frozen=True)
class Forward:
    """One call of the layer, and what goes wrong in it.

    Attributes:
        prefetch: experts that somebody asks for before it.
        event: what goes wrong, or happens, before it.
        when: how many fetches or kernel calls succeed before; or the id that no layer has.
        layout: how the router's ids lie in memory.
    """

    ids: Ids
    prefetch: list[int] = field(default_factory=list)
    event: Event = ""
    when: int = 0
    dtype: torch.dtype = torch.int32
    layout: Literal["plain", "transposed", "strided"] = "plain"


@dataclass(frozen=True)
class Scenario:
    """A layer, its slots, and the forwards that it serves."""

    expert_count: int
    topk: int
    slot_count: int
    pass_kind: PassKind
    has_buffer: bool
    forwards: list[Forward]
    is_host: bool = True
    in_place: InPlaceMode = "never"
    has_helper: bool = False
    is_joined: bool = False


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    expert_count = draw(st.integers(1, 8))
    topk = draw(st.integers(1, min(3, expert_count)))
    token = st.lists(st.integers(0, expert_count - 1), min_size=topk, max_size=topk)
    forward = st.builds(
        Forward,
        ids=st.lists(token, max_size=10),
        prefetch=st.lists(st.integers(0, expert_count - 1), max_size=3),
        event=st.sampled_from(["", "", "", "rehearsal", "fetch fails", "kernel fails", "bad id"]),
        when=st.integers(0, 6),
        dtype=st.sampled_from([torch.int32, torch.int32, torch.int64, torch.int16, torch.uint32]),
        layout=st.sampled_from(["plain", "plain", "transposed", "strided"]),
    )
    pass_kind = draw(st.sampled_from([PassKind.TOKEN, PassKind.EXPERT, PassKind.LAYER_BUFFER]))
    return Scenario(
        expert_count,
        topk,
        draw(st.integers(topk, expert_count)),
        pass_kind,
        pass_kind is PassKind.LAYER_BUFFER or draw(st.booleans()),
        draw(st.lists(forward, min_size=1, max_size=6)),
        is_host := draw(st.booleans()),
        draw(st.sampled_from(["never", "never", "auto"])) if is_host else "never",
        draw(st.booleans()),
        is_host and draw(st.booleans()),
    )


def as_tensor(forward: Forward, topk: int) -> torch.Tensor:
    ids = torch.tensor(forward.ids, dtype=torch.int64).view(-1, topk).to(forward.dtype)
    match forward.layout:
        case "plain":
            return ids
        case "transposed":
            return ids.t().contiguous().t()
        case "strided":
            wide = torch.zeros(ids.shape[0], 2 * topk, dtype=ids.dtype)
            wide[:, ::2] = ids
            return wide[:, ::2]


def batch_of(forward: Forward, scenario: Scenario, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = as_tensor(forward, scenario.topk)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ids.shape[0], HIDDEN_SIZE, generator=generator)
    return x, torch.rand(*ids.shape, generator=generator), ids


def break_fetches(monkeypatch: pytest.MonkeyPatch, allowed_count: int) -> None:
    """Let `allowed_count` slabs through (they are of one piece here), then fail with a slab half written."""
    read = Home.read_piece
    left = itertools.count(allowed_count, -1)

    def failing(self: Home, piece: Piece, source: int, targets: Sequence[torch.Tensor]) -> None:
        if next(left) <= 0:
            targets[0].fill_(0xFF)  # NaNs, as floats
            raise FetchFailure
        read(self, piece, source, targets)

    monkeypatch.setattr(Home, "read_piece", failing)


def check_counters(served: Served, ids: torch.Tensor, run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Run a forward and hold what it counts against what it has to count."""
    counters = served.counters
    distinct = np.unique(ids.long().numpy())
    absent_count = int(np.count_nonzero(~served.residency.resident_mask()[distinct]))
    served.mover.poll()
    before, prefetched = counters.values.copy(), set(served.slots.unused)
    output = run()
    served.mover.poll()
    delta = counters.values - before
    lookups = {outcome: int(delta[row]) for outcome, row in counters.lookup.items()}
    pass_counts = {kind: int(delta[row]) for kind, row in counters.passes.items() if delta[row]}
    assert len(pass_counts) == (1 if ids.numel() else 0)
    assert lookups[Lookup.HIT] == distinct.size - absent_count
    assert lookups[Lookup.MISS] + lookups[Lookup.PENDING] == absent_count
    fetch_bytes = sum(delta[counters.fetch_bytes["dram", cause]] for cause in Cause)
    if PassKind.TOKEN in pass_counts:  # may fetch an expert again in a later pass
        assert absent_count * served.slab_bytes <= fetch_bytes <= ids.numel() * served.slab_bytes
        assert pass_counts[PassKind.TOKEN] > 1
    elif PassKind.IN_PLACE in pass_counts:
        assert fetch_bytes == 0
    else:
        assert fetch_bytes == absent_count * served.slab_bytes
    if PassKind.EXPERT in pass_counts:
        assert pass_counts[PassKind.EXPERT] == -(-distinct.size // served.residency.slot_count)
    is_narrow = distinct.size <= served.residency.slot_count
    assert is_narrow or PassKind.SINGLE not in pass_counts
    if is_narrow and not served.helper.is_up:
        assert pass_counts.keys() <= {PassKind.SINGLE, PassKind.IN_PLACE}
    assert (delta[counters.stall_ns] > 0) == (fetch_bytes > 0)
    assert sum(delta[row] for row in counters.prefetch.values()) == len(prefetched - served.slots.unused)
    return output


def check_forward(served: Served, scenario: Scenario, forward: Forward, seed: int) -> None:
    x, weights, ids = batch_of(forward, scenario, seed)
    served.spoil_layer_buffer()
    served.slots.prefetch(forward.prefetch, deadline=1.0)
    output = check_counters(served, ids, lambda: served.dispatch(x, weights, ids))
    expected = served.toy.direct(x, weights, ids)
    if scenario.pass_kind is PassKind.EXPERT:
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-3)
    else:
        assert torch.equal(output, expected)


def check_rehearsal(served: Served, scenario: Scenario, forward: Forward) -> None:
    """A forward that no request asked for: of the right shape, right where homes can be read, and without a trace."""
    x, weights, ids = batch_of(forward, scenario, seed=99)
    served.spoil_layer_buffer()
    before = (served.counters.values.copy(), served.residency.resident_mask())
    with pytest.MonkeyPatch.context() as monkeypatch:
        break_fetches(monkeypatch, 0)  # a start that waited for the whole bank would be one fetch too many
        output = served.dispatch.rehearse(x, weights, ids)
    expected = served.toy.direct(x, weights, ids)
    assert output.shape == expected.shape and output.dtype == expected.dtype
    if scenario.is_host:
        assert torch.equal(output, expected)
    assert np.array_equal(before[0], served.counters.values)
    assert np.array_equal(before[1], served.residency.resident_mask())


def check_failure(served: Served, forward: Forward, ids: torch.Tensor) -> None:
    """Run a forward in which something goes wrong; it may also get through, if what fails is not reached."""
    x, weights = torch.ones(ids.shape[0], HIDDEN_SIZE), torch.ones(ids.shape)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if forward.event == "fetch fails":
            break_fetches(monkeypatch, forward.when)
        else:
            served.toy.calls_until_failure = forward.when
        is_up, bank_up = 1, served.counters.bank_up["dram"]
        try:
            served.dispatch(x, weights, ids)
        except FetchFailure:
            is_up = 0
        except KernelFailure:
            pass
        finally:
            served.toy.calls_until_failure = None
        assert served.counters.values[bank_up] == is_up, "metrics tell of a bank that cannot be read, and of no other"
        served.counters.values[bank_up] = 1


def check_bad_id(served: Served, scenario: Scenario, forward: Forward, ids: torch.Tensor) -> None:
    """An id that the layer does not have, in any place and among any others, is refused before anything changes."""
    if not ids.numel() or ids.dtype in (torch.int16, torch.uint32):
        return
    past = [scenario.expert_count + forward.when, -1 - forward.when, (1 << 31) - 1, -(1 << 31)]
    wrong = past + ([(1 << 32) + forward.when, -(1 << 32)] if ids.dtype is torch.int64 else [])
    before = (served.counters.values.copy(), served.residency.resident_mask())
    x, weights = torch.ones(ids.shape[0], HIDDEN_SIZE), torch.ones(ids.shape)
    for place, expert_id in enumerate(wrong):
        bad = ids.clone()
        bad[place % ids.shape[0], place % ids.shape[1]] = expert_id
        with pytest.raises(IntegrityError, match=f"of a layer with {scenario.expert_count} experts"):
            served.dispatch(x, weights, bad)
        with pytest.raises(IntegrityError):
            served.dispatch.rehearse(x, weights, bad)
    assert np.array_equal(before[0], served.counters.values)
    assert np.array_equal(before[1], served.residency.resident_mask())


def check_scenario(scenario: Scenario) -> None:
    toy = ToyMoe(scenario.expert_count, seed=scenario.slot_count)
    served = Served(
        toy,
        scenario.slot_count,
        scenario.pass_kind,
        has_buffer=scenario.has_buffer,
        is_joined=scenario.is_joined,
        is_host=scenario.is_host,
        in_place=scenario.in_place,
        copies_are_slow=True,
    )
    served.helper.is_up = scenario.has_helper
    for seed, forward in enumerate(scenario.forwards):
        ids = as_tensor(forward, scenario.topk)
        match forward.event:
            case "":
                pass
            case "rehearsal":
                check_rehearsal(served, scenario, forward)
            case "bad id":
                check_bad_id(served, scenario, forward, ids)
            case _:
                check_failure(served, forward, ids)
        served.check()
        check_forward(served, scenario, forward, seed)
        served.check()


@settings(max_examples=250)
@given(scenarios())
def test_the_output_is_that_of_all_experts_whatever_the_slots_and_whatever_went_wrong_before(
    scenario: Scenario,
) -> None:
    check_scenario(scenario)


@pytest.mark.parametrize("pass_kind", [PassKind.TOKEN, PassKind.EXPERT, PassKind.LAYER_BUFFER])
@pytest.mark.parametrize("slot_count", [2, 3, 5, 8])
def test_each_kind_of_pass_serves_a_wide_forward(pass_kind: PassKind, slot_count: int) -> None:
    """The pass kinds are really taken: hypothesis alone would not tell if a scenario never reached one."""
    served = Served(ToyMoe(8, seed=1), slot_count, pass_kind, has_buffer=pass_kind is PassKind.LAYER_BUFFER)
    scenario = Scenario(8, 2, slot_count, pass_kind, pass_kind is PassKind.LAYER_BUFFER, [])
    check_forward(served, scenario, Forward([[0, 1], [2, 3], [4, 5], [6, 7]]), seed=3)
    served.check()
    taken = [kind for kind, row in served.counters.passes.items() if served.counters.values[row]]
    assert taken == [PassKind.SINGLE if slot_count == 8 else pass_kind]


def test_token_passes_give_way_to_the_layer_buffer_where_it_copies_less() -> None:
    served = Served(ToyMoe(6, seed=1), 2, PassKind.TOKEN, has_buffer=True)
    all_pairs = [[a, b] for a in range(6) for b in range(a)]
    check_forward(served, Scenario(6, 2, 2, PassKind.TOKEN, True, []), Forward(all_pairs), seed=4)
    values, passes = served.counters.values, served.counters.passes
    assert values[passes[PassKind.LAYER_BUFFER]] == 1 and values[passes[PassKind.TOKEN]] == 0
    before = served.residency.resident_mask()
    assert before.sum() == 2, "slots that were never filled are, once"
    others = [[a, b] for a in range(6) for b in range(a) if not before[[a, b]].any()]
    check_forward(served, Scenario(6, 2, 2, PassKind.TOKEN, True, []), Forward(others), seed=5)
    assert values[passes[PassKind.LAYER_BUFFER]] == 2
    assert np.array_equal(before, served.residency.resident_mask()), "the slots of the decode are left alone"


def test_an_empty_batch_gives_an_empty_output_and_counts_nothing() -> None:
    served = Served(ToyMoe(4, seed=1), 2, PassKind.TOKEN)
    before = served.counters.values.copy()
    output = served.dispatch(torch.ones(0, HIDDEN_SIZE), torch.ones(0, 2), torch.ones(0, 2, dtype=torch.int32))
    assert output.shape == (0, HIDDEN_SIZE)
    assert np.array_equal(before, served.counters.values)


def test_a_full_hit_fetches_nothing_and_calls_the_kernel_once() -> None:
    served = Served(ToyMoe(4, seed=1), 2, PassKind.TOKEN)
    scenario = Scenario(4, 2, 2, PassKind.TOKEN, False, [])
    check_forward(served, scenario, Forward([[3, 1]]), seed=1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        break_fetches(monkeypatch, 0)
        served.toy.calls_until_failure = 1
        check_forward(served, scenario, Forward([[1, 3], [3, 3], [1, 1]]), seed=2)
