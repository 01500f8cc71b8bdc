"""Runs a command in a memory cgroup of its own (v1 or v2): a limit that counts everything, and what was used.

A cgroup is charged for its processes' anonymous memory and for the pages of files that they were the first to touch;
page cache that somebody else filled is a free ride (`benchmarks.page_cache` drops it).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SAMPLE_PERIOD_S = 0.05
_REMOVAL_TRIES = 100
_REMOVAL_PERIOD_S = 0.05
#: The child enters the cgroup before it becomes the command, so that nothing is charged elsewhere.
_ENTER = 'echo $$ > "$0" && exec "$@"'


class CgroupError(RuntimeError):
    """No memory cgroup can be made here."""


@dataclass(frozen=True)
class Usage:
    """What became of a command and of the memory that it used.

    Attributes:
        return_code: as subprocess gives it; negative is a signal.
        oom_kill_count: processes that the kernel killed at the limit.
        peak_bytes: the most that was charged, by the kernel's own account.
        anonymous_peak_bytes: the most anonymous memory in a sample of every 50 ms.
        page_cache_peak_bytes: the same of page cache.
        major_fault_count: faults that had to read.
    """

    return_code: int
    limit_bytes: int | None
    oom_kill_count: int
    peak_bytes: int
    anonymous_peak_bytes: int
    page_cache_peak_bytes: int
    major_fault_count: int


@dataclass(frozen=True)
class _Files:
    """How one version of cgroups calls what we need: files, and from `anonymous` on rows of memory.stat."""

    limit: str
    swap_limit: str
    is_swap_limit_total: bool
    usage: str
    peak: str
    events: str
    anonymous: str
    page_cache: str
    major_faults: str


_V1 = _Files(
    limit="memory.limit_in_bytes",
    swap_limit="memory.memsw.limit_in_bytes",
    is_swap_limit_total=True,
    usage="memory.usage_in_bytes",
    peak="memory.max_usage_in_bytes",
    events="memory.oom_control",
    anonymous="total_rss",
    page_cache="total_cache",
    major_faults="total_pgmajfault",
)
_V2 = _Files(
    limit="memory.max",
    swap_limit="memory.swap.max",
    is_swap_limit_total=False,
    usage="memory.current",
    peak="memory.peak",
    events="memory.events",
    anonymous="anon",
    page_cache="file",
    major_faults="pgmajfault",
)


def run(
    command: Sequence[str],
    limit_bytes: int | None = None,
    environment: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
) -> Usage:
    """Run a command in a new memory cgroup and wait for it; its output goes to our standard error.

    Args:
        limit_bytes: of memory and page cache together, without swap; no limit if None.
        timeout_s: everything in the cgroup is killed after this.

    Raises:
        CgroupError: cgroups cannot be made here.
        TimeoutExpired: the command took too long.
    """
    with _new_cgroup() as (cgroup, files):
        if limit_bytes is not None:
            _limit(cgroup, files, limit_bytes)
        with (
            subprocess.Popen(
                ["/bin/sh", "-c", _ENTER, str(cgroup / "cgroup.procs"), *command],
                env=environment,
                stdout=sys.stderr,
            ) as process,
            _Sampler(cgroup, files) as sampler,
        ):
            try:
                return_code = process.wait(timeout_s)
            finally:
                _kill_all(cgroup)
        peak = cgroup / files.peak
        return Usage(
            return_code=return_code,
            limit_bytes=limit_bytes,
            oom_kill_count=_table(cgroup / files.events).get("oom_kill", 0),
            # memory.peak is younger than cgroups v2.
            peak_bytes=int(peak.read_text()) if peak.exists() else sampler.peak_bytes,
            anonymous_peak_bytes=sampler.anonymous_peak_bytes,
            page_cache_peak_bytes=sampler.page_cache_peak_bytes,
            major_fault_count=_table(cgroup / "memory.stat").get(files.major_faults, 0),
        )


def why_not() -> str | None:
    """Why no memory cgroup can be made here; None if one can."""
    try:
        with _new_cgroup():
            return None
    except CgroupError as error:
        return str(error)


@contextmanager
def _new_cgroup() -> Iterator[tuple[Path, _Files]]:
    parent, files = _parent()
    try:
        cgroup = Path(tempfile.mkdtemp(prefix="moecxl-", dir=parent))
    except OSError as error:
        raise CgroupError(f"cannot make a memory cgroup in {parent} ({error.strerror}): run as root") from error
    try:
        if not (cgroup / files.limit).exists():
            raise CgroupError(f"the cgroups in {parent} have no {files.limit}: the kernel's memory controller is off")
        yield cgroup, files
    finally:
        _remove(cgroup)


def _parent() -> tuple[Path, _Files]:
    """The cgroup in which ours is made: our own where that is allowed, else the nearest above it."""
    own = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own.update(dict.fromkeys(controllers.split(","), path.lstrip("/")))
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, (kind, _, options) = _mount(line)
        mount = Path(fields[4])
        if kind == "cgroup" and "memory" in options.split(","):
            folder = mount / own.get("memory", "")
            return (folder if folder.is_dir() else mount), _V1
        if kind == "cgroup2" and "memory" in (mount / "cgroup.controllers").read_text().split():
            return _parent_v2(mount, mount / own.get("", "")), _V2
    raise CgroupError("no memory cgroups are mounted (/proc/self/mountinfo): mount cgroup2 on /sys/fs/cgroup")


def _mount(line: str) -> tuple[list[str], str, list[str]]:
    left, dash, right = line.partition(" - ")
    return left.split(), dash, right.split(maxsplit=2)


def _parent_v2(mount: Path, own: Path) -> Path:
    """In v2 only cgroups without processes of their own, and the root, have children with controllers."""
    folders = [own, *own.parents] if own.is_dir() else [mount]
    for folder in folders:
        control = folder / "cgroup.subtree_control"
        if control.exists() and "memory" in control.read_text().split():
            return folder
    try:
        (mount / "cgroup.subtree_control").write_text("+memory")
    except OSError as error:
        raise CgroupError(
            f"cannot switch the memory controller on below {mount} ({error.strerror}): run as root; in a container, run"
            f" it with --privileged and first move its processes away from the top: mkdir {mount}/init;"
            f" for p in $(cat {mount}/cgroup.procs); do echo $p > {mount}/init/cgroup.procs; done"
        ) from error
    return mount


def _limit(cgroup: Path, files: _Files, limit_bytes: int) -> None:
    (cgroup / files.limit).write_text(str(limit_bytes))
    swap_limit = cgroup / files.swap_limit
    if swap_limit.exists():
        swap_limit.write_text(str(limit_bytes if files.is_swap_limit_total else 0))


def _table(path: Path) -> dict[str, int]:
    return {name: int(value) for name, value in map(str.split, path.read_text().splitlines())}


def _kill_all(cgroup: Path) -> None:
    for process_id in map(int, (cgroup / "cgroup.procs").read_text().split()):
        try:
            os.kill(process_id, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _remove(cgroup: Path) -> None:
    """Remove it; a process that was killed stays in it until it is gone."""
    force_empty = cgroup / "memory.force_empty"
    for _ in range(_REMOVAL_TRIES):
        try:
            if force_empty.exists():  # v1: page cache would stay charged to a cgroup that is no more
                force_empty.write_text("0")
            cgroup.rmdir()
            return
        except OSError:
            time.sleep(_REMOVAL_PERIOD_S)
    raise CgroupError(f"cannot remove {cgroup}: processes {(cgroup / 'cgroup.procs').read_text().split()} are in it")


class _Sampler:
    """Watches from a thread what the memory of a cgroup consists of."""

    def __init__(self, cgroup: Path, files: _Files) -> None:
        self.peak_bytes = 0
        self.anonymous_peak_bytes = 0
        self.page_cache_peak_bytes = 0
        self._cgroup = cgroup
        self._files = files
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            stat = _table(self._cgroup / "memory.stat")
            self.peak_bytes = max(self.peak_bytes, int((self._cgroup / self._files.usage).read_text()))
            self.anonymous_peak_bytes = max(self.anonymous_peak_bytes, stat[self._files.anonymous])
            self.page_cache_peak_bytes = max(self.page_cache_peak_bytes, stat[self._files.page_cache])
            if self._stop.wait(_SAMPLE_PERIOD_S):
                return
