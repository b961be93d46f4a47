"""What modules of other packages have in common once a :class:`ScatterbrainAttention` lives inside them."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from scatterbrain.low_rank import Quadratic
from scatterbrain.nn.attention import ScatterbrainAttention


class HostModule:
    """Mixin, before an nn.Module: a submodule ``attention`` that the original's checkpoints know nothing of.

    A checkpoint of the original loads strictly. Calibrated statistics are then forgotten, since they belong to the
    weights they were fitted with; learned projections stay. ``state_dict`` leaves the entries of ``attention`` out where
    there is nothing to remember, so that it loads strictly into the original.
    """

    attention: ScatterbrainAttention

    def _is_of_original(self, state_dict: dict[str, Any], prefix: str) -> bool:
        """Whether ``state_dict``, without entries of ``attention``, has those of the original; ``prefix`` is this
        module's."""
        raise NotImplementedError

    def _attach(self, attention: ScatterbrainAttention) -> None:
        self.attention = attention
        self._warned: set[str] = set()

    def _detach(self) -> None:
        del self.attention, self._warned

    def _warn_exact(self, obstacle: str) -> None:
        """Warns, once per module and reason, that a call runs exact attention."""
        if obstacle not in self._warned:
            self._warned.add(obstacle)
            _warn(f"{type(self).__name__} runs exact attention, without approximation: {obstacle}.")

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:
        """As nn.Module.state_dict, without entries for an attention that has nothing to remember: no low-rank state, or
        statistics not calibrated yet."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        if not remembers(self.attention):
            for name in [name for name in state if name.startswith(f"{prefix}attention.")]:
                del state[name]
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        inner = f"{prefix}attention."
        if not any(name.startswith(inner) for name in state_dict) and self._is_of_original(state_dict, prefix):
            if isinstance(self.attention.low_rank, Quadratic) and self.attention.is_calibrated:
                self.attention.reset_parameters()
            state_dict.update(self.attention.state_dict(prefix=inner))
        super()._load_from_state_dict(state_dict, prefix, *args)


def remembers(attention: ScatterbrainAttention) -> bool:
    """Whether ``attention`` has state that a checkpoint must hold."""
    if isinstance(attention.low_rank, Quadratic) and attention.low_rank.statistics == "stored":
        return attention.is_calibrated
    return next(iter((*attention.parameters(), *attention.buffers())), None) is not None


@torch.compiler.assume_constant_result
def _warn(message: str) -> None:
    """Warns; under torch.compile once, when the call is traced."""
    warnings.warn(message, stacklevel=4)
