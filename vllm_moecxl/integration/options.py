"""`--moe-offload` and `--moe-offload-config` on the command line, and the same as keywords of `LLM`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from vllm_moecxl.config import ADDITIONAL_CONFIG_KEY, MODES, OffloadConfig
from vllm_moecxl.errors import MoeOffloadError
from vllm_moecxl.integration.settings import merge

_GROUP = "MoEOffload"


class _ModeAction(argparse.Action):
    """Writes into `additional_config`: API server processes unpickle the namespace before any plugin is loaded."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        _store(parser, namespace, mode=values)


class _ConfigAction(argparse.Action):
    """A JSON object; vLLM's parser has made one of dotted options and YAML sections before."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        try:
            options = json.loads(values)
        except ValueError:
            options = None
        if not isinstance(options, dict):
            parser.error(f'argument {option_string}: {values!r} is not a JSON object such as \'{{"slots": "25%"}}\'')
        try:
            # The mode may come later on the line: check the options on their own, as if it were on.
            OffloadConfig.parse({"mode": "cxl", **options})
        except MoeOffloadError as error:
            parser.error(str(error))
        _store(parser, namespace, **options)


class _AdditionalConfigAction(argparse._StoreAction):
    """vLLM's own action, but a later --additional-config does not drop what our options have put there."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        ours = (getattr(namespace, self.dest, None) or {}).get(ADDITIONAL_CONFIG_KEY)
        super().__call__(parser, namespace, values, option_string)
        if ours and isinstance(values, dict):
            setattr(namespace, self.dest, merge(values, **ours))


def _store(parser: Any, namespace: Any, **options: Any) -> None:
    try:
        namespace.additional_config = merge(getattr(namespace, "additional_config", None), **options)
    except MoeOffloadError as error:
        parser.error(str(error))


def add_options(parser: Any) -> None:
    """Add our group to a parser that has vLLM's engine arguments; once."""
    if "--moe-offload" in parser._option_string_actions:
        return
    group = parser.add_argument_group(
        title=_GROUP, description="Serve MoE models whose experts do not fit on the device (vllm_moecxl)."
    )
    group.add_argument(
        "--moe-offload",
        action=_ModeAction,
        choices=list(MODES),
        default=argparse.SUPPRESS,
        help="cxl: keep the experts in host memory and a cache of them in slots on the device. Default: off.",
    )
    group.add_argument(
        "--moe-offload-config",
        action=_ConfigAction,
        default=argparse.SUPPRESS,
        metavar="JSON",
        help=(
            'Options as a JSON object, also dotted (--moe-offload-config.slots 25%%): slots ("auto", "25%%", 16, '
            '"24GiB"), banks ("auto", ["dram=64GiB"]), eviction ("learned", "lru", ...), prefetch ("auto", "off", '
            '["gate", "learned"]), passes ("exact", "fast"), layer_buffer ("auto", true, false), '
            'lookup ("auto", "host", "device"), trace (a path).'
        ),
    )
    additional = parser._option_string_actions.get("--additional-config")
    if type(additional) is argparse._StoreAction:
        additional.__class__ = _AdditionalConfigAction


def rewrite_keywords(keywords: dict[str, Any]) -> dict[str, Any]:
    """Engine keywords with `moe_offload` and `moe_offload_config` moved to where vLLM carries them."""
    if not {"moe_offload", "moe_offload_config"} & keywords.keys():
        return keywords
    keywords = dict(keywords)
    options = dict(keywords.pop("moe_offload_config", None) or {})
    if (mode := keywords.pop("moe_offload", None)) is not None:
        options["mode"] = mode
    keywords["additional_config"] = merge(keywords.get("additional_config"), **options)
    return keywords
