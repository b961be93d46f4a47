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

# By the name of the kernel, what the command line does not say.
DEFAULTS = {"centroid": sb.presets.drop_in(), "quadratic": sb.presets.quadratic()}


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
        choices=tuple(DEFAULTS),
        default=["centroid"],
        help="kernel of the keys that are not listed: centroid (default) clusters those of each call, quadratic is "
        "calibrated",
    )
    (lists, centroid), (other_lists, quadratic) = DEFAULTS.values()
    by_kernel = "default {} with centroid, {} with quadratic".format
    add("--keys", type=int, nargs="+", help=f"exact keys per query; {by_kernel(lists.keys, other_lists.keys)}")
    add(
        "--block-q",
        type=int,
        nargs="+",
        help=f"queries that share a list; {by_kernel(lists.block_q, other_lists.block_q)}",
    )
    add("--pools", type=int, nargs="+", default=[1], help="means of queries that choose a list; default 1")
    add(
        "--clusters", type=int, nargs="+", default=[centroid.clusters], help=f"of centroid; default {centroid.clusters}"
    )
    add("--rank", type=int, nargs="+", default=[quadratic.rank], help=f"of quadratic; default {quadratic.rank}")


def pairs_of(options: argparse.Namespace) -> list[Pair]:
    """Every combination of the options."""
    pairs = []
    for name in options.low_rank:
        usual = DEFAULTS[name][0]
        kernels = map(sb.Centroid, options.clusters) if name == "centroid" else map(sb.Quadratic, options.rank)
        lists = product(options.keys or [usual.keys], options.block_q or [usual.block_q], options.pools)
        for (count, block_q, pools), kernel in product(lists, kernels):
            # One pool is what Routed has by itself.
            support = sb.Routed(count, block_q=block_q, **({} if pools == 1 else {"pools": pools}))
            pairs.append(Pair(support, kernel))
    return pairs
