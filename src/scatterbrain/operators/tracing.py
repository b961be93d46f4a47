"""What may be looked at here: whether something traces the call, and whether contents and lengths are known."""

from __future__ import annotations

import os

import torch
from torch import Tensor

NO_FORWARD_MODE = (
    "scatterbrain has no forward-mode derivatives (torch.func.jvp, forward_ad.make_dual); use reverse mode, or "
    "sb.reference.attention, which is plain torch"
)


NOT_IN_TORCHSCRIPT = (
    "TorchScript (torch.jit.trace, torch.jit.script) and ONNX cannot hold sparse + low-rank attention; use "
    "torch.export or torch.compile, or choose exact attention before exporting: support=Full(), "
    "attn_implementation='sdpa', or report.restore() after replace_attention"
)


def refuse_jit_trace() -> None:
    """A trace of torch.jit, also that of ONNX, would keep the lengths and the choices of the one call that it saw."""
    if torch.jit.is_tracing():
        raise RuntimeError(NOT_IN_TORCHSCRIPT)


def is_untraced() -> bool:
    """Whether nothing traces, transforms or watches the operators: no compile, export, torch.jit.trace, functorch or
    dispatch mode."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
    )


def is_transformed() -> bool:
    """Whether a transform of torch.func runs the call; under torch.compile it is the trace that counts."""
    return torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling()


def is_batched(tensor: Tensor) -> bool:
    """Whether a vmap around the call maps over ``tensor``, whose content then cannot be looked at."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def is_readable(*tensors: Tensor | None) -> bool:
    """Whether contents can be read for a check: without a value that a trace or vmap does not have and, unless the
    environment variable SCATTERBRAIN_CHECK=1 asks for it, without waiting for a device. Tensors that are None do not
    count."""
    if torch.compiler.is_compiling() or (torch._C._len_torch_dispatch_stack() and _is_symbolic()):
        return False
    return all(t is None or (not is_batched(t) and (t.is_cpu or _may_wait_for(t))) for t in tensors)


def _may_wait_for(tensor: Tensor) -> bool:
    return os.environ.get("SCATTERBRAIN_CHECK") == "1" and not tensor.is_meta and not is_capturing(tensor.device)


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured from what runs on ``device``: its host must not wait for anything."""
    return device.type == "cuda" and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _is_symbolic() -> bool:
    """Whether a FakeTensorMode or make_fx is at work, under which no tensor gives its values away."""
    modes = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(mode) is not None for mode in (modes.FAKE, modes.PROXY))


def is_known(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on lengths holds for every length that a traced graph serves; where lengths are numbers,
    whether it holds."""
    if isinstance(condition, Tensor):  # lengths under torch.jit.trace
        return bool(condition)
    if isinstance(condition, bool) and not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)
