"""The modelled accelerator: it runs every order that streams and events allow, no other, and sees what goes wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from tests.races.choosers import BoundedChooser, RandomChooser, every_path
from vllm_moecxl.data.devices.base import Touches
from vllm_moecxl.data.devices.modelled import HOST, Chooser, ModelledBackend, Violation
from vllm_moecxl.data.devices.modelled_parts import ModelledStream

Program = Callable[[ModelledBackend], None]


class InOrder:
    """The chooser of a device that does everything at once, in the order of its streams, before the host goes on."""

    def choose(self, actors: Sequence[int]) -> int:
        return int(actors[0] == HOST)


class Lazy:
    """The chooser of a device that rests while the host can go on, and then turns to its last stream."""

    def choose(self, actors: Sequence[int]) -> int:
        return 0 if actors[0] == HOST else len(actors) - 1


def bytes_of(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def registered(backend: ModelledBackend, values: Sequence[int]) -> torch.Tensor:
    memory = bytes_of(values)
    assert backend.register(memory)
    return memory


def slots(backend: ModelledBackend, count: int = 2) -> torch.Tensor:
    cells = backend.allocate((count, 4), torch.uint8)
    backend.label(cells, "slots")
    return cells


def strikes(program: Program, **options: bool) -> set[str]:
    """Messages of the violations over all schedules; "" for schedules without one."""
    messages = set()

    def run(chooser: Chooser) -> None:
        backend = ModelledBackend(chooser, checks_order=False, **options)
        try:
            program(backend)
            backend.finish()
        except Violation as violation:
            messages.add(str(violation))
        else:
            messages.add("")

    for _ in every_path(run):
        pass
    return messages


def unordered(program: Program, chooser: Chooser | None = None) -> str:
    """Message of the violation that vector clocks show, in a schedule in which nothing strikes."""
    try:
        quiet = ModelledBackend(chooser or InOrder(), checks_order=False)
        program(quiet)
        quiet.finish()
    except Violation as violation:
        raise AssertionError("the program is to be one that comes off well with this chooser") from violation
    with pytest.raises(Violation) as caught:
        program(ModelledBackend(chooser or InOrder()))
    return str(caught.value)


def orders(program: Callable[[ModelledBackend, list[str]], None]) -> list[tuple[str, ...]]:
    """What ran, in the order of its ends, for every schedule."""
    seen: list[tuple[str, ...]] = []

    def run(chooser: Chooser) -> None:
        log: list[str] = []
        backend = ModelledBackend(chooser, trace=log)
        program(backend, log)
        backend.finish()
        seen.append(tuple(line.removeprefix("end: ").split(" (")[0] for line in log if line.startswith("end: ")))

    for _ in every_path(run):
        pass
    return seen


def copies(backend: ModelledBackend, counts: Sequence[int]) -> None:
    """`counts[i]` copies on the stream of link i, all into cells of their own."""
    source = registered(backend, range(4))
    cells = slots(backend, sum(counts))
    cell_ids = iter(range(sum(counts)))
    for link_id, count in enumerate(counts):
        for _ in range(count):
            backend.copy(source, cells[next(cell_ids)], backend.copy_stream(link_id))


@pytest.mark.parametrize("counts", [[1], [3], [1, 1], [2, 1], [2, 2], [1, 1, 1]])
def test_streams_without_events_run_in_every_interleaving(counts: list[int]) -> None:
    """Each operation is two steps; the interleavings of streams of n steps are the multinomial of the n."""
    run = orders(lambda backend, _: copies(backend, counts))
    steps = [2 * count for count in counts]
    assert len(run) == math.factorial(sum(steps)) // math.prod(map(math.factorial, steps))


def test_a_wait_leaves_one_order_only() -> None:
    def program(backend: ModelledBackend, _: list[str]) -> None:
        cells = slots(backend)
        link, compute = backend.copy_stream(0), backend.compute_stream()
        backend.copy(registered(backend, range(4)), cells[0], link)
        backend.wait(compute, backend.record(link))
        backend.launch("kernel", [(cells, [0])])

    assert orders(program) == [("copy", "kernel")]


def test_a_wait_holds_back_only_what_is_queued_after_it() -> None:
    def program(backend: ModelledBackend, _: list[str]) -> None:
        cells = slots(backend)
        link, compute = backend.copy_stream(0), backend.compute_stream()
        backend.launch("early", [])
        backend.copy(registered(backend, range(4)), cells[0], link)
        backend.wait(compute, backend.record(link))
        backend.launch("late", [(cells, [0])])

    assert set(orders(program)) == {("early", "copy", "late"), ("copy", "early", "late")}


def test_an_event_covers_what_was_queued_before_it_and_nothing_after() -> None:
    def program(backend: ModelledBackend, _: list[str]) -> None:
        link, compute = backend.copy_stream(0), backend.compute_stream()
        cells = slots(backend)
        source = registered(backend, range(4))
        backend.copy(source, cells[0], link)
        event = backend.record(link)
        backend.launch("kernel", [])
        backend.wait(compute, event)
        backend.launch("waits", [(cells, [0])])
        backend.copy(source, cells[1], link)

    seen = set(orders(program))
    assert ("copy", "copy", "kernel", "waits") in seen and ("copy", "kernel", "waits", "copy") in seen
    assert all(order.index("copy") < order.index("waits") and order.index("kernel") < 2 + 1 for order in seen)


def test_the_host_finds_an_event_complete_or_not_and_waits_no_further_than_it_has_to() -> None:
    found: list[bool] = []

    def program(backend: ModelledBackend, log: list[str]) -> None:
        cells = slots(backend)
        source = registered(backend, range(4))
        link = backend.copy_stream(0)
        backend.copy(source, cells[0], link)
        event = backend.record(link)
        found.append(backend.query(event))
        assert found[-1] == any(line.startswith("end") for line in log)
        backend.synchronize(event)
        assert backend.query(event)

    assert len(orders(program)) == 3, "nothing yet, running, complete"
    assert found == [False, False, True]


@pytest.mark.parametrize("patience", [1, 2, 5])
def test_a_host_that_polls_is_sent_on_a_limited_number_of_times(patience: int) -> None:
    counts: list[int] = []

    def run(chooser: Chooser) -> None:
        backend = ModelledBackend(chooser, patience=patience)
        copies(backend, [1])
        event = backend.record(backend.copy_stream(0))
        count = 1
        while not backend.query(event):
            count += 1
        counts.append(count)

    for _ in every_path(run):
        pass
    assert len(counts) == (patience + 1) ** 2 and max(counts) == 2 * patience + 1


def test_bytes_arrive_when_the_copy_has_ended() -> None:
    backend = ModelledBackend(Lazy())
    cells = slots(backend)
    backend.copy(registered(backend, [1, 2, 3, 4]), cells[1], backend.copy_stream(0))
    event = backend.record(backend.copy_stream(0))
    assert not backend.query(event) and not cells.any()
    backend.synchronize(event)
    assert cells.tolist() == [[0, 0, 0, 0], [1, 2, 3, 4]]
    other = backend.allocate((2, 2), torch.int16)
    backend.copy_rows([cells.view(torch.int16)], [1], [other], [0])
    ids = backend.route_ids(torch.tensor([[3, -(1 << 40)]]))
    assert ids.tolist() == [[3, -1]] and ids.dtype is torch.int32
    assert other.view(torch.uint8).tolist() == [[1, 2, 3, 4], [0, 0, 0, 0]]
    backend.finish()


def test_copies_read_what_their_source_held_at_their_start() -> None:
    """Reading a device row is itself ordered: the second copy of rows takes what the first put there."""
    backend = ModelledBackend(RandomChooser(0))
    cells = slots(backend, 3)
    backend.copy(registered(backend, [9, 8, 7, 6]), cells[0], backend.copy_stream(0))
    backend.wait(backend.compute_stream(), backend.record(backend.copy_stream(0)))
    backend.copy_rows([cells], [0], [cells], [1])
    backend.copy_rows([cells], [1], [cells], [2])
    backend.finish()
    assert cells.tolist() == [[9, 8, 7, 6]] * 3


def read_before_written(backend: ModelledBackend) -> None:
    backend.launch("kernel", [(slots(backend), [1])])


def read_under_copy(backend: ModelledBackend) -> None:
    cells = slots(backend)
    source = registered(backend, range(4))
    backend.copy(source, cells[0], backend.copy_stream(0))
    backend.synchronize(backend.record(backend.copy_stream(0)))
    backend.launch("kernel", [(cells, [0])])
    backend.copy(source[:2], cells[0][2:], backend.copy_stream(0))


def two_copies(backend: ModelledBackend) -> None:
    cells, source = slots(backend), registered(backend, range(4))
    backend.copy(source, cells[0], backend.copy_stream(0))
    backend.copy(source[:1], cells[0][3:], backend.copy_stream(1))


def copy_rows_under_copy(backend: ModelledBackend) -> None:
    cells, source = slots(backend), registered(backend, range(4))
    backend.copy(source, cells[0], backend.copy_stream(0))
    backend.synchronize(backend.record(backend.copy_stream(0)))
    backend.copy_rows([cells], [0], [cells], [1])
    backend.copy(source, cells[1], backend.copy_stream(0))


def staging_overwritten(backend: ModelledBackend) -> None:
    cells, staging = slots(backend), backend.stage(4)
    for cell_id in range(2):
        staging.fill_(cell_id + 1)
        backend.copy(staging, cells[cell_id], backend.copy_stream(0))


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        pytest.param(
            read_before_written,
            {"kernel (number 1 on the compute stream) reads slots, row 1, bytes 0 to 4, where nothing was written yet"},
            id="poison",
        ),
        pytest.param(
            read_under_copy,
            {
                "",
                "kernel (number 1 on the compute stream) starts while copy (number 2 on the link 0 stream) still "
                "writes slots, row 0, bytes 2 to 4",
                "copy (number 2 on the link 0 stream) overwrites slots, row 0, bytes 2 to 4 while "
                "kernel (number 1 on the compute stream) still reads it",
            },
            id="a slot under copy is read",
        ),
        pytest.param(
            two_copies,
            {
                "",
                "copy (number 1 on the link 0 stream) starts while copy (number 1 on the link 1 stream) still "
                "writes slots, row 0, bytes 3 to 4",
                "copy (number 1 on the link 1 stream) starts while copy (number 1 on the link 0 stream) still "
                "writes slots, row 0, bytes 3 to 4",
            },
            id="two copies write",
        ),
        pytest.param(
            copy_rows_under_copy,
            {
                "",
                "copy of rows (number 1 on the compute stream) starts while copy (number 2 on the link 0 stream) still "
                "writes slots, row 1, bytes 0 to 4",
                "copy (number 2 on the link 0 stream) starts while copy of rows (number 1 on the compute stream) still "
                "writes slots, row 1, bytes 0 to 4",
            },
            id="rows are copied to a cell under copy",
        ),
        pytest.param(
            staging_overwritten,
            {
                "staging cell 1, row 0, bytes 0 to 4 was overwritten by the host before "
                "copy (number 1 on the link 0 stream) had ended"
            },
            id="staging is wrapped early",
        ),
    ],
)
def test_a_search_finds_what_strikes(program: Program, expected: set[str]) -> None:
    assert strikes(program) == expected


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (
            read_under_copy,
            "copy on the link 0 stream writes slots, row 0, bytes 2 to 4 without being ordered after "
            "kernel (number 1 on the compute stream), which reads it",
        ),
        (
            two_copies,
            "copy on the link 1 stream writes slots, row 0, bytes 3 to 4 without being ordered after "
            "copy (number 1 on the link 0 stream), which writes it",
        ),
        (
            copy_rows_under_copy,
            "copy on the link 0 stream writes slots, row 1, bytes 0 to 4 without being ordered after "
            "copy of rows (number 1 on the compute stream), which writes it",
        ),
    ],
)
def test_clocks_find_what_does_not_strike_in_this_schedule(program: Program, expected: str) -> None:
    assert unordered(program) == expected


def test_clocks_find_a_staging_cell_used_again_before_its_copy_is_known_to_have_ended() -> None:
    def program(backend: ModelledBackend) -> None:
        cells, staging, link = slots(backend), backend.stage(4), backend.copy_stream(0)
        staging.fill_(1)
        backend.copy(staging, cells[0], link)
        backend.launch("kernel", [])
        backend.synchronize(backend.record(backend.compute_stream()))  # the copy has ended too, as it happens
        staging.fill_(2)
        backend.copy(staging, cells[1], link)

    class LinkFirst:
        def choose(self, actors: Sequence[int]) -> int:
            return len(actors) - 1

    assert "was overwritten by the host before copy (number 1 on the link 0 stream) was known to have ended" in (
        unordered(program, LinkFirst())
    )


@pytest.mark.parametrize("how", ["synchronize", "query", "device", "same stream", "through a third stream", "routes"])
@pytest.mark.parametrize("checks_order", [True, False])
def test_nothing_is_found_where_copy_and_kernel_are_ordered(how: str, checks_order: bool) -> None:
    def program(backend: ModelledBackend) -> None:
        cells, source = slots(backend), registered(backend, range(4))
        link, compute, third = backend.copy_stream(0), backend.compute_stream(), backend.copy_stream(1)
        for _ in range(2):
            backend.copy(source, cells[0], link)
            filled = backend.record(link)
            backend.wait(compute, filled)
            backend.launch("kernel", [(cells, [0])])
            read = backend.record(compute)
            match how:
                case "synchronize":
                    backend.synchronize(read)
                case "query":
                    while not backend.query(read):
                        pass
                case "device":
                    backend.wait(link, read)
                case "same stream":
                    backend.wait(third, read)
                    link = third
                case "through a third stream":
                    backend.wait(third, read)
                    backend.wait(link, backend.record(third))
                case "routes":
                    backend.route_ids(torch.zeros(1, 1, dtype=torch.int32))

    def run(chooser: Chooser) -> None:
        backend = ModelledBackend(chooser, checks_order=checks_order, patience=1)
        program(backend)
        backend.finish()

    assert all(True for _ in every_path(run))
    for seed in range(50):
        run(RandomChooser(seed))
        run(BoundedChooser(seed))


def test_an_event_that_the_host_found_incomplete_orders_nothing() -> None:
    def program(backend: ModelledBackend) -> None:
        cells, source = slots(backend), registered(backend, range(4))
        backend.copy(source, cells[0], backend.copy_stream(0))
        backend.query(backend.record(backend.copy_stream(0)))
        backend.copy(source, cells[0], backend.copy_stream(1))

    with pytest.raises(Violation, match="without being ordered"):
        program(ModelledBackend(Lazy()))
    program(ModelledBackend(InOrder()))


def test_what_a_kernel_finds_wrong_is_a_violation_even_if_the_program_goes_on() -> None:
    backend = ModelledBackend(InOrder())

    def check() -> None:
        raise backend.violate("the kernel found another expert")

    backend.launch("kernel", [], check)
    with pytest.raises(Violation, match="another expert"):
        backend.route_ids(torch.zeros(1, 1, dtype=torch.int32))
    with pytest.raises(Violation, match="another expert"):
        backend.finish()


@pytest.mark.parametrize("checks_order", [True, False])
@pytest.mark.parametrize("is_staged", [True, False])
def test_host_memory_is_not_given_up_before_the_copies_that_read_it_are_known_to_have_ended(
    checks_order: bool, is_staged: bool
) -> None:
    def start() -> tuple[ModelledBackend, torch.Tensor]:
        backend = ModelledBackend(Lazy(), checks_order=checks_order)
        source = backend.stage(4) if is_staged else registered(backend, range(4))
        backend.copy(source, slots(backend)[0], backend.copy_stream(0))
        return backend, source

    backend, source = start()
    with pytest.raises(Violation, match=r"is unregistered before copy \(number 1 on the link 0 stream\) is known"):
        backend.unregister(source)
    backend, source = start()
    backend.synchronize(backend.record(backend.copy_stream(0)))
    backend.unregister(source)
    assert backend.register(source)


def test_the_device_keeps_what_its_operations_need() -> None:
    backend = ModelledBackend(Lazy())
    cells = backend.allocate((2, 4), torch.uint8)
    free_bytes = backend.free_bytes()
    backend.copy(registered(backend, range(4)), cells[0], backend.copy_stream(0))
    del cells
    others = [backend.allocate((2, 4), torch.uint8) for _ in range(50)]
    assert backend.free_bytes() == free_bytes - 50 * 8
    backend.finish()
    assert not any(other.any() for other in others)
    del others
    assert backend.free_bytes() == free_bytes + 8


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (lambda b: b.copy(bytes_of(range(4)), slots(b)[0], b.copy_stream(0)), "is not in registered or staging memory"),
        (lambda b: b.copy(slots(b)[0], slots(b)[1], b.copy_stream(0)), "is not in registered or staging memory"),
        (lambda b: b.copy(b.stage(4), bytes_of(range(4)), b.copy_stream(0)), "is not in memory of the device"),
        (lambda b: b.launch("kernel", [(slots(b, 2), [2])]), r"touches rows \[2\] of slots, which has 2"),
        (lambda b: b.launch("kernel", [(torch.zeros(2, 4), [0])]), "is not in memory of the device"),
        (lambda b: b.register(registered(b, range(4))), "registered twice"),
        (lambda b: b.unregister(bytes_of(range(4))), "which nobody registered or staged"),
        (lambda b: b.unregister(registered(b, range(4))[:2]), "which nobody registered or staged"),
    ],
)
def test_memory_of_the_wrong_kind_is_refused(program: Program, message: str) -> None:
    with pytest.raises(Violation, match=message):
        program(ModelledBackend(InOrder()))


def test_memory_is_accounted_for_and_may_refuse_to_be_registered() -> None:
    refused = bytes_of(range(4))
    backend = ModelledBackend(InOrder(), capacity_bytes=100, may_register=lambda memory: memory is not refused)
    assert not backend.register(refused) and backend.register(bytes_of(range(4)))
    cells = backend.allocate((5, 4), torch.uint8)
    backend.stage(8)
    assert backend.free_bytes() == 80
    assert not cells.any() and cells.shape == (5, 4)
    del cells
    assert backend.free_bytes() == 100


@pytest.mark.parametrize("chooser", [RandomChooser, BoundedChooser])
def test_a_seed_replays_its_schedule(chooser: type[RandomChooser] | type[BoundedChooser]) -> None:
    def trace(seed: int) -> tuple[str, ...]:
        log: list[str] = []
        backend = ModelledBackend(chooser(seed), trace=log)
        copies(backend, [3, 3, 3])
        while not backend.query(backend.record(backend.copy_stream(2))):
            pass
        backend.finish()
        return tuple(log)

    traces = [trace(seed) for seed in range(40)]
    assert traces == [trace(seed) for seed in range(40)]
    assert len(set(traces)) > (20 if chooser is RandomChooser else 5)


def run(
    backend: ModelledBackend,
    name: str,
    reads: Sequence[tuple[torch.Tensor, Sequence[int]]] = (),
    writes: Sequence[tuple[torch.Tensor, Sequence[int]]] = (),
    work: Callable[[], None] = lambda: None,
    link_id: int | None = None,
) -> None:
    """Kernels that say what they touch when they start; on the compute stream, or on one of their own."""
    stream = backend.compute_stream() if link_id is None else backend.copy_stream(link_id)
    backend.run_on(stream, name, work, lambda: (reads, writes))


def test_what_kernels_touch_is_asked_when_they_start_and_their_effect_is_there_when_they_have_ended() -> None:
    backend = ModelledBackend(InOrder())
    cells, log = slots(backend), []
    backend.copy(registered(backend, [1, 2, 3, 4]), cells[0], backend.copy_stream(0))

    def touches() -> Touches:
        log.append("touches")
        return [(cells, [0])], [(cells, [1])]

    def work() -> None:
        log.append("work")
        cells[1] = cells[0]

    backend.wait(backend.compute_stream(), backend.record(backend.copy_stream(0)))
    backend.run("kernels", work, touches)
    assert log == []
    backend.run("later kernels", lambda: log.append("later"), lambda: ([(cells, [1])], []))
    backend.finish()
    assert log == ["touches", "work", "later"] and cells.tolist() == [[1, 2, 3, 4]] * 2


def late_read_under_copy(backend: ModelledBackend) -> None:
    cells, source = slots(backend), registered(backend, range(4))
    backend.copy(source, cells[0], backend.copy_stream(0))
    backend.synchronize(backend.record(backend.copy_stream(0)))
    run(backend, "kernels", reads=[(cells, [0])])
    backend.copy(source[:2], cells[0][2:], backend.copy_stream(0))


def late_write_under_copy(backend: ModelledBackend) -> None:
    cells, source = slots(backend), registered(backend, range(4))
    backend.copy(source, cells[1], backend.copy_stream(0))
    run(backend, "kernels", reads=[(source.view(1, 4), [0])], writes=[(cells, [1])])


def late_write_under_late_read(backend: ModelledBackend) -> None:
    cells = slots(backend)
    run(backend, "first kernels", writes=[(cells, [1])])
    backend.synchronize(backend.record(backend.compute_stream()))
    run(backend, "second kernels", writes=[(cells, [1])])
    run(backend, "other kernels", reads=[(cells, [1])], link_id=0)


@pytest.mark.parametrize(
    ("program", "struck", "message"),
    [
        (
            late_read_under_copy,
            {
                "",
                "kernels (number 1 on the compute stream) starts while copy (number 2 on the link 0 stream) still "
                "writes slots, row 0, bytes 2 to 4",
                "copy (number 2 on the link 0 stream) overwrites slots, row 0, bytes 2 to 4 while "
                "kernels (number 1 on the compute stream) still reads it",
            },
            "kernels on the compute stream reads slots, row 0, bytes 0 to 4 without being ordered after "
            "copy (number 2 on the link 0 stream), which writes it",
        ),
        (
            late_write_under_copy,
            {
                "",
                "kernels (number 1 on the compute stream) starts while copy (number 1 on the link 0 stream) still "
                "writes slots, row 1, bytes 0 to 4",
                "copy (number 1 on the link 0 stream) starts while kernels (number 1 on the compute stream) still "
                "writes slots, row 1, bytes 0 to 4",
            },
            "kernels on the compute stream writes slots, row 1, bytes 0 to 4 without being ordered after "
            "copy (number 1 on the link 0 stream), which writes it",
        ),
        (
            late_write_under_late_read,
            {
                "",
                "second kernels (number 2 on the compute stream) overwrites slots, row 1, bytes 0 to 4 while "
                "other kernels (number 1 on the link 0 stream) still reads it",
                "other kernels (number 1 on the link 0 stream) starts while "
                "second kernels (number 2 on the compute stream) still writes slots, row 1, bytes 0 to 4",
            },
            "other kernels on the link 0 stream reads slots, row 1, bytes 0 to 4 without being ordered after "
            "second kernels (number 2 on the compute stream), which writes it",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_known_only_when_it_runs_is_held_against_the_rest(
    program: Program, struck: set[str], message: str
) -> None:
    assert strikes(program) == struck

    def searched(backend: ModelledBackend) -> None:
        program(backend)
        backend.finish()

    assert unordered(searched) == message


def test_what_was_queued_later_and_waits_for_kernels_is_ordered_after_them() -> None:
    def program(chooser: Chooser) -> None:
        backend = ModelledBackend(chooser)
        cells, source = slots(backend), registered(backend, range(4))
        run(backend, "kernels", writes=[(cells, [0])])
        backend.wait(backend.copy_stream(0), backend.record(backend.compute_stream()))
        backend.copy(source, cells[0], backend.copy_stream(0))
        backend.finish()

    for _ in every_path(program):
        pass


def test_kernels_that_have_not_started_are_held_against_what_the_host_knows_to_have_ended() -> None:
    """However much there was meanwhile, and although nothing strikes."""

    def program(backend: ModelledBackend) -> None:
        cells, source, link = slots(backend), registered(backend, range(4)), backend.copy_stream(0)
        backend.copy(source, cells[1], link)
        backend.wait(backend.compute_stream(), backend.record(link))
        run(backend, "kernels", reads=[(cells, [1])])
        for count in range(40):
            backend.copy(source, cells[int(count == 0)], link)
            backend.synchronize(backend.record(link))
        backend.finish()

    class LinkFirst:
        def choose(self, actors: Sequence[int]) -> int:
            return len(actors) - 1

    assert "kernels on the compute stream reads slots, row 1, bytes 0 to 4 without being ordered after" in (
        unordered(program, LinkFirst())
    )


def lend(
    backend: ModelledBackend,
    *,
    waits: bool = True,
    reads_answer: bool = True,
    is_listed: bool = True,
    is_fused: bool = False,
    link_id: int | None = None,
    is_told: bool = True,
) -> None:
    """The host fills cell 1 and offers it; the device takes it, and gives back cell 0, which its kernels have read.

    Args:
        waits: whether the host sees the copy end before it offers.
        reads_answer: whether it reads the answer before it fills cell 0.
        is_listed: whether the kernels say that they write the answer.
        is_fused: whether the kernels that answer also read cell 0.
        link_id: where the kernels that use cell 1 run, if not behind those that read the offer.
        is_told: whether that stream waits for them.
    """
    cells, source, link, compute = slots(backend), registered(backend, range(4)), *streams(backend)
    offers, answers = (backend.stage(8).view(torch.int64) for _ in range(2))

    def use() -> None:
        """Queue a look-up, and kernels that use cell 1 where it has found it offered."""
        taken: list[int] = []

        def look_up() -> None:
            if offers[0]:
                answers[0] = 8
                taken.append(1)

        run(
            *(backend, "look-up"),
            reads=[(offers, [0]), (cells, [0] if is_fused else [])],
            writes=[(answers, [0])] if is_listed else [],
            work=look_up,
        )
        if link_id is not None and is_told:
            backend.wait(backend.copy_stream(link_id), backend.record(compute))
        used = compute if link_id is None else backend.copy_stream(link_id)
        backend.run_on(used, "late kernels", lambda: None, lambda: ([(cells, taken)], []))

    backend.copy(source, cells[0], link)
    backend.wait(compute, backend.record(link))
    run(backend, "early kernels", reads=[(cells, [0])])
    use()
    backend.copy(source, cells[1], link)
    filled = backend.record(link)
    if waits:
        backend.synchronize(filled)
    backend.write_word(offers, 0, 7)
    use()
    while reads_answer and not backend.read_words(answers)[0]:
        pass
    backend.copy(source, cells[0], link)
    backend.finish()


def streams(backend: ModelledBackend) -> tuple[ModelledStream, ModelledStream]:
    """Of a link, and of the kernels."""
    return backend.copy_stream(0), backend.compute_stream()


@pytest.mark.parametrize("link_id", [None, 1])
def test_words_order_what_their_writer_did_before_what_their_reader_does_after(link_id: int | None) -> None:
    def program(chooser: Chooser) -> None:
        lend(ModelledBackend(chooser, patience=1), link_id=link_id)

    assert all(True for _ in zip(every_path(program), range(2000), strict=False))
    for seed in range(200):
        program(RandomChooser(seed))
        program(BoundedChooser(seed))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"waits": False},
            "late kernels on the compute stream reads slots, row 1, bytes 0 to 4 without being ordered after "
            "copy (number 2 on the link 0 stream), which writes it",
        ),
        (
            {"reads_answer": False},
            "copy on the link 0 stream writes slots, row 0, bytes 0 to 4 without being ordered after "
            "early kernels (number 1 on the compute stream), which reads it",
        ),
        (
            {"is_listed": False},
            "copy on the link 0 stream writes slots, row 0, bytes 0 to 4 without being ordered after "
            "early kernels (number 1 on the compute stream), which reads it",
        ),
        (
            {"is_fused": True},
            "copy on the link 0 stream writes slots, row 0, bytes 0 to 4 without being ordered after "
            "look-up (number 2 on the compute stream), which reads it",
        ),
        (
            {"link_id": 1, "is_told": False},
            "late kernels on the link 1 stream reads slots, row 1, bytes 0 to 4 without being ordered after "
            "copy (number 2 on the link 0 stream), which writes it",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_clocks_find_what_words_do_not_order(wrong: dict[str, Any], message: str) -> None:
    """In a schedule in which nothing strikes."""
    found = set()
    for seed in range(100):
        try:
            lend(ModelledBackend(RandomChooser(seed), checks_order=False), **wrong)
            lend(ModelledBackend(RandomChooser(seed)), **wrong)
        except Violation as violation:
            found.add(str(violation))
    assert message in found


def test_an_old_word_says_nothing_new() -> None:
    """Kernels that list a word and leave it as it is do not tell the host that they run."""

    def program(backend: ModelledBackend) -> None:
        cells, source, link, compute = slots(backend), registered(backend, range(4)), *streams(backend)
        answers = backend.stage(8).view(torch.int64)
        backend.copy(source, cells[0], link)
        backend.wait(compute, backend.record(link))
        for word in (8, 8):
            run(backend, "kernels", [(cells, [0])], work=lambda: None)
            run(backend, "look-up", [], [(answers, [0])], lambda word=word: answers.fill_(word))
        assert backend.read_words(answers)[0] == 8, "all has run"
        backend.copy(source, cells[0], link)

    assert "without being ordered after kernels (number 3 on the compute stream)" in unordered(program)


def test_rows_of_an_empty_tensor_are_none_and_memory_that_the_device_does_not_reach_is_refused() -> None:
    backend = ModelledBackend(InOrder())
    run(backend, "kernels", reads=[(backend.stage(8)[:0], [])])
    backend.finish()
    run(backend, "kernels", reads=[(torch.zeros(2, 4), [0])])
    with pytest.raises(Violation, match="32 bytes, is in no memory that the device reaches"):
        backend.finish()


def test_a_kernel_that_writes_homes_is_not_ordered_by_them() -> None:
    """What the device reads of the host's memory and nobody writes orders nothing."""
    backend = ModelledBackend(InOrder())
    source = registered(backend, range(4)).view(1, 4)
    cells = slots(backend)
    run(backend, "gather", reads=[(source, [0])], writes=[(cells, [0])])
    backend.read_words(source)
    with pytest.raises(Violation, match="without being ordered after gather"):
        backend.copy(source[0], cells[0], backend.copy_stream(0))
