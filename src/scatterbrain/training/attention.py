"""From the attention section of a configuration to attention modules."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

from torch import nn

import scatterbrain as sb
from scatterbrain.checks import check_pair
from scatterbrain.fields import SEED_MAX
from scatterbrain.low_rank import LOW_RANK_KERNELS
from scatterbrain.registry import Registry
from scatterbrain.supports import SUPPORTS
from scatterbrain.training.config import AttentionConfig, WrongType
from scatterbrain.training.models.blocks import AttentionFactory

_BETWEEN_LAYERS = 1_000_003  # seeds of runs are small numbers


def build_support_and_low_rank(config: AttentionConfig, is_causal: bool = True, seed: int = 0) -> tuple[Any, Any]:
    """The support and the low-rank part (or None) that the configuration names.

    Args:
        config: The section ``attention``.
        is_causal: Whether the task is, which rules some out.
        seed: Of the draws of a support or a kernel (hashes, random features) that the configuration gives no seed. Its
            low 32 bits count: torch's generator on the CPU takes no more.

    Raises:
        ValueError: naming the key, for a name or a field that does not exist, a value the support or low-rank part
            refuses, or a pair that such a model cannot be trained with from scratch.
    """
    seed %= SEED_MAX + 1
    preset = getattr(sb.presets, config.preset)
    if config.support is None:
        with _naming("attention.keys"):
            support = preset(keys=config.keys)[0]
    else:
        fitting = SUPPORTS.configurable(lambda cls: not (is_causal and cls.is_bidirectional_only))
        support = _build("attention.support", config.support, fitting, keys=config.keys, seed=seed)
    if config.low_rank is None:
        low_rank = None if support.is_full else preset()[1]
    else:
        low_rank = _build_low_rank(config.low_rank, seed)
    if support.is_full and low_rank is not None:
        raise ValueError(
            f"attention.low_rank: support full leaves nothing to approximate, got {low_rank}; leave it out, or give "
            "--attention.low_rank none"
        )
    if low_rank is not None:
        with _naming(f"attention.low_rank{'.statistics' * hasattr(low_rank, 'statistics')}"):
            low_rank.check_from_scratch(is_causal)
    with _naming("attention"):
        check_pair(support, low_rank, is_causal)
    return support, low_rank


def build_attention(
    config: AttentionConfig, num_heads: int, num_kv_heads: int, head_dim: int, is_causal: bool = True, seed: int = 0
) -> nn.Module:
    """The attention module of one layer."""
    support, low_rank = build_support_and_low_rank(config, is_causal, seed)
    with _naming("attention"):
        return sb.ScatterbrainAttention(num_heads, head_dim, num_kv_heads, support=support, low_rank=low_rank)


def attention_of_layers(config: AttentionConfig, is_causal: bool, seed: int) -> AttentionFactory:
    """Makes the attention of one layer after the other; each has hashes and random features of its own."""
    layers = itertools.count()

    def build(num_heads: int, num_kv_heads: int, head_dim: int) -> nn.Module:
        return build_attention(
            config, num_heads, num_kv_heads, head_dim, is_causal, seed + next(layers) * _BETWEEN_LAYERS
        )

    return build


def is_exact(config: AttentionConfig) -> bool:
    """Whether the configuration means exact attention."""
    return build_support_and_low_rank(config, is_causal=False)[0].is_full


def describe_attention(config: AttentionConfig, is_causal: bool = True) -> str:
    """The support and the low-rank part in one line."""
    support, low_rank = build_support_and_low_rank(config, is_causal)
    if support.is_full:
        return "exact attention"
    return f"{support}, {'no low-rank part' if low_rank is None else low_rank}"


def _build_low_rank(value: str | dict[str, Any], seed: int) -> Any:
    if value == "none":
        return None
    return _build("attention.low_rank", value, LOW_RANK_KERNELS.configurable(), seed=seed)


def _build(key: str, value: str | dict[str, Any], classes: Registry, **defaults: Any) -> Any:
    """Classes of the user's own too, by "module:Class"."""
    try:
        cls = classes.class_of(value, key, imports=True)
    except TypeError as error:
        raise WrongType(str(error)) from error
    defaults |= getattr(cls, "training_defaults", {})
    fields = classes.fields_of(cls, value, key, **defaults)
    inherits_keys = "keys" in defaults and "keys" in fields and not (isinstance(value, dict) and "keys" in value)
    with _naming(f"{key} with attention.keys {defaults['keys']}" if inherits_keys else key):
        return cls(**fields)


@contextlib.contextmanager
def _naming(key: str) -> Iterator[None]:
    """Puts the key of the configuration before what the library says about its value."""
    try:
        yield
    except TypeError as error:
        raise WrongType(f"{key}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
