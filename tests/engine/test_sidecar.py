"""Serving does not depend on what runs beside it: whatever becomes of the sidecar, the tokens are the same."""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from tests.engine.harness import SCENARIOS, at_step, generate_with_metrics, read_metrics
from tests.engine.test_equality import Equality, compare, resident_outputs
from tests.support.homes import hands
from vllm_moecxl.runtime.dispatch import Dispatch
from vllm_moecxl.runtime.runtime import OffloadRuntime
from vllm_moecxl.types import SlotState

#: Decodes of several requests, in whose midst something happens, and a long prefill among decodes after it.
_SCENARIOS = (SCENARIOS[1], SCENARIOS[2])
_STEP = 8
_SLAB_BYTES = 3 * 128 * 256 * 2
#: A thread that has not done by then what it is asked for never will.
_PATIENCE_S = 20.0


def _runtime(llm: Any) -> OffloadRuntime:
    (runtime,) = llm.apply_model(lambda model: model.moe_offload_runtime)
    assert isinstance(runtime, OffloadRuntime)
    return runtime


def _kill(thread: threading.Thread) -> None:
    """End a thread of Python at its next instruction."""
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))


def _absent(dispatch: Dispatch) -> int:
    """An expert that is in no slot."""
    return int((~dispatch.slots.residency.resident_mask()).argmax())


class _Trap:
    """Stands in for a method: the first thread to call it, other than the one that set it, is kept until it is let go.

    The method is called on, after that.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self._method = getattr(owner, name)
        self._setter = threading.current_thread()
        self._has_caught = threading.Event()
        self._is_open = threading.Event()
        self._caught: threading.Thread | None = None
        #: Whether it let go by itself, because the test never did.
        self.has_lost_patience = False
        setattr(owner, name, self)

    def __call__(self, *args: Any) -> Any:
        thread = threading.current_thread()
        if thread is not self._setter and self._caught is None:
            self._caught = thread
            self._has_caught.set()
            self.has_lost_patience = not self._is_open.wait(_PATIENCE_S)
        return self._method(*args)

    def wait(self) -> threading.Thread:
        """The thread that is kept, once there is one."""
        assert self._has_caught.wait(_PATIENCE_S) and self._caught is not None
        return self._caught

    def open(self) -> None:
        self._is_open.set()


@pytest.fixture
def trap() -> Iterator[Callable[[Any, str], _Trap]]:
    """Sets traps that are open at the end."""
    traps: list[_Trap] = []

    def make(owner: Any, name: str) -> _Trap:
        traps.append(_Trap(owner, name))
        return traps[-1]

    yield make
    for one in traps:
        one.open()
        assert not one.has_lost_patience, "somebody waits for what nobody wants any more"


def _serve(
    equality: Equality, what: str, model: str, prepare: Callable[[Any], None] | None = None, **options: Any
) -> dict[str, float]:
    """Metrics of an engine whose outputs are those of a resident one."""
    offloaded, metrics = generate_with_metrics(
        _SCENARIOS, prepare, model=model, moe_offload="cxl", moe_offload_config={"slots": "50%", **options}
    )
    compare(equality, f"trained, {what}", resident_outputs(model, _SCENARIOS), offloaded)
    return metrics


Trap = Callable[[Any, str], _Trap]


def _kill_sidecar(runtime: OffloadRuntime, trap: Trap) -> None:
    caught = trap(runtime._mover, "feed")
    thread = caught.wait()
    assert thread.name == "moecxl-sidecar"
    _kill(thread)
    caught.open()
    thread.join(_PATIENCE_S)
    assert isinstance(runtime._sidecar.failure, SystemExit)


def _kill_a_hand(runtime: OffloadRuntime, trap: Trap) -> None:
    caught = trap(runtime.banks[0], "read")
    dispatch = next(iter(runtime.dispatches.values()))
    # Nobody waits for it: it is for the hands to carry.
    assert dispatch.slots.prefetch([_absent(dispatch)], 0.0) == 1
    thread = caught.wait()
    assert thread in hands(runtime._mover)
    _kill(thread)
    caught.open()
    thread.join(_PATIENCE_S)
    assert isinstance(runtime._mover.failure, SystemExit)


def _break_a_tick(runtime: OffloadRuntime, trap: Trap) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    runtime._mover.feed = fail  # type: ignore[method-assign]
    runtime._sidecar._thread.join(_PATIENCE_S)
    assert isinstance(runtime._sidecar.failure, ZeroDivisionError)


def _stall_a_tick(runtime: OffloadRuntime, trap: Trap) -> None:
    trap(runtime._mover, "feed").wait()
    runtime._sidecar._clock = lambda: time.monotonic() + 3600


@pytest.mark.parametrize(
    ("happen", "layer_buffer"),
    [(_kill_sidecar, True), (_kill_a_hand, False), (_break_a_tick, False), (_stall_a_tick, True)],
    ids=["killed", "hand-killed", "tick-fails", "stalled"],
)
def test_serving_goes_on_when_it_ends(
    fixture_model: str,
    equality: Equality,
    trap: Trap,
    happen: Callable[[OffloadRuntime, Trap], None],
    layer_buffer: bool,
) -> None:
    before: dict[str, float] = {}

    def act(llm: Any) -> None:
        before.update(read_metrics(llm))
        happen(_runtime(llm), trap)

    what = f"{happen.__name__.strip('_')} midway, layer_buffer {layer_buffer}"
    metrics = _serve(equality, what, fixture_model, at_step(_STEP, act), layer_buffer=layer_buffer)
    assert before["sidecar_up{}"] == 1 and metrics["sidecar_up{}"] == 0
    assert metrics["lookups_total{miss}"] > before["lookups_total{miss}"] > 0


def test_a_stalled_sidecar_that_comes_back_is_up_again(fixture_model: str, equality: Equality, trap: Trap) -> None:
    shown: list[float] = []

    def prepare(llm: Any) -> None:
        feed = trap(_runtime(llm)._mover, "feed")
        has_ticked = threading.Event()
        step = llm.llm_engine.step
        steps = itertools.count(1)

        def stepping() -> Any:
            match next(steps):
                case 3:
                    feed.wait()
                    _runtime(llm)._sidecar._clock = lambda: time.monotonic() + 3600
                case 6:
                    # Called by the next tick, which has beaten by then.
                    _runtime(llm)._mover.feed = has_ticked.set  # type: ignore[method-assign]
                    feed.open()
                    assert has_ticked.wait(_PATIENCE_S)
            outputs = step()
            shown.append(read_metrics(llm)["sidecar_up{}"])
            return outputs

        llm.llm_engine.step = stepping

    _serve(equality, "sidecar stalled for some steps", fixture_model, prepare)
    assert shown[:7] == [1, 1, 0, 0, 0, 1, 1]


def test_without_a_sidecar(fixture_model: str, equality: Equality) -> None:
    metrics = _serve(equality, "no sidecar", fixture_model, sidecar=False, layer_buffer=True)
    assert metrics["sidecar_up{}"] == 0 and metrics["sidecar_cpu_seconds_total{}"] == 0
    assert metrics["passes_total{layer_buffer}"] > 0
    assert not any(value for name, value in metrics.items() if name.startswith("prefetch_total"))
    assert metrics["fetch_bytes_total{dram,prefetch}"] == 0 < metrics["fetch_bytes_total{dram,demand}"]


def test_a_long_prefill_finds_the_next_layers_experts_in_the_other_layer_buffer(
    fixture_model: str, equality: Equality, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring_ahead = Dispatch.bring_ahead

    def bring_in_time(self: Dispatch, distinct_count: int) -> None:
        """As where a layer takes longer to compute than the next one to copy."""
        bring_ahead(self, distinct_count)
        mover = self.slots._mover
        with mover._changed:
            assert mover._changed.wait_for(lambda: mover.is_idle, _PATIENCE_S)

    metrics = _serve(equality, "looking ahead", fixture_model, layer_buffer=True)
    useful, late = metrics["prefetch_total{useful}"], metrics["prefetch_total{late}"]
    assert useful + late > 0, "brought ahead, and needed"
    monkeypatch.setattr(Dispatch, "bring_ahead", bring_in_time)
    in_time = _serve(equality, "looking ahead, in time", fixture_model, layer_buffer=True)
    assert in_time["prefetch_total{useful}"] > 0 and in_time["prefetch_total{late}"] == 0
    assert in_time["fetch_bytes_total{dram,prefetch}"] >= in_time["prefetch_total{useful}"] * _SLAB_BYTES


def test_a_slow_bank(fixture_model: str, equality: Equality) -> None:
    bank = "emulated:5ms,50MB/s"
    metrics = _serve(equality, "5 ms and 50 MB/s", fixture_model, slots="75%", banks=[bank])
    assert metrics["sidecar_up{}"] == 1
    assert metrics[f"link_busy_seconds_total{{{bank}}}"] >= 5e-3 * metrics["lookups_total{miss}"]


def test_aborted_requests_release_what_only_they_wanted(fixture_model: str, equality: Equality, trap: Trap) -> None:
    filling: list[int] = []
    transfers: list[Any] = []

    def act(llm: Any) -> None:
        runtime = _runtime(llm)
        caught = trap(runtime.banks[0], "read")
        aborted = list(llm.llm_engine.output_processor.request_states)[:2]
        for index, dispatch in enumerate(runtime.dispatches.values()):
            assert dispatch.slots.prefetch([_absent(dispatch)], float(index), [aborted[index % 2]]) == 1
            transfers.extend(one.fetch.transfer for one in dispatch.slots._filling.values())
        caught.wait()  # the first is in flight now, and the others behind it
        llm.llm_engine.abort_request(aborted, internal=True)
        forget = runtime.forget

        def forgetting(request_ids: Sequence[str]) -> None:
            assert set(request_ids) == set(aborted)
            forget(request_ids)
            filling.extend(one.slots.residency.state_counts()[SlotState.FILLING] for one in runtime.dispatches.values())
            runtime.forget = forget  # type: ignore[method-assign]
            caught.open()

        runtime.forget = forgetting  # type: ignore[method-assign, assignment]

    offloaded, metrics = generate_with_metrics(
        _SCENARIOS,
        at_step(_STEP, act),
        model=fixture_model,
        moe_offload="cxl",
        moe_offload_config={"slots": "50%", "layer_buffer": False},
    )
    resident = {name: list(outputs) for name, outputs in resident_outputs(fixture_model, _SCENARIOS).items()}
    del resident[_SCENARIOS[0].name][:2]
    compare(equality, "trained, two requests aborted", resident, offloaded)
    assert len(transfers) == 6 and all(transfer.is_cancelled for transfer in transfers)
    assert sum(filling) <= 1, "only the slot that is written to at this moment may not be given away yet"
    assert metrics["slots{filling}"] == 0
