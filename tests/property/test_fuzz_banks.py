"""10^5 slab files and bank specs that nobody wrote on purpose: an error of ours each, and never more than that.

The seeds are fixed and printed; ``MOECXL_FUZZ_SEED`` sets another one, and a case that fails says how to replay it.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from vllm_moecxl.config import BANK_KINDS, BankSpec, OffloadConfig, SlotSpec
from vllm_moecxl.control.device_model import PRESETS, DeviceSpec
from vllm_moecxl.errors import ConfigError
from vllm_moecxl.units import format_bytes

ROOT = Path(__file__).parents[2]
FILE_COUNT = 35_000
SPEC_COUNT = 65_000

_GOOD = (
    *("dram", "dram=64GiB", "numa:1", "numa:0=256GiB", "dax:/dev/dax0.0", "dax:/dev/dax1.0=1TiB", "file:/nvme/a.slabs"),
    *("emulated:cxl-d", "emulated:300ns,2GB/s", "emulated:1us,2GB/s,500MB/s=3GiB", "auto", "25%", "16", "24GiB"),
)
_PIECES = (
    *("", ":", "=", ",", "/", "/s", "%", ".", "-", "+", " ", "\t", "\n", "\0", "\ud800", "٣", "1", "0", "9" * 20),
    *("9" * 5000, "1e9", "nan", "inf", "GiB", "XB", "ns", "us", "s", "B/s", "GB/s", "numa", "dram", "Ⅳ", "²", "0x1f"),
)
_ODD = (None, True, False, 0, 1, -1, 8, 1 << 70, 0.5, float("nan"), float("inf"), [], {}, [[]], (), b"dram", object())


def seed() -> str:
    chosen = os.environ.get("MOECXL_FUZZ_SEED", "2026")
    print(f"MOECXL_FUZZ_SEED={chosen}")
    return chosen


def mutated_text(rng: random.Random) -> str:
    text = rng.choice([*_GOOD, *PRESETS, *(f"{kind}:" for kind in BANK_KINDS)])
    for _ in range(rng.randint(0, 3)):
        start, stop = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
        piece = rng.choice([*_PIECES, text[start:stop], chr(rng.randrange(1, 0x2FF))])
        text = rng.choice([text[:start] + piece + text[start:], text[:start] + piece + text[stop:], text + piece])
    return text


def mutated_options(rng: random.Random) -> dict[Any, Any]:
    values = [mutated_text(rng), mutated_text(rng), rng.choice(_ODD)]
    options: dict[Any, Any] = {"mode": rng.choice(["cxl", "cxl", "cxl", "off", *values])}
    names = (
        *("slots", "banks", "stripe", "verify", "placement_trace", "pack_to", "eviction", "passes", "layer_buffer"),
        *("strict_placement", "in_place", "sidecar"),
    )
    for name in rng.sample(names, rng.randint(0, 3)):
        good = {"stripe": "all", "verify": "fetch", "eviction": "lru", "passes": "fast", "layer_buffer": True}
        good |= {"strict_placement": True, "in_place": "always", "sidecar": False}
        options[name] = rng.choice([*values, good.get(name, "dram"), [rng.choice(values) for _ in range(3)]])
    if rng.random() < 0.1:
        options[rng.choice([*values[:2], 7, None])] = rng.choice(_ODD)
    return options


def check_bank(spec: BankSpec) -> None:
    """An accepted spec is one that this program can do something with, and it is what its own text says."""
    assert spec.kind in BANK_KINDS and "\0" not in spec.locator
    assert bool(spec.locator) == (spec.kind != "dram")
    assert spec.capacity_bytes is None or 0 < spec.capacity_bytes < 10**40
    size = "" if spec.capacity_bytes is None else f"={spec.capacity_bytes}B"
    assert len(size) > 19 or BankSpec.parse(f"{spec.name}{size}") == spec
    if spec.capacity_bytes:
        format_bytes(spec.capacity_bytes)
    if spec.kind == "numa":
        assert 0 <= int(spec.locator) < 10_000


def check_device(device: DeviceSpec) -> None:
    assert 0 <= device.latency_s < float("inf")
    assert 0 < device.read_bytes_per_s < 10**40 and 0 < device.write_bytes_per_s < 10**40


def check_slots(slots: SlotSpec) -> None:
    given = [value for value in (slots.share, slots.count, slots.total_bytes) if value is not None]
    assert len(given) == (0 if slots.is_auto else 1)
    assert all(value > 0 for value in given) and (slots.share or 1) <= 1
    if slots.total_bytes:
        format_bytes(slots.total_bytes)


def check_config(config: OffloadConfig) -> None:
    check_slots(config.slots)
    assert config.banks is None or config.banks
    for bank in config.banks or ():
        check_bank(bank)


def test_65_000_mutated_options_are_taken_for_what_they_say_or_refused_in_one_sentence() -> None:
    accepted = dict.fromkeys(("bank", "device", "slots", "config"), 0)
    refused = dict(accepted)
    base = seed()
    for case in range(SPEC_COUNT // 4):
        rng = random.Random(f"{base}:{case}")
        text: Any = mutated_text(rng) if rng.random() < 0.95 else rng.choice(_ODD)
        for kind, parse, check, raw in (
            ("bank", BankSpec.parse, check_bank, text),
            ("device", DeviceSpec.parse, check_device, str(text).removeprefix("emulated:")),
            ("slots", SlotSpec.parse, check_slots, text),
            ("config", OffloadConfig.parse, check_config, mutated_options(rng)),
        ):
            try:
                parsed = parse(raw)  # type: ignore[operator]
            except ConfigError as error:
                sentence = str(error)
                assert sentence.startswith("--moe-offload-config"), sentence
                assert ": " in sentence and sentence != f"--moe-offload-config: {raw}"
                refused[kind] += 1
            except BaseException as error:
                raise AssertionError(f"case {case} of seed {base}: {kind} {raw!r:.200}") from error
            else:
                check(parsed)  # type: ignore[operator]
                accepted[kind] += 1
    print(accepted, refused)
    assert min(*accepted.values(), *refused.values()) > 500, "the mutations miss one side"


def test_35_000_mutated_slab_files_are_refused_or_give_what_was_packed_in_bounded_memory() -> None:
    command = [sys.executable, "-W", "error", "-m", "tests.property.fuzz_slabs", seed(), str(FILE_COUNT)]
    fuzz = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    replay = re.search(r"case (\d+) of seed (\S+),.*", fuzz.stderr)
    hint = f"\nreplay: python -m tests.property.fuzz_slabs {replay[2]} 1 {replay[1]}" if replay else ""
    assert not fuzz.returncode, fuzz.stderr[-3000:] + hint
    outcomes = json.loads(fuzz.stdout)
    print(outcomes)
    assert sum(outcomes.values()) == FILE_COUNT
    # Every check of the reader was reached: a mutation that stopped at the seal would prove little.
    assert outcomes.keys() >= REACHED, REACHED - outcomes.keys()


REACHED = {
    "accepted",
    "accepted, but a slab is refused",
    "it is too short for a header",
    "it has no header, so packing did not end",
    "its header is longer than the file",
    "its header is no JSON",
    "it has another format",
    "its header describes a tensor by no object",
    "its header describes a tensor wrongly",
    "its header gives a tensor another size than its shape",
    "its tensors overlap or leave gaps",
    "it has N bytes and its header says N",
    "it has no seal",
    "its seal is not at its end",
    "it has no tail",
    "its tail is longer than the file",
    "its header or its tail has changed",
    "its fingerprint is no JSON",
    "its fingerprint is damaged",
    "its list of layers is no JSON",
    "its list of layers is damaged",
    "it describes no layer",
    "it describes a layer wrongly",
    "it lacks a tensor of a layer",
    "it has a tensor that is not a row per expert",
    "it lacks digests",
    "it has a layer twice",
}
