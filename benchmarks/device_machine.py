"""Where the steps of benchmarks/device.sh run the kernels."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from functools import cached_property
from typing import Any

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, "tests"))

import torch
from torch import Tensor

RANK = 9
DIRECTIONS = ("F", "F+B")
Place = Callable[[Any], Any]  # puts a tensor, or what holds some, onto a machine's device


class Machine:
    """Where the kernels run: a CUDA device, or the emulator, with smaller sizes.

    Attributes:
        tell: takes what is run next, so that whoever waits knows what did not return.
    """

    def __init__(self, name: str) -> None:
        self.device = torch.device("cuda" if name == "cuda" else "cpu")
        self.tell: Callable[[dict[str, str]], None] = lambda message: None
        if name == "cuda" and not torch.cuda.is_available():
            raise SystemExit("device.py: torch finds no CUDA device; --device emulator runs the kernels on the CPU")

    def running(self) -> contextlib.AbstractContextManager:
        """Inside, operators on tensors of the machine run the CUDA kernels."""
        return contextlib.nullcontext() if self.is_real else self._emulator.installed()

    @cached_property
    def _emulator(self) -> Any:
        from emulated import Emulator, build

        return Emulator(build())

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def place(self, given: Any) -> Any:
        """A tensor or what a low-rank kernel runs with, there."""
        return given if given is None else given.to(self.device)

    @property
    def is_real(self) -> bool:
        return self.device.type == "cuda"


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"
