"""Bugs to plant in the real code: each is a line that somebody could have forgotten or got wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from tests.property.test_guards_bite import Owner, take_out
from tests.races.cases import CASES_BY_NAME
from tests.races.search import Strategy, Tally, run_seeds
from vllm_moecxl.control.residency import Residency
from vllm_moecxl.data.carrier import Carrier
from vllm_moecxl.data.mover import Mover
from vllm_moecxl.data.staging import StagingRing
from vllm_moecxl.runtime.layer_buffer import LayerBuffer
from vllm_moecxl.runtime.slots import SlotCache


@dataclass(frozen=True)
class Plant:
    """A bug: in `owner.method`, `guard` becomes `instead`.

    Attributes:
        case_name: where it can be found.
    """

    name: str
    case_name: str
    owner: Owner
    method: str
    guard: str
    instead: str

    @contextmanager
    def planted(self) -> Iterator[None]:
        """The code with the bug in it."""
        with pytest.MonkeyPatch.context() as monkeypatch:
            take_out(monkeypatch, self.owner, self.method, self.guard, self.instead)
            yield

    def search(self, strategy: Strategy, schedule_count: int, *, checks_order: bool) -> Tally:
        """Look for it."""
        with self.planted():
            return run_seeds(CASES_BY_NAME[self.case_name], strategy, range(schedule_count), checks_order=checks_order)


PLANTS = [
    Plant("missing wait", "token-passes", Mover, "wait", "self._backend.wait(compute, event)", "pass"),
    Plant("early lease end", "token-passes", SlotCache, "_end", "if self._backend.is_host:", "if True:"),
    Plant(
        "event on the wrong stream",
        "token-passes",
        Carrier,
        "copy",
        "return self._backend.record(stream)",
        "return self._backend.record(self._backend.compute_stream())",
    ),
    Plant(
        "slot reused before the read",
        "token-passes",
        Residency,
        "begin_fill",
        " & (self._stamp <= self._ended_epoch)",
        "",
    ),
    Plant("ring wrapped early", "staged", StagingRing, "acquire", "if event is not None:", "if False:"),
    # Beyond the five that there have to be.
    Plant(
        "lease of the wrong stream",
        "token-passes",
        SlotCache,
        "_end",
        "self._backend.record(self._backend.compute_stream())",
        "self._backend.record(self._backend.copy_stream(0))",
    ),
    Plant(
        "buffer filled under the kernel",
        "ids-at-once-buffers",
        Carrier,
        "copy",
        "if fetch.after is not None:",
        "if False:",
    ),
    Plant(
        "buffer's reader forgotten",
        "ids-at-once-buffers",
        LayerBuffer,
        "was_read",
        "if not self._backend.is_host:",
        "if False:",
    ),
    Plant(
        "cell freed under a cancelled copy",
        "striped",
        Mover,
        "cancel",
        "while any(",
        "while False and any(",
    ),
    Plant(
        "arrival taken for granted",
        "token-passes",
        Mover,
        "_poll",
        "if self._backend.query(entry[0])",
        "if True",
    ),
    Plant(
        "the last event only",
        "striped",
        Mover,
        "_carry",
        "fetch.events.append(event)",
        "fetch.events[:] = [event]",
    ),
]
