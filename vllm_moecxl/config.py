"""The options of `--moe-offload-config`: parsed, checked and resolved without knowing any engine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from vllm_moecxl.errors import ConfigError
from vllm_moecxl.units import parse_bytes

Mode = Literal["off", "cxl"]
MODES: tuple[Mode, ...] = ("off", "cxl")

#: Minor versions of vLLM whose internals we have read and test against.
SUPPORTED_VLLM = ("0.32", "0.33")

#: Names of the eviction policies; `control.eviction.POLICIES` has a factory for each.
EVICTIONS = ("lru",)

#: The key of our options inside vLLM's `additional_config`.
ADDITIONAL_CONFIG_KEY = "moe_offload"


def is_supported_vllm(version: str) -> bool:
    """Whether a release of vLLM, such as "0.32.1", is one of `SUPPORTED_VLLM`."""
    return version.startswith(tuple(f"{minor}." for minor in SUPPORTED_VLLM))


def _fail(option: str, value: object, remedy: str) -> ConfigError:
    return ConfigError(f"--moe-offload-config: {option}={value!r} is not possible: {remedy}")


@dataclass(frozen=True)
class SlotSpec:
    """How many slots the user wants; exactly one field is set, none of them means "auto".

    Attributes:
        share: part of a layer's experts, in (0, 1].
        count: slots per layer.
        total_bytes: bytes for the slots of all layers on one device.
    """

    share: float | None = None
    count: int | None = None
    total_bytes: int | None = None

    @property
    def is_auto(self) -> bool:
        return self.share is None and self.count is None and self.total_bytes is None

    @classmethod
    def parse(cls, raw: object) -> SlotSpec:
        """Read ``"auto"``, ``"25%"``, ``16`` (or ``"16"``) or ``"24GiB"``.

        Raises:
            ConfigError: anything else.
        """
        remedy = 'use "auto", a percentage such as "25%", a count per layer such as 16, or bytes such as "24GiB"'
        if isinstance(raw, int) and not isinstance(raw, bool):
            if raw < 1:
                raise _fail("slots", raw, remedy)
            return cls(count=raw)
        if not isinstance(raw, str):
            raise _fail("slots", raw, remedy)
        text = raw.strip()
        if text == "auto":
            return cls()
        if text.isdecimal() and int(text) > 0:
            return cls(count=int(text))
        if text.endswith("%"):
            try:
                share = float(text[:-1]) / 100
            except ValueError:
                raise _fail("slots", raw, remedy) from None
            if not 0 < share <= 1:
                raise _fail("slots", raw, "a percentage lies above 0% and is at most 100%")
            return cls(share=share)
        if total_bytes := parse_bytes(text):
            return cls(total_bytes=total_bytes)
        raise _fail("slots", raw, remedy)

    def count_for(self, expert_count: int, topk: int, text: object) -> int:
        """Slots of a layer with `expert_count` experts, for a share or a count.

        Args:
            text: the option as the user wrote it, for the message.

        Raises:
            ConfigError: fewer than `topk`, or more than the layer has experts.
        """
        assert not self.is_auto and self.total_bytes is None
        count = self.count if self.count is not None else math.ceil((self.share or 0) * expert_count - 1e-9)
        if count < topk:
            least = f"{math.ceil(100 * topk / expert_count)}%" if self.share is not None else str(topk)
            raise _fail(
                "slots", text, f"one token needs {topk} experts of {expert_count} at once (top-k), use at least {least}"
            )
        if count > expert_count:
            raise _fail("slots", text, f'a layer has only {expert_count} experts, use at most {expert_count} or "100%"')
        return count


@dataclass(frozen=True)
class BankSpec:
    """One bank that the user named.

    Attributes:
        kind: "dram", the only kind of this version.
        capacity_bytes: bytes that it may home, or None for what the machine has.
    """

    kind: str
    capacity_bytes: int | None = None

    @classmethod
    def parse(cls, raw: object) -> BankSpec:
        """Read ``"dram"`` or ``"dram=64GiB"``."""
        remedy = 'this version has the bank "dram" or "dram=SIZE", for example "dram=64GiB"'
        if not isinstance(raw, str):
            raise _fail("banks", raw, remedy)
        kind, separator, size = raw.partition("=")
        capacity_bytes = parse_bytes(size) if separator else None
        if kind != "dram" or (separator and not capacity_bytes):
            raise _fail("banks", raw, remedy)
        return cls(kind, capacity_bytes)


@dataclass(frozen=True)
class OffloadConfig:
    """What the user asked for, checked.

    Attributes:
        mode: "cxl" serves the experts from slots; "off" leaves vLLM alone.
        slots: see `SlotSpec`; the raw text is kept for messages.
        banks: homes in order of preference.
        eviction: name of an eviction policy.
        passes: "exact" keeps the resident model's result; "fast" fetches each slab once per forward and may change
            the last bit.
        layer_buffer: whether wide forwards stream through one layer's worth of shared slots; "auto" where it fits.
    """

    mode: Mode = "off"
    slots: SlotSpec = SlotSpec()
    slots_text: object = "auto"
    banks: tuple[BankSpec, ...] = (BankSpec("dram"),)
    eviction: str = "lru"
    passes: Literal["exact", "fast"] = "exact"
    layer_buffer: bool | Literal["auto"] = "auto"

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> OffloadConfig:
        """Check the user's options and fill in the defaults.

        Raises:
            ConfigError: an unknown key, a wrong type or an impossible value; one sentence.
        """
        known = sorted({f.name for f in fields(cls)} - {"slots_text"})
        if unknown := sorted(set(raw) - set(known)):
            raise ConfigError(
                f"--moe-offload-config: unknown option(s) {', '.join(unknown)}; this version knows {', '.join(known)}"
            )
        config = cls(
            mode=_one_of("mode", raw.get("mode", "off"), MODES),
            slots=SlotSpec.parse(raw.get("slots", "auto")),
            slots_text=raw.get("slots", "auto"),
            banks=_parse_banks(raw.get("banks", "auto")),
            eviction=_one_of("eviction", raw.get("eviction", "lru"), EVICTIONS),
            passes=_one_of("passes", raw.get("passes", "exact"), ("exact", "fast")),
            layer_buffer=_one_of("layer_buffer", raw.get("layer_buffer", "auto"), ("auto", True, False)),
        )
        if config.mode == "off" and (options := sorted(set(raw) - {"mode"})):
            raise ConfigError(
                f"--moe-offload-config sets {', '.join(options)} but --moe-offload is off: "
                "add --moe-offload cxl, or drop the options"
            )
        return config


def _one_of(option: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    # `True == 1`: compare types too, or 1 would pass for true.
    for choice in allowed:
        if type(value) is type(choice) and value == choice:
            return choice
    raise _fail(option, value, f"use one of {', '.join(map(repr, allowed))}")


def _parse_banks(raw: object) -> tuple[BankSpec, ...]:
    if raw == "auto":
        return (BankSpec("dram"),)
    if not isinstance(raw, list | tuple) or not raw:
        raise _fail("banks", raw, 'use "auto" or a list of bank specs such as ["dram=64GiB"]')
    banks = tuple(BankSpec.parse(item) for item in raw)
    if len({bank.kind for bank in banks}) != len(banks):
        raise _fail("banks", raw, "each bank may be named once")
    return banks
