"""Heads to look at: queries and keys in clusters, or captured ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from scatterbrain.bench.inputs import calibration_of, digest_of, entries, read_tokens
from scatterbrain.hilbert import hilbert_order

SHA256 = ", sha256 "  # before what tells a file's content from that of others of its name


@dataclass
class Head:
    """One head, tensors (1, 1, tokens, width) in float32.

    Args:
        source: what it is one of. name: which one.
        fitted_on: queries and keys that statistics are fitted to, where a kernel needs them.
    """

    source: str
    name: str
    query: Tensor
    key: Tensor
    value: Tensor
    fitted_on: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Clustered:
    """Tokens around common centres. Queries and keys come in runs of neighbours that share a centre,
    ``scale (centre + spread noise)``, with centres and noise standard normal; values likewise around centres of their
    own with noise of norm 1. Between clusters scores differ by about ``scale^2 sqrt(head_dim)``."""

    tokens: int
    head_dim: int
    clusters: int
    spread: float
    scale: float
    run: int

    def head(self, seed: int) -> Head:
        generator = torch.Generator().manual_seed(seed)
        centres = self._normal(generator, self.clusters)
        of_values = self._normal(generator, self.clusters)

        def draw() -> tuple[Tensor, Tensor, Tensor]:
            runs = torch.randint(self.clusters, (-(-self.tokens // self.run),), generator=generator)
            cluster = runs.repeat_interleave(self.run)[: self.tokens]
            query, key = (
                self.scale * (centres[cluster] + self.spread * self._normal(generator, self.tokens)) for _ in range(2)
            )
            value = of_values[cluster] + self._normal(generator, self.tokens)
            return query[None, None], key[None, None], value[None, None]

        query, key, value = draw()
        return Head(self.source, f"seed {seed}", query, key, value, draw()[:2])

    @property
    def source(self) -> str:
        return (
            f"{self.clusters} clusters of spread {self.spread:g} and scale {self.scale:g}, {self.tokens} tokens in "
            f"runs of {self.run}, head_dim {self.head_dim}"
        )

    def _normal(self, generator: torch.Generator, rows: int) -> Tensor:
        return torch.randn(rows, self.head_dim, generator=generator)


def captured_heads(
    path: Path, names: list[str] | None, tokens: int | None, heads: int | None, token_order: str
) -> Iterator[Head]:
    """The heads of the entries of a safetensors file: ``<entry>.q``, ``.k``, ``.v`` of (heads, tokens, head_dim), or
    with a batch before, whose first row counts. Statistics are fitted to the entry's ``.cal`` in place of
    ``.N<tokens>`` where the file has one, else to the tokens themselves.

    Raises:
        ValueError: no such file or entry, other shapes, or a token order that does not fit.
    """
    content = f"{SHA256}{digest_of(path)}"
    for name in names or entries(path):
        query, key, value, fitted_on = _read(path, name)
        if not query.shape[2] == key.shape[2] == value.shape[2]:
            raise ValueError(
                f"{path}: entry {name} has {query.shape[2]} queries and {key.shape[2]} keys; expected as many; "
                "choose other entries with --entries"
            )
        if query.shape[1] % key.shape[1] or key.shape[1] != value.shape[1] or query.shape[3] != key.shape[3]:
            shapes = ", ".join(str(tuple(t.shape[1:])) for t in (query, key, value))
            raise ValueError(
                f"{path}: entry {name}: expected as many heads of keys as of values, a divisor of those of queries, "
                f"and queries as wide as keys, got q, k and v of {shapes}"
            )
        if token_order == "hilbert":
            order = _hilbert(query.shape[2], name)
            query, key, value = (t[:, :, order] for t in (query, key, value))
        query, key, value = (t[:1, :, :tokens].contiguous() for t in (query, key, value))
        group = query.shape[1] // key.shape[1]
        for head in range(query.shape[1] if heads is None else min(heads, query.shape[1])):
            own, shared = slice(head, head + 1), slice(head // group, head // group + 1)
            statistics = (fitted_on[0][:, own], fitted_on[1][:, shared])
            source = f"{path.name}, {query.shape[2]} tokens, {token_order} order{content}"
            yield Head(source, f"{name} head {head}", query[:, own], key[:, shared], value[:, shared], statistics)


def _read(path: Path, name: str) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        query, key, value = (read_tokens(file, path, f"{name}.{part}") for part in "qkv")
        calibration = calibration_of(name, file.keys())
        if calibration is None:
            return query, key, value, (query, key)
        return query, key, value, tuple(read_tokens(file, path, f"{calibration}.{part}") for part in "qk")


def _hilbert(tokens: int, name: str) -> Tensor:
    """Patches of a square image along a Hilbert curve, the tokens before them (class, registers) last."""
    side = math.isqrt(tokens)
    first = tokens - side * side
    if first > 16:
        raise ValueError(
            f"--token_order hilbert: expected a square of patches and up to 16 tokens before it, got {tokens} tokens "
            f"in {name}; use --token_order natural"
        )
    return torch.cat([first + hilbert_order(side, side), torch.arange(first)])
