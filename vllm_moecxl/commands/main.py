"""The `moecxl` console command: finds the subcommand and turns errors into one sentence and an exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from vllm_moecxl import __version__
from vllm_moecxl.commands import doctor, pack, profile, simulate, topology, trace
from vllm_moecxl.errors import MoeOffloadError

#: Each subcommand is a module whose docstring's first line is its help, with `add_arguments(parser)` and `run(args)`.
#: One with `TAKES_ENGINE_ARGUMENTS` finds what it does not know itself in `args.engine_arguments`.
SUBCOMMANDS: dict[str, ModuleType] = {
    "doctor": doctor,
    "topology": topology,
    "profile": profile,
    "pack": pack,
    "simulate": simulate,
    "trace": trace,
}

#: Exit codes: 1 is for what a subcommand looked for and found, 2 for a command that could not be carried out.
EXIT_USAGE = 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `moecxl SUBCOMMAND ...` and return its exit code."""
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown and not getattr(SUBCOMMANDS[args.subcommand], "TAKES_ENGINE_ARGUMENTS", False):
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    args.engine_arguments = unknown
    try:
        return int(SUBCOMMANDS[args.subcommand].run(args))
    except MoeOffloadError as error:
        print(f"moecxl {args.subcommand}: {error}", file=sys.stderr)
        return EXIT_USAGE


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="moecxl", description="Tools around serving Mixture-of-Experts models from slots.")
    parser.add_argument("--version", action="version", version=f"moecxl {__version__}")
    subparsers = parser.add_subparsers(dest="subcommand", metavar="SUBCOMMAND", required=True)
    for name, module in SUBCOMMANDS.items():
        assert module.__doc__
        summary = module.__doc__.splitlines()[0]
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        subparser.add_argument("--json", action="store_true", help="print exactly one JSON object")
        module.add_arguments(subparser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
