"""Packed rows in a traced graph. transformers tells packed sequences from a single one by the values of position ids,
which a trace does not have, so the choice between approximated and exact attention is an operator's, made when the
graph runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from scatterbrain.operators.arguments import TENSORS, AttentionArguments, ForwardResults
from scatterbrain.operators.gradients import no_second_derivative

_OPS = torch.ops.scatterbrain
_BLOCK = 16  # queries that share a span


@torch.library.custom_op("scatterbrain::exact_if_packed", mutates_args=())
def exact_if_packed(out: Tensor, query: Tensor, key: Tensor, value: Tensor, sequence: Tensor, scale: float) -> Tensor:
    """Causal attention of rows in which several sequences may be packed.

    Args:
        out: (B, Hq, N, dv), the result where no row holds more than one sequence.
        query: (B, Hq, N, d). key: (B, Hkv, N, d). value: (B, Hkv, N, dv).
        sequence: int32 (B, N), never falling along a row: tokens with the same number are one sequence.
        scale: factor of q.k.

    Returns:
        ``out``, copied; if any row holds several sequences, exact attention in which query i sees the keys <= i of its
        own sequence.
    """
    if not _is_packed(sequence):
        return out.clone()
    warnings.warn(
        "scatterbrain: rows that hold several packed sequences run exact attention, without approximation; pad the "
        "sequences into a batch to approximate them",
        stacklevel=2,
    )
    result = torch.empty_like(out)
    for part in _sequences(sequence):
        result[part] = _OPS.attention(*_arguments(query[part], key[part], value[part], scale))[0]
    return result


@torch.library.custom_op("scatterbrain::exact_if_packed_backward", mutates_args=())
def exact_if_packed_backward(
    d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, sequence: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`exact_if_packed` for query, key and value: zeros where no row holds several sequences."""
    gradients = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    if _is_packed(sequence):
        for part in _sequences(sequence):
            arguments = _arguments(query[part], key[part], value[part], scale)
            results = ForwardResults(d_out[part], None, *_OPS.attention(*arguments))
            for gradient, of_part in zip(gradients, _OPS.attention_backward(*results, *arguments)):
                gradient[part] = of_part
    return gradients


def _is_packed(sequence: Tensor) -> bool:
    return sequence.shape[1] > 0 and bool((sequence[:, 0] != sequence[:, -1]).any())


def _sequences(sequence: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """The place of every sequence in tensors (B, heads, N, ...)."""
    for row, numbers in enumerate(sequence.cpu()):
        first = 0
        for length in torch.unique_consecutive(numbers, return_counts=True)[1].tolist():
            yield slice(row, row + 1), slice(None), slice(first, first + length)
            first += length


def _arguments(query: Tensor, key: Tensor, value: Tensor, scale: float) -> AttentionArguments:
    """Of exact causal attention: one span over every key for each block of queries."""
    tokens = query.shape[2]
    span = torch.arange(2, dtype=torch.int32, device=query.device) * tokens
    no_tensors = dict.fromkeys(AttentionArguments._fields[: TENSORS[AttentionArguments]])
    tensors = {"query": query, "key": key, "value": value, "span": span.expand(1, -(-tokens // _BLOCK), 2).contiguous()}
    return AttentionArguments(
        **no_tensors | tensors,
        span_keys=tokens,
        span_sinks=0,
        block_q=_BLOCK,
        block_k=1,
        low_rank=0,
        is_causal=True,
        scale=scale,
        packed_rank=0,
    )


# -------------------- what torch asks for


@exact_if_packed.register_fake
def _(out: Tensor, query: Tensor, key: Tensor, value: Tensor, sequence: Tensor, scale: float) -> Tensor:
    return torch.empty_like(out)


@exact_if_packed_backward.register_fake
def _(d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, sequence: Tensor, scale: float) -> tuple[Tensor, ...]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _setup(ctx: object, inputs: tuple, output: Tensor) -> None:
    _, *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: object, d_out: Tensor) -> tuple[Tensor | None, ...]:
    *_, sequence = ctx.saved_tensors
    is_packed = (sequence[:, :1] != sequence[:, -1:]).any()
    return (
        d_out.masked_fill(is_packed, 0),
        *exact_if_packed_backward(d_out, *ctx.saved_tensors, ctx.scale),
        None,
        None,
    )


exact_if_packed.register_autograd(_backward, setup_context=_setup)
exact_if_packed_backward.register_autograd(no_second_derivative)
