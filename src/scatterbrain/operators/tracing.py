"""What may be looked at here: whether something traces the call, and whether contents and lengths are known."""

from __future__ import annotations

import torch
from torch import Tensor


def is_untraced() -> bool:
    """Whether nothing traces, transforms or watches the operators: no compile, export, functorch or dispatch mode."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
    )


def is_readable(*tensors: Tensor | None) -> bool:
    """Whether contents can be read without waiting for a device, and without a value that a trace or vmap does not
    have. Tensors that are None do not count."""
    return not torch.compiler.is_compiling() and all(
        t is None or (t.device.type == "cpu" and not torch._C._functorch.is_batchedtensor(t)) for t in tensors
    )


def is_known(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on lengths holds for every length that a traced graph serves; where lengths are numbers,
    whether it holds."""
    if isinstance(condition, bool) and not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)
