"""The modelled accelerator for kernels that run when they are called, as vLLM's CPU kernels do; for many threads."""

from __future__ import annotations

import functools
import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

from vllm_moecxl.data.devices.base import Touches
from vllm_moecxl.data.devices.modelled import ModelledBackend


class RandomChooser:
    """Chooses by chance, the same each time."""

    def __init__(self, seed: int = 6) -> None:
        self._rng = random.Random(seed)

    def choose(self, actors: Sequence[int]) -> int:
        return self._rng.randrange(len(actors))


class PromptBackend(ModelledBackend):
    """See the module. The compute stream is brought up to date at once; the mover's copies run when the chooser likes.

    Attributes:
        names: what was run on the compute stream, the first word of each name.
        captures: what `is_capturing` says.
    """

    def __init__(self, seed: int = 6) -> None:
        super().__init__(RandomChooser(seed))
        self.lock = threading.RLock()
        self.names: list[str] = []
        self.captures = False

    def run(self, name: str, work: Callable[[], None], touches: Callable[[], Touches]) -> None:
        super().run(name, work, touches)
        self.names.append(name.split()[0])
        self.catch_up()

    def is_capturing(self) -> bool:
        return self.captures

    def catch_up(self) -> None:
        """Run what is queued on the compute stream."""
        with self.lock:
            self.synchronize(self.record(self.compute_stream()))


def _locked(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def locked(self: PromptBackend, *arguments: Any, **options: Any) -> Any:
        with self.lock:
            return method(self, *arguments, **options)

    return locked


for _name in (
    *("allocate", "copy", "copy_rows", "copy_stream", "query", "read_words", "record", "register", "route_ids", "run"),
    *("stage", "synchronize", "unregister", "wait", "write_word"),
):
    setattr(PromptBackend, _name, _locked(getattr(PromptBackend, _name)))
