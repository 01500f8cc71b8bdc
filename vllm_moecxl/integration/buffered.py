"""Weight loaders of one layer whose parameters are on the meta device until all of its weights have been seen.

vLLM's layerwise processing buffers loader calls, counts the elements that they would write, and replays them when the
count is complete. Four things it leaves open, and a wrong token each, are closed here:

- Values that `create_weights` put there and no checkpoint overwrites (padding, absent biases, default scales).
- Elements that are written twice (one scale for w1 and w3): counted twice, a layer would look complete too early.
- Models that copy into a parameter without asking its loader (gpt-oss): on the meta device that does nothing.
- Parameters that the checkpoint has nothing for.
"""

# torch's dispatch modes carry no types.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.model_loader.reload.layerwise import _get_original_loader, initialize_online_processing

from vllm_moecxl.errors import IntegrityError, UnsupportedModelError
from vllm_moecxl.integration.initial_values import InitialValues

Loader = Callable[..., Any]
#: Where a view lies in its storage: offset, sizes, strides.
Place = tuple[int, tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class _DirectWrite:
    """A copy into part of a parameter that went past its loader, in the place of a checkpoint tensor."""

    place: Place
    source: torch.Tensor


class BufferedParameters:
    """The parameters that one layer got from `create_weights`, and what has been loaded into them.

    Args:
        layer: owns the parameters, which are on the meta device.
        names: those that are loaded from a checkpoint.
        initial: knows the values that they were created with.
        is_dummy: whether the load format invents the weights instead of loading them.
    """

    def __init__(self, layer: RoutedExperts, names: list[str], initial: InitialValues, *, is_dummy: bool) -> None:
        self._layer = layer
        self._is_dummy = is_dummy
        self._is_closed = False
        self._loaded: set[str] = set()
        self._fills: dict[str, float] = {}
        self._required: list[str] = []
        self._written: dict[str, set[Place]] = {name: set() for name in names}
        #: By storage, to recognise a write that goes past the loader; the tensors keep their storages alive.
        self.by_storage: dict[int, tuple[BufferedParameters, str, torch.Tensor]] = {}
        for name in names:
            parameter = layer.get_parameter(name)
            self.by_storage[parameter.untyped_storage()._cdata] = (self, name, parameter)
            if (fill := initial.of(parameter)) is not None:
                self._fills[name] = fill
            else:
                self._required.append(name)
            parameter.weight_loader = self._loader(name, _get_original_loader(parameter))
        initialize_online_processing(layer)

    def close(self) -> None:
        """All weights are in: give untouched parameters the values that they were created with.

        Raises:
            IntegrityError: the checkpoint had nothing for a parameter that has no such value.
        """
        self._is_closed = True
        for name, fill in self._fills.items():
            if name not in self._loaded and not self._is_dummy:
                self._layer.get_parameter(name).data.fill_(fill)
        missing = [name for name in self._required if name not in self._loaded]
        if missing and not self._is_dummy:
            raise IntegrityError(
                f"--moe-offload: the checkpoint has nothing for {', '.join(missing)} of {self._layer.layer_name}: "
                "it is incomplete, or its names are not those of this model"
            )

    def write_directly(self, name: str, target: torch.Tensor, source: torch.Tensor) -> None:
        """Buffer a copy into a view of a parameter as if the parameter's loader had been called."""
        parameter = self._layer.get_parameter(name)
        arguments = {"param": parameter, "loaded_weight": _DirectWrite(_place(target), source)}
        loader: Loader = parameter.weight_loader
        wanted = inspect.signature(_get_original_loader(parameter)).parameters
        loader(**{key: arguments.get(key, "") for key in wanted})

    def _loader(self, name: str, load: Loader) -> Loader:
        """A weight loader around vLLM's own."""
        signature = inspect.signature(load)

        @wraps(load)
        def load_weight(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            if self._is_closed:
                # Loaded once more than there are elements (a shape for w1 and for w3): vLLM's layerwise loading
                # passes over that too.
                return True
            parameter: torch.Tensor = bound.arguments["param"]
            weight = bound.arguments["loaded_weight"]
            if parameter.is_meta:
                with _inside_loader(), _CountEachElementOnce(parameter, self._written[name]):
                    return _write(parameter, weight) if isinstance(weight, _DirectWrite) else load(*args, **kwargs)
            if name in self._fills and name not in self._loaded:
                parameter.data.fill_(self._fills[name])
            self._loaded.add(name)
            return _write(parameter, weight) if isinstance(weight, _DirectWrite) else load(*args, **kwargs)

        return load_weight


@contextmanager
def catching_direct_writes(buffered: list[BufferedParameters]) -> Iterator[None]:
    """While a model loads its weights, turn copies into meta parameters into buffered loads.

    Raises:
        UnsupportedModelError: a write of another kind, which cannot be buffered.
    """
    by_storage = {key: entry for parameters in buffered for key, entry in parameters.by_storage.items()}
    with _DirectWrites(by_storage):
        yield


#: Whether a loader is being tried on a meta parameter: what it writes, padding included, is no direct write.
_INSIDE_LOADER: ContextVar[bool] = ContextVar("moe_offload_inside_loader", default=False)


@contextmanager
def _inside_loader() -> Iterator[None]:
    token = _INSIDE_LOADER.set(True)
    try:
        yield
    finally:
        _INSIDE_LOADER.reset(token)


def _place(view: torch.Tensor) -> Place:
    return int(view.storage_offset()), tuple(view.shape), tuple(view.stride())


def _write(parameter: torch.Tensor, write: _DirectWrite) -> bool:
    offset, shape, stride = write.place
    parameter.data.as_strided(shape, stride, offset).copy_(write.source)
    return True


class _CountEachElementOnce(TorchDispatchMode):
    """Hides from vLLM's element counter what is written again, and what is not written into the parameter."""

    def __init__(self, parameter: torch.Tensor, written: set[Place]) -> None:
        super().__init__()
        self._storage = parameter.untyped_storage()._cdata
        self._written = written

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.copy_.default:
            return func(*args, **(kwargs or {}))
        target = args[0]
        if target.is_meta and target.untyped_storage()._cdata == self._storage:
            place = _place(target)
            if place in self._written:
                return target
            self._written.add(place)
            return func(*args, **(kwargs or {}))
        with _disable_current_modes():
            return func(*args, **(kwargs or {}))


class _DirectWrites(TorchDispatchMode):
    def __init__(self, by_storage: dict[int, tuple[BufferedParameters, str, torch.Tensor]]) -> None:
        super().__init__()
        self._by_storage = by_storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        target = args[0] if args else None
        if (
            not _INSIDE_LOADER.get()
            and func._schema.is_mutable
            and isinstance(target, torch.Tensor)
            and target.is_meta
            and (entry := self._by_storage.get(target.untyped_storage()._cdata)) is not None
        ):
            parameters, name, _ = entry
            if func is not torch.ops.aten.copy_.default:
                raise UnsupportedModelError(
                    f"--moe-offload: this model changes {name} while loading ({func}) in a way that cannot wait until "
                    "its layer is complete: serve it without --moe-offload, and please report it"
                )
            parameters.write_directly(name, target, args[1])
            return target
        return func(*args, **(kwargs or {}))
