"""Several layers in one engine, and what others do meanwhile: copies that go on, prefetches, requests that are gone.

The output of each layer is that of the layer with all its experts, whatever happens between two steps of its forward.
"""

from __future__ import annotations

import itertools
import random
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.property.test_dispatch import FetchFailure, break_fetches
from tests.property.toy_moe import HIDDEN_SIZE, KernelFailure, Served, ToyMoe
from tests.support.homes import end_hands
from vllm_moecxl.data.fetch import Fetch
from vllm_moecxl.data.slabs import Home, Piece
from vllm_moecxl.runtime.counters import PrefetchOutcome
from vllm_moecxl.types import Cause, Lookup, PassKind, SlotState

EXPERT_COUNT, TOPK = 6, 2
WANTERS = ("a", "b")

#: Expert ids of a layer's tokens.
Ids = list[list[int]]


@dataclass(frozen=True)
class Deed:
    """What somebody else does while a forward waits or computes.

    Attributes:
        what: "feed" has copies done that nobody waits for, as the sidecar does.
        layer_id, expert_ids, wanter: of a prefetch; the request that is gone.
    """

    what: Literal["feed", "prefetch", "settle", "forget"]
    layer_id: int = 0
    expert_ids: tuple[int, ...] = ()
    wanter: str = "a"


@dataclass(frozen=True)
class Turn:
    """A forward of all layers.

    Attributes:
        ids: per layer.
        event: what goes wrong in it.
        when: how many fetches or kernel calls succeed before.
    """

    ids: list[Ids]
    event: Literal["", "fetch fails", "kernel fails"] = ""
    when: int = 0


@dataclass(frozen=True)
class Story:
    """An engine, its forwards, and what others do, a few deeds each time that they can."""

    slot_counts: list[int]
    pass_kind: PassKind
    buffer_count: int
    is_joined: bool
    is_host: bool
    has_helper: bool
    turns: list[Turn]
    deeds: list[list[Deed]]


experts = st.integers(0, EXPERT_COUNT - 1)
deeds = st.builds(
    Deed,
    st.sampled_from(["feed", "feed", "feed", "prefetch", "prefetch", "settle", "forget"]),
    st.integers(0, 2),
    st.lists(experts, max_size=4).map(tuple),
    st.sampled_from(WANTERS),
)


@st.composite
def stories(draw: st.DrawFn) -> Story:
    layer_count = draw(st.integers(1, 3))
    token = st.lists(experts, min_size=TOPK, max_size=TOPK)
    turn = st.builds(
        Turn,
        st.lists(st.lists(token, max_size=6), min_size=layer_count, max_size=layer_count),
        st.sampled_from(["", "", "", "fetch fails", "kernel fails"]),
        st.integers(0, 8),
    )
    pass_kind = draw(st.sampled_from([PassKind.TOKEN, PassKind.EXPERT, PassKind.LAYER_BUFFER, PassKind.LAYER_BUFFER]))
    is_host = draw(st.booleans())
    return Story(
        draw(st.lists(st.integers(TOPK, EXPERT_COUNT), min_size=layer_count, max_size=layer_count)),
        pass_kind,
        draw(st.integers(1 if pass_kind is PassKind.LAYER_BUFFER else 0, 2)),
        is_host and draw(st.booleans()),
        is_host,
        draw(st.booleans()),
        draw(st.lists(turn, min_size=1, max_size=4)),
        draw(st.lists(st.lists(deeds, max_size=3), max_size=12)),
    )


def engine_of(story: Story, *, has_hands: bool = False) -> list[Served]:
    layers: list[Served] = []
    for layer_id, slot_count in enumerate(story.slot_counts):
        layers.append(
            Served(
                ToyMoe(EXPERT_COUNT, seed=layer_id),
                slot_count,
                story.pass_kind,
                has_buffer=story.buffer_count > 0,
                buffer_count=story.buffer_count,
                is_joined=story.is_joined,
                is_host=story.is_host,
                copies_are_slow=True,
                has_hands=has_hands,
                beside=layers,
                layer_count=len(story.slot_counts),
            )
        )
    for layer, following in itertools.pairwise([*layers, layers[0]]):
        if following is not layer:
            layer.dispatch.following = following.dispatch
    layers[0].helper.is_up = story.has_helper
    return layers


class Others:
    """Everybody but the forward; they act whenever it gives them a chance."""

    def __init__(self, layers: Sequence[Served], deeds: Sequence[Sequence[Deed]]) -> None:
        self._layers = layers
        self._deeds = iter(deeds)
        mover = layers[0].mover
        wait, start = mover.wait, mover.start
        #: Slabs that were asked for ahead, for layer buffers: for no request in particular.
        self.brought_count = self.prefetched_count = 0

        def interrupted(fetches: Sequence[Fetch]) -> None:
            self.act()
            wait(fetches)
            self.act()

        def counting(*what: Any, **options: Any) -> Fetch:
            fetch = start(*what, **options)
            self.brought_count += fetch.transfer.cause is Cause.PREFETCH and not fetch.transfer.wanters
            return fetch

        mover.wait = interrupted  # type: ignore[method-assign, assignment]
        mover.start = counting  # type: ignore[method-assign]
        for layer in layers:
            layer.toy.meanwhile = self.act

    def act(self) -> None:
        for deed in next(self._deeds, ()):
            self.do(deed)

    def do(self, deed: Deed) -> None:
        layer = self._layers[deed.layer_id % len(self._layers)]
        match deed.what:
            case "feed":
                layer.mover.feed()
            case "prefetch":
                deadline = layer.order.next_position(deed.layer_id)
                self.prefetched_count += layer.slots.prefetch(deed.expert_ids, deadline, [deed.wanter])
            case "settle":
                layer.slots.settle()
            case "forget":
                layer.mover.forget(deed.wanter)
                for one in self._layers:
                    one.slots.settle()


def batch_of(ids: Ids, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    routes = torch.tensor(ids, dtype=torch.int32).view(-1, TOPK)
    return (
        torch.randn(len(routes), HIDDEN_SIZE, generator=generator),
        torch.rand(routes.shape, generator=generator),
        routes,
    )


def check_output(story: Story, layer: Served, ids: Ids, seed: int) -> None:
    batch = batch_of(ids, seed)
    output, expected = layer.dispatch(*batch), layer.toy.direct(*batch)
    if story.pass_kind is PassKind.EXPERT:
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-3)
    else:
        assert torch.equal(output, expected)


def run_turn(story: Story, layers: Sequence[Served], turn: Turn, seed: int) -> None:
    """One forward of all layers; an error ends it, as it ends a step of the engine."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if turn.event == "fetch fails":
            break_fetches(monkeypatch, turn.when)
        for layer in layers:
            layer.toy.calls_until_failure = turn.when if turn.event == "kernel fails" else None
        try:
            for layer, ids in zip(layers, turn.ids, strict=True):
                check_output(story, layer, ids, seed)
        except FetchFailure:
            assert turn.event == "fetch fails"
        except KernelFailure:
            assert turn.event == "kernel fails"
    for layer in layers:
        layer.toy.calls_until_failure = None
        layer.check(layers)


def check_story(story: Story) -> None:
    layers = engine_of(story)
    others = Others(layers, story.deeds)
    for seed, turn in enumerate(story.turns):
        run_turn(story, layers, turn, seed)
        others.act()
    drain(layers)
    for layer in layers:
        if layer.buffer is not None:
            layer.buffer.abandon()
    outcomes = {one: int(layers[0].counters.values[row]) for one, row in layers[0].counters.prefetch.items()}
    unused_count = sum(len(layer.slots.unused) for layer in layers)
    assert sum(outcomes.values()) + unused_count <= others.brought_count + others.prefetched_count
    assert sum(outcomes.values()) + unused_count >= others.prefetched_count, "each is judged, or still waits for it"
    if not (story.has_helper and story.buffer_count == 2 and len(layers) > 1):
        assert not others.brought_count, "brought ahead by nobody, or into the buffer that is in use"


def drain(layers: Sequence[Served]) -> None:
    """Let everything arrive that is on its way: then every slot is free or has an expert's bytes."""
    mover = layers[0].mover
    while not mover.is_idle:
        mover.feed()
    for layer in layers:
        layer.check(layers)
        assert not layer.residency.state_counts()[SlotState.FILLING], "a slot belongs to nobody"


@settings(max_examples=150)
@given(stories())
def test_the_outputs_are_those_of_all_experts_whatever_others_do_meanwhile(story: Story) -> None:
    check_story(story)


WIDE = [[0, 1], [2, 3], [4, 5]]


def story_of(
    turn_count: int,
    deeds: list[list[Deed]],
    layer_count: int = 4,
    *,
    pass_kind: PassKind = PassKind.LAYER_BUFFER,
    buffer_count: int = 2,
    is_joined: bool = False,
) -> Story:
    """Wide forwards of layers of six experts and two slots, that look ahead."""
    turns = [Turn([WIDE] * layer_count)] * turn_count
    return Story([2] * layer_count, pass_kind, buffer_count, is_joined, True, True, turns, deeds)


FEED_ALL = [Deed("feed")] * 3


@pytest.mark.parametrize("is_joined", [True, False])
def test_the_next_layers_experts_are_copied_while_one_computes(*, is_joined: bool) -> None:
    check_looking_ahead(is_joined=is_joined)


def check_looking_ahead(*, is_joined: bool = False) -> None:
    """Only the first forward of the first layer has nobody before it."""
    story = story_of(2, [FEED_ALL] * 40, is_joined=is_joined)
    layers = engine_of(story)
    Others(layers, story.deeds)
    prefetch = layers[0].counters.prefetch
    for seed, turn in enumerate(story.turns):
        for layer, ids in zip(layers, turn.ids, strict=True):
            before = layer.counters.values.copy()
            check_output(story, layer, ids, seed)
            delta = layer.counters.values - before
            # Of six experts two are in slots.
            assert delta[prefetch[PrefetchOutcome.USEFUL]] == (0 if seed == 0 and layer is layers[0] else 4)
            assert delta[layer.counters.fetch_bytes["dram", Cause.PREFETCH]] >= 4 * layer.slab_bytes
    values = layers[0].counters.values
    # The first time, slots were not filled yet when all six experts were brought ahead.
    assert (values[prefetch[PrefetchOutcome.LATE]], values[prefetch[PrefetchOutcome.WASTED]]) == (0, 6)


def test_what_has_not_arrived_in_time_is_late_and_not_fetched_twice() -> None:
    check_being_late()


def check_being_late() -> None:
    story = story_of(2, [])
    layers = engine_of(story)
    others = Others(layers, story.deeds)
    for seed, turn in enumerate(story.turns):
        run_turn(story, layers, turn, seed)
    counters = layers[0].counters
    late, useful = (counters.values[counters.prefetch[one]] for one in (PrefetchOutcome.LATE, PrefetchOutcome.USEFUL))
    assert (late, useful) == (7 * 4, 0) and others.brought_count > 7 * 4
    # Two slots of each layer are filled once; four slabs go to the buffer in each forward.
    demand_bytes = counters.values[counters.fetch_bytes["dram", Cause.DEMAND]]
    assert demand_bytes == (4 * 2 + 8 * 4) * layers[0].slab_bytes
    assert counters.values[counters.fetch_bytes["dram", Cause.PREFETCH]] == 0


def test_what_turns_out_not_to_be_needed_is_not_copied_any_more_and_counts_as_wasted() -> None:
    check_dropping()


def check_dropping() -> None:
    """All six experts are brought ahead for the second layer, which then needs four, two of them in its free slots."""
    story = story_of(1, [], layer_count=2)
    layers = engine_of(story)
    for layer, ids in zip(layers, (WIDE, [[0, 1], [2, 3], [0, 2]]), strict=True):
        check_output(story, layer, ids, 0)
    drain(layers)
    counters = layers[1].counters
    assert counters.values[counters.fetch_bytes["dram", Cause.PREFETCH]] == 0, "copied for nobody"
    buffer = layers[1].buffer
    assert buffer is not None
    buffer.abandon()
    assert counters.values[counters.prefetch[PrefetchOutcome.WASTED]] == 4


def test_the_only_layer_buffer_is_not_filled_for_the_next_layer_while_it_is_in_use() -> None:
    check_only_buffer()


def check_only_buffer() -> None:
    check_story(story_of(2, [FEED_ALL] * 40, buffer_count=1))


def test_what_was_on_its_way_for_another_layer_does_not_come_any_more() -> None:
    check_claiming()


def check_claiming() -> None:
    """The second layer's slabs are brought ahead, and then it is the fourth, with the same buffer, that runs."""
    story = story_of(1, [])
    layers = engine_of(story)
    check_output(story, layers[0], WIDE, 0)
    assert layers[1].buffer is layers[3].buffer and not layers[0].mover.is_idle
    layers[3].toy.meanwhile = lambda: [layers[3].mover.feed() for _ in FEED_ALL]
    check_output(story, layers[3], WIDE, 0)


def one_layer(slot_count: int) -> Served:
    story = story_of(1, [], 1, buffer_count=0, pass_kind=PassKind.TOKEN)
    (layer,) = engine_of(replace(story, slot_counts=[slot_count]))
    return layer


def test_looking_ahead_for_a_pass_takes_no_slot_whose_expert_is_needed_before_or_then() -> None:
    check_looking_ahead_for_a_pass()


def check_looking_ahead_for_a_pass() -> None:
    layer = one_layer(4)
    layer.dispatch.preload([0, 1, 2, 3])
    keep = np.isin(np.arange(EXPERT_COUNT), [1, 2, 3, 4, 5])
    layer.slots.look_ahead(np.array([4, 5]), keep, 1.0)
    # Expert 0 is needed by nobody.
    assert np.flatnonzero(layer.residency.resident_mask()).tolist() == [1, 2, 3]
    assert layer.residency.lookup(4) is Lookup.PENDING and layer.residency.lookup(5) is Lookup.MISS


def test_a_pass_that_needs_a_slot_gives_up_the_prefetch_that_is_needed_last() -> None:
    check_victim()


def check_victim() -> None:
    layer = one_layer(3)
    for expert_id, deadline in ((3, 2.0), (4, 9.0), (5, 1.0)):
        assert layer.slots.prefetch([expert_id], deadline) == 1
    assert layer.slots.prefetch([2], 0.0) == 0, "a prefetch gives up nothing"
    batch = batch_of([[0, 5]], 0)
    assert torch.equal(layer.dispatch(*batch), layer.toy.direct(*batch))
    assert [layer.residency.lookup(expert_id) for expert_id in (3, 4)] == [Lookup.PENDING, Lookup.MISS]
    drain([layer])


def test_a_prefetch_that_a_forward_has_joined_is_left_to_it() -> None:
    check_joining()


def check_joining() -> None:
    """It arrives while the forward waits, and others note that before the forward does."""
    layer = one_layer(3)
    layer.slots.prefetch([0], 1.0)
    Others([layer], [[], [Deed("settle"), Deed("prefetch", 0, (3, 4, 5))]])
    batch = batch_of([[0, 1]], 0)
    assert torch.equal(layer.dispatch(*batch), layer.toy.direct(*batch))
    drain([layer])


def fail_one_read(monkeypatch: pytest.MonkeyPatch, which: int) -> None:
    read, numbers = Home.read_piece, itertools.count(1)

    def failing(self: Home, piece: Piece, source: int, targets: Sequence[torch.Tensor]) -> None:
        if next(numbers) == which:
            targets[0].fill_(0xFF)
            raise FetchFailure
        read(self, piece, source, targets)

    monkeypatch.setattr(Home, "read_piece", failing)


@pytest.mark.parametrize("pass_kind", [PassKind.TOKEN, PassKind.LAYER_BUFFER])
def test_a_read_that_failed_before_anybody_waited_for_it_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, pass_kind: PassKind
) -> None:
    check_trying_again(monkeypatch, pass_kind)


def check_trying_again(monkeypatch: pytest.MonkeyPatch, pass_kind: PassKind) -> None:
    """While the first kernel runs, a read fails that is done ahead: for the second pass or for the next layer."""
    is_buffered = pass_kind is PassKind.LAYER_BUFFER
    layers = engine_of(
        replace(
            story_of(1, [], layer_count=2, pass_kind=pass_kind, buffer_count=2 if is_buffered else 0),
            slot_counts=[4, 4],
        )
    )
    for layer in layers:
        layer.dispatch.preload([0, 1, 2, 3] if is_buffered else [0, 1])
    mover, counters = layers[0].mover, layers[0].counters
    bank_up = counters.bank_up["dram"]
    layers[0].toy.meanwhile = mover.feed
    with monkeypatch.context() as patched:
        # For the layer buffer, experts 4 and 5 are waited for before.
        fail_one_read(patched, 3 if is_buffered else 1)
        output = layers[0].dispatch(*batch_of(WIDE, 0))
    assert counters.values[bank_up] == 0, "nothing was read ahead"
    layers[0].toy.meanwhile = lambda: None
    assert torch.equal(output, layers[0].toy.direct(*batch_of(WIDE, 0)))
    assert torch.equal(layers[1].dispatch(*batch_of(WIDE, 0)), layers[1].toy.direct(*batch_of(WIDE, 0)))
    drain(layers)


def test_what_a_forward_that_failed_had_begun_is_there_for_others() -> None:
    check_relinquishing()


def check_relinquishing() -> None:
    """The kernel of the first pass fails while the second one's experts are on their way."""
    layer = one_layer(4)
    layer.dispatch.preload([0, 1])
    layer.toy.calls_until_failure = 0
    with pytest.raises(KernelFailure):
        layer.dispatch(*batch_of([[0, 1], [2, 3], [4, 5]], 0))
    layer.toy.calls_until_failure = None
    assert layer.residency.state_counts()[SlotState.FILLING] == 2
    drain([layer])


#: What another thread does for each layer of a forward.
_DEED_COUNT = 100


def random_deed(rng: random.Random) -> Deed:
    what = rng.choice(["prefetch", "prefetch", "settle", "forget", "feed"])
    chosen = tuple(rng.sample(range(EXPERT_COUNT), rng.randint(0, 3)))
    return Deed(what, rng.randrange(3), chosen, rng.choice(WANTERS))


@pytest.mark.parametrize("pass_kind", [PassKind.TOKEN, PassKind.EXPERT, PassKind.LAYER_BUFFER])
@pytest.mark.parametrize("trouble", ["none", "reads fail", "a hand is ended"])
def test_threads_that_really_are_threads_change_no_output(
    monkeypatch: pytest.MonkeyPatch, pass_kind: PassKind, trouble: str
) -> None:
    """Hands carry, another thread prefetches and forgets, and the interpreter goes from one to another all the time."""
    story = Story([3, 2, 4], pass_kind, 2, False, True, True, [], [])
    layers = engine_of(story, has_hands=True)
    others = Others(layers, [])
    read, reads, is_over = Home.read_piece, itertools.count(1), threading.Event()

    def troubled(self: Home, piece: Piece, source: int, targets: Sequence[torch.Tensor]) -> None:
        number = next(reads)
        if trouble == "reads fail" and number % 17 == 0:
            targets[0].fill_(0xFF)
            raise FetchFailure
        if trouble == "a hand is ended" and number > 30 and threading.current_thread().name.startswith("moecxl-"):
            targets[0].fill_(0xFF)
            raise SystemExit
        read(self, piece, source, targets)

    monkeypatch.setattr(Home, "read_piece", troubled)

    # So many for each layer of a forward: locks are not fair, and one who never pauses can keep the other out for ever.
    permits = threading.Semaphore(0)

    def disturb() -> None:
        rng = random.Random(1)
        while permits.acquire() and not is_over.is_set():
            others.do(random_deed(rng))

    rng = random.Random(2)
    failed_count = 0
    other = threading.Thread(target=disturb)
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        other.start()
        for seed in range(30):
            width = rng.choice([1, 1, 2, 5])
            for layer in layers:
                ids = [rng.sample(range(EXPERT_COUNT), TOPK) for _ in range(width)]
                permits.release(_DEED_COUNT)
                try:
                    check_output(story, layer, ids, seed)
                except FetchFailure:
                    failed_count += 1
    finally:
        is_over.set()
        permits.release()
        other.join(20)
        sys.setswitchinterval(interval_s)
    assert not other.is_alive()
    assert bool(failed_count) == (trouble == "reads fail")
    assert isinstance(layers[0].mover.failure, SystemExit) == (trouble == "a hand is ended")
    end_hands(layers[0].mover)
    layers[0].mover._has_hands = False
    monkeypatch.setattr(Home, "read_piece", read)
    drain(layers)
