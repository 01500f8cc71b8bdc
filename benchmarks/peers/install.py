"""Installs the peers, on demand, in `${XDG_CACHE_HOME:-~/.cache}/vllm_moecxl/peers`.

They use this environment's Python, torch and transformers; what they add lies in a folder of its own for `PYTHONPATH`,
so that nothing here changes. Each folder is named by what made it and appears only when it is complete.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ACCELERATE_VERSION = "1.15.0"
LLAMA_CPP_VERSION = "0.3.36"

#: Its usual CPU build, for this very CPU; tools and image input are left out to save time.
_LLAMA_CPP_BUILD = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DLLAVA_BUILD=OFF",
    "-DLLAMA_BUILD_TOOLS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
)
#: What the converter needs of the source package, under `vendor/llama.cpp`.
_CONVERTER = ("convert_hf_to_gguf.py", "conversion", "gguf-py")


@dataclass(frozen=True)
class LlamaCpp:
    """Where llama-cpp-python and the converter of its llama.cpp lie."""

    packages: Path
    converter: Path


def llama_cpp() -> LlamaCpp:
    """Build llama-cpp-python from source, once: minutes."""
    folder = _once(f"llama_cpp-{LLAMA_CPP_VERSION}", (*_LLAMA_CPP_BUILD, _cpu_flags()), _build_llama_cpp)
    return LlamaCpp(folder / "packages", folder / "converter")


def accelerate() -> Path:
    """Install accelerate, once, and return the folder for `PYTHONPATH`."""

    def install(folder: Path) -> None:
        _pip("install", "--no-deps", "--target", folder, f"accelerate=={ACCELERATE_VERSION}")

    return _once(f"accelerate-{ACCELERATE_VERSION}", (), install)


def cache_folder() -> Path:
    """The parent of all of it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm_moecxl" / "peers"


def _build_llama_cpp(folder: Path) -> None:
    if not shutil.which("g++"):
        raise FileNotFoundError("llama-cpp-python is built from source: install g++ (Debian: apt-get install g++)")
    with tempfile.TemporaryDirectory() as build:
        name = f"llama-cpp-python=={LLAMA_CPP_VERSION}"
        _pip("download", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", build, name)
        (archive,) = Path(build).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(build, filter="data")
        source = Path(build, archive.name.removesuffix(".tar.gz"))
        environment = {"CMAKE_ARGS": " ".join(_LLAMA_CPP_BUILD)}
        _pip("install", "--no-deps", "--target", folder / "packages", source, "diskcache", **environment)
        for part in _CONVERTER:
            path = source / "vendor" / "llama.cpp" / part
            copy = shutil.copytree if path.is_dir() else shutil.copyfile
            (folder / "converter").mkdir(exist_ok=True)
            copy(path, folder / "converter" / part)


def _pip(command: str, *arguments: str | Path, **environment: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", command, "--quiet", "--disable-pip-version-check", *map(str, arguments)],
        env=os.environ | environment,
        stdout=sys.stderr,
        check=True,
    )


def _once(name: str, recipe: tuple[str, ...], make: Callable[[Path], None]) -> Path:
    """The folder that `make` fills; made if there is none of this name, recipe and Python."""
    digest = hashlib.sha256("\n".join([sys.version, *recipe]).encode()).hexdigest()[:8]
    folder = cache_folder() / f"{name}-{digest}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        print(f"installing {name} in {folder}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as unfinished:
            content = Path(unfinished, "content")
            content.mkdir()
            make(content)
            content.rename(folder)
    return folder


def _cpu_flags() -> str:
    """What the compiler may use of this CPU: a cache folder can be shared by several machines."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
