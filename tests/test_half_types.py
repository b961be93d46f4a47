"""bfloat16 and float16 into the kernels and out of them: every value, every width, rounded as torch rounds."""

from __future__ import annotations

import pytest
import torch
from operator_cases import operator_arguments
from testkit import assert_same_bits, qkv, rand
from torch import Tensor

import scatterbrain as sb
from scatterbrain.operators.arguments import AttentionArguments, ForwardResults

DTYPES = [torch.bfloat16, torch.float16]


def mean_of_two(first: Tensor, second: Tensor) -> Tensor:
    """Exact attention of one query per head over two keys with equal scores. first, second (heads, width)."""
    value = torch.stack([first, second], 1)[None]
    query = torch.zeros(1, first.shape[0], 1, 16, dtype=first.dtype)
    key = torch.zeros(1, first.shape[0], 2, 16, dtype=first.dtype)
    out, _ = sb.attention(
        query, key, value, support=sb.Full(), low_rank=None, return_lse=True
    )  # with the lse, which torch's kernel does not return
    return out[0, :, 0]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 15, 16, 17, 64, 100])
def test_every_finite_value_comes_back_as_it_went_in(width: int, dtype: torch.dtype) -> None:
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    values = bits.view(dtype)
    values = values[values.isfinite()]
    # Both keys have weight, so only the sign of zero can change.
    values = torch.where(values == 0, values.abs(), values)
    values = values[: len(values) // width * width].view(-1, width)
    if dtype == torch.bfloat16 and torch.ops.scatterbrain.instruction_set() == "avx512_bf16":
        # The processor's dot product flushes subnormal numbers to zero.
        values = torch.where(values.float().abs() < torch.finfo(dtype).tiny, torch.zeros_like(values), values)
    half = values.float().abs() < torch.finfo(dtype).max / 2  # the sum must fit
    assert same_bits(torch.where(half, mean_of_two(values, values), values), values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_round_to_nearest_with_ties_to_even(dtype: torch.dtype) -> None:
    first, second = (rand(512, 33, seed=seed, dtype=dtype) for seed in range(2))
    # The mean of neighbours lies exactly between two representable numbers.
    second[::2] = (first[::2].view(torch.int16) + 1).view(dtype)
    expected = ((first.float() + second.float()) / 2).to(dtype)
    assert same_bits(mean_of_two(first, second), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_overflow_gives_infinity_and_nan_stays_nan(dtype: torch.dtype) -> None:
    largest, nan = torch.finfo(dtype).max, float("nan")
    first = torch.tensor([[largest, nan, 1.0, 0.0]], dtype=dtype)
    second = torch.tensor([[largest, 1.0, nan, 0.0]], dtype=dtype)
    out = mean_of_two(first, second)
    assert out.isnan().tolist() == [[False, True, True, False]]
    if dtype == torch.float16:  # the sum fits into float32
        assert out[0, 0] == largest


def test_gradients_of_another_type_are_converted() -> None:
    """The operator takes them; autograd would have cast them."""
    query, key, value = qkv(40, batch=1, heads=1, head_dim=32, dtype=torch.bfloat16)
    d_out = rand(*query.shape, seed=3, dtype=torch.bfloat16)
    span = torch.tensor([[[0, 40]] * 3], dtype=torch.int32)
    arguments = operator_arguments(AttentionArguments, query=query, key=key, value=value, span=span, span_keys=40)
    out, lse = torch.ops.scatterbrain.attention(*arguments)
    backward = torch.ops.scatterbrain.attention_backward
    want = backward(*ForwardResults(d_out, None, out, lse), *arguments)
    got = backward(*ForwardResults(d_out.float(), None, out.float(), lse), *arguments)
    assert_same_bits(got[:3], want[:3], ("dq", "dk", "dv"))
