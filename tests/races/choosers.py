"""Who steps next on the modelled accelerator: by chance, with few preemptions, or in every way there is."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from vllm_moecxl.data.devices.modelled import Chooser

#: Decisions over which a bounded chooser spreads its preemptions; which one fits a program, chance says.
_SPANS = (8, 32, 128, 512)
_PREEMPTION_COUNT_MAX = 3


class RandomChooser:
    """Each actor is as likely as the others, at every step."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def choose(self, actors: Sequence[int]) -> int:
        return int(self._random() * len(actors))


class BoundedChooser:
    """Actors have random priorities, and the first of them steps until it is blocked; at a few steps it falls behind.

    Most races need few preemptions, but these at the right place, which pure chance seldom leaves alone.
    Source: S. Burckhardt et al., "A randomized scheduler with probabilistic guarantees of finding bugs", ASPLOS 2010.
    """

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        span = self._rng.choice(_SPANS)
        self._preemptions = {self._rng.randrange(span) for _ in range(self._rng.randint(0, _PREEMPTION_COUNT_MAX))}
        self._priorities: dict[int, float] = {}
        self._decision_count = 0

    def choose(self, actors: Sequence[int]) -> int:
        priorities = self._priorities
        for actor in actors:
            if actor not in priorities:
                priorities[actor] = self._rng.random()
        index = max(range(len(actors)), key=lambda i: priorities[actors[i]])
        if self._decision_count in self._preemptions:
            priorities[actors[index]] = -1.0 - self._decision_count
            index = max(range(len(actors)), key=lambda i: priorities[actors[i]])
        self._decision_count += 1
        return index


class PathChooser:
    """Follows a path of decisions, and takes the first choice from its end on.

    Attributes:
        taken: the decisions so far.
        widths: how many choices each of them had.
    """

    def __init__(self, path: Sequence[int]) -> None:
        self._path = path
        self.taken: list[int] = []
        self.widths: list[int] = []

    def choose(self, actors: Sequence[int]) -> int:
        depth = len(self.taken)
        choice = self._path[depth] if depth < len(self._path) else 0
        assert choice < len(actors), f"decision {depth} of the path has no choice {choice}: the program has changed"
        self.taken.append(choice)
        self.widths.append(len(actors))
        return choice


def every_path(run: Callable[[Chooser], None]) -> Iterator[list[int]]:
    """Run a program in every way there is, depth first; gives the path of each run after it.

    The program has to do the same each time that it gets the same decisions.
    """
    path: list[int] | None = []
    while path is not None:
        chooser = PathChooser(path)
        run(chooser)
        yield chooser.taken
        path = path_after(chooser)


def path_after(chooser: PathChooser) -> list[int] | None:
    """The path that is next in depth-first order, None after the last."""
    for depth in reversed(range(len(chooser.taken))):
        if chooser.taken[depth] + 1 < chooser.widths[depth]:
            return [*chooser.taken[:depth], chooser.taken[depth] + 1]
    return None
