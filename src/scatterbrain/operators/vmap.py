"""vmap of the operators: the mapped dimension becomes part of the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from scatterbrain.operators import library  # noqa: F401  (loads the operators)


def _fold(tensor: object, dim: int | None, size: int, shared: bool = False) -> object:
    """The mapped dimension folded into the batch; a tensor without it is repeated, unless its batch of one is shared by
    every row anyway."""
    if not isinstance(tensor, Tensor):
        return tensor
    if dim is None:
        if shared and tensor.shape[0] == 1:
            return tensor
        tensor = tensor.expand(size, *tensor.shape)
    else:
        tensor = tensor.movedim(dim, 0)
    return tensor.reshape(size * tensor.shape[1], *tensor.shape[2:])


def _unfold(result: Tensor, size: int) -> Tensor:
    return result.reshape(size, result.shape[0] // size, *result.shape[1:])


def _register_batched(name: str, shared: tuple[str, ...] = ()) -> None:
    """vmap for an operator whose tensors all lead with the batch; ``shared``: arguments whose batch may be 1."""
    operator = getattr(torch.ops.scatterbrain, name).default
    names = [argument.name for argument in operator._schema.arguments]

    def mapped(info: object, in_dims: tuple, *args: object) -> tuple:
        size = info.batch_size
        folded = []
        for argument_name, argument, dim in zip(names, args, in_dims):
            is_shared = argument_name in shared
            if is_shared and dim is not None and argument.movedim(dim, 0).shape[1] == 1:
                # One shared row per mapped element: every row of that element's batch gets its own copy.
                batch = args[0].movedim(in_dims[0], 0).shape[1] if in_dims[0] is not None else args[0].shape[0]
                argument, dim = argument.movedim(dim, 0).expand(size, batch, *argument.movedim(dim, 0).shape[2:]), 0
            folded.append(_fold(argument, dim, size, is_shared))
        results = operator(*folded)
        return tuple(_unfold(r, size) for r in results), (0,) * len(results)

    torch.library.register_vmap(f"scatterbrain::{name}", mapped)


_register_batched("attention", shared=("span",))
_register_batched("attention_backward", shared=("span",))
_register_batched("route")


@torch.library.register_vmap("scatterbrain::project")
def _(info: object, in_dims: tuple, tokens: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, int]:
    size = info.batch_size
    tokens, weight, bias = (
        _spread(t, d, size, tokens, in_dims[0], i > 0) for i, (t, d) in enumerate(zip((tokens, weight, bias), in_dims))
    )
    return _unfold(torch.ops.scatterbrain.project(tokens, weight, bias), size), 0


@torch.library.register_vmap("scatterbrain::project_backward")
def _(
    info: object, in_dims: tuple, grad: Tensor, tokens: Tensor, weight: Tensor
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    size, shared_rows = info.batch_size, weight.shape[0 if in_dims[2] is None else 1] == 1
    grad, tokens, weight = (
        _spread(t, d, size, tokens, in_dims[1], i > 1) for i, (t, d) in enumerate(zip((grad, tokens, weight), in_dims))
    )
    if weight.shape[0] == 1:
        weight = weight.expand(tokens.shape[0], *weight.shape[1:])
    d_tokens, d_weight, d_bias = (
        _unfold(r, size) for r in torch.ops.scatterbrain.project_backward(grad, tokens, weight)
    )
    if shared_rows:
        d_weight, d_bias = d_weight.sum(1, keepdim=True), d_bias.sum(1, keepdim=True)
    return (d_tokens, d_weight, d_bias), (0, 0, 0)


def _spread(
    tensor: Tensor | None, dim: int | None, size: int, tokens: Tensor, tokens_dim: int | None, is_weight: bool
) -> Tensor | None:
    """A token tensor folded into the batch; a weight repeated for the rows of its mapped element where it has one per
    element."""
    if tensor is None or not is_weight or (dim is None and tensor.shape[0] == 1):
        return tensor if is_weight else _fold(tensor, dim, size)
    moved = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    batch = tokens.shape[0] if tokens_dim is None else tokens.movedim(tokens_dim, 0).shape[1]
    return moved.expand(size, batch, *moved.shape[2:]).reshape(size * batch, *moved.shape[2:])
