"""The gather: it copies what it is told to, each byte once, and touches nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moecxl_kernels.gather import BLOCK_BYTES, copy_cells, gather_slabs, slab_map

from tests.kernels.stage import Part, Stage, int32
from tests.kernels.traffic import traffic

sizes = st.one_of(
    st.sampled_from([0, 1, 3, 15, 16, 17, 48, 1024, 1025]),
    st.sampled_from([BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 2 * BLOCK_BYTES + 16, 3 * BLOCK_BYTES + 7]),
    st.integers(0, 5000),
)
shifts = st.one_of(st.just(0), st.integers(0, 15))
gaps = st.one_of(st.just(0), st.integers(0, 40))
parts = st.builds(Part, sizes, shifts, shifts, gaps, gaps)


@st.composite
def copy_lists(draw: st.DrawFn, expert_count: int, slot_count: int) -> list[tuple[int, int]]:
    slot_ids = draw(st.lists(st.integers(0, slot_count - 1), unique=True, max_size=slot_count))
    return [(draw(st.integers(0, expert_count - 1)), slot_id) for slot_id in slot_ids]


def gather(stage: Stage, copies: Sequence[tuple[int, int]], program_count: int) -> None:
    """Gather, with a list longer than what counts of it."""
    rest = [(2**31 - 1, 2**31 - 1)] * 2
    gather_slabs(int32([*copies, *rest], -1, 2), int32([len(copies)]), stage.slabs, program_count)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_slabs_of_any_shape_arrive_and_nothing_else_changes(data: st.DataObject) -> None:
    expert_count, slot_count = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    stage = Stage(data.draw(st.lists(parts, max_size=5)), expert_count, slot_count)
    copies = data.draw(copy_lists(expert_count, slot_count))
    gather(stage, copies, data.draw(st.integers(1, 9)))
    stage.check(copies)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_each_byte_is_read_once_and_written_once(data: st.DataObject) -> None:
    stage = Stage(data.draw(st.lists(parts, min_size=1, max_size=4)), 4, 3)
    copies = data.draw(copy_lists(4, 3))
    with traffic() as seen:
        gather(stage, copies, 3)
    for homes, slots in zip(stage.homes, stage.slots, strict=True):
        readers = [sum(expert_id == row for expert_id, _ in copies) for row in range(4)]
        writers = [sum(slot_id == row for _, slot_id in copies) for row in range(3)]
        for rows, counts, expected in (
            (homes, seen.reads_of(homes.buffer), readers),
            (slots, seen.writes_of(slots.buffer), writers),
        ):
            before = rows.view.storage_offset()
            for row, times in enumerate(expected):
                first = before + row * rows.stride
                assert (counts[first : first + rows.view.shape[1]] == times).all()
                counts[first : first + rows.view.shape[1]] = 0
            assert not counts.any()


@settings(max_examples=30, deadline=None)
@given(st.lists(parts, min_size=1, max_size=3))
def test_words_are_moved_only_where_both_sides_are_aligned_to_128_bits(drawn: list[Part]) -> None:
    stage = Stage(drawn, 3, 3)
    copies = [(0, 2), (1, 1), (2, 0)]
    with traffic() as seen:
        gather(stage, copies, 2)
    for homes, slots in zip(stage.homes, stage.slots, strict=True):
        assert all(address % 16 == 0 for address in seen.words_of(homes.buffer) + seen.words_of(slots.buffer))
        is_bulk = homes.view.shape[1] >= 16 and any(
            (homes.address + expert_id * homes.stride) % 16 == (slots.address + slot_id * slots.stride) % 16 == 0
            for expert_id, slot_id in copies
        )
        assert bool(seen.words_of(slots.buffer)) == is_bulk


def tensors(expert_count: int, seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """Experts of some formats: every tensor of a quantised MoE layer, [experts, ...]."""
    random = torch.Generator().manual_seed(seed)

    def bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        byte_count = torch.empty((), dtype=dtype).itemsize
        raw = torch.randint(0, 256, (expert_count, *shape[:-1], shape[-1] * byte_count), generator=random)
        return raw.to(torch.uint8).view(dtype)

    return {
        "bfloat16 with biases": {
            "w13": bits(torch.bfloat16, 96, 40),
            "w2": bits(torch.bfloat16, 40, 48),
            "w13_bias": bits(torch.bfloat16, 96),
            "w2_bias": bits(torch.bfloat16, 40),
        },
        "float8, scales of blocks": {
            "w13": bits(torch.float8_e4m3fn, 128, 136),
            "w2": bits(torch.float8_e4m3fn, 136, 64),
            "w13_scale": bits(torch.float32, 1, 2),
            "w2_scale": bits(torch.float32, 2, 1),
        },
        "int4 with zero points": {
            "w13_packed": bits(torch.uint8, 130, 33),
            "w2_packed": bits(torch.uint8, 66, 65),
            "w13_scale": bits(torch.float8_e4m3fn, 3),
            "w2_scale": bits(torch.float8_e4m3fn, 5),
            "w13_zeros": bits(torch.int8, 3),
            "w13_shape": bits(torch.int32, 2),
        },
        "int32 packed": {
            "w13_qweight": bits(torch.int32, 16, 24),
            "w2_qweight": bits(torch.int32, 8, 12),
            "w13_scales": bits(torch.float16, 4, 24),
            "w2_scales": bits(torch.float16, 2, 12),
            "g_idx": bits(torch.int32, 1, 1),
            "shape": bits(torch.int64, 2),
        },
    }


@pytest.mark.parametrize("name", tensors(1, 0))
def test_every_tensor_of_a_quantised_slab_moves(name: str) -> None:
    homes = tensors(7, seed=1)[name]
    slots = {key: torch.zeros((4, *tensor.shape[1:]), dtype=tensor.dtype) for key, tensor in homes.items()}
    row_bytes = [tensor[0].nbytes for tensor in homes.values()]
    slabs = slab_map(
        [[tensor[expert_id].data_ptr() for tensor in homes.values()] for expert_id in range(7)],
        [tensor.data_ptr() for tensor in slots.values()],
        row_bytes,
        row_bytes,
        "cpu",
    )
    gather_slabs(int32([[6, 0], [3, 2], [5, 3]], 3, 2), int32([3]), slabs, 4)
    for key, tensor in homes.items():
        there = slots[key].view(torch.uint8)
        for expert_id, slot_id in ((6, 0), (3, 2), (5, 3)):
            assert torch.equal(there[slot_id], tensor.view(torch.uint8)[expert_id]), key
        assert not there[1].any(), "a slot that nobody named"


def test_the_parts_of_a_stripe_take_turns() -> None:
    block_count = 4
    slabs = slab_map([[0, 0]], [0, 0], [1 << 30] * 2, [block_count * BLOCK_BYTES, 2 * block_count * BLOCK_BYTES], "cpu")
    segments = slabs.blocks[:, 0].tolist()
    assert [sorted(segments[turn : turn + 3]) for turn in range(0, 3 * block_count, 3)] == [[0, 1, 1]] * block_count


@settings(max_examples=30, deadline=None)
@given(st.lists(parts, max_size=3), st.data())
def test_cells_are_compacted_within_their_buffer(drawn: list[Part], data: st.DataObject) -> None:
    stage = Stage(drawn, 6, 6)
    gather(stage, [(cell, cell) for cell in range(6)], 2)
    stage.check([(cell, cell) for cell in range(6)])
    order = data.draw(st.permutations(range(6)))
    moves = list(zip(order[:3], order[3:], strict=True))[: data.draw(st.integers(0, 3))]
    copy_cells(int32(moves, -1, 2), int32([len(moves)]), stage.slabs, 6, 2)
    came_from = dict(enumerate(range(6))) | {target: source for source, target in moves}
    stage.check([(source, target) for target, source in came_from.items()])
