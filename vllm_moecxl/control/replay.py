"""What slots make of a routing trace: the policies as in the engine, demand fetches only, no time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from vllm_moecxl.control.eviction import Belady, EvictionPolicy
from vllm_moecxl.control.residency import ABSENT
from vllm_moecxl.control.trace import RoutingTrace

#: Makes a layer's policy from its slot count, its expert count and its number.
MakePolicy = Callable[[int, int, int], EvictionPolicy]


@dataclass(frozen=True)
class Visit:
    """What one forward asks of one layer.

    Attributes:
        expert_ids: uint32, distinct; more than there are slots are brought in groups, as passes would.
        is_counted: whether its hits count; those of prompts do not, which need nearly every expert anyway.
    """

    expert_ids: npt.NDArray[np.uint32]
    is_counted: bool = True


@dataclass(frozen=True)
class Hits:
    """Outcome of a replay, counted in experts.

    Attributes:
        lookup_count: experts that were asked for, each once a visit.
        hit_count: those that were in a slot by then.
    """

    lookup_count: int
    hit_count: int

    @property
    def hit_rate(self) -> float:
        """Share of the lookups that found their expert in a slot."""
        return self.hit_count / self.lookup_count if self.lookup_count else 0.0

    def fetch_bytes(self, slab_bytes: int) -> int:
        """What the misses bring in."""
        return (self.lookup_count - self.hit_count) * slab_bytes


def visits_of(trace: RoutingTrace, layer: int, *, with_prompts: bool = False) -> Iterator[Visit]:
    """Visits of one layer, one request after another: its prompt in one forward, then token by token.

    Args:
        with_prompts: whether prompts are visits too; else they pass the slots by, as they do through a layer buffer.
    """
    rows = trace.topk[:, layer].astype(np.uint32)
    for (start, end), prompt_count in zip(pairwise(trace.req.tolist()), trace.prefill.tolist(), strict=True):
        if with_prompts and prompt_count:
            yield Visit(np.unique(rows[start : start + prompt_count]), is_counted=False)
        for row in rows[start + prompt_count : end]:
            yield Visit(row)


def replayable(trace: RoutingTrace) -> RoutingTrace:
    """The trace; one that records nothing but prompts is taken for decode, token by token."""
    return trace if trace.decode_mask().any() else trace.as_decode()


def replay_layer(
    visits: Iterator[Visit] | Sequence[Visit], expert_count: int, slot_count: int, policy: EvictionPolicy
) -> Hits:
    """Run one layer's visits through its slots, which are empty at first and never emptied."""
    slots = _Slots(expert_count, slot_count, policy)
    lookup_count = hit_count = 0
    for visit in visits:
        hits = slots.visit(visit.expert_ids)
        if visit.is_counted:
            lookup_count += len(visit.expert_ids)
            hit_count += hits
    return Hits(lookup_count, hit_count)


def replay(
    trace: RoutingTrace, slot_counts: Sequence[int], make_policy: MakePolicy, *, with_prompts: bool = False
) -> Hits:
    """Replay every layer of a trace, one request at a time; slots keep what they hold from request to request.

    Args:
        slot_counts: of each layer, at least the trace's k.
        with_prompts: see `visits_of`.
    """
    total = Hits(0, 0)
    for layer, slot_count in enumerate(slot_counts):
        assert trace.topk_count <= slot_count <= trace.expert_count
        policy = make_policy(slot_count, trace.expert_count, layer)
        visits = visits_of(trace, layer, with_prompts=with_prompts)
        hits = replay_layer(visits, trace.expert_count, slot_count, policy)
        total = Hits(total.lookup_count + hits.lookup_count, total.hit_count + hits.hit_count)
    return total


def belady(trace: RoutingTrace) -> MakePolicy:
    """The offline bound for a replay without prompts."""
    rows = trace.topk[trace.decode_mask()]
    return lambda slot_count, expert_count, layer: Belady(slot_count, expert_count, rows[:, layer])


class _Slots:
    """`Residency` where every fetch arrives at once and nothing is held from one visit to the next.

    It does the same twice as fast, on which the length of a benchmark depends; `test_replay` holds the two together.
    """

    def __init__(self, expert_count: int, slot_count: int, policy: EvictionPolicy) -> None:
        self._policy = policy
        self._slot_count = slot_count
        self._filled_count = 0
        self._slot_of = np.full(expert_count, ABSENT, dtype=np.intp)
        self._expert_of = [ABSENT] * slot_count
        self._last_read = np.zeros(slot_count, dtype=np.int64)
        self._now = 0

    def visit(self, expert_ids: npt.NDArray[np.uint32]) -> int:
        """Serve one visit; how many of its experts were there before."""
        slot_ids = self._slot_of[expert_ids]
        self._policy.record(expert_ids)
        if slot_ids.item(slot_ids.argmin()) >= 0:
            self._now += 1
            self._last_read[slot_ids] = self._now
            return len(slot_ids)
        for first in range(0, len(expert_ids), self._slot_count):
            self._bring(expert_ids[first : first + self._slot_count])
        return int(np.count_nonzero(slot_ids >= 0))

    def _bring(self, expert_ids: npt.NDArray[np.uint32]) -> None:
        """Fetch what is missing of a pass, and read all of it."""
        slot_ids = self._slot_of[expert_ids]
        is_here = slot_ids >= 0
        candidates = np.ones(self._slot_count, dtype=np.bool_)
        candidates[slot_ids[is_here]] = False
        for expert_id in expert_ids[~is_here].tolist():
            if self._filled_count < self._slot_count:
                slot_id = self._filled_count
                self._filled_count += 1
            else:
                slot_id = self._policy.victim(candidates, self._last_read)
                self._slot_of[self._expert_of[slot_id]] = ABSENT
            candidates[slot_id] = False
            self._expert_of[slot_id] = expert_id
            self._slot_of[expert_id] = slot_id
            self._policy.admit(slot_id, expert_id)
        self._now += 1
        self._last_read[self._slot_of[expert_ids]] = self._now
