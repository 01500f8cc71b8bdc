"""Gates applied early: the scores that torch computes, in words that say which visit they are of."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moecxl_kernels.gate import gate_lookahead

from vllm_moecxl.runtime.lookahead import Gate, GateLookahead

_TAG_SHIFT = 32
_STALE = -1
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def random(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    token_count=st.integers(0, 5),
    token_count_max=st.integers(1, 4),
    expert_count=st.sampled_from([1, 3, 16, 17, 60]),
    hidden_size=st.sampled_from([1, 8, 100, 256, 300, 513]),
    distance_count=st.integers(1, 3),
    dtype=dtypes,
    gate_dtype=dtypes,
)
def test_scores_are_those_of_torch_and_every_word_says_its_visit(
    data: st.DataObject,
    token_count: int,
    token_count_max: int,
    expert_count: int,
    hidden_size: int,
    distance_count: int,
    dtype: torch.dtype,
    gate_dtype: torch.dtype,
) -> None:
    # Eighths, and below powers of two: every type holds them and their products. The interpreter rounds the rest not as
    # devices do, down.
    eighths = torch.randint(-32, 33, (token_count, hidden_size), generator=torch.Generator().manual_seed(1)) / 8
    x = eighths.to(dtype)
    weight = random(distance_count, expert_count, hidden_size, seed=2, dtype=gate_dtype)
    powers = torch.randint(-2, 3, (distance_count, hidden_size), generator=torch.Generator().manual_seed(3))
    scale = 2.0**powers if data.draw(st.booleans()) else None
    bias = random(distance_count, expert_count, seed=4, dtype=gate_dtype) if data.draw(st.booleans()) else None
    visit = data.draw(st.sampled_from([1, 2, 77, 2**31 - 1, -(2**31), -5]))
    depth = data.draw(st.integers(1, 4))
    words = distance_count * token_count_max * expert_count
    buffer = torch.full((depth * words + 6,), _STALE, dtype=torch.int64)
    out = buffer[3 : 3 + depth * words].view(depth, words)

    gate_lookahead(x, weight, scale, bias, torch.tensor([visit, 9], dtype=torch.int32), out, token_count_max)

    tag = visit & 0x7FFFFFFF
    written = buffer != _STALE
    row = out[tag % depth].view(distance_count, token_count_max, expert_count)
    count = min(token_count, token_count_max)
    assert written.sum() == distance_count * count * expert_count, "nothing else has changed"
    assert (row[:, :count] >> _TAG_SHIFT == tag).all()
    scores = (row[:, :count] & 0xFFFFFFFF).to(torch.uint32).view(torch.int32).view(torch.float32)
    for distance in range(distance_count):
        scaled = x[:count] if scale is None else x[:count] * scale[distance].to(dtype)
        rows = scaled.to(gate_dtype).double()
        expected = rows @ weight[distance].double().T
        if bias is not None:
            expected += bias[distance].double()
        bound = 1e-6 * (rows.abs() @ weight[distance].double().abs().T + 10)
        assert ((scores[distance].double() - expected).abs() <= bound).all()


def test_scores_are_what_the_host_driven_lookahead_computes() -> None:
    hidden_size, expert_count = 320, 24
    norms = [random(hidden_size, seed=seed, dtype=torch.float32).abs() + 0.5 for seed in range(3)]
    gates = [
        Gate(random(expert_count, hidden_size, seed=10 + i, dtype=torch.float32), None, norm)
        for i, norm in enumerate(norms)
    ]
    x = random(3, hidden_size, seed=20, dtype=torch.float32)
    expected = GateLookahead(gates, 2).on_device(0, x)
    assert expected is not None

    out = torch.zeros((2, 2 * 3 * expert_count), dtype=torch.int64)
    scale = torch.stack([norms[1] / norms[0], norms[2] / norms[0]])
    weight = torch.stack([gates[1].weight, gates[2].weight])
    gate_lookahead(x, weight, scale, None, torch.tensor([5], dtype=torch.int32), out, 3)

    scores = (out[1] & 0xFFFFFFFF).to(torch.uint32).view(torch.int32).view(torch.float32).view(2, 3, expert_count)
    torch.testing.assert_close(scores, torch.from_numpy(expected), rtol=1e-4, atol=1e-4)
