"""A matrix as a sparse one plus one of low rank: robust principal component analysis with given budgets."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Decomposition(NamedTuple):
    """``sparse + low_rank`` (N, M) near the matrix; ``error`` is the relative Frobenius norm of what is left."""

    sparse: Tensor
    low_rank: Tensor
    error: float


def robust_pca(matrix: Tensor, entries: int, rank: int, iterations: int = 30, tolerance: float = 1e-3) -> Decomposition:
    """At most ``entries`` non-zero entries plus a matrix of at most ``rank``, by alternation: the nearest matrix of
    that rank to what the sparse part leaves, then the largest entries of what the low-rank part leaves (GoDec, Zhou and
    Tao, ICML 2011; alternating projections, Netrapalli et al., NeurIPS 2014). Principal component pursuit (Candès et
    al., 2011) is the convex relaxation of the same problem, without budgets. Each step lowers the error; the better of
    two starts counts, no sparse part and the largest entries.

    The truncated SVD is subspace iteration from where the last step ended (Halko, Martinsson and Tropp, 2011).

    Args:
        matrix: (N, M), floating point, finite.
        entries: from 0 to N M. rank: from 0 to min(N, M).
        iterations: of the alternation, at most. tolerance: it ends where a step lowers the error by less than this
            share of it.

    Raises:
        ValueError: a budget out of range, no matrix, or values that are not finite.
    """
    if matrix.dim() != 2 or not matrix.is_floating_point():
        raise ValueError(f"robust_pca: expected a floating-point matrix, got {matrix.dtype} {tuple(matrix.shape)}")
    for name, value, most in (("entries", entries, matrix.numel()), ("rank", rank, min(matrix.shape))):
        if not 0 <= value <= most:
            raise ValueError(f"robust_pca: {name} must be from 0 to {most}, got {value}")
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("robust_pca: expected finite values, got NaN or infinity")
    nothing = torch.zeros_like(matrix)
    starts = [nothing] if entries == 0 else [nothing, _largest(matrix, entries)]
    found = (_alternate(matrix, start, entries, rank, iterations, tolerance) for start in starts)
    return min(found, key=lambda decomposition: decomposition.error)


def _alternate(
    matrix: Tensor, sparse: Tensor, entries: int, rank: int, iterations: int, tolerance: float
) -> Decomposition:
    norm = float(matrix.norm()) or 1.0
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(matrix.shape[1], rank, generator=generator, dtype=torch.float64).to(matrix)
    error = float("inf")
    for step in range(iterations):
        rest = matrix - sparse
        for _ in range(1 if step else 3):
            basis, _ = torch.linalg.qr(rest.mT @ (rest @ basis))
        low_rank = (rest @ basis) @ basis.mT
        rest = matrix - low_rank
        sparse = _largest(rest, entries)
        last, error = error, float((rest - sparse).norm()) / norm
        if error <= 1e-7 or last - error < tolerance * error:
            break
    return Decomposition(sparse, low_rank, error)


def _largest(matrix: Tensor, entries: int) -> Tensor:
    """The entries of largest magnitude, the others zero."""
    kept = torch.topk(matrix.abs().flatten(), entries, sorted=False).indices
    flat = matrix.flatten()
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).view_as(matrix)
