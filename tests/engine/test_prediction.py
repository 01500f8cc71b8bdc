"""Predicting changes when experts come, and nothing that is said; recordings hold what the routers chose."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.harness import (
    SCENARIOS,
    Output,
    Scenario,
    at_step,
    generate_in_own_process,
    generate_with_metrics,
    read_metrics,
)
from tests.engine.test_equality import Equality, compare
from vllm_moecxl.control import trial
from vllm_moecxl.control.device_model import DeviceSpec
from vllm_moecxl.control.simulator import machine, model, report
from vllm_moecxl.control.simulator.simulator import Options, Simulator
from vllm_moecxl.control.trace import RoutingTrace
from vllm_moecxl.control.trial import Trial
from vllm_moecxl.errors import ConfigError
from vllm_moecxl.runtime.dispatch import Dispatch
from vllm_moecxl.runtime.ring import RoutingRing, Sighting
from vllm_moecxl.runtime.runtime import OffloadRuntime

#: One request at a time, from a cold start.
_ALONE = tuple(
    Scenario(f"alone {number}", (prompt,), 24)
    for number, prompt in enumerate(
        ("The quick brown fox", "def main(argv):\n    ", "#include <stdio.h>\n", "import os\nimport sys\n")
    )
)
_BATCHES = (SCENARIOS[1], SCENARIOS[2])
_ALL = (*_ALONE, *_BATCHES)
_ALONE_STEP_COUNT = sum(scenario.max_tokens for scenario in _ALONE)
_SLOW_BANK = "50us,1GB/s"
_OPTIONS: dict[str, Any] = {"slots": "50%", "banks": [f"emulated:{_SLOW_BANK}"]}
_NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
_PATIENCE_S = 20.0
_ABORT_STEP = 15


@dataclass
class Run:
    """What an engine did.

    Attributes:
        alone: its metrics when the requests that ran alone had ended.
    """

    outputs: dict[str, list[Output]]
    metrics: dict[str, float]
    alone: dict[str, float] = field(default_factory=dict)
    trace: RoutingTrace | None = None


def _runtime(llm: Any) -> OffloadRuntime:
    (runtime,) = llm.apply_model(lambda model: model.moe_offload_runtime)
    assert isinstance(runtime, OffloadRuntime)
    return runtime


def _catch_up(runtime: OffloadRuntime) -> None:
    """Return once everything that was seen is taken in, and everything that was ordered is there."""
    foresight, mover = runtime._foresight, runtime._mover
    if foresight is None:
        return
    foresight.drain()
    with foresight._lock:  # whoever drains has finished
        pass
    with mover._changed:
        assert mover._changed.wait_for(lambda: mover.is_idle, _PATIENCE_S)


@pytest.fixture(scope="module")
def leisurely() -> Iterator[None]:
    """Layers that take longer than the sidecar needs to fetch for them, and prefetching that is never tried out."""
    with pytest.MonkeyPatch.context() as patch:
        call = Dispatch.__call__
        runtimes: dict[int, OffloadRuntime] = {}

        def call_in_time(self: Dispatch, *args: Any) -> torch.Tensor:
            if id(self) in runtimes:
                _catch_up(runtimes[id(self)])
            return call(self, *args)

        foresee = OffloadRuntime.foresee

        def foresee_and_note(self: OffloadRuntime, *args: Any) -> None:
            foresee(self, *args)
            runtimes.update((id(dispatch), self) for dispatch in self.dispatches.values())

        patch.setattr(Dispatch, "__call__", call_in_time)
        patch.setattr(OffloadRuntime, "foresee", foresee_and_note)
        patch.setattr(trial, "WARMUP_STEP_COUNT", 1 << 40)
        yield


def _serve(model: str, scenarios: tuple[Scenario, ...], trace: Path | None = None, **options: Any) -> Run:
    run = Run({}, {})
    runtimes: list[OffloadRuntime] = []

    def note(llm: Any) -> None:
        run.alone = read_metrics(llm)

    def prepare(llm: Any) -> None:
        runtimes.append(_runtime(llm))
        at_step(_ALONE_STEP_COUNT + 1, note)(llm)

    recording = {} if trace is None else {"trace": str(trace)}
    run.outputs, run.metrics = generate_with_metrics(
        scenarios,
        prepare,
        model=model,
        moe_offload="cxl",
        moe_offload_config={**_OPTIONS, **options, **recording},
    )
    if trace is not None:
        foresight = runtimes[0]._foresight
        assert foresight is not None
        foresight.close()
        run.trace = RoutingTrace.load(trace)
    return run


@pytest.fixture(scope="module")
def routes() -> list[tuple[str, np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Of every forward of the resident engine and every layer: its name, expert ids and weights."""
    return []


@pytest.fixture(scope="module")
def resident(fixture_model: str, routes: list[Any]) -> dict[str, list[Output]]:
    """What unmodified vLLM says; what its routers chose is noted by a hook of our own."""

    def hook(name: str, layer: Any) -> None:
        forward = layer.forward_modular

        def noting(x: Any, topk_weights: Any, topk_ids: Any, *others: Any, **named: Any) -> Any:
            routes.append((name, topk_ids.to(torch.int64).numpy().copy(), topk_weights.float().numpy().copy()))
            return forward(x, topk_weights, topk_ids, *others, **named)

        layer.forward_modular = noting

    def hook_all(model: Any) -> None:
        for name, module in model.named_modules():
            if hasattr(module, "forward_modular"):
                hook(name, module)

    return generate_with_metrics(_ALL, lambda llm: llm.apply_model(hook_all), model=fixture_model)[0]


@pytest.fixture(scope="module")
def on_demand(fixture_model: str, leisurely: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Requests alone, with a recording and without prefetching."""
    return _serve(fixture_model, _ALONE, tmp_path_factory.mktemp("trace") / "demand.npz", prefetch="off")


@pytest.fixture(scope="module")
def ahead(fixture_model: str, leisurely: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All requests, with a recording and prefetching."""
    return _serve(fixture_model, _ALL, tmp_path_factory.mktemp("trace") / "ahead.npz")


def _only(outputs: dict[str, list[Output]], scenarios: tuple[Scenario, ...]) -> dict[str, list[Output]]:
    return {scenario.name: outputs[scenario.name] for scenario in scenarios}


def _hit_rate(metrics: dict[str, float]) -> float:
    hits, misses, pending = (metrics[f"lookups_total{{{kind}}}"] for kind in ("hit", "miss", "pending"))
    return hits / (hits + misses + pending)


def test_prefetching_says_what_the_resident_engine_says(
    resident: dict[str, list[Output]], ahead: Run, equality: Equality
) -> None:
    compare(equality, "trained, prefetching", resident, ahead.outputs)


def test_prefetching_finds_more_experts_in_their_slots(on_demand: Run, ahead: Run) -> None:
    assert ahead.metrics["prefetch_total{useful}"] > 0
    assert ahead.metrics["prefetch_total{useful}"] > ahead.metrics["prefetch_total{wasted}"]
    assert _hit_rate(ahead.alone) > _hit_rate(on_demand.metrics) + 0.05


def test_prefetching_with_slots_for_one_token(
    fixture_model: str, leisurely: None, resident: dict[str, list[Output]], equality: Equality
) -> None:
    run = _serve(fixture_model, _ALL, slots=2)
    compare(equality, "trained, prefetching, slots 2", resident, run.outputs)
    assert run.metrics["prefetch_total{useful}"] > 0


def test_prefetching_by_one_predictor(
    fixture_model: str, leisurely: None, resident: dict[str, list[Output]], equality: Equality
) -> None:
    run = _serve(fixture_model, _ALL, prefetch=["gate"])
    compare(equality, "trained, prefetching by gates", resident, run.outputs)
    assert run.metrics["prefetch_total{useful}"] > 0


def test_prefetching_under_speculation(fixture_model: str, equality: Equality) -> None:
    # numba, which proposes the n-grams, keeps vLLM 0.32 from starting a second engine in the same process.
    options = {"model": fixture_model, "speculative_config": _NGRAM}
    resident = generate_in_own_process(**options)
    offloaded = generate_in_own_process(moe_offload="cxl", moe_offload_config=_OPTIONS, **options)
    compare(equality, "trained, prefetching, n-gram speculation", resident, offloaded)


def test_the_simulator_finds_every_hit_and_miss_of_the_engine(fixture_model: str, on_demand: Run) -> None:
    assert on_demand.trace is not None
    hardware = machine.load("this-machine").with_banks(
        [machine.BankModel.of("slow", "cxl", DeviceSpec.parse(_SLOW_BANK), reader_count=2)]
    )
    options = Options(slot_counts=4, eviction="learned")
    simulated = report.simulate(Simulator(on_demand.trace, model.load(fixture_model), hardware, options))
    engine = {kind: on_demand.metrics[f"lookups_total{{{kind}}}"] for kind in ("hit", "pending", "miss")}
    assert (simulated["hits"], simulated["pending"], simulated["misses"]) == tuple(engine.values())
    assert engine["miss"] > 0 == engine["pending"]


def _rows(routes: list[Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """[tokens, layers, k] expert ids and weights of all forwards, one behind the other."""
    names = list(dict.fromkeys(name for name, _, _ in routes))
    ids, weights = (
        np.stack([np.concatenate([one[part] for one in routes if one[0] == name]) for name in names], axis=1)
        for part in (1, 2)
    )
    return ids, weights


def test_a_recording_has_what_the_routers_chose(
    resident: dict[str, list[Output]], on_demand: Run, routes: list[Any]
) -> None:
    trace = on_demand.trace
    assert trace is not None and trace.weights is not None
    ids, weights = _rows(routes)
    # The resident engine served these first, in the same order.
    assert np.array_equal(trace.topk, ids[: trace.token_count])
    assert np.array_equal(trace.weights, weights[: trace.token_count].astype(np.float16))


def test_a_recording_has_the_requests(fixture_model: str, on_demand: Run, ahead: Run) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(fixture_model, "tokenizer.json")))
    for trace, scenarios, run in ((on_demand.trace, _ALONE, on_demand), (ahead.trace, _ALL, ahead)):
        assert trace is not None
        expected = [
            (tokenizer.encode(prompt).ids, list(tokens)[:-1])
            for scenario in scenarios
            for prompt, (tokens, _) in zip(scenario.prompts, run.outputs[scenario.name], strict=True)
        ]
        recorded = [
            (
                trace.token_ids[tokens][: trace.prefill[number]].tolist(),
                trace.token_ids[tokens][trace.prefill[number] :],
            )
            for number, tokens in trace.requests()
        ]
        by_prompt = sorted((prompt, generated.tolist()) for prompt, generated in recorded)
        assert by_prompt == sorted(expected)


def test_a_recording_of_requests_side_by_side_has_what_the_routers_chose(
    resident: dict[str, list[Output]], ahead: Run, routes: list[Any]
) -> None:
    assert ahead.trace is not None
    ids, _ = _rows(routes)
    flat = sorted(map(bytes, ids.astype(np.uint8).reshape(len(ids), -1)))
    assert sorted(map(bytes, ahead.trace.topk.reshape(ahead.trace.token_count, -1))) == flat


def test_a_recording_has_what_the_next_gates_said_early(on_demand: Run) -> None:
    trace = on_demand.trace
    assert trace is not None and trace.lookahead is not None
    decodes = trace.decode_mask()
    early, chosen = trace.lookahead[decodes][:, 1:], trace.topk[decodes][:, 1:]
    recall = (early[..., None] == chosen[..., None, :]).any(-1).mean()
    assert recall > 0.5, "twice that of a guess"
    assert (early != chosen).any(), "early is not the same as in time"


def test_without_a_sidecar_a_recording_is_the_same(fixture_model: str, on_demand: Run, tmp_path: Path) -> None:
    run = _serve(fixture_model, _ALONE, tmp_path / "trace.npz", sidecar=False)
    assert run.trace is not None and on_demand.trace is not None
    for name in ("topk", "weights", "lookahead", "token_ids", "req", "prefill"):
        assert np.array_equal(getattr(run.trace, name), getattr(on_demand.trace, name)), name


def test_a_request_that_is_aborted_wants_nothing_any_more(
    fixture_model: str, leisurely: None, resident: dict[str, list[Output]], equality: Equality
) -> None:
    aborted: list[str] = []
    wanted: list[set[str]] = []
    paid: list[set[str]] = []

    def prepare(llm: Any) -> None:
        step = llm.llm_engine.step
        counter = iter(range(1 << 30))

        def stepping() -> Any:
            if next(counter) == _ABORT_STEP:
                aborted.extend(list(llm.llm_engine.output_processor.request_states)[:2])
                llm.llm_engine.abort_request(aborted, internal=True)
            result = step()
            scheduler = _runtime(llm)._mover._scheduler
            wanted.append(set(scheduler._wanted))
            paid.append({one for link in scheduler._links for fair in link.fairness for one in fair.paid_bytes})
            return result

        llm.llm_engine.step = stepping

    outputs, _ = generate_with_metrics(
        _BATCHES, prepare, model=fixture_model, moe_offload="cxl", moe_offload_config={**_OPTIONS, "slots": "75%"}
    )
    expected = {name: list(some) for name, some in _only(resident, _BATCHES).items()}
    del expected[_BATCHES[0].name][:2]
    compare(equality, "trained, prefetching, two requests aborted", expected, outputs)
    assert any(set(aborted) & some for some in (*wanted[:_ABORT_STEP], *paid[:_ABORT_STEP])), (
        "they wanted something before"
    )
    assert not any(set(aborted) & some for some in (*wanted[_ABORT_STEP + 1 :], *paid[_ABORT_STEP + 1 :]))


def test_prefetching_that_does_not_pay_is_switched_off_and_nothing_is_seen_any_more(
    fixture_model: str,
    leisurely: None,
    resident: dict[str, list[Output]],
    equality: Equality,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sightings: list[int] = []
    put = RoutingRing._put

    def counting(self: RoutingRing, entry: Any) -> None:
        sightings[-1:] = [sightings[-1] + isinstance(entry, Sighting)] if sightings else [0]
        put(self, entry)

    def lose(self: Trial, width: int, duration_s: float) -> None:
        self.is_on = False

    def prepare(llm: Any) -> None:
        step = llm.llm_engine.step

        def stepping() -> Any:
            sightings.append(0)
            return step()

        llm.llm_engine.step = stepping

    monkeypatch.setattr(RoutingRing, "_put", counting)
    monkeypatch.setattr(Trial, "observe", lose)
    outputs, _ = generate_with_metrics(
        _ALONE, prepare, model=fixture_model, moe_offload="cxl", moe_offload_config=_OPTIONS
    )
    compare(equality, "trained, prefetching switched off", _only(resident, _ALONE), outputs)
    assert sightings[0] == 6, "each layer of the first step"
    assert len(sightings) == _ALONE_STEP_COUNT and sum(sightings[8:]) == 0


def test_it_is_said_why_nothing_is_prefetched(fixture_model: str, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("vllm.moecxl")
    caplog.set_level(logging.INFO, logger.name)
    logger.addHandler(caplog.handler)
    try:
        generate_with_metrics(
            _ALONE[:1],
            model=fixture_model,
            moe_offload="cxl",
            moe_offload_config={"slots": "50%", "in_place": "always"},
        )
    finally:
        logger.removeHandler(caplog.handler)
    assert "nothing is prefetched into slots: all layers run in place" in caplog.text


def _refusal(model: str, **options: Any) -> str:
    from vllm.engine.arg_utils import EngineArgs

    offload = {"mode": "cxl", "slots": "50%", **options}
    with pytest.raises(ConfigError) as refusal:
        EngineArgs(model=model, additional_config={"moe_offload": offload}).create_engine_config()
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize(
    ("place", "finding"),
    [
        (lambda folder: folder / "nowhere" / "trace.npz", "is no folder"),
        (lambda folder: folder, "it is there and not a file"),
        (lambda folder: Path("/proc/self/trace.npz"), "nobody may write in '/proc/self'"),
    ],
    ids=["no-folder", "a-folder", "not-writable"],
)
def test_a_path_that_no_recording_can_go_to_is_refused(
    fixture_model: str, tmp_path: Path, place: Callable[[Path], Path], finding: str
) -> None:
    path = str(place(tmp_path))
    sentence = _refusal(fixture_model, trace=path)
    assert f"trace={path!r} cannot be written: " in sentence and finding in sentence


def test_an_unknown_predictor_is_refused(fixture_model: str) -> None:
    assert "prefetch=['oracle'] is not possible" in _refusal(fixture_model, prefetch=["oracle"])
