"""Which backend a compute device gets."""

from __future__ import annotations

import torch

from vllm_moecxl.data.devices.base import DeviceBackend
from vllm_moecxl.data.devices.cpu import CpuBackend
from vllm_moecxl.data.devices.cuda import CudaBackend


def make_backend(device: torch.device) -> DeviceBackend:
    """The backend of vLLM's compute device."""
    return CpuBackend() if device.type == "cpu" else CudaBackend(device)
