"""Whether something that costs as well as it helps makes steps faster: it is tried, with and without, by turns."""

from __future__ import annotations

import sys
from statistics import median

#: Steps of one turn. Two turns of each are compared: what drifts hits both.
TURN_STEP_COUNT = 16
#: Turns of a trial, with and without: A B B A.
_TURNS = (True, False, False, True)
#: Steps before the first trial: predictors know nothing at first, and caches are cold.
WARMUP_STEP_COUNT = 64
#: Steps between trials. After one that was lost, the double, up to the maximum; of trials it costs little to win.
#: Source: planning figures: a trial is at most 3 % of the steps, and a loser is found out within 130 steps.
PAUSE_STEP_COUNT = 1024
PAUSE_STEP_COUNT_MAX = 16384
#: It has to save this share of a step's time.
SAVED_SHARE_MIN = 0.01
#: Steps that have to have others of their width to be held against, or the trial says nothing.
COMPARED_STEP_COUNT_MIN = 16
#: Steps of a turn that are not counted: what the turn before left behind.
_SETTLE_STEP_COUNT = 4


class Trial:
    """Says for each step whether to use it, and learns from how long the step took.

    Only steps of the same width are alike, and are compared.
    """

    def __init__(self) -> None:
        #: Whether the coming step uses it.
        self.is_on = True
        #: Share of a step's time that the latest trial found it to save; None before the first.
        self.saved_share: float | None = None
        #: What the latest trial said; it counts between trials.
        self.verdict = True
        self._left_step_count = WARMUP_STEP_COUNT
        self._pause_step_count = PAUSE_STEP_COUNT
        #: Of the trial under way; the place in `_TURNS`, None between trials.
        self._turn: int | None = None
        self._turn_step_count = 0
        self._is_used = False
        #: With and without, by width.
        self._durations_s: dict[bool, dict[int, list[float]]] = {}

    def pin(self) -> None:
        """Use it from now on, however it does."""
        self.is_on = self.verdict = True
        self._turn, self._left_step_count = None, sys.maxsize

    def observe(self, width: int, duration_s: float) -> None:
        """A step is over.

        Args:
            width: its tokens.
            duration_s: from its beginning to that of the next one.
        """
        if self._turn is None:
            self._left_step_count -= 1
            if self._left_step_count <= 0:
                self._start()
            return
        self._turn_step_count += 1
        if self._turn_step_count > _SETTLE_STEP_COUNT:
            self._durations_s[self.is_on].setdefault(width, []).append(duration_s)
        if self._turn_step_count < TURN_STEP_COUNT:
            return
        self._turn_step_count = 0
        self._turn += 1
        if self._turn < len(_TURNS):
            self.is_on = _TURNS[self._turn]
        else:
            self._end()

    def use(self) -> None:
        """It does something in this step: where it never does, steps that differ do so by chance."""
        self._is_used = True

    def _start(self) -> None:
        self._is_used = False
        self._turn = self._turn_step_count = 0
        self._durations_s = {True: {}, False: {}}
        self.is_on = _TURNS[0]

    def _end(self) -> None:
        self._turn = None
        saved_share = self._compare()
        if saved_share is not None:
            self.saved_share = saved_share
            self.verdict = saved_share >= SAVED_SHARE_MIN
            self._pause_step_count = (
                PAUSE_STEP_COUNT if self.verdict else min(2 * self._pause_step_count, PAUSE_STEP_COUNT_MAX)
            )
        self.is_on = self.verdict
        self._left_step_count = self._pause_step_count

    def _compare(self) -> float | None:
        """The share of a step's time that it saves; None where too few steps were alike."""
        if not self._is_used:
            return 0.0
        with_s, without_s, compared_count = 0.0, 0.0, 0
        for width, durations_s in self._durations_s[True].items():
            others_s = self._durations_s[False].get(width, ())
            count = min(len(durations_s), len(others_s))
            if count:
                with_s += count * median(durations_s)
                without_s += count * median(others_s)
                compared_count += count
        return 1 - with_s / without_s if compared_count >= COMPARED_STEP_COUNT_MIN and without_s else None
