"""Mutates slab files and reads them, in a process of its own whose memory is limited: see `test_fuzz_banks.py`.

Run as ``python -m tests.property.fuzz_slabs SEED COUNT [FIRST]``; case FIRST alone replays with COUNT 1.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.homes import PROFILE
from tests.support.slabfiles import home_in, home_of, join, pack, read_slab, split, toy_layer
from vllm_moecxl.data.banks.file import FileBank
from vllm_moecxl.errors import IntegrityError, MoeOffloadError
from vllm_moecxl.units import MIB

#: Memory that reading a file of 20 KB may take beyond what the process has: a thousandth of what a lie could ask for.
MEMORY_BYTES = 96 * MIB

_WORDS = ("w", "scale", "digests", "seal", "layers.0", "layers.0/w", "shared", "table", "", "\ud800", "__metadata__")
_NUMBERS = (0, 1, -1, 2, 31, 32, 33, 255, 4095, 4096, 1 << 31, 1 << 53, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
_ODD = (None, True, False, 0.5, float("nan"), float("inf"), -0.0, [], {}, [[]], "U8", "F4", "BOOL", "9" * 5000, 10**30)

Header = dict[str, Any]


class Original:
    """A sound file, and what is in its slabs."""

    def __init__(self, folder: Path) -> None:
        path = pack(folder / "original", {f"layers.{i}": toy_layer(seed=10 * i) for i in range(2)})
        self.header, self.data = split(path)
        self.tail_start = int(self.header["__metadata__"]["tail_start"])
        self.raw = join(json.dumps(self.header).encode(), self.data, self.tail_start)
        path.write_bytes(self.raw)
        self.slabs = set()
        for name in ("layers.0", "layers.1"):
            bank, home = home_of(path, "off", name)
            self.slabs |= {slab_bytes(home, expert_id) for expert_id in range(3)}
            bank.slabs.close()
        assert len(self.slabs) == 6


def slab_bytes(home: Any, expert_id: int) -> bytes:
    return b"".join(row.numpy().tobytes() for row in read_slab(home, expert_id))


def flip(rng: random.Random, original: Original) -> bytes:
    """A few bytes changed anywhere, or near one place."""
    raw = bytearray(original.raw)
    end = rng.choice([8, 400, 4096, len(raw)])
    for _ in range(rng.randint(1, 4)):
        raw[rng.randrange(end)] = rng.randrange(256)
    return bytes(raw)


def resize(rng: random.Random, original: Original) -> bytes:
    """Cut short, cut out, repeated or extended."""
    raw = original.raw
    start, stop = sorted((rng.randrange(len(raw)), rng.randrange(len(raw))))
    return rng.choice([raw[:start], raw[start:], raw[:start] + raw[stop:], raw + raw[start:stop], raw + bytes(start)])


def lie_about_length(rng: random.Random, original: Original) -> bytes:
    """Another length of the header."""
    length = rng.choice([*(n for n in _NUMBERS if n >= 0), rng.randrange(len(original.raw)), 99_999_999, 100_000_001])
    return length.to_bytes(8, "little") + original.raw[8 : rng.choice([8, 100, len(original.raw)])]


def edit_text(rng: random.Random, original: Original) -> bytes:
    """The header's text cut, nested or with a key twice, and a seal that fits."""
    text = json.dumps(original.header)
    place = rng.randrange(len(text))
    depth = rng.choice([10, 900, 990, 1_000, 50_000])
    parts = [
        "[" * depth,
        '{"a":' * depth,
        "[" * depth + "]" * depth,
        "NaN",
        "-Infinity",
        "1e999",
        "9" * 5000,
        '"\\ud800"',
    ]
    entry = json.dumps(original.header["layers.0/w"])
    edited = rng.choice(
        [
            text[:place] + rng.choice(parts) + text[place + 1 :],
            text[:-1] + f', "layers.0/w": {entry}}}',
            text[:-1] + f', "x": {rng.choice(parts)}}}',
            text.replace('"U8"', rng.choice(parts), 1),
            text.replace(": [", ": " + "[" * rng.choice([1, 980]), 1),
            text[:place],
        ]
    )
    return join(edited.encode("utf-8", "surrogatepass"), original.data, original.tail_start)


def edit_structure(rng: random.Random, original: Original) -> bytes:
    """The header's entries or the list of layers changed as JSON, and a seal that fits."""
    header: Header = json.loads(json.dumps(original.header))
    metadata = header["__metadata__"]
    for _ in range(rng.randint(1, 2)):
        if rng.random() < 0.5:
            key = rng.choice(["layers", "layers", "fingerprint"])
            inner = json.loads(metadata[key])
            metadata[key] = json.dumps(mutate_value(rng, inner))
        else:
            mutate_value(rng, header)
        metadata = header.get("__metadata__")
        if not isinstance(metadata, dict) or not {"layers", "fingerprint"} <= metadata.keys():
            break
        if not all(is_json(metadata[key]) for key in ("layers", "fingerprint")):
            break
    return join(json.dumps(header).encode(), original.data, original.tail_start)


def swap_entries(rng: random.Random, original: Original) -> bytes:
    """Two tensors trade places, types or shapes, which the seal confirms and only a digest can tell."""
    header: Header = json.loads(json.dumps(original.header))
    one, other = rng.sample([key for key in header if key != "__metadata__"], 2)
    for field in rng.sample(["data_offsets", "shape", "dtype"], rng.randint(1, 3)):
        header[one][field], header[other][field] = header[other][field], header[one][field]
    return join(json.dumps(header).encode(), original.data, original.tail_start)


def edit_data(rng: random.Random, original: Original) -> bytes:
    """A slab or a digest changed, and a seal that fits."""
    data = bytearray(original.data)
    start = rng.choice([0, original.tail_start])
    data[rng.randrange(start, len(data))] ^= 1 << rng.randrange(8)
    return join(json.dumps(original.header).encode(), bytes(data), original.tail_start)


def is_json(text: object) -> bool:
    try:
        json.loads(text)  # type: ignore[arg-type]
    except (ValueError, TypeError, RecursionError):
        return False
    return True


def mutate_value(rng: random.Random, value: Any) -> Any:
    """A JSON value with one place changed, in place where it is a container."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        match rng.randrange(8):
            case 0:
                del value[key]
            case 1:
                value[rng.choice(_WORDS)] = value.pop(key)
            case 2:
                value[rng.choice(_WORDS)] = json.loads(json.dumps(value[key]))
            case _:
                value[key] = mutate_value(rng, value[key])
        return value
    if isinstance(value, list) and value and rng.random() < 0.9:
        index = rng.randrange(len(value))
        match rng.randrange(8):
            case 0:
                del value[index]
            case 1:
                value.insert(index, json.loads(json.dumps(rng.choice(value))))
            case 2:
                value *= rng.choice([0, 2, 100])
            case _:
                value[index] = mutate_value(rng, value[index])
        return value
    if isinstance(value, int) and rng.random() < 0.7:
        return rng.choice([rng.choice(_NUMBERS), value + rng.randint(-4, 4), value * 2, -value])
    if isinstance(value, str) and rng.random() < 0.5:
        return rng.choice([rng.choice(_WORDS), value[:-1], value + "0", str(rng.choice(_NUMBERS))])
    return rng.choice([*_ODD, *_NUMBERS, *_WORDS])


MUTATIONS: tuple[Callable[[random.Random, Original], bytes], ...] = (
    *(flip, resize, lie_about_length, edit_text, edit_structure, edit_structure, edit_structure, edit_structure),
    *(swap_entries, edit_data),
)


def check(path: Path, original: Original) -> str:
    """Open a file and read all of it; what came of it.

    A file that is accepted has to give, slab by slab, bytes that a packer packed or an error.
    """
    try:
        bank = FileBank(path, "file", PROFILE)
    except MoeOffloadError as error:
        sentence = str(error)
        assert sentence.startswith("--moe-offload-config: banks=") and "\n" not in sentence, sentence
        reason = sentence.partition(" is not a sound slab file (")[2].partition(")")[0]
        return re.sub(r"\d+", "N", reason) or "cannot be read"
    outcome = "accepted"
    bank.slabs.require_fingerprint(bank.slabs.fingerprint)
    for name, layer in bank.slabs.layers.items():
        home = home_in(bank, "fetch", name)
        for expert_id in range(layer.expert_count):
            try:
                assert slab_bytes(home, expert_id) in original.slabs, "a slab that nobody packed"
            except IntegrityError:
                outcome = "accepted, but a slab is refused"
    bank.slabs.close()
    return outcome


def main(seed: str, count: int, first: int) -> None:
    memory = Path("/dev/shm")
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        original = Original(Path(folder))
        path = Path(folder) / "model.slabs"
        path.write_bytes(original.raw)
        assert check(path, original) == "accepted"
        page_count = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (page_count * resource.getpagesize() + MEMORY_BYTES,) * 2)
        left_open = (len(os.listdir("/proc/self/fd")), threading.active_count())
        for case in range(first, first + count):
            rng = random.Random(f"{seed}:{case}")
            mutation = rng.choice(MUTATIONS)
            raw = mutation(rng, original)
            path.write_bytes(raw)
            try:
                outcomes[check(path, original)] += 1
            except BaseException:
                print(f"case {case} of seed {seed}, {mutation.__name__}", file=sys.stderr)
                raise
        assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == left_open
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
