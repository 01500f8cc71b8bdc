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


def exact_pass_kind(kernel_name: str) -> PassKind:
    """How a wide forward of this kernel is cut; LAYER_BUFFER (one pass) for all that are not known to be exact.

    CPUExpertsFp8 is known not to be: it picks its code path by an expert's number of tokens, so neither whole tokens
    nor experts may be taken apart without a change in the last bit.
    """
    return PassKind.TOKEN if kernel_name in _TOKEN_EXACT else PassKind.LAYER_BUFFER


#: Quantisation methods that build a kernel alike for any number of experts. Others count them while they process, or
#: were not measured.
_COUNT_BLIND = frozenset(
    {
        "UnquantizedFusedMoEMethod",
        "AutoAWQMoEMethod",
        "AutoGPTQMoEMethod",
        "CompressedTensorsW8A8Fp8MoEMethod",
        "CompressedTensorsW8A8Int8MoEMethod",
        "CompressedTensorsWNA16MoEMethod",
        "Fp8MoEMethod",
    }
)


def is_built_from_one_expert(method_name: str) -> bool:
    """Whether a stand-in of one expert gives this method's kernel the same rows as all of them would, on the CPU."""
    return method_name in _COUNT_BLIND
