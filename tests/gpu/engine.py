"""One engine in a process of its own: `python -m tests.gpu.engine JSON FILE` writes what it said, and who looked up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.gpu import ENGINE_ENVIRONMENT

_ENVIRONMENT = {
    **ENGINE_ENVIRONMENT,
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # FlashInfer compiles its sampler at the first use, with a compiler that need not be there.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
_ERROR_CHARACTERS = 4000


@dataclass(frozen=True)
class Answers:
    """What an engine said.

    Attributes:
        outputs: by scenario, of each request its tokens and logprobs, as in `tests.engine.harness`.
        metrics: ours; of resident vLLM none.
        lookup, graphs: who looked experts up, and vLLM's mode of CUDA graphs in the end; empty without offloading.
    """

    outputs: dict[str, Any]
    metrics: dict[str, float]
    lookup: str
    graphs: str


def ask(file: Path, **engine: Any) -> Answers:
    """Run all scenarios of `tests.engine.harness` on an engine with these arguments.

    Args:
        file: written.
    """
    command = [sys.executable, "-m", "tests.gpu.engine", json.dumps(engine), str(file)]
    environment = {**os.environ, **_ENVIRONMENT}
    run = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-_ERROR_CHARACTERS:]
    return Answers(**json.loads(file.read_text()))


def _main() -> None:
    from tests.engine.harness import generate_with_metrics

    engine = json.loads(sys.argv[1])
    plan = {"lookup": "", "graphs": ""}

    def note_plan(llm: Any) -> None:
        from vllm_moecxl.integration.graphs import plan_of

        if "moe_offload" in engine:
            found = plan_of(llm.llm_engine.vllm_config)
            plan.update(lookup=found.lookup, graphs=found.mode.name)

    outputs, metrics = generate_with_metrics(prepare=note_plan, **engine)
    Path(sys.argv[2]).write_text(json.dumps({"outputs": outputs, "metrics": metrics, **plan}))


if __name__ == "__main__":
    _main()
