"""The work that every engine gets, and the one clock that measures it.

An engine is a function that generates one token after the other; the first comes out of the prefill. Speeds are tokens
after the first per second between them (decode alone), and all tokens per second with the prefill.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import page_cache
from benchmarks.common import Result

#: (prompt, tokens to generate) -> tokens, greedily and regardless of any end of text.
Generate = Callable[[list[int], int], Iterator[int]]


@dataclass(frozen=True)
class Work:
    """What is generated, one sequence at a time.

    Attributes:
        warmup_prompts, prompts: token ids; the former are generated before the clock starts and fill what is filled.
        new_count: tokens to generate after each prompt.
        seconds_max: no prompt is begun after this, and none goes on for longer than this.
        files: what the engine reads its weights from, to see how much of it the page cache holds in the end.
    """

    warmup_prompts: list[list[int]]
    prompts: list[list[int]]
    new_count: int
    seconds_max: float
    files: list[str]

    def to_json(self) -> str:
        """For the command line of an engine's process."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Work:
        """The inverse."""
        return Work(**json.loads(text))


def measure(generate: Generate, work: Work) -> Result:
    """Do the work and return its speeds and what it read from disk."""
    for prompt in work.warmup_prompts:
        for _ in _until(generate(prompt, work.new_count), time.perf_counter() + work.seconds_max):
            pass
    decode_s, prefill_s, decode_count = 0.0, 0.0, 0
    outputs: list[list[int]] = []
    read_before = _read_bytes()
    started = time.perf_counter()
    per_prompt = []
    for prompt in work.prompts:
        if outputs and time.perf_counter() - started > work.seconds_max:
            break
        tokens, times = [], [time.perf_counter()]
        for token in _until(generate(prompt, work.new_count), times[0] + work.seconds_max):
            times.append(time.perf_counter())
            tokens.append(token)
        outputs.append(tokens)
        prefill_s += times[1] - times[0]
        decode_s += times[-1] - times[1]
        decode_count += len(tokens) - 1
        per_prompt.append(round((len(tokens) - 1) / (times[-1] - times[1]), 2))
    token_count = sum(map(len, outputs))
    return {
        "tokens_per_s": round(decode_count / decode_s, 3),
        "tokens_per_s_with_prefill": round(token_count / (decode_s + prefill_s), 3),
        "tokens_per_s_by_prompt": per_prompt,
        "token_count": token_count,
        "prompt_count": len(outputs),
        "seconds": round(decode_s + prefill_s, 2),
        "read_bytes": _read_bytes() - read_before,
        "cached_bytes": page_cache.cached_bytes(map(Path, work.files)),
        "outputs": outputs,
    }


def main(make: Callable[..., tuple[Generate, Callable[[], Result]]]) -> None:
    """The process of an engine: `WORK OUT ARGUMENTS`, the first and the last JSON.

    Args:
        make: called with the arguments as keywords; returns what generates, and what to call afterwards for figures of
            the engine's own.
    """
    work, out, arguments = sys.argv[1:]
    started = time.perf_counter()
    generate, figures = make(**json.loads(arguments))
    result = {"start_s": round(time.perf_counter() - started, 2), **measure(generate, Work.from_json(work))}
    Path(out).write_text(json.dumps({**result, **figures()}))


def _until(tokens: Iterator[int], deadline: float) -> Iterator[int]:
    """At least two tokens, so that there is a time between them, and then those before the deadline."""
    with closing(tokens) as generator:  # type: ignore[type-var]
        for count in itertools.count(1):
            token = next(generator, None)
            if token is None:
                return
            yield token
            if count >= 2 and time.perf_counter() > deadline:
                return


def _read_bytes() -> int:
    """Bytes that this process made the disk read, page faults included."""
    rows: dict[str, Any] = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(rows["read_bytes"])
