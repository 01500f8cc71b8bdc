"""The sidecar: one thread of the worker around a pure `tick`. Serving does not depend on it, and its end is visible."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from vllm_moecxl.data.banks.base import Bank
from vllm_moecxl.data.banks.memory import NumaBank
from vllm_moecxl.data.devices.base import DeviceBackend
from vllm_moecxl.data.mover import Mover
from vllm_moecxl.runtime.counters import Counters
from vllm_moecxl.runtime.device_driven.side import DeviceSide
from vllm_moecxl.runtime.foresight import Foresight

logger = logging.getLogger("vllm.moecxl")

#: Between ticks where a device's copies have to be fed and watched, and where the hands do that.
FEED_PERIOD_S = 200e-6
IDLE_PERIOD_S = 20e-3
#: Not heard of for this long, it counts as stalled: many times what the slowest tick takes.
STALL_S = 5.0
#: One page sample of one bank this often: a bank of 1 TiB is seen through about once a day.
_VERIFY_PERIOD_S = 1.0


class Sidecar:
    """See the module.

    Args:
        mover: fed by the sidecar where a device copies by itself.
        banks: whose placement is looked at now and then.
        counters: get its health.
        clock, thread_clock: seconds; of the wall, and of the calling thread's processor time.
    """

    def __init__(
        self,
        mover: Mover,
        banks: Sequence[Bank],
        backend: DeviceBackend,
        counters: Counters,
        clock: Callable[[], float] = time.monotonic,
        thread_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self._mover = mover
        self._banks = [bank for bank in banks if isinstance(bank, NumaBank)]
        self._backend = backend
        self._counters = counters
        self._clock = clock
        self._thread_clock = thread_clock
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="moecxl-sidecar", daemon=True)
        self._beat_s = clock()
        self._next_verify_s = self._beat_s + _VERIFY_PERIOD_S
        self._bank_index = 0
        #: What the routing of forwards leads to; set once the model is complete, None where nobody wants it.
        self.foresight: Foresight | None = None
        #: What device-driven layers have in common; None where the host looks experts up.
        self.device_side: DeviceSide | None = None
        #: What ended the thread.
        self.failure: BaseException | None = None
        #: Whether the forward may count on it; updated by `watch`.
        self.is_up = False

    def start(self) -> None:
        """Start the thread."""
        self.is_up = True
        self._beat_s = self._clock()
        self._publish()
        self._thread.start()

    def stop(self) -> None:
        """Tell the thread to end; it does at its next tick."""
        self._stop.set()
        if self.foresight is not None:
            self.foresight.ring.wake()

    def watch(self) -> bool:
        """Look whether it lives, from another thread, and show it; whether it does."""
        was_up, self.is_up = self.is_up, self._lives()
        if was_up != self.is_up:
            self._publish()
            if self.is_up:
                logger.warning("MoE offload: the sidecar is back")
            elif self._thread.is_alive() and self.failure is self._mover.failure is None:
                logger.error(
                    "MoE offload: the sidecar has not been heard of for %.0f s: serving goes on with demand fetches",
                    self._clock() - self._beat_s,
                )
        return self.is_up

    def tick(self, now_s: float) -> None:
        """One round of its work: short, and never waiting.

        Args:
            now_s: by the clock that it was made with.
        """
        self._beat_s = now_s
        if self.device_side is not None:
            self.device_side.collect()
        if self.foresight is not None:
            self.foresight.drain()
        self._mover.feed()
        if self._banks and now_s >= self._next_verify_s:
            self._next_verify_s = now_s + _VERIFY_PERIOD_S
            self._verify_next()

    def _run(self) -> None:
        try:
            self._backend.adopt_thread()
            period_s = IDLE_PERIOD_S if self._backend.is_host else FEED_PERIOD_S
            while not self._wait(period_s):
                self.tick(self._clock())
                self._counters.values[self._counters.sidecar_cpu_ns] = int(self._thread_clock() * 1e9)
        except BaseException as error:  # health and metrics show it, and serving goes on
            self.failure = error
            logger.error(
                "MoE offload: the sidecar has ended (%r): serving goes on with demand fetches", error, exc_info=error
            )
        self.is_up = False
        self._publish()

    def _wait(self, period_s: float) -> bool:
        """Until there is something to do, or the time is over; whether the thread is to end."""
        if self.foresight is None:
            return self._stop.wait(period_s)
        self.foresight.wait(period_s)
        return self._stop.is_set()

    def _lives(self) -> bool:
        return (
            self._thread.is_alive()
            and self.failure is None
            and self._mover.failure is None
            and self._clock() - self._beat_s < STALL_S
        )

    def _publish(self) -> None:
        self._counters.values[self._counters.sidecar_up] = int(self.is_up)

    def _verify_next(self) -> None:
        """Ask the kernel about some pages of one bank."""
        bank = self._banks[self._bank_index % len(self._banks)]
        self._bank_index += 1
        astray_bytes = bank.verify_some()
        self._counters.values[self._counters.bank_bytes[bank.name, "astray"]] = astray_bytes
        if astray_bytes:
            self._counters.values[self._counters.bank_up[bank.name]] = 0
