"""Copies of slab rows that the host drives, one memory copy a row."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def copy_rows(
    sources: Sequence[torch.Tensor],
    source_ids: Sequence[int],
    targets: Sequence[torch.Tensor],
    target_ids: Sequence[int],
) -> None:
    """For each source and target: ``target[target_ids[i]] = source[source_ids[i]]``.

    Args:
        sources: [rows, ...] tensors, contiguous, any device.
        source_ids: rows to read.
        targets: [cells, ...] tensors with the row shapes and dtypes of `sources`, contiguous, any device.
        target_ids: cells to write, as many as `source_ids`, all different.
    """
    assert len(source_ids) == len(target_ids) and len(sources) == len(targets)
    for source, target in zip(sources, targets, strict=True):
        for source_id, target_id in zip(source_ids, target_ids, strict=True):
            target[target_id].copy_(source[source_id])
