"""`moecxl simulate`: what it says, and one sentence for each value that is not possible."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.simulation.world import make_trace
from vllm_moecxl.commands.main import EXIT_USAGE, main
from vllm_moecxl.control.simulator import machine, model
from vllm_moecxl.data.profiles import machine_identity, save_profile
from vllm_moecxl.linux.topology import read_topology

LAYERS, EXPERTS = 3, 8
CONFIG = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "vocab_size": 4096,
    "dtype": "bfloat16",
}
#: The keys that users rely on.
KEYS = {
    *("label", "lookups", "hits", "pending", "misses", "hit_rate", "belady_hit_rate", "demand_bytes"),
    *("prefetch_bytes", "prefetch", "ttft_s", "tpot_s", "tokens_per_s", "tier_share", "stall_s"),
}


@pytest.fixture
def arguments(tmp_path: Path) -> dict[str, str]:
    """Options that work."""
    make_trace(1, layer_count=LAYERS, expert_count=EXPERTS, prompt_count=5).save(tmp_path / "trace.npz")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return {
        "--trace": str(tmp_path / "trace.npz"),
        "--model": str(tmp_path),
        "--hardware": "a100-80gb-cxl",
    }


def run(arguments: dict[str, str], *more: str) -> int:
    return main(["simulate", *(text for pair in arguments.items() for text in pair), *more])


def simulated(capsys: pytest.CaptureFixture[str], arguments: dict[str, str], *more: str) -> dict[str, Any]:
    assert run(arguments, "--json", *more) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_the_result_has_what_users_rely_on(capsys: pytest.CaptureFixture[str], arguments: dict[str, str]) -> None:
    result = simulated(capsys, arguments)
    assert result.keys() >= KEYS and result["label"] == "simulated"
    assert result["prefetch"].keys() >= {"issued", "useful", "late", "wasted"} and result["predictors"]
    assert result["lookups"] == result["hits"] + result["pending"] + result["misses"] > 0
    assert result["hit_rate"] == result["hits"] / result["lookups"] < 1
    assert result["ttft_s"].keys() == result["tpot_s"].keys() == {"mean", "p50", "p99"}
    assert result["slot_count"] == EXPERTS // 2 and result["requests"] == 6


def test_people_get_a_table(capsys: pytest.CaptureFixture[str], arguments: dict[str, str]) -> None:
    assert run(arguments) == 0
    out = capsys.readouterr().out
    for words in ("simulated:", "hit rate", "with the future known", "prefetches", "tokens/s", "waited"):
        assert words in out


def test_options_are_obeyed(capsys: pytest.CaptureFixture[str], arguments: dict[str, str]) -> None:
    options = ["--slots", "3", "--eviction", "lru", "--prefetch", "off", "--batch", "2", "--requests", "4"]
    result = simulated(capsys, arguments, *options, "--decode-only")
    assert (result["slot_count"], result["eviction"], result["batch"], result["requests"]) == (3, "lru", 2, 4)
    assert result["prefetch"]["issued"] == result["prefetch_bytes"] == 0 == result["passes"]["layer_buffer"]
    assert simulated(capsys, arguments, "--weights", "fp8")["demand_bytes"] < result["demand_bytes"]
    slow = simulated(capsys, arguments, "--layer-s", "0.5", "--slots", "100%", "--prefetch", "off", "--decode-only")
    assert slow["tpot_s"]["p50"] == pytest.approx(0.5 * LAYERS, rel=0.01)


def test_banks_may_be_named_or_described(capsys: pytest.CaptureFixture[str], arguments: dict[str, str]) -> None:
    banks = ["--banks", "cxl-b=5MiB", "dram", "emulated:300ns,2GB/s=1GiB"]
    result = simulated(capsys, arguments, *banks, "--slots", "2")
    assert result["bank_bytes"].keys() == {"cxl-b", "dram", "emulated:300ns,2GB/s"}
    assert result["tier_share"].keys() == {"device", "cxl", "dram"}


def test_this_machine_is_what_was_measured_here(
    capsys: pytest.CaptureFixture[str], arguments: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = {**arguments, "--hardware": "this-machine"}
    before = simulated(capsys, here)["duration_s"]
    measured = {"summary": {"latency_s": 1e-6, "read_bytes_per_s": 1e6}}
    save_profile(machine_identity(read_topology()), "dram", measured)
    result = simulated(capsys, here)
    assert result["duration_s"] > 10 * before


@pytest.mark.parametrize(
    ("option", "value", "remedy"),
    [
        ("--trace", "/nowhere.npz", "give another file"),
        ("--model", "gpt-2", "name one of deepseek-v2-lite"),
        ("--model", "mixtral-8x7b", "name the model that was traced"),
        ("--model", __file__, "or the config.json of a Mixture-of-Experts model"),
        ("--hardware", "abacus", "name one of a100-80gb-cxl"),
        ("--hardware", __file__, "it is not JSON"),
        ("--slots", "1", "use a count from 2 to 8"),
        ("--slots", "9", "use a count from 2 to 8"),
        ("--slots", "5%", "use a count from 2 to 8"),
        ("--slots", "1KiB", "use a count from 2 to 8"),
        ("--slots", "auto", "use a percentage"),
        ("--slots", "half", "use a percentage"),
        ("--eviction", "oracle", "use one of"),
        ("--prefetch", "tea-leaves", 'use "auto", "off"'),
        ("--batch", "0", "from 1 to"),
        ("--requests", "0", "at least 1"),
        ("--banks", "cupboard", "use cxl-d"),
        ("--banks", "dram=much", "a size has a unit"),
        ("--banks", "emulated:cxl-z", "such as"),
        ("--banks", "dram=1MiB", "give the banks at least"),
        ("--weights", "int3", "use one of"),
        ("--layer-s", "-1", "give seconds above 0"),
        ("--layer-s", "nan", "give seconds above 0"),
        ("--seed", "-1", "at least 0"),
    ],
)
def test_a_value_that_is_not_possible_is_refused_in_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: dict[str, str], option: str, value: str, remedy: str
) -> None:
    assert run({**arguments, option: value}, "--json") == EXIT_USAGE
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("moecxl simulate: ") and remedy in captured.err
    assert value.partition("=")[0] in captured.err


def test_every_profile_and_model_of_the_package_is_sound() -> None:
    for name in machine.names():
        hardware = machine.load(name)
        assert (
            hardware.banks
            and json.loads((Path(machine.__file__).parent / "hardware" / f"{name}.json").read_text())["sources"]
        )
    assert {"a100-80gb-cxl", "h100-80gb", "consumer-16gb", "consumer-24gb", "this-machine"} <= set(machine.names())
    sizes = {name: model.load(name) for name in model.names()}
    mixtral, v3 = sizes["mixtral-8x7b"], sizes["deepseek-v3"]
    assert mixtral.slab_bytes == 3 * 4096 * 14336 * 2 and mixtral.layer_count == 32
    assert v3.slab_bytes == 3 * 7168 * 2048 and (v3.layer_count, v3.expert_count, v3.topk) == (58, 256, 8)
    totals = {"mixtral-8x7b": 46.7e9, "deepseek-v2-lite": 15.7e9, "deepseek-v3": 671e9, "qwen3-30b-a3b": 30.5e9}
    for name, published in totals.items():
        one = sizes[name]
        moe_count = one.layer_count * (one.expert_count * one.expert_weight_count + one.beside_weight_count)
        # The published counts have the embeddings too, which no token reads as a whole.
        assert 0.97 < (moe_count + one.rest_weight_count) / published < 1.001, name


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({"banks": []}, "out of range"),
        ({"device": {}}, "missing"),
        ({"link": {"bytes_per_s": -1}}, "out of range"),
        ({"device": {"is_host": True, "memory_bytes_per_s": 1, "flops_per_s": 1, "colour": 1}}, "colour"),
        ({"banks": [{"name": "x", "tier": "cxl", "spec": "fast"}]}, "fast"),
        ({"banks": [{"name": "x", "spec": "cxl-a"}]}, "tier"),
        ({"banks": [{"name": "x", "tier": "attic", "spec": "cxl-a"}]}, "attic"),
    ],
)
def test_a_profile_that_is_not_sound_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: dict[str, str], tmp_path: Path, change: dict[str, Any], finding: str
) -> None:
    folder = Path(machine.__file__).parent / "hardware"
    sound = json.loads((folder / "a100-80gb-cxl.json").read_text())
    path = tmp_path / "machine.json"
    path.write_text(json.dumps({**sound, **change}))
    assert run({**arguments, "--hardware": str(path)}) == EXIT_USAGE
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(path) in error and finding in error
