"""From the attention section of a configuration to attention modules."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

import scatterbrain as sb
from scatterbrain.training.config import AttentionConfig

SUPPORTS = {"full": "Full", "empty": "Empty", "window": "Window", "routed": "Routed", "lsh": "LSH"}
LOW_RANKS = {"quadratic": "Quadratic", "favor": "Favor"}


def build_support_and_low_rank(config: AttentionConfig) -> tuple[Any, Any]:
    """The support and the low-rank part (or None) that the configuration names.

    Raises:
        ValueError: for a name or a field that does not exist, or a value the support or low-rank part refuses.
    """
    support, low_rank = getattr(sb.presets, config.preset)(keys=config.keys)
    if config.support is not None:
        support = _build("attention.support", config.support, SUPPORTS, keys=config.keys)
        if isinstance(support, sb.Full):
            low_rank = None
    if config.low_rank is not None:
        low_rank = None if config.low_rank == "none" else _build("attention.low_rank", config.low_rank, LOW_RANKS)
    return support, low_rank


def build_attention(config: AttentionConfig, num_heads: int, num_kv_heads: int, head_dim: int) -> nn.Module:
    """The attention module of one layer."""
    support, low_rank = build_support_and_low_rank(config)
    return sb.ScatterbrainAttention(num_heads, head_dim, num_kv_heads, support=support, low_rank=low_rank)


def is_exact(config: AttentionConfig) -> bool:
    """Whether the configuration means exact attention."""
    return isinstance(build_support_and_low_rank(config)[0], sb.Full)


def describe_attention(config: AttentionConfig) -> str:
    """The support and the low-rank part in one line."""
    support, low_rank = build_support_and_low_rank(config)
    if isinstance(support, sb.Full):
        return "exact attention"
    return f"{support}, {'no low-rank part' if low_rank is None else low_rank}"


def _build(key: str, value: str | dict[str, Any], classes: dict[str, str], **defaults: Any) -> Any:
    fields = {"kind": value} if isinstance(value, str) else dict(value)
    kind = fields.pop("kind", None)
    if kind not in classes:
        raise ValueError(f"{key}: expected one of {', '.join(classes)} (as the kind), got {kind!r}")
    cls = getattr(sb, classes[kind])
    known = [field.name for field in dataclasses.fields(cls) if field.init]
    for name in fields:
        if name not in known:
            raise ValueError(f"{key}.{name}: {kind} has no such field; it has {', '.join(known) or 'none'}")
    fields = {name: default for name, default in defaults.items() if name in known} | fields
    try:
        return cls(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key}: {error}") from error
