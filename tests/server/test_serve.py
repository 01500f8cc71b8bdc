"""`vllm serve MODEL --moe-offload cxl`: the OpenAI API, /metrics, load, cancelled requests, a clean end."""

from __future__ import annotations

import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor

from openai import OpenAI

from tests.engine.harness import generate_in_own_process
from tests.server.conftest import FIXTURE_MODEL, Server, counter_folders, start, stop

_SCENARIO_PROMPTS = ("The quick brown fox", "def main(argv):\n    ", "#include <stdio.h>\n", "a")


def _client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none")


def _complete(server: Server, prompt: str, max_tokens: int = 20) -> list[int]:
    answer = _client(server).completions.create(
        model="tiny",
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    return list(answer.choices[0].token_ids)


def _metrics(server: Server) -> dict[str, float]:
    with urllib.request.urlopen(f"{server.url}/metrics") as response:
        lines = response.read().decode().splitlines()
    rows = (line.rsplit(" ", 1) for line in lines if line.startswith("vllm:moe_offload_"))
    return {name.removeprefix("vllm:moe_offload_"): float(value) for name, value in rows}


def test_the_byte_account_is_printed_before_the_weights_are_loaded(offloading_server: Server) -> None:
    log = offloading_server.log
    assert "byte account" in log
    assert log.index("byte account") < log.index("Loading safetensors checkpoint shards")
    for line in ("experts             48 in 6 layers, 9.00 MiB", "slots               24 (50% of the experts)"):
        assert line in log


def test_answers_are_those_of_a_resident_engine(offloading_server: Server) -> None:
    resident = generate_in_own_process(model=str(FIXTURE_MODEL))["steady decodes"]
    assert [_complete(offloading_server, prompt) for prompt in _SCENARIO_PROMPTS] == [list(ids) for ids, _ in resident]


def test_metrics_show_the_cache_on_every_api_server(offloading_server: Server) -> None:
    before = _metrics(offloading_server)
    _complete(offloading_server, "Package: libc6\n")
    after = [_metrics(offloading_server) for _ in range(6)]  # the kernel deals connections out to both
    for scrape in after:
        del scrape["sidecar_cpu_seconds_total"]  # it lives on between scrapes
    assert all(scrape == after[0] for scrape in after)
    hits, misses = 'lookups_total{outcome="hit"}', 'lookups_total{outcome="miss"}'
    assert after[0][hits] + after[0][misses] > before[hits] + before[misses]
    assert after[0]['slots{state="resident"}'] == 24
    slab_bytes = 3 * 128 * 256 * 2
    fetched_bytes = {cause: f'fetch_bytes_total{{bank="dram",cause="{cause}"}}' for cause in ("demand", "prefetch")}
    assert all(after[0][name] % slab_bytes == 0 for name in fetched_bytes.values())
    assert after[0][fetched_bytes["demand"]] > before[fetched_bytes["demand"]] > 0
    assert after[0]["stall_seconds_total"] > before["stall_seconds_total"]


def test_metrics_show_what_is_copied_beside_the_forward(offloading_server: Server) -> None:
    _complete(offloading_server, "Package: libc6\n" * 8)  # a prefill that needs nearly all experts of each layer
    metrics = _metrics(offloading_server)
    assert metrics["sidecar_up"] == 1 and metrics["sidecar_cpu_seconds_total"] > 0
    assert metrics['link_busy_seconds_total{bank="dram"}'] > 0
    outcomes = {outcome: metrics[f'prefetch_total{{outcome="{outcome}"}}'] for outcome in ("useful", "late", "wasted")}
    assert outcomes["useful"] + outcomes["late"] > 0, "a long prefill has the next layer's experts brought ahead"


def test_load_with_cancelled_requests_leaves_it_exact(offloading_server: Server) -> None:
    expected = {prompt: _complete(offloading_server, prompt) for prompt in _SCENARIO_PROMPTS}
    started = threading.Semaphore(0)

    def cancel_midway(prompt: str) -> None:
        stream = _client(offloading_server).completions.create(
            model="tiny", prompt=prompt, max_tokens=300, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        started.release()
        stream.close()

    with ThreadPoolExecutor(12) as pool:
        cancelled = [pool.submit(cancel_midway, prompt) for prompt in _SCENARIO_PROMPTS[:2]]
        for _ in cancelled:
            started.acquire(timeout=120)
        prompts = _SCENARIO_PROMPTS * 4
        answers = list(pool.map(lambda prompt: _complete(offloading_server, prompt), prompts))
        for request in cancelled:
            request.result()
    assert answers == [expected[prompt] for prompt in prompts]
    metrics = _metrics(offloading_server)
    assert metrics["sidecar_up"] == 1 and metrics['bank_up{bank="dram"}'] == 1
    assert metrics['slots{state="filling"}'] == 0, "what only they wanted is not on its way any more"
    with urllib.request.urlopen(f"{offloading_server.url}/health") as response:
        assert response.status == 200


def test_off_leaves_nothing_of_us_in_the_server() -> None:
    process, server = start("--moe-offload", "off")
    try:
        assert _metrics(server) == {}
        assert "MoE offload" not in server.log
        assert not server.counter_folders
    finally:
        stop(process)


def test_a_server_that_ends_takes_its_counters_with_it() -> None:
    process, server = start("--moe-offload", "cxl")
    assert server.counter_folders
    stop(process)
    assert not server.counter_folders & counter_folders()
