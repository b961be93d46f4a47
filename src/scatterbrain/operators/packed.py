"""Packed rows in a traced graph. transformers tells packed sequences from a single one by the values of position ids,
which a trace does not have, so the choice between approximated and exact attention is an operator's, made when the
graph runs. On the CPU the operator looks at the numbers; elsewhere that would wait for the device, so queries get their
spans by operations on it, empty ones where no row is packed, and nothing warns."""

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
    if not sequence.is_cpu:
        return _exact_on_device(out, query, key, value, sequence, scale)
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
    if not sequence.is_cpu:
        return _gradients_on_device(d_out, query, key, value, sequence, scale)
    gradients = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    if _is_packed(sequence):
        for part in _sequences(sequence):
            arguments = _arguments(query[part], key[part], value[part], scale)
            results = ForwardResults(d_out[part], None, *_OPS.attention(*arguments))
            for gradient, of_part in zip(gradients, _OPS.attention_backward(*results, *arguments)):
                gradient[part] = of_part
    return gradients


def _any_packed(sequence: Tensor) -> Tensor:
    """bool (), on the device of ``sequence``."""
    return (sequence[:, :1] != sequence[:, -1:]).any()


def _is_packed(sequence: Tensor) -> bool:
    return bool(_any_packed(sequence))


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
    return _with_spans(query, key, value, span.expand(1, -(-tokens // _BLOCK), 2).contiguous(), _BLOCK, scale)


def _exact_on_device(out: Tensor, query: Tensor, key: Tensor, value: Tensor, sequence: Tensor, scale: float) -> Tensor:
    """:func:`exact_if_packed` without looking at the numbers."""
    exact, _ = _OPS.attention(*_spans_on_device(query, key, value, sequence, scale))
    return torch.empty_like(out).copy_(torch.where(_any_packed(sequence), exact, out))


def _gradients_on_device(
    d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, sequence: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`exact_if_packed_backward` without looking at the numbers: a query without keys has no gradients."""
    arguments = _spans_on_device(query, key, value, sequence, scale)
    results = ForwardResults(d_out, None, *_OPS.attention(*arguments))
    gradients = _OPS.attention_backward(*results, *arguments)
    return tuple(torch.empty_like(t).copy_(g) for t, g in zip((query, key, value), gradients))


def _spans_on_device(query: Tensor, key: Tensor, value: Tensor, sequence: Tensor, scale: float) -> AttentionArguments:
    """Of exact causal attention inside each sequence: a span for each query, from its sequence's first token to itself;
    empty ones if no row is packed."""
    position = torch.arange(sequence.shape[1], device=sequence.device)
    is_first = torch.ones_like(sequence, dtype=torch.bool)
    is_first[:, 1:] = sequence[:, 1:] != sequence[:, :-1]
    first = torch.where(is_first, position, 0).cummax(1).values
    span = torch.stack([first, (position + 1).expand_as(first)], -1)
    span = torch.where(_any_packed(sequence), span, 0).to(torch.int32)
    return _with_spans(query, key, value, span, 1, scale)


def _with_spans(
    query: Tensor, key: Tensor, value: Tensor, span: Tensor, block_q: int, scale: float
) -> AttentionArguments:
    no_tensors = dict.fromkeys(AttentionArguments._fields[: TENSORS[AttentionArguments]])
    tensors = {"query": query, "key": key, "value": value, "span": span}
    return AttentionArguments(
        **no_tensors | tensors,
        span_keys=query.shape[2],
        span_sinks=0,
        block_q=block_q,
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
    return (
        d_out.masked_fill(_any_packed(sequence), 0),
        *exact_if_packed_backward(d_out, *ctx.saved_tensors, ctx.scale),
        None,
        None,
    )


exact_if_packed.register_autograd(_backward, setup_context=_setup)
exact_if_packed_backward.register_autograd(no_second_derivative)
