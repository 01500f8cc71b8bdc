"""`moecxl trace`: what it says, what it writes, and what it refuses before it has written anything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.traces import META, assert_same, make_trace, write_trace
from vllm_moecxl.commands.main import EXIT_USAGE, main
from vllm_moecxl.control.trace import RoutingTrace


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A trace with everything that a trace may have."""
    make_trace().save(path := tmp_path / "trace.npz")
    return path


def summary(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """What the command says, as one JSON object and nothing else."""
    assert main(["trace", "--json", *map(str, arguments)]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    said: dict[str, Any] = json.loads(output.out)
    return said


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one sentence with which the command refuses."""
    code: object
    try:
        code = main(["trace", *map(str, arguments)])
    except SystemExit as stop:  # the way out of argparse
        code = stop.code
    assert code == EXIT_USAGE
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("moecxl trace: ") and output.err.count("\n") == 1
    return output.err


def test_a_trace_is_described(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = summary(capsys, path)
    assert said.pop("caching") == {
        "label": "simulated",
        "basis": "decode",
        # What is left without the prompt: two tokens, [[0, 2], [2, 0]] and [[3, 1], [1, 0]].
        "used_expert_count": 7,
        "distinct_experts_per_request": 2.0,
        "hottest_quarter_share": (0.25 + 0.5) / 2,
        "lru_hit_rate": {"25%": None, "50%": 1 / 8, "75%": 1 / 8},
    }
    assert said == {
        **{"files": [str(path)], "written": [], "model": "toy", "source": "a test", "licence": "Apache-2.0"},
        **{"request_count": 2, "token_count": 3, "prefill_token_count": 1, "decode_token_count": 2},
        **{"layer_count": 2, "expert_count": 4, "topk_count": 2, "domains": {"prose": 1, "c": 1}},
        **{"has_weights": True, "has_lookahead": True, "has_token_ids": True},
    }


def test_the_same_is_said_in_words(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{path}: toy",
        "  source      a test; licence Apache-2.0",
        "  requests    2: prose 1, c 1",
        "  tokens      3: 1 of prompts, 2 of decode",
        "  layers      2, each 2 of 4 experts a token; 7 of 8 are ever used",
        "  with        weights, lookahead, token_ids",
        "Caching, simulated, decode, one request at a time:",
        "  a request uses 2.0 different experts a layer",
        "  the hottest quarter of experts has 37.5% of the activations",
        "  LRU hit rate with slots for 25% of the experts too few for one token, 50% of the experts 12.5%, "
        "75% of the experts 12.5%",
    ]


def test_prompts_stand_for_decode_where_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = write_trace(tmp_path / "trace.npz", prefill=np.array([2, 1]), meta={}, token_ids=np.full(3, -1))
    said = summary(capsys, prompts)
    assert said["caching"]["basis"] == "prompts as if decoded" and said["caching"]["used_expert_count"] == 8
    assert said["model"] is None and not said["has_token_ids"] and said["domains"] == {}
    assert main(["trace", str(prompts)]) == 0
    assert "a model without a name" in capsys.readouterr().out


def test_a_trace_without_requests_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_trace().cut(slice(0, 0)).save(path := tmp_path / "empty.npz")
    said = summary(capsys, path, "--tokens", 3)
    assert said["request_count"] == 0 and said["caching"]["distinct_experts_per_request"] == 0


def test_a_cut_is_written_and_described(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cut.npz"
    said = summary(capsys, path, "--cut", "0:1", "--tokens", 1, "--out", out)
    assert said["request_count"] == said["token_count"] == 1 and said["written"] == [str(out)]
    assert_same(RoutingTrace.load(out), make_trace().cut(slice(0, 1), tokens_per_request=1))


@pytest.mark.parametrize(("text", "chosen"), [("1:", slice(1, None)), (":1", slice(0, 1)), ("1:99", slice(1, 2))])
def test_a_cut_may_leave_its_ends_open(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, chosen: slice
) -> None:
    summary(capsys, path, "--cut", text, "--out", tmp_path / "cut.npz")
    assert_same(RoutingTrace.load(tmp_path / "cut.npz"), make_trace().cut(chosen))


def test_what_was_cut_is_merged_to_the_whole(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [tmp_path / "one.npz", tmp_path / "two.npz"]
    for number, part in enumerate(parts):
        summary(capsys, path, "--cut", f"{number}:{number + 1}", "--out", part)
    said = summary(capsys, *parts, "--merge", "--out", tmp_path / "whole.npz")
    assert said["files"] == [str(part) for part in parts] and said["request_count"] == 2
    assert_same(RoutingTrace.load(tmp_path / "whole.npz"), make_trace())


def test_a_file_that_is_there_is_replaced_only_by_force(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = path.read_bytes()
    assert "is there already: give another path, or replace it with --force" in refusal(
        capsys, path, "--cut", "0:1", "--out", path
    )
    assert path.read_bytes() == before
    summary(capsys, path, "--cut", "0:1", "--out", path, "--force")
    assert RoutingTrace.load(path).request_count == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--cut", "5:9"], "--cut 5:9 takes none of the 2 requests; give START:STOP within 0:2"),
        (["--cut", "5:"], "--cut 5: takes none of the 2 requests"),
        (["--cut", "1:0"], "--cut 1:0 takes none of the 2 requests"),
        (["--cut", "3"], "'3' is not START:STOP, such as 0:16"),
        (["--cut=-1:2"], "'-1:2' is not START:STOP"),
        (["--cut", "a:b"], "'a:b' is not START:STOP"),
        (["--tokens", "0"], "'0' is not a count of tokens, such as 256"),
        (["--tokens", "few"], "'few' is not a count of tokens"),
        (["absent.npz", "--merge"], "'absent.npz': No such file or directory"),
        (["absent.npz"], "2 files were given: take them as one trace with --merge, or give one"),
        (["--plot", "plot.jpg"], "--plot plot.jpg: give a path that ends in .png or .svg"),
        (["--plot", "out.npz"], "--out and --plot are both out.npz: give each a path of its own"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_nothing_is_written(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], told: str
) -> None:
    monkeypatch.chdir(path.parent)
    assert told in refusal(capsys, path, *arguments, "--out", "out.npz")
    assert [entry.name for entry in path.parent.iterdir()] == ["trace.npz"]


def test_traces_of_different_models_are_not_merged(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_trace(tmp_path / "other.npz", meta={**META, "model": "other"})
    assert "its model is 'other' and not 'toy'" in refusal(
        capsys, path, other, "--merge", "--out", tmp_path / "out.npz"
    )
    assert not (tmp_path / "out.npz").exists()


@pytest.mark.parametrize("name", ["absent/out.npz", "x" * 300])
def test_a_path_that_cannot_be_written_is_one_sentence(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert "cannot be written" in refusal(capsys, path, "--out", tmp_path / name)


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_a_plot_is_an_image(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str, start: bytes
) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / f"plot{suffix}"
    assert summary(capsys, path, "--plot", plot)["written"] == [str(plot)]
    assert plot.read_bytes().startswith(start)
    assert "is there already" in refusal(capsys, path, "--plot", plot)


def test_a_plot_without_matplotlib_is_one_sentence(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    told = refusal(capsys, path, "--plot", tmp_path / "plot.png", "--out", tmp_path / "out.npz")
    assert "--plot needs matplotlib: pip install 'vllm_moecxl[plot]', or leave --plot out" in told
    assert not (tmp_path / "plot.png").exists() and not (tmp_path / "out.npz").exists()


def test_the_command_line_starts_without_numpy() -> None:
    code = "import sys; sys.modules['numpy'] = None; from vllm_moecxl.commands.main import main; main(['--help'])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "trace" in said
