"""What 16 bits cost: attention by the definition whose weights have the tokens' type where products take them.

Kernels on tensor cores multiply weights of 16 bits with rows of 16 bits, and so does the CPU's kernel for bfloat16
where the processor has such products (avx512_bf16). Elsewhere the CPU's kernel widens rows and errs less than a kernel
of 16-bit products can: there these are the yardstick beside it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import scatterbrain as sb


def are_the_cpus(dtype: torch.dtype) -> bool:
    """Whether the CPU's kernel multiplies weights of 16 bits where this type's kernel on tensor cores does."""
    return dtype != torch.bfloat16 or torch.ops.scatterbrain.instruction_set() == "avx512_bf16"


class Definition(NamedTuple):
    """In float64. weights: (B, Hq, N, M), and those of listed keys alone; rows of values for every query head."""

    weights: Tensor
    listed: Tensor
    out: Tensor
    value: Tensor
    scale: float


def _definition(tokens: list[Tensor], support: object, low_rank: object, **more: object) -> Definition:
    query, key, value = (token.double() for token in tokens[:3])
    group, count = query.shape[1] // key.shape[1], key.shape[2]
    one_each = torch.eye(count, dtype=torch.float64).expand(*key.shape[:2], count, count)
    weights = sb.reference.attention(query, key, one_each, support, low_rank, **more)
    listed = sb.reference.mask(support, query, key, low_rank, **more)
    value = value.repeat_interleave(group, 1)
    scale = query.shape[-1] ** -0.5 if more.get("scale") is None else more["scale"]
    return Definition(weights, weights * listed, weights @ value, value, scale)


def _lost(weights: Tensor, dtype: torch.dtype) -> Tensor:
    return weights.to(dtype).double() - weights


def rounded_out(tokens: list[Tensor], support: object, low_rank: object, **more: object) -> Tensor:
    """out in the tokens' type."""
    d = _definition(tokens, support, low_rank, **more)
    dtype = tokens[0].dtype
    return (d.out + _lost(d.weights, dtype) @ d.value).to(dtype)


def rounded_gradients(
    given: list[Tensor], exact: tuple[Tensor, ...], support: object, low_rank: object, **more: object
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv in the tokens' type; ``given``: query, key, value and the gradients of out and lse, ``exact``: the
    gradients in float64. For dq all kernels multiply gradients of scores in two parts, so nothing is lost there."""
    return gradients_of(_definition(given, support, low_rank, **more), given, exact)


def gradients_of(d: Definition, given: list[Tensor], exact: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The same for given weights."""
    query, key, d_out, d_lse = given[0].double(), given[1], given[3].double(), given[4].double()
    d_score = d.listed * (d_out @ d.value.mT - (d_out * d.out).sum(-1, keepdim=True) + d_lse[..., None])
    dtype = given[0].dtype
    lost = d.scale * _lost(d_score, dtype)
    of_key_heads = [
        rows.unflatten(1, (key.shape[1], -1)).sum(2) for rows in (lost.mT @ query, _lost(d.weights, dtype).mT @ d_out)
    ]
    return tuple((want + rows).to(dtype) for want, rows in zip(exact, (0, *of_key_heads)))
