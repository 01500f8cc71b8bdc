"""Slabs, homes, cells and banks: every extent of an expert moves, bit by bit, whatever its type and shape."""

import gc
import itertools

import pytest
import torch
from moecxl_kernels.host import copy_rows

from vllm_moecxl.config import BankSpec
from vllm_moecxl.data.banks import DramBank, make_bank
from vllm_moecxl.data.devices import CpuBackend, make_backend
from vllm_moecxl.data.slabs import Cells, Extent, Home, SlabLayout
from vllm_moecxl.errors import CapacityError

DTYPES = [torch.uint8, torch.int8, torch.int32, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
ROW_SHAPES: list[tuple[int, ...]] = [(), (1,), (3,), (5, 7), (2, 3, 129)]


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """A tensor of random bytes: every bit pattern has to survive, NaNs too."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8, generator=generator)
    return raw.view(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert torch.equal(bits(actual), bits(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row_shape", ROW_SHAPES, ids=str)
def test_rows_are_copied_bit_by_bit_and_nothing_else_is_touched(row_shape: tuple[int, ...], dtype: torch.dtype) -> None:
    source = random_bits((6, *row_shape), dtype, seed=1)
    target = random_bits((4, *row_shape), dtype, seed=2)
    before = target.clone()
    copy_rows([source], [5, 0], [target], [1, 3])
    for cell_id, expected in enumerate((before[0], source[5], before[2], source[0])):
        assert_same_bits(target[cell_id], expected)


def test_a_copy_of_unequal_numbers_of_rows_is_our_bug() -> None:
    rows = torch.zeros(3, 2)
    with pytest.raises(AssertionError):
        copy_rows([rows], [0, 1], [rows.clone()], [0])
    with pytest.raises(AssertionError):
        copy_rows([rows], [0], [rows.clone(), rows.clone()], [0])


def layer(expert_count: int = 6) -> dict[str, torch.Tensor]:
    """A layer with a tensor of every type and shape."""
    parts = enumerate(itertools.product(DTYPES, ROW_SHAPES))
    return {f"t{i}": random_bits((expert_count, *shape), dtype, seed=i) for i, (dtype, shape) in parts}


def test_slab_bytes_are_the_sum_of_every_tensors_row() -> None:
    tensors = layer()
    layout = SlabLayout.of(tensors)
    assert layout.slab_bytes * 6 == sum(tensor.nbytes for tensor in tensors.values())
    assert layout.extents[3] == Extent("t3", (5, 7), torch.uint8)
    assert Home.store(DramBank(), tensors).slab_bytes == layout.slab_bytes


def test_layouts_agree_only_with_equal_names_shapes_and_types() -> None:
    base = SlabLayout.of({"w": torch.zeros(4, 2, 3)})
    assert base == SlabLayout.of({"w": torch.ones(9, 2, 3)})
    assert hash(base) == hash(SlabLayout.of({"w": torch.ones(9, 2, 3)}))
    for other in ({"v": torch.zeros(4, 2, 3)}, {"w": torch.zeros(4, 3, 2)}, {"w": torch.zeros(4, 2, 3).half()}):
        assert base != SlabLayout.of(other)


def test_a_home_owns_copies_and_takes_the_sources_away() -> None:
    tensors = layer()
    originals = {name: tensor.clone() for name, tensor in tensors.items()}
    sources = list(tensors.values())
    home = Home.store(DramBank(), tensors)
    assert not tensors
    for source in sources:
        bits(source).zero_()
    for stored, expected in zip(home.tensors, originals.values(), strict=True):
        assert stored.is_contiguous()
        assert_same_bits(stored, expected)


def test_a_home_straightens_a_source_that_is_not_contiguous() -> None:
    source = torch.arange(24.0).view(4, 2, 3).transpose(1, 2)
    home = Home.store(DramBank(), {"w": source})
    assert home.tensors[0].is_contiguous()
    assert torch.equal(home.tensors[0], source)


def test_a_fetch_moves_every_extent_of_an_expert() -> None:
    tensors = layer()
    originals = list(tensors.values())
    layout = SlabLayout.of(tensors)
    home = Home.store(DramBank(), tensors)
    cells = Cells(layout, 3, CpuBackend())
    assert not any(bits(tensor).any() for tensor in cells.tensors), "an empty cell holds zeros"
    cells.fetch(home, [4, 1], [2, 0])
    for stored, original in zip(cells.tensors, originals, strict=True):
        assert_same_bits(stored[2], original[4])
        assert_same_bits(stored[0], original[1])
        assert not bits(stored[1]).any()


def test_cells_take_slabs_from_other_cells() -> None:
    tensors = layer()
    originals = list(tensors.values())
    layout = SlabLayout.of(tensors)
    slots, buffer = Cells(layout, 2, CpuBackend()), Cells(layout, 6, CpuBackend())
    slots.fetch(Home.store(DramBank(), tensors), [3, 5], [0, 1])
    buffer.take(slots, [1, 0], [5, 3])
    for stored, original in zip(buffer.tensors, originals, strict=True):
        assert_same_bits(stored[5], original[5])
        assert_same_bits(stored[3], original[3])


def test_a_full_bank_refuses_with_its_name_and_counts_only_what_it_gave() -> None:
    bank = make_bank(BankSpec("dram", capacity_bytes=100))
    bank.allocate((10, 5), torch.int16)
    with pytest.raises(CapacityError, match="bank dram holds 100 B, has 100 B in use and cannot take 1 B more: raise"):
        bank.allocate((1,), torch.uint8)
    assert bank.used_bytes == 100


def test_a_bank_without_a_limit_keeps_count() -> None:
    bank = make_bank(BankSpec("dram"))
    bank.allocate((1000, 3), torch.float64)
    assert bank.used_bytes == 24_000 and bank.name == bank.tier == "dram"


def test_memory_lives_as_long_as_a_view_of_it() -> None:
    view = DramBank().allocate((1024, 1024), torch.int32).fill_(3)[7]
    gc.collect()
    assert (view == 3).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16, torch.uint32], ids=str)
def test_route_ids_are_contiguous_int32_whatever_the_router_gives(dtype: torch.dtype) -> None:
    ids = torch.arange(12).to(dtype).view(3, 4)
    for given in (ids, ids.t(), ids[:, ::2], ids[:0]):
        got = CpuBackend().route_ids(given)
        assert got.dtype is torch.int32 and got.is_contiguous()
        assert got.tolist() == given.tolist()


def test_int32_route_ids_are_not_copied() -> None:
    ids = torch.zeros(3, 2, dtype=torch.int32)
    assert CpuBackend().route_ids(ids) is ids


@pytest.mark.parametrize("wrong", [1 << 32, (1 << 32) + 3, -(1 << 32), 1 << 31, -1])
def test_a_wide_id_never_wraps_around_to_an_expert(wrong: int) -> None:
    assert CpuBackend().route_ids(torch.tensor([[wrong]])).numpy().view("uint32").item() >= (1 << 31) - 1


def test_a_host_device_hands_tensors_through() -> None:
    backend = make_backend(torch.device("cpu"))
    tensor = torch.zeros(2)
    assert backend.is_host and backend.to_device(tensor) is tensor and backend.free_bytes() > 0
