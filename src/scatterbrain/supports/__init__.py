"""Supports: which keys each query attends to exactly, one file each.

All of them are one form: queries come in blocks of ``block_q`` that share a list of keys, a contiguous window or
gathered blocks of ``block_k`` consecutive keys. Everything is counted from a row's first token that is not padding.
Frozen dataclasses, validated on construction, usable from YAML.

An own support is a frozen dataclass derived from :class:`Support` that defines ``kind`` and ``lists``. It works in
every function and module; :func:`register` lets configuration files and the benchmark find it by its kind.
"""

from scatterbrain.supports.base import (
    SUPPORTS,
    BlockLists,
    OperatorRouting,
    Support,
    check_support,
    register,
    takes_keys,
)
from scatterbrain.supports.blocks import Blocks
from scatterbrain.supports.empty import Empty
from scatterbrain.supports.full import Full
from scatterbrain.supports.lsh import LSH
from scatterbrain.supports.routed import Routed
from scatterbrain.supports.window import Window

for _support in (Full, Empty, Window, Routed, LSH, Blocks):
    register(_support)

__all__ = [
    "SUPPORTS",
    "BlockLists",
    "OperatorRouting",
    "Support",
    "check_support",
    "register",
    "takes_keys",
    "Full",
    "Empty",
    "Window",
    "Routed",
    "LSH",
    "Blocks",
]
