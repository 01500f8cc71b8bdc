"""Imports: what each layer may know, what an import costs, and that the package is what it says it is."""

import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import vllm_moecxl

ROOT = Path(__file__).parents[2]

_PLAIN_MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in [*(ROOT / "vllm_moecxl").glob("*.py"), *(ROOT / "vllm_moecxl/control").glob("*.py")]
    if path.stem != "__init__"
)


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout


def test_imports_go_strictly_downward() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([lint, "--no-cache"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stdout
    assert "0 broken" in result.stdout


def test_the_contract_names_every_part_of_the_package() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = " ".join(contracts[0]["layers"]).replace("|", " ").split()
    folder = ROOT / "vllm_moecxl"
    ours = {f"vllm_moecxl.{path.stem}" for path in folder.glob("[a-z]*.py")}
    ours |= {f"vllm_moecxl.{path.parent.name}" for path in folder.glob("*/__init__.py")}
    assert ours <= set(layers), "a module that no contract holds"


def test_control_plane_and_vocabulary_import_neither_torch_nor_triton_nor_vllm() -> None:
    assert {"vllm_moecxl.config", "vllm_moecxl.control.residency"} <= set(_PLAIN_MODULES)
    out = run_python(
        f"import importlib, sys\nfor name in {_PLAIN_MODULES}: importlib.import_module(name)\n"
        "print(sorted({'torch', 'triton', 'vllm'} & set(sys.modules)))"
    )
    assert out == "[]\n"


@pytest.mark.parametrize("name", ["vllm_moecxl", "vllm_moecxl.commands.main", "vllm_moecxl.runtime.counters"])
def test_it_imports_without_vllm_and_torch(name: str) -> None:
    assert run_python(f"import sys, {name}\nprint(sorted({{'torch', 'vllm'}} & set(sys.modules)))") == "[]\n"


def test_importing_the_package_loads_next_to_nothing() -> None:
    """An installed plugin that nobody asked for costs no time: counted in modules, since a clock would be flaky."""
    out = run_python(
        "import sys\nbefore = set(sys.modules)\nimport vllm_moecxl\nprint(*sorted(set(sys.modules) - before))"
    )
    loaded = out.split()
    assert [name for name in loaded if name.startswith("vllm_moecxl")] == [
        "vllm_moecxl",
        "vllm_moecxl.integration",
        "vllm_moecxl.integration.early",
    ]
    assert "numpy" not in loaded and len(loaded) < 40


def test_the_version_is_that_of_the_project_and_of_the_distribution() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert vllm_moecxl.__version__ == project["version"] == metadata.version("vllm_moecxl")


def test_the_plugin_and_the_command_are_entry_points_that_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    targets = [*project["scripts"].values(), *project["entry-points"]["vllm.general_plugins"].values()]
    assert len(targets) == 2
    installed = {point.value for point in metadata.distribution("vllm_moecxl").entry_points}
    assert set(targets) == installed
    code = "from importlib import import_module as load\n" + "\n".join(
        "assert callable(load({!r}).{})".format(*target.split(":")) for target in targets
    )
    run_python(code)


def test_nothing_is_installed_under_a_taken_top_level_name() -> None:
    packages = {path.parent.name for folder in (ROOT, ROOT / "kernels") for path in folder.glob("*/__init__.py")}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    included = {pattern.rstrip("*") for pattern in settings["include"]}
    assert included == {"vllm_moecxl", "moecxl_kernels"} <= packages
    assert "kernels" not in included
