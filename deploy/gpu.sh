#!/usr/bin/env bash
# Everything that needs a CUDA device, on whatever machine has one: environment, tests, benchmarks, a report.
# Exit code 0: all of it ran and passed; 1: something did not, see gpu-report.md; 2: there is no CUDA device.
# Names of steps may follow, to run only these. Downloads are cached outside the tree.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV_GPU:-.venv-gpu}

python=$(command -v python3.11 || command -v python3.12 || command -v python3)
"$python" -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed, this is " + sys.version'
"$python" deploy/gpu.py check

stamp="$venv/.moecxl-$(cat pyproject.toml deploy/gpu.sh | sha256sum | cut -c1-16)"
if [ ! -e "$stamp" ]; then
    # Triton compiles its launcher against Python's headers at run time, torch.compile some C++.
    header='import os, sysconfig; print(os.path.join(sysconfig.get_path("include"), "Python.h"))'
    if ! command -v g++ >/dev/null || [ ! -e "$("$python" -c "$header")" ]; then
        apt-get update -qq
        apt-get install -qq -y g++ "$(basename "$(readlink -f "$python")")-dev" >/dev/null
    fi
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet uv
    "$venv/bin/python" -m uv pip install --quiet --python "$venv/bin/python" -e ".[cuda,test,bench]"
    touch "$stamp"
fi
exec "$venv/bin/python" deploy/gpu.py run "$@"
