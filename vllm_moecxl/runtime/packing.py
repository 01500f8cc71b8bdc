"""Packing: each layer's experts go into a slab file instead of home."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from vllm_moecxl.control.account import LayerNeed, sum_home_bytes
from vllm_moecxl.data.slabwriter import SlabFileWriter
from vllm_moecxl.runtime.runtime import LoadedLayer
from vllm_moecxl.units import format_bytes

#: Called after each layer: layers done, layers in all, bytes of the layer.
Progress = Callable[[int, int, int], None]


class Packer:
    """Writes the layers of one model on one worker to a slab file; takes the place of an `OffloadRuntime`.

    Args:
        path: the file to make.
        fingerprint: what it is packed for.
        device: where the kernels take their inputs.
        logger: is told what was written.
        progress: told after each layer.
    """

    def __init__(
        self,
        path: Path,
        fingerprint: Mapping[str, str],
        device: torch.device,
        logger: logging.Logger,
        progress: Progress,
    ) -> None:
        self.path = path
        self._fingerprint = fingerprint
        self._device = device
        self._log = logger
        self._progress = progress
        self._needs: dict[str, LayerNeed] = {}
        self._writer: SlabFileWriter | None = None
        self._packed_count = 0
        #: Kernel classes whose self-check is in the file: one layer of each has it.
        self._checked: set[str] = set()

    @property
    def layer_count(self) -> int:
        """MoE layers that were declared."""
        return len(self._needs)

    def declare(self, need: LayerNeed) -> None:
        """Announce a layer while the model is being built."""
        self._needs[need.name] = need

    def begin(self) -> None:
        """Open the file, before any weight is read.

        Raises:
            ConfigError: it cannot be written there.
            CapacityError: its file system has too little room.
        """
        self._writer = SlabFileWriter(
            self.path, self._fingerprint, len(self._needs), sum_home_bytes(list(self._needs.values()))
        )

    def install(self, layer: LoadedLayer) -> None:
        """Write a layer; empties its tensors.

        Raises:
            CapacityError: the disk is full.
        """
        assert self._writer is not None
        check: tuple[torch.Tensor, ...] = ()
        if layer.kernel_name not in self._checked:
            check = layer.check(self._device).expected
            self._checked.add(layer.kernel_name)
        layer_bytes = sum(tensor.nbytes for tensor in layer.tensors.values())
        self._writer.add_layer(layer.name, layer.kernel_name, layer.tensors, layer.shared, check)
        # Nobody will run this layer: the parameters let go of what has been written.
        layer.bind([tensor.new_empty(0) for tensor in layer.tensors.values()])
        layer.tensors.clear()
        self._packed_count += 1
        self._progress(self._packed_count, self.layer_count, layer_bytes)

    def finish(self) -> int:
        """Complete the file; returns its size in bytes.

        Raises:
            CapacityError: the disk is full.
        """
        assert self._writer is not None and self._packed_count == self.layer_count
        size = self._writer.finish()
        self._writer = None
        self._log.info("MoE offload: packed %d layers into %s, %s", self.layer_count, self.path, format_bytes(size))
        return size

    def abandon(self) -> None:
        """Remove what has been written of a file that will not be completed."""
        if self._writer is not None:
            self._writer.abandon()
            self._writer = None
