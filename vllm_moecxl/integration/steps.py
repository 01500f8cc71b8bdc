"""What is in a forward: which requests, which of their tokens, read from vLLM's model runner."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from vllm_moecxl.control.prediction.base import Step
from vllm_moecxl.runtime.ring import Begun


def describe_early(runner: Any, scheduled: Any) -> Begun | None:
    """The forward that is about to begin, if it is like the last one but for its tokens; None otherwise.

    The runner has not looked at `scheduled` yet. While requests neither come nor go it will leave their order alone,
    and the tokens that were sampled last are in its tables: so much is known before anything is computed.
    """
    if scheduled.finished_req_ids or scheduled.scheduled_new_reqs or scheduled.scheduled_spec_decode_tokens:
        return None
    cached = scheduled.scheduled_cached_reqs
    batch = getattr(runner, "input_batch", None)
    request_ids = getattr(batch, "req_ids", None)
    if not cached.req_ids or request_ids is None or cached.resumed_req_ids or len(request_ids) != len(cached.req_ids):
        return None
    counts = scheduled.num_scheduled_tokens
    if any(counts.get(request_id) != 1 for request_id in request_ids):
        return None
    computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    starts = np.array([computed[request_id] for request_id in request_ids], dtype=np.int64)
    return _decodes(batch, tuple(request_ids), starts)


def describe(runner: Any, scheduled: Any) -> Begun | None:
    """The forward that is running; None where the runner does not show it."""
    counts = scheduled.num_scheduled_tokens
    batch = getattr(runner, "input_batch", None)
    request_ids = getattr(batch, "req_ids", None)
    if batch is None or not request_ids or len(request_ids) != len(counts):
        return _only_request(counts)
    request_count = len(request_ids)
    lengths = np.array([counts[request_id] for request_id in request_ids], dtype=np.int64)
    starts = batch.num_computed_tokens_cpu[:request_count].astype(np.int64)
    if lengths.max() == 1:
        return _decodes(batch, tuple(request_ids), starts)
    rows = np.repeat(np.arange(request_count), lengths)
    columns = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths) + np.repeat(starts, lengths)
    step = Step(
        request_ids=tuple(request_ids),
        rows=rows,
        token_ids=batch.token_ids_cpu[rows, columns].astype(np.int64),
        is_prompt=starts < batch.num_prompt_tokens[:request_count],
    )
    return Begun(step, starts, time.perf_counter())


def _decodes(batch: Any, request_ids: tuple[str, ...], starts: np.ndarray[Any, np.dtype[np.int64]]) -> Begun:
    """One token of each request. With asynchronous scheduling the table has -1 where the device alone knows it."""
    rows = np.arange(len(request_ids))
    step = Step(
        request_ids=request_ids,
        rows=rows,
        token_ids=batch.token_ids_cpu[rows, starts].astype(np.int64),
        is_prompt=starts < batch.num_prompt_tokens[: len(request_ids)],
    )
    return Begun(step, starts, time.perf_counter())


def _only_request(counts: dict[str, int]) -> Begun | None:
    """A runner that does not show its order: with a single request there is none. Its tokens stay unknown."""
    if len(counts) != 1:
        return None
    [(request_id, count)] = counts.items()
    step = Step((request_id,), np.zeros(count, np.int64), np.full(count, -1, np.int64), np.array([count > 1]))
    return Begun(step, None, time.perf_counter())
