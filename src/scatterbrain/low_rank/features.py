"""A low-rank kernel of the caller's own, as functions that make features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from scatterbrain.call import Call
from scatterbrain.low_rank.base import LowRankKernel
from scatterbrain.low_rank.favor import favor_sizes
from scatterbrain.operators.fakes import accumulation_dtype
from scatterbrain.operators.tracing import is_readable

_LOWEST_LOG_SCALE = -1e30  # far below where the kernels let log scales saturate

FeatureMap = Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Features(LowRankKernel):
    """``L_ij = exp(rho_i + kappa_j) phi(q_i).psi(k_j)`` with functions phi and psi of the caller's: any positive
    feature map, such as those of linear attention (Katharopoulos et al., ICML 2020) or of the Performer (Choromanski et
    al., ICLR 2021), runs on the operator for general features, in linear time.

    A function is given the tokens of one side, (batch, heads, tokens, head_dim), in float32 (float64 for float64
    inputs) and multiplied by the square root of ``scale``, so that phi(q).psi(k) stands for exp(q.k) of what the
    functions see; a negative scale gives its sign to the queries. Padded tokens hold copies of the first valid token of
    their row, or ones in a row without any. It returns the non-negative features (batch, heads, tokens, m) or, where
    they may be too large or too small for a float, a pair of the features and the log scale (batch, heads, tokens) that
    multiplies them as exp(log scale). Queries have the heads of query, keys those of key; heads may differ in their
    features, and both sides have the same m.

    A token's features may depend on this token alone: a function that looks at its neighbours would let padding and, in
    causal attention, later tokens in, which nothing here can see. Gradients reach the tokens and whatever the functions
    read. Functions that are modules are modules of a :class:`ScatterbrainAttention` too, ``query_features`` and
    ``key_features``: its parameters, its state dict and ``.to()`` have theirs, which ``.half()`` and ``.bfloat16()``
    leave in float32. Layers that are given the same kernel share them. What takes their place there, such as a
    quantized module or that of an adapter, is what runs, also after the same kernel is chosen again.

    ``sb.reference.attention`` takes the same kernel, and calls the functions with tokens of its own dtype, float64.

    Args:
        query_features: phi.
        key_features: psi; None: the same function as for queries.

    Raises:
        TypeError: for anything but functions.
    """

    kind: ClassVar[str] = "features"
    is_configurable: ClassVar[bool] = False

    query_features: FeatureMap
    key_features: FeatureMap | None = None

    def __post_init__(self) -> None:
        for name in ("query_features", "key_features"):
            function = getattr(self, name)
            if not callable(function) and not (function is None and name == "key_features"):
                raise TypeError(
                    f"Features: {name} must be a function of tokens (batch, heads, tokens, head_dim) that returns "
                    f"features (batch, heads, tokens, m), got {type(function).__name__}"
                )

    def modules(self) -> dict[str, nn.Module]:
        of_both = {"query_features": self.query_features, "key_features": self.key_features}
        return {name: function for name, function in of_both.items() if isinstance(function, nn.Module)}

    @property
    def adds_parameters(self) -> bool:
        return any(True for function in self.modules().values() for _ in function.parameters())

    def coordinates(self, call: Call) -> tuple[Tensor, Tensor]:
        query_size, key_size = favor_sizes(call.scale)
        padding = call.padding
        query = _map("query_features", self.query_features, call.query, padding.query_mask, query_size)
        of_keys = self.query_features if self.key_features is None else self.key_features
        key = _map("key_features", of_keys, call.key, padding.key_mask, key_size, lowers_weightless=True)
        if query.shape[3] != key.shape[3]:
            raise ValueError(
                "Features: query_features and key_features must return the same number of features, got "
                f"{query.shape[3] - 1} and {key.shape[3] - 1}"
            )
        return query, key


def _map(
    name: str, function: FeatureMap, tokens: Tensor, mask: Tensor | None, size: float, lowers_weightless: bool = False
) -> Tensor:
    """(B, H, N, m + 1): features of at most 1, and the log scale that is left."""
    ignored = None if mask is None else mask[:, None, :, None]
    tokens = tokens if ignored is None else _without_padding(tokens, mask)
    tokens = tokens.to(accumulation_dtype(tokens.dtype)) * size
    features, log_scale = _checked(name, function(tokens), tokens)
    if ignored is not None:
        features, log_scale = features.masked_fill(ignored, 0), log_scale.masked_fill(ignored, 0)
    if is_readable(features) and bool((features < 0).any()):
        raise ValueError(
            f"Features: {name} must return non-negative features, got {float(features.detach().min()):.4g}; weights "
            "are their products: let the function end with exp, relu, softmax or elu + 1"
        )
    # The largest feature of a token goes into its log scale: products of features stay within the range of the kernels.
    largest = features.detach().amax(-1, keepdim=True)
    peak = torch.where(largest > 0, largest, 1)
    log_scale = log_scale + torch.log(peak)
    if lowers_weightless:
        # A key without any feature gets the lowest log scale: sums over keys are counted from the largest one. It then
        # has no gradient: a differentiable feature that is never negative has none where it is zero.
        log_scale = torch.where(largest == 0, log_scale.clamp(max=_LOWEST_LOG_SCALE), log_scale)
    return torch.cat([features / peak, log_scale], -1)


def _without_padding(tokens: Tensor, mask: Tensor) -> Tensor:
    """The tokens, a copy of the row's first valid one in place of those that are ignored, or ones where there is none.
    Zeros would not do: a function that divides by a norm has no gradient there, and no mask after it takes a NaN out of
    the gradients of its parameters."""
    if tokens.shape[2] == 0:
        return tokens
    first = (~mask).to(torch.int8).argmax(1)[:, None, None, None].expand(-1, tokens.shape[1], 1, tokens.shape[3])
    valid = torch.where(mask.all(1)[:, None, None, None], 1, tokens.detach().gather(2, first))
    return torch.where(mask[:, None, :, None], valid, tokens)


def _checked(name: str, made: object, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(features, log scale (B, H, N, 1)) in the dtype of the tokens."""
    expected = f"Features: {name} must return features (batch, heads, tokens, m)"
    features, log_scale = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(features, Tensor) or not isinstance(log_scale, Tensor | None):
        wrong = log_scale if isinstance(features, Tensor) else features
        got = f"a tuple of {len(wrong)}" if isinstance(wrong, tuple) else type(wrong).__name__
        raise TypeError(f"{expected}, or a pair of these and log scales (batch, heads, tokens), got {got}")
    leading = tuple(tokens.shape[:3])
    if features.dim() != 4 or tuple(features.shape[:3]) != leading or features.shape[3] < 1:
        raise ValueError(
            f"{expected} with (batch, heads, tokens) = {leading} and m at least 1, got shape {tuple(features.shape)}"
        )
    if log_scale is not None and tuple(log_scale.shape) != leading:
        raise ValueError(
            f"Features: the log scale that {name} returns must be (batch, heads, tokens) = {leading}, got shape "
            f"{tuple(log_scale.shape)}"
        )
    for part in (features, log_scale):
        if part is not None and not part.is_floating_point():
            raise TypeError(f"{expected} as floating-point numbers, got {part.dtype}; convert them")
        if part is not None and part.device != tokens.device:
            raise ValueError(
                f"{expected} on the device of the tokens, {tokens.device}, got {part.device}; move what it reads there"
            )
    features = features.to(tokens.dtype)
    if log_scale is None:
        return features, torch.zeros_like(features[..., :1])
    return features, log_scale.to(tokens.dtype)[..., None]
