"""A bank that stands for a CXL device: its slabs are in DRAM, and its reads take as long as the device's would."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from vllm_moecxl.control.device_model import DeviceModel
from vllm_moecxl.data.banks.base import BankProfile, RowCopy
from vllm_moecxl.data.banks.memory import DramBank
from vllm_moecxl.types import Tier

#: The kernel wakes a sleeper this late, about; the rest is waited out awake.
_WAKE_UP_S = 100e-6
#: Behind by more than this share, the bank's reads were slower than the device that they stand for.
_LATE_RATIO = 1.1


class EmulatedBank(DramBank):
    """See `Bank`. Figures that involve it carry the label `emulated-paced`.

    Args:
        model: says when a read that is submitted now would be complete.
        clock, sleep: seconds; virtual in tests.
    """

    tier: Tier = "cxl"

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
        #: Seconds that reads took, and that they would have taken on the device.
        self._taken_s = 0.0
        self._modelled_s = 0.0

    @property
    def reads_directly(self) -> bool:
        return False

    @property
    def keeps_pace(self) -> bool:
        """Whether this machine copies fast enough to stand for the device."""
        return self._taken_s <= _LATE_RATIO * self._modelled_s

    def read(self, copies: Sequence[RowCopy]) -> None:
        start_s = self._clock()
        with self._lock:
            due_s = self._model.submit(start_s, sum(target.nbytes for _, _, target in copies))
        super().read(copies)
        while (left_s := due_s - self._clock()) > 0:
            if left_s > _WAKE_UP_S:
                self._sleep(left_s - _WAKE_UP_S)
        with self._lock:
            self._taken_s += self._clock() - start_s
            self._modelled_s += due_s - start_s

    def describe(self) -> str:
        pace = "" if self.keeps_pace else ", but this machine is too slow to keep the device's pace"
        return f"{super().describe()}, EMULATED: DRAM at the pace of {self._model.spec}{pace}"
