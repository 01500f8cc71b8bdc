"""What is made of the routing: whatever the engine or the machine does, nobody waits, and what is recorded is true."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.unit.test_prefetching import EXPERT_COUNT, LAYER_COUNT, TOPK, Rig, step_of
from vllm_moecxl.control.recorder import TraceRecorder
from vllm_moecxl.control.trace import RoutingTrace
from vllm_moecxl.errors import MoeOffloadError
from vllm_moecxl.runtime import ring as ring_module
from vllm_moecxl.runtime.foresight import Foresight, Recording
from vllm_moecxl.runtime.lookahead import Gate, GateLookahead
from vllm_moecxl.runtime.ring import Begun, RoutingRing

HIDDEN_SIZE = 6
PATIENCE_S = 20.0

Routes = npt.NDArray[np.uint32]


class Clock:
    """Shows what the test sets."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Worker:
    """A forward that writes to a ring, and a foresight that reads it."""

    def __init__(self, path: Path | None = None, *, predicts: bool = False, gates: bool = False) -> None:
        self.clock = Clock()
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(EXPERT_COUNT, HIDDEN_SIZE, generator=generator) for _ in range(LAYER_COUNT)]
        lookahead = GateLookahead([Gate(weight, None, None) for weight in weights], 2) if gates else None
        self.ring = RoutingRing(keeps_inputs=True, keeps_weights=path is not None, clock=self.clock)
        self.recorder = TraceRecorder(LAYER_COUNT, EXPERT_COUNT, TOPK)
        recording = Recording(self.recorder, path, self.clock) if path is not None else None
        self.rig = Rig()
        prefetching = self.rig.prefetching if predicts else None
        self.foresight = Foresight(self.ring, EXPERT_COUNT, recording, prefetching, lookahead, clock=self.clock)
        self._rng = np.random.default_rng(5)

    def routes(self, token_count: int) -> Routes:
        """[layers, tokens, k]."""
        values = self._rng.random((LAYER_COUNT, token_count, EXPERT_COUNT))
        return np.argsort(values, axis=2)[:, :, :TOPK].astype(np.uint32)

    def begin(self, token_ids: Sequence[int], ids: tuple[str, ...] = ("r",), prompts: Sequence[str] = ()) -> None:
        self.ring.begin(Begun(step_of(token_ids, ids, prompts), None, self.clock()))

    def see(self, layer_id: int, routes: Routes, x: torch.Tensor | None = None) -> None:
        self.clock.now_s += 1e-3
        x = torch.randn(len(routes), HIDDEN_SIZE) if x is None else x
        self.ring.see(layer_id, routes, torch.full(routes.shape, 0.5), x)

    def step(self, token_ids: Sequence[int], ids: tuple[str, ...] = ("r",), prompts: Sequence[str] = ()) -> Routes:
        """A forward of which all is seen; its routes."""
        routes = self.routes(len(token_ids))
        self.begin(token_ids, ids, prompts)
        for layer_id in range(LAYER_COUNT):
            self.see(layer_id, routes[layer_id])
        return routes

    def recorded(self) -> npt.NDArray[np.integer[Any]]:
        """[tokens, layers, k]."""
        return self.recorder.trace().topk


def by_token(*routes: Routes) -> npt.NDArray[np.integer[Any]]:
    return np.concatenate(routes, axis=1).swapaxes(0, 1)


def test_a_recording_has_what_the_router_chose(tmp_path: Path) -> None:
    worker = Worker(tmp_path / "a.npz", gates=True)
    routes = [worker.step([1, 2, 3], prompts=["r"]), worker.step([4]), worker.step([5])]
    worker.foresight.close()
    trace = RoutingTrace.load(tmp_path / "a.npz")
    assert np.array_equal(trace.topk, by_token(*routes)) and trace.token_ids.tolist() == [1, 2, 3, 4, 5]
    assert trace.prefill.tolist() == [3] and trace.weights is not None and trace.lookahead is not None


def test_rows_that_pad_a_step_are_nobodys() -> None:
    check_padding()


def check_padding() -> None:
    worker = Worker(Path("nowhere.npz"), predicts=True, gates=True)
    routes = worker.routes(4)
    worker.begin([1, 2], ("a", "b"))
    for layer_id in range(LAYER_COUNT):
        worker.see(layer_id, routes[layer_id])
    worker.foresight.drain()
    assert np.array_equal(worker.recorded(), by_token(routes[:, :2]))


def test_a_layer_that_saw_fewer_rows_than_the_step_has_tokens_is_not_believed() -> None:
    check_fewer_rows()


def check_fewer_rows() -> None:
    worker = Worker(Path("nowhere.npz"), predicts=True)
    routes = worker.routes(2)
    worker.begin([1, 2], ("a", "b"))
    for layer_id in range(LAYER_COUNT):
        worker.see(layer_id, routes[layer_id, : 1 if layer_id == 1 else 2])
    worker.foresight.drain()
    assert not len(worker.recorded())


@pytest.mark.parametrize("expert_id", [EXPERT_COUNT, 2**32 - 1])
def test_an_expert_that_the_layer_does_not_have_is_nothing_to_learn_from(expert_id: int) -> None:
    check_unknown_expert(expert_id)


def check_unknown_expert(expert_id: int = EXPERT_COUNT) -> None:
    worker = Worker(Path("nowhere.npz"), predicts=True)
    worker.begin([1])
    worker.see(0, np.array([[expert_id, 0]], np.uint32))
    routes = worker.step([2])
    worker.foresight.drain()
    assert np.array_equal(worker.recorded(), by_token(routes))


def test_an_empty_batch_is_nothing() -> None:
    check_empty_batch()


def check_empty_batch() -> None:
    worker = Worker(Path("nowhere.npz"), predicts=True)
    worker.begin([], ())
    worker.see(0, np.empty((0, TOPK), np.uint32))
    routes = worker.step([2])
    worker.foresight.drain()
    assert np.array_equal(worker.recorded(), by_token(routes))


def test_steps_that_nobody_can_describe_are_left_out() -> None:
    worker = Worker(Path("nowhere.npz"), predicts=True)
    routes = worker.routes(1)
    for layer_id in range(LAYER_COUNT):
        worker.see(layer_id, routes[layer_id])
    known = worker.step([2])
    worker.foresight.drain()
    assert np.array_equal(worker.recorded(), by_token(known))


def test_what_a_stalled_reader_has_lost_is_no_part_of_another_step(monkeypatch: pytest.MonkeyPatch) -> None:
    check_stall(monkeypatch)


def check_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes back at every place of a step in turn."""
    monkeypatch.setattr(ring_module, "_ENTRY_COUNT_MAX", 3 + LAYER_COUNT)
    worker = Worker(Path("nowhere.npz"), predicts=True)
    true: list[list[list[int]]] = []
    for number, place in itertools.product(range(3), range(LAYER_COUNT + 1)):
        for is_read in (False, True):
            routes = worker.routes(1)
            true.append(by_token(routes)[0].tolist())
            worker.begin([number])
            for layer_id in range(LAYER_COUNT):
                if is_read and layer_id == place:
                    worker.foresight.drain()
                worker.see(layer_id, routes[layer_id])
    worker.foresight.drain()
    recorded = worker.recorded().tolist()
    assert len(recorded) >= 8 and all(one in true for one in recorded)


def test_numbers_that_are_none_are_not_learned_from() -> None:
    check_numbers()


def check_numbers() -> None:
    worker = Worker(Path("nowhere.npz"), predicts=True, gates=True)
    for number in range(40):
        routes = worker.routes(1)
        worker.begin([number])
        for layer_id in range(LAYER_COUNT):
            x = torch.randn(1, HIDDEN_SIZE)
            if number % 10 == 5:
                x[0, layer_id] = (float("nan"), float("inf"), -float("inf"), 1e38)[layer_id]
            worker.see(layer_id, routes[layer_id], x)
            worker.foresight.drain()
    assert np.isfinite(worker.rig.prefetching.forecast.scores).all()
    assert len(worker.recorded()) == 40 and worker.recorder.trace().lookahead is not None


def test_a_layers_targets_are_fetched_for_and_those_of_a_request_that_has_ended_are_not() -> None:
    worker = Worker(predicts=True)
    fetched: list[int] = []
    prefetching = worker.rig.prefetching
    prefetching.fetch = lambda targets, now_s: fetched.append(len(targets))  # type: ignore[method-assign, assignment]
    worker.step([1])
    worker.foresight.drain()
    assert fetched == [2], "what is seen together is fetched for once"
    worker.step([1])
    worker.ring.end(["r"])
    worker.foresight.drain()
    assert fetched == [2]
    worker.foresight.drain()
    assert fetched == [2], "and nothing twice"


def test_what_a_trial_has_found_is_shown_once_it_is_new(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    shown: list[bool] = []
    worker = Worker(predicts=True)
    worker.foresight._show_prefetch_up = shown.append
    trial = worker.rig.prefetching.trial
    for verdict, saved_share in ((True, None), (True, 0.2), (False, -0.1), (False, -0.2), (True, 0.1)):
        trial.verdict, trial.saved_share = verdict, saved_share
        worker.step([1])
        worker.foresight.drain()
    assert shown == [False, True]
    assert [record.getMessage() for record in caplog.records] == [
        "MoE offload: prefetching is off for a while: it changes the time of a step by +10.0 % here",
        "MoE offload: prefetching is on again: it changes the time of a step by -10.0 % here",
    ]


def test_while_prefetching_is_off_the_forward_leaves_no_layers_and_a_recording_wants_them_all(tmp_path: Path) -> None:
    for path in (None, tmp_path / "a.npz"):
        worker = Worker(path, predicts=True)
        worker.rig.prefetching.trial.is_on = False
        worker.step([1])
        worker.foresight.drain()
        assert worker.ring.is_wanted is (path is not None)
        worker.rig.prefetching.trial.is_on = True
        worker.step([1])
        worker.foresight.drain()
        worker.step([1])
        worker.foresight.drain()
        assert worker.ring.is_wanted


def test_a_forward_that_drains_in_the_sidecars_place_records_and_predicts_nothing() -> None:
    check_draining_in_its_place()


def check_draining_in_its_place() -> None:
    worker = Worker(Path("nowhere.npz"), predicts=True)
    told: list[object] = []
    prefetching = worker.rig.prefetching
    begin, observe = prefetching.begin, prefetching.observe
    prefetching.begin = lambda *what: (told.append("begin"), begin(*what))[1]  # type: ignore[method-assign]
    prefetching.observe = lambda *what: (told.append("observe"), observe(*what))[1]  # type: ignore[method-assign]
    worker.step([1])
    worker.foresight.drain(predicts=False)
    assert len(worker.recorded()) == 1 and not told
    # The sidecar is back in the middle of a step of another width.
    routes = worker.routes(3)
    worker.begin([1, 2, 3], ("a", "b", "c"))
    worker.see(0, routes[0])
    worker.foresight.drain(predicts=False)
    for layer_id in range(1, LAYER_COUNT):
        worker.see(layer_id, routes[layer_id])
    worker.foresight.drain()
    assert len(worker.recorded()) == 4 and not told
    worker.step([1])
    worker.foresight.drain()
    assert told == ["begin", *["observe"] * LAYER_COUNT]


def test_without_a_recording_nobody_wants_layers_while_forwards_drain() -> None:
    worker = Worker(predicts=True)
    worker.step([1])
    worker.foresight.drain(predicts=False)
    assert not worker.ring.is_wanted
    worker.step([1])
    worker.foresight.drain()
    assert worker.ring.is_wanted


def test_what_ended_the_sidecar_does_not_end_the_forward_that_drains_after_it(tmp_path: Path) -> None:
    worker = Worker(tmp_path / "a.npz", predicts=True)
    worker.step([1])
    worker.foresight.drain()
    worker.recorder.observe = lambda *what: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    worker.step([2])
    with pytest.raises(ZeroDivisionError):
        worker.foresight.drain()
    for _ in range(3):
        worker.step([3])
        worker.ring.end(["r"])
        worker.foresight.drain()
        assert not worker.ring.is_wanted and worker.ring.take() is None, "the ring stays empty"
    worker.foresight.close()
    assert RoutingTrace.load(tmp_path / "a.npz").token_count == 1, "what had been recorded is saved"


def test_two_threads_that_drain_do_it_one_after_the_other(tmp_path: Path) -> None:
    worker = Worker(tmp_path / "a.npz", predicts=True)
    is_over = threading.Event()

    def drain(wait: Callable[[], None]) -> None:
        while not is_over.is_set():
            wait()
            worker.foresight.drain()

    threads = [
        threading.Thread(target=drain, args=(lambda: worker.foresight.wait(0.01),)),
        threading.Thread(target=drain, args=(lambda: None,)),
    ]
    for thread in threads:
        thread.start()
    routes = [worker.step([number]) for number in range(100)]
    is_over.set()
    worker.ring.wake()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    worker.foresight.drain()
    assert np.array_equal(worker.recorded(), by_token(*routes))


class Disk:
    """Stands for `RoutingTrace.save`: counts, holds or fails."""

    def __init__(self, clock: Clock, takes_s: float = 0.0) -> None:
        self.saved: list[int] = []
        self.error: MoeOffloadError | None = None
        self.may_write = threading.Event()
        self.may_write.set()
        self._clock, self._takes_s = clock, takes_s

    def save(self, trace: RoutingTrace, path: Path) -> None:
        assert self.may_write.wait(PATIENCE_S)
        self._clock.now_s += self._takes_s
        if self.error is not None:
            raise self.error
        self.saved.append(trace.token_count)


def recording_worker(
    monkeypatch: pytest.MonkeyPatch, takes_s: float = 0.0, error: MoeOffloadError | None = None
) -> tuple[Worker, Disk]:
    worker = Worker(Path("nowhere.npz"))
    disk = Disk(worker.clock, takes_s)
    disk.error = error
    monkeypatch.setattr(RoutingTrace, "save", lambda self, path: disk.save(self, path))
    return worker, disk


def pass_time(worker: Worker, duration_s: float) -> None:
    """The sidecar's ticks for so long; each save is waited for."""
    for _ in range(round(duration_s / 0.5)):
        worker.clock.now_s += 0.5
        worker.foresight.drain()
        join_writer(worker)


def join_writer(worker: Worker) -> None:
    recording = worker.foresight._recording
    if recording is not None and recording._writer is not None:
        recording._writer.join(PATIENCE_S)
        assert not recording._writer.is_alive()


def test_a_recording_is_written_in_a_quiet_moment_if_there_is_something_new(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, disk = recording_worker(monkeypatch)
    worker.step([1])
    worker.foresight.drain()
    pass_time(worker, 1.0)
    assert disk.saved == [], "not quiet yet"
    pass_time(worker, 100.0)
    assert disk.saved == [1]
    worker.step([2])
    pass_time(worker, 100.0)
    worker.foresight.close()
    assert disk.saved == [1, 2]


@pytest.mark.parametrize(("takes_s", "save_count_max"), [(0.0, 10), (1.0, 5), (10.0, 1)])
def test_a_recording_that_takes_long_to_write_is_written_rarely(
    monkeypatch: pytest.MonkeyPatch, takes_s: float, save_count_max: int
) -> None:
    worker, disk = recording_worker(monkeypatch, takes_s)
    for number in range(50):
        worker.step([number])
        pass_time(worker, 2.0)
    assert 1 <= len(disk.saved) <= save_count_max
    worker.foresight.close()
    assert disk.saved[-1] == 50, "the end is saved in any case"


def test_nobody_waits_while_a_recording_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, disk = recording_worker(monkeypatch)
    worker.step([1])
    worker.foresight.drain()
    disk.may_write.clear()
    for number in range(30):
        worker.clock.now_s += 60.0
        worker.foresight.drain()
        worker.step([number])
        worker.foresight.drain()
    assert len(worker.recorded()) == 31 and disk.saved == []
    disk.may_write.set()
    worker.foresight.close()
    assert disk.saved == [1, 31], "what was there when it began, and all of it in the end"


def test_a_full_disk_is_reported_once_and_serving_and_recording_go_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    check_full_disk(monkeypatch, caplog)


def check_full_disk(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    worker, disk = recording_worker(monkeypatch, error=MoeOffloadError("the disk is full"))
    for number in range(20):
        worker.step([number])
        pass_time(worker, 15.0)
    assert [record.getMessage() for record in caplog.records] == ["MoE offload: the disk is full"]
    disk.error = MoeOffloadError("there is no such folder")
    pass_time(worker, 30.0)
    assert len(caplog.records) == 2, "another trouble is news"
    disk.error = None
    worker.foresight.close()
    assert disk.saved == [20] and len(caplog.records) == 2


def test_closing_while_somebody_drains_for_ever_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_moecxl.runtime.foresight._CLOSE_S", 0.01)
    worker, disk = recording_worker(monkeypatch)
    worker.step([1])
    with worker.foresight._lock:
        worker.foresight.close()
        worker.foresight.drain()
    assert disk.saved == []
    worker.foresight.close()
    assert disk.saved == [1]


def test_nothing_is_fetched_when_all_ends(tmp_path: Path) -> None:
    worker = Worker(tmp_path / "a.npz", predicts=True)
    worker.rig.prefetching.fetch = lambda *what: pytest.fail("into slots that are gone")  # type: ignore[method-assign]
    worker.step([1])
    worker.foresight.close()
    assert RoutingTrace.load(tmp_path / "a.npz").token_count == 1
