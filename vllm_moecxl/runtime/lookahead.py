"""Gates of the next layers applied early: to this layer's input instead of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Scores = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Gate:
    """The router of one MoE layer.

    Attributes:
        weight: [experts, hidden] of any float type, on the device; the model's own parameter.
        bias: [experts], or None.
        norm: [hidden], by which the layer's input was scaled after its normalisation; None where nobody knows.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    norm: torch.Tensor | None


class GateLookahead:
    """What the gates of the next layers make of a layer's input.

    The residual stream changes little from layer to layer, so the next gate mostly chooses early what it will choose in
    time. Where the norms' scales are known the input is brought to the next layer's scale first.
    Source: Eliseev and Mazur, "Fast Inference of Mixture-of-Experts Language Models with Offloading", 2023.

    Args:
        gates: of all MoE layers in order; None where a layer's is not known.
        reach: how many layers ahead.
    """

    def __init__(self, gates: Sequence[Gate | None], reach: int) -> None:
        self._gates = gates
        self._reach = reach
        #: By layer, what `on_host` multiplies with and adds: made at first use, [hidden, distances x experts] and
        #: [distances x experts] float32.
        self._host: dict[int, tuple[Scores, Scores]] = {}

    def on_host(self, layer_id: int, hidden: npt.NDArray[np.float32]) -> Scores | None:
        """Scores of the next layers' experts from a copy of a layer's input, for a thread beside the forward.

        Args:
            layer_id: the layer.
            hidden: [tokens, hidden] float32.

        Returns:
            [distances, tokens, experts] float32; None where a gate is not known or not made for such inputs, or after
            the last layer.
        """
        following = self._following(layer_id, hidden.shape[1])
        if not following:
            return None
        if layer_id not in self._host:
            self._host[layer_id] = self._stack(layer_id, following)
        weight, bias = self._host[layer_id]
        scores: Scores = hidden @ weight
        scores += bias
        return np.moveaxis(scores.reshape(len(hidden), len(following), -1), 1, 0)

    def on_device(self, layer_id: int, x: torch.Tensor) -> Scores | None:
        """The same from the layer's input itself, [tokens, hidden] on the device. Waits for the device."""
        following = self._following(layer_id, x.shape[1])
        if not following:
            return None
        rows = []
        for gate in following:
            scale = self._scale(layer_id, gate)
            scaled = x if scale is None else x * scale.to(x.dtype)
            rows.append(torch.nn.functional.linear(scaled.to(gate.weight.dtype), gate.weight, gate.bias).float())
        scores: Scores = torch.stack(rows).cpu().numpy()
        return scores

    def following(self, layer_id: int) -> list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]]:
        """The gates of the next layers, the nearest first, for kernels that apply them to this layer's input.

        Returns:
            For each its own [experts, hidden] weight, [hidden] float32 scale or None, and [experts] bias or None; none
            where a gate is not known, or after the last layer.
        """
        here = self._gates[layer_id]
        gates = [] if here is None else self._following(layer_id, here.weight.shape[1])
        return [(gate.weight, self._scale(layer_id, gate), gate.bias) for gate in gates]

    def _following(self, layer_id: int, hidden_size: int) -> list[Gate]:
        gates = self._gates[layer_id + 1 : layer_id + 1 + self._reach]
        known = [gate for gate in gates if gate is not None]
        # One unknown gate among them would shift the distances of those behind it. Experts may see less than their gate
        # does, where the model projects their input.
        are_alike = len({gate.weight.shape for gate in known}) == 1 and known[0].weight.shape[1] == hidden_size
        return known if len(known) == len(gates) and are_alike else []

    def _scale(self, layer_id: int, gate: Gate) -> torch.Tensor | None:
        here = self._gates[layer_id]
        if here is None or here.norm is None or gate.norm is None or here.norm.shape != gate.norm.shape:
            return None
        # A channel that is scaled to nothing here says nothing about the next layer.
        return torch.where(here.norm == 0, 0, gate.norm.float() / here.norm.float())

    def _stack(self, layer_id: int, following: Sequence[Gate]) -> tuple[Scores, Scores]:
        columns, biases = [], []
        for gate in following:
            weight = gate.weight.float()
            scale = self._scale(layer_id, gate)
            columns.append((weight if scale is None else weight * scale).T)
            biases.append(torch.zeros(len(weight)) if gate.bias is None else gate.bias.float())
        return torch.cat(columns, dim=1).contiguous().numpy(), torch.cat(biases).numpy()
