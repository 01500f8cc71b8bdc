"""How fast the simulator is: layer-steps of a trace with 256 experts, top-8, with prefetch, all included."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.common import Result, print_table, save
from vllm_moecxl.config import OffloadConfig
from vllm_moecxl.control.prediction import DEFAULT_PREDICTORS, PREDICTORS
from vllm_moecxl.control.simulator import machine, model
from vllm_moecxl.control.simulator.report import simulate
from vllm_moecxl.control.simulator.simulator import Options, Simulator
from vllm_moecxl.control.trace import RoutingTrace

#: What is promised: so many layer-steps in so many seconds.
_LAYER_STEP_COUNT, _SECONDS_MAX = 100_000, 30.0
_EXPERT_COUNT, _TOPK = 256, 8
_VOCABULARY_SIZE = 200
_NOISE = 0.7
_SEED = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    parser.add_argument("--layer-steps", type=int, default=_LAYER_STEP_COUNT, metavar="N", help="how many to simulate")


def run(args: argparse.Namespace) -> Result:
    """Simulate without prefetch, with it, and with it kept on whatever it gains."""
    shape = model.load("deepseek-v3")
    # A launch-bound device: it leaves the links time to bring something ahead.
    hardware = machine.load("h100-80gb")
    hardware = replace(hardware, device=replace(hardware.device, layer_s=2e-3))
    trace = _trace(args.layer_steps // shape.layer_count, shape.layer_count)
    rows: list[dict[str, Any]] = []
    for name, names in (("off", ()), ("auto", DEFAULT_PREDICTORS), ("always", DEFAULT_PREDICTORS)):
        predictors = {one: PREDICTORS[one](shape.layer_count, _EXPERT_COUNT, _TOPK) for one in names}
        options = Options(_EXPERT_COUNT // 2, OffloadConfig().eviction, predictors)
        started_s, started_cpu_s = time.perf_counter(), time.process_time()
        simulator = Simulator(trace, shape, hardware, options)
        if name == "always":  # not given up where it makes steps no faster, as in this trace
            assert simulator.prefetching is not None
            simulator.prefetching.trial.pin()
        found = simulate(simulator)
        elapsed_s, cpu_s = time.perf_counter() - started_s, time.process_time() - started_cpu_s
        layer_step_count = found["steps"] * shape.layer_count
        rows.append(
            {
                "prefetch": name,
                "layer_steps": layer_step_count,
                "elapsed_s": elapsed_s,
                "cpu_s": cpu_s,
                "s_per_100k": elapsed_s / layer_step_count * _LAYER_STEP_COUNT,
                "hit_rate": found["hit_rate"],
                "fetch_count": found["pending"] + found["misses"] + found["prefetch"]["useful"],
                "prefetched": found["prefetch"]["issued"],
            }
        )
    print_table(list(rows[0]), [list(row.values()) for row in rows])
    values = {"rows": rows, "seconds": rows[-1]["s_per_100k"], "seconds_max": _SECONDS_MAX}
    return save("simulator_speed", "simulated", values)


def _trace(token_count: int, layer_count: int) -> RoutingTrace:
    """Routing for the clock's sake: tokens choose, with some noise, to have something to predict."""
    generator = np.random.default_rng(_SEED)
    token_ids = np.minimum(generator.zipf(1.3, token_count), _VOCABULARY_SIZE) - 1
    liking = generator.gumbel(size=(_VOCABULARY_SIZE, layer_count, _EXPERT_COUNT))
    topk = np.empty((token_count, layer_count, _TOPK), dtype=np.uint8)
    for token, token_id in enumerate(token_ids.tolist()):
        noise = _NOISE * generator.gumbel(size=(layer_count, _EXPERT_COUNT))
        topk[token] = np.argpartition(-(liking[token_id] + noise), _TOPK, axis=1)[:, :_TOPK]
    starts = np.arange(0, token_count, 100)
    return RoutingTrace(
        topk=topk,
        weights=None,
        lookahead=None,
        req=np.append(starts, token_count),
        prefill=np.zeros(len(starts), dtype=np.int32),
        token_ids=token_ids,
        layer_ids=np.arange(layer_count),
        meta={"model": "synthetic", "num_experts": _EXPERT_COUNT},
    )
