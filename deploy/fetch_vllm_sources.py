"""fetch_vllm_sources.py VERSION: the Python files of vLLM's CUDA wheel, without installing it; prints their folder.

Cached under ${XDG_CACHE_HOME:-~/.cache}/vllm_moecxl/vllm-sources/VERSION: some 500 MB and 20 s of download once, 40 MB
kept. Exit status 77 and one line on standard error: this machine cannot have them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

_UNAVAILABLE = 77
_TIMEOUT_S = 600
#: CUDA wheels are for one ABI of Python; any Python may read them.
_WHEEL = ("--only-binary", ":all:", "--platform", "manylinux_2_28_x86_64", "--python-version", "3.12")


def main(version: str) -> int:
    """Print the folder that has `vllm/`, fetched first if need be."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm_moecxl" / "vllm-sources"
    target = cache / version
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        # Made complete aside and then renamed: whoever fetches the same at the same time finds all of it or nothing.
        with tempfile.TemporaryDirectory(prefix=f".{version}-", dir=cache) as scratch:
            if reason := _download(version, Path(scratch)):
                print(f"vLLM {version} cannot be had: {reason}", file=sys.stderr)
                return _UNAVAILABLE
            try:
                (Path(scratch) / "files").rename(target)
            except OSError:
                if not target.is_dir():  # else another process was faster
                    raise
    print(target)
    return 0


def _download(version: str, scratch: Path) -> str:
    """Put the wheel's Python files under scratch/files; what kept us from it, "" if nothing did."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir", "--no-input"]
    command = [*pip, "--retries", "1", "--timeout", "20", "download", "--no-deps", *_WHEEL]
    try:
        done = subprocess.run(
            [*command, "--dest", str(scratch), f"vllm=={version}"],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"pip download was not done after {_TIMEOUT_S} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"pip download ended with {done.returncode}"])[-1]
    [wheel] = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith("vllm/") and name.endswith(".py")]
        archive.extractall(scratch / "files", names)
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
