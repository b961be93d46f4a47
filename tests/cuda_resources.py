"""Compiles the kernels for the architectures that a build has by default, and prints what they need of a device:
python tests/cuda_resources.py prints the table of docs/gpu.md."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("80", "90")
LOW_RANKS = ("none", "quadratic", "features", "centroid")  # of csrc/params.h
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def nvcc() -> str | None:
    """On PATH, of the system, or of the package that the extra `test` installs."""
    packages = (path for entry in sys.path for path in Path(entry).glob("nvidia/cu*/bin/nvcc"))
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc") or next(map(str, packages), None)


def kernel_name(mangled: str) -> str:
    """The kernel with its element type and the type of its sums, or its width and the kind of its low-rank part."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"\((?:sb::)?LowRank\)(\d)", lambda kind: LOW_RANKS[int(kind[1])], name)
    return (
        re.sub(r"sb::cuda::|sb::|^void |\(.*\)$|_kernel", "", name)
        .replace("Bfloat16", "bfloat16")
        .replace("Half", "float16")
    )


def compiled(source: Path, architecture: str) -> list[tuple[str, str, int, int]]:
    """(kernel, architecture, registers, bytes spilled) of a file's kernels."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(nvcc()), "-std=c++20", "-O3", f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
        command += ["-Xptxas=-v", "-c", str(source), "-o", f"{folder}/kernels.o"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    return [
        (kernel_name(name), architecture, int(used), int(stores) + int(loads)) for name, stores, loads, used in found
    ]


def resources() -> dict[str, dict[str, tuple[int, int]]]:
    """Registers and spilled bytes by kernel and architecture."""
    with ThreadPoolExecutor(2) as pool:
        rows = pool.map(lambda job: compiled(*job), [(s, a) for s in SOURCES for a in ARCHITECTURES])
    table: dict[str, dict[str, tuple[int, int]]] = {}
    for row in rows:
        for name, architecture, used, spilled in row:
            table.setdefault(name, {})[architecture] = used, spilled
    return dict(sorted(table.items()))


def lines(table: dict[str, dict[str, tuple[int, int]]]) -> list[str]:
    head = [
        f"| kernel | {' | '.join(f'sm_{a} registers, spilled bytes' for a in ARCHITECTURES)} |",
        "| --- | --- | --- |",
    ]
    return head + [
        f"| `{name}` | {' | '.join('{}, {}'.format(*of[a]) for a in ARCHITECTURES)} |" for name, of in table.items()
    ]


if __name__ == "__main__":
    if nvcc() is None:
        sys.exit(
            "cuda_resources.py: expected nvcc on PATH, in /usr/local/cuda/bin or of the package nvidia-cuda-nvcc, "
            "found none; install one."
        )
    print("\n".join(lines(resources())))
