"""Who looks experts up under each mode of CUDA graphs, and what becomes of vLLM's settings; on vLLM's own classes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_moecxl.config import OffloadConfig
from vllm_moecxl.errors import ConfigError
from vllm_moecxl.integration import settings
from vllm_moecxl.types import LookupSide

with warnings.catch_warnings():  # its own affairs, and the marks of tests do not hold while they are collected
    warnings.simplefilter("ignore")
    from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode
    from vllm.forward_context import ForwardContext, override_forward_context

    from vllm_moecxl.integration import graphs
    from vllm_moecxl.integration.graphs import SPLITTING_OP, GraphPlan, choose
    from vllm_moecxl.runtime.dispatch import over_padding

NONE, PIECEWISE, FULL = CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL
DECODE_ONLY, BOTH = CUDAGraphMode.FULL_DECODE_ONLY, CUDAGraphMode.FULL_AND_PIECEWISE
FILE = 'no kernel can read the bank "file:/slabs"'

SAID_HOST, SAID_DEVICE = 'lookup is "host"', 'lookup is "device"'
NO_NEED, NO_PLACE = "no graph holds a whole forward", "graphs of whole forwards leave the host no place to do it"


@pytest.mark.parametrize(
    ("mode", "lookup", "obstacles", "expected"),
    [
        (NONE, "auto", [], GraphPlan("host", NONE, NO_NEED)),
        (PIECEWISE, "auto", [], GraphPlan("host", PIECEWISE, NO_NEED)),
        (FULL, "auto", [], GraphPlan("device", FULL, NO_PLACE)),
        (DECODE_ONLY, "auto", [], GraphPlan("device", DECODE_ONLY, NO_PLACE)),
        (BOTH, "auto", [], GraphPlan("device", BOTH, NO_PLACE)),
        (NONE, "auto", [FILE], GraphPlan("host", NONE, NO_NEED)),
        (PIECEWISE, "auto", [FILE], GraphPlan("host", PIECEWISE, NO_NEED)),
        (FULL, "auto", [FILE], f"cudagraph_mode=FULL captures whole forwards, in which .* but {FILE}: use .*PIECEWISE"),
        (DECODE_ONLY, "auto", [FILE], f"cudagraph_mode=FULL_DECODE_ONLY captures .* but {FILE}: use .*PIECEWISE"),
        (BOTH, "auto", [FILE, "that"], GraphPlan("host", PIECEWISE, f"{FILE} and that")),
        (NONE, "host", [], GraphPlan("host", NONE, SAID_HOST)),
        (PIECEWISE, "host", [FILE], GraphPlan("host", PIECEWISE, SAID_HOST)),
        (FULL, "host", [], f"cudagraph_mode=FULL captures .* but {SAID_HOST}: use .*PIECEWISE"),
        (DECODE_ONLY, "host", [FILE], f"cudagraph_mode=FULL_DECODE_ONLY captures .* but {SAID_HOST}: use .*PIECEWISE"),
        (BOTH, "host", [], GraphPlan("host", PIECEWISE, SAID_HOST)),
        (BOTH, "host", [FILE], GraphPlan("host", PIECEWISE, SAID_HOST)),
        *((mode, "device", [], GraphPlan("device", mode, SAID_DEVICE)) for mode in CUDAGraphMode),
        *((mode, "device", [FILE], f"lookup='device' is not possible: {FILE}: use \"auto\"") for mode in CUDAGraphMode),
    ],
)
def test_every_mode_has_one_who_looks_up_or_is_refused(
    mode: CUDAGraphMode, lookup: LookupSide, obstacles: list[str], expected: GraphPlan | str
) -> None:
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            choose(mode, lookup, obstacles)
    else:
        assert choose(mode, lookup, obstacles) == expected


@pytest.mark.parametrize(
    ("options", "device_type", "expected"),
    [
        ({}, "cuda", []),
        ({"banks": ["dram", "numa:1", "dax:/dev/dax0.0"], "verify": "load"}, "cuda", []),
        ({}, "cpu", ["on the CPU engine the host is the device"]),
        ({"banks": ["emulated:cxl-d"]}, "cuda", ['no kernel can read the bank "emulated:cxl-d"']),
        ({"banks": ["dram", "file:/slabs"], "verify": "off"}, "cuda", [FILE]),
        (
            {"banks": ["dram", "file:/slabs"]},
            "cuda",
            [FILE, 'verify is "load" and slabs are checked on the host'],
        ),
        ({"verify": "fetch"}, "cuda", ['verify is "fetch" and slabs are checked on the host']),
        ({"trace": "trace.npz"}, "cuda", ["a trace is recorded by the host"]),
        ({"eviction": "class-lru"}, "cuda", []),
        ({"eviction": "lru"}, "cuda", ['eviction is "lru", and the device has class-lru alone']),
    ],
)
def test_what_a_kernel_cannot_do_is_named(options: dict[str, Any], device_type: str, expected: list[str]) -> None:
    config = OffloadConfig.parse({"mode": "cxl", **options})
    assert list(graphs.obstacles_to_device(config, device_type)) == expected


SIZES = [1, 2, 4, 8, 16]


@pytest.mark.parametrize(
    ("mode", "token_count_max", "kept"), [(BOTH, 5, [1, 2, 4]), (FULL, 16, SIZES), (BOTH, 99, SIZES), (NONE, 5, SIZES)]
)
def test_graphs_are_captured_as_far_as_the_slots_reach(
    mode: CUDAGraphMode, token_count_max: int, kept: list[int], said: pytest.LogCaptureFixture
) -> None:
    compilation = CompilationConfig(
        cudagraph_mode=mode, cudagraph_capture_sizes=list(SIZES), max_cudagraph_capture_size=16
    )
    graphs.limit_captures(compilation, token_count_max)
    assert compilation.cudagraph_capture_sizes == kept and compilation.max_cudagraph_capture_size == max(kept)
    assert ("captured for up to 4 tokens, not 16" in said.text) == (kept != SIZES)


def test_graphs_that_are_all_too_wide_for_the_slots_are_refused() -> None:
    compilation = CompilationConfig(cudagraph_mode=BOTH, cudagraph_capture_sizes=[8, 16], max_cudagraph_capture_size=16)
    with pytest.raises(ConfigError, match=r"cudagraph_capture_sizes=\[8, 16\] are all too wide .* of 5 tokens"):
        graphs.limit_captures(compilation, 5)


@pytest.fixture(autouse=True)
def _unbreakable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "0")


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    """What is logged: vLLM's loggers keep it to themselves otherwise."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="vllm.moecxl"):
        yield caplog


def engine(
    graphs_of: CUDAGraphMode, *, device: str = "cuda", offload: dict[str, Any] | None = None, **options: Any
) -> Any:
    """A configuration after our hook and what vLLM does behind it.

    Args:
        graphs_of: vLLM's mode when the hook is called.
        options: of vLLM's `CompilationConfig`.
    """
    pass_config = {"fuse_attn_quant": options.pop("fuse_attn_quant", False)}
    compilation = CompilationConfig(
        **{"mode": CompilationMode.VLLM_COMPILE, "cudagraph_mode": graphs_of, "pass_config": pass_config, **options}
    )
    vllm_config = SimpleNamespace(
        compilation_config=compilation,
        parallel_config=SimpleNamespace(all2all_backend="allgather_reducescatter", data_parallel_size=1),
        device_config=SimpleNamespace(device_type=device),
        additional_config={"moe_offload": {"mode": "cxl", **(offload or {})}},
    )
    graphs.settle(vllm_config, OffloadConfig.parse(vllm_config.additional_config["moe_offload"]))
    settings.stamp(vllm_config)
    compilation.set_splitting_ops_for_v1(all2all_backend="allgather_reducescatter", data_parallel_size=1)
    return vllm_config


def default_ops() -> list[str]:
    compilation = CompilationConfig(mode=CompilationMode.VLLM_COMPILE, cudagraph_mode=BOTH)
    compilation.set_splitting_ops_for_v1(all2all_backend="allgather_reducescatter")
    assert compilation.splitting_ops is not None
    return compilation.splitting_ops


@pytest.mark.parametrize(
    ("mode", "offload", "settled", "lookup"),
    [
        (NONE, {}, NONE, "host"),
        (PIECEWISE, {}, PIECEWISE, "host"),
        (PIECEWISE, {"lookup": "device"}, PIECEWISE, "device"),
        (BOTH, {}, BOTH, "device"),
        (BOTH, {"lookup": "host"}, PIECEWISE, "host"),
        (BOTH, {"verify": "fetch"}, PIECEWISE, "host"),
        (FULL, {}, FULL, "device"),
        (DECODE_ONLY, {}, DECODE_ONLY, "device"),
    ],
)
def test_graphs_stay_what_they_are_where_that_is_possible(
    mode: CUDAGraphMode,
    offload: dict[str, Any],
    settled: CUDAGraphMode,
    lookup: str,
    said: pytest.LogCaptureFixture,
) -> None:
    one = engine(mode, offload=offload)
    assert one.compilation_config.cudagraph_mode is settled
    assert graphs.plan_of(one).lookup == lookup
    is_piecewise = settled in (PIECEWISE, BOTH)
    assert one.compilation_config.splitting_ops == default_ops() + [SPLITTING_OP] * is_piecewise
    assert graphs.is_split(one.compilation_config) == is_piecewise
    warnings = [record.getMessage() for record in said.records if record.levelno == logging.WARNING]
    lowered = f"cudagraph_mode {mode} becomes {settled}, experts are looked up on the host between graphs: "
    assert [lowered in warning for warning in warnings] == [True] * (settled is not mode)
    assert (f"{SPLITTING_OP} is added to splitting_ops" in said.text) == is_piecewise


def test_a_lowered_mode_says_why(said: pytest.LogCaptureFixture) -> None:
    engine(BOTH, offload={"verify": "fetch"})
    assert 'verify is "fetch" and slabs are checked on the host' in said.text


def test_the_plan_says_who_with_which_graphs_and_why() -> None:
    assert str(graphs.plan_of(engine(BOTH))) == (
        f"experts are looked up by the device, with cudagraph_mode FULL_AND_PIECEWISE: {NO_PLACE}"
    )


@pytest.mark.parametrize("mode", [FULL, DECODE_ONLY])
def test_full_graphs_that_were_asked_for_are_not_taken_away(mode: CUDAGraphMode) -> None:
    with pytest.raises(ConfigError, match=f"--compilation-config: cudagraph_mode={mode} .* PIECEWISE or NONE"):
        engine(mode, offload={"lookup": "host"})


@pytest.mark.parametrize("mode", [NONE, PIECEWISE, BOTH])
def test_the_users_splitting_ops_stay(mode: CUDAGraphMode) -> None:
    mine = ["vllm::unified_attention_with_output", "aten::sort"]
    one = engine(mode, splitting_ops=list(mine), offload={"lookup": "host"})
    assert one.compilation_config.splitting_ops == mine + [SPLITTING_OP] * (mode is not NONE)


def test_an_op_that_is_there_is_not_added_again() -> None:
    assert engine(PIECEWISE, splitting_ops=["aten::sort", SPLITTING_OP]).compilation_config.splitting_ops == [
        "aten::sort",
        SPLITTING_OP,
    ]


def test_the_wish_for_uncut_graphs_stays() -> None:
    """No splitting ops at all: vLLM makes full graphs of it, and has none where only pieces are wanted."""
    one = engine(BOTH, splitting_ops=[])
    assert (one.compilation_config.cudagraph_mode, one.compilation_config.splitting_ops) == (FULL, [])
    assert graphs.plan_of(one).lookup == "device"
    one = engine(PIECEWISE, splitting_ops=[])
    assert (one.compilation_config.cudagraph_mode, one.compilation_config.splitting_ops) == (NONE, [])
    with pytest.raises(ConfigError, match="cudagraph_mode=FULL captures whole forwards"):
        engine(BOTH, splitting_ops=[], offload={"lookup": "host"})


def test_what_vllm_makes_of_the_mode_after_its_hook_is_foreseen() -> None:
    """Attention fused with quantisation: vLLM makes full graphs of pieces, when the hook has long ended."""
    one = engine(PIECEWISE, fuse_attn_quant=True)
    assert one.compilation_config.cudagraph_mode is FULL
    assert graphs.plan_of(one).lookup == "device"
    with pytest.raises(ConfigError, match="cudagraph_mode=FULL captures whole forwards"):
        engine(PIECEWISE, fuse_attn_quant=True, offload={"lookup": "host"})


def test_inductors_own_partition_is_refused_where_it_would_have_to_be_cut() -> None:
    for mine in (None, [SPLITTING_OP]):
        with pytest.raises(ConfigError, match="use_inductor_graph_partition=True is not possible where the host looks"):
            engine(PIECEWISE, use_inductor_graph_partition=True, splitting_ops=mine)
    one = engine(BOTH, use_inductor_graph_partition=True)
    assert SPLITTING_OP not in (one.compilation_config.splitting_ops or ())
    assert graphs.plan_of(one).lookup == "device"
    assert not graphs.is_split(one.compilation_config)


def test_breakable_graphs_need_no_splitting_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    one = engine(BOTH, mode=CompilationMode.NONE, offload={"lookup": "host"})
    assert (one.compilation_config.cudagraph_mode, one.compilation_config.splitting_ops) == (PIECEWISE, [])
    assert graphs.is_split(one.compilation_config)
    assert graphs.plan_of(one).lookup == "host"
    assert not graphs.is_split(engine(DECODE_ONLY, mode=CompilationMode.NONE).compilation_config)


def test_the_cpu_engine_looks_up_on_the_host() -> None:
    options: dict[str, Any] = {"device": "cpu", "mode": CompilationMode.DYNAMO_TRACE_ONCE}
    for offload in ({}, {"lookup": "host"}):
        assert graphs.plan_of(engine(NONE, offload=offload, **options)).lookup == "host"
    with pytest.raises(ConfigError, match="lookup='device' is not possible: on the CPU engine the host is the device"):
        engine(NONE, offload={"lookup": "device"}, **options)


@pytest.mark.parametrize("planned", [PIECEWISE, NONE])
def test_graphs_that_come_back_behind_our_back_end_the_start(planned: CUDAGraphMode) -> None:
    """The worker's decision is the last one, and on graphs that nothing was prepared for there is none."""
    one = engine(planned, offload={"lookup": "host"})
    one.compilation_config.cudagraph_mode = BOTH
    with pytest.raises(ConfigError, match=r"cudagraph_mode=FULL_AND_PIECEWISE with splitting_ops=.* was set after"):
        graphs.plan_of(one)


def test_pieces_without_a_cut_for_us_end_the_start() -> None:
    one = engine(PIECEWISE)
    one.compilation_config.splitting_ops = default_ops()
    with pytest.raises(ConfigError, match=r"cudagraph_mode=PIECEWISE with splitting_ops=.* was set after"):
        graphs.plan_of(one)


@pytest.mark.parametrize("final", [PIECEWISE, DECODE_ONLY, FULL, NONE])
def test_the_device_goes_on_with_whatever_the_model_runner_makes_of_full_graphs(final: CUDAGraphMode) -> None:
    one = engine(BOTH, offload={"lookup": "device"})
    one.compilation_config.cudagraph_mode = final
    assert graphs.plan_of(one).lookup == "device"


def mask_in_context(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
    context = ForwardContext(no_compile_layers={}, attn_metadata={}, slot_mapping={}, is_padding=mask)
    with override_forward_context(context):
        return graphs.padding_mask(x)


def test_padding_is_the_part_of_vllms_mask_that_the_batch_has(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.tensor([False, False, True, True])
    x = torch.empty(3, 8, device="meta")
    found = mask_in_context(x, mask)
    assert found is not None
    assert found.tolist() == [False, False, True]
    assert found.data_ptr() == mask.data_ptr(), "a graph reads the memory of its capture"
    assert mask_in_context(x, None) is None
    assert mask_in_context(torch.empty(3, 8), mask) is None
    monkeypatch.setenv("VLLM_MOE_SKIP_PADDING", "0")
    assert mask_in_context(x, mask) is None


def test_padding_asks_for_no_expert_of_its_own() -> None:
    ids = torch.tensor([[3, 1], [0, 2], [-1, -1], [5, 6]], dtype=torch.int32)
    mask = torch.tensor([False, False, True, True])
    cleaned = over_padding(ids, mask)
    assert cleaned.tolist() == [[3, 1], [0, 2], [3, 1], [3, 1]]
    assert cleaned.dtype == torch.int32
    assert over_padding(ids, None) is ids
    assert over_padding(torch.full((2, 2), -1), torch.ones(2, dtype=torch.bool)).tolist() == [[0, 0], [0, 0]]
    assert over_padding(ids[:0], mask[:0]).shape == (0, 2)
