"""What attention modules of other packages have in common once a :class:`ScatterbrainAttention` computes their
attention."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import nn

from scatterbrain.checks import check_pair
from scatterbrain.low_rank import LowRank
from scatterbrain.nn.attention import ScatterbrainAttention
from scatterbrain.nn.warn import warn
from scatterbrain.operators.tracing import NOT_IN_TORCHSCRIPT
from scatterbrain.presets import causal, drop_in
from scatterbrain.supports import Support

SUPPORT, LOW_RANK = drop_in()  # of every host module that is given none
CAUSAL_SUPPORT = causal()[0]  # of their causal calls, where neither support is given


def with_defaults(support: Support | None, causal_support: Support | None) -> tuple[Support, Support | None]:
    """The supports of bidirectional and of causal calls; None for the second where the first serves both."""
    return (SUPPORT, causal_support or CAUSAL_SUPPORT) if support is None else (support, causal_support)


_WEIGHT = ("weight", "base_layer.weight", "parametrizations.weight.original")  # plain, adapted by peft, parametrized


def has_weight(names: Container[str], layer: str) -> bool:
    """Whether the weight of the linear layer at the path ``layer`` is among ``names`` of a state dict. An adapter's
    file has tensors of its own at that path, which say nothing of the weight."""
    return any(f"{layer}.{name}" in names for name in _WEIGHT)


class HostModule:
    """Mixin for an attention module of another package, before its class: it owns the submodule ``attention``, or None
    where the package's own exact attention was asked for.

    Checkpoints go both ways. One of the original module loads strictly; calibrated statistics are then reset, since
    they belong to the weights that they were fitted with, and learned projections stay. A module whose low-rank kernel
    remembers nothing has the state dict of the original module, and loads strictly into it. A module without
    ``attention`` ignores its entries in a checkpoint.
    """

    attention: ScatterbrainAttention | None

    def _is_of_original(self, state_dict: dict[str, Any], prefix: str, missing_keys: list[str]) -> bool:
        """Whether ``state_dict``, which has no entries of ``attention``, is a checkpoint of the original module.
        ``prefix`` is this module's; ``missing_keys`` are those of modules that were loaded before it."""
        raise NotImplementedError(
            f"{type(self).__name__} must define _is_of_original(state_dict, prefix, missing_keys)"
        )

    def _attach(self, attention: ScatterbrainAttention | None) -> None:
        """Takes ``attention`` in, on the device of the module's parameters and in its mode. Of parameters that have no
        memory yet nothing follows for buffers, as for those of any module."""
        if attention is not None:
            parameter = next(self.parameters(), None)
            if parameter is not None and not parameter.is_meta:
                attention.to(parameter.device)
            attention.train(self.training)
        self.attention = attention
        self._warned: set[str] = set()

    def _detach(self) -> None:
        del self.attention, self._warned

    def _warn_exact(self, obstacle: str) -> None:
        """Warns, once per module and reason, that a call runs exact attention."""
        if self.attention is not None and not torch.compiler.is_compiling():
            self.attention.bypassed = obstacle
        if obstacle not in self._warned:
            self._warned.add(obstacle)
            warn(f"{type(self).__name__} runs exact attention, without approximation: {obstacle}.", stacklevel=4)

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles instead: the package's own module with the same parameters."""
        if self.attention is not None:
            raise RuntimeError(NOT_IN_TORCHSCRIPT)
        parents = type(self).__mro__
        original = parents[parents.index(HostModule) + 1]
        scriptable = original.__new__(original)
        scriptable.__dict__ = {k: v for k, v in vars(self).items() if k not in ("attention", "_warned")}
        return scriptable

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *args: Any,
    ) -> None:
        inner = f"{prefix}attention."
        entries = [name for name in state_dict if name.startswith(inner)]
        if self.attention is None:  # exact attention needs nothing that an approximation saved
            for name in entries:
                del state_dict[name]
        elif not entries and self._is_of_original(state_dict, prefix, missing_keys):
            if self.attention.is_calibrated:
                self.attention.reset_parameters()
            state_dict.update(self.attention.state_dict(prefix=inner))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)


def attention_unless_exact(
    num_heads: int,
    head_dim: int,
    support: Support,
    low_rank: LowRank,
    exact_queries: int = 0,
    num_kv_heads: int | None = None,
    causal_support: Support | None = None,
) -> ScatterbrainAttention | None:
    """The attention of a host module; None for ``support=Full()`` (and no other ``causal_support``), where the host's
    own exact attention runs.

    Raises:
        TypeError, ValueError: for a support or low-rank kernel that does not fit together or the heads.
    """
    check_pair(support, low_rank, is_causal=False)
    if support.is_full and (causal_support is None or causal_support.is_full):
        return None
    settings = (num_kv_heads, support, low_rank, exact_queries, causal_support)
    return ScatterbrainAttention(num_heads, head_dim, *settings)
