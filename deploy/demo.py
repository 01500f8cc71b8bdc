"""The demo: a trained MoE answers over the OpenAI API from an engine that holds half of its experts in slots.

The same prompts go to an engine that holds all of them; the tokens have to be the same.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openai import OpenAI

_MODEL = Path(__file__).parent.parent / "tests" / "fixtures" / "mixtral-tiny"
_PROMPTS = ("The package manager", "def read_file(path):\n", "#include <")
_START_TIMEOUT_S = 300.0


def main() -> int:
    """Run both engines, one after the other; 0 if they said the same."""
    # Homes and slots are both DRAM here: left to itself the CPU engine would read the homes in place and need no slots.
    offload = ["--moe-offload", "cxl", "--moe-offload-config", '{"slots": "50%", "in_place": "never"}']
    print(f"$ vllm serve {_MODEL.name} {' '.join(offload)}")
    with _serve(offload) as url:
        offloaded = [_complete(url, prompt) for prompt in _PROMPTS]
        metrics = _metrics(url)
    for prompt, (text, _) in zip(_PROMPTS, offloaded, strict=True):
        print(f"\n> {prompt!r}\n{text!r}")
    _print_cache(metrics)

    print("\n$ vllm serve " + _MODEL.name + "   # all experts resident, for comparison")
    with _serve([]) as url:
        resident = [_complete(url, prompt) for prompt in _PROMPTS]
    equal = sum(mine == theirs for mine, theirs in zip(offloaded, resident, strict=True))
    print(f"\nsame tokens as the resident engine: {equal} of {len(_PROMPTS)} requests")
    return 0 if equal == len(_PROMPTS) else 1


@contextmanager
def _serve(options: list[str]) -> Iterator[str]:
    """A vLLM server on a free port; its log is shown if it does not come up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(str(Path(sys.executable).with_name("vllm")), "serve", str(_MODEL)),
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", "demo"),
        *("--enforce-eager", "--kv-cache-memory-bytes", "64M", "--max-model-len", "512"),
        *options,
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert server.stdout is not None
    log: list[str] = []
    try:
        started = time.monotonic()
        for line in server.stdout:
            log.append(line)
            if "MoE offload" in line:
                print("  " + re.sub(r"^.*?\] ", "", line.rstrip()))
            if "Application startup complete" in line:
                break
            if time.monotonic() - started > _START_TIMEOUT_S:
                raise TimeoutError(f"the server was not ready after {_START_TIMEOUT_S:.0f} s:\n{''.join(log[-30:])}")
        else:
            raise RuntimeError(f"the server ended with {server.wait()}:\n{''.join(log[-30:])}")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        # The pipe has to be drained, or a last burst of log lines would keep the server from ending.
        server.communicate(timeout=60)


def _complete(url: str, prompt: str) -> tuple[str, list[int]]:
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    answer = client.completions.create(
        model="demo", prompt=prompt, max_tokens=32, temperature=0, extra_body={"return_token_ids": True}
    )
    choice = answer.choices[0]
    return choice.text, choice.token_ids  # type: ignore[attr-defined]


def _metrics(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/metrics") as response:
        lines = response.read().decode().splitlines()
    rows = (line.rsplit(" ", 1) for line in lines if line.startswith("vllm:moe_offload_"))
    return {name.removeprefix("vllm:moe_offload_"): float(value) for name, value in rows}


def _print_cache(metrics: dict[str, float]) -> None:
    hits, misses = metrics['lookups_total{outcome="hit"}'], metrics['lookups_total{outcome="miss"}']
    fetched = metrics['fetch_bytes_total{bank="dram",cause="demand"}']
    slots = metrics['slots{state="resident"}']
    print("\nthe cache at work (from /metrics)")
    for name, value in (
        ("expert look-ups", f"{hits + misses:.0f}"),
        ("hit rate", f"{100 * hits / (hits + misses):.1f} %"),
        ("fetched from DRAM", f"{fetched / 2**20:.1f} MiB"),
        ("waited for fetches", f"{1e3 * metrics['stall_seconds_total']:.1f} ms"),
        ("slots in use", f"{slots:.0f}"),
    ):
        print(f"  {name:<20}{value:>12}")


if __name__ == "__main__":
    sys.exit(main())
