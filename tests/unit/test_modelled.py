"""The modelled accelerator: it runs every order that streams and events allow, no other, and sees what goes wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch

from tests.races.choosers import BoundedChooser, RandomChooser, every_path
from vllm_moecxl.data.devices.modelled import HOST, Chooser, ModelledBackend, Violation

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
