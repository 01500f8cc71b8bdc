"""The options of `--moe-offload-config`: parsed, checked and resolved without knowing any engine."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from vllm_moecxl.errors import ConfigError
from vllm_moecxl.types import InPlaceMode, LookupSide, StripeMode
from vllm_moecxl.units import parse_bytes

Mode = Literal["off", "cxl"]
MODES: tuple[Mode, ...] = ("off", "cxl")

#: Minor versions of vLLM whose internals we have read and test against.
SUPPORTED_VLLM = ("0.32", "0.33")

#: Names of the eviction policies; `control.eviction.POLICIES` has a factory for each.
EVICTIONS = (
    "learned",
    "lru",
    "lfu",
    "lfru",
    "class-lru",
    "arc",
    "next-use",
    "second-touch",
    "prefill-protecting",
)

#: What a device's own policy, class-lru, may stand for: itself, and the default, which nobody need have asked for.
DEVICE_EVICTIONS = ("learned", "class-lru")

#: Names of the predictors; `control.prediction.PREDICTORS` has a factory for each.
PREDICTORS = ("gate", "learned", "tokens", "temporal", "transitions", "attention", "history", "semantic")

#: Kinds of banks.
BANK_KINDS = ("numa", "dax", "dram", "file", "emulated")

#: When the slabs of a file are held against their digests: never, when they are first read, or at each fetch.
Verify = Literal["off", "load", "fetch"]

_BANK_REMEDY = (
    'use "dram", "numa:NODE", "dax:/dev/daxX.Y", "file:PATH" or "emulated:DEVICE", each but "file" with an optional '
    'size such as "dram=64GiB"'
)

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
        if re.fullmatch(r"\d{1,9}", text) and int(text) > 0:
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
    """One bank that the user named: ``KIND[:LOCATOR][=SIZE]``.

    Attributes:
        kind: one of `BANK_KINDS`.
        locator: node number of "numa", path of "dax" and "file", device name of "emulated"; "" for "dram".
        capacity_bytes: bytes that it may home, or None for what the place has.
    """

    kind: str
    locator: str = ""
    capacity_bytes: int | None = None

    @property
    def name(self) -> str:
        """The bank's label in logs and metrics."""
        return f"{self.kind}:{self.locator}" if self.locator else self.kind

    @classmethod
    def parse(cls, raw: object) -> BankSpec:
        """Read ``"dram"``, ``"dram=64GiB"``, ``"numa:1"``, ``"dax:/dev/dax0.0=1TiB"``, ``"file:/nvme/model.slabs"`` or
        ``"emulated:cxl-d=64GiB"``.

        Raises:
            ConfigError: anything else.
        """
        if not isinstance(raw, str):
            raise _fail("banks", raw, _BANK_REMEDY)
        kind, has_locator, rest = raw.partition(":")
        if kind == "file":  # a path may well hold an equals sign, and a file's size is its own
            if not rest or "\0" in rest:
                raise _fail("banks", raw, 'name the slab file that moecxl pack wrote, such as "file:/nvme/model.slabs"')
            return cls(kind, rest)
        body, has_size, size = raw.rpartition("=") if "=" in raw else (raw, "", "")
        capacity_bytes = parse_bytes(size) if has_size else None
        if has_size and not capacity_bytes:
            raise _fail("banks", raw, 'a size has a unit, such as "64GiB"')
        kind, has_locator, locator = body.partition(":")
        if kind not in BANK_KINDS or bool(has_locator) != (kind != "dram") or bool(locator) != bool(has_locator):
            raise _fail("banks", raw, _BANK_REMEDY)
        if kind == "numa":
            if not re.fullmatch(r"[0-9]{1,4}", locator):
                raise _fail("banks", raw, 'name a NUMA node by its number, such as "numa:1"; see moecxl topology')
            locator = str(int(locator))
        if "\0" in locator:
            raise _fail("banks", raw, _BANK_REMEDY)
        return cls(kind, locator, capacity_bytes)


@dataclass(frozen=True)
class OffloadConfig:
    """What the user asked for, checked.

    Attributes:
        mode: "cxl" serves the experts from slots; "off" leaves vLLM alone.
        slots: see `SlotSpec`; the raw text is kept for messages.
        banks: homes in order of preference; None for "auto".
        stripe: which slabs are cut over several banks: "auto" (large ones, over the banks of one tier), "all" (those of
            all memory banks) or "never".
        placement_trace: a routing trace whose frequent experts get the best places; None for "all alike".
        strict_placement: whether pages that are not on the node that was asked for, at allocation or after they were
            registered with the device, end the start; False warns and serves from where they are.
        verify: when slabs of a file are checked.
        eviction: name of an eviction policy.
        passes: "exact" keeps the resident model's result; "fast" fetches each slab once per forward and may change
            the last bit.
        pack_to: the slab file that `moecxl pack` makes instead of serving; None to serve.
        in_place: whether a layer may run straight from its homes where the device can address them: "auto" decides
            forward by forward what is cheaper.
        lookup: who looks experts up and fills slots: "host", "device" (inside of CUDA graphs too), or "auto" by what
            the engine's graphs need.
        sidecar: whether fetches run beside the forward; False leaves demand fetches alone.
        prefetch: what is fetched before it is asked for: "auto" by the predictors that have proved worth it, "off", or
            the predictors to ask, by name.
        trace: a file to record the routing of all requests to.
        layer_buffer: whether wide forwards stream through one layer's worth of shared slots; "auto" where it fits.
    """

    mode: Mode = "off"
    slots: SlotSpec = SlotSpec()
    slots_text: object = "auto"
    banks: tuple[BankSpec, ...] | None = None
    stripe: StripeMode = "auto"
    placement_trace: str | None = None
    strict_placement: bool = False
    verify: Verify = "load"
    pack_to: str | None = None
    eviction: str = "learned"
    passes: Literal["exact", "fast"] = "exact"
    layer_buffer: bool | Literal["auto"] = "auto"
    in_place: InPlaceMode = "auto"
    lookup: LookupSide = "auto"
    sidecar: bool = True
    prefetch: Literal["auto", "off"] | tuple[str, ...] = "auto"
    trace: str | None = None

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> OffloadConfig:
        """Check the user's options and fill in the defaults.

        Raises:
            ConfigError: an unknown key, a wrong type or an impossible value; one sentence.
        """
        known = sorted({f.name for f in fields(cls)} - {"slots_text"})
        if unknown := sorted(map(str, set(raw) - set(known))):
            raise ConfigError(
                f"--moe-offload-config: unknown option(s) {', '.join(unknown)}; this version knows {', '.join(known)}"
            )
        config = cls(
            mode=_one_of("mode", raw.get("mode", "off"), MODES),
            slots=SlotSpec.parse(raw.get("slots", "auto")),
            slots_text=raw.get("slots", "auto"),
            banks=_parse_banks(raw.get("banks", "auto")),
            stripe=_one_of("stripe", raw.get("stripe", "auto"), get_args(StripeMode)),
            placement_trace=_path("placement_trace", raw.get("placement_trace")),
            strict_placement=_one_of("strict_placement", raw.get("strict_placement", False), (True, False)),
            verify=_one_of("verify", raw.get("verify", "load"), get_args(Verify)),
            pack_to=_path("pack_to", raw.get("pack_to")),
            eviction=_one_of("eviction", raw.get("eviction", "learned"), EVICTIONS),
            passes=_one_of("passes", raw.get("passes", "exact"), ("exact", "fast")),
            layer_buffer=_one_of("layer_buffer", raw.get("layer_buffer", "auto"), ("auto", True, False)),
            in_place=_one_of("in_place", raw.get("in_place", "auto"), get_args(InPlaceMode)),
            lookup=_one_of("lookup", raw.get("lookup", "auto"), get_args(LookupSide)),
            sidecar=_one_of("sidecar", raw.get("sidecar", True), (True, False)),
            prefetch=_parse_prefetch(raw.get("prefetch", "auto")),
            trace=_path("trace", raw.get("trace")),
        )
        if isinstance(config.prefetch, tuple) and not config.sidecar:
            raise _fail(
                "prefetch", raw["prefetch"], "the sidecar prefetches, and it is switched off: drop one of the two"
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


def _path(option: str, value: Any) -> str | None:
    if value is None or (isinstance(value, str) and value and "\0" not in value):
        return value
    raise _fail(option, value, "give the path of a file")


def _parse_prefetch(raw: object) -> Literal["auto", "off"] | tuple[str, ...]:
    if raw in ("auto", "off"):
        return raw
    names = [raw] if isinstance(raw, str) else raw
    if isinstance(names, list | tuple) and names and all(name in PREDICTORS for name in names):
        return tuple(dict.fromkeys(names))
    raise _fail("prefetch", raw, f'use "auto", "off", or a list of predictors among {", ".join(PREDICTORS)}')


def _parse_banks(raw: object) -> tuple[BankSpec, ...] | None:
    if raw == "auto":
        return None
    if isinstance(raw, str):  # one bank on a command line needs no list
        raw = [raw]
    if not isinstance(raw, list | tuple) or not raw:
        raise _fail("banks", raw, 'use "auto" or a list of bank specs such as ["numa:1", "dram=64GiB"]')
    banks = tuple(BankSpec.parse(item) for item in raw)
    if len({bank.name for bank in banks}) != len(banks):
        raise _fail("banks", raw, "each bank may be named once")
    if sum(bank.kind == "file" for bank in banks) > 1:
        raise _fail("banks", raw, "name one file at most, it has all experts")
    return banks
