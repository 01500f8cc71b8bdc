"""Served from slots, a model says exactly what it says in unmodified vLLM: every token, every logprob."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.engine.harness import (
    SCENARIOS,
    Output,
    Scenario,
    generate,
    generate_in_own_process,
    generate_with_metrics,
    pack_model,
)
from tests.support.checkpoints import (
    AMX_COMBINATIONS,
    ARCHITECTURES,
    COMBINATIONS,
    FORMAT_ENGINE_KWARGS,
    build,
    lift_amx_gate,
)

Equality = list[tuple[str, bool]]

_NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
#: What is compared for each model and format; the trained fixture runs all scenarios.
_MATRIX_SCENARIOS = (SCENARIOS[1], SCENARIOS[2])


@cache
def resident_outputs(
    model: str, scenarios: tuple[Scenario, ...], options: tuple[tuple[str, Any], ...] = ()
) -> dict[str, list[Output]]:
    return generate(scenarios, model=model, **dict(options))


def compare(
    equality: Equality, what: str, resident: dict[str, list[Output]], offloaded: dict[str, list[Output]]
) -> None:
    different = []
    for scenario, expected in resident.items():
        is_equal = offloaded[scenario] == expected
        equality.append((f"{what}, {scenario}", is_equal))
        if not is_equal:
            different.append(scenario)
    assert not different, f"{what}: other tokens or logprobs in {different}"


@pytest.mark.parametrize("layer_buffer", [True, False], ids=["layer-buffer", "passes-only"])
@pytest.mark.parametrize("slots", ["100%", "50%", "25%"])
def test_trained_model_at_every_cache_size(
    fixture_model: str, equality: Equality, slots: str, layer_buffer: bool
) -> None:
    offloaded = generate(
        model=fixture_model, moe_offload="cxl", moe_offload_config={"slots": slots, "layer_buffer": layer_buffer}
    )
    compare(
        equality,
        f"trained, slots {slots}, layer_buffer {layer_buffer}",
        resident_outputs(fixture_model, SCENARIOS),
        offloaded,
    )


def test_speculative_decoding(fixture_model: str, equality: Equality) -> None:
    # numba, which proposes the n-grams, keeps vLLM 0.32 from starting a second engine in the same process.
    options = {"model": fixture_model, "speculative_config": _NGRAM}
    resident = generate_in_own_process(**options)
    offloaded = generate_in_own_process(moe_offload="cxl", moe_offload_config={"slots": 2}, **options)
    compare(equality, "trained, n-gram speculation, slots 2", resident, offloaded)


def test_tensor_parallel_2(fixture_model: str, equality: Equality) -> None:
    options = {"model": fixture_model, "tensor_parallel_size": 2}
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_SIM_MULTI_NUMA": "1"}
    resident = generate_in_own_process(environment, **options)
    offloaded = generate_in_own_process(environment, moe_offload="cxl", moe_offload_config={"slots": "50%"}, **options)
    compare(equality, "trained, tensor parallel 2, slots 50%", resident, offloaded)


def test_dummy_weights(fixture_model: str, equality: Equality) -> None:
    options = {"model": fixture_model, "load_format": "dummy"}
    resident = generate(_MATRIX_SCENARIOS, **options)
    offloaded = generate(_MATRIX_SCENARIOS, moe_offload="cxl", moe_offload_config={"slots": "50%"}, **options)
    compare(equality, "dummy weights, slots 50%", resident, offloaded)


def test_fast_passes_fetch_every_expert_once_per_forward(fixture_model: str) -> None:
    outputs, metrics = generate_with_metrics(
        _MATRIX_SCENARIOS,
        model=fixture_model,
        moe_offload="cxl",
        moe_offload_config={"slots": 2, "passes": "fast"},
    )
    assert {name: [len(tokens) for tokens, _ in results] for name, results in outputs.items()} == {
        scenario.name: [scenario.max_tokens] * len(scenario.prompts) for scenario in _MATRIX_SCENARIOS
    }
    assert metrics["passes_total{expert}"] > 0
    assert metrics["passes_total{token}"] == metrics["passes_total{layer_buffer}"] == 0
    slab_bytes = 3 * 128 * 256 * 2
    assert metrics["fetch_bytes_total{dram,demand}"] == metrics["lookups_total{miss}"] * slab_bytes


def test_default_compile_mode(fixture_model: str, equality: Equality) -> None:
    resident = generate(model=fixture_model, enforce_eager=False)
    offloaded = generate(
        model=fixture_model, enforce_eager=False, moe_offload="cxl", moe_offload_config={"slots": "50%"}
    )
    compare(equality, "trained, compiled, slots 50%", resident, offloaded)


@pytest.mark.parametrize(("arch", "fmt"), COMBINATIONS, ids=map("-".join, COMBINATIONS))
def test_models(arch: str, fmt: str, equality: Equality, tokenizer_dir: Path, tmp_path: Path) -> None:
    _compare_checkpoint(arch, fmt, equality, tokenizer_dir, tmp_path)


@pytest.mark.parametrize(("arch", "fmt"), AMX_COMBINATIONS, ids=map("-".join, AMX_COMBINATIONS))
def test_quantised_formats(arch: str, fmt: str, equality: Equality, tokenizer_dir: Path, tmp_path: Path) -> None:
    # vLLM offers these kernels on CPUs with AMX only, though they run without: both engines get them here.
    lift_amx_gate()
    _compare_checkpoint(arch, fmt, equality, tokenizer_dir, tmp_path)


def _compare_checkpoint(arch: str, fmt: str, equality: Equality, tokenizer_dir: Path, folder: Path) -> None:
    """At the smallest number of slots from memory, and from a slab file with slots for part of a batch's experts."""
    options: dict[str, Any] = {
        "model": str(build(arch, fmt, folder, tokenizer_dir)),
        **FORMAT_ENGINE_KWARGS.get(fmt, {}),
    }
    resident = generate(_MATRIX_SCENARIOS, **options)
    topk = ARCHITECTURES[arch].get("num_experts_per_tok", 2)
    slabs = pack_model(target=folder / "model.slabs", **options)
    for home in ({"slots": topk}, {"slots": "75%", "banks": [f"file:{slabs}"]}):
        offloaded = generate(_MATRIX_SCENARIOS, moe_offload="cxl", moe_offload_config=home, **options)
        compare(equality, f"{arch} {fmt}, slots {home['slots']}", resident, offloaded)
