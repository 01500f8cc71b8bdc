"""Routing traces: what is saved comes back, what is not a trace is refused, and what they say about caching."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.traces import EXPERTS, META, TOPK, assert_same, make_trace, shared_traces, write_trace
from vllm_moecxl.control.trace import RoutingTrace, TraceError, replace_file
from vllm_moecxl.control.trace_stats import distinct_counts, heat, hottest_share, reuse_distances
from vllm_moecxl.errors import ConfigError

ROOT = Path(__file__).parents[2]


def refusal(path: Path) -> str:
    """The sentence with which a file is refused."""
    with pytest.raises(TraceError) as refused:
        RoutingTrace.load(path)
    sentence = str(refused.value)
    assert repr(str(path)) in sentence and "\n" not in sentence
    assert refused.value.finding in sentence and sentence.endswith(
        "record one with the option trace, or give another file"
    )
    return sentence


def long_trace(request_count: int = 20, expert_count: int = 8, topk_count: int = 2, seed: int = 0) -> RoutingTrace:
    """Requests of different lengths, some of them prompts alone, some without a prompt, one empty."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 30, request_count)
    lengths[3] = 0
    token_count = int(lengths.sum())
    scores = generator.random((token_count, 3, expert_count)) + np.linspace(0, 0.5, expert_count)
    return RoutingTrace(
        topk=np.argsort(-scores, axis=2)[:, :, :topk_count],
        weights=None,
        lookahead=None,
        req=np.concatenate([[0], np.cumsum(lengths)]),
        prefill=generator.integers(0, lengths + 1),
        token_ids=np.arange(token_count),
        layer_ids=np.arange(3),
        meta={"num_experts": expert_count},
    )


@pytest.mark.parametrize("changes", [{}, {"weights": None}, {"lookahead": None}, {"domain": None}])
def test_what_is_saved_comes_back(tmp_path: Path, changes: dict[str, Any]) -> None:
    trace = make_trace(**changes)
    trace.save(tmp_path / "trace.npz")
    assert_same(RoutingTrace.load(tmp_path / "trace.npz"), trace)


def test_the_file_has_the_types_of_the_format(tmp_path: Path) -> None:
    make_trace(weights=None).save(path := tmp_path / "trace.npz")
    with np.load(path) as fields:
        assert {name: fields[name].dtype.str for name in fields if name not in ("domain", "meta")} == {
            **{"topk": "|u1", "lookahead": "|u1", "weights": "<f2"},
            **dict.fromkeys(("req", "prefill", "token_ids", "layer_ids"), "<i4"),
        }
        assert fields["weights"].shape == (0,)
        assert json.loads(str(fields["meta"])) == META


def test_more_than_256_experts_are_stored_in_16_bits(tmp_path: Path) -> None:
    wide = make_trace(topk=TOPK.astype(np.int64) + 300, lookahead=None, meta={"num_experts": 512})
    wide.save(path := tmp_path / "trace.npz")
    loaded = RoutingTrace.load(path)
    assert loaded.topk.dtype == np.uint16 and np.array_equal(loaded.topk, TOPK.astype(int) + 300)
    assert make_trace(meta={"num_experts": 256}).topk.dtype == np.uint8
    assert make_trace(meta={"num_experts": 257}).topk.dtype == np.uint16


def test_counts_of_everything() -> None:
    trace = make_trace()
    assert (trace.token_count, trace.layer_count, trace.topk_count, trace.request_count) == (3, 2, 2, 2)
    assert trace.expert_count == 4 and make_trace(meta={}, topk=TOPK[:, :, ::-1] + 2).expert_count == 6
    assert list(trace.requests()) == [(0, slice(0, 2)), (1, slice(2, 3))]
    assert trace.decode_mask().tolist() == [False, True, True]
    assert np.array_equal(trace.counts(slice(2, 3)), [[0, 1, 0, 1], [1, 1, 0, 0]])
    assert trace.as_decode().prefill.tolist() == [0, 0]


def test_a_trace_without_requests_is_a_trace(tmp_path: Path) -> None:
    empty = make_trace().cut(slice(0, 0))
    empty.save(path := tmp_path / "trace.npz")
    assert RoutingTrace.load(path).request_count == 0
    assert reuse_distances(empty).lru_hit_rates().tolist() == [0] * (EXPERTS + 1)


def test_arrays_that_the_format_does_not_know_are_left_out(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "trace.npz", vocab=np.array(["a", "b"]), request_number=np.arange(2))
    assert RoutingTrace.load(path).request_count == 2


def test_a_cut_has_the_chosen_requests_and_their_first_tokens() -> None:
    trace = long_trace()
    for chosen, limit in ((slice(2, 9, 3), None), (slice(None, None, -1), 4), (slice(0, 1), 10**30), (slice(3, 4), 2)):
        cut = trace.cut(chosen, tokens_per_request=limit)
        numbers = range(trace.request_count)[chosen]
        kept = [range(tokens.start, tokens.stop)[:limit] for _, tokens in trace.requests()]
        tokens = [token for number in numbers for token in kept[number]]
        assert cut.token_ids.tolist() == tokens and np.array_equal(cut.topk, trace.topk[tokens])
        assert cut.prefill.tolist() == [min(trace.prefill[number], len(kept[number])) for number in numbers]
        assert np.diff(cut.req).tolist() == [len(kept[number]) for number in numbers]


def test_decode_alone_is_what_the_mask_says() -> None:
    trace = long_trace()
    decode = trace.decode_only()
    assert np.array_equal(decode.token_ids, trace.token_ids[trace.decode_mask()])
    assert np.array_equal(np.diff(decode.req), np.diff(trace.req) - trace.prefill) and not decode.prefill.any()


def test_a_part_has_as_many_experts_as_the_whole() -> None:
    trace = make_trace(meta={})
    assert trace.cut(slice(0, 0)).expert_count == trace.cut(slice(0, 1)).expert_count == trace.expert_count == EXPERTS
    assert trace.as_decode().decode_only().expert_count == EXPERTS


def test_merged_parts_are_the_whole() -> None:
    trace = make_trace()
    assert_same(RoutingTrace.merge([trace.cut(slice(0, 1)), trace.cut(slice(1, 2))]), trace)


def test_a_merge_keeps_what_every_trace_has_and_says_where_it_is_from() -> None:
    other = make_trace(weights=None, domain=None, meta={"num_experts": EXPERTS, "source": "another test"})
    merged = RoutingTrace.merge([make_trace(), other])
    assert merged.weights is None and merged.lookahead is not None and merged.domain is not None
    assert merged.domain.tolist() == ["prose", "c", "", ""] and merged.req.tolist() == [0, 2, 3, 5, 6]
    assert merged.meta == {**META, "source": ["a test", "another test"]}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"meta": {**META, "model": "other"}}, "its model is 'other' and not 'toy'"),
        ({"meta": {**META, "num_experts": 8}}, "its num_experts is 8 and not 4"),
        ({"topk": TOPK[..., :1], "weights": None, "lookahead": None}, "its tokens use 1 experts a layer and not 2"),
        ({"layer_ids": np.array([3, 6])}, r"it has the layers \[3, 6\] and not \[3, 5\]"),
        ({"topk": TOPK + 1, "meta": {}}, "routes to expert 4 and another one's model has 4 experts"),
    ],
)
def test_traces_of_different_models_are_not_merged(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=rf"{told}.*; merge traces of one model only$"):
        RoutingTrace.merge([make_trace(), make_trace(**changes)])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"topk": TOPK[0]}, "its topk is uint8 of shape (2, 2), not [tokens, layers, k] integers"),
        ({"topk": TOPK.astype(np.float32)}, "its topk is float32"),
        ({"topk": TOPK + 1}, "its topk routes to experts 1 to 4 and a layer has 4"),
        ({"topk": TOPK.astype(np.int8) - 1}, "its topk routes to experts -1 to 2 and a layer has 4"),
        ({"topk": TOPK.astype(np.int64) + 65536, "meta": {}}, "its topk routes to experts 65536 to 65539"),
        ({"topk": TOPK[:, :0]}, "has no layers, or more choices than experts"),
        ({"topk": TOPK[:, :, :0]}, "has no layers, or more choices than experts"),
        ({"topk": np.zeros((3, 2, 5), int)}, "has no layers, or more choices than experts"),
        ({"weights": np.zeros((3, 2, 1), np.float16)}, "its weights has the shape (3, 2, 1)"),
        ({"weights": np.zeros((3, 2, 2), np.int8)}, "its weights are int8, not floats"),
        ({"lookahead": TOPK[:2]}, "its lookahead has the shape (2, 2, 2)"),
        ({"lookahead": TOPK + 1}, "its lookahead routes to experts 1 to 4"),
        ({"req": np.array([[0, 3]])}, "its req does not divide its 3 tokens"),
        ({"req": np.array([0.0, 3.0])}, "its req is float64, not integers"),
        ({"req": np.array([], dtype=np.int32)}, "its req does not divide its 3 tokens"),
        ({"req": np.array([1, 3])}, "its req does not divide its 3 tokens"),
        ({"req": np.array([0, 2])}, "its req does not divide its 3 tokens"),
        ({"req": np.array([0, 3, 2, 3])}, "its req goes back: request 1 ends before it begins"),
        ({"req": np.array([0, 2**63 + 5, 3], np.uint64)}, "its req has values from 0 to"),
        ({"prefill": np.zeros(3, int)}, "its prefill has the shape (3,)"),
        ({"prefill": np.array([0, 2])}, "its request 1 has 1 tokens, of them 2 of the prompt"),
        ({"prefill": np.array([-1, 0])}, "its request 0 has 2 tokens, of them -1 of the prompt"),
        ({"token_ids": np.zeros(2, int)}, "its token_ids has the shape (2,)"),
        ({"token_ids": np.full(3, 1 << 40)}, "its token_ids has values from 1099511627776"),
        ({"layer_ids": np.arange(3)}, "its layer_ids has the shape (3,)"),
        ({"domain": np.array(["one"])}, "its domain has the shape (1,)"),
        ({"domain": np.arange(2)}, "its domain is int64, not text"),
        ({"meta": [1]}, "its meta is not a JSON object"),
        ({"meta": {"num_experts": "8"}}, "its num_experts is '8', not a count up to 65536"),
        ({"meta": {"num_experts": True}}, "its num_experts is True"),
        ({"meta": {"num_experts": 0}}, "its num_experts is 0"),
        ({"meta": {"num_experts": 65537}}, "its num_experts is 65537"),
        ({"topk": None}, "it is not a routing trace: it has no topk"),
        ({"req": None, "prefill": None}, "it is not a routing trace: it has no req, prefill"),
        ({"topk": np.array([{"an": "object"}])}, "it is not a routing trace (an .npz file without pickles)"),
    ],
)
def test_a_trace_that_contradicts_itself_is_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    assert told in refusal(write_trace(tmp_path / "trace.npz", **changes))


def test_a_trace_whose_meta_is_not_json_is_refused(tmp_path: Path) -> None:
    with np.load(write_trace(tmp_path / "whole.npz")) as fields:
        np.savez(path := tmp_path / "trace.npz", **{**fields, "meta": np.array("{model: toy}")})
    assert "its meta is not JSON" in refusal(path)


def test_a_new_trace_that_contradicts_itself_is_no_trace() -> None:
    with pytest.raises(ValueError, match="its prefill has the shape"):
        replace(make_trace(), prefill=np.zeros(1, int))


@pytest.mark.parametrize("content", [b"", b"no archive at all", b"PK\x03\x04 cut short", b"\x80\x04N."])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "trace.npz"
    path.write_bytes(content)
    assert "it is not a routing trace" in refusal(path)


def test_a_single_array_is_refused(tmp_path: Path) -> None:
    np.save(path := tmp_path / "topk.npy", TOPK)
    assert "it is not a routing trace" in refusal(path)


def test_a_damaged_trace_is_refused_wherever_it_is_cut_short(tmp_path: Path) -> None:
    whole = write_trace(tmp_path / "whole.npz").read_bytes()
    path = tmp_path / "cut.npz"
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        assert "it is not a routing trace" in refusal(path)


@pytest.mark.parametrize("is_compressed", [False, True])
def test_a_damaged_archive_is_refused_or_read_and_nothing_else(tmp_path: Path, is_compressed: bool) -> None:
    whole_path = write_trace(tmp_path / "whole.npz")
    if is_compressed:
        RoutingTrace.load(whole_path).save(whole_path)
    whole = whole_path.read_bytes()
    path = tmp_path / "damaged.npz"
    refused = 0
    for place in range(0, len(whole), 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            RoutingTrace.load(path)
        except TraceError:
            refused += 1
    assert refused > len(whole) // 5 // 4


@pytest.mark.parametrize(("name", "told"), [("absent.npz", "No such file or directory"), ("", "Is a directory")])
def test_a_path_that_cannot_be_read_is_refused(tmp_path: Path, name: str, told: str) -> None:
    assert told in refusal(tmp_path / name)


@pytest.mark.parametrize("name", ["absent/trace.npz", "file/trace.npz", "", "x" * 300, "folder"])
def test_a_path_that_cannot_be_written_is_one_sentence_and_nothing_changes(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("as it was")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=r"cannot be written: [^\n]+; give a path that can be written$"):
        make_trace().save(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text() == "as it was"


def test_what_is_not_a_file_is_not_replaced_by_one(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")  # for a device: a test must not put the machine's own at risk
    with pytest.raises(ConfigError, match="it is there and not a file"):
        replace_file(pipe, b"", "the trace")
    assert pipe.is_fifo()


_SAVE_WITHIN = """
import resource, sys
from pathlib import Path
from tests.support.traces import make_trace
from vllm_moecxl.errors import CapacityError
path = Path(sys.argv[1])
path.write_text("as it was")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    make_trace().save(path)
except CapacityError as error:
    print(error, [entry.name for entry in path.parent.iterdir()], path.read_text())
"""


def test_a_disk_that_fills_up_is_one_error_and_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    command = [sys.executable, "-W", "error", "-c", _SAVE_WITHIN, str(path)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert (
        said.stdout
        == (
            f"the routing trace {str(path)!r} cannot be written: File too large; free space there or give another path "
            "['trace.npz'] as it was\n"
        )
        and not said.stderr
    )


def lru_hit_rate(trace: RoutingTrace, slot_count: int) -> float:
    """By serving the trace: look all experts of a token up, then fetch what is missing and evict the oldest."""
    hit_count = 0
    for layer in range(trace.layer_count):
        slots: dict[int, None] = {}
        for expert_ids in trace.topk[:, layer].tolist():
            hit_count += sum(expert_id in slots for expert_id in expert_ids)
            for expert_id in expert_ids:
                slots.pop(expert_id, None)
                slots[expert_id] = None
            while len(slots) > slot_count:
                del slots[next(iter(slots))]
    return hit_count / trace.topk.size


@pytest.mark.parametrize(("expert_count", "topk_count"), [(8, 2), (16, 5), (4, 4), (8, 1)])
def test_reuse_distances_give_the_hit_rate_of_every_lru_cache(expert_count: int, topk_count: int) -> None:
    trace = long_trace(expert_count=expert_count, topk_count=topk_count)
    rates = reuse_distances(trace).lru_hit_rates()
    assert rates[0] == 0 and len(rates) == expert_count + 1
    for slot_count in range(topk_count, expert_count + 1):
        assert rates[slot_count] == pytest.approx(lru_hit_rate(trace, slot_count), abs=1e-12)


def test_every_use_has_a_distance_or_is_the_first() -> None:
    distances = reuse_distances(long_trace())
    assert distances.lookup_count == long_trace().topk.size and distances.first_counts.tolist() == [8, 8, 8]


def test_heat_is_each_experts_share_of_its_layer() -> None:
    shares = heat(make_trace())
    assert np.allclose(shares, np.array([[2, 2, 1, 1], [2, 1, 2, 1]]) / 6)
    assert hottest_share(shares, 0.25) == pytest.approx(1 / 3) and hottest_share(shares, 0.5) == pytest.approx(2 / 3)
    assert not heat(make_trace().cut(slice(0, 0))).any()


def test_distinct_experts_are_counted_by_request() -> None:
    assert distinct_counts(make_trace()).tolist() == [[3, 3], [2, 2]]
    assert distinct_counts(make_trace(topk=TOPK * 0 + np.array([1, 2])).cut(slice(0, 1))).tolist() == [[2, 2]]


@pytest.mark.parametrize(
    ("name", "layer_count", "lru"),
    [
        ("public/mixtral8x7b_speculative-moe.npz", 32, (37.3, 61.5, 81.8)),
        ("public/deepseek-v2-lite_moe-beyond_sample.npz", 26, (48.3, 72.1, 89.7)),
        ("own/mixtral-mini_text.npz", 8, (44.2, 71.2, 89.3)),
        ("own/mixtral-mini_generated.npz", 8, (43.7, 70.6, 89.0)),
    ],
)
def test_the_published_traces_are_read(name: str, layer_count: int, lru: tuple[float, ...], tmp_path: Path) -> None:
    trace = RoutingTrace.load(shared_traces() / name)
    trace.cut(slice(0, 2)).save(path := tmp_path / "trace.npz")
    assert_same(RoutingTrace.load(path), trace.cut(slice(0, 2)))
    decode = trace.decode_only() if trace.decode_mask().any() else trace.as_decode()
    rates = reuse_distances(decode).lru_hit_rates()
    count = trace.expert_count
    assert trace.layer_count == layer_count
    assert [round(100 * rates[slots], 1) for slots in (count // 4, count // 2, 3 * count // 4)] == list(lru)


def test_aggregates_are_not_a_routing_trace() -> None:
    told = refusal(shared_traces() / "public" / "olmoe_mixtral_domain_counts.npz")
    assert "it has no topk, weights, req, prefill, token_ids, layer_ids" in told
