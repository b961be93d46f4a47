"""Robust principal component analysis: budgets, planted decompositions, and exact truncated SVDs."""

from __future__ import annotations

import pytest
import torch
from testkit import rand

from scatterbrain.analysis.regimes.robust_pca import robust_pca

N, M = 60, 48


def planted(rank: int, entries: int) -> tuple[torch.Tensor, torch.Tensor]:
    low_rank = rand(N, rank, dtype=torch.float64) @ rand(rank, M, seed=1, dtype=torch.float64)
    sparse = torch.zeros(N * M, dtype=torch.float64)
    sparse[torch.randperm(N * M, generator=torch.Generator().manual_seed(2))[:entries]] = 20.0
    sparse[::2] *= -1
    return low_rank, sparse.view(N, M)


def test_a_sum_of_a_sparse_and_a_low_rank_matrix_is_found_again() -> None:
    low_rank, sparse = planted(rank=3, entries=100)
    found = robust_pca(low_rank + sparse, entries=100, rank=3, iterations=200, tolerance=1e-6)
    assert found.error < 1e-5
    torch.testing.assert_close(found.sparse, sparse, rtol=0, atol=1e-2)
    torch.testing.assert_close(found.low_rank, low_rank, rtol=0, atol=1e-2)


@pytest.mark.parametrize("entries, rank", [(0, 4), (200, 0), (200, 4), (N * M, 0)])
def test_the_budgets_hold_and_the_error_is_that_of_the_parts(entries: int, rank: int) -> None:
    matrix = torch.softmax(2 * rand(N, M, dtype=torch.float64), -1)
    found = robust_pca(matrix, entries, rank)
    assert int((found.sparse != 0).sum()) <= entries
    assert int(torch.linalg.matrix_rank(found.low_rank)) <= rank
    left = (matrix - found.sparse - found.low_rank).norm() / matrix.norm()
    assert found.error == pytest.approx(float(left), abs=1e-12)


def test_each_part_alone_is_the_best_of_its_form() -> None:
    matrix = torch.softmax(2 * rand(N, M, dtype=torch.float64), -1)
    largest = matrix.flatten().sort(descending=True).values
    assert robust_pca(matrix, 300, 0).error == pytest.approx(float(largest[300:].norm() / matrix.norm()))
    singular = torch.linalg.svdvals(matrix)
    best = float(singular[5:].norm() / matrix.norm())
    assert best <= robust_pca(matrix, 0, 5, iterations=100, tolerance=0).error < 1.02 * best


def test_both_budgets_together_leave_less_than_either_part_alone() -> None:
    matrix = torch.softmax(3 * rand(N, M, dtype=torch.float64), -1)
    both = robust_pca(matrix, 300, 5).error
    assert both < min(robust_pca(matrix, 300, 0).error, robust_pca(matrix, 0, 5).error)


def test_nothing_is_left_of_a_matrix_of_zeros() -> None:
    assert robust_pca(torch.zeros(5, 7), 3, 2).error == 0


@pytest.mark.parametrize(
    "matrix, entries, rank, message",
    [
        (torch.zeros(5), 1, 1, "expected a floating-point matrix"),
        (torch.zeros(5, 5, dtype=torch.int64), 1, 1, "expected a floating-point matrix"),
        (torch.zeros(5, 4), 21, 1, "entries must be from 0 to 20, got 21"),
        (torch.zeros(5, 4), 1, 5, "rank must be from 0 to 4, got 5"),
        (torch.full((5, 4), float("nan")), 1, 1, "finite"),
    ],
)
def test_other_arguments_are_refused(matrix: torch.Tensor, entries: int, rank: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        robust_pca(matrix, entries, rank)
