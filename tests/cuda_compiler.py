"""nvcc and what it makes of the kernels: PTX for the architectures that a build has by default, made once for all
tests, and what ptxas makes of that."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

from build_cache import contents, digest, made_once

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "build" / "ptx"
ARCHITECTURES = ("80", "90")
TARGETS = tuple(f"compute_{architecture}" for architecture in ARCHITECTURES)
LOW_RANKS = ("none", "quadratic", "features", "centroid")  # of csrc/params.h
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
NEEDS_NVCC = "needs nvcc: none on PATH, in /usr/local/cuda/bin or of the package nvidia-cuda-nvcc"


@cache
def nvcc() -> str | None:
    """On PATH, of the system, or of the package that the extra `test` installs."""
    packages = (path for entry in sys.path for path in Path(entry).glob("nvidia/cu*/bin/nvcc"))
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc") or next(map(str, packages), None)


@cache
def compiler_version() -> str:
    return subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True).stdout


def release() -> str:
    """Such as 13.0."""
    found = re.search(r"release (\d+\.\d+)", compiler_version())
    return found[1] if found else compiler_version()


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return done.stderr


def ptx_file(source: Path, target: str) -> Path:
    """nvcc's PTX of a source."""
    flags = ["-std=c++20", "-O3", "-lineinfo", "-ptx", f"-arch={target}"]
    key = digest(*contents(source), *flags, compiler_version())
    return made_once(
        CACHE / f"{source.stem}-{target}-{key}.ptx",
        lambda path: _run([str(nvcc()), *flags, str(source), "-o", str(path)]),
    )


def of_all_sources(function: object) -> list[object]:
    """function(source, architecture) for all of them, on two cores."""
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or 2)) as pool:
        return list(pool.map(lambda job: function(*job), [(s, a) for s in SOURCES for a in ARCHITECTURES]))


# -------------------- names


def kernel_names(mangled: Sequence[str]) -> list[str]:
    """Kernels with the element type and the type of their sums, or their width and the kind of the low-rank part."""
    lines = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    names = []
    for line in lines.splitlines():
        name = re.sub(r"\((?:sb::)?LowRank\)(\d)", lambda kind: LOW_RANKS[int(kind[1])], line)
        name = re.sub(r"sb::cuda::|sb::|^void |\(.*\)$|_kernel", "", name)
        names.append(name.replace("Bfloat16", "bfloat16").replace("Half", "float16"))
    return names


def kernel_name(mangled: str) -> str:
    return kernel_names([mangled])[0]


# -------------------- machine code


class Needs(NamedTuple):
    """Of a thread."""

    registers: int
    spilled: int  # bytes stored and loaded


def needs_by_symbol(source: Path, architecture: str) -> dict[str, Needs]:
    """What ptxas, which finishes what nvcc begins, says of the kernels of a source."""
    ptx = ptx_file(source, f"compute_{architecture}")
    ptxas = str(Path(str(nvcc())).resolve().with_name("ptxas"))
    command = [ptxas, "-O3", "-v", f"-arch=sm_{architecture}", str(ptx), "-o", os.devnull]
    said = made_once(ptx.with_suffix(".txt"), lambda path: path.write_text(_run(command))).read_text()
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        said,
        re.DOTALL,
    )
    return {symbol: Needs(int(used), int(stores) + int(loads)) for symbol, stores, loads, used in found}
