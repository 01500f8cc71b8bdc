"""The sources of every supported release of vLLM: the installed one, and the CUDA wheels' Python files."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.seams.source import Source, installed_folder
from vllm_moecxl.config import SUPPORTED_VLLM

FETCH = Path(__file__).parents[2] / "deploy" / "fetch_vllm_sources.py"
#: What the script exits with where this machine cannot have the files.
UNAVAILABLE = 77

#: The CUDA wheels whose sources are read. `make seams RELEASES=0.34.0` looks at a release before it is supported.
RELEASES = os.environ.get("VLLM_RELEASES", "").split() or [f"{minor}.0" for minor in SUPPORTED_VLLM]


def installed_source() -> Source:
    """The vLLM that the engine tests run with."""
    folder = installed_folder("vllm")
    assert folder is not None, "no vLLM is installed: run make env"
    return Source(folder.parent)


def version_of(source: Source) -> str:
    """A release's own name, as its wheel has it."""
    definition = source.find("vllm._version", "__version__")
    assert definition is not None and isinstance(definition.node, ast.Assign)
    return str(ast.literal_eval(definition.node.value))


def fetched_source(version: str) -> Source:
    """The Python files of a CUDA wheel; skips the test where they cannot be had."""
    result = subprocess.run([sys.executable, FETCH, version], capture_output=True, text=True, check=False)
    if result.returncode == UNAVAILABLE:
        pytest.skip(result.stderr.strip())
    assert result.returncode == 0, result.stderr
    return Source(Path(result.stdout.strip()))
