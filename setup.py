"""Compiles the two extension modules; everything else about the package is in pyproject.toml.

scatterbrain._C           the operators, on torch's stable ABI: one library serves torch 2.11 and newer. It is no Python
                          module (no PyInit, no Python.h): src/scatterbrain/operators/library.py loads it with
                          torch.ops.load_library.
scatterbrain._build_info  what was built how; pybind11, without torch headers, since pybind11 does not compile under the
                          limited API.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import runpy
import sys
import warnings
from glob import glob
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))

from toolchain import CudaPlan, compile_jobs, cuda_runtime, plan_cuda
from torch_environment import require_torch

BUILD_INFO_SOURCE = "csrc/build_info.cpp"
SOURCES = {path for folder in ("csrc", "csrc/cpu") for path in glob(f"{folder}/*.cpp", root_dir=ROOT)}
WITHOUT_CUDA = "csrc/without_cuda.cpp"
OPERATOR_SOURCES = sorted(SOURCES - {BUILD_INFO_SOURCE, WITHOUT_CUDA})
# Kernels that a build may leave out, by the macro that says so.
LEFT_OUT = {
    "SB_WITHOUT_AVX512": sorted(glob("csrc/cpu/kernels_avx512*.cpp", root_dir=ROOT)),
    "SB_WITHOUT_AVX2": sorted(glob("csrc/cpu/kernels_avx2*.cpp", root_dir=ROOT)),
}
CUDA_SOURCES = sorted(glob("csrc/cuda/*.cu", root_dir=ROOT))
CUDA_LAUNCHERS = sorted(glob("csrc/cuda/*.cpp", root_dir=ROOT))
HEADERS = sorted(
    path for pattern in ("h", "cuh") for path in glob(f"csrc/**/*.{pattern}", root_dir=ROOT, recursive=True)
)

# Kernel files choose their instruction set themselves (#pragma GCC target, #pragma clang attribute), so that one build
# runs on every machine of the architecture: no -march here. -Wno-psabi: compilers remark on vector types passed between
# functions of one file.
CXX_FLAGS = ["-std=c++20", "-O3", "-fvisibility=hidden", "-fvisibility-inlines-hidden"]
CXX_FLAGS += ["-Wall", "-Wextra", "-Wno-psabi"]
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fvisibility=hidden"]
TORCH_TARGET_VERSION = "0x020b000000000000"  # 2.11
# SCATTERBRAIN_SANITIZE: a library that ends the process at the first error, for tests/fuzz.py. Checks are calls, the
# optimizer does little, and what a processor traps by itself is not checked: the build takes minutes as it is.
SANITIZERS = {
    "address": [
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "--param=asan-instrumentation-with-call-threshold=0",
        "-fno-sanitize=null,pointer-overflow,object-size,alignment,vptr",
        "-fno-wrapv",  # which Python asks for, and which leaves no overflow to report
    ],
    "thread": ["-fsanitize=thread", "-fno-sanitize-recover=all"],
}
SANITIZER = os.environ.get("SCATTERBRAIN_SANITIZE")
if SANITIZER and SANITIZER not in SANITIZERS:
    sys.exit(f"SCATTERBRAIN_SANITIZE: expected {' or '.join(SANITIZERS)}, or nothing, got {SANITIZER!r}.")
SANITIZER_FLAGS = SANITIZERS[SANITIZER] if SANITIZER else []
# Away from other builds, which would take its objects and libraries for theirs.
BUILD_FOLDER = Path("build", f"{SANITIZER}-sanitizer") if SANITIZER else Path("build")

# Without build isolation nothing else compares the installed setuptools with what pyproject.toml requires.
if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(
        f"scatterbrain is built with setuptools 77 or newer, and {setuptools.__version__} is installed: "
        "upgrade it (pip install --upgrade setuptools), or build with isolation."
    )


def left_out() -> list[str]:
    """Macros of LEFT_OUT. A sanitized library runs where it is built, and its kernels take minutes to compile: it is
    without those for AVX-512 where the processor has none, and threads do the same whatever kernel they run."""
    import torch

    if SANITIZER == "thread":
        return list(LEFT_OUT)
    return ["SB_WITHOUT_AVX512"] if SANITIZER and torch.backends.cpu.get_cpu_capability() != "AVX512" else []


def operator_sources() -> list[str]:
    """Sources of the operators on the CPU."""
    without = {path for macro in left_out() for path in LEFT_OUT[macro]}
    return [path for path in OPERATOR_SOURCES if path not in without]


def compiled_instruction_sets() -> tuple[str, ...]:
    """Instruction sets that the kernel sources select, best first."""
    text = "".join((ROOT / path).read_text() for path in operator_sources() if path.startswith("csrc/cpu/"))
    targets = " ".join(re.findall(r"#pragma GCC target\s*\(([^)]*)\)", text))
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    sets = {"avx512_bf16": "avx512bf16", "avx512": "avx512f", "avx2": "avx2"}
    return (*(name for name, target in sets.items() if on_x86 and target in targets), "baseline")


def system_includes(folders: list[str]) -> list[str]:
    """Headers of others are system headers: their warnings are not ours."""
    return [flag for folder in folders for flag in ("-isystem", folder)]


def hidden_folders(folders: list[str]) -> list[str]:
    """Macros of included headers name their file in error messages. Cuts the names to what is below the source folder
    or the include folder: whoever uses a wheel does not have the folders of the machine that built it."""
    outermost = [folder for folder in folders if not any(folder.startswith(f"{other}/") for other in folders)]
    return [f"-fmacro-prefix-map={folder}/=" for folder in (ROOT, *outermost)]  # the last one that fits is taken


def cxx_flags() -> list[str]:
    # Python's own flags ask for debug information, which makes the library ten times larger; CFLAGS=-g keeps it.
    own = os.environ.get("CFLAGS", "").split() + os.environ.get("CXXFLAGS", "").split()
    if SANITIZER:  # with the lines that reports name; what checks hide from the compiler looks uninitialized to it
        return CXX_FLAGS + SANITIZER_FLAGS + ["-O1", "-g1", "-fno-omit-frame-pointer", "-Wno-maybe-uninitialized"]
    return CXX_FLAGS + ([] if any(flag.startswith("-g") for flag in own) else ["-g0"])


def operator_extension(plan: CudaPlan) -> Extension:
    from torch.utils.cpp_extension import CppExtension, include_paths

    macros = [("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)]
    includes = include_paths()
    sources = operator_sources()
    macros += [(macro, None) for macro in left_out()]
    extension = CppExtension(
        "scatterbrain._C", sources, include_dirs=[str(ROOT / "csrc")], depends=HEADERS, py_limited_api=True
    )
    cuda_includes = []
    if plan.home:
        # No flag: objects of the other sources are then those of a build without CUDA, and are not compiled again.
        cuda_includes = [str(plan.home / "include")]
        before = os.environ.get("CPLUS_INCLUDE_PATH")
        os.environ["CPLUS_INCLUDE_PATH"] = os.pathsep.join([*cuda_includes, *([before] if before else [])])
        extension.sources += CUDA_SOURCES + CUDA_LAUNCHERS
        extension.libraries.append("torch_cuda")
        extension.extra_link_args.append(str(cuda_runtime(plan.home)))
    else:
        extension.sources.append(WITHOUT_CUDA)
    extension.include_dirs = [folder for folder in extension.include_dirs if folder not in includes]
    extension.define_macros += macros
    extension.extra_compile_args = {
        "cxx": cxx_flags() + system_includes(includes) + hidden_folders(includes),
        "nvcc": NVCC_FLAGS + [f"-Xcompiler={flag}" for flag in hidden_folders(includes + cuda_includes)],
    }
    extension.extra_link_args += SANITIZER_FLAGS
    return extension


def build_info_extension(plan: CudaPlan, torch_version: str) -> Extension:
    import pybind11

    includes = [pybind11.get_include()]
    facts = {
        "VERSION": runpy.run_path(str(ROOT / "src" / "scatterbrain" / "version.py"))["__version__"],
        "TORCH_VERSION": torch_version,
        "INSTRUCTION_SETS": ",".join(compiled_instruction_sets()),
        "CUDA_ARCHITECTURES": ",".join(plan.architectures),
    }
    return Extension(
        "scatterbrain._build_info",
        [BUILD_INFO_SOURCE],
        define_macros=[(f"SCATTERBRAIN_{name}", f'"{value}"') for name, value in facts.items()],
        extra_compile_args={"cxx": cxx_flags() + system_includes(includes) + hidden_folders(includes)},
        language="c++",
    )


def use_ninja() -> bool:
    """Whether ninja can run; a copy installed as a Python package need not be on PATH."""
    try:
        import ninja
    except ImportError:
        pass
    else:
        os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])
    from torch.utils.cpp_extension import is_ninja_available

    return is_ninja_available()


class BuildExtensions(build_ext):
    """Compiles with torch's BuildExtension. torch is imported here only: metadata and source distributions need none.

    setuptools wants the command's class before torch may be imported, hence a second command that does the work.
    """

    def run(self) -> None:
        require_torch()
        warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
        import torch

        plan = plan_cuda(CUDA_SOURCES, torch.version.cuda, os.environ)
        print(plan.message, flush=True)
        os.environ["MAX_JOBS"] = str(compile_jobs(os.environ))
        if plan.home:
            os.environ["CUDA_HOME"] = str(plan.home)
            os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(plan.architectures)
        # A machine that only compiles has no GPU; torch's warning about that says nothing about the build.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        from torch.utils.cpp_extension import BuildExtension

        build = BuildExtension(self.distribution, use_ninja=use_ninja())
        self.distribution.ext_modules = [operator_extension(plan), build_info_extension(plan, torch.__version__)]
        build.inplace = self.inplace
        build.editable_mode = self.editable_mode
        build.build_lib = self.build_lib
        # One place for every kind of build, also editable ones, so that all of them compile incrementally.
        build.build_temp = str(BUILD_FOLDER / f"{sys.implementation.cache_tag}-torch{torch.__version__}")
        build.debug = self.debug
        build.force = self.force
        build.ensure_finalized()
        build.run()


setup(
    options={"build": {"build_base": str(BUILD_FOLDER)}},
    ext_modules=[
        Extension("scatterbrain._C", OPERATOR_SOURCES, depends=HEADERS, py_limited_api=True),
        Extension("scatterbrain._build_info", [BUILD_INFO_SOURCE]),
    ],
    cmdclass={"build_ext": BuildExtensions},
)
