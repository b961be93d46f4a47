"""What timm's attention modules have in common once a ScatterbrainAttention computes their attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from scatterbrain.checks import check_not_nested
from scatterbrain.low_rank import LowRank
from scatterbrain.nn.host_module import HostModule, attention_unless_exact, has_weight
from scatterbrain.nn.masks import padding_of
from scatterbrain.nn.pairs import LOW_RANK, SUPPORT, Pairs
from scatterbrain.supports import Support


class TimmHost(HostModule):
    """Mixin for an attention module of timm with ``num_heads``, ``head_dim`` and ``attn_drop``, before its class.

    ============================================= ==================================================================
    call                                          what happens
    ============================================= ==================================================================
    no ``attn_mask``                              approximated, whatever ``fused_attn`` is
    ``is_causal=True``                            approximated, causal; with a kernel that reads the whole sequence, as
                                                  the default does, exact, warns
    ``attn_mask`` that only hides padded tokens   approximated; rows of padded tokens are zero before the projection
    any other ``attn_mask``                       exact, warns
    ``attn_drop`` > 0 in training                 exact, warns: ``set_attention_dropout``
    ``support=Full()``                            timm's own forward; ``attention`` is None and ``low_rank`` unused
    ============================================= ==================================================================
    """

    SUPPORT: Support = SUPPORT
    LOW_RANK: LowRank = LOW_RANK
    EXACT_QUERIES = 0
    OUTPUT = "proj"  # name of the projection of the output

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._attach(
            attention_unless_exact(
                self.num_heads, self.head_dim, Pairs(self.SUPPORT, self.LOW_RANK), self.EXACT_QUERIES, kv_heads(self)
            )
        )
        if self.attention is not None and kwargs.get("device") is not None:
            self.attention.to(kwargs["device"])

    def _is_of_original(self, state_dict: dict[str, Any], prefix: str, missing_keys: list[str]) -> bool:
        return has_weight(state_dict, f"{prefix}{self.OUTPUT}")

    def _padding(self, attn_mask: Tensor | None, x: Tensor) -> Tensor | None:
        """The padded tokens (batch, tokens), True = padded, where ``attn_mask`` says nothing else. Raises ValueError
        for nested tokens."""
        if x.is_nested:
            check_not_nested(x)
        return None if attn_mask is None else padding_of(attn_mask, x.shape[0], x.shape[1])

    def _runs_exact(self, attn_mask: Tensor | None, padding: Tensor | None, is_causal: bool) -> bool:
        """Whether this call cannot be approximated; warns with the cure."""
        obstacle = None
        if self.training and self.attn_drop.p > 0:
            obstacle = (
                f"attn_drop={self.attn_drop.p} acts on attention weights in training; call "
                "sb.set_attention_dropout(model, 0.0)"
            )
        elif attn_mask is not None and (padding is None or is_causal):
            obstacle = (
                "attn_mask is more than the padding of tokens; pass none, is_causal=True alone, or a padding mask"
            )
        elif is_causal and self.attention.low_rank is not None and self.attention.low_rank.reads_input:
            obstacle = (
                f"is_causal=True, and {self.attention.low_rank} reads the whole sequence; for causal calls replace "
                "attention with another kernel, such as sb.Quadratic(), and calibrate"
            )
        if obstacle is not None:
            self._warn_exact(obstacle)
        return obstacle is not None


def kv_heads(module: nn.Module) -> int | None:
    """Heads of keys and values of an attention module; None for those of the queries."""
    return getattr(module, "num_kv_heads", None)


def dropout_note(module: nn.Module) -> str:
    """A note for the report on a module's dropout of attention weights; "" for none."""
    if module.attn_drop.p == 0:
        return ""
    return f"exact in training for its attn_drop={module.attn_drop.p}; call sb.set_attention_dropout(model, 0.0)"
