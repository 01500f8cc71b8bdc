"""Every place where vLLM offers no hook and we replace a function of it, each with its reason.

All are idempotent, and all but the two that make the options exist are installed only once an engine asks for them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

_MARK = "_moe_offload_original"


def _wrap(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Replace `owner.name` by what `make` builds around it, once."""
    original = getattr(owner, name)
    if hasattr(original, _MARK):
        return
    replacement = make(original)
    setattr(replacement, _MARK, original)
    raw = owner.__dict__.get(name) if isinstance(owner, type) else None
    # `getattr` has bound a classmethod already: what we built around it takes no class.
    setattr(owner, name, staticmethod(replacement) if isinstance(raw, staticmethod | classmethod) else replacement)


def patch_arguments(add_options: Callable[[Any], None]) -> None:
    """`EngineArgs.add_cli_args`: vLLM has no way for a plugin to add a command-line option."""
    from vllm.engine.arg_utils import EngineArgs

    def make(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        @wraps(original)
        def add_cli_args(parser: Any) -> Any:
            parser = original(parser)
            add_options(parser)
            return parser

        return add_cli_args

    _wrap(EngineArgs, "add_cli_args", make)


def patch_keywords(rewrite: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """`EngineArgs.__init__`: `LLM(moe_offload=...)` fails on the unknown keyword before any plugin is asked."""
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

    def make(original: Callable[..., None]) -> Callable[..., None]:
        @wraps(original)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **rewrite(kwargs))

        return __init__

    _wrap(EngineArgs, "__init__", make)
    _wrap(AsyncEngineArgs, "__init__", make)


def patch_configuration(check: Callable[[Any], None]) -> None:
    """`Platform.check_and_update_config`: the one call where a whole `VllmConfig` can still be refused or changed."""
    from vllm.platforms import current_platform

    def make(original: Callable[[Any], None]) -> Callable[[Any], None]:
        @wraps(original)
        def check_and_update_config(vllm_config: Any) -> None:
            original(vllm_config)
            check(vllm_config)

        return check_and_update_config

    _wrap(type(current_platform), "check_and_update_config", make)


def patch_multiprocess_metrics(register: Callable[[Any], None]) -> None:
    """`MultiProcessCollector.__init__`: with several API servers vLLM makes a new registry for each scrape."""
    from prometheus_client.multiprocess import MultiProcessCollector

    def make(original: Callable[..., None]) -> Callable[..., None]:
        @wraps(original)
        def __init__(self: Any, registry: Any, *args: Any, **kwargs: Any) -> None:
            original(self, registry, *args, **kwargs)
            register(registry)

        return __init__

    _wrap(MultiProcessCollector, "__init__", make)


def patch_model_creation(build: Callable[[Callable[[], Any], Any, Any], Any]) -> None:
    """`BaseModelLoader.create_model`: between the model's construction and its first weight the byte account is due.

    A load format of our own would be an official way, but vLLM compares `load_format` with its names in many places.
    """
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def create_model(self: Any, vllm_config: Any, model_config: Any, prefix: str = "") -> Any:
            return build(lambda: original(self, vllm_config, model_config, prefix), vllm_config, model_config)

        return create_model

    _wrap(BaseModelLoader, "create_model", make)


def patch_weight_access(refuse: Callable[[Any, str], None]) -> None:
    """Worker calls that read or write the parameters in place: they would meet slots and take them for the experts."""
    from vllm.v1.worker.gpu_worker import Worker

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def refused_if_offloaded(self: Any, *args: Any, **kwargs: Any) -> Any:
            refuse(self.vllm_config, original.__name__)
            return original(self, *args, **kwargs)

        return refused_if_offloaded

    for name in (
        "reload_weights",
        "update_weights",
        "init_weight_transfer_engine",
        "save_sharded_state",
        "save_tensorized_model",
    ):
        _wrap(Worker, name, make)


def patch_checkpoint_reading(passes_over: Callable[[str], bool]) -> None:
    """`weight_utils.should_skip_weight`, which vLLM asks before it reads a tensor of a checkpoint."""
    from vllm.model_executor.model_loader import weight_utils

    def make(original: Callable[..., bool]) -> Callable[..., bool]:
        @wraps(original)
        def should_skip_weight(weight_name: str, *args: Any, **kwargs: Any) -> bool:
            return passes_over(weight_name) or original(weight_name, *args, **kwargs)

        return should_skip_weight

    _wrap(weight_utils, "should_skip_weight", make)


def patch_steps(before_step: Callable[[Any, Any], None]) -> None:
    """`WorkerWrapperBase.execute_model`: which requests are in a forward is known to no layer, and to no other hook.

    Args:
        before_step: gets the worker and the scheduler's output.
    """
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            before_step(self.worker, scheduler_output)
            return original(self, scheduler_output, *args, **kwargs)

        return execute_model

    _wrap(WorkerWrapperBase, "execute_model", make)
