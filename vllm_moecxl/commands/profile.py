"""Measure the banks of this machine: latency, bandwidth of 1 to n readers, how long a read of each size takes.

What was measured is kept with the machine's identity, and the engine places experts by it from its next start on. It
is measured outside of the engine and on all CPUs that this process may use: kernels that run beside it get in its way.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_moecxl.config import BankSpec, OffloadConfig
from vllm_moecxl.errors import ConfigError
from vllm_moecxl.linux.topology import SYSFS, read_topology
from vllm_moecxl.units import MIB, format_bytes, format_rate, format_seconds, parse_bytes

if TYPE_CHECKING:
    from vllm_moecxl.data.banks.base import Bank

#: Streams where the user names no number: memory of one CXL device is saturated by fewer, and the engine itself reads
#: a memory bank with one thread and a file with four.
_STREAM_COUNT_USUAL = 8
_STREAM_COUNT_MAX = 256
_SCRATCH_BYTES_MIN = MIB


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `moecxl profile`."""
    parser.add_argument(
        "banks",
        nargs="*",
        metavar="BANK_SPEC",
        help='such as numa:1, dax:/dev/dax0.0 (overwrites its start), dram, file:PATH; those of "auto" if none given',
    )
    parser.add_argument("--sysfs", type=Path, default=SYSFS, metavar="DIR", help="look here for nodes and CXL devices")
    parser.add_argument(
        "--size", metavar="BYTES", help="scratch in a memory bank, such as 1GiB; much more than the caches if not given"
    )
    parser.add_argument(
        "--streams",
        type=int,
        metavar="N",
        help=f"readers at once; the CPUs, {_STREAM_COUNT_USUAL} at most, if not given",
    )
    parser.add_argument(
        "--output", type=Path, metavar="PATH", help="keep the profiles here instead of where the engine looks for them"
    )


def run(args: argparse.Namespace) -> int:
    """Measure everything first, then keep it: a bank that fails leaves what was kept before as it was."""
    from vllm_moecxl.data.banks.make import auto_specs, make_banks
    from vllm_moecxl.data.profiles import Profiles, default_path, machine_identity, save_profile

    topology = read_topology(args.sysfs)
    specs = _specs(args.banks) or auto_specs(topology)
    scratch_bytes, stream_count = _scratch_bytes(args), _stream_count(args.streams)
    output = args.output or default_path()
    if output.is_dir():
        raise ConfigError(f"--output {output} is a folder: name a file in it")
    banks = make_banks(specs, Profiles(), sysfs=args.sysfs)
    reports = [_report(bank, scratch_bytes, stream_count, args.sysfs) for bank in banks]
    machine = machine_identity(topology)
    measured = [report for report in reports if report["label"] == "hardware"]
    try:
        for report in measured:
            save_profile(machine, report["identity"], report, output)
    except OSError as error:
        raise ConfigError(
            f"--output {output} cannot be written ({error.strerror}): name a file in a folder that can be"
        ) from error
    cpu_count = len(os.sched_getaffinity(0))
    if args.json:
        stored_in = str(output) if measured else None
        print(json.dumps({"machine": machine, "cpu_count": cpu_count, "stored_in": stored_in, "banks": reports}))
        return 0
    for report in reports:
        print("\n".join(in_words(report)))
    if measured:
        print(
            f"Measured outside of the engine, on all {cpu_count} CPUs that this process may use, and kept in {output} "
            "for this machine."
        )
    return 0


def _specs(texts: Sequence[str]) -> tuple[BankSpec, ...] | None:
    if not texts or list(texts) == ["auto"]:
        return None
    specs = OffloadConfig.parse({"mode": "cxl", "banks": list(texts)}).banks
    assert specs is not None
    for spec in specs:
        if spec.kind == "file" and not Path(spec.locator).is_file():
            raise ConfigError(
                f'"{spec.name}" is no file yet, and what is measured is a slab file: write it with moecxl pack MODEL '
                f"{spec.locator} first"
            )
    return specs


def _scratch_bytes(args: argparse.Namespace) -> int:
    from vllm_moecxl.data.profiling import enough_scratch_bytes

    if args.size is None:
        return enough_scratch_bytes(args.sysfs)
    byte_count = parse_bytes(args.size)
    if byte_count is None or byte_count < _SCRATCH_BYTES_MIN:
        raise ConfigError(
            f"--size {args.size} is not possible: give a quantity with its unit, such as 1GiB, and at least "
            f"{format_bytes(_SCRATCH_BYTES_MIN)}"
        )
    return byte_count


def _stream_count(wanted: int | None) -> int:
    if wanted is None:
        return min(len(os.sched_getaffinity(0)), _STREAM_COUNT_USUAL)
    if not 1 <= wanted <= _STREAM_COUNT_MAX:
        raise ConfigError(f"--streams {wanted} is not possible: give a number from 1 to {_STREAM_COUNT_MAX}")
    return wanted


def _report(bank: Bank, scratch_bytes: int, stream_count: int, sysfs: Path) -> dict[str, Any]:
    """What there is to say about one bank, in plain values."""
    from vllm_moecxl.data.banks.file import FileBank
    from vllm_moecxl.data.profiling import last_level_cache_bytes, measure

    whose = {"bank": bank.name, "identity": bank.identity, "tier": bank.tier}
    if bank.profile.source == "emulated":
        summary = {"latency_s": bank.profile.latency_s, "read_bytes_per_s": bank.profile.read_bytes_per_s}
        return {**whose, "label": "emulated-paced", "summary": summary}
    measured = measure(bank, scratch_bytes, stream_count)
    notes = []
    if isinstance(bank, FileBank):
        if not bank.slabs.file.is_direct:
            notes.append("this file system has no direct reads: the figures are those of the page cache")
    elif measured.scratch_bytes < 2 * (cache_bytes := last_level_cache_bytes(sysfs)):
        notes.append(
            f"the scratch is less than twice the caches ({format_bytes(cache_bytes)}), so the figures may be those of "
            "a cache: give more --size"
        )
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {**whose, "label": "hardware", "date": date, **measured.as_dict(), "notes": notes}


def in_words(report: dict[str, Any]) -> Iterator[str]:
    """A bank's figures, line by line."""
    summary = report["summary"]
    plans_with = f"{format_seconds(summary['latency_s'])}, {format_rate(summary['read_bytes_per_s'])}"
    yield f"bank {report['bank']} ({report['label']})"
    if report["label"] != "hardware":
        yield f"  the parameters of its model, which need no measuring and are not kept: {plans_with}"
        return
    yield f"  read all over {format_bytes(report['scratch_bytes'])} into local DRAM"
    small = report["reads"][0]
    small_words = (
        f"{format_seconds(small['read_s'])} for a read of {format_bytes(small['read_bytes'])}, our call included"
    )
    if report["load_s"] is None:
        yield f"  latency: {small_words}"
    else:
        load = f"{format_seconds(report['load_s'])} for a load that waits for the one before it"
        yield f"  latency: {load}; {small_words}"
    yield "  one read of  takes        that is"
    for read in report["reads"]:
        rate = format_rate(read["read_bytes"] / read["read_s"])
        yield f"  {format_bytes(read['read_bytes']):>11}  {format_seconds(read['read_s']):<11}  {rate}"
    yield "  streams      together"
    for stream in report["streams"]:
        yield f"  {stream['count']:>7}      {format_rate(stream['read_bytes_per_s'])}"
    for note in report["notes"]:
        yield f"  note: {note}"
    yield f"  placement plans with: {plans_with}"
