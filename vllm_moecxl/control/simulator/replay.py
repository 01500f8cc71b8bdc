"""A trace as a server meets it: so many requests side by side, each its prompt at once and then token by token.

Prompts are not cut into chunks, and one that begins shares its forward with the tokens of the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vllm_moecxl.control.prediction.base import Step
from vllm_moecxl.control.trace import RoutingTrace


@dataclass
class Request:
    """One request on its way.

    Attributes:
        number: in the trace.
        start, stop: its tokens in the trace.
        prompt_count: those of the prompt, which one forward computes; 0 where only decode was recorded.
        position: its next token in the trace.
        begun_s: when its first forward began.
        token_s: when each of its output tokens was there.
    """

    number: int
    start: int
    stop: int
    prompt_count: int
    position: int
    begun_s: float = 0.0
    token_s: list[float] = field(default_factory=list)

    @property
    def id(self) -> str:
        """Its name."""
        return f"request {self.number}"

    @property
    def next_count(self) -> int:
        """Tokens of its next forward."""
        return self.prompt_count if self.position == self.start and self.prompt_count else 1


@dataclass(frozen=True)
class Batch:
    """One forward.

    Attributes:
        requests: that take part.
        tokens: [tokens] rows of the trace.
        step: what predictors are told.
    """

    requests: tuple[Request, ...]
    tokens: npt.NDArray[np.int64]
    step: Step


class Replay:
    """Makes the batches.

    Args:
        trace: the requests, in order.
        batch_size: requests side by side. The next one starts when one has ended.

    Attributes:
        ended: requests that were served to their end.
        cancelled: numbers of those that were not.
    """

    def __init__(self, trace: RoutingTrace, batch_size: int) -> None:
        assert batch_size >= 1
        self._trace = trace
        self._batch_size = batch_size
        self._waiting = deque(
            Request(number, tokens.start, tokens.stop, int(trace.prefill[number]), tokens.start)
            for number, tokens in trace.requests()
            if tokens.stop > tokens.start
        )
        self._running: list[Request] = []
        self.ended: list[Request] = []
        self.cancelled: set[int] = set()

    def cancel(self, number: int) -> str | None:
        """End a request now, or never begin it; its name, or None where it has ended."""
        for queue in (self._running, self._waiting):
            for request in queue:
                if request.number == number:
                    queue.remove(request)
                    self.cancelled.add(number)
                    return request.id
        return None

    def batches(self, before_each: Callable[[], None] = lambda: None) -> Iterator[Batch]:
        """One after another; `finish` each before the next one is taken.

        Args:
            before_each: called between them: requests may be cancelled then.
        """
        while True:
            before_each()
            while self._waiting and len(self._running) < self._batch_size:
                self._running.append(self._waiting.popleft())
            if not self._running:
                return
            yield self._batch()

    def finish(self, batch: Batch, begun_s: float, now_s: float) -> list[Request]:
        """A batch has been computed; the requests that have ended with it."""
        ended = []
        for request in batch.requests:
            if request.position == request.start:
                request.begun_s = begun_s
            request.position += request.next_count
            request.token_s.append(now_s)
            if request.position == request.stop:
                ended.append(request)
                self._running.remove(request)
        self.ended += ended
        return ended

    def _batch(self) -> Batch:
        requests = tuple(self._running)
        counts = [request.next_count for request in requests]
        tokens = np.concatenate(
            [
                np.arange(request.position, request.position + count)
                for request, count in zip(requests, counts, strict=True)
            ]
        )
        step = Step(
            request_ids=tuple(request.id for request in requests),
            rows=np.repeat(np.arange(len(requests)), counts),
            token_ids=self._trace.token_ids[tokens].astype(np.int64),
            is_prompt=np.array([r.position == r.start and r.prompt_count > 0 for r in requests]),
        )
        return Batch(requests, tokens, step)
