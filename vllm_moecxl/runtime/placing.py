"""Which bank homes which expert of this model: what the banks can do and hold, put before the placement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vllm_moecxl.config import OffloadConfig
from vllm_moecxl.control.account import (
    Holding,
    LayerNeed,
    Machine,
    require_host_room,
    sum_home_bytes,
    wanted_device_bytes,
)
from vllm_moecxl.control.budgets import miss_curves
from vllm_moecxl.control.frequency import ActivationFrequency
from vllm_moecxl.control.placement import BankView, Placement, place
from vllm_moecxl.control.trace import RoutingTrace
from vllm_moecxl.data.banks.base import Bank
from vllm_moecxl.data.banks.file import FileBank
from vllm_moecxl.data.slabs import STRIPE_GRANULE_BYTES
from vllm_moecxl.errors import ConfigError, IntegrityError

#: What kernel formats and page rounding may add to the checkpoint's bytes of a slab.
_SLAB_GROWTH = 1.02
#: A stripe is cut at pages: a part may exceed its share by two of them for each tensor of a slab.
_PART_SLACK_BYTES = 16 * STRIPE_GRANULE_BYTES


def slab_file_among(banks: Sequence[Bank]) -> FileBank | None:
    """The slab file among some banks: at most one of them is one."""
    return next((bank for bank in banks if isinstance(bank, FileBank)), None)


class Placer:
    """Places the experts of one model.

    Args:
        config: the user's options.
        banks: homes in order of preference.
    """

    def __init__(self, config: OffloadConfig, banks: Sequence[Bank]) -> None:
        self._config = config
        self._banks = banks
        self._slab_file = slab_file_among(banks)

    def exact_needs(self, needs: Sequence[LayerNeed]) -> list[LayerNeed]:
        """The layers with the sizes of their slabs as far as they are known: a slab file knows them exactly.

        Raises:
            IntegrityError: the slab file lacks a layer.
        """
        if self._slab_file is None:
            return list(needs)
        exact = []
        for need in needs:
            packed = self._slab_file.slabs.layers.get(need.name)
            if packed is None or packed.expert_count != need.expert_count:
                raise IntegrityError(
                    f"--moe-offload-config: bank {self._slab_file.name} has no {need.expert_count} experts of layer "
                    f"{need.name}: pack this model with moecxl pack (a draft model's experts cannot be packed)"
                )
            exact.append(replace(need, slab_bytes=packed.layout.slab_bytes))
        return exact

    def place(self, needs: Sequence[LayerNeed], machine: Machine) -> Placement:
        """A home for every expert.

        Raises:
            ConfigError: the trace cannot be read, or is not of this model.
            CapacityError: the banks are too small.
        """
        home_bytes = sum_home_bytes(needs)
        if all(bank.shares_host_memory for bank in self._banks):
            require_host_room(home_bytes, machine)
        host_bytes = machine.host_free_bytes
        if machine.shared and self._slab_file is not None:
            # What does not fit stays in the file: slots come before homes that only repeat it.
            host_bytes = max(host_bytes - wanted_device_bytes(self._config, needs), 0)
        views = [
            BankView(
                identity=bank.identity,
                tier=bank.tier,
                capacity_bytes=self._room(bank, host_bytes, home_bytes),
                latency_s=bank.profile.latency_s,
                read_bytes_per_s=bank.profile.read_bytes_per_s,
            )
            for bank in self._banks
        ]
        # Kernel formats may be a little larger than the checkpoint's, and tensors take whole pages.
        padded = [
            need if self._slab_file else replace(need, slab_bytes=int(need.slab_bytes * _SLAB_GROWTH)) for need in needs
        ]
        fits_plainly = len(views) == 1 and views[0].capacity_bytes >= home_bytes
        return place(
            needs if fits_plainly else padded,
            self._frequencies(needs),
            views,
            self._config.stripe,
            part_slack_bytes=_PART_SLACK_BYTES,
        )

    @staticmethod
    def _room(bank: Bank, host_bytes: int, home_bytes: int) -> int:
        if isinstance(bank, FileBank):
            return home_bytes
        if bank.capacity_bytes is None:
            return host_bytes
        return min(bank.capacity_bytes, host_bytes) if bank.shares_host_memory else bank.capacity_bytes

    def _frequencies(self, needs: Sequence[LayerNeed]) -> Sequence[npt.NDArray[np.float64]] | None:
        if self._config.placement_trace is None:
            return None
        expert_counts = {need.expert_count for need in needs}
        if len(expert_counts) > 1:
            raise ConfigError(
                f"--moe-offload-config: placement_trace={self._config.placement_trace!r} is not possible: the layers "
                "of this model differ in their number of experts, drop the option"
            )
        path = Path(self._config.placement_trace)
        return list(ActivationFrequency.from_trace(path, len(needs), expert_counts.pop()).values)

    def curves(self, layer_count: int) -> npt.NDArray[np.int64] | None:
        """[layers, experts + 1] misses of each layer with 0, 1, ... slots, by the placement trace; None without one.

        `place` has checked by then that the trace is of this model.
        """
        if self._config.placement_trace is None:
            return None
        trace = RoutingTrace.load(self._config.placement_trace)
        assert trace.layer_count == layer_count
        return miss_curves(trace)

    def holdings(self, needs: Sequence[LayerNeed], placement: Placement) -> list[Holding]:
        """What each bank will home."""
        byte_counts = [0.0] * len(self._banks)
        for need, route_ids in zip(needs, placement.route_ids, strict=True):
            for route_id, count in zip(*np.unique(route_ids, return_counts=True), strict=True):
                for part in placement.routes[route_id]:
                    byte_counts[part.bank_index] += float(count) * part.share * need.slab_bytes
        return [
            Holding(bank.name, round(count), bank.shares_host_memory)
            for bank, count in zip(self._banks, byte_counts, strict=True)
        ]
