"""One object per worker and model: it plans the bytes, takes each layer's experts home and hands out its dispatch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_moecxl.config import OffloadConfig
from vllm_moecxl.control.account import Account, LayerNeed, Machine, plan
from vllm_moecxl.control.eviction import POLICIES
from vllm_moecxl.control.residency import Residency
from vllm_moecxl.data.banks import make_bank
from vllm_moecxl.data.devices import DeviceBackend
from vllm_moecxl.data.host import available_bytes
from vllm_moecxl.data.slabs import Cells, Home, SlabLayout
from vllm_moecxl.errors import CapacityError, ConfigError, IntegrityError
from vllm_moecxl.runtime.counters import Counters
from vllm_moecxl.runtime.dispatch import Bind, Dispatch, Kernel
from vllm_moecxl.runtime.selfcheck import SelfCheck
from vllm_moecxl.types import PassKind
from vllm_moecxl.units import MIB, format_bytes

#: Host memory that the plan leaves to the rest of the process: activations, allocator slack, the tokenizer.
_HOST_RESERVE_BYTES = 512 * MIB
#: Progress lines of one load.
_PROGRESS_LINE_COUNT = 10


@dataclass
class LoadedLayer:
    """One layer's experts in the kernel's own format, as vLLM's post-processing left them.

    Attributes:
        name: the layer's name.
        topk: experts of one token.
        tensors: by name, every per-expert tensor, [experts, ...] on the device; emptied when they have been taken home.
        kernel: runs vLLM's kernel on whatever is bound; all experts, to begin with.
        bind: makes the kernel read from cells whose tensors come in the order of `tensors`.
        kernel_name: the kernel's class.
        pass_kind: how its wide forwards may be cut and keep their bits; LAYER_BUFFER for "not at all".
        hidden_size: width of its input.
        dtype: type of its input.
    """

    name: str
    topk: int
    tensors: dict[str, torch.Tensor]
    kernel: Kernel
    bind: Bind
    kernel_name: str
    pass_kind: PassKind
    hidden_size: int
    dtype: torch.dtype

    @property
    def expert_count(self) -> int:
        return next(iter(self.tensors.values())).shape[0]


class OffloadRuntime:
    """Everything that one model on one worker needs to run from slots.

    Args:
        config: the user's options.
        backend: the compute device's memory and copies.
        device: where the kernels take their inputs.
        logger: gets the account, the progress and what was achieved.
        counters_path: file to share the counters through; None keeps them in this process.
    """

    def __init__(
        self,
        config: OffloadConfig,
        backend: DeviceBackend,
        device: torch.device,
        logger: logging.Logger,
        counters_path: Path | None = None,
    ) -> None:
        assert config.mode != "off"
        self.config = config
        self.bank = make_bank(config.banks[0])
        self.counters = Counters([self.bank.name], counters_path)
        self.account: Account | None = None
        self.dispatches: dict[str, Dispatch] = {}
        self._backend = backend
        self._device = device
        self._log = logger
        self._needs: dict[str, LayerNeed] = {}
        self._layer_buffers: dict[tuple[SlabLayout, int], Cells] = {}
        #: By kernel class, the pass kind that the self-check has confirmed.
        self._confirmed: dict[str, PassKind] = {}

    @property
    def layer_count(self) -> int:
        """MoE layers that were declared."""
        return len(self._needs)

    def declare(self, need: LayerNeed) -> None:
        """Announce a layer while the model is being built; sizes are the checkpoint format's."""
        assert self.account is None, "layers are declared before the plan"
        self._needs[need.name] = need

    def plan(self, kv_cache_bytes: int | None, device_reserve_bytes: int) -> Account:
        """Resolve slots and buffers, print the byte account, refuse what cannot fit. Before any weight is read.

        Args:
            kv_cache_bytes: what vLLM was asked to give the KV cache; None where it takes what is left.
            device_reserve_bytes: device memory that belongs to others: KV cache, activations, what vLLM leaves free.

        Raises:
            ConfigError, CapacityError: one sentence each.
        """
        machine = Machine(
            host_free_bytes=max(available_bytes() - _HOST_RESERVE_BYTES, 0),
            device_free_bytes=max(self._backend.free_bytes() - device_reserve_bytes, 0),
            shared=self._backend.is_host,
            kv_cache_bytes=kv_cache_bytes,
        )
        needs = list(self._needs.values())
        self.account = plan(self.config, needs, machine)
        self._log.info("MoE offload: byte account of this rank, before the weights are loaded:")
        for line in self.account.lines(needs, self.bank.name):
            self._log.info("MoE offload:   %s", line)
        return self.account

    def install(self, layer: LoadedLayer) -> Dispatch:
        """Take a layer's experts home and give it slots.

        Raises:
            CapacityError: a bank or the device is full.
            ConfigError: the options forbid the only exact way to run this kernel.
            IntegrityError: the self-check found a bit that differs and there is no other way to run it.
        """
        assert self.account is not None
        expert_count = layer.expert_count
        slot_count = min(self.account.slot_counts[list(self._needs).index(layer.name)], expert_count)
        is_cut = slot_count < expert_count
        check = None
        if is_cut and self.config.passes == "exact" and layer.kernel_name not in self._confirmed:
            check = SelfCheck.prepare(
                layer.kernel, expert_count, layer.topk, layer.hidden_size, layer.dtype, self._device
            )
        layout = SlabLayout.of(layer.tensors)
        home = Home.store(self.bank, layer.tensors)
        slots = Cells(layout, slot_count, self._backend)
        layer_buffer = self._layer_buffer(layout, expert_count) if is_cut else None
        pass_kind = self._confirmed.get(layer.kernel_name, self._wanted_pass_kind(layer, layer_buffer, is_cut))

        def dispatch(pass_kind: PassKind, layer_buffer: Cells | None, counters: Counters) -> Dispatch:
            policy = POLICIES[self.config.eviction](slot_count)
            residency = Residency(expert_count, slot_count, policy)
            return Dispatch(
                layer.name,
                residency,
                home,
                slots,
                layer_buffer,
                self._backend,
                counters,
                layer.kernel,
                layer.bind,
                pass_kind,
            )

        if check is not None:
            pass_kind = self._confirm(check, layer, pass_kind, layer_buffer, dispatch)
        self.dispatches[layer.name] = dispatch(pass_kind, layer_buffer, self.counters)
        self._report_progress()
        return self.dispatches[layer.name]

    def _layer_buffer(self, layout: SlabLayout, expert_count: int) -> Cells | None:
        """The buffer that all layers of this layout and size share, if the account has one."""
        assert self.account is not None
        if not self.account.layer_buffer_bytes:
            return None
        key = (layout, expert_count)
        if key not in self._layer_buffers:
            self._layer_buffers[key] = Cells(layout, expert_count, self._backend)
        return self._layer_buffers[key]

    def _wanted_pass_kind(self, layer: LoadedLayer, layer_buffer: Cells | None, is_cut: bool) -> PassKind:
        if not is_cut:
            return PassKind.TOKEN  # never cut: every forward fits
        if self.config.passes == "fast":
            return PassKind.EXPERT
        if layer.pass_kind is not PassKind.LAYER_BUFFER or layer_buffer is not None:
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
        layer_buffer: Cells | None,
        dispatch: Callable[[PassKind, Cells | None, Counters], Dispatch],
    ) -> PassKind:
        """The pass kind that gives this kernel's own bits, by trial."""
        # The layer buffer would take the wide batch away from the passes that are to be tried.
        tried = None if pass_kind is not PassKind.LAYER_BUFFER else layer_buffer
        different = check.run(lambda: dispatch(pass_kind, tried, Counters([self.bank.name])))
        if different:
            sentence = (
                f"self-check of {layer.name}: {pass_kind.value} passes change {different} outputs of "
                f"{layer.kernel_name} here"
            )
            if pass_kind is PassKind.LAYER_BUFFER:
                raise IntegrityError(f"{sentence}: this kernel cannot be served from slots, drop --moe-offload")
            if layer_buffer is None:
                raise IntegrityError(
                    f"{sentence}: set --moe-offload-config.layer_buffer true, or accept it with passes fast"
                )
            self._log.warning("MoE offload: %s: every wide forward goes through the layer buffer instead", sentence)
            pass_kind = PassKind.LAYER_BUFFER
            different = check.run(lambda: dispatch(pass_kind, layer_buffer, Counters([self.bank.name])))
            if different:
                raise IntegrityError(
                    f"{sentence}, and so does the layer buffer: this kernel cannot be served from slots, "
                    "drop --moe-offload"
                )
        self._confirmed[layer.kernel_name] = pass_kind
        self._log.info(
            "MoE offload: %s runs wide forwards by %s, bit-equal in the self-check", layer.kernel_name, pass_kind.value
        )
        return pass_kind

    def _report_progress(self) -> None:
        done, total = len(self.dispatches), self.layer_count
        step = max(total // _PROGRESS_LINE_COUNT, 1)
        if done % step == 0 or done == total:
            self._log.info(
                "MoE offload: experts of %d/%d layers are home, %s", done, total, format_bytes(self.bank.used_bytes)
            )
