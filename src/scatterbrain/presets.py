"""Measured pairs of a support and a low-rank kernel, each for one purpose; ``sb.attention(..., **dict(zip(("support",
"low_rank"), presets.drop_in())))``."""

from __future__ import annotations

from scatterbrain.low_rank import Favor, Quadratic
from scatterbrain.supports import LSH, Routed


def drop_in(keys: int = 64) -> tuple[Routed, Quadratic]:
    """For pretrained models without retraining: routed lists shared by 16 queries, calibrated quadratic kernel. On real
    attention maps this pair has the lowest error at its cost (``python benchmarks/quality.py``)."""
    return Routed(keys, block_q=16), Quadratic(rank=9, statistics="stored")


def train(keys: int = 64) -> tuple[Routed, Quadratic]:
    """For training from scratch: a window of 16 and the best blocks of 8 keys per query, learned projections. Lists
    shared by a block of queries make training from scratch unstable, a window alone does not learn to copy; this pair
    does (``python benchmarks/copy.py``)."""
    return Routed(keys, block_q=1, block_k=8, window=16), Quadratic(rank=9, statistics="learned")


def paper(keys: int = 64, features: int = 64, rounds: int = 2, seed: int = 0) -> tuple[LSH, Favor]:
    """The estimator of the Scatterbrain paper: LSH clusters with FAVOR+ features. Its unnormalised weights are
    unbiased, and exact on the support; on real attention maps its error is several times that of ``drop_in`` (``python
    benchmarks/quality.py``)."""
    return LSH(keys, rounds=rounds, seed=seed), Favor(features=features, seed=seed)
