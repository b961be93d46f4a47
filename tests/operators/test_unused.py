"""Gradients of zero to parameters that an output does not depend on."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from testkit import assert_same_bits, leaves, rand
from torch import Tensor, nn

from scatterbrain.operators.unused import with_zero_gradients

SPECIAL = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, 3.0])  # what an addition might change


def draws() -> tuple[Tensor, list[Tensor]]:
    """An output, and parameters of other dtypes, one without dimensions and one that holds infinity and NaN."""
    parameters = [rand(4, 2), rand(5, dtype=torch.float64), torch.tensor(0.5), SPECIAL.clone()]
    return rand(2, 3), leaves(parameters)


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view(torch.int32)


class Unused(nn.Module):
    """A module whose parameters do nothing."""

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__()
        self.unused = nn.ParameterList(parameters)

    def forward(self, out: Tensor) -> Tensor:
        return with_zero_gradients(out, self.parameters())


def traced(module: nn.Module, out: Tensor) -> Callable[[Tensor], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        module = torch.jit.trace(module, (out,), check_trace=False)
        torch.jit.save(module, io.BytesIO())  # refuses graphs with nodes in Python
    return module


def compiled(module: nn.Module, out: Tensor) -> Callable[[Tensor], Tensor]:
    torch._dynamo.reset()
    return torch.compile(module, backend="aot_eager", fullgraph=True)


WAYS = {"untraced": lambda module, out: module, "traced": traced, "compiled": compiled}


@pytest.mark.parametrize("way", WAYS)
def test_the_output_keeps_its_bits_and_the_parameters_get_zeros(way: str):
    module, out = Unused(draws()[1]), SPECIAL.clone().requires_grad_()
    parameters = list(module.parameters())
    result = WAYS[way](module, out)(out)
    assert torch.equal(bits(result), bits(out))
    d_out, *zeros = torch.autograd.grad(result, [out, *parameters], SPECIAL)
    assert torch.equal(bits(d_out), bits(SPECIAL))
    assert_same_bits(zeros, [torch.zeros_like(p) for p in parameters])


def test_an_output_without_gradients_gets_some():
    out, parameters = draws()
    with_zero_gradients(out, parameters).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in parameters)


@pytest.mark.parametrize("way", ["grad off", "inference", "nothing is trained", "no parameters"])
def test_nothing_happens_where_nothing_wants_a_gradient(way: str):
    out, parameters = draws()
    if way == "nothing is trained":
        parameters = [p.requires_grad_(False) for p in parameters]
    contexts = {"grad off": torch.no_grad, "inference": torch.inference_mode}
    with contexts.get(way, nullcontext)():
        assert with_zero_gradients(out, [] if way == "no parameters" else parameters) is out


def test_frozen_parameters_get_no_gradient():
    out, (trained, frozen, *_) = draws()
    frozen.requires_grad_(False)
    with_zero_gradients(out, (trained, frozen)).sum().backward()
    assert trained.grad is not None and frozen.grad is None


def test_the_result_may_be_written_to():
    out, parameters = draws()
    result = with_zero_gradients(out.requires_grad_() * 1, parameters)
    result += 1
    result.sum().backward()
    assert torch.equal(out.grad, torch.ones_like(out))


def test_functorch_transforms_give_zeros():
    out, parameters = draws()
    parameters = tuple(p.detach() for p in parameters)

    def loss(given: tuple[Tensor, ...], row: Tensor) -> Tensor:
        return with_zero_gradients(row, given).square().sum()

    of_rows = torch.vmap(torch.func.grad(loss, (0, 1)), (None, 0))(parameters, out)
    assert torch.equal(of_rows[1], 2 * out)
    assert_same_bits(of_rows[0], [torch.zeros(2, *p.shape, dtype=p.dtype) for p in parameters])


def test_second_derivatives_are_those_of_the_output_alone():
    out, parameters = draws()
    out.requires_grad_()
    (first,) = torch.autograd.grad(with_zero_gradients(out**3, parameters).sum(), out, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), out)
    torch.testing.assert_close(second, 6 * out)
