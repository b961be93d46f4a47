"""What tables of bad calls share: a well-formed call to be changed in one place, and what a refusal must say."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import testkit
from torch import Tensor

import scatterbrain as sb

B, H, KV, N, D = 2, 4, 2, 40, 8
NONE = sb.Window(8)
STORED = sb.Quadratic(4)

statistics = partial(testkit.fitted, 4, kv_heads=KV)
projections = partial(testkit.projections, 4, heads=H, kv_heads=KV)


def qkv(**changed: object) -> tuple:
    tensors = dict(zip(("query", "key", "value"), testkit.qkv(N, heads=H, kv_heads=KV))) | changed
    return tuple(tensors.values())


def numpy() -> Any:
    """For values of its types."""
    return pytest.importorskip("numpy")


def attend(*args: object, **kwargs: object) -> Tensor:
    given = dict(support=NONE, low_rank=None) | kwargs
    return sb.attention(*(args or qkv()), **given)


def assert_refused(call: Callable[[], object], error: type | tuple[type, ...], words: str) -> None:
    """That the call raises this error, whose message holds these words, in this order."""
    with pytest.raises(error) as raised:
        call()
    assert re.search(words, str(raised.value), re.DOTALL), str(raised.value)
