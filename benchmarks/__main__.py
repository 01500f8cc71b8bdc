"""python -m benchmarks NAME [--json]: run one benchmark, print its table, write `benchmarks/results/NAME.json`."""

from __future__ import annotations

import argparse
import importlib
import json

#: Modules with `add_arguments(parser)` and `run(args) -> result`; the first line of their docstring is the help.
BENCHMARKS = {
    "overhead": "benchmarks.overhead",
    "memory": "benchmarks.memory",
    "load": "benchmarks.load",
    "oversize": "benchmarks.oversize",
    "striping": "benchmarks.striping",
    "overlap": "benchmarks.overlap",
    "interference": "benchmarks.interference",
    "slots": "benchmarks.slots",
    "validation": "benchmarks.validation",
    "policies": "benchmarks.policies",
    "prefetch": "benchmarks.prefetch",
    "simulator_speed": "benchmarks.simulator_speed",
    "copy": "benchmarks.copy",
}


def main() -> None:
    """Run the benchmark that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    subparsers = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    for name, module_name in BENCHMARKS.items():
        module = importlib.import_module(module_name)
        assert module.__doc__
        summary = module.__doc__.splitlines()[0]
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        subparser.add_argument("--json", action="store_true", help="end with the result as one JSON object on a line")
        module.add_arguments(subparser)
    args = parser.parse_args()
    result = importlib.import_module(BENCHMARKS[args.name]).run(args)
    if args.json:
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
