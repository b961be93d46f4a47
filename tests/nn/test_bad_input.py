"""Modules that cannot be, and calls and calibrations that do not fit them, are refused with what came and the cure."""

from __future__ import annotations

import math

import pytest
import torch
from bad_calls import KV, NONE, STORED, B, D, H, N, assert_refused, numpy, qkv
from testkit import rand
from torch import nn

import scatterbrain as sb

# id: (call, error, words that the message holds, in this order)
CALLS = {
    # modules, on construction
    "module without heads": (
        lambda: sb.ScatterbrainAttention(0, 8),
        ValueError,
        "num_heads must be a positive int, got 0",
    ),
    "module of a float": (
        lambda: sb.ScatterbrainAttention(4, 8.0),
        (TypeError, ValueError),
        "head_dim must be a positive int, got 8.0",
    ),
    "module heads": (
        lambda: sb.ScatterbrainAttention(4, 16, 3),
        ValueError,
        "num_heads must be a multiple of num_kv_heads, got 4 and 3",
    ),
    "module rank": (
        lambda: sb.ScatterbrainAttention(4, 8, low_rank=sb.Quadratic(9)),
        ValueError,
        "rank must be at most head_dim=8, got 9",
    ),
    "module support": (
        lambda: sb.ScatterbrainAttention(4, 16, support="window"),
        TypeError,
        "support must be one of.*got str",
    ),
    "module nothing left": (
        lambda: sb.ScatterbrainAttention(4, 16, support=sb.Empty(), low_rank=None),
        ValueError,
        "Empty",
    ),
    "module heads past 32 bits": (
        lambda: sb.ScatterbrainAttention(2**40, 8),
        ValueError,
        "ScatterbrainAttention: num_heads must be at most 2147483647",
    ),
    # calls of a module
    "module uncalibrated": (
        lambda: sb.ScatterbrainAttention(H, D, KV, NONE, STORED)(*qkv()),
        ValueError,
        "not calibrated.*sb.calibrate",
    ),
    "module other heads": (
        lambda: sb.ScatterbrainAttention(2, D, 2, NONE, None)(*qkv()),
        ValueError,
        "expected query with 2 heads.*got 4",
    ),
    "module of 2-D tensors": (
        lambda: sb.ScatterbrainAttention(H, D, KV)(*[rand(N, D)] * 3),
        ValueError,
        r"query must be \(batch, heads, tokens, head_dim\), got shape \(40, 8\)",
    ),
    "module without keys": (
        lambda: sb.ScatterbrainAttention(H, D, KV)(qkv()[0], None, None),
        TypeError,
        "key must be a tensor, got NoneType",
    ),
    "module without values": (
        lambda: sb.ScatterbrainAttention(H, D, KV)(*qkv()[:2], None),
        TypeError,
        "value must be a tensor, got NoneType",
    ),
    "module whose is_causal is numpy's": (
        lambda: sb.ScatterbrainAttention(H, D, KV)(*qkv(), is_causal=numpy().bool_(False)),
        TypeError,
        r"is_causal must be a bool, got numpy\.bool.*; convert it with bool\(\)",
    ),
    "module redraw": (
        lambda: sb.ScatterbrainAttention(H, D, KV, NONE, None).redraw(torch.Generator()),
        ValueError,
        "redraw: only Favor",
    ),
    # calibration
    "calibrate nothing": (
        lambda: sb.calibrate(nn.Linear(2, 2)).__enter__(),
        ValueError,
        "calibrate: expected at least one ScatterbrainAttention.*found none",
    ),
    "calibrate a function": (
        lambda: sb.calibrate(len).__enter__(),
        TypeError,
        "expected an nn.Module, got builtin_function_or_method",
    ),
    "update a list": (lambda: sb.update_statistics([]), TypeError, "expected an nn.Module, got list"),
}


@pytest.mark.parametrize("name", CALLS)
def test_bad_modules_are_named(name: str) -> None:
    assert_refused(*CALLS[name])


def test_calibration_on_bad_batches_raises_and_leaves_the_module_as_it_was() -> None:
    core = sb.ScatterbrainAttention(H, D, KV, NONE, STORED)
    with pytest.raises(ValueError, match="calibration: query or key holds NaN"), sb.calibrate(core):
        core(*qkv(query=rand(B, H, N, D).fill_(math.nan)))
    assert not core.is_calibrated
    with pytest.raises(ValueError, match="no ScatterbrainAttention was run"), sb.calibrate(core):
        pass
    with pytest.raises(ValueError, match="one scale, got scale=2 after 1"), sb.calibrate(core):
        core(*qkv(), scale=1.0)
        core(*qkv(), scale=2.0)
    assert not core.is_calibrated
    with pytest.raises(ValueError, match="not calibrated"):
        core(*qkv())
    with sb.calibrate(core):
        core(*qkv())
    with pytest.raises(ValueError, match="fitted for scale=0.353553, attention runs with scale=1"):
        core(*qkv(), scale=1.0)
    other = sb.ScatterbrainAttention(H, D, KV, NONE, sb.Quadratic(3))
    with pytest.raises(
        RuntimeError, match=r"statistics of rank 4, this module rank 3; create it with Quadratic\(rank=4\)"
    ):
        other.load_state_dict(core.state_dict())
