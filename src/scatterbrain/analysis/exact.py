"""Exact attention of a captured call in plain torch: what approximations are measured against."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from scatterbrain.analysis.layer_call import LayerCall

ROWS = 256  # queries at a time, so that their weights need little memory


class Exact(NamedTuple):
    """Args:
    out: (B, Hq, N, dv) float32 (float64 for float64 tokens).
    lse: (B, Hq, N), log of each query's total weight; -inf where it sees no key.
    entropy: (B, Hq, N) of the softmax weights, in nats.
    """

    out: Tensor
    lse: Tensor
    entropy: Tensor


def exact(call: LayerCall) -> Exact:
    """Quadratic in the tokens."""
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    group = call.query.shape[1] // call.key.shape[1]
    key, value = (t.to(dtype).repeat_interleave(group, 1) for t in (call.key, call.value))
    parts = []
    for first in range(0, call.query.shape[2], ROWS):
        query = call.query[:, :, first : first + ROWS].to(dtype) * call.scale
        hidden = hidden_keys(call, first, query.shape[2])
        scores = query @ key.transpose(-1, -2)
        if hidden is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        lse = scores.logsumexp(-1)
        weights = (scores - lse.nan_to_num(neginf=0.0)[..., None]).exp()
        # Weights of zero have no entropy, and their scores may be infinite.
        entropy = lse.nan_to_num(neginf=0.0) - (weights * scores.nan_to_num(neginf=0.0)).sum(-1)
        parts.append((_values(weights, value, call.key_padding_mask), lse, entropy))
    return Exact(*(torch.cat(some, 2) for some in zip(*parts)))


def _values(weights: Tensor, value: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    if key_padding_mask is not None:  # what padding holds may be no number
        value = value.masked_fill(key_padding_mask[:, None, :, None], 0)
    return weights @ value


def hidden_keys(call: LayerCall, first: int, count: int) -> Tensor | None:
    """Which keys ``count`` queries from ``first`` on may not see: bool, for (B, Hq, count, M); None: they see all."""
    hidden = None
    if call.key_padding_mask is not None:
        hidden = call.key_padding_mask[:, None, None, :]
    if call.is_causal:
        device = call.query.device
        offset = torch.as_tensor(call.query_offset, device=device).reshape(-1, 1, 1, 1)
        position = torch.arange(first, first + count, device=device)[:, None] + offset
        later = torch.arange(call.key.shape[2], device=device) > position
        hidden = later if hidden is None else hidden | later
    return hidden


def by_torch(call: LayerCall) -> object:
    """Torch's own kernel on the call, as a function to be timed; masks are made beforehand."""
    has_offset = not isinstance(call.query_offset, int) or call.query_offset != 0
    plain = call.key_padding_mask is None and not has_offset
    hidden = None if plain else hidden_keys(call, 0, call.query.shape[2])
    mask = None if hidden is None else ~hidden
    is_causal = call.is_causal and plain
    grouped = call.query.shape[1] != call.key.shape[1]

    def run() -> Tensor:
        return F.scaled_dot_product_attention(
            call.query, call.key, call.value, mask, 0.0, is_causal, scale=call.scale, enable_gqa=grouped
        )

    return run
