"""The vocabulary that all layers share; the README's glossary in code."""

from __future__ import annotations

import enum
from typing import Literal, NamedTuple


class ExpertKey(NamedTuple):
    """An expert as vLLM counts it on this rank."""

    layer_id: int
    expert_id: int


class Lookup(enum.Enum):
    """What residency answers for one expert."""

    HIT = "hit"
    PENDING = "pending"
    MISS = "miss"


class SlotState(enum.IntEnum):
    """A slot's life. Weights are clean, so eviction writes nothing."""

    FREE = 0
    FILLING = 1
    RESIDENT = 2


class Cause(enum.IntEnum):
    """Why bytes are copied, the most urgent first. Its label in metrics is its name in lower case.

    DEMAND: a forward waits for them.
    PREFETCH: a forward may soon need them.
    MIGRATION: a home moves from bank to bank.
    """

    DEMAND = 0
    PREFETCH = 1
    MIGRATION = 2


class PassKind(enum.Enum):
    """How a forward is run when it needs more experts than there are slots.

    SINGLE: one kernel call from the slots, everything fits.
    TOKEN: several calls, each takes whole tokens whose experts fit together.
    EXPERT: several calls, each takes all tokens of some experts; their outputs are added.
    LAYER_BUFFER: one kernel call from a buffer with a row for every expert.
    IN_PLACE: one kernel call straight from the experts' homes, where the device can address them.
    """

    SINGLE = "single"
    TOKEN = "token"
    EXPERT = "expert"
    LAYER_BUFFER = "layer_buffer"
    IN_PLACE = "in_place"


#: Class of the memory that a bank is made of. (The fourth tier of the glossary, the device, holds slots, not homes.)
Tier = Literal["cxl", "dram", "file"]

#: Whether one slab may lie across several banks, so that one miss is served by all of them together.
#: "auto": large slabs, over the memory banks of one tier; "all": every slab, over all memory banks; "never".
StripeMode = Literal["auto", "never", "all"]

#: Whether a layer runs straight from addressable homes: "auto" where that costs less than copying; "never"; "always".
InPlaceMode = Literal["auto", "never", "always"]

#: Who looks experts up and fills slots: "host", between an engine's graphs; "device", by kernels that a graph may hold;
#: "auto": the device where graphs hold whole forwards.
LookupSide = Literal["auto", "host", "device"]
