"""Run a real vLLM engine over fixed requests, with or without offloading, and keep every token and logprob.

Run as a script it takes a JSON object of engine arguments and prints one of outputs, for engines that need a process of
their own: `python -m tests.engine.harness '{"model": ..., ...}'`. A file to write to instead and a JSON list of
scenarios may follow.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vllm_moecxl  # noqa: F401  makes LLM(moe_offload=...) known

#: One request's tokens, and for each the logprobs of the likeliest as (token, logprob) pairs.
Output = tuple[tuple[int, ...], tuple[tuple[tuple[int, float], ...], ...]]

_SENTENCE = "The kernel keeps a list of pages, and the allocator takes the first that fits. "


@dataclass(frozen=True)
class Scenario:
    """Requests that run together in one batch."""

    name: str
    prompts: tuple[str, ...]
    max_tokens: int
    temperature: float = 0.0


SCENARIOS = (
    Scenario("one token", ("def",), 1),
    Scenario("steady decodes", ("The quick brown fox", "def main(argv):\n    ", "#include <stdio.h>\n", "a"), 20),
    # Longer than a step's token budget: chunks of the prompt run beside the decodes of the short ones.
    Scenario("long prefill among decodes", (_SENTENCE * 12, "static int", "import os\n", "Copyright (C)"), 16),
    Scenario("seeded sampling", ("Once upon", "for i in range("), 20, temperature=0.9),
    Scenario("cached prefix", (_SENTENCE * 12 + "Then", _SENTENCE * 12 + "But"), 8),
)

ENGINE = {
    "enforce_eager": True,
    "kv_cache_memory_bytes": 64 << 20,
    "max_model_len": 512,
    "max_num_batched_tokens": 96,
    "max_num_seqs": 8,
    "disable_log_stats": False,
}


def generate(scenarios: tuple[Scenario, ...] = SCENARIOS, **engine: Any) -> dict[str, list[Output]]:
    """Outputs of each scenario, in order, from one engine that is made for this and then dropped."""
    return generate_with_metrics(scenarios, **engine)[0]


def generate_with_metrics(
    scenarios: tuple[Scenario, ...] = SCENARIOS, prepare: Callable[[Any], None] | None = None, **engine: Any
) -> tuple[dict[str, list[Output]], dict[str, float]]:
    """The same, and our metrics of this engine; none if it does not offload.

    Args:
        prepare: is given the `LLM` before the first request, in an engine of this process.
    """
    from vllm import LLM

    if "moe_offload" in engine:
        # From DRAM, which slots are made of too, no layer would use a slot: the cache is what most tests are about.
        engine["moe_offload_config"] = {"in_place": "never", **engine.get("moe_offload_config", {})}
    llm = LLM(**{**ENGINE, **engine})
    try:
        if prepare is not None:
            prepare(llm)
        outputs = {scenario.name: _run(llm, scenario) for scenario in scenarios}
        metrics = read_metrics(llm) if "moe_offload" in engine else {}
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
    return outputs, metrics


def read_metrics(llm: Any) -> dict[str, float]:
    """Our metrics of an engine's first worker now: "name{label values}" -> value."""
    return {
        f"{name.removeprefix('vllm:moe_offload_')}{{{','.join(labels.values())}}}": value
        for name, labels, value in llm.collective_rpc("moe_offload_stats")[0]
    }


def at_step(number: int, act: Callable[[Any], None]) -> Callable[[Any], None]:
    """For `generate_with_metrics`: has `act` done with the `LLM` between its steps, before the one of this number."""

    def prepare(llm: Any) -> None:
        step, left = llm.llm_engine.step, iter(range(number, 0, -1))

        def counting() -> Any:
            if next(left, 0) == 1:
                act(llm)
            return step()

        llm.llm_engine.step = counting

    return prepare


def pack_model(model: str, target: Path, **engine: Any) -> Path:
    """Pack a model's experts in this process, with engine arguments of simple types."""
    from vllm_moecxl.integration.packing import pack

    arguments = [
        f"--{name.replace('_', '-')}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in engine.items()
    ]
    (path, _) = pack(model, target, arguments, replace=False)[0]
    gc.collect()
    return Path(path)


def _run(llm: Any, scenario: Scenario) -> list[Output]:
    from vllm import SamplingParams

    parameters = SamplingParams(
        temperature=scenario.temperature, max_tokens=scenario.max_tokens, seed=7, logprobs=3, ignore_eos=True
    )
    results = llm.generate(list(scenario.prompts), parameters, use_tqdm=False)
    return [
        (
            tuple(result.outputs[0].token_ids),
            tuple(
                tuple((token, entry.logprob) for token, entry in step.items()) for step in result.outputs[0].logprobs
            ),
        )
        for result in results
    ]


def generate_in_own_process(environment: dict[str, str] | None = None, **engine: Any) -> dict[str, list[Output]]:
    """Like `generate` over all scenarios, for engines that cannot share a process with others."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.engine.harness", json.dumps(engine)],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    outputs = json.loads(run.stdout.splitlines()[-1])
    return {
        name: [(tuple(tokens), tuple(tuple((t, p) for t, p in step) for step in steps)) for tokens, steps in results]
        for name, results in outputs.items()
    }


if __name__ == "__main__":
    chosen = tuple(Scenario(**one) for one in json.loads(sys.argv[3])) if len(sys.argv) > 3 else SCENARIOS
    results_of_all = json.dumps(generate(chosen, **json.loads(sys.argv[1])))
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(results_of_all)
    else:
        print(results_of_all)
