"""Options of a built model that change how it runs and not what it computes: recomputed blocks, compiled graphs."""

from __future__ import annotations

import torch
from torch import nn

from scatterbrain.training.config import TrainConfig


def apply_options(model: nn.Module, train: TrainConfig, device: torch.device) -> None:
    """Sets ``train.recompute`` and ``train.compile`` in a model.

    Raises:
        ValueError: naming the key: a model without blocks that can be recomputed, or a machine without a compiler.
    """
    if train.recompute:
        _recompute_blocks(model)
    if train.compile:
        check_compiler(device)
        model.compile()


def _recompute_blocks(model: nn.Module) -> None:
    stacks = [module for module in model.modules() if hasattr(module, "recompute")]
    if not stacks:
        raise ValueError(
            f"train.recompute: expected a model whose blocks can be computed again, got {type(model).__name__}, which "
            "has none; leave it out"
        )
    for stack in stacks:
        stack.recompute = True


def check_compiler(device: torch.device) -> None:
    """Compiles one small function.

    Raises:
        ValueError: naming ``train.compile``, where torch.compile finds no compiler for the device.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(2, device=device))
    except RuntimeError as error:
        needs = "Triton" if device.type == "cuda" else "a C++ compiler"
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(
            f"train.compile: expected what torch.compile needs here, {needs}, got: {reason}; install it, or leave "
            "train.compile out"
        ) from error
