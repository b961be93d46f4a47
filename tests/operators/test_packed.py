"""The operator that runs packed rows exactly in a traced graph."""

from __future__ import annotations

import pytest
import torch
from operator_cases import WITHOUT_GRADIENT
from testkit import B, N, assert_all_close, assert_same_bits, leaves, qkv, rand
from torch import Tensor

import scatterbrain as sb
from scatterbrain.operators.packed import (
    _exact_on_device,
    _gradients_on_device,
    exact_if_packed,
    exact_if_packed_backward,
)

SCALE = 0.4
PACKED = torch.stack([torch.arange(N) // 15, torch.arange(N) // 40]).int()  # three sequences, and one
WARNING = pytest.mark.filterwarnings("ignore:.*packed sequences run exact")


def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Of every sequence by itself."""
    out = torch.empty(*query.shape[:3], value.shape[3], dtype=query.dtype)
    for row, numbers in enumerate(PACKED):
        for number in numbers.unique():
            place = (slice(row, row + 1), slice(None), numbers == number)
            parts = (t[place] for t in (query, key, value))
            out[place] = sb.reference.attention(*parts, sb.Full(), None, is_causal=True, scale=SCALE)
    return out


@WARNING
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_packed_rows_are_exact_inside_each_sequence_with_their_gradients(dtype: torch.dtype) -> None:
    tokens, upstream = qkv(value_dim=5, dtype=dtype), rand(B, 2, N, 5, seed=7).double()
    mine, theirs = leaves(tokens), leaves([t.double() for t in tokens])
    approximated = torch.full((B, 2, N, 5), 3.0, dtype=dtype).requires_grad_()
    out, want = exact_if_packed(approximated, *mine, PACKED, SCALE), exact(*theirs)
    got = torch.autograd.grad(out, [approximated, *mine], upstream.to(dtype))
    assert_all_close([out.double()], [want])
    assert not got[0].any()
    assert_all_close([g.double() for g in got[1:]], torch.autograd.grad(want, theirs, upstream))


def test_rows_of_one_sequence_keep_what_was_computed_with_its_gradient() -> None:
    tokens, approximated = leaves(qkv()), rand(B, 2, N, 8, seed=7).requires_grad_()
    upstream = rand(B, 2, N, 8, seed=8)
    one = torch.tensor([[0], [3]], dtype=torch.int32).expand(B, N)  # what the number is does not matter
    out = exact_if_packed(approximated, *tokens, one, SCALE)
    gradients = torch.autograd.grad(out, [approximated, *tokens], upstream)
    assert_same_bits([out, gradients[0]], [approximated, upstream])
    assert not any(g.any() for g in gradients[1:])


@WARNING
@pytest.mark.parametrize("sequence", [PACKED, torch.zeros_like(PACKED)], ids=["packed", "one sequence"])
def test_opcheck_of_packed_rows(sequence: Tensor) -> None:
    tokens, out = leaves(qkv()), rand(B, 2, N, 8, seed=7).requires_grad_()
    torch.library.opcheck(exact_if_packed, (out, *tokens, sequence, SCALE))
    plain = [t.detach() for t in (out, *tokens)]
    torch.library.opcheck(exact_if_packed_backward, (*plain, sequence, SCALE), test_utils=WITHOUT_GRADIENT)


@WARNING
def test_second_derivatives_of_packed_rows_raise() -> None:
    tokens = leaves(qkv())
    out = exact_if_packed(tokens[0], *tokens, PACKED, SCALE)
    (gradient,) = torch.autograd.grad(out.square().sum(), tokens[1], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        gradient.sum().backward()


@WARNING
@pytest.mark.parametrize("sequence", [PACKED, torch.zeros_like(PACKED)], ids=["packed", "one sequence"])
def test_devices_whose_numbers_are_not_looked_at_get_the_same(sequence: Tensor) -> None:
    tokens, out, upstream = qkv(value_dim=5), rand(B, 2, N, 5, seed=7), rand(B, 2, N, 5, seed=8)
    looked, unseen = exact_if_packed, _exact_on_device
    assert_all_close([unseen(out, *tokens, sequence, SCALE)], [looked(out, *tokens, sequence, SCALE)])
    looked, unseen = exact_if_packed_backward, _gradients_on_device
    assert_all_close(unseen(upstream, *tokens, sequence, SCALE), looked(upstream, *tokens, sequence, SCALE))
