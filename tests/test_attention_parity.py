"""The parity table: forward and every gradient against the dense float64 definition, over drawn cases of all axes."""

from __future__ import annotations

import pytest
import torch
from oracle import CASES, assert_parity, assert_parity_in_float32, draw, row_error


@pytest.mark.parametrize("seed", range(CASES))
def test_float32_matches_the_definition(seed: int) -> None:
    assert_parity_in_float32(seed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(48))
def test_half_precision_errs_no_more_than_twice_the_formula_in_torch(seed: int, dtype: torch.dtype) -> None:
    assert_parity(draw(seed, dtype), dtype, 0.0, 0.0)


@pytest.mark.parametrize("seed", range(48))
def test_float64_accumulates_in_float64(seed: int) -> None:
    case = draw(seed)
    for got, exact in zip(case.judged(torch.float64), case.defined()):
        assert got.dtype == torch.float64
        assert row_error(got, exact) <= max(1e-10, 1e-14 * case.low_rank_share())
