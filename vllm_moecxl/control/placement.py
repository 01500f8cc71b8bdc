"""Which bank, or which stripe over several banks, is the home of each expert. Pure arithmetic."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_moecxl.control.account import LayerNeed
from vllm_moecxl.control.striping import cut
from vllm_moecxl.errors import CapacityError
from vllm_moecxl.types import StripeMode, Tier
from vllm_moecxl.units import MIB, format_bytes

#: Banks of a tier whose fetch times are within this ratio are one class: as good as each other, shared by a hash.
#: Wide enough for the spread of equal devices and of a measurement, narrow enough to tell the paper's devices apart
#: (52 | 32, 26 | 18 GB/s). Source: the devices of the MoE-CXL paper, as in `control.device_model.PRESETS`.
CLASS_RATIO = 1.25

#: Slabs of at least this size are striped by "auto". A part has to outlast its latency and the cost of one more copy
#: call: a quarter of 4 MiB takes 20 us at 52 GB/s, against a latency below 0.5 us and a call of a few us.
#: Source: arithmetic on the fastest device in `control.device_model.PRESETS`.
STRIPE_BYTES_MIN = 4 * MIB

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)

Floats = npt.NDArray[np.float64]
Words = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class BankView:
    """What placement needs to know of a bank.

    Attributes:
        identity: the same after a restart (a serial number, a path): the hash is keyed on it.
        tier: class of its memory.
        capacity_bytes: bytes that it may home.
        latency_s: of a read from the idle bank.
        read_bytes_per_s: of large reads, above 0.
    """

    identity: str
    tier: Tier
    capacity_bytes: int
    latency_s: float
    read_bytes_per_s: float

    def fetch_s(self, slab_bytes: int) -> float:
        """Time to read one slab from the idle bank."""
        return self.latency_s + slab_bytes / self.read_bytes_per_s


@dataclass(frozen=True)
class Part:
    """A bank's part of a slab; the shares of a route add up to 1."""

    bank_index: int
    share: float


#: Where a slab lies. One part: whole in one bank; several: a stripe, its parts in this order.
Route = tuple[Part, ...]


@dataclass(frozen=True)
class Placement:
    """A home for every expert.

    Attributes:
        routes: the routes in use, each once.
        route_ids: per layer, [experts] index into `routes`.
        hot: per layer, expert ids, hottest first, for the device slots; empty where no frequency tells them apart.
    """

    routes: tuple[Route, ...]
    route_ids: tuple[npt.NDArray[np.int32], ...]
    hot: tuple[npt.NDArray[np.int64], ...]


def place(
    layers: Sequence[LayerNeed],
    frequencies: Sequence[Floats] | None,
    banks: Sequence[BankView],
    stripe: StripeMode,
    *,
    part_slack_bytes: int = 0,
) -> Placement:
    """Give every expert a home: the more often it is activated, the better.

    Experts are taken hottest first, all layers together. Tiers are used in the order in which `banks` names them first;
    within a tier the class of banks with the shortest fetch that has room for the slab; within a class the bank that a
    weighted hash of (bank, layer, expert) prefers among those with room. So, among slabs of one size, no expert has a
    worse class than a colder one; and while nothing is full, a bank that joins a class takes only its own share from
    the others, and one that leaves it gives only its own away.

    A stripe comes before the classes of its tier. A bank without room for its part leaves the stripe, and the remaining
    experts go on with a stripe over those that are left, then with the classes.

    Args:
        layers: in the order of the model.
        frequencies: per layer, [experts] activations in any unit; None where nothing is known. Layers then get equal
            shares of the better places.
        banks: in the user's order of preference, with distinct identities.
        stripe: see `StripeMode`.
        part_slack_bytes: bytes that a part of a stripe may take beyond its share, because rows are cut at granules.

    Raises:
        CapacityError: the banks together are too small, or there are none.

    Source: Algorithm 1 of the MoE-CXL paper (device slots, best CXL device for the frequency, DRAM, file).
    """
    assert len({bank.identity for bank in banks}) == len(banks), "two banks of one identity"
    assert all(bank.read_bytes_per_s > 0 and bank.latency_s >= 0 for bank in banks)
    scores = _scores(layers, banks)
    room = _Room(layers, banks, stripe, part_slack_bytes)
    routes: dict[Route, int] = {}
    route_ids = [np.full(layer.expert_count, -1, dtype=np.int32) for layer in layers]
    homeless_bytes = 0
    for layer_id, expert_id in _hottest_first(layers, frequencies):
        route = room.take(layers[layer_id].slab_bytes, scores[layer_id][expert_id])
        if route is None:
            homeless_bytes += layers[layer_id].slab_bytes
        else:
            route_ids[layer_id][expert_id] = routes.setdefault(route, len(routes))
    if homeless_bytes:
        raise _too_small(layers, banks, homeless_bytes)
    hot = tuple(_hot(None if frequencies is None else frequencies[i]) for i in range(len(layers)))
    return Placement(tuple(routes), tuple(route_ids), hot)


@dataclass(frozen=True)
class _Stage:
    """Banks that are tried together for slabs of one size.

    Attributes:
        members: bank indices.
        stripe: the stripe over all of them, or None where each slab goes to one of them.
        part_bytes: what a slab takes of each member of the stripe.
    """

    members: tuple[int, ...]
    stripe: Route | None = None
    part_bytes: tuple[int, ...] = ()


class _Room:
    """What is free in the banks, and where a slab goes next."""

    def __init__(
        self, layers: Sequence[LayerNeed], banks: Sequence[BankView], stripe: StripeMode, part_slack_bytes: int
    ) -> None:
        self._banks = banks
        self._part_slack_bytes = part_slack_bytes
        self._free_bytes = [bank.capacity_bytes for bank in banks]
        self._alone: list[Route] = [(Part(index, 1.0),) for index in range(len(banks))]
        self._stages = {size: self._plan(size, stripe) for size in {layer.slab_bytes for layer in layers}}

    def take(self, slab_bytes: int, scores: list[float]) -> Route | None:
        """Take the room of one slab from the first stage that has it; None where none has.

        Room only shrinks: a stage that has none for this size is narrowed or dropped for good.
        """
        stages, free_bytes = self._stages[slab_bytes], self._free_bytes
        while stages:
            stage = stages[0]
            if stage.stripe is None:
                if open_banks := [i for i in stage.members if free_bytes[i] >= slab_bytes]:
                    best = min(open_banks, key=scores.__getitem__)
                    free_bytes[best] -= slab_bytes
                    return self._alone[best]
                del stages[0]
                continue
            parts = list(zip(stage.members, stage.part_bytes, strict=True))
            roomy = [i for i, part_bytes in parts if free_bytes[i] >= part_bytes]
            if len(roomy) == len(parts):
                for i, part_bytes in parts:
                    free_bytes[i] -= part_bytes
                return stage.stripe
            stages[:1] = self._striped(roomy, slab_bytes)
        return None

    def _plan(self, slab_bytes: int, stripe: StripeMode) -> list[_Stage]:
        """The stages of one slab size, best first."""
        stages: list[_Stage] = []
        memory = [i for i, bank in enumerate(self._banks) if bank.tier != "file"]
        for tier in dict.fromkeys(bank.tier for bank in self._banks):
            members = [i for i, bank in enumerate(self._banks) if bank.tier == tier]
            if stripe == "auto" and tier != "file" and slab_bytes >= STRIPE_BYTES_MIN:
                stages += self._striped(members, slab_bytes)
            if stripe == "all" and members[:1] == memory[:1]:
                stages += self._striped(memory, slab_bytes)
            stages += self._classes(members, slab_bytes)
        return stages

    def _striped(self, members: Sequence[int], slab_bytes: int) -> list[_Stage]:
        """The stripe over these banks, parts in proportion to their bandwidth; empty where it would be over one."""
        if len(members) < 2:
            return []
        total = sum(self._banks[i].read_bytes_per_s for i in members)
        shares = [self._banks[i].read_bytes_per_s / total for i in members]
        part_bytes = [stop - start + self._part_slack_bytes for start, stop in cut(slab_bytes, shares, 1)]
        route = tuple(Part(i, share) for i, share in zip(members, shares, strict=True))
        return [_Stage(tuple(members), route, tuple(part_bytes))]

    def _classes(self, members: Sequence[int], slab_bytes: int) -> list[_Stage]:
        """The banks of a tier by the time of a fetch, those within `CLASS_RATIO` of the fastest together."""
        fetch_s = {i: self._banks[i].fetch_s(slab_bytes) for i in members}
        classes: list[list[int]] = []
        for i in sorted(members, key=fetch_s.__getitem__):
            if classes and fetch_s[i] <= CLASS_RATIO * fetch_s[classes[-1][0]]:
                classes[-1].append(i)
            else:
                classes.append([i])
        return [_Stage(tuple(one)) for one in classes]


def _hottest_first(layers: Sequence[LayerNeed], frequencies: Sequence[Floats] | None) -> list[tuple[int, int]]:
    """(layer, expert) of all experts by activations of one token, then by their rank in their layer.

    The rank counts from 0 to 1 in every layer: where nothing is known, any first part of the order takes equal shares
    of all layers.
    """
    layer_ids = np.repeat(np.arange(len(layers)), [layer.expert_count for layer in layers])
    expert_ids = np.concatenate([np.arange(layer.expert_count) for layer in layers])
    heat = np.zeros(layer_ids.size)
    rank = (expert_ids + 0.5) / np.array([layer.expert_count for layer in layers])[layer_ids]
    if frequencies is not None:
        heats = [_heat(layer, frequency) for layer, frequency in zip(layers, frequencies, strict=True)]
        heat = np.concatenate(heats)
        rank = np.concatenate([(_descending(heat).argsort() + 0.5) / heat.size for heat in heats])
    order = np.lexsort((layer_ids, rank, -heat))
    return list(zip(layer_ids[order].tolist(), expert_ids[order].tolist(), strict=True))


def _heat(layer: LayerNeed, frequency: Floats) -> Floats:
    """[experts] activations of one token, which sum to the layer's top-k; equal where nothing was counted."""
    assert frequency.shape == (layer.expert_count,) and np.isfinite(frequency).all() and frequency.min() >= 0
    total = frequency.sum()
    share = frequency / total if total else np.full(layer.expert_count, 1 / layer.expert_count)
    return np.asarray(share * layer.topk, dtype=np.float64)


def _descending(values: Floats) -> npt.NDArray[np.int64]:
    """Indices by falling value, ties by rising index."""
    return np.argsort(-values, kind="stable").astype(np.int64)


def _hot(frequency: Floats | None) -> npt.NDArray[np.int64]:
    if frequency is None or frequency.min() == frequency.max():
        return np.empty(0, dtype=np.int64)
    return _descending(frequency)


def _scores(layers: Sequence[LayerNeed], banks: Sequence[BankView]) -> list[list[list[float]]]:
    """Per layer and expert, each bank's score: the lowest wins, with a probability in proportion to bandwidth.

    Source: rendezvous hashing (Thaler and Ravishankar 1998), weighted as -log(hash) / weight, an exponential race
    (Resch, "New Hashing Algorithms for Data Storage", SDC 2015).
    """
    bank_seeds = np.array([_seed("bank", bank.identity) for bank in banks], dtype=np.uint64)
    weights = np.array([bank.read_bytes_per_s for bank in banks], dtype=np.float64)
    scores = []
    for layer in layers:
        keys = _mix(_seed("layer", layer.name) + np.arange(1, layer.expert_count + 1, dtype=np.uint64) * _GOLDEN)
        hashes = _mix(keys[:, None] ^ bank_seeds[None, :])
        uniform = ((hashes >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # in (0, 1)
        scores.append((-np.log(uniform) / weights).tolist())
    return scores


def _seed(kind: str, name: str) -> np.uint64:
    """64 bits of a name, the same in every process (`hash` is salted)."""
    return np.uint64(int.from_bytes(hashlib.blake2b(f"{kind}:{name}".encode(), digest_size=8).digest()))


def _mix(words: Words) -> Words:
    """Source: the finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014); arrays of uint64 wrap around."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _too_small(layers: Sequence[LayerNeed], banks: Sequence[BankView], homeless_bytes: int) -> CapacityError:
    remedy = f'give the banks at least {-(-homeless_bytes // MIB)}MiB more, or add one, such as "file:PATH"'
    if not banks:
        return CapacityError(
            f"--moe-offload-config banks=[] leaves {format_bytes(homeless_bytes)} of experts without a home: {remedy}"
        )
    return CapacityError(
        f"--moe-offload-config banks={[bank.identity for bank in banks]} together give "
        f"{format_bytes(sum(bank.capacity_bytes for bank in banks))} and the experts take "
        f"{format_bytes(sum(layer.home_bytes for layer in layers))}, of which {format_bytes(homeless_bytes)} do not "
        f"fit: {remedy}"
    )
