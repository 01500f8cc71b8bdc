"""Bugs to plant in the real code: each is a line that somebody could have forgotten or got wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from tests.kernels.reference_ensure import _State as DeviceTable
from tests.property.test_guards_bite import Owner, take_out
from tests.races import lending
from tests.races.cases import CASES_BY_NAME
from tests.races.search import Strategy, Tally, run_seeds
from vllm_moecxl.control.residency import Residency
from vllm_moecxl.data.carrier import Carrier
from vllm_moecxl.data.mover import Mover
from vllm_moecxl.data.staging import StagingRing
from vllm_moecxl.runtime.device_driven.lanes import DeviceSlots
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


DATA_PLANE_PLANTS = [
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

#: Either side of the lending protocol, and whoever queues its kernels.
LENDING_PLANTS = [
    Plant(
        "offered before the copies have ended",
        "lending-lanes",
        DeviceSlots,
        "_settle",
        "if lane.fetch.has_landed:",
        "if not lane.fetch.unissued_count:",
    ),
    Plant(
        "lane filled again before the answer",
        "lending-lanes",
        DeviceSlots,
        "_offer",
        "lane.is_offered = True",
        "lane.rest()",
    ),
    Plant(
        "lane keeps the slot that was adopted",
        "lending-lanes",
        DeviceSlots,
        "_take_answer",
        "lane.slot_id = answer.slot_id",
        "pass",
    ),
    Plant(
        "old answer taken for a new one",
        "lending-lanes",
        DeviceSlots,
        "_take_answer",
        "if answer.sequence != lane.sequence:",
        "if not answer.sequence:",
    ),
    Plant(
        "offered under a cancelled copy",
        "lending-replicated",
        DeviceSlots,
        "_settle",
        "elif lane.fetch.is_over:",
        "elif lane.fetch.transfer.is_cancelled:",
    ),
    Plant(
        "lent slot filled by the device",
        "lending-lanes",
        DeviceTable,
        "victims",
        "if not self.is_host[slot] and expert",
        "if expert",
    ),
    Plant(
        "slot lent while its expert is looked up there",
        "lending-lanes",
        DeviceTable,
        "answer",
        "self._evict(returned)",
        "pass",
    ),
    Plant(
        "running batch not protected",
        "lending-lanes",
        DeviceTable,
        "__init__",
        "self.needed = set(needed)",
        "self.needed: set[int] = set()",
    ),
    Plant(
        "offer answered twice",
        "lending-lanes",
        DeviceTable,
        "answer",
        "if offer.sequence == self.answered[lane]:",
        "if not offer.sequence:",
    ),
    Plant(
        "resident expert adopted",
        "lending-lanes",
        DeviceTable,
        "answer",
        "is_adopted = self.slot_of[offer.expert_id] == NONE",
        "is_adopted = True",
    ),
    Plant(
        "gather on a stream of its own",
        "lending-lanes",
        lending.Layer,
        "visit",
        "gathering = reading = compute",
        "gathering, reading = backend.copy_stream(9), compute",
    ),
    Plant(
        "slot returned under a kernel on another stream",
        "lending-lanes",
        lending.Layer,
        "visit",
        "gathering = reading = compute",
        "gathering, reading = compute, backend.copy_stream(9)",
    ),
    Plant(
        "forward waits",
        "lending-lanes",
        lending.Layer,
        "visit",
        "backend.wait(reading, gathered)",
        "backend.synchronize(gathered)",
    ),
]

PLANTS = [*DATA_PLANE_PLANTS, *LENDING_PLANTS]
