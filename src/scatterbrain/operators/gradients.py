"""The autograd that is registered with the operators: for torch.compile, export and dispatch modes. Untraced calls
have nodes of their own (untraced.py), and so do calls under torch.func (transformed.py), with the same gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from scatterbrain.operators import library  # noqa: F401  (loads the operators)
from scatterbrain.operators.arguments import AttentionArguments, settings_of, tensors_of


def project_setup(ctx: object, inputs: tuple, output: Tensor) -> None:
    tokens, weight, bias = inputs
    ctx.save_for_backward(tokens, weight)
    ctx.has_bias = bias is not None


def project_gradients(
    ctx: object, grad: Tensor, operator: Callable = torch.ops.scatterbrain.project_backward
) -> tuple[Tensor | None, ...]:
    d_tokens, d_weight, d_bias = operator(grad, *ctx.saved_tensors)
    tokens, weight, bias = ctx.needs_input_grad
    return d_tokens if tokens else None, d_weight if weight else None, d_bias if ctx.has_bias and bias else None


torch.library.register_autograd("scatterbrain::project", project_gradients, setup_context=project_setup)


def no_second_derivative(ctx: object, *grads: object) -> None:
    raise RuntimeError(
        "scatterbrain: second derivatives are not implemented; call backward without create_graph, or use "
        "sb.reference.attention, which is plain torch"
    )


# Without these, torch would take the backward operators for constants and return wrong second derivatives.
for _name in ("attention_backward", "project_backward"):
    torch.library.register_autograd(f"scatterbrain::{_name}", no_second_derivative)


def attention_setup(ctx: object, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    arguments = AttentionArguments(*inputs)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors_of(arguments), *output)
    ctx.settings = settings_of(arguments)


def attention_gradients(
    ctx: object,
    d_out: Tensor | None,
    d_lse: Tensor | None,
    operator: Callable = torch.ops.scatterbrain.attention_backward,
) -> tuple[Tensor | None, ...]:
    if d_out is None and d_lse is None:
        return (None,) * len(ctx.needs_input_grad)
    *tensors, out, lse = ctx.saved_tensors
    if d_out is None:
        d_out = torch.zeros_like(out)
    gradients = operator(d_out, d_lse, out, lse, *tensors, *ctx.settings)
    wanted = [g if need else None for g, need in zip(gradients, ctx.needs_input_grad)]
    return (*wanted, *(None,) * (len(ctx.needs_input_grad) - len(wanted)))


torch.library.register_autograd("scatterbrain::attention", attention_gradients, setup_context=attention_setup)
