"""Our options inside a `VllmConfig`: how they get in, are read and are told from another engine's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_moecxl import __version__
from vllm_moecxl.config import ADDITIONAL_CONFIG_KEY, OffloadConfig
from vllm_moecxl.errors import ConfigError

#: Marks options that have been checked, and makes the compilation cache tell our versions apart.
_STAMP = "version"


def merge(additional_config: object, **options: Any) -> dict[str, Any]:
    """`additional_config` with our options added; the argument is not changed, argparse shares its defaults.

    Raises:
        ConfigError: it is not a mapping, so there is no place for options in it.
    """
    if additional_config is not None and not isinstance(additional_config, Mapping):
        raise ConfigError(
            f"--additional-config is a {type(additional_config).__name__}, which has no room for --moe-offload: "
            "give it as a JSON object"
        )
    merged = dict(additional_config or {})
    merged[ADDITIONAL_CONFIG_KEY] = {**merged.get(ADDITIONAL_CONFIG_KEY, {}), **options}
    return merged


def options_of(vllm_config: Any) -> dict[str, Any] | None:
    """The user's options as they stand in a config; None where there are none."""
    additional = vllm_config.additional_config
    raw = additional.get(ADDITIONAL_CONFIG_KEY) if isinstance(additional, Mapping) else None
    if raw is None:
        return None
    if not isinstance(raw, Mapping):
        raise ConfigError(
            f"additional_config: {ADDITIONAL_CONFIG_KEY}={raw!r} is not possible: give an object such as "
            '{"mode": "cxl", "slots": "25%"}'
        )
    return dict(raw)


def active_config(vllm_config: Any) -> OffloadConfig | None:
    """The checked options if this engine offloads, else None."""
    raw = options_of(vllm_config)
    if raw is None or _STAMP not in raw:
        return None
    return OffloadConfig.parse({key: value for key, value in raw.items() if key != _STAMP})


def is_stamped(options: Mapping[str, Any]) -> bool:
    """Whether `stamp` has seen these options."""
    return _STAMP in options


def stamp(vllm_config: Any) -> None:
    """Mark the options of a config as checked."""
    vllm_config.additional_config = merge(vllm_config.additional_config, **{_STAMP: __version__})


def drop(vllm_config: Any) -> None:
    """Take options out that say off: the config is then that of an engine that never heard of us, hash included."""
    vllm_config.additional_config = {
        key: value for key, value in vllm_config.additional_config.items() if key != ADDITIONAL_CONFIG_KEY
    }
