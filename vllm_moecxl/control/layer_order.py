"""Deadlines: how far ahead in the order of layers something is needed."""

from __future__ import annotations


class LayerOrder:
    """Where the forward is. Positions count layers from the start on: the smaller one is needed first.

    Args:
        layer_count: MoE layers of the model.
    """

    def __init__(self, layer_count: int) -> None:
        self._layer_count = layer_count
        self._round = 0
        self._layer_id = -1

    def arrive(self, layer_id: int) -> float:
        """The forward has come to this layer; its position."""
        if layer_id <= self._layer_id:
            self._round += 1
        self._layer_id = layer_id
        return float(self._round * self._layer_count + layer_id)

    def next_position(self, layer_id: int) -> float:
        """Position of the next forward of a layer: in this round if it lies ahead, else in the next one."""
        round_id = self._round + (layer_id <= self._layer_id)
        return float(round_id * self._layer_count + layer_id)
