"""What we know of vLLM's expert kernels: how each may be cut into passes and keep its bits.

Source: measured with vLLM 0.32 on x86 (AMX and AVX-512), every kernel against the resident layer; the start-up
self-check repeats the comparison on the user's machine.
"""

from __future__ import annotations

from vllm_moecxl.types import PassKind

#: Kernels that compute each token on its own and add its routes in one go: whole tokens may be taken apart.
_TOKEN_EXACT = frozenset(
    {
        "CPUUnquantizedExperts",
        "X86CPUUnquantizedExperts",
        "CPUExpertsInt4",
        "CPUExpertsInt8",
    }
)
#: Kernels that round each route's row before adding: two passes add up to the same bits, for at most two routes.
_EXPERT_EXACT_TOP2 = frozenset({"CPUExpertsFp8"})


def exact_pass_kind(kernel_name: str, topk: int) -> PassKind:
    """How a wide forward of this kernel is cut; LAYER_BUFFER (one pass) for kernels that nobody has measured."""
    if kernel_name in _TOKEN_EXACT:
        return PassKind.TOKEN
    if kernel_name in _EXPERT_EXACT_TOP2 and topk <= 2:
        return PassKind.EXPERT
    return PassKind.LAYER_BUFFER
