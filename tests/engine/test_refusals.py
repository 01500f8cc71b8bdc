"""What cannot work does not start, and says why in one sentence; what was not asked for changes nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_moecxl.errors import ConfigError, MoeOffloadError, UnsupportedModelError

OFFLOAD = {"mode": "cxl", "slots": "50%"}


def _config(model: str, options: Any = None, **arguments: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    additional = {} if options is None else {"additional_config": {"moe_offload": options}}
    return EngineArgs(model=model, **additional, **arguments).create_engine_config()


@pytest.fixture(scope="module")
def dense_model(fixture_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("dense")
    config = json.loads((Path(fixture_model) / "config.json").read_text())
    for key in ("num_local_experts", "num_experts_per_tok", "router_aux_loss_coef", "output_router_logits"):
        config.pop(key, None)
    config.update(architectures=["LlamaForCausalLM"], model_type="llama")
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(fixture_model) / name, folder)
    return str(folder)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"enable_expert_parallel": True}, "expert parallelism"),
        ({"data_parallel_size": 2}, "data parallelism"),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism on the CPU engine"),
        ({"enable_lora": True}, "LoRA"),
        ({"load_format": "sharded_state"}, "--load-format sharded_state"),
        ({"load_format": "tensorizer"}, "--load-format tensorizer"),
        ({"cpu_offload_gb": 1}, "vLLM's own weight offloading"),
        ({"worker_extension_cls": "somebody.Else"}, "--worker-extension-cls somebody.Else"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_unsupported_feature_is_refused_by_name(fixture_model: str, arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError) as refusal:
        _config(fixture_model, OFFLOAD, **arguments)
    sentence = str(refusal.value)
    assert named in sentence
    assert "\n" not in sentence


def test_a_dense_model_is_refused(dense_model: str) -> None:
    with pytest.raises(UnsupportedModelError, match="dense model"):
        _config(dense_model, OFFLOAD)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mode": "cxl", "slotz": 4}, "unknown option.*slotz"),
        ({"mode": "cxl", "slots": 1}, "slots=1 .*at least 2"),
        ({"mode": "cxl", "slots": "5%"}, "slots='5%' .*at least 25%"),
        ({"mode": "cxl", "slots": 9}, "slots=9 .*only 8 experts"),
        ({"mode": "cxl", "banks": ["tape:1"]}, "banks='tape:1'"),
        ({"mode": "cxl", "banks": ["numa:999"]}, '"numa:999" is no node of this machine'),
        ({"mode": "cxl", "banks": "file:/nowhere/model.slabs"}, 'banks="file:/nowhere/model.slabs" cannot be opened'),
        ({"mode": "cxl", "banks": ["emulated:fast"]}, "emulated:fast.* is not possible"),
        ({"mode": "cxl", "placement_trace": "/nowhere.npz"}, "placement_trace='/nowhere.npz' is no file"),
        ({"mode": "yes"}, "mode='yes'"),
        ({"slots": 4}, "--moe-offload is off"),
        ("cxl", "moe_offload='cxl'"),
    ],
)
def test_a_bad_option_is_refused_before_the_engine_starts(fixture_model: str, options: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        _config(fixture_model, options)


def test_off_is_the_same_configuration_as_not_asked(fixture_model: str) -> None:
    plain, off = _config(fixture_model), _config(fixture_model, {"mode": "off"})
    assert off.compute_hash() == plain.compute_hash()
    assert off.parallel_config.worker_extension_cls == plain.parallel_config.worker_extension_cls == ""


def test_options_are_part_of_vllms_hash(fixture_model: str) -> None:
    hashes = {
        _config(fixture_model, options).compute_hash()
        for options in (None, OFFLOAD, {**OFFLOAD, "slots": "25%"}, {**OFFLOAD, "passes": "fast"})
    }
    assert len(hashes) == 4


def test_an_unknown_vllm_is_refused(fixture_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", "0.34.1")
    with pytest.raises(UnsupportedModelError, match=r"vLLM 0\.34\.1"):
        _config(fixture_model, OFFLOAD)
    _config(fixture_model)  # and without the option, it is none of our business


def test_registering_the_plugin_takes_under_50_ms_and_does_not_load_moe_code() -> None:
    script = """
import sys, time
import vllm.engine.arg_utils, vllm.platforms
vllm.platforms.current_platform.device_type
from vllm_moecxl.integration.plugin import register
started = time.process_time(); register(); print(time.process_time() - started)
print("vllm_moecxl.integration.experts" in sys.modules, "vllm_moecxl.runtime" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    seconds, loaded = run.stdout.splitlines()[-2:]
    assert float(seconds) < 0.05
    assert loaded == "False False"


def _arguments(*line: str) -> Any:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser()).parse_args(list(line))


@pytest.mark.parametrize(
    ("line", "options"),
    [
        (("--moe-offload", "cxl"), {"mode": "cxl"}),
        (("--moe-offload", "cxl", "--moe-offload-config", '{"slots": "25%"}'), {"mode": "cxl", "slots": "25%"}),
        (("--moe-offload-config.slots", "25%", "--moe-offload", "cxl"), {"mode": "cxl", "slots": "25%"}),
        (
            ("--moe_offload_config.layer_buffer", "false", "--moe_offload", "cxl"),
            {"mode": "cxl", "layer_buffer": False},
        ),
        (("--moe-offload", "cxl", "--moe-offload-config.banks+", "dram=2GiB"), {"mode": "cxl", "banks": ["dram=2GiB"]}),
    ],
)
def test_command_line_options_reach_the_engine_arguments(line: tuple[str, ...], options: dict[str, Any]) -> None:
    assert _arguments(*line).additional_config["moe_offload"] == options


def test_additional_config_keeps_our_options_in_either_order() -> None:
    ours, theirs = ("--moe-offload", "cxl"), ("--additional-config", '{"x": 1}')
    for line in (ours + theirs, theirs + ours):
        assert _arguments(*line).additional_config == {"x": 1, "moe_offload": {"mode": "cxl"}}


def test_a_yaml_file_sets_the_options(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("moe-offload: cxl\nmoe-offload-config: {slots: 6}\n")
    assert _arguments("--config", str(file)).additional_config["moe_offload"] == {"mode": "cxl", "slots": 6}


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (("--moe-offload", "cxx"), "invalid choice: 'cxx'"),
        (("--moe-offload-config", "25%"), "is not a JSON object"),
        (("--moe-offload-config", '{"slots": "200%"}'), "slots='200%' is not possible"),
        (("--moe-offload-config.slotz", "4"), "unknown option(s) slotz"),
    ],
)
def test_a_bad_command_line_ends_with_one_sentence(
    line: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ending:
        _arguments(*line)
    assert ending.value.code == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_what_does_not_fit_is_refused_before_loading(fixture_model: str) -> None:
    """A failed engine leaves its process unusable for others, so this one has its own."""
    script = f"""
from tests.engine.harness import generate
generate(model={fixture_model!r}, moe_offload="cxl", moe_offload_config={{"banks": ["dram=1MiB"]}})
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    last = run.stderr.rstrip().splitlines()[-1]
    assert "CapacityError: --moe-offload-config banks=['dram'] together give 1.00 MiB and the experts take" in last
    assert "give the banks at least 9MiB more" in last


def test_weights_cannot_be_replaced_under_the_slots(fixture_model: str) -> None:
    from vllm import LLM

    from tests.engine.harness import ENGINE

    llm = LLM(fixture_model, additional_config={"moe_offload": OFFLOAD}, **ENGINE)
    with pytest.raises(MoeOffloadError, match="reload_weights would read or write slots"):
        llm.collective_rpc("reload_weights")
    metric_names = {name for name, _, _ in llm.collective_rpc("moe_offload_stats")[0]}
    assert "vllm:moe_offload_lookups_total" in metric_names
    llm.llm_engine.engine_core.shutdown()


def test_a_checkpoint_without_some_experts_weights_is_refused(fixture_model: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(fixture_model, tmp_path / "incomplete"))
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not (".layers.3." in name and ".experts." in name)}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    script = f"from tests.engine.harness import generate; generate(model={str(folder)!r}, moe_offload='cxl')"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert (
        "IntegrityError: --moe-offload: the checkpoint has nothing for w13_weight, w2_weight of model.layers.3"
        in (run.stderr.rstrip().splitlines()[-1])
    )
