"""Kernels compiled for devices that are not here, and what the machine code says about them.

It needs Triton, not interpreted, and no device: `reports_of` and `compilations_of` run it in a process of its own.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")

#: Kernel, positional arguments, keyword arguments.
Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]

REGISTERS_MAX = 128
SHARED_BYTES_MAX = 48 * 1024
BULK_BITS = 128
#: Accesses that are the bulk of a kernel's traffic: they are there, and 128 bits wide.
BULK = {
    "_gather_slabs": {"_copy_words: reader", "_copy_words: writer"},
    "_gate_lookahead": {"_gate_lookahead: gates"},
}
#: The only others that these kernels make, of any width: look-ups, tails, odd alignments, a row or a word.
NARROW = {
    "_gather_slabs": {
        *("_copy_bytes: reader", "_copy_bytes: writer"),
        *(f"_gather_slabs: {name}" for name in ("copies", "count", "sources", "targets", "strides", "sizes", "blocks")),
    },
    "_gate_lookahead": {f"_gate_lookahead: {name}" for name in ("x", "scale", "bias", "visit", "out")},
}
#: Kernels that move nothing but tables of a few kilobytes, at any width.
TABLES_ONLY = {"_remap", "ensure_experts_kernel"}

#: Global accesses: of PTX (`ld.global.L1::evict_first.v4.b32`, `st.global.b8`), and of CDNA3 (`buffer_load_dwordx4`).
_PTX = re.compile(r"\b(ld|st)(?:\.\w+)*?\.global((?:[.:]+\w+)*?)(?:\.v(\d))?\.[bfsu](\d+)\b")
_CDNA = re.compile(r"\b(?:global|buffer|flat|s_buffer|s)_(load|store)_(\w+)")
_CDNA_BITS = {"byte": 8, "ubyte": 8, "sbyte": 8, "short": 16, "ushort": 16, "dword": 32}
_LINE = re.compile(r"^\s*\.loc\s+(\d+)\s+(\d+)")
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+(?:"([^"]*)"\s+)?"([^"]+)"')


@dataclass(frozen=True, order=True)
class Access:
    """One kind of access to global memory.

    Attributes:
        place: the function of our source and the pointer that it reads or writes there: "_copy_words: reader".
        is_store: or it is a load.
        bits: width.
    """

    place: str
    is_store: bool
    bits: int


@dataclass
class Report:
    """What the machine code of one kernel says.

    Attributes:
        case: name of the sample call.
        kernel: name of the kernel.
        arch: what it was compiled for.
        registers: of a thread; vector registers on AMD.
        spilled: bytes of a thread's stack on NVIDIA, registers on AMD.
        shared_bytes: of a program.
        accesses: to global memory, sorted.
    """

    case: str
    kernel: str
    arch: str
    registers: int
    spilled: int
    shared_bytes: int
    accesses: list[Access] = field(default_factory=list)

    def faults(self) -> list[str]:
        """What is not as it has to be, a sentence each."""
        faults = []
        if self.registers > REGISTERS_MAX:
            faults.append(f"{self.registers} registers a thread, more than {REGISTERS_MAX}")
        if self.spilled:
            faults.append(f"{self.spilled} spilled")
        if self.shared_bytes > SHARED_BYTES_MAX:
            faults.append(f"{self.shared_bytes} bytes of shared memory, more than {SHARED_BYTES_MAX}")
        if self.kernel in TABLES_ONLY:
            return faults
        if self.kernel not in BULK:
            return [*faults, "nobody said how it may access memory"]
        bulk, narrow = BULK[self.kernel], NARROW[self.kernel]
        faults += [f"no access {place}" for place in sorted(bulk - {access.place for access in self.accesses})]
        for access in self.accesses:
            if access.place not in narrow and (access.place not in bulk or access.bits != BULK_BITS):
                verb = "stores" if access.is_store else "loads"
                faults.append(f"{access.place} {verb} {access.bits} bits at a time")
        return faults

    def width(self) -> str:
        """Bits of the accesses: of the bulk, and in brackets of the others."""

        def listed(places: set[str]) -> str:
            widths = {access.bits for access in self.accesses if access.place in places}
            return "/".join(str(bits) for bits in sorted(widths, reverse=True))

        bulk = BULK.get(self.kernel, set())
        rest = f"({listed({access.place for access in self.accesses} - bulk)})"
        return f"{listed(bulk)} {rest}" if bulk else rest


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """Within, kernels are not launched but listed."""
    from triton.runtime.jit import JITFunction

    seen: list[Launch] = []
    run = JITFunction.run

    def list_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        seen.append((self, args, kwargs))

    JITFunction.run = list_only
    try:
        yield seen
    finally:
        JITFunction.run = run


def specialise(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], arch: str) -> tuple[Any, ...]:
    """What Triton's launcher makes of a launch: (target, options, signature, constants, attributes).

    Launches that give the same share one compilation.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    is_nvidia = arch.startswith("sm_")
    target = GPUTarget("cuda", int(arch[3:]), 32) if is_nvidia else GPUTarget("hip", arch, 64)
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    kwargs = {"debug": False, "instrumentation_mode": "", **kwargs}
    bound, specialisation, options = binder(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialisation, options)
    return target, options, signature, constants, attributes


def inspect(case: str, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], arch: str) -> Report:
    """Compile a launch as the launcher would on such a device, and read the machine code."""
    import triton
    from triton.compiler import ASTSource

    target, options, signature, constants, attributes = specialise(kernel, args, kwargs, arch)
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    shared_bytes = compiled.metadata.shared
    if "ptx" in compiled.asm:
        registers, spilled = _cubin_resources(compiled.asm["cubin"])
        accesses = _accesses(compiled.asm["ptx"])
    else:
        text = compiled.asm["amdgcn"]
        registers = _number(text, r"\.vgpr_count:\s+(\d+)")
        spilled = _number(text, r"\.vgpr_spill_count:\s+(\d+)") + _number(text, r"\.sgpr_spill_count:\s+(\d+)")
        accesses = _accesses(text)
    return Report(case, kernel.__name__, arch, registers, spilled, shared_bytes, accesses)


def _number(text: str, pattern: str) -> int:
    found = re.findall(pattern, text)
    assert len(found) == 1, f"{pattern}: {found}"
    return int(found[0])


def _cubin_resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of the stack (spills, and arrays that are indexed), of a thread."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    text = run.stdout + run.stderr
    return _number(text, r"REG:(\d+)"), _number(text, r"STACK:(\d+)") + _number(text, r"LOCAL:(\d+)")


def _accesses(text: str) -> list[Access]:
    """Global accesses in PTX or AMD assembly, with the line of our source that each comes from."""
    files: dict[str, str] = {}
    for line in text.splitlines():
        if match := _FILE.match(line):
            files[match[1]] = str(Path(match[2] or "", match[3]))
    found: set[Access] = set()
    place = "?"
    for line in text.splitlines():
        if match := _LINE.match(line):
            # Line 0 is what the compiler made of several lines: it says nothing.
            if match[2] != "0":
                place = _place_of(files[match[1]], int(match[2]))
        elif match := _PTX.search(line):
            found.add(Access(place, match[1] == "st", int(match[3] or 1) * int(match[4])))
        elif (match := _CDNA.search(line)) and not match[0].startswith("s_"):
            found.add(Access(place, match[1] == "store", _cdna_bits(match[2])))
    return sorted(found)


def _cdna_bits(kind: str) -> int:
    """Bits of `dwordx4`, `ubyte_d16`, `short_d16_hi`, ..."""
    kind = kind.partition("_")[0]
    return 32 * int(kind[6:]) if kind.startswith("dwordx") else _CDNA_BITS[kind]


def _place_of(path: str, line: int) -> str:
    places = [place for first, last, place in _places(path) if first <= line <= last]
    return places[-1] if places else "?"


@cache
def _places(path: str) -> list[tuple[int, int, str]]:
    """Lines of the loads and stores in a file, named "function: pointer", the innermost last."""
    spans = []
    for function in ast.walk(ast.parse(Path(path).read_text())):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("tl.load", "tl.store"):
                    names = [name for name in ast.walk(node.args[0]) if isinstance(name, ast.Name)]
                    pointer = min(names, key=lambda name: (name.lineno, name.col_offset)).id
                    spans.append((node.lineno, node.end_lineno or node.lineno, f"{function.name}: {pointer}"))
    return sorted(spans)


def reports_of(module: str) -> list[Report]:
    """Reports of each call in `CALLS` of a module, on every architecture."""
    return [
        Report(**{**report, "accesses": [Access(**access) for access in report["accesses"]]})
        for report in _run("reports", module)
    ]


def compilations_of(module: str) -> dict[str, int]:
    """How many compilations each list of calls in `ALIKE` of a module takes."""
    counts: dict[str, int] = _run("compilations", module)
    return counts


def _run(what: str, module: str) -> Any:
    """Run this file where nothing is interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compiled", what, module]
    # A cache that outlives us would hand out code whose lines are those of another checkout.
    with tempfile.TemporaryDirectory() as cache_folder:
        environment["TRITON_CACHE_DIR"] = cache_folder
        return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)


def _launches_of(call: Callable[[], object]) -> list[Launch]:
    with launches() as seen:
        call()
    assert seen, "nothing is launched"
    return seen


def _main(what: str, module: str) -> None:
    calls = importlib.import_module(module)
    if what == "reports":
        found = [(name, *launch) for name, call in calls.CALLS.items() for launch in _launches_of(call)]
        print(json.dumps([asdict(inspect(*launch, arch)) for launch in found for arch in ARCHITECTURES]))
    else:
        counts = {}
        for name, alike in calls.ALIKE.items():
            found = [launch for call in alike for launch in _launches_of(call)]
            counts[name] = max(len({str(specialise(*launch, arch)) for launch in found}) for arch in ARCHITECTURES)
        print(json.dumps(counts))


if __name__ == "__main__":
    _main(*sys.argv[1:])
