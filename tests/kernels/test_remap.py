"""Routes to slots, against plain Python."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moecxl_kernels.remap import remap, remap_pass

from tests.kernels.stage import int32

_CANARY = -77
id_dtypes = st.sampled_from([torch.int32, torch.int64])


@st.composite
def slot_tables(draw: st.DrawFn) -> list[int]:
    """Slot of each expert; some have none."""
    expert_count = draw(st.one_of(st.integers(1, 9), st.sampled_from([60, 64, 256, 1000])))
    slot_ids = draw(st.permutations(range(expert_count)))
    resident_count = draw(st.one_of(st.just(0), st.just(expert_count), st.integers(0, expert_count)))
    return [slot_id if slot_id < resident_count else -1 for slot_id in slot_ids]


def route_lists(expert_count: int, max_size: int) -> st.SearchStrategy[list[int]]:
    unknown = st.sampled_from([-1, -(2**31), expert_count, 2**31 - 1])
    return st.lists(st.one_of(st.integers(0, expert_count - 1), unknown), max_size=max_size)


def guarded(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A buffer of canaries, and the [count] int32 between them, which begins anywhere."""
    buffer = torch.full((count + 9,), _CANARY, dtype=torch.int32)
    return buffer, buffer[5 : 5 + count]


@settings(max_examples=80, deadline=None)
@given(st.data(), slot_tables(), id_dtypes, st.integers(1, 10), st.booleans())
def test_routes_get_their_slots_and_others_a_slot_that_holds_an_expert(
    data: st.DataObject, slot_of: list[int], dtype: torch.dtype, k: int, has_padding: bool
) -> None:
    flat = data.draw(route_lists(len(slot_of), 80 * k))
    flat = flat[: len(flat) // k * k]
    ids = torch.tensor(flat, dtype=dtype).view(-1, k)
    padding = data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))) if has_padding else None
    buffer, middle = guarded(len(flat))
    table = int32(slot_of)

    remap(ids, None if padding is None else torch.tensor(padding, dtype=torch.bool), table, middle.view(-1, k))

    check_slots(flat, [padding is not None and padding[route // k] for route in range(len(flat))], slot_of, middle)
    assert (buffer[:5] == _CANARY).all() and (buffer[5 + len(flat) :] == _CANARY).all()
    assert table.tolist() == slot_of


def check_slots(flat: Sequence[int], is_padding: Sequence[bool], slot_of: Sequence[int], out: torch.Tensor) -> None:
    taken = {slot_id for slot_id in slot_of if slot_id >= 0} or {0}
    for expert_id, is_unused, slot_id in zip(flat, is_padding, out.tolist(), strict=True):
        slot = slot_of[expert_id] if 0 <= expert_id < len(slot_of) and not is_unused else -1
        assert slot_id == slot if slot >= 0 else slot_id in taken


@settings(max_examples=80, deadline=None)
@given(
    st.data(),
    slot_tables(),
    id_dtypes,
    st.integers(1, 8),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_a_pass_keeps_its_own_routes_and_weighs_the_others_nothing(
    data: st.DataObject, slot_of: list[int], dtype: torch.dtype, k: int, weight_dtype: torch.dtype
) -> None:
    flat = data.draw(route_lists(len(slot_of), 80 * k))
    flat = flat[: len(flat) // k * k]
    weights = torch.rand((len(flat) // k, k), generator=torch.Generator().manual_seed(len(flat))) + 0.5
    weights = weights.to(weight_dtype)
    in_pass = data.draw(st.lists(st.booleans(), min_size=len(slot_of), max_size=len(slot_of)))
    members = [slot if is_in else -1 for slot, is_in in zip(slot_of, in_pass, strict=True)]

    slot_ids, kept = remap_pass(
        torch.tensor(flat, dtype=dtype).view(-1, k), weights, int32(slot_of), torch.tensor(in_pass)
    )

    assert slot_ids.dtype == torch.int32 and kept.dtype == weight_dtype and slot_ids.shape == kept.shape
    check_slots(flat, [False] * len(flat), members, slot_ids.view(-1))
    is_member = torch.tensor([0 <= e < len(slot_of) and members[e] >= 0 for e in flat], dtype=torch.bool).view(-1, k)
    assert torch.equal(kept, torch.where(is_member, weights, 0))


def test_passes_over_all_experts_give_each_route_its_weight_once() -> None:
    slot_of = int32(torch.randperm(12, generator=torch.Generator().manual_seed(3)).tolist())
    ids = torch.randint(0, 12, (700, 4), generator=torch.Generator().manual_seed(4))
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(5))
    total = torch.zeros_like(weights)
    for remainder in range(3):
        total += remap_pass(ids, weights, slot_of, torch.arange(12) % 3 == remainder)[1]
    assert torch.equal(total, weights)


@pytest.mark.parametrize("bad", ["ids", "table", "out", "padding"])
def test_wrong_tensors_are_our_bug(bad: str) -> None:
    ids = torch.zeros((2, 3), dtype=torch.int16 if bad == "ids" else torch.int32)
    table = torch.zeros(4, dtype=torch.int64 if bad == "table" else torch.int32)
    out = torch.zeros((3, 2) if bad == "out" else (2, 3), dtype=torch.int32)
    padding = torch.zeros(3 if bad == "padding" else 2, dtype=torch.bool)
    with pytest.raises(AssertionError):
        remap(ids, padding, table, out)
