"""The op that piecewise graphs are cut at: what it computes, and that graphs find its result where they look for it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.engine.harness import SCENARIOS, generate
from tests.engine.test_equality import Equality, compare
from tests.engine.test_graphs import BOTH, PIECEWISE, engine
from tests.support.checkpoints import build
from vllm_moecxl.errors import ConfigError
from vllm_moecxl.runtime.device_driven.dispatch import DeviceDispatch

with warnings.catch_warnings():  # its own affairs, and the marks of tests do not hold while they are collected
    warnings.simplefilter("ignore")
    from vllm.compilation import breakable_cudagraph
    from vllm.compilation.backends import split_graph
    from vllm.forward_context import ForwardContext, override_forward_context
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    from vllm_moecxl.integration import experts, runner
    from vllm_moecxl.integration.graphs import SPLITTING_OP
    from vllm_moecxl.integration.runner import SplitRunner

_SCENARIOS = (SCENARIOS[1], SCENARIOS[2])


def _as_on_a_gpu(self: Any) -> Any:
    """What vLLM's `_select_forward` returns there: nothing of a MoE layer is compiled."""
    return torch.ops.vllm.moe_forward if self._shared_experts is None else torch.ops.vllm.moe_forward_shared


@pytest.mark.parametrize("arch", ["mixtral", "qwen2_moe"], ids=["routed", "with-shared-experts"])
def test_a_compiled_model_says_the_same_through_our_op_as_through_vllms(
    arch: str,
    fixture_model: str,
    equality: Equality,
    tokenizer_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = fixture_model if arch == "mixtral" else str(build(arch, "bf16", tmp_path, tokenizer_dir))
    monkeypatch.setattr(MoERunner, "_select_forward", _as_on_a_gpu)
    resident = generate(_SCENARIOS, model=model, enforce_eager=False)

    ran: list[bool] = []
    run = runner._run

    def counting(*arguments: Any) -> None:
        ran.append(arguments[5] is not None)
        run(*arguments)

    monkeypatch.setattr(runner, "_run", counting)
    monkeypatch.setattr(runner, "is_split", lambda compilation_config: True)
    options = {"slots": "50%"}
    offloaded = generate(_SCENARIOS, model=model, enforce_eager=False, moe_offload="cxl", moe_offload_config=options)
    assert ran, "the engine went past the op"
    assert all(has_shared == (arch != "mixtral") for has_shared in ran)
    compare(equality, f"{arch}, compiled, between graphs", resident, offloaded)

    ran.clear()
    generate(SCENARIOS[:1], model=model)
    assert not ran, "an engine that does not offload has to do with the op"


class _Layer(nn.Module):
    """As much of a runner as its op needs: routed experts that double, a shared one that adds."""

    _forward_between_graphs = SplitRunner._forward_between_graphs

    def __init__(self, *, is_shared: bool) -> None:
        super().__init__()
        self.layer_name = "layers.0.experts"
        self._shared_experts = nn.Identity() if is_shared else None

    def _forward_impl(self, x: torch.Tensor, logits: torch.Tensor, shared_input: Any, input_ids: Any) -> Any:
        return 2 * x + logits if self._shared_experts is None else (shared_input + 1, 2 * x + logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.sin()
        shared_input = None if self._shared_experts is None else x
        result = self._forward_between_graphs(x, x.cos(), shared_input, None, self.layer_name, 0)
        return result.exp() if isinstance(result, torch.Tensor) else result[0] - result[1]


class _Captured:
    """A piece as a CUDA graph replays it: from the addresses of its first inputs to those of its first outputs."""

    def __init__(self, piece: nn.Module) -> None:
        self._piece = piece
        self._inputs: tuple[Any, ...] = ()
        self._outputs: Any = None

    def __call__(self, *inputs: Any) -> Any:
        if self._outputs is None:
            self._inputs, self._outputs = inputs, self._piece(*inputs)
            return self._outputs
        for old, new in zip(self._outputs, self._piece(*self._inputs), strict=True):
            old.copy_(new)
        return self._outputs


@pytest.mark.parametrize("is_shared", [False, True], ids=["routed", "with-shared-experts"])
def test_pieces_that_are_replayed_find_the_result_where_it_was_at_their_capture(is_shared: bool) -> None:
    layer = _Layer(is_shared=is_shared)
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        split, pieces = split_graph(graph, [SPLITTING_OP])
        assert [piece.is_splitting_graph for piece in pieces] == [False, True, False]
        for piece in pieces:
            if not piece.is_splitting_graph:
                module = getattr(split, piece.submod_name)
                delattr(split, piece.submod_name)
                setattr(split, piece.submod_name, _Captured(module))
        graphs.append(split)
        return split

    context = ForwardContext(no_compile_layers={layer.layer_name: layer}, attn_metadata={}, slot_mapping={})
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=False)
    buffer = torch.empty(3, 8)
    with override_forward_context(context):
        for _ in range(3):
            buffer.normal_()
            x = buffer.sin()
            routed = 2 * x + x.cos()
            assert torch.equal(compiled(buffer), (x + 1) - routed if is_shared else routed.exp())
    assert len(graphs) == 1


def test_a_breakable_graph_ends_before_the_op_and_replays_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Capture:
        """What the op sees of vLLM's: it would end a capture of the GPU, and keep what is to be run instead."""

        _capturing = True

        def __init__(self) -> None:
            self.segments: list[Any] = []

        def add_eager(self, run: Any) -> None:
            self.segments.append(run)
            run()

    capture = Capture()
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    monkeypatch.setattr(breakable_cudagraph, "_weak_ref_capture_arg", lambda argument: argument)  # is the GPU's
    monkeypatch.setattr(breakable_cudagraph.BreakableCUDAGraphCapture, "current", lambda: capture)
    layer = _Layer(is_shared=False)
    x = torch.randn(3, 8)
    context = ForwardContext(no_compile_layers={layer.layer_name: layer}, attn_metadata={}, slot_mapping={})
    with override_forward_context(context):
        out = layer._forward_between_graphs(x, x, None, None, layer.layer_name, 0)
        [segment] = capture.segments
        x.normal_()
        segment()
    assert torch.equal(out, 3 * x)


class _HidingRunner(SplitRunner):
    """Has a forward of its own, which may well call ours inside of an op."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.layer_name = "layers.0.experts"
        self._shared_experts = None
        self.routed_experts = nn.Module()
        object.__setattr__(self.routed_experts, "moe_offload_runtime", object())

    def forward(self, *arguments: Any) -> torch.Tensor:
        raise AssertionError("is not called")


def test_a_runner_that_hides_the_op_is_refused_where_graphs_are_to_be_cut_at_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "0")
    monkeypatch.setattr(runner, "get_current_vllm_config", lambda: engine(PIECEWISE))
    with pytest.raises(ConfigError, match=r"cudagraph_mode=PIECEWISE is not possible .* layers run by _HidingRunner"):
        _HidingRunner()._select_forward()
    monkeypatch.setattr(runner, "get_current_vllm_config", lambda: engine(BOTH))
    hiding = _HidingRunner()
    assert hiding._select_forward() is MoERunner._select_forward(hiding)


class _Seen:
    """What a dispatch is called with."""

    def __call__(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        self.seen: tuple[Any, ...] = ("computed", ids.tolist(), options)
        return x

    def rehearse(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        self.seen = ("rehearsed", ids.tolist(), {})
        return x


class _SeenOnDevice(_Seen, DeviceDispatch):
    def __init__(self) -> None:
        pass


@pytest.mark.parametrize("is_capturing", [False, True], ids=["launched", "captured"])
@pytest.mark.parametrize("metadata", [None, {}], ids=["dummy", "real"])
def test_a_graph_never_lacks_the_look_up_that_it_replays(
    metadata: Any, is_capturing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_SeenOnDevice, "is_capturing", lambda self: is_capturing)
    mask, ids = torch.tensor([False, True, True]), torch.tensor([[4, 2], [-1, -1]])
    context = ForwardContext(no_compile_layers={}, attn_metadata=metadata, slot_mapping={}, is_padding=mask)
    layer = nn.Module()
    seen: list[tuple[Any, ...]] = []
    for dispatch in (_SeenOnDevice(), _Seen()):
        object.__setattr__(layer, "moe_offload_dispatch", dispatch)
        with override_forward_context(context):
            x = torch.empty(2, 8, device="meta")
            assert experts.SlotExperts.run_from_slots(layer, x, x, ids) is x  # type: ignore[arg-type]
        seen.append(dispatch.seen)
    (what, on_device, options), on_host = seen
    cleaned = [[4, 2], [4, 2]]
    if metadata is None and not is_capturing:
        assert (what, on_device) == ("rehearsed", cleaned)
    else:
        assert (what, on_device) == ("computed", [[4, 2], [-1, -1]])
        assert options["is_padding"].tolist() == [False, True]
    assert on_host == ("rehearsed" if metadata is None else "computed", cleaned, {})
