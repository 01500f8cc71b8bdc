"""The checker finds what a release may do to us: each mutation of vLLM's own source is found, and named."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.seams.conftest import installed_source
from tests.seams.contract import Seam, broken
from tests.seams.source import Source
from tests.seams.table import SEAMS

_FUSED_MOE = "model_executor/layers/fused_moe"
#: (what is done, file below vllm/, pattern, replacement, words that the failure has to have)
_MUTATIONS = (
    (
        "a method gets another name",
        f"{_FUSED_MOE}/routed_experts.py",
        r"def _get_quant_method\(",
        "def _make_quant_method(",
        ("RoutedExperts._get_quant_method", "RoutedExperts without it", "experts.py"),
    ),
    (
        "a parameter is removed",
        f"{_FUSED_MOE}/routed_experts.py",
        r"(def forward_modular\([^)]*?)        shared_experts_input: [^\n]*\n",
        r"\1",
        ("RoutedExperts.forward_modular", "exactly the parameters", "experts.py"),
    ),
    (
        "parameters change places",
        f"{_FUSED_MOE}/routed_experts.py",
        r"(def forward_modular\([^)]*?)(        topk_weights[^\n]*\n)(        topk_ids[^\n]*\n)",
        r"\1\3\2",
        ("RoutedExperts.forward_modular", "topk_ids: torch.Tensor, topk_weights", "experts.py"),
    ),
    (
        "a method takes whatever it is given",
        f"{_FUSED_MOE}/routed_experts.py",
        r"(def forward_modular\([^)]*?)(    \) -> torch)",
        r"\1        **kwargs,\n\2",
        ("RoutedExperts.forward_modular", "**kwargs", "experts.py"),
    ),
    (
        "a function without parameters gets one",
        "distributed/parallel_state.py",
        r"def get_world_group\(\)",
        "def get_world_group(name: str)",
        ("get_world_group", "can be called with ()", "worker.py"),
    ),
    (
        "parameters that we pass by position change places",
        "model_executor/model_loader/default_loader.py",
        r"(def _prepare_weights\([^)]*?)(        subfolder[^\n]*\n)(        revision[^\n]*\n)",
        r"\1\3\2",
        ("DefaultModelLoader._prepare_weights", "revision: str | None, subfolder", "fingerprint.py"),
    ),
    (
        "a function needs one more argument",
        "model_executor/model_loader/reload/layerwise.py",
        r"def initialize_online_processing\(layer: torch.nn.Module",
        "def initialize_online_processing(layer: torch.nn.Module, device: str",
        ("initialize_online_processing", "can be called with (layer)", "buffered.py"),
    ),
    (
        "a keyword gets another name",
        "utils/torch_utils.py",
        r"    target_lib: ",
        "    library: ",
        ("direct_register_custom_op", "target_lib", "experts.py"),
    ),
    (
        "a dataclass loses a field",
        "v1/core/sched/output.py",
        r"    resumed_req_ids: set\[str\]\n",
        "",
        ("CachedRequestData", "a member resumed_req_ids", "steps.py"),
    ),
    (
        "an attribute that methods set is gone",
        "v1/worker/gpu_input_batch.py",
        r"self\.token_ids_cpu\b(?! *\[)",
        "self.token_table",
        ("InputBatch", "a member token_ids_cpu", "steps.py"),
    ),
    (
        "a member of an enumeration is gone",
        "config/compilation.py",
        r"\n    FULL_AND_PIECEWISE = ",
        "\n    FULL_OR_PIECEWISE = ",
        ("CUDAGraphMode", "a member FULL_AND_PIECEWISE", "graphs.py"),
    ),
    (
        "a choice gets another name",
        "config/kernel.py",
        '"aiter_mega_moe",',
        '"aiter_giga_moe",',
        ("MoEBackend", "aiter_mega_moe", "checks.py"),
    ),
    (
        "a hook is not called any more",
        "model_executor/model_loader/weight_utils.py",
        r"if (not )?should_skip_weight\(name, local_expert_ids\)",
        "if True",
        ("safetensors_weights_iterator", "should_skip_weight", "patches.py"),
    ),
    (
        "a class has other bases",
        f"{_FUSED_MOE}/routed_experts.py",
        r"class RoutedExperts\(PluggableLayer\)",
        "class RoutedExperts(torch.nn.Module)",
        ("RoutedExperts", "a class derived from PluggableLayer", "experts.py"),
    ),
    (
        "a module is moved",
        f"{_FUSED_MOE}/moe_output.py",
        None,
        "",
        ("fused_moe.moe_output", "no such module", "described.py"),
    ),
    (
        "a subclass does more than run the kernel",
        "model_executor/models/gpt_oss.py",
        r"(class GptOssRoutedExperts\(RoutedExperts\):\n)",
        "\\1    def forward_modular(self, *args): ...\n",
        ("RoutedExperts.forward_modular", "GptOssRoutedExperts", "experts.py"),
    ),
    (
        "a runner begins to show its requests",
        "v1/worker/gpu/model_runner.py",
        r"(class GPUModelRunner\([^)]*\):\n)",
        r"\1    input_batch: object\n",
        ("GPUModelRunner", "no member input_batch", "steps.py"),
    ),
)


@pytest.fixture(scope="module")
def files_of_seams(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The few files of the installed vLLM that the contracts are about, in a folder of their own."""
    installed = installed_source()
    assert not broken(installed, "installed", SEAMS)
    copies = tmp_path_factory.mktemp("seams")
    wanted = {path.relative_to(installed.root) for path in installed.files_read()}
    for path in {*wanted, Path("vllm/model_executor/models/gpt_oss.py")}:
        if path.parts[0] == "vllm":
            (copies / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(installed.root / path, copies / path)
    return copies


@pytest.mark.parametrize("mutation", _MUTATIONS, ids=lambda mutation: mutation[0].replace(" ", "-"))
def test_a_change_of_vllm_is_found_and_named(
    files_of_seams: Path, mutation: tuple[str, str, str | None, str, tuple[str, ...]]
) -> None:
    _, file, pattern, replacement, words = mutation
    with _changed(files_of_seams / "vllm" / file, pattern, replacement):
        failure = broken(Source(files_of_seams), "9.9.9", SEAMS)
    assert failure.startswith("vLLM 9.9.9 breaks 1 seam(s)"), failure
    assert all(word in failure for word in words), failure


def test_all_that_is_broken_stands_in_one_message(files_of_seams: Path) -> None:
    changes = [
        mutation[1:4]
        for mutation in _MUTATIONS
        if mutation[0] in ("a keyword gets another name", "a class has other bases")
    ]
    first, second = ((files_of_seams / "vllm" / file, pattern, replacement) for file, pattern, replacement in changes)
    with _changed(*first), _changed(*second):
        failure = broken(Source(files_of_seams), "9.9.9", SEAMS)
    assert failure.startswith("vLLM 9.9.9 breaks 2 seam(s)")
    assert "direct_register_custom_op" in failure and "derived from PluggableLayer" in failure


def test_a_class_that_is_derived_by_way_of_others_is_found(tmp_path: Path) -> None:
    for file, text in {
        "base.py": "class Experts:\n    def run(self): ...",
        "middle.py": "from vllm.base import Experts\nclass Middle(Experts[int]): ...",
        "inner.py": "from vllm import middle\nclass Inner(\n    middle.Middle,\n): ...",
        "leaf.py": "from vllm.inner import Inner\nclass Leaf(Inner):\n    def run(self): ...",
        "other.py": "class Other:\n    def run(self): ...",
    }.items():
        (tmp_path / "vllm").mkdir(exist_ok=True)
        (tmp_path / "vllm" / file).write_text(text)
    seam = Seam("only", "vllm.base", "Experts.run", "", "experts.py", "run it")
    failure = broken(Source(tmp_path), "9.9.9", (seam,))
    assert failure.startswith("vLLM 9.9.9 breaks 1 seam(s)") and "Leaf at" in failure
    assert not broken(Source(tmp_path), "9.9.9", (dataclasses.replace(seam, wants="Leaf"),))


@contextmanager
def _changed(path: Path, pattern: str | None, replacement: str) -> Iterator[None]:
    """A file with every match of a pattern replaced, or with another name where there is no pattern."""
    text = path.read_text(encoding="utf-8")
    if pattern is None:
        path.unlink()
    else:
        changed, count = re.subn(pattern, replacement, text)
        assert count, f"nothing to change: {pattern} does not occur in {path}"
        path.write_text(changed, encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(text, encoding="utf-8")
