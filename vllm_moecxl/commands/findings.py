"""What a subcommand found out, in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One sentence about the machine.

    Attributes:
        level: "ok"; "note", worth knowing; "problem", offloading will not work as it stands and the text has a remedy.
        topic: the section it belongs to.
        text: the sentence.
    """

    level: Level
    topic: str
    text: str
