"""How much a module saw while it was calibrated."""

from __future__ import annotations

import torch
from torch import Tensor

from scatterbrain.padding import PaddingInfo

FEWEST_TOKENS = 256
"""Fewer make statistics worse: on 64, 128 and 256 tokens the error of Routed(64) + Quadratic(9) is 1.06, 1.02 and 1.00
times that on 1024 in a byte-level language model, 1.38, 1.30 and 1.13 times that on 1370 in DINOv2
(benchmarks/quality.py with --calibration-tokens)."""


def fewest_tokens() -> int:
    """The number below which calibration warns."""
    return FEWEST_TOKENS


def is_short(tokens: int, distinct: int) -> bool:
    """Whether calibration saw too little. Different tokens are counted by fingerprints, of which a few may coincide."""
    return tokens < FEWEST_TOKENS or distinct < FEWEST_TOKENS * 7 / 8


_NOT_IN_A_GRAPH = (
    "calibration reads what passes through, which a graph cannot; run the module that was compiled, without "
    "torch.compile or with fullgraph=False, inside sb.calibrate"
)

_GRID = 1e5  # cells of a fingerprint in the largest of the first batch: coarser than float32 rounding


class Observed:
    """Different queries and keys that passed, counted up to :func:`fewest_tokens`, by a projection of the first head.

    The same sequence again, or one token repeated, adds nothing to what statistics know, however many tokens it has.

    Attributes:
        other_calls: calls that passed with a kernel that has no statistics.
    """

    def __init__(self) -> None:
        self._fingerprints: dict[str, Tensor] = {}
        self._size: dict[str, float] = {}
        self.other_calls = 0

    @torch.compiler.disable(reason=_NOT_IN_A_GRAPH)
    def add_other_call(self) -> None:
        """Counts a call whose kernel has no statistics."""
        self.other_calls += 1

    @property
    def distinct(self) -> int:
        """Of queries or keys, whichever are more: a few learned queries of a decoder are all that there are."""
        return max((len(fingerprints) for fingerprints in self._fingerprints.values()), default=0)

    @torch.compiler.disable(reason=_NOT_IN_A_GRAPH)
    @torch.no_grad()
    def add(self, query: Tensor, key: Tensor, padding: PaddingInfo) -> None:
        """query (B, Hq, N, d), key (B, Hkv, M, d)."""
        for name, tokens, mask in (("query", query, padding.query_mask), ("key", key, padding.key_mask)):
            seen = self._fingerprints.get(name)
            if seen is not None and len(seen) >= FEWEST_TOKENS:
                continue
            weights = torch.arange(1, tokens.shape[3] + 1, dtype=torch.float64, device=tokens.device).cos()
            values = tokens[:, 0].double() @ weights
            values = values.flatten() if mask is None else values[~mask]
            if values.numel() == 0:
                continue
            size = self._size.setdefault(name, max(float(values.abs().max()), torch.finfo(torch.float32).tiny))
            values = (values / size * _GRID).round()
            both = values if seen is None else torch.cat([seen, values])
            self._fingerprints[name] = both.unique()[:FEWEST_TOKENS]
