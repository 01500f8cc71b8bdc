"""What device-driven layers leave behind: counts for the metrics, routing for the forecast, ids that nobody has."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from moecxl_kernels.tables import NO_EXPERT, PAYLOAD_MASK, VISIT_MASK, VISIT_SHIFT, Record, read_record, row_of

from vllm_moecxl.control.layer_order import LayerOrder
from vllm_moecxl.errors import IntegrityError
from vllm_moecxl.runtime.counters import Counters
from vllm_moecxl.runtime.device_driven.layer import DeviceLayer
from vllm_moecxl.runtime.ring import Begun, RoutingRing, Sighting
from vllm_moecxl.types import Cause, Lookup

Scores = npt.NDArray[np.float32]

#: Nothing new from the layer that should be next for this long: perhaps it was passed by.
_LOST_S = 50e-3
#: Steps that may have begun and not been seen.
_BEGUN_COUNT_MAX = 8


class DeviceRing:
    """Reads the records of all layers, in the order in which a forward visits them. One thread at a time.

    Which bank a fetch came from is known on average only: records say how many experts were fetched, not which.

    Args:
        layers: in order.
        order: told where the device is.
        counters: get what was looked up and fetched.
        ring: gets the routing, where somebody predicts.
        clock: seconds.

    Attributes:
        failure: what a layer was asked for that it does not have; `raise_failure` raises it where a forward is.
    """

    def __init__(
        self,
        layers: Sequence[DeviceLayer],
        order: LayerOrder,
        counters: Counters,
        ring: RoutingRing | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.ring = ring
        self.failure: IntegrityError | None = None
        self._layers = layers
        self._order = order
        self._counters = counters
        self._clock = clock
        #: Of each layer its records, [depth, words] int64; the device writes them.
        self._rows = [layer.mailbox.records.numpy() for layer in layers]
        self._bytes_by_bank = [layer.home.bytes_by_bank(range(layer.home.expert_count)) for layer in layers]
        self._visits = [0] * len(layers)
        self._totals = [(0, 0)] * len(layers)
        self._next = 0
        self._step = self._last_layer_id = -1
        self._seen_s = clock()
        self._begun: dict[int, Begun] = {}

    def skip(self) -> None:
        """Forget what was left until now: nobody asked for it. Before the first forward that somebody did ask for."""
        for layer_id, layer in enumerate(self._layers):
            if behind := self._behind(layer_id):
                self._visits[layer_id] += behind
                record = read_record(layer.mailbox.records, self._visits[layer_id])
                assert record is not None, "nothing is running"
                self._totals[layer_id] = record.hits, record.misses

    def begin(self, step: int, begun: Begun) -> None:
        """A forward is about to be queued whose records will say that they are of this step."""
        self._begun[step] = begun
        while len(self._begun) > _BEGUN_COUNT_MAX:
            del self._begun[min(self._begun)]

    def collect(self) -> None:
        """Take in what is there by now."""
        now_s = self._clock()
        while True:
            if self._take(self._next):
                self._seen_s = now_s
                self._next = (self._next + 1) % len(self._layers)
            elif now_s - self._seen_s > _LOST_S:
                self._seen_s = now_s
                if (found := self._next_that_has_one()) is None:
                    return
                self._next = found
            else:
                return

    def raise_failure(self) -> None:
        """Tell the forward's thread of what the device could not do.

        Raises:
            IntegrityError: an id that a layer does not have. What the forward gave is worth nothing.
        """
        if self.failure is not None:
            raise self.failure

    def _next_that_has_one(self) -> int | None:
        order = [(self._next + offset) % len(self._layers) for offset in range(len(self._layers))]
        return next((layer_id for layer_id in order if self._behind(layer_id)), None)

    def _behind(self, layer_id: int) -> int:
        """Visits of a layer that were not taken in."""
        tags = self._rows[layer_id][:, 0] >> VISIT_SHIFT
        ahead = (tags - self._visits[layer_id]) & VISIT_MASK
        # Rows of earlier visits look as if they were very far ahead.
        return int(np.where(ahead > VISIT_MASK // 2, 0, ahead).max())

    def _take(self, layer_id: int) -> bool:
        """Take in the next record of a layer, if it is there."""
        rows, visit = self._rows[layer_id], self._visits[layer_id] + 1
        ahead = ((int(rows[row_of(visit, len(rows)), 0]) >> VISIT_SHIFT) - visit) & VISIT_MASK
        if ahead > VISIT_MASK // 2:  # of an older visit: asked many times a millisecond, so nothing else is looked at
            return False
        if ahead:
            # The ring has gone round. What was lost is in the totals of the latest.
            visit = self._visits[layer_id] + self._behind(layer_id)
        record = read_record(self._layers[layer_id].mailbox.records, visit)
        if record is None:
            return False
        is_there, scores = self._ahead(layer_id, visit, record)
        if not is_there:
            return False
        self._visits[layer_id] = visit
        self._order.arrive(layer_id)
        self._count(layer_id, record)
        self._report(layer_id, record, scores)
        return True

    def _count(self, layer_id: int, record: Record) -> None:
        counters, home = self._counters, self._layers[layer_id].home
        before = self._totals[layer_id]
        hits, misses = (
            now - then & PAYLOAD_MASK for now, then in zip((record.hits, record.misses), before, strict=True)
        )
        self._totals[layer_id] = record.hits, record.misses
        amounts = {counters.lookup[Lookup.HIT]: hits, counters.lookup[Lookup.MISS]: misses, counters.single_pass: 1}
        if misses:
            for name, byte_count in self._bytes_by_bank[layer_id].items():
                amounts[counters.fetch_bytes[name, Cause.DEMAND]] = misses * byte_count // home.expert_count
        counters.add(amounts)
        if record.has_unknown_ids and self.failure is None:
            self.failure = IntegrityError(
                f"the router chose an expert that {home.name} does not have, it has {home.expert_count}: what the "
                "forward gave is worth nothing"
            )
        assert not record.is_too_wide, "a visit has no more routes than the device has slots"

    def _report(self, layer_id: int, record: Record, ahead: Scores | None) -> None:
        ring = self.ring
        if ring is None:
            return
        if record.step != self._step:
            self._step = record.step
            self._last_layer_id = -1
            begun = self._begun.pop(record.step) if record.step in self._begun else Begun(None, None, self._clock())
            ring.report(begun)
        # Further tokens of a forward that was cut are not seen: so wide a one is not predicted.
        if layer_id > self._last_layer_id and ring.is_wanted and record.expert_ids.size:
            self._last_layer_id = layer_id
            ids = record.expert_ids.reshape(-1, self._layers[layer_id].topk)
            is_real = ids[:, 0] != NO_EXPERT  # the others are what a graph pads its batch with
            ring.report(
                Sighting(
                    layer_id, self._clock(), ids[is_real], None, None, None if ahead is None else ahead[:, is_real]
                )
            )

    def _ahead(self, layer_id: int, visit: int, record: Record) -> tuple[bool, Scores | None]:
        """[distances, tokens, experts] what the next gates make of this layer's input.

        Returns:
            Whether there is nothing to wait for, and the scores, if there are any: they are written after the record.
        """
        layer = self._layers[layer_id]
        token_count = record.expert_ids.size // layer.topk
        gates = [gate for gate in layer.early_gates if 0 < token_count <= gate.token_count_max]
        if not gates:
            return True, None
        rows = [
            gate.words[row_of(visit, len(gate.words)), : token_count * len(gate.weight[0])].numpy() for gate in gates
        ]
        words = np.stack(rows).reshape(len(gates), token_count, -1)
        ahead = (words >> VISIT_SHIFT) - (visit & VISIT_MASK)
        if ahead.any():
            # Where some are of a later visit, those of this one are gone.
            return bool((ahead > 0).any()), None
        return True, (words & PAYLOAD_MASK).astype(np.uint32).view(np.float32)
