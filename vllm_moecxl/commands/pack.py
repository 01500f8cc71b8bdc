"""Write a model's experts in the kernel's own format to a slab file, to serve them from it.

`moecxl pack MODEL OUT [arguments of vllm serve]`: then `vllm serve MODEL --moe-offload cxl --moe-offload-config
'{"banks": ["file:OUT"]}'` starts without reading the checkpoint's experts, and may serve more than memory holds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vllm_moecxl.units import format_bytes

TAKES_ENGINE_ARGUMENTS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `moecxl pack`; what it does not know goes to vLLM."""
    parser.add_argument("model", metavar="MODEL", help="what vllm serve would be given")
    parser.add_argument("out", metavar="OUT", type=Path, help="the slab file to write")
    parser.add_argument("--replace", action="store_true", help="replace a slab file that is there already")


def run(args: argparse.Namespace) -> int:
    """Pack, and say what was written."""
    from vllm_moecxl.integration.packing import pack

    files = pack(args.model, args.out, args.engine_arguments, replace=args.replace)
    if args.json:
        print(json.dumps({"files": [{"path": path, "bytes": size} for path, size in files]}))
    else:
        for path, size in files:
            print(f"{path}: {format_bytes(size)}")
        print(f'serve it with --moe-offload cxl --moe-offload-config \'{{"banks": ["file:{args.out}"]}}\'')
    return 0
