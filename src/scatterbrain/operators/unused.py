"""Gradients of zero to parameters that a call does not use."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from scatterbrain.operators.tracing import is_untraced


def with_zero_gradients(out: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """``out``, bit for bit, as a function of parameters that it does not depend on: they get gradients of zero instead
    of none. DistributedDataParallel waits for every parameter's gradient. Without gradients, or where no parameter
    requires one, ``out`` itself.

    Args:
        out: any shape; a view of nothing that is written to later.
        parameters: of any shapes.
    """
    if not torch.is_grad_enabled():
        return out
    unused = [parameter for parameter in parameters if parameter.requires_grad]
    if not unused:
        return out
    if is_untraced():
        return _Unused.apply(out, *unused)
    # In torch's own operations, which every trace and transform knows. A sum of nothing is 0, x - 0 has the bits of x
    # even for -0, and the gradient of an empty slice is zeros whatever arrives there.
    return out - sum((parameter if parameter.dim() else parameter[None])[:0].sum() for parameter in unused)


class _Unused(torch.autograd.Function):
    """No copy of ``out``. Its result counts as no view, which could not be written to."""

    @staticmethod
    def forward(ctx: object, out: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return out.detach()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)
