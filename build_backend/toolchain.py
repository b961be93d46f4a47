"""Decides what is compiled: whether CUDA sources can be built, for which architectures, and with how many jobs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"
MEMORY_PER_JOB = 2 << 30  # bytes; one compiler process on a file that includes torch headers stays below this


class CudaUnavailable(Exception):
    """Says in one clause why CUDA sources are not compiled."""


@dataclass(frozen=True)
class CudaPlan:
    """``home`` is the toolkit to compile with, or None for a CPU-only build; ``message`` says which and why."""

    home: Path | None
    architectures: tuple[str, ...]
    message: str


def plan_cuda(sources: Sequence[str], torch_cuda: str | None, environment: Mapping[str, str]) -> CudaPlan:
    """Choose between a CUDA and a CPU-only build.

    ``sources`` are the .cu files, ``torch_cuda`` is ``torch.version.cuda``. FORCE_CUDA=0 leaves CUDA out. Raises
    SystemExit with the reason when FORCE_CUDA=1 asks for what cannot be built.
    """
    forced = environment.get("FORCE_CUDA", "")
    if forced not in ("", "0", "1"):
        raise SystemExit(f"FORCE_CUDA must be 1 (CUDA kernels or an error), 0 (none) or unset, got {forced!r}.")

    try:
        if forced == "0":
            raise CudaUnavailable("FORCE_CUDA=0 leaves CUDA kernels out")
        if not sources:
            raise CudaUnavailable("CUDA kernels are not part of this release")
        if torch_cuda is None:
            raise CudaUnavailable("the installed torch is built without CUDA")
        home = find_toolkit(environment, torch_cuda)
        cuda_runtime(home)
    except CudaUnavailable as reason:
        if forced == "1":
            raise SystemExit(f"scatterbrain: FORCE_CUDA=1, but CUDA sources cannot be compiled: {reason}.") from None
        return CudaPlan(None, (), f"scatterbrain: CPU-only build: {reason}.")
    listed = environment.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES
    architectures = tuple(listed.replace(";", " ").split())
    return CudaPlan(home, architectures, f"scatterbrain: CUDA build with {home} for {', '.join(architectures)}.")


def find_toolkit(environment: Mapping[str, str], torch_cuda: str) -> Path:
    """The folder of a CUDA toolkit of the major version of ``torch_cuda``; raises CudaUnavailable.

    CUDA_HOME and CUDA_PATH, where set, decide alone. Otherwise the first one that fits is taken, of nvcc on PATH, the
    folders /usr/local/cuda*, and the packages nvidia-cuda-nvcc and nvidia-cuda-runtime beside torch.
    """
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environment.get(variable):
            home = Path(environment[variable])
            if not (home / "bin" / "nvcc").exists():
                raise CudaUnavailable(f"{variable}={home} has no bin/nvcc")
            return _fitting(home, torch_cuda)
    reasons = []
    on_path = shutil.which("nvcc", path=environment.get("PATH", ""))
    candidates = [] if on_path is None else [Path(on_path)]
    for nvcc in [*candidates, *installed_nvcc()]:
        try:
            return _fitting(_home_of(nvcc), torch_cuda)
        except CudaUnavailable as reason:
            reasons.append(str(reason))
    raise CudaUnavailable(
        "; ".join(dict.fromkeys(reasons))
        or "no nvcc on PATH, in /usr/local/cuda* or from the package nvidia-cuda-nvcc, and CUDA_HOME is not set"
    )


def installed_nvcc() -> list[Path]:
    """Where toolkits are installed without being on PATH: those of the system, the default one and then the newest
    first, and those of Python packages."""
    system = sorted(Path("/usr/local").glob("cuda*/bin/nvcc"), key=_version_in_name, reverse=True)
    packages = [path for entry in sys.path for path in sorted(Path(entry).glob("nvidia/cu*/bin/nvcc"))]
    return [*system, *packages]


def _version_in_name(nvcc: Path) -> tuple[int, ...]:
    name = nvcc.parent.parent.name
    return (1 << 30,) if name == "cuda" else tuple(map(int, re.findall(r"\d+", name)))


def _home_of(nvcc: Path) -> Path:
    """nvcc on PATH may be a wrapper outside the toolkit, so nvcc itself is asked where it lives."""
    dryrun = _run([str(nvcc), "--dryrun", "scatterbrain.cu"])
    top = re.search(r"^#\$ TOP=(.+)$", dryrun, re.MULTILINE)
    if top is None:
        raise CudaUnavailable(f"{nvcc} --dryrun does not say where its toolkit is; set CUDA_HOME")
    return Path(top.group(1).strip()).resolve()


def _fitting(home: Path, torch_cuda: str) -> Path:
    if not (home / "include" / "cuda_runtime.h").exists():
        raise CudaUnavailable(f"the toolkit in {home} has no include/cuda_runtime.h")
    toolkit = toolkit_version(home)
    if toolkit.split(".")[0] != torch_cuda.split(".")[0]:
        raise CudaUnavailable(f"the toolkit in {home} is CUDA {toolkit}, but torch is built for CUDA {torch_cuda}")
    return home


def cuda_runtime(home: Path) -> Path:
    """The runtime library to link with. Packages have it under its versioned name alone."""
    for folder in ("lib64", "lib"):
        found = sorted((home / folder).glob("libcudart.so*"))
        if found:
            return found[0]
    raise CudaUnavailable(f"the toolkit in {home} has no libcudart.so in lib64 or lib")


def toolkit_version(home: Path) -> str:
    """Major and minor version, such as "13.0", of the toolkit in ``home``."""
    release = re.search(r"release (\d+\.\d+)", _run([str(home / "bin" / "nvcc"), "--version"]))
    if release is None:
        raise CudaUnavailable(f"{home}/bin/nvcc --version does not name a release")
    return release.group(1)


def compile_jobs(environment: Mapping[str, str]) -> int:
    """MAX_JOBS if set; otherwise the usable cores, at most 8, and fewer where memory is short."""
    wanted = environment.get("MAX_JOBS", "")
    if wanted:
        if not wanted.isdigit() or int(wanted) == 0:
            raise SystemExit(f"MAX_JOBS must be a positive integer, got {wanted!r}: unset it or give a number of jobs.")
        return int(wanted)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, 8, _available_memory() // MEMORY_PER_JOB))


def _run(command: list[str]) -> str:
    """Output and error output of ``command`` together; nvcc prints its dry run to the latter."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CudaUnavailable(f"{command[0]} cannot be run ({error.strerror})") from None
    return done.stdout + done.stderr


def _available_memory(root: Path = Path("/")) -> int:
    """Bytes of memory free for new processes, within the limits of this process's control groups; assumed plentiful
    where the system does not say."""
    try:
        meminfo = (root / "proc/meminfo").read_text()
    except OSError:
        return 16 << 30
    available = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    return min([int(available.group(1)) << 10 if available else 16 << 30, *_left_in_control_groups(root)])


def _left_in_control_groups(root: Path) -> list[int]:
    """Bytes that the control groups of this process leave it, of those that have a limit: its own, and those around it.
    A container may see its own as the root of the mount, whatever the path of the process says."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, names, reclaimable = "sys/fs/cgroup", ("memory.max", "memory.current"), "inactive_file"
        elif "memory" in controllers.split(","):
            names, reclaimable = ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_inactive_file"
            mount = "sys/fs/cgroup/memory"
        else:
            continue
        group = Path(path.lstrip("/"))
        for inner in (group, *group.parents):
            folder = root / mount / inner
            limit, used = (_number_in(folder / name, r"\A(\d+)$") for name in names)
            if limit is not None and used is not None:
                # What is only cached counts as used, and makes room for processes, as in MemAvailable.
                cached = _number_in(folder / "memory.stat", rf"^{reclaimable} (\d+)$") or 0
                left.append(max(0, limit - max(0, used - cached)))
    return left


def _number_in(file: Path, pattern: str) -> int | None:
    """What the group of ``pattern`` finds in a file; None for nothing, or no file."""
    try:
        found = re.search(pattern, file.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found.group(1)) if found else None
