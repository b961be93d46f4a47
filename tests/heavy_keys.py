"""Calls in which some keys outweigh all others in the low-rank part, as the attention sinks of language models do."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from testkit import attend, rand
from torch import Tensor

import scatterbrain as sb

N, D, RANK, MEAN = 320, 32, 4, 1.0
# Where a call's sinks are: in and across chunks of 64 keys, first and last.
SINKS = {
    "first": [0],
    "middle": [150],
    "two": [70, 200],
    "eight": list(range(60, 68)),
    "forty": list(range(2, 162, 4)),
    "later ones heavier": [5, 90, 180, 310],
}


@dataclass
class Call:
    """Queries around a mean, keys of which some score ``strength`` above the others for every query, and statistics of
    tokens without such keys."""

    strength: float
    sinks: list[int] = field(default_factory=lambda: [150])
    tokens: int = N
    heads: int = 2
    kv_heads: int = 1
    sign: int = 1
    growth: float = 0.0
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self.scale = self.sign * D**-0.5
        self.query = rand(1, self.heads, self.tokens, D, seed=0) + MEAN
        self.key, self.value = (rand(1, self.kv_heads, self.tokens, D, seed=seed) for seed in (1, 2))
        others = rand(1, self.heads, 400, D, seed=3) + MEAN, rand(1, self.kv_heads, 400, D, seed=4)
        self.statistics = sb.fit_statistics(*others, RANK, scale=self.scale)
        for i, j in enumerate(self.sinks):
            score = self.strength + self.growth * i
            self.key[:, :, j] = score / (self.scale * D * MEAN) + 0.1 * self.key[:, :, j]

    @property
    def inputs(self) -> list[Tensor]:
        return [t.to(self.dtype) for t in (self.query, self.key, self.value)]

    def run(self, support: object, is_causal: bool, **arguments: object) -> list[Tensor]:
        """out, lse and the gradients of query, key and value."""
        settings = dict(is_causal=is_causal, scale=self.scale, **arguments)
        return attend(self.inputs, support, sb.Quadratic(RANK), self.statistics, **settings)

    def defined(self, support: object, is_causal: bool, dtype: torch.dtype, **arguments: object) -> list[Tensor]:
        """The same by the definition."""
        leaves = [t.to(dtype).requires_grad_() for t in self.inputs]
        settings = dict(is_causal=is_causal, scale=self.scale, statistics=self.statistics, **arguments)
        out, lse = sb.reference.attention(
            *leaves, support, sb.Quadratic(RANK), return_lse=True, dtype=dtype, **settings
        )
        upstream = [rand(*t.shape, seed=20 + i, dtype=dtype) for i, t in enumerate((out, lse))]
        return [out.detach(), lse.detach(), *torch.autograd.grad([out, lse], leaves, upstream)]

    def fixed(self, support: object, is_causal: bool, **arguments: object) -> object:
        """The lists of a support that chooses by content: parity is judged at fixed lists."""
        if not isinstance(support, (sb.Routed, sb.LSH)):
            return support
        settings = dict(is_causal=is_causal, scale=self.scale, statistics=self.statistics, **arguments)
        return sb.route(*self.inputs[:2], support, low_rank=sb.Quadratic(RANK), **settings)


def late_call() -> tuple[tuple, Tensor]:
    """Arguments of a causal call of narrow heads without lists, and what comes out. Key 5 weighs 60 times as much as
    any other, so that states hold it out at first, and no longer when the others together weigh twice as much."""
    query, key, value = (rand(1, 1, N, 8, seed=seed) for seed in range(3))
    query_map, key_map = torch.zeros(1, 1, N, 3), torch.zeros(1, 1, N, 3)
    key_map[:, :, 5, -1] = math.log(60)
    maps_and_lists = query_map, key_map, *[None] * 13
    weight = key_map[0, 0, :, -1].double().exp()
    out = (weight[:, None] * value[0, 0].double()).cumsum(0) / weight.cumsum(0)[:, None]
    return (query, key, value, *maps_and_lists, 1, 16, 1, 0, 0, True, 0.2), out[None, None]
