"""vmap of the operators: the mapped dimension becomes part of the batch."""

from __future__ import annotations

import functools
from collections.abc import Callable

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


Rule = Callable[..., tuple]  # (function to call on folded arguments, info, in_dims, *arguments) -> (results, out_dims)
BATCHED: dict[str, Rule] = {}  # by operator


def _batched(name: str, shared: tuple[str, ...] = ()) -> Rule:
    """The rule of an operator whose tensors all lead with the batch; ``shared``: arguments whose batch may be 1."""
    names = [argument.name for argument in getattr(torch.ops.scatterbrain, name).default._schema.arguments]

    def rule(function: Callable, info: object, in_dims: tuple, *args: object) -> tuple:
        size, by_name = info.batch_size, dict(zip(names, zip(args, in_dims)))
        folded = []
        for argument_name, (argument, dim) in by_name.items():
            is_shared = argument_name in shared
            if is_shared and dim is not None and argument.movedim(dim, 0).shape[1] == 1:
                # One shared row per mapped element: every row of that element's batch gets its own copy.
                batch = _batch(*by_name["query"])
                argument, dim = argument.movedim(dim, 0).expand(size, batch, *argument.movedim(dim, 0).shape[2:]), 0
            folded.append(_fold(argument, dim, size, is_shared))
        results = function(*folded)
        return tuple(_unfold(r, size) for r in results), (0,) * len(results)

    return rule


BATCHED["attention"] = _batched("attention", shared=("span",))
BATCHED["attention_backward"] = _batched("attention_backward", shared=("span",))
BATCHED["route"] = _batched("route", shared=("head_keys",))
BATCHED["cluster"] = _batched("cluster")
BATCHED["input_projection"] = _batched("input_projection")


def _project(
    function: Callable, info: object, in_dims: tuple, tokens: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, int]:
    size, (tokens_dim, weight_dim, bias_dim) = info.batch_size, in_dims
    batch = _batch(tokens, tokens_dim)
    weight, bias = _spread(weight, weight_dim, size, batch), _spread(bias, bias_dim, size, batch)
    return _unfold(function(_fold(tokens, tokens_dim, size), weight, bias), size), 0


def _project_backward(
    function: Callable, info: object, in_dims: tuple, grad: Tensor, tokens: Tensor, weight: Tensor
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    size, (grad_dim, tokens_dim, weight_dim) = info.batch_size, in_dims
    batch, shared_rows = _batch(tokens, tokens_dim), _batch(weight, weight_dim) == 1
    grad, tokens = _fold(grad, grad_dim, size), _fold(tokens, tokens_dim, size)
    weight = _spread(weight, weight_dim, size, batch)
    if weight.shape[0] == 1:
        weight = weight.expand(tokens.shape[0], *weight.shape[1:])
    results = function(grad, tokens, weight)
    d_tokens, d_weight, d_bias = (_unfold(r, size) for r in results)
    if shared_rows:
        d_weight, d_bias = d_weight.sum(1, keepdim=True), d_bias.sum(1, keepdim=True)
    return (d_tokens, d_weight, d_bias), (0, 0, 0)


BATCHED["project"], BATCHED["project_backward"] = _project, _project_backward
for _name, _rule in BATCHED.items():
    _operator = getattr(torch.ops.scatterbrain, _name).default
    torch.library.register_vmap(f"scatterbrain::{_name}", functools.partial(_rule, _operator))


def _batch(tensor: Tensor, dim: int | None) -> int:
    """Batch rows of one mapped element."""
    return tensor.shape[0] if dim is None else tensor.movedim(dim, 0).shape[1]


def _spread(tensor: Tensor | None, dim: int | None, size: int, batch: int) -> Tensor | None:
    """A weight repeated for the batch rows of its mapped element; left alone if one is shared by all elements."""
    if tensor is None or (dim is None and tensor.shape[0] == 1):
        return tensor
    moved = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return moved.expand(size, batch, *moved.shape[2:]).reshape(size * batch, *moved.shape[2:])
