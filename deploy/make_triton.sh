#!/usr/bin/env bash
# Unpack the Triton that vLLM's CUDA build asks for, and print the folder. It stays out of VENV: vLLM's CPU engine, which
# runs there, would find it and use it. Idempotent, and safe beside another one: the folder appears whole.
set -euo pipefail
cd "$(dirname "$0")/.."
version=3.7.1
python=${VENV:-.venv}/bin/python
cache=${XDG_CACHE_HOME:-$HOME/.cache}/vllm_moecxl
folder=$cache/triton-$version-$("$python" -c 'import sys; print(sys.implementation.cache_tag)')
if [ ! -d "$folder" ]; then
    mkdir -p "$cache"
    whole=$(mktemp -d "$cache/.triton.XXXXXX")
    trap 'rm -rf "$whole"' EXIT
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$whole/it" "triton==$version" >&2
    # Whoever comes second keeps what the first has made.
    mv -T "$whole/it" "$folder" 2>/dev/null || [ -d "$folder" ]
fi
echo "$folder"
