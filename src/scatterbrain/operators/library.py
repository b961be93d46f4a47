"""Loads the compiled operators, once, and checks the instruction set that the environment asks for."""

from __future__ import annotations

import os
from pathlib import Path

import torch

ISA_VARIABLE = "SCATTERBRAIN_ISA"
PACKAGE = Path(__file__).parent.parent


def _load() -> None:
    libraries = sorted(PACKAGE.glob("_C*.so")) + sorted(PACKAGE.glob("_C*.pyd"))
    if not libraries:
        raise ImportError(
            f"scatterbrain: the compiled operators are missing, expected _C*.so in {PACKAGE}; build them "
            f"there with `pip install -e .` in the source folder, or, after `pip install .`, take {PACKAGE.parent} off "
            "the import path, where it hides the installed package"
        )
    torch.ops.load_library(str(libraries[0]))
    wanted = os.environ.get(ISA_VARIABLE)
    used = torch.ops.scatterbrain.instruction_set()
    if wanted and wanted != used:
        raise ImportError(
            f"scatterbrain: {ISA_VARIABLE}={wanted!r} is not available here; expected one of avx512_bf16, "
            f"avx512, avx2, baseline that this processor has (best: {used})"
        )


_load()
