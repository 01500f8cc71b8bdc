"""The runtime of one worker, with a toy layer: what it plans, checks at start and refuses."""

from __future__ import annotations

import gc
import logging
import operator
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.property.toy_moe import HIDDEN_SIZE, ToyMoe
from tests.support.homes import PROFILE, dram, hands
from vllm_moecxl.config import OffloadConfig
from vllm_moecxl.control.account import LayerNeed
from vllm_moecxl.control.prediction import DEFAULT_PREDICTORS
from vllm_moecxl.control.prediction.base import Step
from vllm_moecxl.control.trace import RoutingTrace
from vllm_moecxl.data.banks.base import Bank, BankProfile
from vllm_moecxl.data.banks.file import FileBank
from vllm_moecxl.data.banks.memory import DramBank
from vllm_moecxl.data.devices.cpu import CpuBackend
from vllm_moecxl.data.profiles import PUBLISHED
from vllm_moecxl.errors import CapacityError, ConfigError, IntegrityError, TransferError
from vllm_moecxl.runtime.counters import Metric, by_label
from vllm_moecxl.runtime.dispatch import Kernel
from vllm_moecxl.runtime.packing import Packer
from vllm_moecxl.runtime.ring import Begun
from vllm_moecxl.runtime.runtime import LoadedLayer, OffloadRuntime
from vllm_moecxl.types import PassKind

EXPERT_COUNT, TOPK = 8, 2
SLAB_BYTES = HIDDEN_SIZE * HIDDEN_SIZE * 4 + HIDDEN_SIZE


class SmallBackend(CpuBackend):
    """A host with as much device memory as the test says."""

    def __init__(self, free_bytes: int) -> None:
        super().__init__()
        self._free_bytes = free_bytes

    def free_bytes(self) -> int:
        return self._free_bytes


def start(
    *expert_counts: int, free_bytes: int = 1 << 40, banks: Sequence[Bank] | None = None, **options: Any
) -> OffloadRuntime:
    """A runtime with a declared layer for each count, and its plan; slots are used, unless a test says otherwise."""
    config = OffloadConfig.parse({"mode": "cxl", "slots": "50%", "in_place": "never", **options})
    runtime = OffloadRuntime(
        config,
        SmallBackend(free_bytes),
        torch.device("cpu"),
        logging.getLogger("moecxl-test"),
        [dram()] if banks is None else banks,
    )
    for index, expert_count in enumerate(expert_counts):
        runtime.declare(LayerNeed(f"layers.{index}", expert_count, TOPK, SLAB_BYTES))
    runtime.plan(kv_cache_bytes=None, device_reserve_bytes=0)
    return runtime


def loaded(toy: ToyMoe, index: int = 0, kernel: Kernel | None = None, kind: PassKind = PassKind.TOKEN) -> LoadedLayer:
    return LoadedLayer(
        name=f"layers.{index}",
        expert_count=len(toy.tensors["weight"]),
        topk=TOPK,
        tensors=dict(toy.tensors),
        kernel=kernel or toy.kernel,
        bind=toy.bind,
        kernel_name="ToyKernel" if kernel is None else "OddKernel",
        pass_kind=kind,
        hidden_size=HIDDEN_SIZE,
        dtype=torch.float32,
    )


def wide_batch(expert_count: int = EXPERT_COUNT) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A forward that needs every expert."""
    ids = torch.arange(expert_count, dtype=torch.int32).view(-1, TOPK)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(len(ids), HIDDEN_SIZE, generator=generator), torch.rand(ids.shape, generator=generator), ids


def width_dependent(toy: ToyMoe) -> Kernel:
    """A kernel whose result depends on how many tokens it is given, as a blocked one's may."""
    return lambda x, weights, ids: toy.kernel(x, weights, ids) + len(x)


def never_the_same(toy: ToyMoe) -> Kernel:
    """A kernel that gives other bits each time."""
    calls = iter(range(1000))
    return lambda x, weights, ids: toy.kernel(x, weights, ids) + next(calls)


def passes_taken(runtime: OffloadRuntime) -> dict[str, float]:
    return {kind: n for kind, n in by_label(runtime.counters.rows(), Metric.PASSES, "kind").items() if n}


def asked_for(runtime: OffloadRuntime) -> dict[str, float]:
    """What forwards of requests have caused, and what slots are left."""
    others = (Metric.BANK_UP, Metric.BANK_BYTES, Metric.BANK_BANDWIDTH, Metric.SIDECAR_UP, Metric.SIDECAR_CPU_SECONDS)
    rows = [row for row in runtime.counters.rows() if row.metric not in others and row.value]
    return {" ".join((row.metric.name, *row.labels.values())): row.value for row in rows}


def test_a_kernel_that_keeps_its_bits_is_confirmed_once_and_serves_in_token_passes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    runtime = start(EXPERT_COUNT, EXPERT_COUNT, layer_buffer=False)
    toys = [ToyMoe(EXPERT_COUNT, seed) for seed in (1, 2)]
    dispatches = [runtime.install(loaded(toy, index)) for index, toy in enumerate(toys)]
    assert asked_for(runtime) == {"SLOTS free": EXPERT_COUNT}, "the self-check counts nowhere"
    for dispatch, toy in zip(dispatches, toys, strict=True):
        assert torch.equal(dispatch(*wide_batch()), toy.direct(*wide_batch()))
    assert passes_taken(runtime) == {"token": 4.0}
    assert caplog.text.count("ToyKernel runs wide forwards by token, bit-equal in the self-check") == 1
    assert "byte account of this rank" in caplog.text and "experts of 2/2 layers are home" in caplog.text


def test_a_kernel_that_depends_on_the_batch_goes_through_the_layer_buffer(caplog: pytest.LogCaptureFixture) -> None:
    runtime = start(EXPERT_COUNT)
    toy = ToyMoe(EXPERT_COUNT, 1)
    dispatch = runtime.install(loaded(toy, kernel=width_dependent(toy)))
    assert torch.equal(dispatch(*wide_batch()), toy.direct(*wide_batch()) + len(wide_batch()[0]))
    assert passes_taken(runtime) == {"layer_buffer": 1.0}
    assert "every wide forward goes through the layer buffer instead" in caplog.text


@pytest.mark.parametrize(
    ("kernel_of", "options", "sentence"),
    [
        (width_dependent, {"layer_buffer": False}, "set --moe-offload-config.layer_buffer true"),
        (never_the_same, {}, "and so does the layer buffer: this kernel cannot be served from slots"),
    ],
)
def test_a_kernel_that_cannot_keep_its_bits_does_not_start(
    kernel_of: Callable[[ToyMoe], Kernel], options: dict[str, Any], sentence: str
) -> None:
    toy = ToyMoe(EXPERT_COUNT, 1)
    with pytest.raises(
        IntegrityError, match=f"self-check of layers.0: token passes change .* OddKernel here.*{sentence}"
    ):
        start(EXPERT_COUNT, **options).install(loaded(toy, kernel=kernel_of(toy)))


@pytest.mark.parametrize("options", [{"passes": "fast"}, {"slots": "100%"}])
def test_nothing_is_checked_where_bits_may_change_or_nothing_is_cut(options: dict[str, Any]) -> None:
    toy = ToyMoe(EXPERT_COUNT, 1)
    runtime = start(EXPERT_COUNT, **options)
    dispatch = runtime.install(loaded(toy, kernel=never_the_same(toy)))
    dispatch(*wide_batch())
    assert passes_taken(runtime) == ({"expert": 2.0} if "passes" in options else {"single": 1.0})


def test_a_kernel_that_needs_the_layer_buffer_is_refused_without_one() -> None:
    layer = loaded(ToyMoe(EXPERT_COUNT, 1), kind=PassKind.LAYER_BUFFER)
    with pytest.raises(ConfigError, match=r"layer_buffer=False is not possible: ToyKernel keeps .* drop the option"):
        start(EXPERT_COUNT, layer_buffer=False).install(layer)
    room = (EXPERT_COUNT + EXPERT_COUNT // 2) * SLAB_BYTES  # homes and slots, and nothing else
    layer = loaded(ToyMoe(EXPERT_COUNT, 1), kind=PassKind.LAYER_BUFFER)
    with pytest.raises(CapacityError, match="the layer buffer does not fit on the device: ask for fewer slots"):
        start(EXPERT_COUNT, free_bytes=room).install(layer)


@pytest.mark.parametrize("sidecar", [True, False])
def test_layers_of_one_layout_share_buffers_that_have_a_row_for_every_expert_of_each(*, sidecar: bool) -> None:
    counts = (EXPERT_COUNT, 4, EXPERT_COUNT, EXPERT_COUNT, EXPERT_COUNT)
    runtime = start(*counts, sidecar=sidecar)
    toys = [ToyMoe(expert_count, index) for index, expert_count in enumerate(counts)]
    dispatches = [runtime.install(loaded(toy, index, kind=PassKind.LAYER_BUFFER)) for index, toy in enumerate(toys)]
    for _ in range(2):  # each finds in the buffer what another layer has left there
        for dispatch, toy in zip(dispatches, toys, strict=True):
            batch = wide_batch(len(toy.tensors["weight"]))
            assert torch.equal(dispatch(*batch), toy.direct(*batch))
    first, small, second, third, fourth = [dispatch.buffer for dispatch in dispatches]
    assert None not in (first, small) and small is not first
    assert first is third and second is fourth
    assert (first is second) != sidecar, "by turns where the next layer is brought while one computes"
    following = [dispatch.following for dispatch in dispatches]
    assert following == [*dispatches[1:], dispatches[0]]


def test_the_gauge_of_slots_covers_all_layers() -> None:
    runtime = start(EXPERT_COUNT, EXPERT_COUNT)
    toys = [ToyMoe(EXPERT_COUNT, seed) for seed in (1, 2)]
    first, _ = (runtime.install(loaded(toy, index)) for index, toy in enumerate(toys))
    assert by_label(runtime.counters.rows(), Metric.SLOTS, "state") == {"free": 8.0, "filling": 0.0, "resident": 0.0}
    first(torch.ones(1, HIDDEN_SIZE), torch.ones(1, TOPK), torch.tensor([[0, 5]], dtype=torch.int32))
    assert by_label(runtime.counters.rows(), Metric.SLOTS, "state") == {"free": 6.0, "filling": 0.0, "resident": 2.0}


def test_what_does_not_fit_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(CapacityError, match=r"slots='50%' takes .* are left for them"):
        start(EXPERT_COUNT, free_bytes=EXPERT_COUNT * SLAB_BYTES)
    with pytest.raises(CapacityError, match="bank"):
        start(EXPERT_COUNT, banks=[dram(capacity_bytes=100)])


def test_the_homes_own_the_only_copy() -> None:
    runtime = start(EXPERT_COUNT)
    layer = loaded(ToyMoe(EXPERT_COUNT, 1))
    runtime.install(layer)
    assert not layer.tensors
    assert runtime.banks[0].used_bytes == EXPERT_COUNT * SLAB_BYTES


def packed_toys(folder: Path, toys: Sequence[ToyMoe], kernel_of: Callable[[ToyMoe], Kernel] | None = None) -> FileBank:
    """The toys' layers in a slab file, as `moecxl pack` writes it."""
    done: list[tuple[int, int, int]] = []
    packer = Packer(
        folder / "toy.slabs",
        {"model": "toy"},
        torch.device("cpu"),
        logging.getLogger("moecxl-test"),
        lambda *progress: done.append(progress),
    )
    for index, toy in enumerate(toys):
        packer.declare(LayerNeed(f"layers.{index}", len(toy.tensors["weight"]), TOPK, SLAB_BYTES))
    packer.begin()
    for index, toy in enumerate(toys):
        layer = loaded(toy, index, kernel_of(toy) if kernel_of else None)
        packer.install(layer)
        assert not layer.tensors and not any(tensor.numel() for tensor in toy.bound), "what is written is let go of"
    assert packer.finish() == (folder / "toy.slabs").stat().st_size
    assert done == [(i + 1, len(toys), len(toys[0].tensors["weight"]) * SLAB_BYTES) for i in range(len(toys))]
    return FileBank(folder / "toy.slabs", "file", PROFILE)


def from_file(bank: FileBank, toy: ToyMoe, index: int = 0, kernel: Kernel | None = None) -> LoadedLayer:
    """A layer whose tensors are stand-ins: the slab file has the real ones."""
    layer = loaded(toy, index, kernel)
    layer.tensors = {name: torch.empty(0) for name in layer.tensors}
    layer.packed = bank.slabs.layers[layer.name]
    return layer


@pytest.mark.parametrize("with_dram", [False, True])
@pytest.mark.parametrize("options", [{}, {"slots": "100%"}, {"verify": "fetch"}, {"layer_buffer": False}])
def test_a_packed_model_is_served_from_its_file_with_the_packers_own_bits(
    tmp_path: Path, options: dict[str, Any], *, with_dram: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    toys = [ToyMoe(EXPERT_COUNT, seed) for seed in (1, 2)]
    file = packed_toys(tmp_path, toys)
    assert len(file.slabs.layers["layers.0"].check) == 3 and not file.slabs.layers["layers.1"].check
    room = 3 * SLAB_BYTES
    banks = [dram(capacity_bytes=room), file] if with_dram else [file]
    runtime = start(EXPERT_COUNT, EXPERT_COUNT, banks=banks, **options)
    for index, toy in enumerate(toys):
        dispatch = runtime.install(from_file(file, toy, index))
        assert torch.equal(dispatch(*wide_batch()), toy.direct(*wide_batch()))
    assert caplog.text.count("bit-equal in the self-check") == 1
    used = [bank.used_bytes for bank in banks]
    assert sum(used) == 2 * EXPERT_COUNT * SLAB_BYTES and used[:-1] == [room] * with_dram
    assert by_label(runtime.counters.rows(), Metric.BANK_UP, "bank") == {bank.name: 1.0 for bank in banks}
    assert "bank file:toy.slabs: " in caplog.text


def test_a_kernel_that_no_longer_gives_what_was_packed_does_not_start(tmp_path: Path) -> None:
    toy = ToyMoe(EXPERT_COUNT, 1)
    file = packed_toys(tmp_path, [toy], kernel_of=lambda toy: toy.kernel)
    changed = from_file(file, toy, kernel=lambda x, weights, ids: toy.kernel(x, weights, ids) + 1)
    with pytest.raises(IntegrityError, match=r"self-check of layers.0: .* OddKernel here"):
        start(EXPERT_COUNT, banks=[file], slots="100%").install(changed)


def test_a_slab_file_of_another_model_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    file = packed_toys(tmp_path, [ToyMoe(EXPERT_COUNT, 1)])
    for counts in ((EXPERT_COUNT, EXPERT_COUNT), (EXPERT_COUNT - 2,)):
        with pytest.raises(IntegrityError, match=r"bank file:toy.slabs has no \d experts of layer layers.\d: pack"):
            start(*counts, banks=[file])


@pytest.mark.parametrize("broken", ["TransferError", "IntegrityError"])
def test_a_bank_that_fails_is_down_in_the_metrics_and_the_forward_fails(tmp_path: Path, broken: str) -> None:
    toy = ToyMoe(EXPERT_COUNT, 1)
    file = packed_toys(tmp_path, [toy])
    runtime = start(EXPERT_COUNT, banks=[file], passes="fast", verify="fetch")
    dispatch = runtime.install(from_file(file, toy))
    batch = (torch.ones(1, HIDDEN_SIZE), torch.ones(1, TOPK), torch.tensor([[2, 3]], dtype=torch.int32))
    up = runtime.counters.bank_up[file.name]
    assert runtime.counters.values[up] == 1
    path = file.slabs.path
    if broken == "TransferError":
        os.truncate(path, 5000)
    else:
        with path.open("r+b") as opened:
            opened.seek(file.slabs.layers["layers.0"].starts[0])
            opened.write(b"\xff" * EXPERT_COUNT * SLAB_BYTES)
    with pytest.raises(TransferError if broken == "TransferError" else IntegrityError):
        dispatch(*batch)
    assert runtime.counters.values[up] == 0
    assert not dispatch.slots.residency.resident_mask().any(), "no half slab stays"


def test_verify_fetch_looks_at_every_slab_of_every_bank() -> None:
    toy = ToyMoe(EXPERT_COUNT, 1)
    runtime = start(EXPERT_COUNT, verify="fetch", passes="fast", in_place="auto")
    dispatch = runtime.install(loaded(toy))
    assert dispatch.home.tensors is not None, "in one bank, where a kernel could read them past us"
    dispatch.home.tensors[0][3, 0, 0] += 1
    ids = torch.tensor([[3, 4]], dtype=torch.int32)
    with pytest.raises(IntegrityError, match=r"expert 3 of layers.0 is not what was stored in bank dram"):
        dispatch(torch.ones(1, HIDDEN_SIZE), torch.ones(1, TOPK), ids)


def slow_bank() -> DramBank:
    """A bank that is slower than slots, by its profile."""
    return DramBank("slow", "slow", None, BankProfile(latency_s=1e-6, read_bytes_per_s=1e9, source="published"))


def fast_bank() -> DramBank:
    """A bank that is as fast as slots."""
    return DramBank("fast", "fast", None, PUBLISHED["dram"])


@pytest.mark.parametrize(("bank", "in_place"), [(fast_bank, "auto"), (fast_bank, "always"), (slow_bank, "always")])
def test_a_layer_whose_homes_are_as_good_as_slots_runs_from_them_and_from_nothing_else(
    caplog: pytest.LogCaptureFixture, bank: Callable[[], DramBank], in_place: str
) -> None:
    caplog.set_level(logging.INFO)
    runtime = start(EXPERT_COUNT, banks=[bank()], in_place=in_place)
    toy = ToyMoe(EXPERT_COUNT, 1)
    dispatch = runtime.install(loaded(toy))
    assert "1 of 1 layers run in place" in caplog.text, "slots that are not used are told of"
    assert dispatch.buffer is None and all(map(operator.is_, toy.bound, dispatch.home.tensors or ()))
    for _ in range(2):
        assert torch.equal(dispatch(*wide_batch()), toy.direct(*wide_batch()))
    wrong = torch.tensor([[0, EXPERT_COUNT]], dtype=torch.int32)
    with pytest.raises(IntegrityError, match="chose expert 8 of a layer with 8 experts"):
        dispatch(torch.ones(1, HIDDEN_SIZE), torch.ones(1, TOPK), wrong)
    assert asked_for(runtime) == {"PASSES in_place": 2, "SLOTS free": EXPERT_COUNT // 2}
    assert dispatch.rehearse(*wide_batch()).shape == wide_batch()[0].shape
    assert all(map(operator.is_, toy.bound, dispatch.home.tensors or ()))


def test_a_layer_whose_homes_are_slower_than_slots_runs_from_either_and_ends_up_with_what_it_needs_often() -> None:
    runtime = start(EXPERT_COUNT, banks=[slow_bank()], in_place="auto")
    toy = ToyMoe(EXPERT_COUNT, 1)
    dispatch = runtime.install(loaded(toy))
    ids = torch.tensor([[1, 6]], dtype=torch.int32)
    x, weights = torch.ones(1, HIDDEN_SIZE), torch.ones(1, TOPK)
    kinds = []
    for _ in range(6):
        before = passes_taken(runtime)
        assert torch.equal(dispatch(x, weights, ids), toy.direct(x, weights, ids))
        kinds += [kind for kind, count in passes_taken(runtime).items() if count != before.get(kind)]
    assert kinds[0] == "in_place" and kinds[-1] == "single" and kinds == sorted(kinds)
    assert np.flatnonzero(dispatch.slots.residency.resident_mask()).tolist() == [1, 6]


@pytest.mark.parametrize("why", ["a file", "two banks", "every read is verified"])
def test_in_place_is_refused_where_the_kernel_cannot_read_the_homes_and_auto_copies_there(
    tmp_path: Path, why: str
) -> None:
    toy = ToyMoe(EXPERT_COUNT, 1)
    file = packed_toys(tmp_path, [toy]) if why == "a file" else None
    banks = [file] if file else [dram(), dram("b")] if why == "two banks" else [dram()]
    if why == "two banks":
        banks = [dram("a", EXPERT_COUNT // 2 * int(SLAB_BYTES * 1.02)), dram("b")]
    options = {"verify": "fetch"} if why == "every read is verified" else {}
    layer = partial(from_file, file, toy) if file else partial(loaded, toy)
    with pytest.raises(ConfigError, match=r'in_place="always" is not possible: .* layers.0 .* or use "auto"'):
        start(EXPERT_COUNT, banks=banks, in_place="always", **options).install(layer())
    banks = [file] if file else [dram("a", banks[0].capacity_bytes), *map(dram, ["b"][: len(banks) - 1])]
    runtime = start(EXPERT_COUNT, banks=banks, in_place="auto", **options)
    dispatch = runtime.install(layer())
    assert torch.equal(dispatch(*wide_batch()), toy.direct(*wide_batch()))
    assert "in_place" not in passes_taken(runtime)


def decode(runtime: OffloadRuntime, toys: Sequence[ToyMoe], token_id: int, *, is_told: bool = True) -> None:
    """A decode step of one request through all layers; the experts follow from the token."""
    if is_told and runtime.ring is not None:
        step = Step(("r",), np.zeros(1, np.int64), np.array([token_id]), np.array([False]))
        runtime.ring.begin(Begun(step, None, time.perf_counter()))
    for toy, dispatch in zip(toys, runtime.dispatches.values(), strict=True):
        expert_count = len(toy.tensors["weight"])
        ids = torch.tensor([[token_id % expert_count, (3 * token_id + 1) % expert_count]], dtype=torch.int32)
        batch = torch.full((1, HIDDEN_SIZE), 0.5), torch.ones(1, TOPK), ids
        assert torch.equal(dispatch(*batch), toy.direct(*batch))


def complete(*expert_counts: int, **options: Any) -> tuple[OffloadRuntime, list[ToyMoe]]:
    """A runtime with all of its layers."""
    runtime = start(*expert_counts, **options)
    toys = [ToyMoe(expert_count, seed) for seed, expert_count in enumerate(expert_counts)]
    for index, toy in enumerate(toys):
        runtime.install(loaded(toy, index))
    return runtime, toys


@pytest.mark.parametrize(
    ("counts", "options", "reason"),
    [
        ((8, 8), {"prefetch": "off"}, 'prefetch is "off"'),
        ((8, 8), {"sidecar": False}, "there is no sidecar"),
        ((8, 8), {"in_place": "always"}, "all layers run in place"),
        ((8, 6), {}, "the layers differ in their number of experts"),
        ((8, 8), {"slots": "100%"}, "every expert has a slot"),
    ],
)
def test_where_nothing_can_be_prefetched_the_log_says_why_and_forwards_leave_nothing_behind(
    counts: tuple[int, ...], options: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    runtime, toys = complete(*counts, **options)
    runtime.foresee([None] * len(counts), "toy")
    assert runtime.is_foreseeing and runtime.prefetching is None and runtime.ring is None
    assert caplog.text.count(f"nothing is prefetched into slots: {reason}") == 1
    assert all(dispatch.ring is None for dispatch in runtime.dispatches.values())
    runtime.watch()
    decode(runtime, toys, 3)
    runtime.forget(["r"])


@pytest.mark.parametrize(
    ("prefetch", "names"),
    [("auto", DEFAULT_PREDICTORS), (["temporal", "tokens"], ("temporal", "tokens")), ("attention", ("attention",))],
)
def test_the_predictors_that_were_asked_for_are_asked(
    prefetch: object, names: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    runtime, _ = complete(8, 8, prefetch=prefetch)
    runtime.foresee([None, None], "toy")
    assert runtime.prefetching is not None and tuple(runtime.prefetching.forecast.report()) == names
    assert f"experts are prefetched by {', '.join(names)}" in caplog.text


def test_a_model_of_which_nothing_is_foreseen_runs_and_is_looked_after() -> None:
    """A draft model has a runtime of its own, beside the one whose steps are described."""
    runtime, toys = complete(8, 8)
    for token_id in range(3):
        runtime.watch()
        decode(runtime, toys, token_id)
        runtime.forget(["r"])
    assert not runtime.is_foreseeing and runtime.ring is None


def test_outputs_are_the_same_while_the_sidecar_predicts_and_prefetches() -> None:
    runtime, toys = complete(8, 8, 8)
    runtime.foresee([None] * 3, "toy")
    assert runtime.prefetching is not None
    runtime.prefetching.trial.pin()
    for number in range(300):
        runtime.watch()
        # Now and then nobody can say what is in a step, and requests come and go.
        decode(runtime, toys, number % 7, is_told=number % 50 != 30)
        if number % 40 == 39:
            runtime.forget(["r"])
    assert runtime._sidecar.is_up and runtime._sidecar.failure is None
    assert {1, 2} & runtime.prefetching.planner._records.keys(), "something was predicted"


@pytest.mark.parametrize("sidecar", [True, False])
def test_a_trace_is_recorded_whether_there_is_a_sidecar_or_not(tmp_path: Path, *, sidecar: bool) -> None:
    runtime, toys = complete(8, 8, sidecar=sidecar, prefetch="off", trace=str(tmp_path / "a.npz"))
    runtime.foresee([None, None], "a model")
    for token_id in range(12):
        runtime.watch()
        decode(runtime, toys, token_id)
    del runtime
    gc.collect()
    trace = RoutingTrace.load(tmp_path / "a.npz")
    assert trace.token_ids.tolist() == list(range(12)) and trace.meta["model"] == "a model"
    expected = [[[t % 8, (3 * t + 1) % 8]] * 2 for t in range(12)]
    assert trace.topk.tolist() == expected and trace.weights is not None


def test_of_several_ranks_and_models_one_records(tmp_path: Path) -> None:
    config = OffloadConfig.parse({"mode": "cxl", "slots": "50%", "prefetch": "off", "trace": str(tmp_path / "a.npz")})
    runtime = OffloadRuntime(
        *(config, SmallBackend(1 << 40), torch.device("cpu"), logging.getLogger("moecxl-test"), [dram()]),
        may_record=False,
    )
    runtime.declare(LayerNeed("layers.0", EXPERT_COUNT, TOPK, SLAB_BYTES))
    runtime.plan(kv_cache_bytes=None, device_reserve_bytes=0)
    toy = ToyMoe(EXPERT_COUNT, 1)
    runtime.install(loaded(toy))
    runtime.foresee([None], "toy")
    decode(runtime, [toy], 1)
    assert runtime.ring is None
    del runtime
    gc.collect()
    assert not (tmp_path / "a.npz").exists()


def test_threads_end_with_the_runtime() -> None:
    runtime = start(EXPERT_COUNT)
    dispatch = runtime.install(loaded(ToyMoe(EXPERT_COUNT, 1)))
    dispatch(*wide_batch())
    threads = [*hands(runtime._mover), runtime._sidecar._thread]
    assert len(threads) == 2 and all(thread.is_alive() for thread in threads)
    del runtime, dispatch
    gc.collect()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), thread.name


def test_what_only_a_request_that_has_ended_wanted_gives_its_slots_back() -> None:
    runtime = start(EXPERT_COUNT, sidecar=False)
    dispatch = runtime.install(loaded(ToyMoe(EXPERT_COUNT, 1)))
    runtime._mover._has_hands = False  # nobody carries it meanwhile
    assert dispatch.slots.prefetch([0, 1], 1.0, ["gone"]) == 2
    assert dispatch.slots.prefetch([1, 2], 1.0, ["stays"]) == 1
    states = {"free": EXPERT_COUNT / 2 - 3, "filling": 3.0, "resident": 0.0}
    assert by_label(runtime.counters.rows(), Metric.SLOTS, "state") == states
    runtime.forget(["gone", "nobody"])
    states = {"free": EXPERT_COUNT / 2 - 2, "filling": 2.0, "resident": 0.0}
    assert by_label(runtime.counters.rows(), Metric.SLOTS, "state") == states
    runtime.forget(["stays"])
    assert dispatch.slots.free_count() == EXPERT_COUNT / 2


def test_what_each_bank_has_is_in_the_metrics() -> None:
    room = EXPERT_COUNT // 2 * int(SLAB_BYTES * 1.02)
    small = dram("small", room)
    runtime = start(EXPERT_COUNT, banks=[small, dram("large")])
    toy = ToyMoe(EXPERT_COUNT, 1)
    dispatch = runtime.install(loaded(toy))
    assert torch.equal(dispatch(*wide_batch()), toy.direct(*wide_batch()))
    rows = {
        (row.labels["bank"], row.labels.get("kind", row.metric.name)): row.value
        for row in runtime.counters.rows()
        if row.metric in (Metric.BANK_BYTES, Metric.BANK_UP, Metric.BANK_BANDWIDTH)
    }
    assert rows["small", "capacity"] == room and 0 < rows["small", "used"] <= room
    assert rows["small", "used"] + rows["large", "used"] == EXPERT_COUNT * SLAB_BYTES
    assert rows["small", "astray"] == 0 and rows["small", "BANK_UP"] == rows["large", "BANK_UP"] == 1
    assert rows["small", "BANK_BANDWIDTH"] == PROFILE.read_bytes_per_s
    fetched = by_label(runtime.counters.rows(), Metric.FETCH_BYTES, "bank")
    assert fetched["small"] > 0 and fetched["large"] > 0
