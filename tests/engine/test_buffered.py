"""Parameters on the meta device end up with exactly what the checkpoint and `create_weights` say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_moecxl.errors import IntegrityError

_ROWS, _WIDTH, _LOADED_WIDTH = 2, 4, 3


def _layer(**created: Any) -> Any:
    """A layer whose parameters were made on the meta device, and its buffered parameters."""
    from vllm_moecxl.integration.buffered import BufferedParameters
    from vllm_moecxl.integration.initial_values import InitialValues

    layer: Any = torch.nn.Module()
    layer.layer_name = "model.layers.0.experts"
    with InitialValues() as initial:
        for name, create in created.items():
            layer.register_parameter(name, torch.nn.Parameter(create(_ROWS, _WIDTH), requires_grad=False))
            getattr(layer, name).weight_loader = _load_row
    return layer, BufferedParameters(layer, list(created), initial, is_dummy=False)


def _load_row(param: torch.Tensor, loaded_weight: torch.Tensor, expert_id: int) -> None:
    """As vLLM pads a shard: the whole row is cleared, then its loaded part written."""
    row = param.data[expert_id]
    row.fill_(0)
    row[: loaded_weight.shape[0]].copy_(loaded_weight)


def _rows(width: int = _WIDTH) -> list[torch.Tensor]:
    return [torch.arange(1.0, width + 1) * (row + 1) for row in range(_ROWS)]


def test_a_loader_may_clear_its_padding() -> None:
    from vllm_moecxl.integration.buffered import catching_direct_writes

    layer, buffered = _layer(weight=torch.empty)
    with catching_direct_writes([buffered]):
        for expert_id, row in enumerate(_rows()):
            layer.weight.weight_loader(layer.weight, row, expert_id)
    assert torch.equal(layer.weight.data, torch.stack(_rows()))


def test_a_copy_past_the_loader_is_not_lost() -> None:
    from vllm_moecxl.integration.buffered import catching_direct_writes

    layer, buffered = _layer(weight=torch.empty)
    with catching_direct_writes([buffered]):
        for expert_id, row in enumerate(_rows()):
            layer.weight.data[expert_id].copy_(row)
    assert torch.equal(layer.weight.data, torch.stack(_rows()))


def test_an_element_that_is_written_twice_counts_once() -> None:
    layer, _ = _layer(weight=torch.empty)
    first, second = _rows()
    for _ in range(2):
        layer.weight.weight_loader(layer.weight, first, 0)
        assert layer.weight.is_meta, "complete before the second row has come"
    layer.weight.weight_loader(layer.weight, second, 1)
    assert torch.equal(layer.weight.data, torch.stack([first, second]))


def test_what_the_checkpoint_leaves_alone_keeps_the_value_it_was_created_with() -> None:
    layer, buffered = _layer(weight=torch.empty, scale=torch.ones)
    layer.weight = torch.nn.Parameter(torch.zeros(_ROWS, _WIDTH), requires_grad=False)
    layer.scale = torch.nn.Parameter(torch.full((_ROWS, _WIDTH), torch.nan), requires_grad=False)
    for expert_id, row in enumerate(_rows(_LOADED_WIDTH)):
        buffered._loader("weight", _load_row)(layer.weight, row, expert_id)
    buffered.close()
    assert torch.equal(layer.scale.data, torch.ones(_ROWS, _WIDTH))
    assert torch.equal(layer.weight.data[:, :_LOADED_WIDTH], torch.stack(_rows(_LOADED_WIDTH)))


def test_a_parameter_that_nothing_was_loaded_into_is_named() -> None:
    _, buffered = _layer(weight=torch.empty)
    with pytest.raises(IntegrityError, match=r"nothing for weight of model\.layers\.0\.experts"):
        buffered.close()
