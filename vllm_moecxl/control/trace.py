"""Routing traces: which experts every token of every request used, in one file format for recording and replay."""

from __future__ import annotations

import errno
import io
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_moecxl.errors import CapacityError, ConfigError

#: Experts that a layer may have: their ids are stored in 16 bits at most.
EXPERT_COUNT_MAX = 1 << 16

_REQUIRED = ("topk", "weights", "req", "prefill", "token_ids", "layer_ids", "meta")
_OPTIONAL = ("lookahead", "domain")
_REMEDY = "record one with the option trace, or give another file"

#: What reading a file of another kind, or a damaged one, raises; zipfile raises RuntimeError for what it does not know.
_FOREIGN = (EOFError, KeyError, MemoryError, OverflowError, RuntimeError, TypeError, ValueError)
_DAMAGED = (*_FOREIGN, zipfile.BadZipFile, zlib.error)


class TraceError(ConfigError):
    """A file is no routing trace, or it contradicts itself.

    Attributes:
        finding: what is wrong with it, without its name and without a remedy.
    """

    def __init__(self, path: Path, finding: str) -> None:
        super().__init__(f"routing trace {str(path)!r}: {finding}; {_REMEDY}")
        self.finding = finding


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """The routing of one model over many requests, one after another.

    Any integers will do for the arrays of a new trace: they are brought to the types given here.

    Attributes:
        topk: [tokens, layers, k] uint8, or uint16 where a layer has more than 256 experts: expert ids in the router's
            order. Convert before doing arithmetic with them.
        weights: [tokens, layers, k] float16, the router's weights as they were; None where the source has none.
        lookahead: shape and type of `topk`: what layer l's gate makes of layer l - 1's input, and layer 0's own choice;
            None where nobody recorded it.
        req: [requests + 1] int64, where each request's tokens begin; the last one is the number of tokens.
        prefill: [requests] int32, prompt tokens at the request's start; 0 where only decode was recorded.
        token_ids: [tokens] int32, by the model's tokenizer; -1 where unknown. In published traces they may number the
            words of a list of their own.
        layer_ids: [layers] int32, the model's numbers of its MoE layers.
        domain: [requests] str, what kind of text it is; None where nobody knows.
        meta: model, num_experts, source, licence; what else the recorder has to say. JSON.

    Raises:
        ValueError: the fields contradict each other. The text says how, and fits behind the name of a file.
    """

    topk: npt.NDArray[np.integer]
    weights: npt.NDArray[np.float16] | None
    lookahead: npt.NDArray[np.integer] | None
    req: npt.NDArray[np.int64]
    prefill: npt.NDArray[np.int32]
    token_ids: npt.NDArray[np.int32]
    layer_ids: npt.NDArray[np.int32]
    domain: npt.NDArray[np.str_] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_routing()
        self._check_requests()

    @property
    def token_count(self) -> int:
        """Tokens of all requests."""
        return int(self.topk.shape[0])

    @property
    def layer_count(self) -> int:
        """MoE layers."""
        return int(self.topk.shape[1])

    @property
    def topk_count(self) -> int:
        """Experts that a token uses in a layer."""
        return int(self.topk.shape[2])

    @property
    def request_count(self) -> int:
        """Requests."""
        return len(self.prefill)

    @property
    def expert_count(self) -> int:
        """Experts of a layer; where the trace does not say, as many as its ids imply."""
        declared = self.meta.get("num_experts")
        return max(int(self.topk.max(initial=0)) + 1, self.topk_count) if declared is None else int(declared)

    def requests(self) -> Iterator[tuple[int, slice]]:
        """Each request's number and where its tokens are."""
        for number, (start, stop) in enumerate(pairwise(self.req.tolist())):
            yield number, slice(start, stop)

    def decode_mask(self) -> npt.NDArray[np.bool_]:
        """[tokens] bool, which of them are not part of a prompt."""
        lengths = np.diff(self.req)
        return np.arange(self.token_count) - np.repeat(self.req[:-1], lengths) >= np.repeat(self.prefill, lengths)

    def counts(self, tokens: slice = slice(None)) -> npt.NDArray[np.int64]:
        """[layers, experts] int64, how often some of the tokens (all of them) use each expert."""
        first_of_layer = np.arange(self.layer_count)[:, None] * self.expert_count
        flat = (self.topk[tokens] + first_of_layer).ravel()
        counts = np.bincount(flat, minlength=self.layer_count * self.expert_count)
        return counts.reshape(self.layer_count, self.expert_count)

    def as_decode(self) -> RoutingTrace:
        """The trace with prompts taken for decode. Routing is causal: token by token it would have been the same."""
        return replace(self, prefill=np.zeros_like(self.prefill))

    def cut(self, requests: slice = slice(None), *, tokens_per_request: int | None = None) -> RoutingTrace:
        """Some of the requests, and the first tokens of each; a copy.

        Args:
            requests: which ones, in this order.
            tokens_per_request: how many tokens each keeps at most; None for all.
        """
        assert tokens_per_request is None or tokens_per_request >= 0
        chosen = np.arange(self.request_count)[requests]
        lengths = np.diff(self.req)[chosen]
        if tokens_per_request is not None:
            lengths = np.minimum(lengths, min(tokens_per_request, self.token_count))
        return self._part(chosen, self.req[chosen], lengths, np.minimum(self.prefill[chosen], lengths))

    def decode_only(self) -> RoutingTrace:
        """The trace without its prompts; a copy."""
        lengths = np.diff(self.req) - self.prefill
        return self._part(
            slice(None), self.req[:-1] + self.prefill, lengths.astype(np.int64), np.zeros_like(self.prefill)
        )

    @classmethod
    def merge(cls, traces: Sequence[RoutingTrace]) -> RoutingTrace:
        """The requests of several traces of one model, one trace after another.

        Weights and lookahead stay where every trace has them. What their `meta` disagree about becomes a list.

        Raises:
            ConfigError: they are not of one model.
        """
        assert traces
        for number, trace in enumerate(traces[1:], start=2):
            if difference := _difference(traces[0], trace):
                raise ConfigError(
                    f"trace {number} does not go with trace 1: {difference}; merge traces of one model only"
                )
        meta = _merged_meta([trace.meta for trace in traces])
        if "num_experts" in meta and (widest := max(t.expert_count for t in traces)) > meta["num_experts"]:
            raise ConfigError(
                f"one trace routes to expert {widest - 1} and another one's model has {meta['num_experts']} experts a "
                "layer; merge traces of one model only"
            )
        starts = np.cumsum([0] + [trace.token_count for trace in traces])
        requests = [trace.req[:-1] + start for trace, start in zip(traces, starts[:-1], strict=True)]
        has_domain = any(trace.domain is not None for trace in traces)
        domains = [np.full(t.request_count, "") if t.domain is None else t.domain for t in traces]
        return cls(
            topk=np.concatenate([trace.topk for trace in traces]),
            weights=_joined([trace.weights for trace in traces]),
            lookahead=_joined([trace.lookahead for trace in traces]),
            req=np.concatenate([*requests, starts[-1:]]),
            prefill=np.concatenate([trace.prefill for trace in traces]),
            token_ids=np.concatenate([trace.token_ids for trace in traces]),
            layer_ids=traces[0].layer_ids,
            domain=np.concatenate(domains) if has_domain else None,
            meta=meta,
        )

    @classmethod
    def load(cls, path: str | PathLike[str]) -> RoutingTrace:
        """Read a trace. Arrays that the format does not know (published traces have some) are left out.

        Raises:
            TraceError: it cannot be read, is damaged, or is something else.
        """
        path = Path(path)
        try:
            fields = _read(path)
        except OSError as error:
            raise TraceError(path, error.strerror or str(error)) from error
        except _DAMAGED as error:
            raise TraceError(path, "it is not a routing trace (an .npz file without pickles), or is damaged") from error
        if missing := [name for name in _REQUIRED if name not in fields]:
            raise TraceError(path, f"it is not a routing trace: it has no {', '.join(missing)}")
        fields["weights"] = None if fields["weights"].shape == (0,) else fields["weights"]
        try:
            fields["meta"] = json.loads(str(fields["meta"]))
            return cls(**{"lookahead": None, **fields})
        except json.JSONDecodeError as error:
            raise TraceError(path, "its meta is not JSON") from error
        except (ValueError, RecursionError) as error:
            raise TraceError(path, str(error)) from error

    def save(self, path: str | PathLike[str]) -> None:
        """Write the trace, in place of what is there: the file is complete or as it was before.

        Raises:
            CapacityError: the disk is full.
            ConfigError: there is no writing to that path.
        """
        fields: dict[str, Any] = {
            "topk": self.topk,
            "weights": np.empty(0, np.float16) if self.weights is None else self.weights,
            "lookahead": self.lookahead,
            "req": self.req.astype(np.int32) if self.token_count < 1 << 31 else self.req,
            "prefill": self.prefill,
            "token_ids": self.token_ids,
            "layer_ids": self.layer_ids,
            "domain": self.domain,
            "meta": np.array(json.dumps({**self.meta, "num_experts": self.expert_count})),
        }
        content = io.BytesIO()
        np.savez_compressed(content, **{name: value for name, value in fields.items() if value is not None})
        replace_file(Path(path), content.getbuffer(), "the routing trace")

    def _part(
        self, chosen: Any, starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], prefill: npt.NDArray[np.int32]
    ) -> RoutingTrace:
        """Of each of some requests, `lengths` tokens from `starts` on."""
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        tokens = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
        return replace(
            self,
            topk=self.topk[tokens],
            weights=None if self.weights is None else self.weights[tokens],
            lookahead=None if self.lookahead is None else self.lookahead[tokens],
            req=offsets,
            prefill=prefill,
            token_ids=self.token_ids[tokens],
            domain=None if self.domain is None else self.domain[chosen],
            meta={**self.meta, "num_experts": self.expert_count},  # what is left may use fewer
        )

    def _check_routing(self) -> None:
        if not isinstance(self.meta, Mapping):
            raise ValueError("its meta is not a JSON object")
        declared = self.meta.get("num_experts")
        if declared is not None and (type(declared) is not int or not 0 < declared <= EXPERT_COUNT_MAX):
            raise ValueError(f"its num_experts is {declared!r}, not a count up to {EXPERT_COUNT_MAX}")
        self._set("topk", self._expert_ids("topk", self.topk))
        if self.layer_count < 1 or not 0 < self.topk_count <= self.expert_count:
            raise ValueError(f"its topk of shape {self.topk.shape} has no layers, or more choices than experts")
        if self.lookahead is not None:
            self._set("lookahead", self._expert_ids("lookahead", self.lookahead))
            self._check_shape("lookahead", self.lookahead, self.topk.shape)
        if self.weights is not None:
            if self.weights.dtype.kind != "f":
                raise ValueError(f"its weights are {self.weights.dtype}, not floats")
            self._check_shape("weights", self.weights, self.topk.shape)
            self._set("weights", self.weights.astype(np.float16, copy=False))
        self._set("layer_ids", _integers("layer_ids", self.layer_ids, np.int32))
        self._check_shape("layer_ids", self.layer_ids, (self.layer_count,))

    def _check_requests(self) -> None:
        self._set("req", _integers("req", self.req, np.int64))
        bounds = self.req
        if bounds.ndim != 1 or not bounds.size or bounds[0] != 0 or bounds[-1] != self.token_count:
            raise ValueError(f"its req does not divide its {self.token_count} tokens into requests")
        if np.any(np.diff(bounds) < 0):
            raise ValueError(f"its req goes back: request {int(np.argmax(np.diff(bounds) < 0))} ends before it begins")
        self._set("prefill", _integers("prefill", self.prefill, np.int32))
        self._check_shape("prefill", self.prefill, (len(bounds) - 1,))
        wrong = (self.prefill < 0) | (self.prefill > np.diff(bounds))
        if wrong.any():
            number = int(np.argmax(wrong))
            length = int(bounds[number + 1] - bounds[number])
            raise ValueError(f"its request {number} has {length} tokens, of them {self.prefill[number]} of the prompt")
        self._set("token_ids", _integers("token_ids", self.token_ids, np.int32))
        self._check_shape("token_ids", self.token_ids, (self.token_count,))
        if self.domain is not None:
            if self.domain.dtype.kind != "U":
                raise ValueError(f"its domain is {self.domain.dtype}, not text")
            self._check_shape("domain", self.domain, (len(bounds) - 1,))

    def _expert_ids(self, name: str, ids: npt.NDArray[Any]) -> npt.NDArray[np.integer]:
        if ids.dtype.kind not in "iu" or ids.ndim != 3:
            raise ValueError(f"its {name} is {ids.dtype} of shape {ids.shape}, not [tokens, layers, k] integers")
        limit = self.meta.get("num_experts", EXPERT_COUNT_MAX)
        if ids.size and not 0 <= ids.min() <= ids.max() < limit:
            raise ValueError(f"its {name} routes to experts {ids.min()} to {ids.max()} and a layer has {limit}")
        is_wide = max(self.meta.get("num_experts", 0), int(ids.max(initial=0)) + 1) > 1 << 8
        return ids.astype(np.uint16 if is_wide else np.uint8, copy=False)

    def _check_shape(self, name: str, array: npt.NDArray[Any], shape: tuple[int, ...]) -> None:
        if array.shape != shape:
            raise ValueError(f"its {name} has the shape {array.shape}, beside its topk and req it has to be {shape}")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen for everybody else


def _integers(name: str, array: npt.NDArray[Any], dtype: type[np.signedinteger[Any]]) -> npt.NDArray[Any]:
    if array.dtype.kind not in "iu":
        raise ValueError(f"its {name} is {array.dtype}, not integers")
    limits = np.iinfo(dtype)
    if array.size and not limits.min <= array.min() <= array.max() <= limits.max:
        raise ValueError(f"its {name} has values from {array.min()} to {array.max()}")
    return array.astype(dtype, copy=False)


def _difference(one: RoutingTrace, other: RoutingTrace) -> str:
    """How the models of two traces differ; empty where they do not."""
    for name in ("model", "num_experts"):
        values = [trace.meta[name] for trace in (one, other) if name in trace.meta]
        if len(values) == 2 and values[0] != values[1]:
            return f"its {name} is {values[1]!r} and not {values[0]!r}"
    if other.topk_count != one.topk_count:
        return f"its tokens use {other.topk_count} experts a layer and not {one.topk_count}"
    if not np.array_equal(other.layer_ids, one.layer_ids):
        return f"it has the layers {other.layer_ids.tolist()} and not {one.layer_ids.tolist()}"
    return ""


def _merged_meta(metas: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    merged = {}
    for name in dict.fromkeys(name for meta in metas for name in meta):
        values: list[Any] = []
        for meta in metas:
            if name in meta and meta[name] not in values:
                values.append(meta[name])
        merged[name] = values[0] if len(values) == 1 else values
    return merged


def _joined(arrays: Sequence[npt.NDArray[Any] | None]) -> npt.NDArray[Any] | None:
    there = [array for array in arrays if array is not None]
    return np.concatenate(there) if len(there) == len(arrays) else None


def _read(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("a single array")
        with archive:
            return {name: archive[name] for name in (*_REQUIRED, *_OPTIONAL) if name in archive}


def replace_file(path: Path, content: bytes | memoryview, what: str) -> None:
    """Write a file, in place of what is there: it is complete or as it was before.

    Args:
        what: the file is, for the message.

    Raises:
        CapacityError: the disk is full.
        ConfigError: there is no writing to that path.
    """
    aside = path.parent / f".{path.name}.{os.getpid()}"
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "it is there and not a file")  # a device must not be renamed away
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    except OSError as error:
        with suppress(OSError):  # where nothing can be written there is nothing to remove
            aside.unlink()
        text = f"{what} {str(path)!r} cannot be written: {error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise CapacityError(f"{text}; free space there or give another path") from error
        raise ConfigError(f"{text}; give a path that can be written") from error
