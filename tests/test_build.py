"""The build: what it compiles against, what it refuses and why, and what the built package contains."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from testkit import ROOT, run_python

import scatterbrain
from scatterbrain import _build_info
from scatterbrain.cli.info import collect

BACKEND = ROOT / "build_backend"
PACKAGE = Path(scatterbrain.__file__).parent

pytestmark = pytest.mark.skipif(not BACKEND.is_dir(), reason="needs the source tree, not only the installed package")


@pytest.fixture
def toolchain(monkeypatch):
    monkeypatch.syspath_prepend(str(BACKEND))
    import toolchain

    return toolchain


@pytest.fixture
def torch_environment(monkeypatch):
    monkeypatch.syspath_prepend(str(BACKEND))
    import torch_environment

    return torch_environment


def run_isolated(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in an interpreter without site-packages, as in an isolated build, with the backend importable."""
    changes = {"PYTHONPATH": "", "VIRTUAL_ENV": "", "CONDA_PREFIX": ""} | environment
    return run_python("-S", "-c", f"import sys; sys.path.insert(0, {str(BACKEND)!r}); {code}", *arguments, **changes)


def fake_program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def fake_toolkit(home: Path, release: str = "13.0", headers: bool = True) -> Path:
    """A toolkit whose nvcc answers --dryrun and --version, to standard error and output as the real one does."""
    answer = f"""case "$1" in
      --dryrun) echo '#$ _HERE_={home}/bin' >&2; echo '#$ TOP={home}/bin/..' >&2 ;;
      --version) echo 'Cuda compilation tools, release {release}, V{release}.1' ;;
    esac"""
    fake_program(home / "bin" / "nvcc", answer)
    if headers:
        (home / "include").mkdir()
        (home / "include" / "cuda_runtime.h").touch()
    (home / "lib64").mkdir()
    (home / "lib64" / "libcudart.so").touch()
    return home


@pytest.fixture
def no_installed_toolkit(toolchain, monkeypatch):
    monkeypatch.setattr(toolchain, "installed_nvcc", lambda: [])


# --- torch of the target environment ----------------------------------------------------------------------------------


def test_without_torch_the_build_stops_with_one_sentence(tmp_path):
    bare = fake_program(tmp_path / "bin" / "python", f'exec {sys.executable} -S "$@"')
    code = "import torch_environment as e; e.target_interpreters = lambda: [sys.argv[1]]; e.require_torch()"
    stopped = run_isolated(code, str(bare))
    assert stopped.returncode == 1
    assert stopped.stderr.count("\n") == 1 and "Traceback" not in stopped.stderr
    assert f"{bare} has none: install it first (pip install 'torch>=2.11')" in stopped.stderr


def test_torch_too_old_is_refused_with_its_version(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    metadata = tmp_path / "torch-2.9.1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.9.1\n")
    stopped = run_isolated("import torch_environment as e; e.require_torch()", PYTHONPATH=str(tmp_path))
    assert stopped.returncode == 1
    assert "needs torch 2.11 or newer, and torch 2.9.1 is installed" in stopped.stderr


def test_an_isolated_build_borrows_the_torch_of_the_frontend_that_started_it():
    code = (
        "import torch_environment as e, importlib.util as u; assert u.find_spec('torch') is None;"
        "e.require_torch(); print(u.find_spec('torch').origin)"
    )
    borrowed = run_isolated(code)
    assert borrowed.returncode == 0, borrowed.stderr
    assert Path(borrowed.stdout.strip()) == Path(torch.__file__)


def test_pip_builds_only_for_the_interpreter_that_it_installs_into(torch_environment, monkeypatch, tmp_path):
    other = fake_program(tmp_path / "bin" / "python", "exit 1")
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "/tmp/pip-build-env-abc/site")
    assert torch_environment.target_interpreters() == [sys.executable]
    monkeypatch.delenv("PYTHONPATH")
    assert str(other) in torch_environment.target_interpreters()


def test_an_isolated_build_borrows_a_torch_that_only_the_pythonpath_of_pip_leads_to(tmp_path):
    bare = fake_program(tmp_path / "bin" / "python", f'exec {sys.executable} -S "$@"')
    (tmp_path / "packages" / "torch").mkdir(parents=True)
    torch_file = tmp_path / "packages" / "torch" / "__init__.py"
    torch_file.touch()
    build = f"""if True:
        import importlib.util, sys
        sys.path.insert(0, {str(BACKEND)!r})
        import torch_environment
        torch_environment.target_interpreters = lambda: [{str(bare)!r}]
        torch_environment.require_torch()
        print(importlib.util.find_spec("torch").origin, *sys.path, sep="\\n")
    """
    frontend = f"""if True:
        import os, subprocess, sys
        isolated = os.environ | {{"PYTHONPATH": {str(tmp_path / "pip-build-env-inner")!r}}}
        sys.exit(subprocess.run([sys.executable, "-S", "-c", {build!r}], env=isolated).returncode)
    """
    outer = str(tmp_path / "pip-build-env-outer")
    done = run_python("-S", "-c", frontend, cwd=tmp_path, PYTHONPATH=os.pathsep.join([outer, "packages"]))
    assert done.returncode == 0, done.stderr
    origin, *path = done.stdout.splitlines()
    assert Path(origin) == torch_file and outer not in path


def test_an_interpreter_of_another_python_version_is_not_borrowed_from(torch_environment, tmp_path):
    answer = '{"torch": true, "python": [2, 7], "path": ["/nowhere"]}'
    other = fake_program(tmp_path / "python", f"echo '{answer}'")
    assert not torch_environment._borrow_packages(str(other))
    assert "/nowhere" not in sys.path


# --- CUDA or not ------------------------------------------------------------------------------------------------------

SOURCES = ["csrc/cuda/attention.cu"]


def test_toolkit_is_found_through_a_wrapper_outside_it(toolchain, tmp_path):
    home = fake_toolkit(tmp_path / "toolkit")
    wrapper = fake_program(tmp_path / "path" / "nvcc", f'exec {home}/bin/nvcc "$@"')
    found = toolchain.find_toolkit({"PATH": f"{wrapper.parent}"}, "13.0")
    assert found == home.resolve()


def test_cuda_home_decides_alone(toolchain, tmp_path):
    on_path = fake_toolkit(tmp_path / "on_path")
    chosen = fake_toolkit(tmp_path / "chosen")
    assert toolchain.find_toolkit({"PATH": f"{on_path}/bin", "CUDA_HOME": str(chosen)}, "13.0") == chosen
    with pytest.raises(toolchain.CudaUnavailable, match="CUDA_HOME=.*missing has no bin/nvcc"):
        toolchain.find_toolkit({"PATH": f"{on_path}/bin", "CUDA_HOME": str(tmp_path / "missing")}, "13.0")


def test_a_toolkit_that_fits_torch_is_taken_before_one_on_path_that_does_not(toolchain, tmp_path, monkeypatch):
    old, fitting = fake_toolkit(tmp_path / "old", release="12.4"), fake_toolkit(tmp_path / "fitting")
    monkeypatch.setattr(toolchain, "installed_nvcc", lambda: [old / "bin" / "nvcc", fitting / "bin" / "nvcc"])
    assert toolchain.find_toolkit({"PATH": f"{old}/bin"}, "13.0") == fitting.resolve()


def test_nvcc_of_python_packages_is_found(toolchain, tmp_path, monkeypatch):
    """The package has no lib64, and libraries under their versioned names alone."""
    home = fake_toolkit(tmp_path / "nvidia" / "cu13")
    (home / "lib64" / "libcudart.so").rename(home / "lib64" / "libcudart.so.13")
    (home / "lib64").rename(home / "lib")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert home / "bin" / "nvcc" in toolchain.installed_nvcc()
    assert toolchain.cuda_runtime(home) == home / "lib" / "libcudart.so.13"


def test_force_cuda_0_leaves_cuda_out_and_other_words_are_refused(toolchain, tmp_path):
    environment = good_toolkit(tmp_path / "toolkit")
    plan = toolchain.plan_cuda(SOURCES, "13.0", environment | {"FORCE_CUDA": "0"})
    assert plan.home is None and plan.message == "scatterbrain: CPU-only build: FORCE_CUDA=0 leaves CUDA kernels out."
    with pytest.raises(SystemExit, match="FORCE_CUDA must be 1 .*, 0 .* or unset, got 'yes'"):
        toolchain.plan_cuda(SOURCES, "13.0", environment | {"FORCE_CUDA": "yes"})


def without_headers(home: Path) -> dict[str, str]:
    return {"PATH": f"{fake_toolkit(home, headers=False)}/bin"}


def silent_nvcc(home: Path) -> dict[str, str]:
    return {"PATH": str(fake_program(home / "nvcc", "exit 0").parent)}


def another_major_version(home: Path) -> dict[str, str]:
    return {"PATH": f"{fake_toolkit(home, release='12.4')}/bin"}


def without_runtime(home: Path) -> dict[str, str]:
    (fake_toolkit(home) / "lib64" / "libcudart.so").unlink()
    return {"PATH": f"{home}/bin"}


def nothing_anywhere(home: Path) -> dict[str, str]:
    return {"PATH": str(home)}


def good_toolkit(home: Path) -> dict[str, str]:
    return {"PATH": f"{fake_toolkit(home)}/bin"}


def no_toolkit(home: Path) -> dict[str, str]:
    return {"CUDA_HOME": str(home)}


@pytest.mark.parametrize(
    ("machine", "sources", "torch_cuda", "reason"),
    [
        (no_toolkit, SOURCES, "13.0", "CUDA_HOME=.* has no bin/nvcc"),
        (without_headers, SOURCES, "13.0", "has no include/cuda_runtime.h"),
        (without_runtime, SOURCES, "13.0", "has no libcudart.so in lib64 or lib"),
        (nothing_anywhere, SOURCES, "13.0", "no nvcc on PATH, .* CUDA_HOME is not set"),
        (silent_nvcc, SOURCES, "13.0", "does not say where its toolkit is"),
        (another_major_version, SOURCES, "13.0", r"is CUDA 12\.4, but torch is built for CUDA 13\.0"),
        (good_toolkit, SOURCES, None, "the installed torch is built without CUDA"),
        (good_toolkit, [], "13.0", "CUDA kernels are not part of this release"),
    ],
)
def test_what_prevents_a_cuda_build_is_said_and_is_an_error_under_force_cuda(
    toolchain, no_installed_toolkit, tmp_path, machine, sources, torch_cuda, reason
):
    environment = machine(tmp_path / "toolkit")
    plan = toolchain.plan_cuda(sources, torch_cuda, environment)
    assert plan.home is None and plan.architectures == ()
    assert re.fullmatch(f"scatterbrain: CPU-only build: .*{reason}.*", plan.message)
    with pytest.raises(SystemExit, match=f"FORCE_CUDA=1, but CUDA sources cannot be compiled: .*{reason}"):
        toolchain.plan_cuda(sources, torch_cuda, environment | {"FORCE_CUDA": "1"})


@pytest.mark.parametrize(
    ("listed", "architectures"),
    [(None, ("8.0", "9.0+PTX")), ("9.0", ("9.0",)), ("8.0;8.6 9.0+PTX", ("8.0", "8.6", "9.0+PTX"))],
)
def test_architectures_are_those_of_torch_cuda_arch_list(toolchain, tmp_path, listed, architectures):
    environment = good_toolkit(tmp_path / "toolkit") | ({"TORCH_CUDA_ARCH_LIST": listed} if listed else {})
    plan = toolchain.plan_cuda(SOURCES, "13.0", environment)
    assert plan.home == (tmp_path / "toolkit").resolve() and plan.architectures == architectures


def test_setup_stops_under_force_cuda_before_compiling():
    stopped = run_python("setup.py", "-q", "build_ext", cwd=ROOT, FORCE_CUDA="1", CUDA_HOME="/nonexistent")
    assert stopped.returncode == 1
    assert stopped.stderr.splitlines()[-1].startswith("scatterbrain: FORCE_CUDA=1, but CUDA sources cannot be compiled")
    assert "Traceback" not in stopped.stderr


def test_setup_names_the_sanitizers_that_it_knows():
    stopped = run_python("setup.py", "--version", cwd=ROOT, SCATTERBRAIN_SANITIZE="leak")
    assert stopped.returncode == 1
    assert stopped.stderr == "SCATTERBRAIN_SANITIZE: expected address or thread, or nothing, got 'leak'.\n"


def test_compile_jobs_follow_max_jobs_then_cores_then_memory(toolchain, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.setattr(toolchain, "_available_memory", lambda: 1 << 40)
    assert toolchain.compile_jobs({"MAX_JOBS": "3"}) == 3
    assert toolchain.compile_jobs({}) == 8
    monkeypatch.setattr(toolchain, "_available_memory", lambda: 5 << 30)
    assert toolchain.compile_jobs({}) == 2
    monkeypatch.setattr(toolchain, "_available_memory", lambda: 1 << 20)
    assert toolchain.compile_jobs({}) == 1
    with pytest.raises(SystemExit, match="MAX_JOBS must be a positive integer, got 'many'"):
        toolchain.compile_jobs({"MAX_JOBS": "many"})


V1 = "0::/\n5:cpu:/\n4:memory:/docker/abc\n"  # the container sees its own group as the root


@pytest.mark.parametrize(
    ("groups", "files", "left"),
    [
        (None, {}, 20),
        ("0::/user/build\n", {}, 20),
        ("0::/user/build\n", {"user/build": ("max", 1)}, 20),
        ("0::/user/build\n", {"user/build": (9, 2)}, 7),
        ("0::/user/build\n", {"user/build": (9, 2), "user": (8, 5), "": (30, 12)}, 3),
        ("0::/user/build\n", {"user/build": (9, 6, 4)}, 7),
        ("0::/\n", {"": (2, 5)}, 0),
        (V1, {"memory": (6, 2)}, 4),
        (V1, {"memory": (6, 4, 3)}, 5),
        (V1, {"memory": (8 << 30, 4)}, 20),
    ],
)
def test_available_memory_is_within_the_limits_of_control_groups(toolchain, tmp_path, groups, files, left):
    """In GiB: a limit, what is used, and what of it is only cached."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: {64 << 20} kB\nMemAvailable: {20 << 20} kB\n")
    if groups is not None:
        (tmp_path / "proc/self/cgroup").write_text(groups)
    for folder, (limit, used, *cached) in files.items():
        group = tmp_path / "sys/fs/cgroup" / folder
        group.mkdir(parents=True, exist_ok=True)
        first = folder.startswith("memory")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if first else ("memory.max", "memory.current")
        for name, value in zip(names, (limit, used)):
            (group / name).write_text(f"{value if value == 'max' else value << 30}\n")
        if cached:
            counted = "total_inactive_file" if first else "inactive_file"
            (group / "memory.stat").write_text(f"anon 7\n{counted} {cached[0] << 30}\nactive_file 9\n")
    assert toolchain._available_memory(tmp_path) == left << 30


# --- what was built ---------------------------------------------------------------------------------------------------


def test_one_version_everywhere():
    assert scatterbrain.__version__ == importlib.metadata.version("scatterbrain") == _build_info.version


def test_build_information_describes_this_build():
    assert _build_info.cpp_standard >= 202002
    assert re.match(r"(GCC|Clang) \d+", _build_info.compiler)
    assert re.match(r"2\.\d+", _build_info.torch_version)
    assert _build_info.instruction_sets[-1] == "baseline"


def test_info_names_an_instruction_set_that_was_compiled():
    facts = collect()
    assert facts["instruction set in use"] in facts["instruction sets compiled"].split(", ")


def operator_library() -> Path:
    (library,) = PACKAGE.glob("_C*.so")
    return library


def dynamic_symbols(which: str) -> list[tuple[str, str]]:
    """Kind and name of the operator library's dynamic symbols, as nm reports them."""
    listed = subprocess.run(["nm", "-D", which, operator_library()], capture_output=True, text=True, check=True)
    return [tuple(line.split()[-2:]) for line in listed.stdout.splitlines()]


def test_no_folder_of_the_machine_that_compiled_is_in_the_libraries():
    """Error messages of checks would carry it to users: the file of a check is named relative to its include folder."""
    for library in (operator_library(), Path(_build_info.__file__)):
        assert re.findall(rb"(?<![\w.])/[\w.+/-]+\.(?:h|hpp|cpp|cc|cu|cuh)\b", library.read_bytes()) == []


def test_operator_library_is_named_for_the_stable_abi():
    assert operator_library().name == "_C.abi3.so"


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm of binutils")
def test_operator_library_uses_only_stable_symbols_of_torch_and_none_of_python():
    symbols = [name for _, name in dynamic_symbols("--undefined-only")]
    from_torch = [name for name in symbols if "torch" in name]
    assert from_torch, "the library does not register anything with torch"
    # C++ symbols of torch are mangled (_ZN2at..., _ZN3c10..., _ZN5torch...); those of the stable ABI are plain C.
    unstable = [name for name in symbols if re.match(r"_Z.*(2at|3c10|5torch)", name) or name.startswith(("Py", "_Py"))]
    assert unstable == []


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm of binutils")
def test_operator_library_exports_nothing_of_its_own():
    strong = [name for kind, name in dynamic_symbols("--defined-only") if kind in "TDB"]
    assert [name for name in strong if name not in ("_init", "_fini")] == []


def test_no_instruction_set_is_chosen_on_the_command_line():
    text = "".join((ROOT / name).read_text() for name in ("setup.py", "pyproject.toml", "Makefile"))
    assert re.findall(r"""["'\s](-march=\S*|-mavx\S*|-mtune=\S*)""", text) == []


def test_package_ships_its_license_and_its_typing_marker():
    assert (PACKAGE / "py.typed").is_file()
    files = importlib.metadata.files("scatterbrain") or []
    licenses = [file for file in files if file.name == "LICENSE"]
    assert licenses and "Apache License" in licenses[0].read_text()


def test_source_distribution_needs_no_torch_and_carries_what_is_compiled(tmp_path):
    code = (
        "sys.path += sys.argv[2:]; sys.modules['torch'] = None;"  # None makes every import of torch fail
        "from scatterbrain_build import build_sdist; print(build_sdist(sys.argv[1]))"
    )
    source = tmp_path / "source"
    unneeded = shutil.ignore_patterns(".git", ".venv", "build", "runs", "*.so", "__pycache__")
    shutil.copytree(ROOT, source, ignore=unneeded)
    packages = [entry for entry in sys.path if entry.endswith("-packages")]
    program = f"import sys; sys.path.insert(0, 'build_backend'); {code}"
    built = run_python("-S", "-c", program, tmp_path, *packages, cwd=source, PYTHONPATH="")
    assert built.returncode == 0, built.stderr
    with tarfile.open(tmp_path / built.stdout.splitlines()[-1]) as archive:
        shipped = {name.split("/", 1)[-1] for name in archive.getnames()}
    needed = {str(path.relative_to(source)) for path in (source / "csrc").rglob("*.*")}
    needed |= {f"build_backend/{path.name}" for path in BACKEND.glob("*.py")}
    needed |= {"setup.py", "pyproject.toml", "LICENSE", "Makefile", "src/scatterbrain/py.typed"}
    assert needed <= shipped
    assert not [name for name in shipped if name.endswith(".so")]
