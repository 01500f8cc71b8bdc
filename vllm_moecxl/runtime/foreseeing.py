"""Who records and who prefetches, as far as the user asked for it and the layers allow it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from vllm_moecxl.config import OffloadConfig
from vllm_moecxl.control.eviction import NextUse
from vllm_moecxl.control.layer_order import LayerOrder
from vllm_moecxl.control.prediction import DEFAULT_PREDICTORS, PREDICTORS
from vllm_moecxl.control.prediction.forecast import Forecast
from vllm_moecxl.control.prediction.semantic import Embed, Semantic
from vllm_moecxl.control.prefetch import PrefetchPlanner
from vllm_moecxl.control.prefetching import Prefetching
from vllm_moecxl.control.recorder import TraceRecorder
from vllm_moecxl.data.mover import Mover
from vllm_moecxl.runtime.device_driven.dispatch import AnyDispatch, DeviceDispatch
from vllm_moecxl.runtime.dispatch import Dispatch
from vllm_moecxl.runtime.foresight import Recording
from vllm_moecxl.types import Cause

#: How many layers ahead is predicted.
REACH = 2


def make_recording(path: str, layers: Sequence[AnyDispatch], topk: int, model_name: str) -> Recording:
    """A trace of these layers, in order, and where it goes."""
    recorder = TraceRecorder(
        len(layers),
        max(layer.home.expert_count for layer in layers),
        topk,
        layer_ids=[_layer_number(layer.name, index) for index, layer in enumerate(layers)],
        meta={"model": model_name, "source": "recorded by vllm_moecxl"},
    )
    return Recording(recorder, Path(path))


def make_prefetching(
    config: OffloadConfig,
    layers: Sequence[AnyDispatch],
    topk: int,
    order: LayerOrder,
    mover: Mover,
    embed: Embed | None,
    log: logging.Logger,
) -> Prefetching | None:
    """Who prefetches; None, and a line in the log, where nobody does.

    Args:
        config: the user's options.
        layers: in order.
        topk: experts of one token.
        order: gives fetches their deadlines.
        mover: carries them.
        embed: the model's token embeddings; None where they are not at hand.
        log: gets the line.
    """
    if (reason := _why_not(config, layers)) is not None:
        log.info("MoE offload: nothing is prefetched into slots: %s", reason)
        return None
    names = DEFAULT_PREDICTORS if config.prefetch == "auto" else config.prefetch
    expert_count = layers[0].home.expert_count
    factories = dict(PREDICTORS)
    if embed is not None:
        factories["semantic"] = partial(Semantic, embed=embed)
    predictors = {name: factories[name](len(layers), expert_count, topk) for name in names}
    forecast = Forecast(len(layers), expert_count, topk, predictors, reach=REACH)
    for layer, scores in zip(layers, forecast.scores, strict=True):
        if isinstance(layer, Dispatch) and isinstance(policy := layer.slots.residency.policy, NextUse):
            policy.probabilities = scores
    homes = [layer.home for layer in layers]
    log.info("MoE offload: experts are prefetched by %s", ", ".join(names))
    return Prefetching(
        forecast,
        PrefetchPlanner(len(layers)),
        [None if layer.is_always_in_place else layer.slots for layer in layers],
        order,
        lambda layer_id: mover.queue_s(homes[layer_id], Cause.PREFETCH),
        [layer.fetch_s for layer in layers],
        mover.forget,
    )


def _why_not(config: OffloadConfig, layers: Sequence[AnyDispatch]) -> str | None:
    """What keeps experts from being prefetched; None if nothing does."""
    if config.prefetch == "off":
        return 'prefetch is "off"'
    if not config.sidecar:
        return "there is no sidecar"
    if all(layer.is_always_in_place for layer in layers):
        return "all layers run in place"
    if len({layer.home.expert_count for layer in layers}) > 1:
        return "the layers differ in their number of experts"
    if all(layer.slots.slot_count == layer.home.expert_count for layer in layers):
        return "every expert has a slot"
    if any(isinstance(layer, DeviceDispatch) and not layer.layer.lane_count for layer in layers):
        return "there are no slots to lend to the host, ask for more slots"
    return None


def _layer_number(name: str, index: int) -> int:
    """The model's number of a layer, as its name has it."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[0] if numbers else index
