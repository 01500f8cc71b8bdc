"""A model that exceeds memory: ours from a file bank, llama.cpp with mmap and accelerate, half of the experts each.

Each engine runs in a memory cgroup whose limit is its own peak with a narrow model plus half of the wide experts'
bytes. Before each run its model is dropped from the page cache, so that the cgroup pays for every page of it; Python's
libraries, which the runs have in common, are cached before and free for all. One thread, one sequence, greedy, bf16,
the same token ids; a speed is decoded tokens per second, without the prefill, which is also reported with it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import cgroup, direct_io, loop_volume
from benchmarks.common import Result, print_table, save, trained_model
from benchmarks.peers import install
from benchmarks.peers.contest import Case, Contest
from benchmarks.peers.work import Work
from benchmarks.widen import widen
from vllm_moecxl.units import KIB, MIB, format_bytes

_REPOSITORY = Path(__file__).parent.parent
#: Two matrices in, one out, bf16: 12.6 MB experts, whatever the model's hidden size.
_EXPERT_MATRIX_ELEMENTS = 1 << 21
_MAX_MODEL_LEN = 512
_PROMPT_LENGTH = 32
#: Weights and their copies for all engines, and the volume of one, over the bytes of the experts.
_DISK_RATIO = 6.0
_VOLUME_RATIO = 1.25

ENGINES = ("ours", "ours_resident", "llama_cpp", "llama_cpp_tuned", "llama_cpp_resident", "accelerate")
#: The kernel's default. `llama_cpp_tuned` has it whatever the disk's own setting is: with megabytes, each page fault of
#: a mapped model reads, and thereby evicts, many times what is missing.
_TUNED_READ_AHEAD_BYTES = 128 * KIB

#: The first is for the warm-up. One for each domain of the models' training text.
_PROMPTS = (
    "The package manager resolves the dependencies of every package before it downloads anything, and an administrator "
    "who changes the list of sources must first update",
    'import argparse\nimport os\n\n\ndef read_documents(path, encoding=\'utf-8\'):\n    """Return the lines of every '
    'file below path."""\n    for name in sorted(os.listdir(path)):\n        with open(',
    "Der Befehl zeigt alle Dateien des Verzeichnisses an, deren Namen mit den angegebenen Zeichen beginnen. Wird die "
    "Option nicht angegeben, so werden",
    "  * New upstream release.\n  * debian/control: Bump Standards-Version, no changes needed.\n  * Fix a memory leak "
    "in the parser (Closes: #",
    "/* Return the number of bytes that were written, or -1 on error. */\nextern ssize_t write_all (int __fd, const "
    "void *__buf, size_t __n) __wur;\n\n#ifdef __USE_GNU\n",
    "It was never his habit to speak of what he had seen, and those who asked him were told that the road was long and "
    "that the weather had",
    "Cette commande affiche la liste des fichiers du répertoire courant. Si aucune option n'est indiquée, les fichiers "
    "dont le nom commence par",
    "Esta orden muestra una lista de los ficheros del directorio actual. Si no se indica ninguna opción, los nombres "
    "que empiezan por",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    default = trained_model()
    parser.add_argument(
        "--model", type=Path, default=default, help=f"narrow, trained Mixtral (default: {default.name})"
    )
    parser.add_argument("--intermediate-size", type=int, help="width that its experts get (default: 12.6 MB each)")
    parser.add_argument("--slots", default="auto", help="slots of our engine")
    parser.add_argument(
        "--moe-offload", type=json.loads, default={"layer_buffer": False}, help="more options of our engine"
    )
    parser.add_argument("--prompts", type=int, default=3, choices=range(1, len(_PROMPTS)), help="prompts on the clock")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens to generate after each")
    parser.add_argument("--seconds", type=float, default=300.0, help="no engine begins another prompt after this")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each engine, in turn")
    parser.add_argument(
        "--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="only these; then nothing is saved"
    )


def run(args: argparse.Namespace) -> Result:
    """Measure, print and save."""
    if reason := cgroup.why_not():
        raise cgroup.CgroupError(reason)
    config = json.loads((args.model / "config.json").read_text())
    width = args.intermediate_size or _EXPERT_MATRIX_ELEMENTS // config["hidden_size"]
    narrow_experts_bytes = experts_bytes(config)
    wide_experts_bytes = experts_bytes(config | {"intermediate_size": width})
    with _folder_on_disk(int(wide_experts_bytes * _DISK_RATIO)) as folder:
        widen(args.model, folder / "wide", width)
        work = _work(args)
        with _contests(args, folder, int(wide_experts_bytes * _VOLUME_RATIO)) as contests:
            for name, contest in contests.items():
                _measure_footprint(name, contest, wide_experts_bytes)
            accelerate_trials: list[Result] = []
            if "accelerate" in contests:
                accelerate_trials = _fit_accelerate(contests["accelerate"], work, config, wide_experts_bytes)
            rounds = []
            for _ in range(args.rounds):
                bandwidth = direct_io.read_bytes_per_s(folder / "wide" / "model.safetensors")
                rounds.append({"disk_read_bytes_per_s": round(bandwidth), "load_average": round(os.getloadavg()[0], 2)})
                for name, contest in contests.items():
                    _run_once(name, contest, work)
        read_ahead_bytes = _read_ahead_bytes(folder)
    speeds = {f"{name}_tokens_per_s": contest.tokens_per_s for name, contest in contests.items()}
    reference = next(
        (contests[name].outputs for name in ("ours_resident", "llama_cpp_resident") if name in contests), []
    )
    values = {
        **speeds,
        "over_llama_cpp": _ratio(speeds, "ours", "llama_cpp"),
        "over_llama_cpp_tuned": _ratio(speeds, "ours", "llama_cpp_tuned"),
        "over_accelerate": _ratio(speeds, "ours", "accelerate"),
        "over_resident": _ratio(speeds, "ours", "ours_resident"),
        "llama_cpp_over_resident": _ratio(speeds, "llama_cpp", "llama_cpp_resident"),
        "experts_bytes": wide_experts_bytes,
        "narrow_experts_bytes": narrow_experts_bytes,
        "disk_read_bytes_per_s": round(median(entry["disk_read_bytes_per_s"] for entry in rounds)),
        "disk_read_ahead_bytes": read_ahead_bytes,
        "tuned_read_ahead_bytes": _TUNED_READ_AHEAD_BYTES,
        "model": f"{args.model.name}, experts widened to {width}",
        "slots": args.slots,
        "moe_offload": args.moe_offload,
        "clock": "decode alone: tokens after a prompt's first over the time between them; median of the rounds",
        "work": {
            "warmup_prompts": len(work.warmup_prompts),
            "prompts": len(work.prompts),
            "prompt_tokens": [len(prompt) for prompt in work.prompts],
            "new_tokens": work.new_count,
        },
        "versions": {"llama_cpp_python": install.LLAMA_CPP_VERSION, "accelerate": install.ACCELERATE_VERSION},
        "rounds": rounds,
        "accelerate_trials": accelerate_trials,
        "engines": {name: _summary(contest, reference) for name, contest in contests.items()},
    }
    _print(values)
    return save("oversize", "hardware", values) if set(args.engines) == set(ENGINES) else values


def experts_bytes(config: Result) -> int:
    """Bytes of all experts of a Mixtral in bf16."""
    expert: int = 2 * 3 * config["hidden_size"] * config["intermediate_size"]
    count: int = config["num_local_experts"] * config["num_hidden_layers"]
    return count * expert


@contextmanager
def _folder_on_disk(needed_bytes: int) -> Iterator[Path]:
    """A temporary folder in the cache, which unlike `/tmp` is no tmpfs."""
    parent = install.cache_folder().parent
    parent.mkdir(parents=True, exist_ok=True)
    if (free_bytes := shutil.disk_usage(parent).free) < needed_bytes:
        raise RuntimeError(
            f"{parent}: {format_bytes(free_bytes)} free, {format_bytes(needed_bytes)} needed;"
            " set XDG_CACHE_HOME to a folder on a larger disk"
        )
    with tempfile.TemporaryDirectory(prefix="oversize-", dir=parent) as folder:
        yield Path(folder)


@contextmanager
def _contests(args: argparse.Namespace, folder: Path, volume_bytes: int) -> Iterator[dict[str, Contest]]:
    """Convert the models to every format and say how each engine is run."""
    models = {"narrow": args.model, "wide": folder / "wide"}
    ggufs: dict[str, Path] = {}
    if any(name.startswith("llama_cpp") for name in args.engines):
        llama_cpp = install.llama_cpp()
        ggufs = {size: folder / f"{size}.gguf" for size in models}
        for size, model in models.items():
            _call("benchmarks.peers.convert_to_gguf", llama_cpp.converter, model, ggufs[size])
    slab_files: dict[str, Path] = {}
    if "ours" in args.engines:
        slab_files = {size: folder / f"{size}.slabs" for size in models}
        for size, model in models.items():
            _call("vllm_moecxl.commands.main", "pack", model, slab_files[size])

    def case(name: str, size: str) -> Case:
        model = models[size]
        if name.startswith("llama_cpp"):
            arguments = {"model": str(ggufs[size]), "max_model_len": _MAX_MODEL_LEN}
            files = [ggufs[size]]
            if name == "llama_cpp_tuned" and size == "wide":
                copy = volume / ggufs[size].name
                shutil.copyfile(ggufs[size], copy)
                arguments["model"] = str(copy)
                files = [copy, volume_image]
            return Case("benchmarks.peers.run_llama_cpp", arguments, files, str(llama_cpp.packages))
        if name == "accelerate":
            scratch = folder / "accelerate"
            # Everything in memory; for the wide model `_fit_accelerate` finds what fits.
            arguments = {"model": str(model), "offload_folder": str(scratch), "weights_bytes_max": 1 << 50}
            path = str(install.accelerate())
            return Case("benchmarks.peers.run_accelerate", arguments, [model], path, scratch)
        options: Result | None = None
        files = [model]
        if name == "ours":
            # The file bank of this engine; `moecxl pack` wrote it.
            banks = [f"file:{slab_files[size]}"]
            options = {"mode": "cxl", "slots": args.slots, "banks": banks, **args.moe_offload}
            files.append(slab_files[size])
        arguments = {"model": str(model), "max_model_len": _MAX_MODEL_LEN, "moe_offload": options}
        return Case("benchmarks.peers.run_vllm", arguments, files)

    with ExitStack() as stack:
        if "llama_cpp_tuned" in args.engines:
            volume_image = folder / "volume"
            volume = stack.enter_context(loop_volume.mounted(volume_image, volume_bytes, _TUNED_READ_AHEAD_BYTES))
        yield {
            name: Contest(case(name, "narrow"), case(name, "wide"), has_limit=not name.endswith("_resident"))
            for name in args.engines
        }


def _call(module: str, *arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", module, *map(str, arguments)], cwd=_REPOSITORY, stdout=sys.stderr, check=True)


def _work(args: argparse.Namespace) -> Work:
    """Prompts as token ids, so that no engine's tokenizer plays a part."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    prompts = [tokenizer.encode(text).ids[:_PROMPT_LENGTH] for text in _PROMPTS[: args.prompts + 1]]
    return Work(prompts[:1], prompts[1:], args.new_tokens, args.seconds, [])


def _measure_footprint(name: str, contest: Contest, wide_experts_bytes: int) -> None:
    if not contest.has_limit:
        return
    work = Work([], [list(range(1, 1 + _PROMPT_LENGTH))], 16, 60.0, [])
    contest.narrow.run_outside(work)
    _, contest.footprint = contest.narrow.run(work, None)
    contest.limit_bytes = contest.footprint.peak_bytes + wide_experts_bytes // 2
    _log(name, f"footprint {format_bytes(contest.footprint.peak_bytes)}, limit {format_bytes(contest.limit_bytes)}")


def _fit_accelerate(contest: Contest, work: Work, config: Result, wide_experts_bytes: int) -> list[Result]:
    """Find how many layers accelerate had best keep in memory: from all that the limit allows, down while it gains."""
    layer_count = config["num_hidden_layers"]
    layer_bytes = wide_experts_bytes // layer_count
    weights_bytes = sum(path.stat().st_size for path in contest.wide.files[0].glob("*.safetensors"))
    trial_work = Work([], work.prompts[:1], 8, 60.0, [])
    trials: list[Result] = []
    assert contest.limit_bytes is not None
    for count in range(layer_count // 2, 0, -1):
        # It keeps room for its largest layer, which is where it puts one that comes from disk.
        bytes_max = weights_bytes - wide_experts_bytes + (count + 1) * layer_bytes + MIB
        contest.wide.arguments["weights_bytes_max"] = bytes_max
        result, usage = contest.wide.run(trial_work, contest.limit_bytes)
        trials.append(
            {
                "weights_bytes_max": bytes_max,
                "layers_in_memory": count if result is None else result["layers_in_memory"],
                "oom_killed": usage.oom_kill_count > 0,
                "tokens_per_s": 0.0 if result is None else result["tokens_per_s"],
            }
        )
        _log("accelerate", f"trial {trials[-1]}")
        if 0 < trials[-1]["tokens_per_s"] < max(trial["tokens_per_s"] for trial in trials):
            break
    best = max(trials, key=lambda trial: trial["tokens_per_s"])
    contest.wide.arguments["weights_bytes_max"] = best["weights_bytes_max"]
    return trials


def _run_once(name: str, contest: Contest, work: Work) -> None:
    result, usage = contest.wide.run(work, contest.limit_bytes)
    figures = {} if result is None else result
    contest.outputs = figures.pop("outputs", [])
    contest.runs.append({**figures, "usage": asdict(usage)})
    _log(name, f"{figures.get('tokens_per_s', 'killed, out of memory')} tokens/s")


def _summary(contest: Contest, reference: list[list[int]]) -> Result:
    return {
        "footprint": asdict(contest.footprint) if contest.footprint else None,
        "limit_bytes": contest.limit_bytes,
        "oom_killed": any(run["usage"]["oom_kill_count"] for run in contest.runs),
        "same_tokens_as_resident": _same(contest.outputs, reference),
        "runs": contest.runs,
    }


def _same(outputs: list[list[int]], reference: list[list[int]]) -> float | None:
    """Share of the tokens before the first that differs from the resident engine's."""
    pairs = list(zip(outputs, reference, strict=False))
    total = sum(min(len(mine), len(other)) for mine, other in pairs)
    equal = 0
    for mine, other in pairs:
        differs = [a != b for a, b in zip(mine, other, strict=False)]
        equal += differs.index(True) if True in differs else len(differs)
    return round(equal / total, 4) if total else None


def _ratio(speeds: dict[str, float | None], name: str, other: str) -> float | None:
    mine, theirs = speeds.get(f"{name}_tokens_per_s"), speeds.get(f"{other}_tokens_per_s")
    return round(mine / theirs, 3) if mine and theirs else None


def _read_ahead_bytes(folder: Path) -> int | None:
    """What the kernel reads ahead on this disk: page faults of a mapped file bring in as much around them."""
    device = folder.stat().st_dev
    path = Path("/sys/class/bdi", f"{os.major(device)}:{os.minor(device)}", "read_ahead_kb")
    return int(path.read_text()) * 1024 if path.exists() else None


def _print(values: Result) -> None:
    rows: list[list[Any]] = []
    for name, engine in values["engines"].items():
        run = engine["runs"][-1]
        usage = run["usage"]
        rows.append(
            [
                name,
                values[f"{name}_tokens_per_s"],
                run.get("tokens_per_s_with_prefill"),
                format_bytes(engine["footprint"]["peak_bytes"]) if engine["footprint"] else "-",
                format_bytes(engine["limit_bytes"]) if engine["limit_bytes"] else "-",
                format_bytes(usage["peak_bytes"]),
                format_bytes(usage["anonymous_peak_bytes"]),
                format_bytes(run.get("cached_bytes", 0)),
                format_bytes(run["read_bytes"] // run["token_count"]) if run.get("token_count") else "-",
                run.get("hit_rate", "-"),
                "killed" if engine["oom_killed"] else "no",
            ]
        )
    print_table(
        [
            "engine",
            "tokens/s",
            "with prefill",
            "footprint",
            "limit",
            "peak",
            "anonymous",
            "cached at end",
            "read/token",
            "hit rate",
            "out of memory",
        ],
        rows,
    )
    print(
        f"ours over llama.cpp {values['over_llama_cpp']}, over llama.cpp with a small read-ahead"
        f" {values['over_llama_cpp_tuned']}, over accelerate {values['over_accelerate']}, over our own resident speed"
        f" {values['over_resident']}; disk {values['disk_read_bytes_per_s'] / 1e9:.2f} GB/s (O_DIRECT)"
    )


def _log(name: str, text: str) -> None:
    print(f"oversize: {name}: {text}", file=sys.stderr, flush=True)
