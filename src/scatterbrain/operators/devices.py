"""Devices that this copy of scatterbrain has kernels for."""

from __future__ import annotations

import functools
import re

import torch
from torch import Tensor

from scatterbrain._build_info import cuda_architectures
from scatterbrain.operators.tracing import is_untraced

COMPILED: tuple[str, ...] = cuda_architectures  # entries of TORCH_CUDA_ARCH_LIST
WIDEST_ON_CUDA = 256  # head_dim, and width of values
_OLDEST = (8, 0)  # compute capability


def check_device(query: Tensor, value: Tensor | None = None) -> None:
    """That kernels for the tokens' device are here and take tokens of this width, before any runs. What a trace cannot
    know, the operators check when it runs.

    Raises:
        RuntimeError: no kernels for the device. ValueError: tokens too wide for them.
    """
    if query.is_cpu or query.is_meta or not is_untraced():
        return
    if query.device.type != "cuda":
        raise RuntimeError(
            f"scatterbrain has kernels for CPU and CUDA devices, got tensors on {query.device}; move them there"
        )
    problem = _problem_of_build() or _problem_of_gpu(query.device)
    if problem:
        raise RuntimeError(problem)
    for name, width in (("query", query.shape[3]), ("value", 0 if value is None else value.shape[3])):
        if width > WIDEST_ON_CUDA:
            raise ValueError(
                f"{name} must be at most {WIDEST_ON_CUDA} wide on a CUDA device, got {width}; use more and "
                "narrower heads, or the CPU"
            )


def _problem_of_build() -> str:
    if COMPILED:
        return ""
    return (
        "expected a build of scatterbrain with CUDA kernels for tensors on a CUDA device, and this one has none (see "
        "`scatterbrain info`); install it again where nvcc of torch's CUDA version is "
        f"({torch.version.cuda or 'and a torch with CUDA'}): FORCE_CUDA=1 pip install --force-reinstall --no-deps "
        "--no-build-isolation ., which says what is missing, or move the tensors to the CPU"
    )


@functools.lru_cache(maxsize=64)
def _problem_of_gpu(device: torch.device) -> str:
    capability = torch.cuda.get_device_capability(device)
    number = "{}.{}".format(*capability)
    if capability < _OLDEST:
        return (
            f"scatterbrain's CUDA kernels need compute capability {_OLDEST[0]}.{_OLDEST[1]} or newer (Ampere), and "
            f"{device}, {torch.cuda.get_device_name(device)}, has {number}; use another GPU, or the CPU"
        )
    if not any(runs_on(architecture, capability) for architecture in COMPILED):
        return (
            f"this build of scatterbrain has kernels for {', '.join(COMPILED)}, and these do not "
            f"run on {device}, {torch.cuda.get_device_name(device)}, of {number}; install it again with "
            f"TORCH_CUDA_ARCH_LIST={number}"
        )
    return ""


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether what is compiled for an entry of TORCH_CUDA_ARCH_LIST runs on a GPU of this capability: machine code on
    newer ones of the same major version, PTX on everything newer. Entries without a number are trusted."""
    found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", architecture)
    if found is None:
        return True
    compiled = int(found[1]), int(found[2])
    if found[3] == "a":
        return compiled == capability
    return (compiled[0] == capability[0] or found[4] is not None) and compiled <= capability
