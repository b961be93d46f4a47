"""What attention modules of other packages have in common once a :class:`ScatterbrainAttention` computes their
attention."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn

from scatterbrain.nn.attention import ScatterbrainAttention
from scatterbrain.nn.pairs import Pairs
from scatterbrain.nn.warn import warn
from scatterbrain.operators.tracing import NOT_IN_TORCHSCRIPT

_WEIGHT = ("weight", "base_layer.weight", "parametrizations.weight.original")  # plain, adapted by peft, parametrized


def has_weight(names: Container[str], layer: str) -> bool:
    """Whether the weight of the linear layer at the path ``layer`` is among ``names`` of a state dict. An adapter's
    file has tensors of its own at that path, which say nothing of the weight."""
    return any(f"{layer}.{name}" in names for name in _WEIGHT)


class HostModule:
    """Mixin for an attention module of another package, before its class: it owns the submodule ``attention``, or None
    where the package's own exact attention was asked for.

    Checkpoints go both ways. One of the original module loads strictly; calibrated statistics are then reset, since
    they belong to the weights that they were fitted with, and learned projections stay, unless their memory was never
    filled (``to_empty``, the meta device): then they start as in a new module. Modules that a kernel computes with
    (:class:`scatterbrain.Features`) stay too; those whose memory was never filled are reported as missing, since only
    their own code can fill them. A module whose low-rank kernel remembers nothing has the state dict of the original
    module, and loads strictly into it; what a checkpoint holds for another kernel it leaves out, and says so. A module
    without ``attention`` ignores its entries in a checkpoint.
    """

    attention: ScatterbrainAttention | None

    def _is_of_original(self, state_dict: dict[str, Any], prefix: str, missing_keys: list[str]) -> bool:
        """Whether ``state_dict``, which has no entries of ``attention``, is a checkpoint of the original module.
        ``prefix`` is this module's; ``missing_keys`` are those of modules that were loaded before it."""
        raise NotImplementedError(
            f"{type(self).__name__} must define _is_of_original(state_dict, prefix, missing_keys)"
        )

    def _device_of(self, state_dict: dict[str, Any], prefix: str) -> torch.device:
        """The device of a checkpoint's entries for this module, or else of any other that it is shown. Entries may be
        anything, such as the extra state of a module."""
        tensors = {name: entry for name, entry in state_dict.items() if isinstance(entry, Tensor)}
        own = (tensor for name, tensor in tensors.items() if name.startswith(prefix))
        first = next(own, next(iter(tensors.values()), None))
        return torch.device("cpu") if first is None else first.device

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
            device = self._device_of(state_dict, prefix)
            state_dict.update(self.attention.state_for_original(inner, device))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)


def attention_unless_exact(
    num_heads: int, head_dim: int, pairs: Pairs, exact_queries: int = 0, num_kv_heads: int | None = None
) -> ScatterbrainAttention | None:
    """The attention of a host module; None for ``support=Full()`` (and no other ``causal_support``), where the host's
    own exact attention runs.

    Raises:
        TypeError, ValueError: for supports or low-rank kernels that do not fit together or the heads.
    """
    pairs.check()
    if pairs.is_exact:
        return None
    support, low_rank, causal_support, causal_low_rank = pairs
    kernels = {"low_rank": low_rank, "causal_low_rank": causal_low_rank, "causal_support": causal_support}
    return ScatterbrainAttention(num_heads, head_dim, num_kv_heads, support, exact_queries=exact_queries, **kernels)
