"""Layers that cannot run from slots are refused by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_moecxl.errors import UnsupportedModelError

_CONFIG = SimpleNamespace(moe_parallel_config=SimpleNamespace(use_ep=False, enable_eplb=False), is_lora_enabled=False)


def _check(*, does_more: bool) -> None:
    """Have a layer checked that takes the place of a model's own class."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from vllm_moecxl.integration.experts import SlotExperts, _refuse_layer_features

    def substitute(self: Any, *args: Any) -> Any:  # as MoNE checkpoints do: the output is not that of experts alone
        return RoutedExperts.forward_modular(self, *args)

    base = type("Own", (RoutedExperts,), {"forward_modular": substitute} if does_more else {})
    cls = type("Own", (SlotExperts, base), {})
    layer = cls.__new__(cls)
    object.__setattr__(layer, "layer_name", "model.layers.3.mlp.experts")
    object.__setattr__(layer, "expert_map_manager", SimpleNamespace(num_fused_shared_experts=0))
    _refuse_layer_features(layer, _CONFIG)


def test_a_layer_that_runs_its_experts_is_served() -> None:
    _check(does_more=False)


def test_a_layer_that_does_more_than_run_its_experts_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Own of model\.layers\.3\.mlp\.experts does more than run"):
        _check(does_more=True)
