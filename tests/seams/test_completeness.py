"""The table is whole: what our integration takes from vLLM has a contract, and each contract has a use."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.seams import ours
from tests.seams.contract import Seam
from tests.seams.table import SEAMS

_REMEDY = "add a row to tests/seams/table_*.py for each"


def _imports_without_contract(folder: Path) -> list[str]:
    kept = {(seam.module, seam.name.partition(".")[0]) for seam in SEAMS}
    modules = {seam.module for seam in SEAMS}
    return [
        f"{file} imports {module}.{name}"
        for file, module, name in ours.imports(folder)
        if (module, name) not in kept and f"{module}.{name}" not in modules
    ]


def _patches_without_contract(folder: Path) -> list[str]:
    return [
        f"{file} replaces {owner}.{name}"
        for file, owner, name in ours.patched(folder)
        if not any(_is_about(seam, owner, name) for seam in SEAMS)
    ]


def _is_about(seam: Seam, owner: str, name: str) -> bool:
    if owner.startswith("type("):  # whichever platform this is: all of them have contracts
        return seam.kind == "replace" and seam.name.endswith(f".{name}")
    if seam.kind == "replace":
        return seam.name in (f"{owner}.{name}", name)
    # A constructor that dataclasses make cannot be read, the class can.
    return seam.name == owner and (name in seam.wants.split() or (seam.kind == "class" and name == "__init__"))


def _attributes_without_contract(folder: Path) -> list[str]:
    kept = {name for seam in SEAMS for name in seam.names} | ours.NOT_VLLMS
    return sorted({f"{file} reads .{name}" for file, name in ours.attributes(folder) if name not in kept})


def _listed_names_without_contract(folder: Path) -> list[str]:
    kept = {name for seam in SEAMS for name in seam.names}
    return sorted({f"{file} lists {name!r}" for file, name in ours.listed_names(folder) if name not in kept})


_GUARDS = {
    "imports": _imports_without_contract,
    "patches": _patches_without_contract,
    "attributes": _attributes_without_contract,
    "listed names": _listed_names_without_contract,
}


@pytest.mark.parametrize("what", _GUARDS)
def test_whatever_we_take_from_vllm_has_a_contract(what: str) -> None:
    missing = _GUARDS[what](ours.INTEGRATION)
    assert not missing, f"{_REMEDY}: {'; '.join(missing)}"


@pytest.mark.parametrize(
    ("what", "code", "expected"),
    [
        ("imports", "from vllm.utils.torch_utils import a_new_one", "new.py imports vllm.utils.torch_utils.a_new_one"),
        ("imports", "def f():\n    from vllm import collect_env", "new.py imports vllm.collect_env"),
        ("imports", "import vllm.envs_of_tomorrow as envs", "new.py imports vllm.envs_of_tomorrow"),
        ("patches", "_wrap(Worker, 'wake_up', make)", "new.py replaces Worker.wake_up"),
        ("patches", "for name in ('a', 'b'):\n        _wrap(Worker, name, make)", "new.py replaces Worker.b"),
        ("attributes", "vllm_config.model_config.is_diffusion", "new.py reads .is_diffusion"),
        ("attributes", "getattr(layer, 'topk_group', None)", "new.py reads .topk_group"),
        ("attributes", "get_forward_context().ubatch_slices", "new.py reads .ubatch_slices"),
        (
            "attributes",
            "from vllm.x import Base\nclass Ours(Base):\n    def f(self):\n        self.f(self.swiglu_limit)",
            "new.py reads .swiglu_limit",
        ),
        ("listed names", "NAMES = frozenset({'NewMoEMethod'})", "new.py lists 'NewMoEMethod'"),
    ],
)
def test_a_new_use_without_a_contract_is_found(tmp_path: Path, what: str, code: str, expected: str) -> None:
    (tmp_path / "new.py").write_text(code if what != "patches" else f"def patch():\n    {code}\n")
    assert expected in _GUARDS[what](tmp_path)


def test_each_contract_names_a_file_of_ours_that_uses_it() -> None:
    unused = []
    for seam in SEAMS:
        text = "".join((ours.ROOT / file).read_text() for file in seam.files)
        # What vLLM's own code has to say is not written in ours.
        wanted = seam.wants.split() if seam.kind in ("has", "lacks") else [] if seam.is_list else [_last_name(seam)]
        unused += [f"{seam.name}: {want}" for want in wanted if not any(name in text for name in want.split("|"))]
    assert not unused, f"contracts that nothing of ours needs, or whose file is another: {'; '.join(unused)}"


def _last_name(seam: Seam) -> str:
    return seam.name.rpartition(".")[2]
