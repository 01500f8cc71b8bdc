"""One slab on its way, from the moment that somebody asks for it."""

from __future__ import annotations

from vllm_moecxl.control.scheduler import Transfer
from vllm_moecxl.data.devices.base import Event
from vllm_moecxl.data.slabs import Home, SlabTarget


class Fetch:
    """One slab on its way into a cell. Written under the mover's lock.

    Attributes:
        home, expert_id: the slab.
        target: the cell, per extent a [row bytes] uint8 tensor on the device.
        transfer: what the scheduler knows of it.
        error: why it will not arrive.
        has_landed: whether every byte is there, and was held against its digest where that is due.
        is_checking: whether somebody reads the cell to hold it against its digest.
        is_whole: whether the slab goes in one chunk, because its digest is due before the device gets it.
    """

    __slots__ = (
        *("after", "error", "events", "expert_id", "has_landed", "home", "is_checking", "is_whole", "pieces"),
        *("started_s", "target", "transfer", "unissued_count"),
    )

    def __init__(self, home: Home, expert_id: int, target: SlabTarget, after: Event | None, started_s: float) -> None:
        self.home = home
        self.expert_id = expert_id
        self.target = target
        self.started_s = started_s
        self.error: BaseException | None = None
        self.has_landed = False
        self.is_checking = False
        self.is_whole = False
        self.transfer: Transfer
        #: Copies into the cell wait for this on the device.
        self.after = after
        #: Behind the copies that were issued. All of them: two threads that copy on one stream may note their events
        #: in another order than they are on it.
        self.events: list[Event] = []
        self.pieces = home.pieces(expert_id)
        self.unissued_count = len(self.pieces)

    @property
    def is_over(self) -> bool:
        """Whether it was given up or has failed, and nothing writes to the cell any more."""
        transfer = self.transfer
        return (self.error is not None or transfer.is_cancelled) and not transfer.in_flight_count
