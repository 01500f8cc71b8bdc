"""What the host and the operations of the modelled accelerator know of each other: vector clocks.

Source: C. Flanagan, S. Freund, "FastTrack: efficient and precise dynamic race detection", PLDI 2009.
"""

from __future__ import annotations

from collections.abc import Iterable

from vllm_moecxl.data.devices.modelled_parts import Operation, Region


class Order:
    """Clocks say per stream how many of its operations are known to have ended; accesses that are not ordered by them
    would strike in some schedule.

    Words that the host and the device both read and write while the device runs, each as a whole, are no race. They
    carry order: who reads one knows what its writer knew when it wrote it.

    Args:
        is_checked: whether accesses are held against each other.

    Attributes:
        host_clock: what the host knows.
    """

    def __init__(self, *, is_checked: bool) -> None:
        self.host_clock: list[int] = []
        self._is_checked = is_checked
        #: By address of a word, what its last writer knew.
        self._word_clocks: dict[int, list[int]] = {}
        #: Operations that have not started, of which nobody knows what they will touch.
        self._unlocated: list[Operation] = []

    def queue(self, operation: Operation) -> str:
        """An operation is queued; what is wrong with that, empty where nothing is."""
        stream = operation.stream
        merge(stream.clock, self.host_clock)
        operation.clock = stream.clock.copy()
        stream.clock[stream.actor - 1] += 1
        operation.position = stream.clock[stream.actor - 1]
        if operation.touches is not None:
            self._unlocated.append(operation)
            return ""
        return self._enter(operation)

    def locate(self, operation: Operation) -> str:
        """An operation starts of which nobody knew what it touches; what is wrong with that."""
        merge(operation.clock, operation.stream.learned)
        self._unlocated.remove(operation)
        return self._enter(operation)

    def exchange(self, operation: Operation, words: list[bytes]) -> None:
        """An operation has read words of the host's, and has written others, which held `words` before."""
        self._acquire((memory.base + start for memory, start, _ in operation.words_read), operation.clock)
        merge(operation.stream.learned, operation.clock)
        for (memory, start, stop), word in zip(operation.words_written, words, strict=True):
            # Who finds the old word there learns nothing. Who finds the new one does not know that the operation has
            # ended: only what was before it.
            if memory.read(start, stop) != word:
                self._word_clocks[memory.base + start] = operation.clock.copy()

    def host_reads(self, addresses: Iterable[int]) -> None:
        """The host has read words."""
        self._acquire(addresses, self.host_clock)

    def host_writes(self, address: int) -> None:
        """The host has written a word."""
        self._word_clocks[address] = self.host_clock.copy()

    def is_known_to_host(self, operation: Operation) -> bool:
        """Whether the host knows that an operation has ended; where nothing is checked, whether it has."""
        return knows(self.host_clock, operation) if self._is_checked else operation.is_ended

    def _acquire(self, addresses: Iterable[int], clock: list[int]) -> None:
        for address in addresses:
            if (known := self._word_clocks.get(address)) is not None:
                merge(clock, known)

    def _enter(self, operation: Operation) -> str:
        """Note what an operation touches; what of it is not ordered with what others touch."""
        for regions, is_write in ((operation.reads, False), (operation.writes, True)):
            for region in regions:
                self._prune(region)
                if self._is_checked and (message := self._conflict(operation, region, is_write=is_write)):
                    return message
                region[0].accesses.append((operation, *region[1:], is_write))
        return ""

    def _conflict(self, operation: Operation, region: Region, *, is_write: bool) -> str:
        memory, start, stop = region
        for other, other_start, other_stop, other_writes in memory.accesses:
            if start >= other_stop or other_start >= stop or other is operation:
                continue
            # What starts now may have been queued before the other, which waits for it.
            is_ordered = knows(operation.clock, other) or knows(other.clock, operation)
            if (is_write or other_writes) and not is_ordered:
                return (
                    f"{operation.name} on the {operation.stream.name} stream {'writes' if is_write else 'reads'} "
                    f"{memory.cell(start, stop)} without being ordered after {other}, "
                    f"which {'writes' if other_writes else 'reads'} it"
                )
            if not other.snapshot or memory.is_device or self.is_known_to_host(other):
                continue
            if memory.read(other_start, other_stop) != other.snapshot:
                return (
                    f"{memory.cell(other_start, other_stop)} was overwritten by the host before {other} was known "
                    "to have ended"
                )
        return ""

    def _prune(self, region: Region) -> None:
        """Forget accesses that whatever touches the memory from now on comes after."""
        memory = region[0]
        if len(memory.accesses) > memory.accesses_max:
            memory.accesses = [one for one in memory.accesses if not self._is_known_to_all(one[0])]
            memory.accesses_max = max(memory.accesses_max, 2 * len(memory.accesses))

    def _is_known_to_all(self, operation: Operation) -> bool:
        return self.is_known_to_host(operation) and all(knows(one.clock, operation) for one in self._unlocated)


def knows(clock: list[int], operation: Operation) -> bool:
    """Whether an operation, which is queued, has ended for whoever knows this."""
    index = operation.stream.actor - 1
    return index < len(clock) and clock[index] >= operation.position


def merge(clock: list[int], other: list[int]) -> None:
    """Know what the other knows."""
    if len(clock) < len(other):  # it is older than some streams
        clock += [0] * (len(other) - len(clock))
    for index, position in enumerate(other):
        if position > clock[index]:
            clock[index] = position
