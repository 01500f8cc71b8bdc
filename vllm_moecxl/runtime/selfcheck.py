"""The check at start: does this kernel give the same bits from slots, in passes, as in one call over all experts?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_moecxl.runtime.dispatch import Dispatch, Kernel

_SEED = 20
#: Forwards of several widths: kernels take other code paths for one row, a few rows and a full block.
_TOKEN_COUNTS = (1, 5, 48)

#: x, router weights and expert ids of one forward.
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class SelfCheck:
    """Random forwards over a layer's real weights, and what the resident layer makes of them.

    Attributes:
        batches: (x [tokens, hidden], topk_weights [tokens, k] float32, topk_ids [tokens, k] int32) each.
        expected: the resident layer's output for each.
    """

    batches: tuple[Batch, ...]
    expected: tuple[torch.Tensor, ...]

    @classmethod
    def prepare(
        cls, kernel: Kernel, expert_count: int, topk: int, hidden_size: int, dtype: torch.dtype, device: torch.device
    ) -> SelfCheck:
        """Run the batches while the kernel still reads all experts, in their own rows."""
        batches = _batches(expert_count, topk, hidden_size, dtype, device)
        return cls(batches, tuple(kernel(*batch).clone() for batch in batches))

    @classmethod
    def recall(
        cls,
        expected: Sequence[torch.Tensor],
        expert_count: int,
        topk: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> SelfCheck:
        """The same batches, with what the resident layer made of them when it was packed."""
        return cls(
            _batches(expert_count, topk, hidden_size, dtype, device), tuple(output.to(device) for output in expected)
        )

    def run(self, make_dispatch: Callable[[], Dispatch]) -> int:
        """Outputs that differ when the batches run through a fresh dispatch; 0 where every bit is the same."""
        dispatch = make_dispatch()
        return sum(
            int((dispatch(*batch) != expected).sum())
            for batch, expected in zip(self.batches, self.expected, strict=True)
        )


def _batches(
    expert_count: int, topk: int, hidden_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Batch, ...]:
    rng = np.random.default_rng(_SEED)
    batches = []
    for token_count in _TOKEN_COUNTS:
        x = torch.from_numpy(rng.standard_normal((token_count, hidden_size), dtype=np.float32)).to(dtype)
        weights = torch.from_numpy(rng.dirichlet(np.ones(topk), size=token_count).astype(np.float32))
        ids = np.stack([rng.permutation(expert_count)[:topk] for _ in range(token_count)]).astype(np.int32)
        batches.append((x.to(device), weights.to(device), torch.from_numpy(ids).to(device)))
    return tuple(batches)
