"""Operators under torch.func: grad, vjp, jacrev, vmap and what is built of them.

functorch differentiates torch.autograd.Function with a setup_context and a vmap rule, and not the autograd that is
registered with an operator. These functions are that for the operators that have gradients; vmap.py folds a mapped
dimension into the batch. Forward-mode and second derivatives are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from scatterbrain.operators import gradients
from scatterbrain.operators.arguments import AttentionArguments
from scatterbrain.operators.tracing import NO_FORWARD_MODE, is_transformed
from scatterbrain.operators.vmap import BATCHED


def _differentiable(name: str, setup_context: Callable, backward: Callable) -> Callable:
    """The operator ``name`` with its gradients and its vmap rule."""
    operator, rule = getattr(torch.ops.scatterbrain, name), BATCHED[name]

    class Operator(torch.autograd.Function):
        @staticmethod
        def forward(*arguments: object) -> Tensor | tuple[Tensor, ...]:
            return operator(*arguments)

        @staticmethod
        @torch.compiler.disable  # a compiler that gave up on the transform around it has no rule for this one
        def vmap(info: object, in_dims: tuple, *arguments: object) -> tuple:
            return rule(Operator.apply, info, in_dims, *arguments)

        @staticmethod
        def jvp(ctx: object, *tangents: object) -> None:
            raise RuntimeError(NO_FORWARD_MODE)

    Operator.setup_context, Operator.backward = staticmethod(setup_context), staticmethod(backward)
    return Operator.apply


def _nothing(ctx: object, inputs: tuple, output: tuple) -> None:
    pass


_attention_backward = _differentiable("attention_backward", _nothing, gradients.no_second_derivative)
_project_backward = _differentiable("project_backward", _nothing, gradients.no_second_derivative)
_attention = _differentiable(
    "attention", gradients.attention_setup, partial(gradients.attention_gradients, operator=_attention_backward)
)
_project = _differentiable(
    "project", gradients.project_setup, partial(gradients.project_gradients, operator=_project_backward)
)


def attention(a: AttentionArguments) -> tuple[Tensor, Tensor]:
    """The operator of the same name, differentiable under torch.func too."""
    return _attention(*a) if is_transformed() else torch.ops.scatterbrain.attention(*a)


def project(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The operator of the same name, differentiable under torch.func too."""
    arguments = tokens, weight, bias
    return _project(*arguments) if is_transformed() else torch.ops.scatterbrain.project(*arguments)
