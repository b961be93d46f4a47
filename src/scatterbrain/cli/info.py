"""``scatterbrain info``: what is installed, how it was built, and what it runs on. Needs torch alone."""

from __future__ import annotations

import argparse
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import torch

import scatterbrain
from scatterbrain import _build_info


def info(arguments: Sequence[str] = ()) -> int:
    """Print versions, compiled architectures, the instruction set in use and the devices, one fact per line.

    Args:
        arguments: Command line after ``scatterbrain info``; there are no options but ``--help``.

    Returns:
        The exit code, 0.
    """
    summary = "Print versions, compiled architectures, the instruction set in use and the devices."
    argparse.ArgumentParser(prog="scatterbrain info", description=summary).parse_args(arguments)
    facts = collect()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")
    return 0


def collect() -> dict[str, str]:
    """The facts that :func:`info` prints, by name, in printing order."""
    build = f"{_build_info.compiler}, C++{_build_info.cpp_standard // 100 % 100}, torch {_build_info.torch_version}"
    architectures = ", ".join(_build_info.cuda_architectures)
    facts = {
        "scatterbrain": scatterbrain.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "built with": build,
        "instruction sets compiled": ", ".join(_build_info.instruction_sets),
        "instruction set in use": torch.ops.scatterbrain.instruction_set(),
        "CUDA architectures compiled": architectures or "none (CPU-only build)",
        "threads": f"{torch.get_num_threads()} of torch's own pool",
        "cpu": f"{_cpu_name()}, {os.cpu_count()} logical cores",
    }
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        facts[f"cuda:{index}"] = f"{device.name}, compute capability {device.major}.{device.minor}, {memory:.0f} GiB"
    return facts


def _cpu_name() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.machine()
