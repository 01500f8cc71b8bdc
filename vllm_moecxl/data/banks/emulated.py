"""A bank that stands for a CXL device: its slabs are in DRAM, and its reads take as long as the device's would."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from vllm_moecxl.control.device_model import DeviceModel
from vllm_moecxl.data.banks.base import BankProfile, RowCopy
from vllm_moecxl.data.banks.memory import DramBank
from vllm_moecxl.types import Tier
from vllm_moecxl.units import MIB, format_rate, format_seconds

#: Behind by more than this share, the bank's reads were slower than the device that they stand for.
_LATE_RATIO = 1.1
#: Read at least this much before saying so: a first read meets cold caches and pages that are not there yet.
_PACE_BYTES_MIN = 64 * MIB


class EmulatedBank(DramBank):
    """See `Bank`. Figures that involve it carry the label `emulated-paced`.

    Args:
        model: says when a read that is submitted now would be complete.
        clock, sleep: seconds; virtual in tests. Waking up some microseconds late costs no throughput while another read
            is in flight, and waiting awake would keep the interpreter from the forward.
    """

    tier: Tier = "cxl"
    #: While one waits until its read is due, the other copies the next chunk: the device is never idle.
    reader_count = 2

    def __init__(
        self,
        name: str,
        capacity_bytes: int | None,
        model: DeviceModel,
        profile: BankProfile,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(name, name, capacity_bytes, profile)
        self._model = model
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._read_bytes = 0
        #: Seconds that reads took, and that they would have taken on the device.
        self._taken_s = 0.0
        self._modelled_s = 0.0

    @property
    def reads_directly(self) -> bool:
        return False

    @property
    def keeps_pace(self) -> bool:
        """Whether this machine copies fast enough to stand for the device; taken for granted until enough is read."""
        return self._read_bytes < _PACE_BYTES_MIN or self._taken_s <= _LATE_RATIO * self._modelled_s

    def read(self, copies: Sequence[RowCopy]) -> None:
        byte_count = sum(one.target.nbytes for one in copies)
        start_s = self._clock()
        with self._lock:
            due_s = self._model.submit(start_s, byte_count)
        super().read(copies)
        if (left_s := due_s - self._clock()) > 0:
            self._sleep(left_s)
        with self._lock:
            self._read_bytes += byte_count
            self._taken_s += self._clock() - start_s
            self._modelled_s += due_s - start_s

    def describe(self) -> str:
        spec = self._model.spec
        device = f"{format_seconds(spec.latency_s)}, {format_rate(spec.read_bytes_per_s)}"
        pace = "" if self.keeps_pace else ", but this machine is too slow to keep the device's pace"
        return f"{super().describe()}, EMULATED: DRAM at the pace of a device of {device}{pace}"
