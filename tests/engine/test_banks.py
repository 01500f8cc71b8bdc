"""Wherever the experts' homes are, the tokens are the same; and a slab file that is not right serves nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from benchmarks import page_cache
from benchmarks.widen import widen
from tests.engine.harness import (
    SCENARIOS,
    Scenario,
    generate,
    generate_in_own_process,
    generate_with_metrics,
    pack_model,
)
from tests.engine.test_equality import Equality, compare, resident_outputs
from vllm_moecxl.units import MIB

_WEIGHTS = "model.safetensors"
_SLAB_BYTES = 3 * 128 * 256 * 2


@pytest.fixture(scope="module")
def slabs(fixture_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model's slab file."""
    return pack_model(target=tmp_path_factory.mktemp("slabs") / "tiny.slabs", model=fixture_model)


@pytest.mark.parametrize(
    "home",
    [
        {"slots": "50%", "banks": ["file:SLABS"]},
        {"slots": 2, "banks": ["file:SLABS"], "layer_buffer": False, "verify": "fetch"},
        {"slots": "100%", "banks": ["file:SLABS"], "verify": "off"},
        {"slots": 3, "banks": ["dram=4MiB", "file:SLABS"]},
        {"slots": 3, "banks": ["emulated:1us,1GB/s", "emulated:2us,500MB/s"], "stripe": "all"},
        {"slots": 3, "banks": ["numa:0=1GiB", "dram"], "verify": "fetch"},
    ],
    ids=["file", "file-topk-verified", "file-all-slots", "dram-and-file", "striped", "numa-verified"],
)
def test_trained_model_from_every_kind_of_bank(
    fixture_model: str, slabs: Path, equality: Equality, home: dict[str, Any]
) -> None:
    home = home | {"banks": [bank.replace("SLABS", str(slabs)) for bank in home["banks"]]}
    offloaded, metrics = generate_with_metrics(model=fixture_model, moe_offload="cxl", moe_offload_config=home)
    compare(equality, f"trained, {home}", resident_outputs(fixture_model, SCENARIOS), offloaded)
    names = [bank.split("=")[0].replace(str(slabs), slabs.name) for bank in home["banks"]]
    assert all(metrics[f"bank_up{{{name}}}"] == 1 for name in names)
    assert sum(metrics[f"bank_bytes{{{name},used}}"] for name in names) == 48 * _SLAB_BYTES
    assert sum(metrics[f"fetch_bytes_total{{{name},demand}}"] for name in names) >= metrics["lookups_total{miss}"]


def test_hot_experts_of_a_trace_get_the_better_bank_and_the_first_slots(
    fixture_model: str, slabs: Path, equality: Equality, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.npz"
    _write_trace(trace, hot=(5, 2))
    # Room for two experts of each layer.
    home = {"slots": 2, "banks": [f"dram={2 * 6 * _SLAB_BYTES}B", f"file:{slabs}"], "placement_trace": str(trace)}
    scenarios = (SCENARIOS[0],)
    offloaded, metrics = generate_with_metrics(
        scenarios, model=fixture_model, moe_offload="cxl", moe_offload_config=home
    )
    compare(equality, "trained, placed by a trace", resident_outputs(fixture_model, scenarios), offloaded)
    assert metrics["bank_bytes{dram,used}"] == 2 * 6 * _SLAB_BYTES
    # The slots were filled before the first request; from the file too, which has a replica of what is in DRAM.
    fetched_bytes = sum(metrics[f"fetch_bytes_total{{{bank},demand}}"] for bank in ("dram", f"file:{slabs.name}"))
    assert fetched_bytes >= 2 * 6 * _SLAB_BYTES
    assert metrics["lookups_total{miss}"] < 2 * 6, "and some of what was asked for was there"


def _write_trace(path: Path, hot: tuple[int, int]) -> None:
    import numpy as np

    token_count = 12
    topk = np.tile(np.array(hot, dtype=np.uint8), (token_count, 6, 1))
    meta = json.dumps({"model": "mixtral-tiny", "num_experts": 8, "source": "test", "licence": "Apache-2.0"})
    np.savez(
        path,
        topk=topk,
        weights=np.zeros(0, np.float16),
        req=np.array([0, token_count], np.int32),
        prefill=np.zeros(1, np.int32),
        token_ids=np.full(token_count, -1, np.int32),
        layer_ids=np.arange(6, dtype=np.int32),
        meta=meta,
    )


def test_the_checkpoints_experts_are_not_read(fixture_model: str, slabs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.model_loader import default_loader

    read: list[str] = []
    iterate = default_loader.safetensors_weights_iterator

    def noting(*args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        for name, tensor in iterate(*args, **kwargs):
            read.append(name)
            yield name, tensor

    monkeypatch.setattr(default_loader, "safetensors_weights_iterator", noting)
    for home, is_read in ((["dram"], True), ([f"file:{slabs}"], False)):
        read.clear()
        options = {"slots": "50%", "banks": home}
        generate((SCENARIOS[0],), model=fixture_model, moe_offload="cxl", moe_offload_config=options)
        assert "lm_head.weight" in read
        assert any(".experts." in name for name in read) is is_read


def test_slabs_do_not_go_through_the_page_cache(fixture_model: str, slabs: Path) -> None:
    if subprocess.check_output(["stat", "-f", "-c", "%T", str(slabs)], text=True).strip() == "tmpfs":
        pytest.skip("temporary files are on a tmpfs here, which is nothing but page cache")
    page_cache.drop([slabs])
    home = {"slots": 2, "banks": [f"file:{slabs}"]}
    generate((SCENARIOS[0],), model=fixture_model, moe_offload="cxl", moe_offload_config=home)
    assert page_cache.cached_bytes([slabs]) == 0


def _failure(**engine: Any) -> str:
    """What an engine in a process of its own ends with."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.engine.harness", json.dumps(engine)], capture_output=True, text=True, check=False
    )
    assert run.returncode != 0
    return run.stderr


def _serve_from(slabs: Path, model: str, **engine: Any) -> dict[str, Any]:
    return {
        "model": model,
        "moe_offload": "cxl",
        "moe_offload_config": {"slots": "50%", "banks": [f"file:{slabs}"]},
        **engine,
    }


def test_a_slab_file_of_other_weights_is_refused(fixture_model: str, slabs: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(fixture_model, other)
    weights = load_file(other / _WEIGHTS)
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, other / _WEIGHTS, metadata={"format": "pt"})
    stderr = _failure(**_serve_from(slabs, str(other)))
    assert "was packed for weights" in stderr and "run moecxl pack for this model and this engine" in stderr


def test_a_slab_file_of_another_type_is_refused(fixture_model: str, slabs: Path) -> None:
    stderr = _failure(**_serve_from(slabs, fixture_model, dtype="float32"))
    assert "was packed for configuration" in stderr


def test_a_changed_slab_serves_no_token(fixture_model: str, slabs: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.slabs"
    data = bytearray(slabs.read_bytes())
    # In the middle of the slabs: past the first layer, which the self-check reads, so that a request finds it.
    data[len(data) // 2] ^= 1
    changed.write_bytes(data)
    stderr = _failure(**_serve_from(changed, fixture_model))
    assert "is not what was stored in bank file:changed.slabs" in stderr


def test_tensor_parallel_2_from_slab_files(fixture_model: str, equality: Equality, tmp_path: Path) -> None:
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_SIM_MULTI_NUMA": "1"}
    packing = subprocess.run(
        [
            *(sys.executable, "-m", "vllm_moecxl.commands.main", "pack", "--json"),
            *(fixture_model, str(tmp_path / "tiny.slabs"), "--tensor-parallel-size", "2", "--enforce-eager"),
        ],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert packing.returncode == 0, packing.stderr[-4000:]
    files = json.loads(packing.stdout.splitlines()[-1])["files"]
    assert [Path(file["path"]).name for file in files] == ["tiny.rank0of2.slabs", "tiny.rank1of2.slabs"]
    options = {"model": fixture_model, "tensor_parallel_size": 2}
    resident = generate_in_own_process(environment, **options)
    offloaded = generate_in_own_process(environment, **_serve_from(tmp_path / "tiny.slabs", **options))
    compare(equality, "trained, tensor parallel 2, slab files", resident, offloaded)


def test_more_experts_than_memory(fixture_model: str, tmp_path: Path) -> None:
    """Experts of twice the memory that the process may use, in a real cgroup, with the text of the narrow model."""
    from benchmarks import cgroup

    if reason := cgroup.why_not():
        pytest.skip(f"no memory cgroup can be made here: {reason}")
    wide = tmp_path / "wide"
    widen(Path(fixture_model), wide, _OVERSIZE_WIDTH)
    slabs = pack_model(target=tmp_path / "wide.slabs", model=str(wide))
    experts_bytes = 48 * 3 * 128 * _OVERSIZE_WIDTH * 2
    page_cache.drop([wide, slabs])
    home = {"slots": 2, "banks": [f"file:{slabs}"], "layer_buffer": False}
    outputs = tmp_path / "outputs.json"
    # Half of the experts' bytes have to hold the engine as well: nothing is spent on wide batches.
    frugal = {"max_num_seqs": 2, "max_num_batched_tokens": 16, "kv_cache_memory_bytes": 16 * MIB}
    engine = {"model": str(wide), "moe_offload": "cxl", "moe_offload_config": home, **frugal}
    usage = cgroup.run(
        [
            *(sys.executable, "-m", "tests.engine.harness"),
            *(json.dumps(engine), str(outputs), json.dumps([asdict(_FEW_TOKENS)])),
        ],
        limit_bytes=experts_bytes // 2,
        environment=dict(os.environ),
        timeout_s=300,
    )
    assert usage.oom_kill_count == 0 and usage.return_code == 0
    narrow = generate((_FEW_TOKENS,), model=fixture_model)
    served = json.loads(outputs.read_text())
    assert [tokens for tokens, _ in served[_FEW_TOKENS.name]] == [
        list(tokens) for tokens, _ in narrow[_FEW_TOKENS.name]
    ]


#: Each of its steps reads slabs of 59 MB.
_FEW_TOKENS = Scenario("few tokens", ("static int",), 6)
#: 2.8 GB of experts: half of that holds the engine itself and the top-k of every layer.
_OVERSIZE_WIDTH = 76_800
