"""The pairs of routed lists and a low-rank kernel that a benchmark's command line asks for.

Scripts append their folder to the import path to find this file: put first, it would hide the standard module copy.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import nn

import scatterbrain as sb
from scatterbrain.low_rank import LowRankKernel
from scatterbrain.supports import Support

BLOCK_Q = {"centroid": 32, "quadratic": 16}  # queries that share a list, where the command line does not say


@dataclass(frozen=True)
class Pair:
    """What replaces exact attention."""

    support: Support
    low_rank: LowRankKernel

    def __str__(self) -> str:
        return f"{self.support} + {self.low_rank}"

    def swap_into(self, model: nn.Module, calibration: Callable[[], object], **arguments: object) -> object:
        """Replaces the attention of ``model`` and returns the report; runs ``calibration`` for a kernel with stored
        statistics."""
        report = sb.replace_attention(model, self.support, self.low_rank, **arguments)
        if getattr(self.low_rank, "statistics", None) == "stored":
            with sb.calibrate(model), torch.no_grad():
                calibration()
        return report


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that :func:`pairs_of` reads; each takes several values, and every combination is a pair."""
    add = parser.add_argument
    add(
        "--low-rank",
        nargs="+",
        choices=tuple(BLOCK_Q),
        default=["centroid"],
        help="kernel of the keys that are not listed: centroid (default) clusters those of each call, quadratic is "
        "calibrated",
    )
    add("--keys", type=int, nargs="+", help="exact keys per query; default 64, or as the model needs")
    add("--block-q", type=int, nargs="+", help="queries that share a list; default 32 with centroid, 16 with quadratic")
    add("--pools", type=int, nargs="+", default=[1], help="means of queries that choose a list; default 1")
    add("--clusters", type=int, nargs="+", default=[64], help="of centroid; default 64")
    add("--rank", type=int, nargs="+", default=[9], help="of quadratic; default 9")


def pairs_of(options: argparse.Namespace, keys: list[int]) -> list[Pair]:
    """Every combination of the options; ``keys`` where they name none."""
    pairs = []
    for name in options.low_rank:
        kernels = map(sb.Centroid, options.clusters) if name == "centroid" else map(sb.Quadratic, options.rank)
        lists = product(options.keys or keys, options.block_q or [BLOCK_Q[name]], options.pools)
        for (count, block_q, pools), kernel in product(lists, kernels):
            # One pool is what Routed has by itself.
            support = sb.Routed(count, block_q=block_q, **({} if pools == 1 else {"pools": pools}))
            pairs.append(Pair(support, kernel))
    return pairs
