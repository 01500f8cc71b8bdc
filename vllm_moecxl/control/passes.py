"""How a forward that needs more experts than there are slots is cut into passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pass:
    """One kernel call.

    Attributes:
        expert_ids: [n] distinct experts that have to be resident, n <= slots.
        token_ids: [m] rows of the forward that it computes, ascending; None for all of them (an expert pass).
    """

    expert_ids: Ids
    token_ids: Ids | None


def token_passes(
    topk_ids: npt.NDArray[np.integer], resident: Mask, slot_count: int, fetch_limit: int
) -> list[Pass] | None:
    """Group whole tokens into passes whose experts fit the slots together, so that few slabs are fetched twice.

    Greedy: a pass starts from what is resident and takes, again and again, the tokens that cost the fewest fetches
    (ties: the fewest slots); whatever already fits joins for free. The next pass starts with the slots as this one
    leaves them.

    Args:
        topk_ids: [tokens, k] expert ids.
        resident: [experts] bool, experts in slots now.
        slot_count: slots of the layer, at least k.
        fetch_limit: give up as soon as more fetches than this are certain.

    Returns:
        Passes that cover each token once, or None where `fetch_limit` would be exceeded.
    """
    expert_count = resident.shape[0]
    sets, set_of_token = np.unique(np.sort(topk_ids, axis=1), axis=0, return_inverse=True)
    set_of_token = set_of_token.reshape(-1)
    member = np.zeros((sets.shape[0], expert_count), dtype=np.bool_)
    np.put_along_axis(member, sets.astype(np.int64), True, axis=1)
    assert member.sum(axis=1).max() <= slot_count, "one token's experts have to fit the slots"

    resident = resident.copy()
    remaining = np.arange(sets.shape[0])
    passes: list[Pass] = []
    fetch_count = 0
    while remaining.size:
        chosen, taken = _fill_pass(member[remaining], resident, slot_count)
        fetch_count += int(np.count_nonzero(chosen & ~resident))
        if fetch_count > fetch_limit:
            return None
        passes.append(
            Pass(
                expert_ids=np.flatnonzero(chosen),
                token_ids=np.flatnonzero(np.isin(set_of_token, remaining[taken])),
            )
        )
        remaining = remaining[~taken]
        resident = _after_pass(chosen, resident, member[remaining].any(axis=0), slot_count)
    return passes


def expert_passes(expert_ids: npt.NDArray[np.integer], resident: Mask, slot_count: int) -> list[Pass]:
    """Split distinct experts into passes of at most `slot_count`, resident ones first: none is fetched twice."""
    ordered = expert_ids[np.argsort(~resident[expert_ids], kind="stable")].astype(np.int64)
    return [Pass(ordered[start : start + slot_count], None) for start in range(0, ordered.size, slot_count)]


def fetch_counts(passes: Sequence[Pass], resident: Mask, slot_count: int) -> list[int]:
    """Experts that each pass will find missing, in order."""
    resident, counts = resident.copy(), []
    for index, part in enumerate(passes):
        chosen = np.zeros_like(resident)
        chosen[part.expert_ids] = True
        counts.append(int(np.count_nonzero(chosen & ~resident)))
        resident = _after_pass(chosen, resident, needed_later(passes, index + 1, resident.size), slot_count)
    return counts


def split_resident(part: Pass, topk_ids: npt.NDArray[np.integer], resident: Mask) -> tuple[Pass, Pass] | None:
    """Cut a pass into the tokens whose experts are all there and the others; None unless there are both.

    Args:
        part: a pass over whole tokens; `token_ids` None means all of them.
        topk_ids: [tokens, k] expert ids of the forward.
        resident: [experts] bool.
    """
    token_ids = np.arange(len(topk_ids), dtype=np.int64) if part.token_ids is None else part.token_ids
    is_ready = resident[topk_ids[token_ids]].all(axis=1)
    if is_ready.all() or not is_ready.any():
        return None
    ready, waiting = token_ids[is_ready], token_ids[~is_ready]
    return (
        Pass(np.unique(topk_ids[ready]).astype(np.int64), ready),
        Pass(np.unique(topk_ids[waiting]).astype(np.int64), waiting),
    )


def needed_later(passes: Sequence[Pass], index: int, expert_count: int) -> Mask:
    """[experts] bool, the experts of pass `index` and of all after it."""
    mask = np.zeros(expert_count, dtype=np.bool_)
    for later in passes[index:]:
        mask[later.expert_ids] = True
    return mask


def _fill_pass(member: Mask, resident: Mask, slot_count: int) -> tuple[Mask, Mask]:
    """Experts ([experts] bool) and sets ([sets] bool) of the next pass, of the sets in `member` ([sets, experts])."""
    chosen = np.zeros(member.shape[1], dtype=np.bool_)
    size = member.sum(axis=1)
    cost = (member & ~resident).sum(axis=1)
    taken = np.zeros(member.shape[0], dtype=np.bool_)
    unfit = slot_count + 1
    while True:
        room = slot_count - int(np.count_nonzero(chosen))
        rank = np.where(taken | (size > room), unfit * unfit, cost * unfit + size)
        best = int(rank.argmin())
        if rank[best] == unfit * unfit:
            return chosen, taken
        added = member[best] & ~chosen
        chosen |= added
        size -= member[:, added].sum(axis=1)
        cost -= member[:, added & ~resident].sum(axis=1)
        taken |= size == 0


def _after_pass(chosen: Mask, resident: Mask, wanted: Mask, slot_count: int) -> Mask:
    """What is in the slots after a pass: its experts, and of the earlier ones those that later passes want."""
    after = chosen.copy()
    earlier = np.flatnonzero(resident & ~chosen)
    earlier = earlier[np.argsort(~wanted[earlier], kind="stable")]
    after[earlier[: slot_count - int(np.count_nonzero(chosen))]] = True
    return after
