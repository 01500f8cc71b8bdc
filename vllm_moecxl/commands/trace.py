"""Inspect, cut, merge and plot routing traces: which experts a model used, and how well they can be cached."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_moecxl.errors import ConfigError

if TYPE_CHECKING:
    from vllm_moecxl.control.trace import RoutingTrace

_PLOT_SUFFIXES = (".png", ".svg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `moecxl trace`."""
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="routing traces (.npz)")
    parser.add_argument("--merge", action="store_true", help="take several files, of one model, as one trace")
    parser.add_argument(
        "--cut", type=_requests, metavar="START:STOP", help="take these requests only, from 0 on, without STOP"
    )
    parser.add_argument("--tokens", type=_count, metavar="N", help="take the first N tokens of each request only")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write what was taken to a trace of its own")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw expert heat and reuse distance (.png or .svg)")
    parser.add_argument("--force", action="store_true", help="replace files that are there already")


def run(args: argparse.Namespace) -> int:
    """Read, take, write, and say what it is. Whatever can be refused is refused before anything is written."""
    from vllm_moecxl.commands.trace_report import TraceReport, in_words
    from vllm_moecxl.control.trace import replace_file

    if len(args.files) > 1 and not args.merge:
        raise ConfigError(f"{len(args.files)} files were given: take them as one trace with --merge, or give one")
    if args.out is not None and args.out == args.plot:
        raise ConfigError(f"--out and --plot are both {args.out}: give each a path of its own")
    for path in (args.out, args.plot):
        if path is not None and os.path.lexists(path) and not args.force:
            raise ConfigError(f"{path} is there already: give another path, or replace it with --force")
    if args.plot is not None:
        _check_plot(args.plot)
    trace = _take(args)
    report = TraceReport(trace)
    image = None if args.plot is None else report.draw(args.plot.suffix)
    if args.out is not None:
        trace.save(args.out)
    if image is not None:
        replace_file(args.plot, image, "the plot")
    written = [str(path) for path in (args.out, args.plot) if path is not None]
    summary = {"files": [str(path) for path in args.files], "written": written, **report.as_dict()}
    print(json.dumps(summary) if args.json else "\n".join(in_words(summary)))
    return 0


def _take(args: argparse.Namespace) -> RoutingTrace:
    from vllm_moecxl.control.trace import RoutingTrace

    traces = [RoutingTrace.load(path) for path in args.files]
    trace = RoutingTrace.merge(traces) if len(traces) > 1 else traces[0]
    cut = trace.cut(args.cut or slice(None), tokens_per_request=args.tokens)
    if args.cut and not cut.request_count:
        raise ConfigError(
            f"--cut {args.cut.start}:{'' if args.cut.stop is None else args.cut.stop} takes none of the "
            f"{trace.request_count} requests; give START:STOP within 0:{trace.request_count}"
        )
    return cut


def _check_plot(path: Path) -> None:
    if path.suffix not in _PLOT_SUFFIXES:
        raise ConfigError(f"--plot {path}: give a path that ends in {' or '.join(_PLOT_SUFFIXES)}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'vllm_moecxl[plot]', or leave --plot out") from error


def _requests(text: str) -> slice:
    start, colon, stop = text.partition(":")
    if not colon or not all(part == "" or (part.isascii() and part.isdigit()) for part in (start, stop)):
        raise argparse.ArgumentTypeError(f"{text!r} is not START:STOP, such as 0:16")
    return slice(int(start or 0), int(stop) if stop else None)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a count of tokens, such as 256")
    return int(text)
