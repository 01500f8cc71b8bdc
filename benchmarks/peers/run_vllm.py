"""vLLM's CPU engine in this process, plain or with our offload."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import Result
from benchmarks.engines import make_engine
from benchmarks.peers.work import Generate, main

_BATCHED_TOKENS = 64
_SEQUENCES = 2


def make(model: str, max_model_len: int, moe_offload: dict[str, Any] | None) -> tuple[Generate, Callable[[], Result]]:
    """The engine for a checkpoint, with the options of our offload if it is to offload."""
    from vllm import SamplingParams

    offload = {} if moe_offload is None else {"additional_config": {"moe_offload": moe_offload}}
    # One sequence at a time: room for wide batches would be memory that nobody uses.
    llm = make_engine(
        Path(model),
        slots=None,
        max_model_len=max_model_len,
        max_num_batched_tokens=_BATCHED_TOKENS,
        max_num_seqs=_SEQUENCES,
        **offload,
    )
    engine = llm.llm_engine
    request_ids = map(str, itertools.count())

    def generate(prompt: list[int], count: int) -> Iterator[int]:
        request_id = next(request_ids)
        parameters = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        engine.add_request(request_id, {"prompt_token_ids": prompt}, parameters)
        seen_count = 0
        try:
            while engine.has_unfinished_requests():
                for output in engine.step():
                    token_ids = output.outputs[0].token_ids
                    yield from token_ids[seen_count:]
                    seen_count = len(token_ids)
        finally:
            engine.abort_request([request_id])

    def figures() -> Result:
        if moe_offload is None:
            return {}
        rows = llm.collective_rpc("moe_offload_stats")[0]
        lookups = {labels["outcome"]: value for name, labels, value in rows if name.endswith("lookups_total")}
        return {"lookups": lookups, "hit_rate": round(lookups["hit"] / sum(lookups.values()), 4)}

    return generate, figures


if __name__ == "__main__":
    main(make)
