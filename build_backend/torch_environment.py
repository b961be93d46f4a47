"""Finds the torch of the environment that scatterbrain is built for.

Build frontends compile in an isolated environment that hides the installed torch. Declaring torch as a build
requirement would fetch a second one of several gigabytes, possibly of another version, so the isolated build borrows
the installed one instead.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MINIMUM_TORCH = (2, 11)

_ACTIVATED = ("VIRTUAL_ENV", "CONDA_PREFIX")
_PIP_ISOLATION = "pip-build-env-"  # in the folders that pip puts on the PYTHONPATH of an isolated build

_QUERY = """
import importlib.util, json, sys
del sys.path[0]
spec = importlib.util.find_spec("torch")
has_torch = spec is not None and spec.origin is not None
print(json.dumps({"torch": has_torch, "python": sys.version_info[:2], "path": sys.path}))
"""


def require_torch() -> None:
    """Leave a usable torch on ``sys.path``, or stop with one sentence that says what to install."""
    targets = [] if _torch_is_importable() else target_interpreters()
    for interpreter in targets:
        if _borrow_packages(interpreter):
            break
    minimum = ".".join(map(str, MINIMUM_TORCH))
    if not _torch_is_importable():
        where = targets[0] if targets else "the active environment"
        raise SystemExit(
            f"scatterbrain is compiled against the installed torch, and {where} has none: "
            f"install it first (pip install 'torch>={minimum}'), then repeat this command."
        )
    found = _torch_version()
    if found and tuple(map(int, re.findall(r"\d+", found)[:2])) < MINIMUM_TORCH:
        raise SystemExit(
            f"scatterbrain needs torch {minimum} or newer, and torch {found} is installed: "
            f"upgrade it first (pip install --upgrade 'torch>={minimum}'), then repeat this command."
        )


def target_interpreters() -> list[str]:
    """Interpreters of the environments the build may be meant for, the likeliest first.

    pip runs the build with the interpreter it installs into. Other frontends (``python -m build``, uv) create a
    temporary environment and may announce it as the activated one; the frontend's own interpreter, the environment
    it was started in, and otherwise a .venv in its folder are the candidates.
    """
    if _PIP_ISOLATION in os.environ.get("PYTHONPATH", ""):
        return [sys.executable]
    frontend = _Frontend.of_this_build()
    prefixes = [place.get(name) for place in (frontend.environment, os.environ) for name in _ACTIVATED]
    if frontend.interpreter is None:
        prefixes.append(os.path.join(frontend.folder, ".venv"))
    candidates = [frontend.interpreter] + [os.path.join(prefix, "bin", "python") for prefix in prefixes if prefix]
    return [path for path in dict.fromkeys(candidates) if path and os.path.exists(path)]


@dataclass(frozen=True)
class _Frontend:
    """The process that asked for this build: its interpreter, if it runs Python, its folder and its environment."""

    interpreter: str | None
    folder: str
    environment: Mapping[str, str]

    @classmethod
    def of_this_build(cls) -> _Frontend:
        """The parent process; where there is no /proc, only the folder and the environment of this one are known."""
        process = Path("/proc") / str(os.getppid())
        try:
            program = os.fsdecode((process / "cmdline").read_bytes().split(b"\0")[0])
            folder = os.readlink(process / "cwd")
            entries = os.fsdecode((process / "environ").read_bytes()).split("\0")
        except OSError:
            return cls(None, os.getcwd(), os.environ)
        environment = dict(entry.split("=", 1) for entry in entries if "=" in entry)
        if not re.fullmatch(r"python[\d.]*t?", os.path.basename(program)):
            return cls(None, folder, environment)
        if os.sep in program:
            return cls(os.path.join(folder, program), folder, environment)
        return cls(shutil.which(program, path=environment.get("PATH", "")), folder, environment)

    def python_path(self) -> list[str]:
        """The folders of the PYTHONPATH that it was started with, which may be all that leads to torch, without those
        of an isolated environment."""
        entries = self.environment.get("PYTHONPATH", "").split(os.pathsep)
        return [os.path.join(self.folder, entry) for entry in entries if entry and _PIP_ISOLATION not in entry]


def _torch_is_importable() -> bool:
    spec = importlib.util.find_spec("torch")
    return spec is not None and spec.origin is not None  # a stray folder named torch has no origin


def _torch_version() -> str | None:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:  # a torch run from its source tree
        return None


def _borrow_packages(interpreter: str) -> bool:
    """Append the package folders of ``interpreter`` to ``sys.path`` if it has torch and is the same Python version."""
    # The frontend sets these two for its own isolation; they would hide the user's packages from the query.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    environment["PYTHONPATH"] = os.pathsep.join(_Frontend.of_this_build().python_path())
    answer = subprocess.run([interpreter, "-c", _QUERY], env=environment, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        return False
    facts = json.loads(answer.stdout.splitlines()[-1])
    if not facts["torch"] or tuple(facts["python"]) != sys.version_info[:2]:
        return False
    # Appended, never put first: the isolated environment's own setuptools must win.
    sys.path += [entry for entry in facts["path"] if entry not in sys.path]
    importlib.invalidate_caches()
    return True
