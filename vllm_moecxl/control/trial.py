"""Whether something that costs as well as it helps makes steps faster: it is tried, with and without, by turns."""

from __future__ import annotations

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
#: Steps of a turn that are not counted: what the turn before left behind.
_SETTLE_STEP_COUNT = 4


class Trial:
    """Says for each step whether to use it, and learns from how long the step took.

    Only steps that are alike can be compared: a step of another width begins the trial under way anew.
    """

    def __init__(self) -> None:
        #: Whether the coming step uses it.
        self.is_on = True
        #: Share of a step's time that the latest trial found it to save; None before the first.
        self.saved_share: float | None = None
        self._verdict = True
        self._left_step_count = WARMUP_STEP_COUNT
        self._pause_step_count = PAUSE_STEP_COUNT
        self._width = 0
        #: Of the trial under way; the place in `_TURNS`, None between trials.
        self._turn: int | None = None
        self._turn_s: list[float] = []
        self._durations_s: dict[bool, list[float]] = {}

    def observe(self, width: int, duration_s: float) -> None:
        """A step is over.

        Args:
            width: its tokens.
            duration_s: from its beginning to that of the next one.
        """
        if width != self._width:
            self._width = width
            if self._turn is not None:
                self._start()
            return
        if self._turn is None:
            self._left_step_count -= 1
            if self._left_step_count <= 0:
                self._start()
            return
        self._turn_s.append(duration_s)
        if len(self._turn_s) < TURN_STEP_COUNT:
            return
        self._durations_s[self.is_on] += self._turn_s[_SETTLE_STEP_COUNT:]
        self._turn_s = []
        self._turn += 1
        if self._turn < len(_TURNS):
            self.is_on = _TURNS[self._turn]
        else:
            self._end()

    def _start(self) -> None:
        self._turn, self._turn_s = 0, []
        self._durations_s = {True: [], False: []}
        self.is_on = _TURNS[0]

    def _end(self) -> None:
        with_s, without_s = median(self._durations_s[True]), median(self._durations_s[False])
        self.saved_share = 1 - with_s / without_s if without_s else 0.0
        self._verdict = self.is_on = self.saved_share >= SAVED_SHARE_MIN
        self._pause_step_count = (
            PAUSE_STEP_COUNT if self._verdict else min(2 * self._pause_step_count, PAUSE_STEP_COUNT_MAX)
        )
        self._left_step_count = self._pause_step_count
        self._turn = None
