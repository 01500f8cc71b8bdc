"""How often each expert is activated: an exponential moving average over requests, from serving or from a trace."""

from __future__ import annotations

import json
import zipfile
import zlib
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_moecxl.errors import ConfigError

#: Requests after which an observation counts half. Long enough to average over requests of one kind, short enough to
#: follow a change of domain.
#: Source: share of a request's routes on the quarter of experts ranked highest by the requests before it, replayed on
#: 2026-11-22: DeepSeek-V2-Lite, shuffled prompts, 28.9 % at 32 (28.2 % at 8, 29.0 % for ever); mixtral-mini, domains in
#: blocks, 30.3 % at 32 (35.9 % at 8, 27.4 % for ever).
HALF_LIFE_REQUESTS = 32.0

#: What reading a file of another kind, or a damaged one, raises; zipfile raises RuntimeError for what it does not know.
_FOREIGN = (EOFError, KeyError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error)


class ActivationFrequency:
    """The share of each layer's activations that each expert has; uniform before the first request.

    Args:
        layer_count: MoE layers.
        expert_count: experts of each of them.
        half_life_requests: requests after which an observation counts half.
    """

    def __init__(self, layer_count: int, expert_count: int, *, half_life_requests: float = HALF_LIFE_REQUESTS) -> None:
        assert half_life_requests > 0
        self._step = 1 - 2 ** (-1 / half_life_requests)
        self._values = np.full((layer_count, expert_count), 1 / expert_count)

    @property
    def values(self) -> npt.NDArray[np.float64]:
        """[layers, experts] float64, each row adds up to 1. A copy."""
        return self._values.copy()

    def observe(self, request_counts: npt.NDArray[np.integer]) -> None:
        """Take in one request. However long it was, it counts as one: its counts are normalised per layer.

        Args:
            request_counts: [layers, experts] activations by the request; a layer without any keeps its average.
        """
        assert request_counts.shape == self._values.shape and request_counts.min() >= 0
        totals = request_counts.sum(axis=1)
        seen = totals > 0
        shares = request_counts[seen] / totals[seen, None]
        self._values[seen] += self._step * (shares - self._values[seen])

    @classmethod
    def from_trace(
        cls,
        path: str | PathLike[str],
        layer_count: int,
        expert_count: int,
        *,
        half_life_requests: float = HALF_LIFE_REQUESTS,
    ) -> ActivationFrequency:
        """Replay a routing trace, request after request in its order.

        Raises:
            ConfigError: the file cannot be read, is no routing trace, or is one of another model.
        """
        frequency = cls(layer_count, expert_count, half_life_requests=half_life_requests)
        topk, offsets = _read(Path(path), layer_count, expert_count)
        rows = np.arange(layer_count)[None, :, None] * expert_count
        for start, stop in pairwise(offsets):
            flat = topk[start:stop].astype(np.int64) + rows
            counts = np.bincount(flat.ravel(), minlength=layer_count * expert_count)
            frequency.observe(counts.reshape(layer_count, expert_count))
        return frequency


def _read(path: Path, layer_count: int, expert_count: int) -> tuple[npt.NDArray[Any], list[int]]:
    """Expert ids ([tokens, layers, k]) and request offsets of a trace that fits the model."""

    def refuse(reason: str) -> ConfigError:
        return ConfigError(
            f"--moe-offload-config: placement_trace={str(path)!r} is not possible: {reason}; record one of this model "
            "with the option trace, or drop the option"
        )

    try:
        topk, offsets, meta = _load(path)
    except OSError as error:
        raise refuse(error.strerror or str(error)) from error
    except _FOREIGN as error:
        raise refuse("it is not a routing trace (.npz with topk, req and meta)") from error
    if topk.ndim != 3 or topk.dtype.kind not in "iu" or offsets.ndim != 1 or offsets.dtype.kind not in "iu":
        raise refuse("its topk is not [tokens, layers, k] integers, or its req not [requests + 1]")
    if topk.shape[1] != layer_count:
        raise refuse(f"it has {topk.shape[1]} MoE layers and the model has {layer_count}")
    if (found := meta.get("num_experts", expert_count)) != expert_count:
        raise refuse(f"its model has {found} experts a layer and this one has {expert_count}")
    if topk.size and not 0 <= topk.min() <= topk.max() < expert_count:
        raise refuse(f"it routes to experts {topk.min()} to {topk.max()} and a layer has {expert_count}")
    bounds = offsets.astype(np.int64)
    if not bounds.size or bounds[0] != 0 or bounds[-1] != len(topk) or np.any(np.diff(bounds) < 0):
        raise refuse(f"its req does not divide its {len(topk)} tokens into requests")
    return topk, bounds.tolist()


def _load(path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[Any], dict[str, Any]]:
    with path.open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("a single array")
        with archive:
            meta = json.loads(str(archive["meta"]))
            if not isinstance(meta, dict):
                raise ValueError("meta is not an object")
            return archive["topk"], archive["req"], meta
