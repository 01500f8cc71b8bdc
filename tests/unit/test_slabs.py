"""Slabs, homes and cells: every extent of an expert moves, bit by bit, whatever its type, its shape and its banks."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from moecxl_kernels.host import copy_rows

from tests.support.homes import PROFILE, WHOLE, assert_same_bits, bits, dram, fetch, random_bits, store
from tests.support.slabfiles import Contents, pack
from vllm_moecxl.config import Verify
from vllm_moecxl.control.placement import Part, Route
from vllm_moecxl.data.banks.base import Bank
from vllm_moecxl.data.banks.file import FileBank
from vllm_moecxl.data.banks.memory import DramBank
from vllm_moecxl.data.devices.cpu import CpuBackend
from vllm_moecxl.data.devices.make import make_backend
from vllm_moecxl.data.layout import Extent, SlabLayout
from vllm_moecxl.data.slabs import STRIPE_GRANULE_BYTES, Cells, Home, HomeBuilder
from vllm_moecxl.errors import CapacityError, IntegrityError

DTYPES = [torch.uint8, torch.int8, torch.int32, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
ROW_SHAPES: list[tuple[int, ...]] = [(), (1,), (3,), (5, 7), (2, 3, 129)]


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
    assert store(tensors).slab_bytes == layout.slab_bytes


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
    home = store(tensors)
    assert not tensors
    for source in sources:
        bits(source).zero_()
    assert home.tensors is not None and home.is_direct
    for stored, expected in zip(home.tensors, originals.values(), strict=True):
        assert stored.is_contiguous()
        assert_same_bits(stored, expected)


def test_a_source_that_is_not_contiguous_is_our_bug() -> None:
    with pytest.raises(AssertionError):
        store({"w": torch.arange(24.0).view(4, 2, 3).transpose(1, 2)})


def test_a_fetch_moves_every_extent_of_an_expert() -> None:
    tensors = layer()
    originals = list(tensors.values())
    layout = SlabLayout.of(tensors)
    home = store(tensors)
    cells = Cells(layout, 3, CpuBackend())
    assert not any(bits(tensor).any() for tensor in cells.tensors), "an empty cell holds zeros"
    fetch(home, cells, [4, 1], [2, 0])
    for stored, original in zip(cells.tensors, originals, strict=True):
        assert_same_bits(stored[2], original[4])
        assert_same_bits(stored[0], original[1])
        assert not bits(stored[1]).any()


def test_cells_take_slabs_from_other_cells() -> None:
    tensors = layer()
    originals = list(tensors.values())
    layout = SlabLayout.of(tensors)
    slots, buffer = Cells(layout, 2, CpuBackend()), Cells(layout, 6, CpuBackend())
    fetch(store(tensors), slots, [3, 5], [0, 1])
    buffer.take(slots, [1, 0], [5, 3])
    for stored, original in zip(buffer.tensors, originals, strict=True):
        assert_same_bits(stored[5], original[5])
        assert_same_bits(stored[3], original[3])


def test_memory_lives_as_long_as_a_view_of_it() -> None:
    view = dram().allocate((1024, 1024), torch.int32).fill_(3)[7]
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


#: Rows shorter and longer than a stripe's granule, odd and even, and a scale for each expert.
RAGGED = (1, 7, STRIPE_GRANULE_BYTES - 1, STRIPE_GRANULE_BYTES, 3 * STRIPE_GRANULE_BYTES + 5, 100_003)
EXPERT_COUNT = 6
STRIPE_OF_TWO: Route = (Part(0, 0.3), Part(1, 0.7))
STRIPE_OF_THREE: Route = (Part(2, 0.25), Part(0, 0.5), Part(1, 0.25))


def ragged_layer() -> dict[str, torch.Tensor]:
    tensors = {f"r{n}": random_bits((EXPERT_COUNT, n), torch.uint8, n) for n in RAGGED}
    return {**tensors, "scale": random_bits((EXPERT_COUNT,), torch.float32, 7)}


def assert_reads_back(home: Home, originals: dict[str, torch.Tensor], expert_ids: Sequence[int]) -> None:
    """Each slab is what was stored."""
    for expert_id in expert_ids:
        target = [torch.full((extent.row_bytes,), 0xAA, dtype=torch.uint8) for extent in home.layout.extents]
        home.read(expert_id, target)
        for row, original in zip(target, originals.values(), strict=True):
            assert torch.equal(row, bits(original[expert_id]))


ROUTES: dict[str, list[Route]] = {
    "one bank": [WHOLE] * EXPERT_COUNT,
    "sharded over two": [(Part(expert_id % 2, 1.0),) for expert_id in range(EXPERT_COUNT)],
    "striped over two": [STRIPE_OF_TWO] * EXPERT_COUNT,
    "striped over three": [STRIPE_OF_THREE] * EXPERT_COUNT,
    "of every kind": [STRIPE_OF_THREE, WHOLE, STRIPE_OF_TWO, (Part(2, 1.0),), STRIPE_OF_THREE, (Part(1, 1.0),)],
}


def banks_of_three() -> list[DramBank]:
    return [dram(name) for name in ("a", "b", "c")]


@pytest.mark.parametrize("verify", ["off", "load", "fetch"])
@pytest.mark.parametrize("routes", ROUTES.values(), ids=ROUTES)
def test_slabs_come_back_from_wherever_they_were_routed(routes: list[Route], verify: Verify) -> None:
    check_routes(routes, verify)


def check_routes(routes: list[Route], verify: Verify = "off") -> None:
    originals = ragged_layer()
    banks = banks_of_three()
    home = store(dict(originals), routes, banks, verify)
    assert_reads_back(home, originals, range(EXPERT_COUNT))
    assert_reads_back(home, originals, [4, 0])
    expected = {"a", "b", "c"} if any(len(route) == 3 for route in routes) else None
    for expert_id, route in enumerate(routes):
        counts = home.bytes_by_bank([expert_id])
        assert sum(counts.values()) == home.slab_bytes
        assert set(counts) == {banks[part.bank_index].name for part in route}
    total = home.bytes_by_bank(range(EXPERT_COUNT))
    assert total == {bank.name: bank.used_bytes for bank in banks if bank.used_bytes}
    assert expected is None or set(total) == expected
    is_one = len(set(routes)) == 1 and len(routes[0]) == 1
    assert (home.tensors is not None) == home.is_direct == is_one


def test_rows_are_copied_past_the_bank_only_where_it_allows_that() -> None:
    for reads_safely in (False, True):
        bank = dram()
        bank.reads_safely = reads_safely
        home = store(ragged_layer(), banks=[bank])
        assert home.tensors is not None and home.is_direct != reads_safely


def test_banks_of_the_same_name_are_two_banks() -> None:
    originals = ragged_layer()
    home = store(dict(originals), ROUTES["striped over two"], [dram("x"), dram("x")])
    assert_reads_back(home, originals, range(EXPERT_COUNT))


@pytest.mark.parametrize("verify", ["off", "load", "fetch"])
def test_a_byte_that_flips_in_memory_is_noticed_by_verify_fetch_alone(verify: Verify) -> None:
    for routes in ROUTES.values():
        originals = ragged_layer()
        banks = banks_of_three()
        for bank in banks:
            bank.reads_safely = verify == "fetch"  # as the runtime sets it
        home = store(dict(originals), routes, banks, verify)
        assert_reads_back(home, originals, range(EXPERT_COUNT))
        shard, row_id = next((home.shards[shard_id], row_id) for shard_id, row_id in home._places[2])
        rows = next(rows for rows in reversed(shard.rows) if rows is not None and rows.row_bytes > 4)
        rows.as_bytes[row_id, rows.row_bytes // 2] ^= 1  # type: ignore[attr-defined]
        cells = Cells(home.layout, 1, CpuBackend())
        fetch(home, cells, [1], [0])
        if verify == "fetch":
            with pytest.raises(
                IntegrityError, match=r"expert 2 of layer is not what was stored in bank .*: the memory"
            ):
                fetch(home, cells, [2], [0])
        else:
            fetch(home, cells, [2], [0])


def pack_ragged(folder: Path, originals: dict[str, torch.Tensor]) -> FileBank:
    return FileBank(pack(folder / "model.slabs", {"layer": Contents(originals)}), "file", PROFILE)


@pytest.fixture
def packed(tmp_path: Path) -> tuple[FileBank, dict[str, torch.Tensor]]:
    originals = ragged_layer()
    return pack_ragged(tmp_path, originals), originals


FILE_ROUTES: dict[str, list[Route]] = {
    "file alone": [(Part(2, 1.0),)] * EXPERT_COUNT,
    "memory alone": [WHOLE] * EXPERT_COUNT,
    "striped memory alone": [STRIPE_OF_TWO] * EXPERT_COUNT,
    "both": [(Part(2, 1.0),), WHOLE, STRIPE_OF_TWO, (Part(2, 1.0),), (Part(1, 1.0),), STRIPE_OF_TWO],
}


@pytest.mark.parametrize("verify", ["off", "load", "fetch"])
@pytest.mark.parametrize("routes", FILE_ROUTES.values(), ids=FILE_ROUTES)
def test_a_packed_layer_is_adopted_into_the_file_and_into_memory(
    packed: tuple[FileBank, dict[str, torch.Tensor]], routes: list[Route], verify: Verify
) -> None:
    file, originals = packed
    banks: list[Bank] = [dram("a"), dram("b"), file]
    home = HomeBuilder(banks, verify).adopt(file.slabs.layers["layer"], file, routes)
    assert_reads_back(home, originals, range(EXPERT_COUNT))
    in_file = sum(route == (Part(2, 1.0),) for route in routes)
    assert file.used_bytes == in_file * home.slab_bytes
    assert home.bytes_by_bank(range(EXPERT_COUNT)) == {bank.name: bank.used_bytes for bank in banks if bank.used_bytes}
    assert home.is_direct == (routes == FILE_ROUTES["memory alone"])
    cells = Cells(home.layout, EXPERT_COUNT, CpuBackend())
    fetch(home, cells, range(EXPERT_COUNT), range(EXPERT_COUNT))
    for stored, original in zip(cells.tensors, originals.values(), strict=True):
        assert_same_bits(stored, original)


@pytest.mark.parametrize("verify", ["off", "load", "fetch"])
def test_a_damaged_slab_is_not_taken_into_memory_unless_nobody_looks(
    packed: tuple[FileBank, dict[str, torch.Tensor]], verify: Verify
) -> None:
    file, originals = packed
    start = file.rows(file.slabs.layers["layer"])[-1].start + 3 * 4
    with file.slabs.path.open("r+b") as opened:
        opened.seek(start)
        opened.write(bytes([bits(originals["scale"])[12].item() ^ 1]))
    builder = HomeBuilder([dram(), dram("b"), file], verify)
    if verify == "off":
        assert builder.adopt(file.slabs.layers["layer"], file, [WHOLE] * EXPERT_COUNT).is_direct
        return
    with pytest.raises(IntegrityError, match=r"expert 3 of layer is not what was stored in bank file:model.slabs"):
        builder.adopt(file.slabs.layers["layer"], file, [WHOLE] * EXPERT_COUNT)


def test_a_bank_that_is_too_small_for_its_part_refuses_it() -> None:
    slab_bytes = SlabLayout.of(ragged_layer()).slab_bytes
    banks = [dram("a"), dram("small", slab_bytes * EXPERT_COUNT // 2)]
    with pytest.raises(CapacityError, match=r"bank small holds .* and cannot take"):
        store(ragged_layer(), ROUTES["striped over two"], banks)


def test_a_bank_that_got_no_part_of_short_rows_has_no_part_in_their_fetch() -> None:
    home = store({"scale": random_bits((2, 5), torch.uint8)}, [STRIPE_OF_TWO] * 2, [dram("a"), dram("b")])
    assert home.bytes_by_bank([0, 1]) == {"b": 10} and list(home.bytes_by_bank([0])) == ["b"]
