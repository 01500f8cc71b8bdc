"""Slab files: what is packed is what is served, and anything else is refused in one sentence."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.support.homes import assert_same_bits, random_bits
from tests.support.slabfiles import FINGERPRINT, Contents, begin, home_of, join, pack, read_slab, split, toy_layer
from vllm_moecxl.data import slabfile, slabwriter
from vllm_moecxl.data.slabfile import ALIGN_BYTES, SlabFile
from vllm_moecxl.data.slabwriter import SlabFileWriter
from vllm_moecxl.errors import CapacityError, ConfigError, IntegrityError, MoeOffloadError

ROOT = Path(__file__).parents[2]
DTYPES = list(slabfile.TO_SAFETENSORS)

#: Sizes around those of sectors and pages, scales [E], and rows of every type.
LAYERS = {
    "every type": Contents({f"t{i}": random_bits((5, 3), dtype, i) for i, dtype in enumerate(DTYPES[1:])}),
    "scales only": Contents({"scale": random_bits((6,), torch.float32)}),
    "one expert": Contents({"w": random_bits((1, 33, 17), torch.bfloat16), "b": random_bits((1,), torch.uint8)}),
    "ragged rows": Contents({f"r{n}": random_bits((4, n), torch.uint8, n) for n in (1, 511, 513, 4095, 4097, 9001)}),
    "whole sectors": Contents({f"s{n}": random_bits((3, n), torch.uint8, n) for n in (512, 1024, 4096, 8192)}),
    "several chunks": Contents({"w": random_bits((2, (2 << 20) + 5), torch.uint8), "s": random_bits((2,), torch.int8)}),
    "fp8": Contents(
        {"w": random_bits((3, 16, 24), torch.float8_e4m3fn), "s": random_bits((3, 2, 1), torch.float8_e8m0fnu)},
        shared={"lut": random_bits((7, 3), torch.int64), "one": torch.tensor(2.5), "flag": torch.tensor([True, False])},
        check=(random_bits((1, 9), torch.bfloat16), random_bits((48, 9), torch.float16)),
    ),
}


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Python that stops by itself after `code`, or waits to be killed where that says so."""
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def refusal(path: Path, error: type[MoeOffloadError] = IntegrityError) -> str:
    """The sentence with which a file is refused."""
    with pytest.raises(MoeOffloadError) as refused:
        SlabFile(path)
    sentence = str(refused.value)
    assert type(refused.value) is error, sentence
    assert str(path) in sentence and "\n" not in sentence
    assert "moecxl pack wrote" in sentence
    return sentence


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.slabs"


@pytest.mark.parametrize("verify", ["off", "load", "fetch"])
def test_every_layer_comes_back_bit_by_bit(path: Path, verify: Any) -> None:
    pack(path, LAYERS)
    for name, layer in LAYERS.items():
        bank, home = home_of(path, verify, name)
        packed = bank.slabs.layers[name]
        assert (packed.name, packed.kernel_name) == (name, "ToyKernel")
        assert packed.expert_count == len(next(iter(layer.tensors.values())))
        assert home.tensors is None and not home.is_direct
        assert [extent.name for extent in home.layout.extents] == list(layer.tensors)
        for expert_id in range(packed.expert_count):
            for row, extent, original in zip(
                read_slab(home, expert_id), home.layout.extents, layer.tensors.values(), strict=True
            ):
                assert_same_bits(row.view(extent.dtype).view(extent.row_shape), original[expert_id])
        assert list(packed.shared) == list(layer.shared)
        beside = zip([*packed.shared.values(), *packed.check], [*layer.shared.values(), *layer.check], strict=True)
        for got, wanted in beside:
            assert_same_bits(got, wanted)
        bank.slabs.close()
    assert bank.slabs.fingerprint == FINGERPRINT
    assert list(bank.slabs.layers) == list(LAYERS)


def test_it_is_a_safetensors_file_whose_tensors_start_aligned(path: Path) -> None:
    pack(path, LAYERS)
    with safe_open(path, framework="pt") as file:
        for name, layer in LAYERS.items():
            for extent, original in layer.tensors.items():
                assert_same_bits(file.get_tensor(f"{name}/{extent}"), original)
        assert file.metadata()["format"] == slabfile.FORMAT
    slabs = SlabFile(path)
    starts = [start for layer in slabs.layers.values() for start in layer.starts]
    assert len(starts) > 20 and not any(start % ALIGN_BYTES for start in starts)
    slabs.close()


def test_tensors_beside_the_slabs_need_not_be_contiguous(path: Path) -> None:
    turned = random_bits((4, 6), torch.int32).t()
    pack(path, {"layers.0": Contents({"w": torch.ones(2, 3)}, shared={"t": turned}, check=(turned,))})
    slabs = SlabFile(path)
    assert_same_bits(slabs.layers["layers.0"].shared["t"], turned)
    assert_same_bits(slabs.layers["layers.0"].check[0], turned)
    slabs.close()


def test_nothing_is_at_its_place_until_it_is_whole(path: Path, tmp_path: Path) -> None:
    writer = begin(path, {"layers.0": toy_layer()})
    aside = tmp_path / ".model.slabs.partial"
    assert list(tmp_path.iterdir()) == [aside]
    assert "it has no header, so packing did not end" in refusal(aside)
    assert writer.finish() == path.stat().st_size
    assert list(tmp_path.iterdir()) == [path]


def test_an_abandoned_file_is_gone(path: Path, tmp_path: Path) -> None:
    begin(path, {"layers.0": toy_layer()}).abandon()
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_replaced_stays_as_it_was_until_the_new_one_is_whole(path: Path) -> None:
    pack(path)
    before = path.read_bytes()
    writer = begin(path, {"layers.1": toy_layer()})
    assert path.read_bytes() == before
    writer.finish()
    slabs = SlabFile(path)
    assert list(slabs.layers) == ["layers.1"]
    slabs.close()


_PACK_AND_WAIT = """
import os, sys, time
from pathlib import Path
from tests.support.slabfiles import begin, toy_layer
from vllm_moecxl.data.slabwriter import SlabFileWriter
def stop(*_):
    print("here", flush=True)
    time.sleep(600)
match sys.argv[2]:
    case "before the header": SlabFileWriter._write_at = (
        lambda self, offset, data, write=SlabFileWriter._write_at: write(self, offset, data) if offset else stop())
    case "before the rename": Path.rename = stop
begin(Path(sys.argv[1]), {"layers.0": toy_layer()}).finish()
"""


@pytest.mark.parametrize("when", ["before the header", "before the rename"])
def test_a_packer_that_is_killed_leaves_no_file_and_is_no_hindrance(path: Path, tmp_path: Path, when: str) -> None:
    packer = child(_PACK_AND_WAIT, path, when)
    with packer:
        assert packer.stdout and packer.stdout.readline() == "here\n"
        with pytest.raises(ConfigError, match=r"another process is packing .*model.slabs: wait for it"):
            begin(path, {"layers.0": toy_layer()})
        packer.send_signal(signal.SIGKILL)
    aside = tmp_path / ".model.slabs.partial"
    assert list(tmp_path.iterdir()) == [aside]
    if when != "before the rename":
        assert "it has no header, so packing did not end" in refusal(aside)
    assert "cannot be opened" in refusal(path, ConfigError)
    pack(path)
    SlabFile(path).close()
    assert list(tmp_path.iterdir()) == [path]


def test_two_packers_of_one_process_are_refused_too(path: Path) -> None:
    writer = begin(path, {"layers.0": toy_layer()})
    with pytest.raises(ConfigError, match="another process is packing"):
        begin(path, {"layers.0": toy_layer()})
    writer.finish()
    SlabFile(path).close()


def test_a_file_that_was_put_in_place_between_opening_and_locking_it_is_left_alone(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = begin(path, {"layers.0": toy_layer()})
    flock = slabwriter.fcntl.flock

    def late(file: int, how: int) -> None:
        first.finish()
        flock(file, how)

    monkeypatch.setattr(slabwriter.fcntl, "flock", late)
    with pytest.raises(ConfigError, match="another process is packing"):
        begin(path, {"layers.0": toy_layer()})
    SlabFile(path).close()


@pytest.mark.parametrize("place", ["missing/model.slabs", "a file/model.slabs"])
def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "a file").write_text("")
    with pytest.raises(ConfigError, match=r"moecxl pack: .* cannot be written \(.*\): name a file in a folder"):
        SlabFileWriter(tmp_path / place, FINGERPRINT, 1, 1)


def test_a_folder_in_the_place_of_the_file_is_an_error_of_ours(path: Path, tmp_path: Path) -> None:
    path.mkdir()
    (path / "inside").write_text("precious")
    writer = begin(path, {"layers.0": toy_layer()})
    with pytest.raises(ConfigError, match=r"model.slabs cannot be put in place \(Is a directory\)"):
        writer.finish()
    writer.abandon()
    assert [(path / "inside").read_text()] == ["precious"] and list(tmp_path.iterdir()) == [path]


def test_a_file_system_without_room_is_refused_before_anything_is_written(path: Path, tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match=r"takes about 1.00 TiB and its file system has .* free: make room"):
        SlabFileWriter(path, FINGERPRINT, 1, 1 << 40)
    assert not list(tmp_path.iterdir())


_PACK_WITHIN = """
import resource, sys
from pathlib import Path
import torch
from tests.support.slabfiles import Contents, begin
from vllm_moecxl.data.slabwriter import SlabFileWriter
from vllm_moecxl.errors import CapacityError
path = Path(sys.argv[1])
for limit in map(int, sys.argv[2:]):
    writer = SlabFileWriter(path, {}, 1, 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        writer.add_layer("layers.0", "K", {"w": torch.ones(4, 100_000, dtype=torch.uint8)}, {}, [])
        print(writer.finish(), [entry.name for entry in path.parent.iterdir()])
    except CapacityError as error:
        writer.abandon()
        print(error, [entry.name for entry in path.parent.iterdir()])
"""


def test_a_disk_that_fills_up_is_one_error_and_leaves_nothing_behind(path: Path) -> None:
    byte_count = 80 * 1024 + 4 * 100_000 + 4 * 32 + 32
    limits = [1000, 200_000, byte_count - 100, byte_count - 1, byte_count]
    with child(_PACK_WITHIN, path, *limits) as packer:
        assert packer.stdout
        *refused, packed = packer.stdout.read().splitlines()
    assert refused == [f"moecxl pack: writing {path} failed (File too large): make room on its disk []"] * 4
    assert packed == f"{byte_count} ['model.slabs']"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")
def test_a_disk_that_is_full_is_one_error_and_leaves_nothing_behind(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system: {mounted.stderr.strip()}")
    try:
        path = disk / "model.slabs"
        writer = SlabFileWriter(path, FINGERPRINT, 1, 1)
        with pytest.raises(CapacityError, match=r"writing .*model.slabs failed \(No space left on device\): make room"):
            writer.add_layer("layers.0", "K", {"w": torch.ones(4, 100_000, dtype=torch.uint8)}, {}, [])
        writer.abandon()
        assert not list(disk.iterdir())
        writer = SlabFileWriter(path, FINGERPRINT, 1, 1)
        writer.add_layer("layers.0", "K", {"w": torch.ones(4, 10_000, dtype=torch.uint8)}, {}, [])
        # The header is a hole until it is written: the disk may be full by then.
        (disk / "other").write_bytes(bytes(256 * 1024 - 4096 * 12))
        with pytest.raises(CapacityError, match=r"failed \(No space left on device\): make room"):
            writer.finish()
        writer.abandon()
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("failing", ["fsync", "tail", "header"])
def test_a_disk_that_fails_is_one_error(path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    writer = begin(path, {"layers.0": toy_layer()})

    pwrite = os.pwrite

    def fail(file: int, data: bytes = b"", offset: int = -1) -> int:
        if failing == "header" and offset:
            return pwrite(file, data, offset)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync" if failing == "fsync" else "pwrite", fail)
    with pytest.raises(CapacityError, match=r"writing .*model.slabs failed \(Input/output error\)"):
        writer.finish()


def test_a_file_that_is_cut_anywhere_is_refused(path: Path) -> None:
    pack(path)
    whole = path.read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    lengths = {0, 1, 7, 8, 9, 100, header_end - 1, header_end, header_end + 1, len(whole) - 33, len(whole) - 32}
    for length in sorted(lengths | {len(whole) - 1, *range(header_end, len(whole), 509)}):
        path.write_bytes(whole[:length])
        refusal(path)
    path.write_bytes(whole + b"\0")
    assert f"it has {len(whole) + 1} bytes and its header says {len(whole)}" in refusal(path)
    path.write_bytes(whole)
    SlabFile(path).close()


@pytest.fixture
def quick_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where that can be had: for files that are written thousands of times."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        yield Path(folder) / "model.slabs"


def test_one_bit_of_header_tail_or_seal_is_noticed(quick_path: Path) -> None:
    path = pack(quick_path)
    header, data = split(path)
    whole = join(json.dumps(header).encode(), data, int(header["__metadata__"]["tail_start"]))
    header_end = 8 + int.from_bytes(whole[:8], "little")
    tail_start = header_end + int(header["__metadata__"]["tail_start"])
    path.write_bytes(whole)
    SlabFile(path).close()
    text_end = len(whole[:header_end].rstrip())
    places = [*range(text_end), *range(text_end, header_end, 997), *range(tail_start, len(whole))]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        refusal(path)


def test_one_bit_of_a_slab_is_noticed_when_it_is_read_unless_nobody_looks(path: Path) -> None:
    pack(path)
    _, clean = home_of(path, "off")
    rows = read_slab(clean, 1)
    for extent_id, start in enumerate(clean.shards[0].rows):
        whole = bytearray(path.read_bytes())
        whole[start.start + start.row_bytes + 2] ^= 0x10  # type: ignore[union-attr]
        damaged = path.with_name("damaged.slabs")
        damaged.write_bytes(whole)
        for verify in ("load", "fetch"):
            _, home = home_of(damaged, verify)
            read_slab(home, 0)
            with pytest.raises(IntegrityError, match=r"expert 1 of layers.0 is not what was stored in bank file:dam"):
                read_slab(home, 1)
        _, home = home_of(damaged, "off")
        assert sum(int((a != b).sum()) for a, b in zip(rows, read_slab(home, 1), strict=True)) == 1, extent_id


@pytest.mark.parametrize(("verify", "is_noticed"), [("load", False), ("fetch", True)])
def test_a_slab_that_changes_after_its_first_read_is_noticed_by_verify_fetch(
    path: Path, verify: Any, is_noticed: bool
) -> None:
    pack(path)
    bank, home = home_of(path, verify)
    before = read_slab(home, 2)
    start = bank.slabs.layers["layers.0"].starts[0] + 2 * home.layout.extents[0].row_bytes
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes([before[0][0] ^ 1]))
    if is_noticed:
        with pytest.raises(IntegrityError):
            read_slab(home, 2)
    else:
        assert read_slab(home, 2)[0][0] == before[0][0] ^ 1


def make_foreign(kind: str, path: Path) -> None:
    match kind:
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("This is no slab file, whatever its name says.\n" * 10)
        case "zeros":
            path.write_bytes(bytes(100_000))
        case "checkpoint":
            shutil.copy(ROOT / "tests/fixtures/mixtral-tiny/model.safetensors", path)
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "loop":
            path.symlink_to(path)


@pytest.mark.parametrize(
    ("kind", "error", "told"),
    [
        ("empty", IntegrityError, "it is too short for a header"),
        ("text", IntegrityError, "its header is longer than the file"),
        ("zeros", IntegrityError, "it has no header"),
        ("checkpoint", IntegrityError, "it has another format"),
        ("folder", ConfigError, "is no regular file"),
        ("pipe", ConfigError, "is no regular file"),
        ("device", ConfigError, "is no regular file"),
        ("loop", ConfigError, "cannot be opened (Too many levels of symbolic links)"),
        ("missing", ConfigError, "cannot be opened (No such file or directory)"),
    ],
)
def test_what_is_no_slab_file_is_refused(path: Path, kind: str, error: type[MoeOffloadError], told: str) -> None:
    make_foreign(kind, path)
    assert told in refusal(path, error)


def test_a_file_that_may_not_be_read_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(path)
    if os.geteuid():
        path.chmod(0)
    else:  # nothing is closed to root

        def refuse(*_: object) -> int:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr(os, "open", refuse)
    assert "cannot be opened (Permission denied)" in refusal(path, ConfigError)


def test_every_difference_between_fingerprints_is_named(path: Path) -> None:
    pack(path)
    slabs = SlabFile(path)
    slabs.require_fingerprint(FINGERPRINT)
    with pytest.raises(IntegrityError) as refused:
        slabs.require_fingerprint({"model": "other", "extra": "1"})
    sentence = str(refused.value)
    assert "kernel ToyKernel instead of unknown, " in sentence and "model toy instead of other" in sentence
    assert "extra unknown instead of 1" in sentence and "run moecxl pack for this model and this engine" in sentence
    slabs.close()


def _set(header: dict[str, Any], *keys: str, value: object) -> None:
    for key in keys[:-1]:
        header = header[key]
    header[keys[-1]] = value


def _layer(**changes: object) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        metadata = header["__metadata__"]
        metadata["layers"] = json.dumps([{**json.loads(metadata["layers"])[0], **changes}])

    return change


def _metadata(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda header: _set(header, "__metadata__", key, value=value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_metadata("layers", "[[[["), "its list of layers is no JSON"),
        (_metadata("layers", 5), "its list of layers is no JSON"),
        (_metadata("layers", "{}"), "its list of layers is damaged"),
        (_metadata("layers", json.dumps([0] * 99)), "its list of layers is damaged"),
        (_metadata("layers", "[0]"), "it describes no layer"),
        (_metadata("layers", "[{}]"), "it describes no layer"),
        (_metadata("fingerprint", None), "its fingerprint is no JSON"),
        (_metadata("fingerprint", "[]"), "its fingerprint is damaged"),
        (_metadata("fingerprint", '{"a": NaN}'), "its fingerprint is damaged"),
        (_metadata("tail_start", "x"), "it has no tail"),
        (_metadata("tail_start", 0), "it has no tail"),
        (_metadata("format", "vllm_moecxl slabs 2"), "it has another format"),
        (_layer(unknown=1), "it describes no layer"),
        (_layer(name=3), "it describes a layer wrongly"),
        (_layer(name="other"), "it lacks a tensor of a layer"),
        (_layer(kernel_name=None), "it describes a layer wrongly"),
        (_layer(expert_count=True), "it describes a layer wrongly"),
        (_layer(expert_count=0), "it describes a layer wrongly"),
        (_layer(expert_count=float("nan")), "it describes a layer wrongly"),
        (_layer(expert_count=4), "not a row per expert"),
        (_layer(expert_count=1 << 62), "not a row per expert"),
        (_layer(extents=[]), "it describes a layer wrongly"),
        (_layer(extents=["w", "w"]), "it describes a layer wrongly"),
        (_layer(extents=["w", []]), "it describes a layer wrongly"),
        (_layer(extents="w"), "it describes a layer wrongly"),
        (_layer(extents=["w", "absent"]), "it lacks a tensor"),
        (_layer(extents=["digests"]), "not a row per expert"),
        (_layer(shared=["absent"]), "it lacks a tensor"),
        (_layer(check_count=2), "it lacks a tensor"),
        (_layer(check_count=1 << 60), "it describes a layer wrongly"),
        (lambda header: header.pop("layers.0/digests"), "its tensors overlap or leave gaps"),
        (lambda header: _set(header, "layers.0/digests", "shape", value=[32, 3]), "it lacks digests"),
        (lambda header: _set(header, "layers.0/w", "dtype", value=[]), "its header describes a tensor wrongly"),
        (lambda header: _set(header, "layers.0/w", "dtype", value="F4"), "its header describes a tensor wrongly"),
        (lambda header: _set(header, "layers.0/w", "shape", value=[105] + [1] * 8), "describes a tensor wrongly"),
        (lambda header: _set(header, "layers.0/w", "shape", value=[-3, -35]), "describes a tensor wrongly"),
        (lambda header: _set(header, "layers.0/w", "shape", value=[1 << 62] * 8), "another size than its shape"),
        (lambda header: _set(header, "layers.0/w", "data_offsets", value=[0]), "describes a tensor wrongly"),
        (lambda header: _set(header, "layers.0/w", value=7), "describes a tensor by no object"),
        (lambda header: header.pop("__metadata__"), "it has another format"),
        (lambda header: (_layer(shared=["x"])(header), _set(header, "layers.0/shared/x", value=_EMPTY)), "it lacks a"),
    ],
)
def test_a_header_that_no_packer_wrote_is_refused_though_its_seal_fits(
    path: Path, change: Callable[[dict[str, Any]], None], told: str
) -> None:
    pack(path)
    header, data = split(path)
    tail_start = int(header["__metadata__"]["tail_start"])
    path.write_bytes(join(json.dumps(header).encode(), data, tail_start))
    SlabFile(path).close()  # the seal of an unchanged header fits
    change(header)
    path.write_bytes(join(json.dumps(header).encode(), data, tail_start))
    assert told in refusal(path)


_EMPTY = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 50_000, b"[]", b"7", b"\xff\xfe", b'{"a": 1', b"9" * 5000])
def test_a_header_that_is_no_json_object_is_refused(path: Path, text: bytes) -> None:
    path.write_bytes(join(text, b"", None))
    assert "its header is no JSON" in refusal(path)


def test_opening_and_refusing_leaks_neither_descriptors_nor_threads(path: Path, tmp_path: Path) -> None:
    pack(path)
    bad = tmp_path / "bad.slabs"
    bad.write_bytes(path.read_bytes()[:-1])

    def count() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    before = count()
    for _ in range(50):
        SlabFile(path).close()
        refusal(bad)
        refusal(tmp_path, ConfigError)
    assert count() == before
