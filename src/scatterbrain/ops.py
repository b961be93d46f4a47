"""The registered operators: loading, shapes, gradients and vmap. Nothing here computes attention.

``attention`` takes lists, never supports, and coordinates, never statistics: everything that chooses what is read
happens before it. Its arguments:

    query (B, Hq, N, d), key (B, Hkv, M, d),
      value (B, Hkv, M, dv)                   float32, bfloat16, float16 or float64, any strides
    query_map (B, Hq, N, r + 1),
      key_map (B, Hkv, M, r + 1)              coordinates, then log scales; float32 (float64 for float64 inputs)
    index, count, query_order                 as scatterbrain.Blocks
    span (1 or B, blocks, 2)                  int32, a window [lo, hi) per query block, at most ``span_keys`` long
    query_mask (B, N), key_mask (B, M)        bool, True = ignore
    query_range, key_range (B, 2)             int32, [first, last + 1) of what is not ignored
    query_offset (B,)                         int32, position of query 0 among the keys, for causal attention
    low_rank                                  0 none, 1 quadratic, 2 general features
    packed_rank                               r > 0: the maps are rows of ``project_packed``, which kernels read in place

``attention_with_state`` also returns the states of the low-rank kernel and the scores of listed keys, which
``attention_backward`` then need not compute again (empty where keeping them is not worth their memory).
``quadratic_attention`` and ``quadratic_attention_with_state`` project the tokens, route them where ``keys`` > 0 and go on
as ``attention`` does, in one call. With ``query_weight`` and ``key_weight``, the projections that made the maps,
``attention_backward`` adds the maps' gradients, through them, to those of query and key, and leaves its own results for
them empty. ``prepare`` stores all arguments of ``quadratic_attention`` but the tokens and returns a number, with which
``prepared_attention``, ``prepared_attention_with_state`` and ``prepared_attention_backward`` do the same until
``discard_prepared``; where ``sources`` no longer hold the bytes of ``copies``, from which the projections were made, the
results of the forward pass are empty. These and what is packed serve scatterbrain.autograd, below autograd.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

ISA_VARIABLE = "SCATTERBRAIN_ISA"


def _load() -> None:
    folder = Path(__file__).parent
    libraries = sorted(folder.glob("_C*.so")) + sorted(folder.glob("_C*.pyd"))
    if not libraries:
        raise ImportError(
            f"scatterbrain: the compiled operators are missing, expected _C*.so in {folder}; build them "
            "with `pip install .` in the source folder"
        )
    torch.ops.load_library(str(libraries[0]))
    wanted = os.environ.get(ISA_VARIABLE)
    used = torch.ops.scatterbrain.instruction_set()
    if wanted and wanted != used:
        raise ImportError(
            f"scatterbrain: {ISA_VARIABLE}={wanted!r} is not available here; expected one of avx512_bf16, "
            f"avx512, avx2, baseline that this processor has (best: {used})"
        )


_load()


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# -------------------- shapes


def _like_tokens(tokens: Tensor, width: int) -> Tensor:
    """Empty rows of ``width`` for ``tokens`` (B, H, N, d), in memory as they are: with the heads of a token next to each
    other, or head after head."""
    batch, heads, n, _ = tokens.shape
    if tokens.stride(1) >= tokens.stride(2):
        return tokens.new_empty((batch, heads, n, width))
    return tokens.new_empty((batch, n, heads, width)).transpose(1, 2)


@torch.library.register_fake("scatterbrain::project")
def _(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return tokens.new_empty((*tokens.shape[:3], weight.shape[2]), dtype=_accumulation_dtype(tokens.dtype))


@torch.library.register_fake("scatterbrain::project_packed")
def _(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    width = torch.ops.scatterbrain.packed_width(int(weight.shape[2]) - 1)
    return tokens.new_empty((*tokens.shape[:3], width), dtype=_accumulation_dtype(tokens.dtype))


@torch.library.register_fake("scatterbrain::project_backward")
def _(grad: Tensor, tokens: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _accumulation_dtype(tokens.dtype)
    return (
        _like_tokens(tokens, tokens.shape[3]),
        weight.new_empty(weight.shape, dtype=dtype),
        weight.new_empty(weight.shape[:3], dtype=dtype),
    )


@torch.library.register_fake("scatterbrain::attention")
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, _d = query.shape
    lse = query.new_empty((batch, heads, tokens), dtype=_accumulation_dtype(query.dtype))
    return _like_tokens(query, value.shape[3]), lse


@torch.library.register_fake("scatterbrain::attention_with_state")
def _(
    query: Tensor, key: Tensor, value: Tensor, query_map: Tensor | None, *rest: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    index, span = rest[1], rest[3]
    low_rank, block_q, block_k, span_keys, is_causal, _scale, packed_rank = (*rest[10:], 0)[:7]
    out, lse = torch.ops.scatterbrain.attention(query, key, value, query_map, *rest)
    rank = 0 if query_map is None else packed_rank or query_map.shape[3] - 1
    listed = (0 if span is None else span_keys) + (0 if index is None else index.shape[3] * block_k)
    shape = *query.shape, *key.shape[1:3], value.shape[3], low_rank, rank, listed, block_q
    device = "cpu" if query.is_meta else query.device
    state, scores, dtype = torch.ops.scatterbrain.saved_sizes(device, query.dtype, *map(int, shape), is_causal)
    dtype = getattr(torch, dtype)
    return out, lse, lse.new_empty(state, dtype=dtype), lse.new_empty(scores, dtype=dtype)


def _projected(query: Tensor, key: Tensor, value: Tensor, weights: tuple, rest: tuple) -> tuple:
    """The arguments of attention that those of quadratic_attention come to: shapes."""
    *tensors, keys, window, block_q, block_k, span_keys, is_causal, scale, packed_rank = rest
    project = torch.ops.scatterbrain.project_packed if packed_rank else torch.ops.scatterbrain.project
    maps = project(query, *weights[:2]), project(key, *weights[2:])
    if keys:
        tensors[:2] = torch.ops.scatterbrain.route(
            query, key, *maps, *tensors[4:], 1, keys, block_q, block_k, window, is_causal, scale, packed_rank
        )
    return query, key, value, *maps, *tensors, 1, block_q, block_k, span_keys, is_causal, scale, packed_rank


@torch.library.register_fake("scatterbrain::quadratic_attention")
def _(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return torch.ops.scatterbrain.attention(*_projected(query, key, value, rest[:4], rest[4:]))


@torch.library.register_fake("scatterbrain::quadratic_attention_with_state")
def _(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> tuple[Tensor, ...]:
    arguments = _projected(query, key, value, rest[:4], rest[4:])
    routed = rest[13] > 0
    lists = arguments[5:7] if routed else [query.new_empty(0, dtype=torch.int32) for _ in range(2)]
    return *torch.ops.scatterbrain.attention_with_state(*arguments), *arguments[3:5], *lists


@torch.library.register_fake("scatterbrain::attention_backward")
def _(
    d_out: Tensor,
    d_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_map: Tensor | None,
    key_map: Tensor | None,
    *rest: object,
) -> tuple[Tensor, ...]:
    packed_rank = rest[15] if len(rest) > 15 else 0
    weights = (*rest[18:], None, None)[:2]
    maps = []
    for tokens, m, weight in zip((query, key), (query_map, key_map), weights):
        width = 1 if m is None else packed_rank + 1 if packed_rank else m.shape[3]
        rows = 0 if m is None or weight is not None else tokens.shape[2]
        maps.append(tokens.new_empty((*tokens.shape[:2], rows, width), dtype=lse.dtype))
    return *(_like_tokens(t, t.shape[3]) for t in (query, key, value)), *maps


@torch.library.register_fake("scatterbrain::route")
def _(
    query: Tensor,
    key: Tensor,
    query_map: Tensor | None,
    key_map: Tensor | None,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    query_range: Tensor | None,
    key_range: Tensor | None,
    query_offset: Tensor | None,
    low_rank: int,
    keys: int,
    block_q: int,
    block_k: int,
    window: int,
    is_causal: bool,
    scale: float,
    packed_rank: int = 0,
) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], query.shape[1], (query.shape[2] + block_q - 1) // block_q)
    capacity = torch.ops.scatterbrain.list_capacity(keys, block_k)
    return query.new_empty((*shape, capacity), dtype=torch.int32), query.new_empty(shape, dtype=torch.int32)


# -------------------- gradients


def _project_setup(ctx: object, inputs: tuple, output: Tensor) -> None:
    tokens, weight, bias = inputs
    ctx.save_for_backward(tokens, weight)
    ctx.has_bias = bias is not None


def _project_backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
    d_tokens, d_weight, d_bias = torch.ops.scatterbrain.project_backward(grad, *ctx.saved_tensors)
    need = ctx.needs_input_grad
    return d_tokens if need[0] else None, d_weight if need[1] else None, d_bias if ctx.has_bias and need[2] else None


torch.library.register_autograd("scatterbrain::project", _project_backward, setup_context=_project_setup)


def _no_second_derivative(ctx: object, *grads: object) -> None:
    raise RuntimeError(
        "scatterbrain: second derivatives are not implemented; call backward without create_graph, or use "
        "sb.reference.attention, which is plain torch"
    )


# Without these, torch would take the backward operators for constants and return wrong second derivatives.
for _name in ("attention_backward", "project_backward"):
    torch.library.register_autograd(f"scatterbrain::{_name}", _no_second_derivative)

_TENSORS = 14  # of attention: leading tensor arguments


def _attention_setup(ctx: object, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:_TENSORS], *output)
    ctx.settings = inputs[_TENSORS:]


def _attention_backward(ctx: object, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_out is None and d_lse is None:
        return (None,) * len(ctx.needs_input_grad)
    *tensors, out, lse = ctx.saved_tensors
    if d_out is None:
        d_out = torch.zeros_like(out)
    gradients = torch.ops.scatterbrain.attention_backward(d_out, d_lse, out, lse, *tensors, *ctx.settings)
    wanted = [g if need else None for g, need in zip(gradients, ctx.needs_input_grad[:5])]
    return (*wanted, *(None,) * (len(ctx.needs_input_grad) - 5))


torch.library.register_autograd("scatterbrain::attention", _attention_backward, setup_context=_attention_setup)

# -------------------- vmap


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


def _register_batched(name: str, outputs: int, shared: tuple[int, ...] = ()) -> None:
    """vmap for an operator whose tensors all lead with the batch; ``shared``: arguments whose batch may be 1."""
    operator = getattr(torch.ops.scatterbrain, name)

    def mapped(info: object, in_dims: tuple, *args: object) -> tuple:
        size = info.batch_size
        folded = []
        for i, (argument, dim) in enumerate(zip(args, in_dims)):
            if i in shared and dim is not None and argument.movedim(dim, 0).shape[1] == 1:
                # One shared row per mapped element: every row of that element's batch gets its own copy.
                batch = args[0].movedim(in_dims[0], 0).shape[1] if in_dims[0] is not None else args[0].shape[0]
                argument, dim = argument.movedim(dim, 0).expand(size, batch, *argument.movedim(dim, 0).shape[2:]), 0
            folded.append(_fold(argument, dim, size, i in shared))
        results = operator(*folded)
        if outputs == 1:
            return _unfold(results, size), 0
        return tuple(_unfold(r, size) for r in results), (0,) * outputs

    torch.library.register_vmap(f"scatterbrain::{name}", mapped)


_register_batched("attention", 2, shared=(7,))
_register_batched("attention_backward", 5, shared=(11,))
_register_batched("route", 2)


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
