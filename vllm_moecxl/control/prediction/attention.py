"""Attention-guided: past positions that resemble the current one say which experts it uses next."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_moecxl.control.prediction.base import Observation, Probabilities, Step, Target
from vllm_moecxl.control.prediction.history import BaseRate
from vllm_moecxl.control.prediction.requests import last_token_of

#: Positions that are remembered, of all requests together: layers * top-k * 8 KiB.
POSITION_COUNT = 1024
#: Score of a layer in which a position used the same experts, and what is left of it a layer later.
OVERLAP_SCORE = 3.0
LAYER_DECAY = 0.7
#: Score of a layer in which the hidden state points the same way; 0 for a right angle.
HIDDEN_SCORE = 1.5
#: Numbers that a hidden state is folded into, and the tokens over which their mean is averaged.
SKETCH_DIM = 64
SKETCH_MEAN_TOKENS = 2048
#: Score of the same token, and of the same request.
TOKEN_SCORE = 1.0
REQUEST_SCORE = 0.5
#: Share of a position's score that the position after it starts with: what follows a look-alike is likely one.
CONTEXT_SHARE = 0.2
#: A position's weight falls with this power of its age in positions.
AGE_POWER = 0.2
#: Score of an imaginary position that uses the experts as often as everybody does: what only weak matches speak for
#: stays near the base rate.
PRIOR_SCORE = 5.0
#: Positions that score less than the best one by this much are not looked at.
SCORE_RANGE = 4.0
#: Scores count this much for the next step: what follows a similar position is less alike than what it does itself.
NEXT_STEP_SHARPNESS = 0.6
#: Squared length below which a hidden state points nowhere.
LENGTH_MIN = 1e-12


class Sketches:
    """Hidden states of the remembered positions, folded into a few numbers that keep their angles.

    Source: Weinberger et al., "Feature Hashing for Large Scale Multitask Learning" (2009). On mixtral-mini 64 numbers
    find as many experts as all 256 do (77.6 and 77.8 %).

    Args:
        layer_count: MoE layers.
        hidden_dim: numbers in a hidden state.
    """

    def __init__(self, layer_count: int, hidden_dim: int) -> None:
        self._signs = np.random.default_rng(0).choice(np.array([-1, 1], np.float32), hidden_dim)
        #: [layers, positions, SKETCH_DIM] float32 of length 1, and the mean that is taken off before.
        self._directions = np.zeros((layer_count, POSITION_COUNT, SKETCH_DIM), np.float32)
        self._means = np.zeros((layer_count, SKETCH_DIM), np.float32)
        self._token_counts = [0] * layer_count

    def compare(
        self,
        layer_id: int,
        hidden: npt.NDArray[np.float32],
        places: npt.NDArray[np.int64],
        last: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.float32]:
        """Remember a step's states, the last ones, at `places`; [requests, positions] float32, scores of `last`."""
        spare = -hidden.shape[1] % SKETCH_DIM
        signed = np.pad(hidden * self._signs, ((0, 0), (0, spare))) if spare else hidden * self._signs
        folded = signed.reshape(len(hidden), -1, SKETCH_DIM).sum(axis=1)
        self._token_counts[layer_id] = seen = min(self._token_counts[layer_id] + len(folded), SKETCH_MEAN_TOKENS)
        mean = self._means[layer_id]
        mean += np.float32(min(1.0, len(folded) / seen)) * (folded.mean(axis=0) - mean)
        folded -= mean
        folded /= np.sqrt(np.maximum(np.einsum("td,td->t", folded, folded), LENGTH_MIN))[:, None]
        directions = self._directions[layer_id]
        directions[places] = folded[len(folded) - len(places) :]
        scores: npt.NDArray[np.float32] = folded[last] @ directions.T
        return np.float32(HIDDEN_SCORE) * scores


class Attention:
    """An associative memory of the latest positions, shared by all requests.

    Positions are compared with the current one by the experts that they used in the step's layers so far and by their
    hidden states there, where these are given (the nearer the layer, the more it counts), by the positions before them,
    by token, request and age. A softmax of these scores weighs what they used in the target layer; for the next step,
    what the positions right after them used.

    Memory: [layers, k, POSITION_COUNT] int64, five arrays of a number by position, and with hidden states
    [layers, POSITION_COUNT, SKETCH_DIM] float32. Prompts are remembered as well.
    Source: Ramsauer et al., "Hopfield Networks is All You Need" (2020), over routes instead of hidden states.
    Constants: recall and log loss of decode replays of DeepSeek-V2-Lite, Mixtral and mixtral-mini, 2026-11-22. One
    memory for all requests finds 61 % of DeepSeek's next experts, where one for each request finds 47 %. Hidden states
    raise mixtral-mini from 73 to 77 %.
    """

    def __init__(self, layer_count: int, expert_count: int, topk: int) -> None:
        self._base = BaseRate(layer_count, expert_count, topk)
        self._overlap_score = np.float32(OVERLAP_SCORE / topk)
        #: Expert ids by position, and each position's token and request (an ordinal), -1 before it is filled.
        self._expert_ids = np.zeros((layer_count, topk, POSITION_COUNT), np.int64)
        self._token_ids = np.full(POSITION_COUNT, -1, np.int64)
        self._owners = np.full(POSITION_COUNT, -1, np.int64)
        #: The position after it in its request, -1 if there is none yet. A successor is younger, so it is not
        #: overwritten before its predecessor is.
        self._successors = np.full(POSITION_COUNT, -1, np.int64)
        #: Requests' ordinals, and the running number of their latest position.
        self._owner_of: dict[str, int] = {}
        self._latest_of: dict[int, int] = {}
        self._owner_count = 0
        #: Positions ever written. Number n lies at n % POSITION_COUNT.
        self._position_count = 0
        ages = (-1 - np.arange(2 * POSITION_COUNT)) % POSITION_COUNT
        self._age_scores = (-AGE_POWER * np.log1p(ages)).astype(np.float32)
        #: Of hidden states, once there are any.
        self._sketches: Sketches | None = None
        self._layer_count = layer_count
        self._last = self._places = np.empty(0, np.int64)
        self._prior = self._scores = np.empty((0, POSITION_COUNT), np.float32)
        #: Whose scores these are.
        self._request_ids: tuple[str, ...] = ()
        self._nearest: dict[bool, list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]] = {}

    def begin(self, step: Step) -> None:
        self._last = last_token_of(step)
        owners = np.array([self._owner(request_id) for request_id in step.request_ids], np.int64)
        self._write(step, owners)
        self._prior = self._score_before(step.token_ids[self._last], owners)
        if step.request_ids == self._request_ids and len(step.rows) == len(owners):
            followed = np.flatnonzero(self._successors >= 0)
            self._prior[:, self._successors[followed]] += np.float32(CONTEXT_SHARE) * self._scores[:, followed]
        self._request_ids = step.request_ids
        self._scores = np.zeros_like(self._prior)
        self._nearest = {}

    def observe(self, seen: Observation) -> None:
        layer_id, expert_ids = seen.layer_id, seen.expert_ids
        self._base.observe(layer_id, expert_ids)
        remembered = self._expert_ids[layer_id]
        remembered[:, self._places] = expert_ids[len(expert_ids) - len(self._places) :].T
        own = np.zeros((len(self._last), self._base.values.shape[1]), np.float32)
        np.put_along_axis(own, expert_ids[self._last], self._overlap_score, axis=1)
        self._scores *= LAYER_DECAY
        self._scores += own.take(remembered, axis=1).sum(axis=1)
        if seen.hidden is not None:
            if self._sketches is None:
                self._sketches = Sketches(self._layer_count, seen.hidden.shape[1])
            self._scores += self._sketches.compare(layer_id, seen.hidden, self._places, self._last)
        self._nearest = {}

    def predict(self, target: Target) -> Probabilities | None:
        if target.is_next_step not in self._nearest:
            self._nearest[target.is_next_step] = self._find(target.is_next_step)
        remembered, base = self._expert_ids[target.layer_id], self._base.values[target.layer_id]
        found = self._nearest[target.is_next_step]
        if not any(len(places) for places, _ in found):
            return None
        prior = np.exp(PRIOR_SCORE * (NEXT_STEP_SHARPNESS if target.is_next_step else 1.0))
        probabilities = np.empty((len(found), len(base)), np.float32)
        for row, (places, weights) in enumerate(found):
            expert_ids = remembered[:, places]
            spread = np.broadcast_to(weights, expert_ids.shape).ravel()
            sums = np.bincount(expert_ids.ravel(), spread, minlength=len(base))
            probabilities[row] = (sums + prior * base) / (weights.sum() + prior)
        return probabilities

    def forget(self, request_id: str) -> None:
        owner = self._owner_of.pop(request_id, None)
        if owner is not None:
            self._latest_of.pop(owner, None)

    def _owner(self, request_id: str) -> int:
        owner = self._owner_of.get(request_id)
        if owner is None:
            owner = self._owner_of[request_id] = self._owner_count
            self._owner_count += 1
        return owner

    def _write(self, step: Step, owners: npt.NDArray[np.int64]) -> None:
        """Give the step's tokens, the last ones if there are too many, their places."""
        count = min(len(step.rows), POSITION_COUNT)
        rows = step.rows[len(step.rows) - count :]
        numbers = self._position_count + np.arange(count)
        self._position_count += count
        self._places = places = numbers % POSITION_COUNT
        self._token_ids[places] = step.token_ids[len(step.rows) - count :]
        self._owners[places] = owners[rows]
        self._successors[places] = -1
        is_first = np.ones(count, np.bool_)
        np.not_equal(rows[1:], rows[:-1], out=is_first[1:])
        follows = np.flatnonzero(~is_first)
        self._successors[places[follows - 1]] = places[follows]
        firsts = np.flatnonzero(is_first).tolist()
        for first, end in zip(firsts, [*firsts[1:], count], strict=True):
            owner = int(owners[rows[first]])
            latest = self._latest_of.get(owner)
            if latest is not None and latest >= self._position_count - POSITION_COUNT:
                self._successors[latest % POSITION_COUNT] = places[first]
            self._latest_of[owner] = int(numbers[end - 1])

    def _score_before(self, token_ids: npt.NDArray[np.int64], owners: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """[requests, positions] float32, what is known of their likeness before the first layer; -inf: do not look."""
        head = self._position_count % POSITION_COUNT
        ages = self._age_scores[POSITION_COUNT - head : 2 * POSITION_COUNT - head].copy()
        ages[self._places] = -np.inf
        ages[self._owners < 0] = -np.inf
        is_same_token = (self._token_ids == token_ids[:, None]) & (token_ids >= 0)[:, None]
        scores: npt.NDArray[np.float32] = ages + np.float32(TOKEN_SCORE) * is_same_token
        scores += np.float32(REQUEST_SCORE) * (self._owners == owners[:, None])
        return scores

    def _find(self, is_next_step: bool) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
        """By request: the places to read from, and their weights."""
        scores = self._scores + self._prior
        if is_next_step:
            scores[:, self._successors < 0] = -np.inf
        found = []
        for row in scores:
            places = np.flatnonzero(row > max(row.max() - SCORE_RANGE, np.finfo(np.float32).min))
            weights = np.exp(row[places] * np.float32(NEXT_STEP_SHARPNESS if is_next_step else 1.0))
            found.append((self._successors[places] if is_next_step else places, weights))
        return found
