"""A call of attention after its checks."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from scatterbrain.padding import PaddingInfo

if TYPE_CHECKING:
    from scatterbrain.low_rank import Coefficients, LowRankKernel
    from scatterbrain.supports import Support


class Call(NamedTuple):
    """What supports and low-rank kernels are asked about.

    Args:
        query: (B, Hq, N, d). key: (B, Hkv, M, d).
        value: (B, Hkv, M, dv); None where lists alone are wanted.
        support: which keys are exact.
        low_rank: the kernel of the rest, or None.
        coefficients: what the kernel runs with (``statistics=`` of :func:`scatterbrain.attention`), or None.
        scale: factor of q.k.
        padding: masks, ranges and causal offset.
        is_causal: whether query i sees keys <= i + offset only.
    """

    query: Tensor
    key: Tensor
    value: Tensor | None
    support: Support
    low_rank: LowRankKernel | None
    coefficients: Coefficients | None
    scale: float
    padding: PaddingInfo
    is_causal: bool
