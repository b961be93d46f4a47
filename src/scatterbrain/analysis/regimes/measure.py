"""Entropy and errors of one head at one temperature."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import scatterbrain as sb
from scatterbrain.analysis.cost import Shape
from scatterbrain.analysis.regimes.config import AnalyzeConfig, Method
from scatterbrain.analysis.regimes.inputs import Head
from scatterbrain.analysis.regimes.robust_pca import robust_pca
from scatterbrain.bench.measure import relative_error


@dataclass(frozen=True)
class Row:
    """One method on one head at one temperature: a line of the CSV.

    Args:
        inputs, head: the head, as :class:`Head` has them.
        temperature: scores are divided by it.
        entropy: mean of the rows' entropies, in nats, of exact attention.
        method: sparse, low-rank, combined or oracle. settings: what it is.
        multiply_adds: per query; None for the oracle, which no method computes.
        matrix_error: Frobenius norm of the difference to the exact matrix of weights, over that of the matrix.
        output_error: the same of the outputs.

    An error is no finite number where a method's result is not, such as with scores beyond float32's range.
    """

    inputs: str
    head: str
    temperature: float
    entropy: float
    method: str
    settings: str
    multiply_adds: float | None
    matrix_error: float
    output_error: float

    def error(self, kind: str) -> float:
        return self.matrix_error if kind == "matrix" else self.output_error

    def is_finite(self) -> bool:
        return all(map(math.isfinite, (self.entropy, self.matrix_error, self.output_error)))


def shape_of(head: Head) -> Shape:
    return Shape(head.query.shape[2], head.key.shape[2], head.query.shape[3], head.value.shape[3])


def measure(head: Head, temperature: float, config: AnalyzeConfig) -> Iterator[Row]:
    """A row for each method.

    Raises:
        ValueError: scores of exact attention that are no finite numbers.
    """
    scale = 1 / (temperature * math.sqrt(head.query.shape[3]))
    exact = exact_weights(head, scale, config.causal)
    if not bool(torch.isfinite(exact).all()):
        raise ValueError(
            f"{head.source}, {head.name}: expected scores that are finite numbers, got others at temperature "
            f"{temperature:g}; choose a higher one with --temperatures"
        )
    entropy = float(torch.special.entr(exact).sum(-1).mean())
    value = head.value[0, 0].double()
    want = exact @ value
    shape = shape_of(head)
    for method in config.methods(shape):
        if method.support is None:
            rank = config.oracle_rank(shape)
            found = robust_pca(exact.float(), config.oracle_keys(shape) * shape.queries, rank)
            weights = (found.sparse + found.low_rank).double()
            out = weights @ value
        else:
            weights, out = approximate(head, method, scale, config.causal)
        yield Row(
            inputs=head.source,
            head=head.name,
            temperature=temperature,
            entropy=entropy,
            method=method.name,
            settings=method.settings,
            multiply_adds=method.multiply_adds,
            matrix_error=_relative(weights - exact, exact),
            output_error=_relative(out - want, want),
        )


def _relative(lost: Tensor, exact: Tensor) -> float:
    return relative_error(float(lost.norm()), float(exact.norm()))


def exact_weights(head: Head, scale: float, is_causal: bool) -> Tensor:
    """(N, M) in float64."""
    scores = scale * head.query[0, 0].double() @ head.key[0, 0].double().T
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    return torch.softmax(scores, -1)


def approximate(head: Head, method: Method, scale: float, is_causal: bool) -> tuple[Tensor, Tensor]:
    """Weights (N, M) and output (N, dv): of values that are unit vectors attention returns its weights."""
    statistics = None
    if method.low_rank is not None and method.low_rank.is_calibrated_from_data:
        statistics = sb.fit_statistics(*head.fitted_on, method.low_rank.rank, scale=scale)
    units = torch.eye(head.key.shape[2])[None, None]
    with torch.no_grad():
        out = sb.attention(
            head.query,
            head.key,
            torch.cat([units, head.value], -1),
            method.support,
            method.low_rank,
            is_causal=is_causal,
            scale=scale,
            statistics=statistics,
        )[0, 0].double()
    return out.split([head.key.shape[2], head.value.shape[3]], -1)
