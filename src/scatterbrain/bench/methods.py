"""Methods by name: what is timed, and what it needs.

sdpa                    F.scaled_dot_product_attention
window-64, routed-64,   a support of that many keys with the quadratic kernel and stored statistics;
  per-query-64, lsh-64    per-query is Routed(keys, block_q=1, block_k=8, window=16)
window-64+none          the support alone; +favor: with FAVOR+ of 64 features; +input: statistics of the input
empty                   the low-rank kernel alone
torch-window-64,        the same ideas written in plain torch (scatterbrain.bench.baselines)
  torch-performer-64, torch-clusters-64
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import scatterbrain as sb
from scatterbrain.bench import baselines

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

_NAME = re.compile(
    r"(?P<kind>sdpa|full|empty|window|routed|per-query|lsh|torch-window|torch-performer|torch-clusters)"
    r"(?:-(?P<keys>\d+))?(?:\+(?P<kernel>quadratic|input|favor|none))?"
)
_SUPPORTS = {
    "full": lambda keys: sb.Full(),
    "empty": lambda keys: sb.Empty(),
    "window": sb.Window,
    "routed": sb.Routed,
    "per-query": lambda keys: sb.Routed(keys, block_q=1, block_k=8, window=16),
    "lsh": sb.LSH,
}
_WITHOUT_KEYS = ("sdpa", "full", "empty")
_BASELINES = ("sdpa", "torch-window", "torch-performer", "torch-clusters")


@dataclass(frozen=True)
class Method:
    """A parsed name."""

    name: str
    kind: str
    keys: int
    kernel: str

    def refusal(self, is_causal: bool) -> str | None:
        """Why it cannot be run so; None if it can."""
        if is_causal and (self.kind in ("lsh", "torch-clusters") or self.kernel == "input"):
            return "bidirectional only"
        return None

    def bytes_needed(self, batch: int, heads: int, tokens: int, head_dim: int, is_causal: bool) -> int:
        """About what one forward and backward of a method in plain torch holds at once; 0 where it is linear."""
        wide = self.kind == "torch-window" or (self.kind == "torch-performer" and is_causal)
        return 5 * 4 * batch * heads * tokens * self.keys * head_dim if wide else 0

    def build(self, statistics: sb.Statistics, rank: int, is_causal: bool) -> Attention:
        """The function of query, key and value that is timed."""
        if self.kind == "sdpa":
            return partial(_sdpa, is_causal=is_causal)
        if self.kind == "torch-window":
            return partial(_repeated, baselines.sliding_window, keys=self.keys, is_causal=is_causal)
        if self.kind == "torch-performer":
            return partial(_repeated, baselines.performer, features=self.keys, is_causal=is_causal)
        if self.kind == "torch-clusters":
            return partial(_repeated, baselines.clusters, keys=self.keys)
        low_rank = {
            "quadratic": sb.Quadratic(rank),
            "input": sb.Quadratic(rank, "input"),
            "favor": sb.Favor(64),
            "none": None,
        }[self.kernel]
        return partial(
            sb.attention,
            support=_SUPPORTS[self.kind](self.keys),
            low_rank=low_rank,
            is_causal=is_causal,
            statistics=statistics if self.kernel == "quadratic" else None,
        )


def _sdpa(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, enable_gqa=grouped)


def _repeated(
    function: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, **arguments: object
) -> Tensor:
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    return function(query, key, value, **arguments)


def parse_method(name: str) -> Method:
    """
    Raises:
        ValueError: with what names look like.
    """
    match = _NAME.fullmatch(name)
    if not match:
        raise ValueError(
            f"unknown method {name!r}: expected sdpa, empty, full, window-KEYS, routed-KEYS, per-query-KEYS or "
            "lsh-KEYS, each also with +none, +favor or +input, or torch-window-KEYS, torch-performer-FEATURES, "
            "torch-clusters-KEYS"
        )
    kind, keys, kernel = match["kind"], match["keys"], match["kernel"]
    if (keys is None) != (kind in _WITHOUT_KEYS):
        expected = f"{kind} without a number" if kind in _WITHOUT_KEYS else f"{kind}-KEYS, such as {kind}-64"
        raise ValueError(f"method {name!r}: expected {expected}")
    if kernel and kind in _BASELINES:
        raise ValueError(f"method {name!r}: {kind} takes no low-rank kernel; leave out +{kernel}")
    method = Method(name, kind, int(keys or 0), kernel or "quadratic")
    try:  # the supports check their own numbers
        if kind in _SUPPORTS:
            _SUPPORTS[kind](method.keys)
        elif kind != "sdpa" and method.keys < 1:
            raise ValueError(f"expected at least 1, got {method.keys}")
        if kind == "empty" and kernel == "none":
            raise ValueError("nothing would be left; leave out +none")
    except ValueError as error:
        raise ValueError(f"method {name!r}: {error}") from None
    return method


def exact_attention(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """The yardstick of errors: torch's kernel in float32, in float64 for float64 inputs."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        return _sdpa(query.to(dtype), key.to(dtype), value.to(dtype), is_causal)
