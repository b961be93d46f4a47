"""Methods by name: what is timed, and what it needs.

sdpa                    F.scaled_dot_product_attention
drop_in-72, fast-64,    the presets of these names, scatterbrain.presets, with that many keys
  quality-128,
  quadratic-64
window-64, routed-64,   a support of that many keys with the quadratic kernel and stored statistics;
  per-query-64, lsh-64,   per-query is Routed(keys, block_q=1, block_k=8, window=16); causal and train are the supports
  causal-128, train-64    of scatterbrain.presets.causal and train
window-64+none          the support alone; +favor: with FAVOR+ of 64 features; +input: statistics of the input;
                          +centroid: with 64 clusters of the call's own keys; +kind: with an own kernel that was
                          registered
kind-64, kind           an own support that was registered, with that many keys or without a number
empty                   the low-rank kernel alone
torch-window-64,        the same ideas written in plain torch (scatterbrain.bench.baselines)
  torch-performer-64, torch-clusters-64
torch-flex-64           torch's flex_attention, compiled, with a block mask of the same window; forward only on the CPU
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from scatterbrain import functional, presets
from scatterbrain.bench import baselines
from scatterbrain.bench.flex import flex_window
from scatterbrain.checks import check_pair
from scatterbrain.low_rank import LOW_RANK_KERNELS, LowRank, Quadratic, Statistics
from scatterbrain.supports import SUPPORTS, Routed, Support, takes_keys

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

_NAME = re.compile(r"(?P<kind>[a-z_]+(?:-[a-z_]+)*)(?:-(?P<keys>\d+))?(?:\+(?P<kernel>[a-z_]+))?")
_BASELINES = ("sdpa", "torch-window", "torch-performer", "torch-clusters", "torch-flex")
_PRESETS = ("drop_in", "quality", "fast", "quadratic")
_BUILT_IN = ("full", "empty", "window", "routed", "per-query", "causal", "train", "lsh", *_PRESETS)


def _per_query(keys: int) -> Support:
    return Routed(keys, block_q=1, block_k=8, window=16)


def _supports() -> dict[str, Callable[[int], Support]]:
    """What makes a support of a budget of keys, by the kind in a method's name."""
    known = {kind: cls.with_keys for kind, cls in SUPPORTS.items() if cls.is_configurable}
    presets = {name: partial(_support_of, name) for name in (*_PRESETS, "causal", "train")}
    return {**known, "per-query": _per_query, **presets}


def _support_of(preset: str, keys: int) -> Support:
    return getattr(presets, preset)(keys)[0]


def _low_rank(kernel: str, rank: int) -> LowRank:
    if kernel in _PRESETS and kernel != "quadratic":
        return getattr(presets, kernel)()[1]
    if kernel == "none":
        return None
    if kernel in ("quadratic", "input"):
        return Quadratic(rank, "input" if kernel == "input" else "stored")
    return LOW_RANK_KERNELS[kernel]()


def _default_kernel(kind: str) -> str:
    """A preset brings its own; other supports stand with the quadratic kernel."""
    return kind if kind in _PRESETS else "quadratic"


def _knows_kernel(kernel: str | None) -> bool:
    return kernel in (None, "none", "input") or kernel in LOW_RANK_KERNELS


def _takes_keys(kind: str) -> bool:
    if kind in SUPPORTS:
        return takes_keys(SUPPORTS[kind])
    return kind != "sdpa"


@dataclass(frozen=True)
class Method:
    """A parsed name."""

    name: str
    kind: str
    keys: int
    kernel: str

    @property
    def is_baseline(self) -> bool:
        """Whether it is torch's kernel or plain torch, without a support and a low-rank kernel."""
        return self.kind in _BASELINES

    def refusal(self, is_causal: bool) -> str | None:
        """Why it cannot be run so; None if it can."""
        if is_causal and self.kind == "torch-clusters":
            return "bidirectional only"
        if self.kind in _BASELINES:
            return None
        try:
            check_pair(*self.pair(), is_causal)
        except ValueError:
            return "bidirectional only"
        return None

    @property
    def is_compiled(self) -> bool:
        """Whether the first call in each direction compiles."""
        return self.kind == "torch-flex"

    def pair(self, rank: int = 9) -> tuple[Support, LowRank]:
        """The support and the low-rank kernel that the name stands for."""
        return _supports()[self.kind](self.keys), _low_rank(self.kernel, rank)

    def modules(self) -> list[str]:
        """Where its support and kernel are defined, outside of this package: what another process has to import."""
        if self.is_baseline:
            return []
        found = (type(part).__module__ for part in self.pair() if part is not None)
        return list(dict.fromkeys(module for module in found if module.split(".")[0] != "scatterbrain"))

    def bytes_needed(self, batch: int, heads: int, tokens: int, head_dim: int, is_causal: bool) -> int:
        """About what one forward and backward of a method in plain torch holds at once; 0 where it is linear."""
        wide = self.kind == "torch-window" or (self.kind == "torch-performer" and is_causal)
        return 5 * 4 * batch * heads * tokens * self.keys * head_dim if wide else 0

    def build(self, statistics: Statistics, rank: int, is_causal: bool) -> Attention:
        """The function of query, key and value that is timed."""
        if self.kind == "sdpa":
            return partial(_sdpa, is_causal=is_causal)
        if self.kind == "torch-window":
            return partial(_repeated, baselines.sliding_window, keys=self.keys, is_causal=is_causal)
        if self.kind == "torch-performer":
            return partial(_repeated, baselines.performer, features=self.keys, is_causal=is_causal)
        if self.kind == "torch-clusters":
            return partial(_repeated, baselines.clusters, keys=self.keys)
        if self.kind == "torch-flex":
            return partial(flex_window, keys=self.keys, is_causal=is_causal)
        support, low_rank = self.pair(rank)
        is_fitted = low_rank is not None and low_rank.is_calibrated_from_data
        return partial(
            functional.attention,
            support=support,
            low_rank=low_rank,
            is_causal=is_causal,
            statistics=statistics if is_fitted else None,
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
    supports = _supports()
    if not match or match["kind"] not in (*supports, *_BASELINES) or not _knows_kernel(match["kernel"]):
        own = "".join(f", {kind}" for kind in supports if kind not in _BUILT_IN)
        raise ValueError(
            f"unknown method {name!r}: expected sdpa, drop_in-KEYS, fast-KEYS, quality-KEYS, quadratic-KEYS, empty, "
            f"full, window-KEYS, routed-KEYS, per-query-KEYS, causal-KEYS or lsh-KEYS{own}, each also with +none, "
            "+centroid, +favor or +input, or torch-window-KEYS, torch-performer-FEATURES, torch-clusters-KEYS or "
            "torch-flex-KEYS"
        )
    kind, keys, kernel = match["kind"], match["keys"], match["kernel"]
    if (keys is None) == _takes_keys(kind):
        expected = f"{kind}-KEYS, such as {kind}-64" if _takes_keys(kind) else f"{kind} without a number"
        raise ValueError(f"method {name!r}: expected {expected}")
    if kernel and kind in _BASELINES:
        raise ValueError(f"method {name!r}: {kind} takes no low-rank kernel; leave out +{kernel}")
    method = Method(name, kind, int(keys or 0), kernel or _default_kernel(kind))
    try:  # supports check their own numbers
        if kind not in _BASELINES:
            supports[kind](method.keys)
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
