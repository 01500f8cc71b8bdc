"""One object per worker and model: it plans the bytes, takes each layer's experts home and hands out its dispatch."""

from __future__ import annotations

import logging
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from vllm_moecxl.config import OffloadConfig
from vllm_moecxl.control.account import Account, LayerNeed, Machine, plan
from vllm_moecxl.control.cost import LayerCosts
from vllm_moecxl.control.eviction import POLICIES
from vllm_moecxl.control.layer_order import LayerOrder
from vllm_moecxl.control.placement import Placement
from vllm_moecxl.control.prediction.semantic import Embed
from vllm_moecxl.control.prefetching import Prefetching
from vllm_moecxl.control.residency import Residency
from vllm_moecxl.data.banks.base import Bank
from vllm_moecxl.data.banks.file import FileBank
from vllm_moecxl.data.banks.memory import MemoryBank
from vllm_moecxl.data.devices.base import DeviceBackend
from vllm_moecxl.data.host import available_bytes
from vllm_moecxl.data.layout import SlabLayout
from vllm_moecxl.data.mover import Mover
from vllm_moecxl.data.profiles import PUBLISHED
from vllm_moecxl.data.registration import Registration, register_banks
from vllm_moecxl.data.slabfile import PackedLayer
from vllm_moecxl.data.slabs import Cells, Home, HomeBuilder, LayerCells
from vllm_moecxl.errors import CapacityError, ConfigError, IntegrityError
from vllm_moecxl.runtime.counters import BANK_BYTES_KINDS, Counters
from vllm_moecxl.runtime.device_driven.dispatch import AnyDispatch
from vllm_moecxl.runtime.device_driven.side import DeviceSide
from vllm_moecxl.runtime.dispatch import Bind, Dispatch, Kernel
from vllm_moecxl.runtime.foreseeing import REACH, make_prefetching, make_recording
from vllm_moecxl.runtime.foresight import Foresight
from vllm_moecxl.runtime.layer_buffer import LayerBuffer
from vllm_moecxl.runtime.lookahead import Gate, GateLookahead
from vllm_moecxl.runtime.placing import Placer, slab_file_among
from vllm_moecxl.runtime.ring import Begun, RoutingRing
from vllm_moecxl.runtime.selfcheck import SelfCheck
from vllm_moecxl.runtime.sidecar import Sidecar
from vllm_moecxl.runtime.slots import SlotCache
from vllm_moecxl.types import Cause, InPlaceMode, PassKind
from vllm_moecxl.units import MIB, format_bytes, format_rate, format_seconds

#: Host memory that the plan leaves to the rest of the process: activations, allocator slack, the tokenizer.
_HOST_RESERVE_BYTES = 512 * MIB
#: Progress lines of one load.
_PROGRESS_LINE_COUNT = 10


@dataclass
class LoadedLayer:
    """One layer's experts in the kernel's own format, as vLLM's post-processing left them.

    Attributes:
        name: the layer's name.
        expert_count: its experts.
        topk: experts of one token.
        tensors: by name, every per-expert tensor, [experts, ...] on the device; emptied when they have been taken home.
            Stand-ins, which nobody reads, where `packed` has the real ones.
        kernel: runs vLLM's kernel on whatever is bound; all experts, to begin with.
        bind: makes the kernel read from cells whose tensors come in the order of `tensors`.
        kernel_name: the kernel's class.
        pass_kind: how its wide forwards may be cut and keep their bits; LAYER_BUFFER for "not at all".
        hidden_size: width of its input.
        dtype: type of its input.
        packed: the layer in a slab file, if it is served from one.
        shared: by name, what the kernel keeps beside the rows of experts.
    """

    name: str
    expert_count: int
    topk: int
    tensors: dict[str, torch.Tensor]
    kernel: Kernel
    bind: Bind
    kernel_name: str
    pass_kind: PassKind
    hidden_size: int
    dtype: torch.dtype
    packed: PackedLayer | None = None
    shared: dict[str, torch.Tensor] = field(default_factory=dict)

    def check(self, device: torch.device) -> SelfCheck:
        """What the resident layer makes of the self-check's batches: by running it, or as it was packed."""
        shape = (self.expert_count, self.topk, self.hidden_size, self.dtype, device)
        if self.packed is None:
            return SelfCheck.prepare(self.kernel, *shape)
        return SelfCheck.recall(self.packed.check, *shape)


class OffloadRuntime:
    """Everything that one model on one worker needs to run from slots.

    Args:
        config: the user's options.
        backend: the compute device's memory and copies.
        device: where the kernels take their inputs.
        logger: gets the account, the progress and what was achieved.
        counters_path: file to share the counters through; None keeps them in this process.
        banks: homes in order of preference.
        slot_bytes_per_s: at which kernels read slots; compared with the banks' profiles.
        lookup: who looks experts up, and fills slots: the host or the device.
        may_record: whether this one of several ranks and models is the one that writes the trace.
    """

    def __init__(
        self,
        config: OffloadConfig,
        backend: DeviceBackend,
        device: torch.device,
        logger: logging.Logger,
        banks: Sequence[Bank],
        counters_path: Path | None = None,
        slot_bytes_per_s: float = PUBLISHED["dram"].read_bytes_per_s,
        *,
        lookup: Literal["host", "device"] = "host",
        may_record: bool = True,
    ) -> None:
        assert config.mode != "off" and banks
        self.config = config
        self.banks = tuple(banks)
        self.counters = Counters([bank.name for bank in banks], counters_path)
        self.account: Account | None = None
        self.dispatches: dict[str, AnyDispatch] = {}
        self._backend = backend
        self._device = device
        self._slot_bytes_per_s = slot_bytes_per_s
        self._log = logger
        self._needs: dict[str, LayerNeed] = {}
        self._placement: Placement | None = None
        #: By shape, the buffers in the order that the next layers get them.
        self._layer_buffers: dict[tuple[SlabLayout, int], deque[LayerBuffer]] = {}
        #: By kernel class, the pass kind that the self-check has confirmed.
        self._confirmed: dict[str, PassKind] = {}
        self._homes = HomeBuilder(banks, config.verify)
        for bank in banks:
            if isinstance(bank, MemoryBank):
                bank.reads_safely = config.verify == "fetch"
                bank.strict_placement = config.strict_placement
        self._mover = Mover(banks, backend, self.counters)
        self._sidecar = Sidecar(self._mover, banks, backend, self.counters)
        # Their threads hold none of this object: they end with it.
        self._registrations: list[Registration] = []
        self._closing: list[Callable[[], None]] = []
        weakref.finalize(self, _end, self._sidecar, self._mover, self._registrations, backend, self._closing)
        self._may_record = may_record
        self._foresight: Foresight | None = None
        #: Whether `foresee` was called.
        self.is_foreseeing = False
        #: Called before the first forward, where the device looks up: the model is complete then.
        self.prepare: Callable[[], None] = lambda: None
        self._is_device_driven = lookup == "device"
        self._device_side: DeviceSide | None = None
        self._order: LayerOrder | None = None

    @property
    def layer_count(self) -> int:
        """MoE layers that were declared."""
        return len(self._needs)

    @property
    def slab_file(self) -> FileBank | None:
        """The bank that already has every expert, if one of the banks is a slab file."""
        return slab_file_among(self.banks)

    def declare(self, need: LayerNeed) -> None:
        """Announce a layer while the model is being built; sizes are the checkpoint format's."""
        assert self.account is None, "layers are declared before the plan"
        self._needs[need.name] = need

    def plan(self, kv_cache_bytes: int | None, device_reserve_bytes: int) -> Account:
        """Place every expert, resolve slots and buffers, print the byte account, refuse what cannot fit.

        Happens before any weight is read.

        Args:
            kv_cache_bytes: what vLLM was asked to give the KV cache; None where it takes what is left.
            device_reserve_bytes: device memory that belongs to others: KV cache, activations, what vLLM leaves free.

        Raises:
            ConfigError, CapacityError, IntegrityError: one sentence each.
        """
        machine = Machine(
            host_free_bytes=max(available_bytes() - _HOST_RESERVE_BYTES, 0),
            device_free_bytes=max(self._backend.free_bytes() - device_reserve_bytes, 0),
            shared=self._backend.is_host,
            kv_cache_bytes=kv_cache_bytes,
        )
        placer = Placer(self.config, self.banks)
        needs = placer.exact_needs(list(self._needs.values()))
        self._placement = placer.place(needs, machine)
        holdings, curves = placer.holdings(needs, self._placement), placer.curves(len(needs))
        self.account = plan(self.config, needs, machine, holdings, curves)
        self._log.info("MoE offload: byte account of this rank, before the weights are loaded:")
        for line in self.account.lines(needs):
            self._log.info("MoE offload:   %s", line)
        for bank in self.banks:
            profile = bank.profile
            self._log.info(
                "MoE offload:   bank %s: %s, %s, figures %s",
                *(bank.name, format_seconds(profile.latency_s), format_rate(profile.read_bytes_per_s), profile.source),
            )
        return self.account

    def install(self, layer: LoadedLayer) -> AnyDispatch:
        """Take a layer's experts home and give it slots.

        Raises:
            CapacityError: a bank or the device is full.
            ConfigError: the options forbid the only exact way to run this kernel.
            IntegrityError: the self-check found a bit that differs and there is no other way to run it, or the slab
                file is not what was packed.
        """
        assert self.account is not None and self._placement is not None
        layer_id = list(self._needs).index(layer.name)
        slot_count = min(self.account.slot_counts[layer_id], layer.expert_count)
        may_be_cut = slot_count < layer.expert_count
        check = None
        # From a file even a layer that is never cut is checked: its tensors were made elsewhere.
        if self.config.passes == "exact" and layer.kernel_name not in self._confirmed and (may_be_cut or layer.packed):
            check = layer.check(self._device)
        home = self._take_home(layer, layer_id)
        costs = partial(self._costs, home)
        is_cut = may_be_cut and not costs().is_always_in_place
        buffer = self._next_buffer(home.layout, layer.expert_count) if is_cut else None
        slots = Cells(home.layout, slot_count, self._backend, behind=buffer.cells if buffer else None)
        pass_kind = self._confirmed.get(layer.kernel_name, self._wanted_pass_kind(layer, buffer, is_cut))

        def dispatch(
            pass_kind: PassKind,
            buffer: LayerBuffer | None,
            counters: Counters,
            home: Home = home,
            costs: Callable[[], LayerCosts] = costs,
        ) -> Dispatch:
            policy = POLICIES[self.config.eviction](slot_count, layer.expert_count)
            residency = Residency(layer.expert_count, slot_count, policy)
            return Dispatch(
                layer.name,
                layer_id,
                SlotCache(residency, home, slots, self._backend, self._mover, counters),
                buffer,
                costs(),
                self._layer_order(),
                self._sidecar,
                self._backend,
                counters,
                layer.kernel,
                layer.bind,
                pass_kind,
            )

        if check is not None:
            counted = self.counters.values.copy()
            tried = partial(dispatch, costs=partial(self._costs, home, "never")) if is_cut else dispatch
            if buffer is not None and self._backend.is_host and not home.is_direct:
                # Passes fetch a slab many times over: from a slow bank, once is enough.
                rehearsed = self._borrow(layer.name, home, buffer)
                tried = partial(dispatch, home=rehearsed, costs=partial(self._costs, rehearsed, "never"))
            pass_kind = self._confirm(check, layer, pass_kind, buffer, tried)
            self.counters.values[:] = counted  # no request asked for what was fetched
        installed: AnyDispatch
        if self._is_device_driven:
            made = self._devices().make
            installed = made(
                layer.name,
                layer_id,
                home,
                slots,
                layer.topk,
                buffer,
                layer.kernel,
                layer.bind,
                # Whoever accepts another last bit accepts it from tokens in groups too.
                PassKind.TOKEN if self.config.passes == "fast" else pass_kind,
                costs().fetch_s,
                self._prepare_weakly(),
            )
        else:
            installed = dispatch(pass_kind, buffer, self.counters)
        self.dispatches[layer.name] = installed
        if (hot := self._placement.hot[layer_id]).size:
            installed.preload(hot.tolist())
        self._report_progress()
        return installed

    @property
    def ring(self) -> RoutingRing | None:
        """Where forwards leave their routing, and somebody has to say what is in them; None if nobody wants to know."""
        return self._foresight.ring if self._foresight is not None else None

    @property
    def prefetching(self) -> Prefetching | None:
        """Who prefetches into slots; None where nobody does, or nothing was forwarded yet."""
        return self._foresight.prefetching if self._foresight is not None else None

    @property
    def device_token_count_max(self) -> int | None:
        """Tokens that the device serves at once, whatever experts they need; None where the host looks up."""
        return self._device_side.token_count_max if self._device_side is not None else None

    def foresee(self, gates: Sequence[Gate | None], model_name: str, embed: Embed | None = None) -> None:
        """Begin to record and to predict, as far as the user asked for it; called once the model is complete.

        Args:
            gates: routers of the layers, in order.
            model_name: for the recording.
            embed: the model's token embeddings; None where they are not at hand.
        """
        self.is_foreseeing = True
        in_order = [self.dispatches[name] for name in self._needs]
        topk = max(need.topk for need in self._needs.values())
        recording = None
        if self.config.trace is not None and self._may_record:
            recording = make_recording(self.config.trace, in_order, topk, model_name)
        order = self._layer_order()
        prefetching = make_prefetching(self.config, in_order, topk, order, self._mover, embed, self._log)
        lookahead = GateLookahead(gates, REACH)
        if recording is None and prefetching is None:
            if self._device_side is not None:
                self._device_side.foresee(None, None)
            return
        ring = RoutingRing(
            keeps_inputs=True,
            keeps_weights=recording is not None,
            lookahead=None if self._backend.is_host else lookahead,
        )
        expert_count = max(dispatch.home.expert_count for dispatch in self.dispatches.values())
        counters = self.counters  # not this object, which the sidecar's thread would keep alive

        def show_prefetch_up(is_up: bool) -> None:
            counters.values[counters.prefetch_up] = int(is_up)

        show_prefetch_up(prefetching is not None)
        foresight = Foresight(ring, expert_count, recording, prefetching, lookahead, show_prefetch_up)
        self._foresight = self._sidecar.foresight = foresight
        self._closing.append(foresight.close)
        if self._device_side is not None:
            self._device_side.foresee(ring, lookahead)
        for dispatch in self.dispatches.values():
            if isinstance(dispatch, Dispatch):
                dispatch.ring = ring

    def forget(self, request_ids: Collection[str]) -> None:
        """Requests have ended or were cancelled: what was being fetched for nobody else is given up."""
        if self._foresight is not None:
            self._foresight.ring.end(request_ids)
        given_up = [fetch for request_id in request_ids for fetch in self._mover.forget(request_id)]
        if given_up:
            for dispatch in self.dispatches.values():
                dispatch.slots.settle()

    def watch(self) -> None:
        """Look after the sidecar; called once a step."""
        is_up = self.config.sidecar and self._sidecar.watch()
        if self._device_side is not None and not is_up:
            self._device_side.collect()
        if self._foresight is not None and not is_up:
            self._foresight.drain(predicts=False)  # a trace is recorded whether there is a sidecar or not

    def begin(self, begun: Begun | None) -> None:
        """A forward that requests asked for is about to be queued.

        Args:
            begun: what is in it, where that is known so early.

        Raises:
            IntegrityError: the device has found out that an earlier one needed experts that do not exist.
        """
        if self._device_side is not None:
            self._device_side.begin(begun, time.perf_counter())
        elif begun is not None and self.ring is not None:
            self.ring.begin(begun)

    def _prepare_weakly(self) -> Callable[[], None]:
        """Calls `prepare`, which is set later, and does not keep this object."""
        held_weakly = weakref.ref(self)

        def prepare() -> None:
            if (runtime := held_weakly()) is not None:
                runtime.prepare()

        return prepare

    def _devices(self) -> DeviceSide:
        if self._device_side is None:
            self._device_side = DeviceSide(
                self.config,
                self._backend,
                self._device,
                self._mover,
                self._layer_order(),
                self._sidecar,
                self.counters,
            )
            self._sidecar.device_side = self._device_side
        return self._device_side

    def _layer_order(self) -> LayerOrder:
        if self._order is None:
            self._order = LayerOrder(self.layer_count)
        return self._order

    def _costs(self, home: Home, in_place: InPlaceMode | None = None) -> LayerCosts:
        """What running a layer costs each way; "always" in place is the user's word, and refused where it cannot be.

        Raises:
            ConfigError: the device cannot address this layer's homes.
        """
        in_place = in_place or self.config.in_place
        is_addressable = self._backend.is_host and home.is_direct
        if in_place == "always" and not is_addressable:
            raise ConfigError(
                f'--moe-offload-config: in_place="always" is not possible: the kernel of {home.name} cannot read all '
                'its experts where they are, name one bank of memory on the CPU engine without verify="fetch", or use '
                '"auto"'
            )
        by_bank = home.bytes_by_bank(range(home.expert_count))
        rates = {bank.name: bank.profile.read_bytes_per_s for bank in self.banks}
        # Banks are read one beside the other: the one that takes longest decides.
        longest_s = max(byte_count / rates[name] for name, byte_count in by_bank.items())
        return LayerCosts(
            home.expert_count,
            home.slab_bytes,
            sum(by_bank.values()) / longest_s,
            self._slot_bytes_per_s,
            in_place,
            is_addressable=is_addressable,
        )

    def _borrow(self, name: str, home: Home, buffer: LayerBuffer) -> Home:
        """The home of a layer for as long as its slabs are all in a layer buffer."""
        every = list(range(home.expert_count))
        buffer.claim(home)
        buffer.bring(every, Cause.DEMAND, 0.0)
        buffer.wait(every)
        return self._homes.borrow(name, home.layout, buffer.cells.tensors)

    def _take_home(self, layer: LoadedLayer, layer_id: int) -> Home:
        assert self._placement is not None
        routes = [self._placement.routes[route_id] for route_id in self._placement.route_ids[layer_id]]
        if layer.packed is None:
            return self._homes.store(layer.name, layer.tensors, routes)
        assert self.slab_file is not None
        layer.tensors.clear()
        return self._homes.adopt(layer.packed, self.slab_file, routes)

    def _next_buffer(self, layout: SlabLayout, expert_count: int) -> LayerBuffer | None:
        """A buffer that layers of this layout and size share, by turns, if the account has any."""
        assert self.account is not None
        if not self.account.layer_buffer_count:
            return None
        key = (layout, expert_count)
        if key not in self._layer_buffers:
            cells = [LayerCells(layout, expert_count, self._backend) for _ in range(self.account.layer_buffer_count)]
            self._layer_buffers[key] = deque(
                LayerBuffer(one, self._backend, self._mover, self.counters) for one in cells
            )
        buffers = self._layer_buffers[key]
        buffers.rotate()
        return buffers[0]

    def _wanted_pass_kind(self, layer: LoadedLayer, buffer: LayerBuffer | None, is_cut: bool) -> PassKind:
        if not is_cut:
            return PassKind.TOKEN  # never cut: every forward fits
        if self.config.passes == "fast":
            return PassKind.EXPERT
        if layer.pass_kind is not PassKind.LAYER_BUFFER or buffer is not None:
            return layer.pass_kind
        sentence = f"{layer.kernel_name} keeps the resident model's result only when a wide forward runs in one pass"
        if self.config.layer_buffer is False:
            raise ConfigError(
                f"--moe-offload-config: layer_buffer=False is not possible: {sentence}; drop the option, or accept a "
                'changed last bit with passes="fast"'
            )
        raise CapacityError(
            f"{sentence}, and the layer buffer does not fit on the device: ask for fewer slots or a smaller KV cache"
        )

    def _confirm(
        self,
        check: SelfCheck,
        layer: LoadedLayer,
        pass_kind: PassKind,
        buffer: LayerBuffer | None,
        dispatch: Callable[[PassKind, LayerBuffer | None, Counters], Dispatch],
    ) -> PassKind:
        """The pass kind that gives this kernel's own bits, by trial."""
        # The layer buffer would take the wide batch away from the passes that are to be tried.
        tried = None if pass_kind is not PassKind.LAYER_BUFFER else buffer
        different = check.run(lambda: dispatch(pass_kind, tried, self._private_counters()))
        if different:
            sentence = (
                f"self-check of {layer.name}: {pass_kind.value} passes change {different} outputs of "
                f"{layer.kernel_name} here"
            )
            hopeless = (
                "this kernel cannot be served from slots, drop --moe-offload"
                if layer.packed is None
                else "the slab file is not this engine's, run moecxl pack again with the engine's own options"
            )
            if pass_kind is PassKind.LAYER_BUFFER:
                raise IntegrityError(f"{sentence}: {hopeless}")
            if buffer is None:
                raise IntegrityError(
                    f"{sentence}: set --moe-offload-config.layer_buffer true, or accept it with passes fast"
                )
            self._log.warning("MoE offload: %s: every wide forward goes through the layer buffer instead", sentence)
            pass_kind = PassKind.LAYER_BUFFER
            different = check.run(lambda: dispatch(pass_kind, buffer, self._private_counters()))
            if different:
                raise IntegrityError(f"{sentence}, and so does the layer buffer: {hopeless}")
        self._confirmed[layer.kernel_name] = pass_kind
        self._log.info(
            "MoE offload: %s runs wide forwards by %s, bit-equal in the self-check", layer.kernel_name, pass_kind.value
        )
        return pass_kind

    def _private_counters(self) -> Counters:
        """For forwards that no request asked for."""
        return Counters([bank.name for bank in self.banks])

    def _report_progress(self) -> None:
        done, total = len(self.dispatches), self.layer_count
        step = max(total // _PROGRESS_LINE_COUNT, 1)
        if done % step == 0 or done == total:
            used = format_bytes(sum(bank.used_bytes for bank in self.banks))
            self._log.info("MoE offload: experts of %d/%d layers are home, %s", done, total, used)
        if done == total:
            self._register_banks()
            self._report_banks()
            self._link_layers()
            if self.config.sidecar:
                self._sidecar.start()

    def _register_banks(self) -> None:
        """Let the device read the banks by itself, as far as it can."""
        registration = register_banks(self.banks, self._backend, strict=self.config.strict_placement)
        self._registrations.append(registration)
        for bank in registration.registered:
            self._mover.mark_registered(bank.name)
        for line in registration.lines:
            self._log.info("MoE offload: %s", line)
        if self._device_side is not None:
            self._device_side.connect([bank.name for bank in registration.registered])

    def _link_layers(self) -> None:
        """Tell each layer which one comes after it; after the last, the next forward's first."""
        in_order = [self.dispatches[name] for name in self._needs]
        for index, dispatch in enumerate(in_order):
            following = in_order[(index + 1) % len(in_order)]
            if following is not dispatch:
                dispatch.following = following  # all of an engine are of one kind

    def _report_banks(self) -> None:
        """Say what was achieved, in the log and in metrics."""
        values = self.counters.values
        if in_place_count := sum(dispatch.is_always_in_place for dispatch in self.dispatches.values()):
            self._log.info(
                "MoE offload: %d of %d layers run in place, straight from their homes: their slots and layer buffers "
                'stay empty (in_place "never" would use them)',
                *(in_place_count, self.layer_count),
            )
        for bank in self.banks:
            self._log.info("MoE offload: %s", bank.describe())
            values[self.counters.bank_up[bank.name]] = int(not bank.astray_bytes)
            values[self.counters.bank_bandwidth[bank.name]] = int(bank.profile.read_bytes_per_s)
            kinds = (bank.capacity_bytes or bank.used_bytes, bank.used_bytes, bank.astray_bytes)
            for kind, byte_count in zip(BANK_BYTES_KINDS, kinds, strict=True):
                values[self.counters.bank_bytes[bank.name, kind]] = byte_count


def _end(
    sidecar: Sidecar,
    mover: Mover,
    registrations: Sequence[Registration],
    backend: DeviceBackend,
    closing: Sequence[Callable[[], None]],
) -> None:
    sidecar.stop()
    mover.close()
    for close in closing:
        close()
    for registration in registrations:
        registration.release(backend)
