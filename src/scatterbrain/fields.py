"""Fields of supports, low-rank kernels and what they run with: their checks, and how they are shown."""

from __future__ import annotations

import reprlib
import sys
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from scatterbrain.operators.tracing import is_readable

INT32_MAX = 2**31 - 1  # the kernels count keys, queries and features in 32 bits
SEED_MAX = 2**32 - 1  # torch's generator on the CPU takes no more bits: a larger seed would draw what another one draws


def repr_of(owner: Any, if_set: tuple[str, ...]) -> str:
    """A dataclass as its own repr has it, without the fields ``if_set`` where they have their defaults."""
    shown = [f.name for f in fields(owner) if f.name not in if_set or getattr(owner, f.name) != f.default]
    return f"{type(owner).__name__}({', '.join(f'{name}={getattr(owner, name)!r}' for name in shown)})"


def check_int(owner: str, name: str, value: object, low: int, high: int = INT32_MAX) -> None:
    """An int from ``low`` to ``high``.

    Raises:
        TypeError, ValueError: naming the owner and the field.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}: {name} must be an int, got {value!r} of type {type(value).__name__}")
    if value < low:
        raise ValueError(f"{owner}: {name} must be at least {low}, got {value}")
    if value > high:
        raise ValueError(f"{owner}: {name} must be at most {high}, got {value}")


def not_a_bool(name: str, value: object, cure: str = "") -> TypeError | None:
    """The error for anything but True and False; numpy has a bool of its own. ``name`` with its owner."""
    if isinstance(value, bool):
        return None
    cls = type(value)
    if cls.__name__.startswith("bool"):
        cure = "convert it with bool()"
    module = "" if cls.__module__ in ("builtins", "torch") else f"{cls.__module__}."
    return TypeError(f"{name} must be a bool, got {module}{cls.__name__}{cure and f'; {cure}'}")


def check_str(owner: str, name: str, value: object) -> None:
    """A string; which ones, the owner says.

    Raises:
        TypeError: naming the owner and the field.
    """
    if not isinstance(value, str):
        raise TypeError(f"{owner}: {name} must be a string, got {value!r} of type {type(value).__name__}")


def check_number(owner: str, name: str, value: object) -> None:
    """A finite int or float.

    Raises:
        TypeError, ValueError: naming the owner and the field.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}: {name} must be a number, got {type(value).__name__}")
    if not abs(value) <= sys.float_info.max:
        raise ValueError(f"{owner}: {name} must be finite, got {reprlib.repr(value)}")


def check_floats(owner: str, tensors: dict[str, object]) -> None:
    """Floating-point tensors on one device.

    Raises:
        TypeError, ValueError: naming the owner and the field.
    """
    device = None
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{owner}: {name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{owner}: {name} must be a floating-point tensor, got {tensor.dtype}; convert it")
        device = tensor.device if device is None else device
        if tensor.device != device:
            raise ValueError(
                f"{owner}: tensors must be on one device, got {next(iter(tensors))} on {device} and {name} on "
                f"{tensor.device}; move them with .to(device)"
            )


def check_finite(owner: str, name: str, tensor: Tensor) -> None:
    """A tensor without NaN and infinity, where its content can be looked at.

    Raises:
        ValueError: naming the owner and the field.
    """
    if is_readable(tensor) and not bool(torch.isfinite(tensor).all()):
        raise ValueError(
            f"{owner}: {name} must be finite, got NaN or infinity; fit it again, on inputs without them and in a dtype "
            "that holds its values"
        )
