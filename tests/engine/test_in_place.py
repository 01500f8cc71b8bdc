"""Layers that run straight from their homes: by the user's choice or the cheaper one, with the same tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine.harness import SCENARIOS, Scenario, generate, generate_with_metrics, pack_model, read_metrics
from tests.engine.test_equality import Equality, compare, resident_outputs
from tests.support.checkpoints import FORMAT_ENGINE_KWARGS, build, lift_amx_gate
from vllm_moecxl.data.profiles import PUBLISHED, machine_identity, save_profile
from vllm_moecxl.linux.topology import read_topology

#: Decodes of several requests, a long prefill among decodes, and forwards that need no more than the top-k.
_SCENARIOS = (SCENARIOS[1], SCENARIOS[2], Scenario("one request", ("static int",), 30))
_NODE = "numa:0"


@pytest.fixture
def _slow_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Node 0 was measured at a third of what slots are read at: neither way is always the cheaper one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    summary = {"latency_s": 400e-9, "read_bytes_per_s": PUBLISHED["dram"].read_bytes_per_s / 3}
    save_profile(machine_identity(read_topology()), _NODE, {"summary": summary})


class _Start:
    """What an engine had counted before its first request: the self-check fetches slabs too."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def note(self, llm: Any) -> None:
        self.metrics = read_metrics(llm)


def _served(model: str, options: dict[str, Any], **engine: Any) -> tuple[dict[str, Any], dict[str, float]]:
    """Outputs, and what the requests added to the metrics."""
    start = _Start()
    outputs, metrics = generate_with_metrics(
        _SCENARIOS, start.note, model=model, moe_offload="cxl", moe_offload_config=options, **engine
    )
    return outputs, {name: value - start.metrics[name] for name, value in metrics.items()}


def _check_ways(in_place: str, bank: str, counted: dict[str, float]) -> None:
    """Assert which ways forwards have taken."""
    direct_count = counted["passes_total{in_place}"]
    fetched_bytes = counted[f"fetch_bytes_total{{{bank},demand}}"]
    slot_passes = sum(counted[f"passes_total{{{kind}}}"] for kind in ("single", "token", "layer_buffer"))
    # From a bank that is as fast as slots, they would only cost.
    if in_place == "always" or (in_place == "auto" and bank == "dram"):
        assert direct_count > 0 and fetched_bytes == slot_passes == 0
        assert not any(value for name, value in counted.items() if name.startswith("lookups_total"))
    elif in_place == "never":
        assert direct_count == 0 and fetched_bytes > 0 and slot_passes > 0
    else:
        assert direct_count > 0 and fetched_bytes > 0 and slot_passes > 0


@pytest.mark.parametrize(
    ("in_place", "slots", "bank"),
    [
        ("auto", "50%", "dram"),
        ("auto", "50%", _NODE),
        ("auto", 2, _NODE),
        ("always", 2, "dram"),
        ("always", "50%", _NODE),
        ("never", 2, _NODE),
    ],
)
@pytest.mark.usefixtures("_slow_node")
def test_trained_model(fixture_model: str, equality: Equality, in_place: str, slots: str | int, bank: str) -> None:
    options = {"in_place": in_place, "slots": slots, "banks": [bank]}
    offloaded, counted = _served(fixture_model, options)
    compare(equality, f"trained, {options}", resident_outputs(fixture_model, _SCENARIOS), offloaded)
    _check_ways(in_place, bank, counted)


@pytest.mark.usefixtures("_slow_node")
def test_a_cache_of_every_expert_fills_up_and_is_used(fixture_model: str, equality: Equality) -> None:
    options = {"in_place": "auto", "slots": "100%", "banks": [_NODE]}
    offloaded, counted = _served(fixture_model, options)
    compare(equality, f"trained, {options}", resident_outputs(fixture_model, _SCENARIOS), offloaded)
    _check_ways("auto", _NODE, counted)
    assert counted["passes_total{single}"] > counted["passes_total{in_place}"] > 0
    slab_bytes = 3 * 128 * 256 * 2
    assert counted[f"fetch_bytes_total{{{_NODE},demand}}"] <= 48 * slab_bytes, "no expert is copied twice"


@pytest.mark.parametrize("fmt", ["fp8_block", "ct_int4"])
@pytest.mark.usefixtures("_slow_node")
def test_quantised_formats(fmt: str, equality: Equality, tokenizer_dir: Path, tmp_path: Path) -> None:
    lift_amx_gate()
    options: dict[str, Any] = {
        "model": str(build("mixtral", fmt, tmp_path / "model", tokenizer_dir)),
        **FORMAT_ENGINE_KWARGS.get(fmt, {}),
    }
    resident = generate(_SCENARIOS, **options)
    for in_place in ("auto", "always"):
        offload = {"in_place": in_place, "slots": "50%", "banks": [_NODE]}
        offloaded, counted = _served(options=offload, **options)
        compare(equality, f"mixtral {fmt}, {offload}", resident, offloaded)
        _check_ways(in_place, _NODE, counted)


@pytest.mark.parametrize("bank", ["file:SLABS", "emulated:1us,1GB/s"], ids=["file", "emulated"])
def test_always_is_refused_where_the_kernel_cannot_read_the_homes(
    fixture_model: str, tmp_path: Path, bank: str
) -> None:
    if bank.startswith("file"):
        bank = f"file:{pack_model(target=tmp_path / 'tiny.slabs', model=fixture_model)}"
    engine = {
        "model": fixture_model,
        "moe_offload": "cxl",
        "moe_offload_config": {"in_place": "always", "slots": "50%", "banks": [bank]},
    }
    run = subprocess.run(
        [sys.executable, "-m", "tests.engine.harness", json.dumps(engine)], capture_output=True, text=True, check=False
    )
    assert run.returncode != 0
    (sentence,) = {line.partition("ConfigError: ")[2] for line in run.stderr.splitlines() if "ConfigError: " in line}
    assert sentence.startswith('--moe-offload-config: in_place="always" is not possible: ')
    assert 'name one bank of memory on the CPU engine without verify="fetch", or use "auto"' in sentence
