"""How an engine is run: a process in a memory cgroup, its model's files out of the page cache at the start."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

from benchmarks import cgroup, page_cache
from benchmarks.common import Result
from benchmarks.engines import ENGINE_ENVIRONMENT
from benchmarks.peers.work import Work

_REPOSITORY = Path(__file__).parents[2]
_RUN_SECONDS_MAX = 1800.0


@dataclass(frozen=True)
class Case:
    """One engine with one model: the module that runs it, its arguments, and the files of its weights."""

    module: str
    arguments: Result
    files: list[Path]
    python_path: str = ""
    #: A folder that the engine writes to; made empty before each run.
    scratch: Path | None = None

    def run(self, work: Work, limit_bytes: int | None) -> tuple[Result | None, cgroup.Usage]:
        """The engine's result, None if the kernel killed it, and what it used.

        Raises:
            RuntimeError: it failed in another way.
        """
        page_cache.drop(self.files)
        with self._process(work) as (command, environment, out):
            usage = cgroup.run(command, limit_bytes, environment, _RUN_SECONDS_MAX)
            if usage.return_code == 0:
                return json.loads(out.read_text()), usage
        if usage.oom_kill_count:
            return None, usage
        raise RuntimeError(f"{self.module} ended with {usage.return_code}, see its output above")

    def run_outside(self, work: Work) -> None:
        """Run without a cgroup: what it reads and the cgroups do not pay for is cached from then on."""
        with self._process(work) as (command, environment, _):
            subprocess.run(command, env=environment, stdout=sys.stderr, check=True)

    @contextmanager
    def _process(self, work: Work) -> Iterator[tuple[list[str], dict[str, str], Path]]:
        if self.scratch is not None:
            shutil.rmtree(self.scratch, ignore_errors=True)
        path = os.pathsep.join(filter(None, [self.python_path, str(_REPOSITORY)]))
        environment = os.environ | ENGINE_ENVIRONMENT | {"PYTHONPATH": path}
        work = Work(**(asdict(work) | {"files": list(map(str, self.files))}))
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "result.json")
            yield (
                [sys.executable, "-m", self.module, work.to_json(), str(out), json.dumps(self.arguments)],
                environment,
                out,
            )


@dataclass
class Contest:
    """One engine's runs."""

    narrow: Case
    wide: Case
    has_limit: bool
    footprint: cgroup.Usage | None = None
    limit_bytes: int | None = None
    runs: list[Result] = field(default_factory=list)
    outputs: list[list[int]] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float | None:
        """Median over the rounds; None if the kernel killed it in any."""
        speeds = [run["tokens_per_s"] for run in self.runs if "tokens_per_s" in run]
        return median(speeds) if speeds and len(speeds) == len(self.runs) else None
