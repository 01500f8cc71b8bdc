"""What is made of the routing that forwards leave behind: a trace, a forecast, prefetches."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vllm_moecxl.control.prediction.base import Observation, Target
from vllm_moecxl.control.prefetching import Prefetching
from vllm_moecxl.control.recorder import TraceRecorder
from vllm_moecxl.control.trace import RoutingTrace
from vllm_moecxl.control.trial import Trial
from vllm_moecxl.errors import MoeOffloadError
from vllm_moecxl.runtime.lookahead import GateLookahead
from vllm_moecxl.runtime.ring import Begun, Ended, RoutingRing, Sighting

logger = logging.getLogger("vllm.moecxl")

#: Nothing seen for this long, a recording is written.
_QUIET_S = 1.0
#: Each time all of it is written again: so often at most, and for this share of the time at most.
_SAVE_PERIOD_S = 10.0
_SAVE_SHARE = 0.05
#: A gate's score that is infinite.
_SCORE_MAX = 1e9
#: Whoever has been taking in what was seen for so long will not end before the process does.
_CLOSE_S = 5.0


class Recording:
    """A trace, and where it goes. A path or disk that fails is reported, and serving goes on.

    Args:
        recorder: gathers it.
        path: the file.
        clock: seconds.
    """

    def __init__(self, recorder: TraceRecorder, path: Path, clock: Callable[[], float] = time.perf_counter) -> None:
        self.recorder = recorder
        self._path = path
        self._clock = clock
        self._saved_bytes = 0
        self._due_s = -math.inf
        self._writer: threading.Thread | None = None
        self._reported: str | None = None

    def save_beside(self) -> None:
        """Have a thread of its own write what is new, unless the last time was but a moment ago."""
        is_writing = self._writer is not None and self._writer.is_alive()
        if is_writing or self._clock() < self._due_s or self.recorder.byte_count == self._saved_bytes:
            return
        begun_s = self._clock()
        write = partial(self._write, self.recorder.trace(), self.recorder.byte_count, begun_s)
        self._writer = threading.Thread(target=write, name="moecxl-trace", daemon=True)
        self._writer.start()

    def save(self) -> None:
        """Write what is new, and return when all of it is in the file."""
        if self._writer is not None:
            self._writer.join()
        if self.recorder.byte_count != self._saved_bytes:
            self._write(self.recorder.trace(), self.recorder.byte_count, self._clock())

    def _write(self, trace: RoutingTrace, byte_count: int, begun_s: float) -> None:
        try:
            trace.save(self._path)
            self._saved_bytes, self._reported = byte_count, None
        except MoeOffloadError as error:
            if str(error) != self._reported:
                logger.error("MoE offload: %s", error)
            self._reported = str(error)
        now_s = self._clock()
        self._due_s = now_s + max(_SAVE_PERIOD_S, (now_s - begun_s) / _SAVE_SHARE)


class Foresight:
    """See the module. Any thread may `drain`; one at a time does.

    Args:
        ring: where forwards write.
        expert_count: experts of each layer.
        recording: None where nothing is to be recorded.
        prefetching: None where nothing is to be predicted.
        lookahead: gates to apply early to inputs that come without; None where there are none.
        show_prefetch_up: gets whether prefetching is worth its time, when that has changed.
        clock: seconds, the ring's.
    """

    def __init__(
        self,
        ring: RoutingRing,
        expert_count: int,
        recording: Recording | None,
        prefetching: Prefetching | None,
        lookahead: GateLookahead | None,
        show_prefetch_up: Callable[[bool], None] = lambda is_up: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.ring = ring
        self.prefetching = prefetching
        self._expert_count = expert_count
        self._recording = recording
        self._lookahead = lookahead
        self._show_prefetch_up = show_prefetch_up
        self._was_worth_it = True
        self._clock = clock
        self._lock = threading.Lock()
        #: Of the step under way; None where nobody could say what is in it.
        self._token_count: int | None = None
        #: Whether it is predicted.
        self._is_predicted = False
        #: Whether taking something in has failed: from then on nothing is.
        self._has_failed = False
        self._latest_s = clock()
        #: Whether nothing has been seen for so long that what was on its way has been settled.
        self._is_resting = True

    def wait(self, period_s: float) -> None:
        """Return once something was seen, or the time is over."""
        self.ring.wait(period_s)

    def drain(self, *, predicts: bool = True) -> None:
        """Take in all that was seen, then fetch for what comes next.

        Args:
            predicts: whether that is worth the time of the calling thread; if not, there is only the recording.
        """
        if not self._lock.acquire(blocking=False):
            return
        try:
            targets = self._take_all(predicts)
            if targets and self.prefetching is not None:
                self.prefetching.fetch(targets, self._clock())
            if self._clock() - self._latest_s > _QUIET_S:
                self._rest()
        except BaseException:
            # The sidecar ends with this, and shows it. A forward that drains in its place must not.
            self._has_failed = True
            self.ring.is_wanted = False
            raise
        finally:
            self._lock.release()

    def _rest(self) -> None:
        if self._recording is not None:
            self._recording.save_beside()
        if self.prefetching is not None and not self._is_resting:
            self._is_resting = True
            self.prefetching.rest()

    def close(self) -> None:
        """Write what is left of the recording. Nothing is fetched any more."""
        if self._recording is not None and self._lock.acquire(timeout=_CLOSE_S):
            try:
                self._take_all(predicts=False)
                self._recording.save()
            finally:
                self._lock.release()

    def _take_all(self, predicts: bool) -> Sequence[Target]:
        """What may be fetched for after all that was seen."""
        targets: Sequence[Target] = ()
        while (entry := self.ring.take()) is not None:
            self._latest_s = self._clock()
            self._is_resting = False
            if not self._has_failed:
                targets = self._take(entry, predicts)
        return targets

    def _take(self, entry: Begun | Sighting | Ended, predicts: bool) -> Sequence[Target]:
        recorder = self._recording.recorder if self._recording is not None else None
        prefetching = self.prefetching if predicts else None
        match entry:
            case Begun(step, positions, time_s):
                self._token_count = None if step is None else len(step.rows)
                if recorder is not None and step is not None:
                    recorder.begin(step, positions)
                self._is_predicted = prefetching is not None
                targets: Sequence[Target] = ()
                if prefetching is not None:
                    targets = prefetching.begin(step, time_s)
                    self._tell(prefetching.trial)
                self.ring.is_wanted = recorder is not None or (prefetching is not None and prefetching.is_on)
                return targets
            case Sighting():
                # Fewer rows than tokens: some went elsewhere, and nobody knows which are which. An expert that the
                # layer does not have fails its forward, and is nothing to learn from.
                if (
                    not self._token_count
                    or len(entry.expert_ids) < self._token_count
                    or entry.expert_ids.max() >= self._expert_count
                ):
                    return ()
                seen = self._observation(entry, self._token_count)
                if recorder is not None:
                    recorder.observe(seen.layer_id, seen.expert_ids, seen.weights, _choice(seen))
                if prefetching is None or not self._is_predicted:
                    return ()
                return prefetching.observe(seen, entry.time_s)
            case Ended(request_ids):
                for request_id in request_ids:
                    if recorder is not None:
                        recorder.finish(request_id)
                    if self.prefetching is not None:
                        self.prefetching.forget(request_id)
                return ()

    def _tell(self, trial: Trial) -> None:
        """Show what a trial has found, if it is something new."""
        if trial.verdict == self._was_worth_it or trial.saved_share is None:
            return
        self._was_worth_it = trial.verdict
        self._show_prefetch_up(trial.verdict)
        logger.info(
            "MoE offload: prefetching is %s: it changes the time of a step by %+.1f %% here",
            *("on again" if trial.verdict else "off for a while", -100 * trial.saved_share),
        )

    def _observation(self, seen: Sighting, token_count: int) -> Observation:
        """Without the rows that an engine pads a step with, and with what the next gates make of it."""
        rows = slice(token_count)
        # One number that is none would be in all that is learned from then on.
        hidden = None if seen.hidden is None else _finite(seen.hidden[rows].float().numpy(), 0.0)
        ahead = None if seen.ahead is None else seen.ahead[:, rows]
        if ahead is None and hidden is not None and self._lookahead is not None:
            ahead = self._lookahead.on_host(seen.layer_id, hidden)
        ahead = None if ahead is None else _finite(ahead, _SCORE_MAX)
        weights = None if seen.weights is None else seen.weights[rows]
        return Observation(seen.layer_id, seen.expert_ids[rows].astype(np.int64), weights, ahead, hidden)


def _finite(values: npt.NDArray[np.float32], limit: float) -> npt.NDArray[np.float32]:
    """The same; with 0 for what is no number, and the limit for what is infinite."""
    if np.isfinite(values).all():
        return values
    return np.nan_to_num(values, nan=0.0, posinf=limit, neginf=-limit)


def _choice(seen: Observation) -> npt.NDArray[np.integer] | None:
    """[tokens, k] what the next layer's gate would choose from this layer's input, if that is known."""
    if seen.ahead is None:
        return None
    topk = seen.expert_ids.shape[1]
    return np.argsort(-seen.ahead[0], axis=1, kind="stable")[:, :topk]
