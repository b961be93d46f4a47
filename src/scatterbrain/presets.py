"""Measured pairs of a support and a low-rank kernel, each for one purpose; ``sb.attention(..., **dict(zip(("support",
"low_rank"), presets.drop_in())))``. Modules and models that are given none run bidirectional calls with ``drop_in`` and
causal ones with ``causal``."""

from __future__ import annotations

from scatterbrain.low_rank import Centroid, Favor, Quadratic
from scatterbrain.supports import LSH, Routed, Window


def drop_in(keys: int = 72) -> tuple[Routed, Centroid]:
    """For pretrained bidirectional models without retraining: routed lists shared by 32 queries, and the centroid
    kernel, which needs no calibration. On real attention maps this pair has the lowest error at its cost (``python
    benchmarks/quality.py``); 72 keys take what 64 take with ``quadratic``, and are the fewest with which a sentence
    encoder's outputs have cosines of .990 with the exact ones (``python benchmarks/pretrained.py minilm``). With fewer
    than 32 keys lists are shared by 16 or 8 queries."""
    return Routed(keys, block_q=_block_q(keys)), Centroid(64)


def quality(keys: int = 128) -> tuple[Routed, Centroid]:
    """As ``drop_in`` with half its error, for about half as much time again: twice the keys, chosen by two mean queries
    of each block, and more clusters."""
    return Routed(keys, block_q=_block_q(keys), pools=2), Centroid(96)


def fast(keys: int = 64) -> tuple[Window, Centroid]:
    """The fastest pair that needs no calibration: a window in place of routed lists. For text and images in Hilbert
    order, where near tokens matter most; its error is about one and a half times that of ``drop_in``."""
    return Window(keys), Centroid(64)


def quadratic(keys: int = 64) -> tuple[Routed, Quadratic]:
    """One pair for bidirectional and causal calls, which must be calibrated: routed lists shared by 16 queries and the
    quadratic kernel. Its error in bidirectional calls is 1.5 to 2.5 times that of ``drop_in``; for checkpoints that
    were calibrated with it, and where one kernel has to serve both kinds of calls."""
    return Routed(keys, block_q=16), Quadratic(rank=9, statistics="stored")


def causal(keys: int = 128) -> tuple[Window, Quadratic]:
    """For pretrained causal models without retraining: a window and the first four keys, which such models attend to
    whatever the query is, and the kernel of ``quadratic``, which must be calibrated. A list that 16 queries share may
    be chosen by the first of them alone, so routing helps causal models less, and a window of twice the keys takes no
    longer: at about the time of ``quadratic`` it has the lowest error and loss in trained decoders (``python
    benchmarks/causal.py llama``). What errs less, ``Routed(keys, block_q=1, block_k=8, window=16, pools=2)``, takes
    twice as long."""
    return Window(keys, sinks=min(4, keys)), Quadratic(rank=9, statistics="stored")


def train(keys: int = 64) -> tuple[Routed, Quadratic]:
    """For training from scratch: a window of 16 and the best blocks of 8 keys per query, learned projections. Lists
    shared by a block of queries make training from scratch unstable, a window alone does not learn to copy; this pair
    does (``python benchmarks/copy_tasks.py``). Keys are found by their sketches, ``pools=0``: recall over 1,023 tokens,
    where exact attention has .87, comes to .81 with 40 of them in place of .28 by two means of every block, and copies
    end at 1.00 in place of 1.04 to 1.5. More keys without the kernel, at equal cost, have .86 in that recall; on
    shorter ones, on copies and by the older means of finding keys the two are within the spread over seeds, and in
    noisy majority keys alone are ahead. The kernel costs little where it does not help, and is what remains of all keys
    that no list holds. Learned projections are ahead of moving averages (``docs/results.md``). Text is told by what
    stands near: a language model of a small size gains from ``window=64`` beside its routed keys (there too)."""
    return Routed(keys, block_q=1, block_k=8, window=16, pools=0), Quadratic(rank=9, statistics="learned")


def paper(keys: int = 64, features: int = 64, rounds: int = 2, seed: int = 0) -> tuple[LSH, Favor]:
    """The estimator of the Scatterbrain paper: LSH clusters with FAVOR+ features. Its unnormalised weights are
    unbiased, and exact on the support; on real attention maps its error is several times that of ``drop_in`` (``python
    benchmarks/quality.py``)."""
    return LSH(keys, rounds=rounds, seed=seed), Favor(features=features, seed=seed)


def _block_q(keys: int) -> int:
    """Queries that share a list: as many as leave their own keys in the budget, at most 32."""
    return 32 if keys >= 32 else 16 if keys >= 16 else 8
