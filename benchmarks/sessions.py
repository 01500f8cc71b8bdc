"""Requests that go through an engine step by step, and when each of their tokens came out."""

from __future__ import annotations

import itertools
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Large modules of Python's standard library: text of a kind that the trained models know, on every machine.
_TEXTS = ("argparse", "inspect", "tarfile", "turtle", "subprocess", "pickle", "socket", "locale", "doctest", "difflib")
_REQUEST_IDS = map(str, itertools.count())


def text_prompts(model: Path, count: int, length: int) -> list[list[int]]:
    """Token ids of `count` windows of text, in turn from different files: routing is learned for text only."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    prompts = []
    for index in range(count):
        window_id, text_id = divmod(index, len(_TEXTS))
        text = Path(sysconfig.get_path("stdlib"), f"{_TEXTS[text_id]}.py").read_text(encoding="utf-8")
        start = (window_id + 1) * length
        window: list[int] = tokenizer.encode(text, add_special_tokens=False).ids[start : start + length]
        assert len(window) == length, f"{_TEXTS[text_id]}.py is too short for window {window_id}"
        prompts.append(window)
    return prompts


@dataclass
class Request:
    """A request of a `Session`.

    Attributes:
        request_id: unique in this process.
        added_s: when it came in.
        token_ids: what was generated so far.
        times_s: when each of these tokens came out.
    """

    request_id: str
    added_s: float
    token_ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)

    @property
    def gaps_s(self) -> list[float]:
        """Times between consecutive tokens; the one at index i comes before token i + 1."""
        return [after - before for before, after in itertools.pairwise(self.times_s)]


class Session:
    """Requests that go through an engine step by step, greedily, so that every engine gets the same steps.

    Args:
        llm: an engine of `make_engine` that has nothing else to do.
    """

    def __init__(self, llm: Any) -> None:
        self._engine = llm.llm_engine
        self._requests: dict[str, Request] = {}

    def add(self, prompt: Sequence[int], new_count: int) -> Request:
        """A request for `new_count` tokens after a prompt; it gets its first in a step to come."""
        from vllm import SamplingParams

        request = Request(next(_REQUEST_IDS), time.perf_counter())
        self._requests[request.request_id] = request
        parameters = SamplingParams(temperature=0, max_tokens=new_count, ignore_eos=True)
        self._engine.add_request(request.request_id, {"prompt_token_ids": list(prompt)}, parameters)
        return request

    def step(self) -> None:
        """One forward, and its tokens to their requests."""
        assert self._engine.has_unfinished_requests()
        outputs = self._engine.step()
        now_s = time.perf_counter()
        for output in outputs:
            request = self._requests[output.request_id]
            new = output.outputs[0].token_ids[len(request.token_ids) :]
            request.token_ids += new
            request.times_s += [now_s] * len(new)

    def abort(self) -> None:
        """End all requests."""
        self._engine.abort_request(list(self._requests))
        while self._engine.has_unfinished_requests():
            self._engine.step()
