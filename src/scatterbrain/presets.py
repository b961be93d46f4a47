"""Measured pairs of a support and a low-rank kernel, each for one purpose; ``sb.attention(..., **dict(zip(("support",
"low_rank"), presets.drop_in())))``."""

from __future__ import annotations

from scatterbrain.low_rank import Favor, Quadratic
from scatterbrain.supports import LSH, Routed, Window


def drop_in(keys: int = 64) -> tuple[Routed, Quadratic]:
    """For pretrained models without retraining: routed lists shared by 16 queries, calibrated quadratic kernel. On real
    attention maps this pair has the lowest error at its cost (``python benchmarks/quality.py``)."""
    return Routed(keys, block_q=16), Quadratic(rank=9, statistics="stored")


def causal(keys: int = 128) -> tuple[Window, Quadratic]:
    """For pretrained causal models without retraining: a window and the first four keys, which such models attend to
    whatever the query is; the kernel, and so the statistics, are those of ``drop_in``. A list that 16 queries share may
    be chosen by the first of them alone, so routing helps causal models less, and a window of twice the keys takes no
    longer: at about ``drop_in``'s time it has the lowest error and loss in trained decoders (``python
    benchmarks/causal.py llama``). What errs less, ``Routed(keys, block_q=1, block_k=8, window=16)``, takes twice as
    long."""
    return Window(keys, sinks=min(4, keys)), Quadratic(rank=9, statistics="stored")


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
