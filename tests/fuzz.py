"""Draws calls of sb.attention over every axis and checks what must hold for each of them.

    python tests/fuzz.py --minutes 3                       every instruction set of this processor in turn
    python tests/fuzz.py --sanitize address --minutes 3    the same on the library that `make sanitize` builds

Results and gradients are compared with the dense float64 definition. Their bits are compared between threads, memory
layouts, other tokens in the future, and other content and amounts of padding (tests/call_properties.py). The first call
that fails is made smaller for as long as it fails; the last line printed runs that call again. The same seed draws the
same calls. Ends with 1 after a failure.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SETS = ("avx512_bf16", "avx512", "avx2", "baseline")
CALLS_PER_SEED = 50
SHRINKING_SECONDS = 60.0
REPORT = 12_000  # characters of a sanitizer's report that are shown


class OutOfTime(KeyboardInterrupt):
    """Passes through hypothesis, which keeps other exceptions."""


class Failure(NamedTuple):
    line: str  # the smallest call that was found
    error: str
    seed: int


def find_failure(
    check: Callable, seed: int, seconds: float = float("inf"), calls: float = float("inf"), extremes: bool = False
) -> tuple[int, Failure | None]:
    """How many calls were drawn until ``seconds`` or ``calls`` were over, and the smallest for which ``check``
    raises."""
    import hypothesis
    from drawn_calls import DrawnCall, drawn_calls

    end, failure, drawn = time.monotonic() + seconds, None, 0

    def judge(call: DrawnCall) -> None:
        nonlocal failure, end, drawn
        if time.monotonic() > end or (failure is None and drawn >= calls):
            raise OutOfTime
        drawn += failure is None
        try:
            check(call)
        except Exception as error:
            if failure is None:
                end = time.monotonic() + SHRINKING_SECONDS
            text = str(error) if isinstance(error, AssertionError) else traceback.format_exc()
            failure = Failure(call.line(), text, seed)
            raise

    settings = hypothesis.settings(
        max_examples=CALLS_PER_SEED,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        report_multiple_bugs=False,
        print_blob=False,
    )
    while True:
        try:
            hypothesis.seed(seed)(settings(hypothesis.given(drawn_calls(extremes))(judge)))()
        except OutOfTime:
            return drawn, failure
        except Exception:  # what `check` raised, or that it does not raise every time
            if failure is None:
                raise
            return drawn, failure
        seed += 1


# -------------------- a process for one instruction set


def work(arguments: argparse.Namespace) -> int:
    """Checks drawn calls, or the given one. The call in progress is in a file, for processes that end by a signal."""
    import warnings

    from call_properties import check
    from drawn_calls import DrawnCall

    warnings.simplefilter("ignore")
    with open(arguments.work, "w", encoding="utf-8") as progress:

        def noted(call: DrawnCall) -> None:
            progress.seek(0)
            progress.truncate()
            progress.write(call.line())
            progress.flush()
            check(call)

        if arguments.call:
            try:
                noted(DrawnCall.of(arguments.call))
            except (AssertionError, ValueError) as error:
                print(error)
                return 1
            print("The call holds what it must.")
            return 0
        limits = dict(seconds=60 * arguments.minutes, calls=arguments.calls or float("inf"))
        drawn, failure = find_failure(noted, arguments.seed, extremes=arguments.extremes, **limits)
    print(f"{drawn} calls, {'one failed' if failure else 'none failed'}", flush=True)
    if failure:
        command = again(arguments, failure.line, os.environ["SCATTERBRAIN_ISA"])
        print(f"\nseed {failure.seed}: {failure.error}\n{command}", flush=True)
    return 1 if failure else 0


def again(arguments: argparse.Namespace, line: str, instruction_set: str) -> str:
    sanitize = f" SANITIZE={arguments.sanitize}" if arguments.sanitize else ""
    return f"To run this call again:\n  make fuzz SETS={instruction_set}{sanitize} CALL='{line}'"


# -------------------- sanitizers

# What the library calls where it was compiled with the checks.
CALLS_OF = {"address": (b"__asan_loadN", b"__ubsan_handle_add_overflow"), "thread": (b"__tsan_read", b"__tsan_write")}
# Reads the end of a query whose memory torch has made shorter than the tensor says.
PAST_THE_END = """
import torch
import scatterbrain as sb
query, key, value = torch.randn(3, 1, 1, 300, 64).unbind()
query = query.clone()
query.untyped_storage().resize_(query.numel() * 4 - 64)
sb.attention(query, key, value, sb.Window(16), None)
"""


def sanitized_environment(kind: str) -> dict[str, str]:
    """What a process needs to load the sanitized library: the sanitizer's runtime has to be there first."""
    package = ROOT / "build" / f"{kind}-sanitizer" / "site"
    if not (package / "scatterbrain").is_dir():
        sys.exit(f"fuzz: expected the library built with --sanitize {kind} in {package}; `make sanitize` builds it")
    for library in (package / "scatterbrain").glob("_C*.so"):
        missing = [name.decode() for name in CALLS_OF[kind] if name not in library.read_bytes()]
        if missing:
            sys.exit(f"fuzz: {library} never calls {' or '.join(missing)}: remove {package.parent} and build it again")
    compiler = os.environ.get("CXX", "c++").split()
    names = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}[kind]

    def path(name: str) -> str:
        done = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        found = done.stdout.strip()
        if not os.path.isabs(found):
            sys.exit(
                f"fuzz: {compiler[0]} has no {name}; install the sanitizers' runtime of this compiler (GCC 11 or newer)"
            )
        return found

    return {
        # The runtime looks for what it intercepts when the process starts; Python itself does not load libstdc++.
        "LD_PRELOAD": " ".join(path(name) for name in (*names, "libstdc++.so")),
        "PYTHONPATH": os.pathsep.join((str(package), str(ROOT / "tests"))),
        # Python keeps memory until it ends. Fresh memory is NaN in every float type, so that reading it shows.
        "ASAN_OPTIONS": "detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=1073741824",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # torch is not instrumented: what it does under locks and barriers of its own cannot be judged.
        "TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1",
    }


def check_that_errors_are_seen(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run([*command, "-c", PAST_THE_END], env=environment, capture_output=True, text=True, check=False)
    if "AddressSanitizer: heap-buffer-overflow" not in done.stderr:
        said = f"({done.returncode}):\n{done.stderr[-2000:]}"
        sys.exit(f"fuzz: the sanitizer did not see a read past the end of a tensor {said}")


def launcher(environment: dict[str, str]) -> list[str]:
    """What has to stand before the command: ThreadSanitizer's older runtimes want fixed addresses where the kernel
    spreads them widely."""
    for prefix in ([], ["setarch", "-R"]):
        done = subprocess.run(
            [*prefix, sys.executable, "-c", ""], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            return prefix
    sys.exit(
        "fuzz: Python does not start under the sanitizer's runtime, not under `setarch -R` either:\n"
        + done.stderr[-2000:]
    )


# -------------------- all of them


def instruction_sets(sanitize: str | None) -> list[str]:
    """Those that the library has kernels for and this processor has, best first: the best and all after it."""
    environment = os.environ | (sanitized_environment(sanitize) if sanitize else {})
    prefix = launcher(environment) if sanitize else []
    say = "import torch, scatterbrain; print(torch.ops.scatterbrain.instruction_set())"
    command = [*prefix, sys.executable, "-c", say]
    best = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    return list(SETS[SETS.index(best) :])


def run_set(name: str, arguments: argparse.Namespace) -> int:
    """Runs this program for one instruction set; says which call was in progress if it ended by itself."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "PYTHONFAULTHANDLER": "1"}
    if arguments.sanitize:
        environment |= sanitized_environment(arguments.sanitize)
    environment["SCATTERBRAIN_ISA"] = name
    print(f"{name}{f' ({arguments.sanitize} sanitizer)' if arguments.sanitize else ''}: ", end="", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        progress, report = Path(folder) / "call.json", Path(folder) / "report"
        command = [sys.executable, str(Path(__file__).resolve()), *arguments.given, "--work", str(progress)]
        command += ["--minutes", str(arguments.minutes)]
        prefix = launcher(environment) if arguments.sanitize else []
        if arguments.sanitize == "address":
            check_that_errors_are_seen([*prefix, sys.executable], environment)
        with report.open("w") as stream:
            code = subprocess.run([*prefix, *command], env=environment, stderr=stream, check=False).returncode
        text = report.read_text(encoding="utf-8", errors="replace")
        if code not in (0, 1) or (code == 1 and text):
            print(f"the process ended with {code}\n\n{text[:REPORT]}")
            if progress.exists():
                print(again(arguments, progress.read_text(encoding="utf-8"), name))
    return code


def main(given: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0, help="for all instruction sets together (default 3)")
    parser.add_argument("--calls", type=int, help="stop after so many calls per instruction set")
    parser.add_argument("--seed", type=int, default=0, help="of the first call; the same calls every time (default 0)")
    parser.add_argument(
        "--sets", nargs="+", choices=SETS, help="instruction sets (default: all that the processor has)"
    )
    parser.add_argument("--extremes", action="store_true", help="also draw means, large scales and outliers")
    parser.add_argument("--sanitize", choices=("address", "thread"), help="use the library built with this sanitizer")
    parser.add_argument("--call", help="check this call alone, a JSON object as a failure prints it")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    if arguments.work:
        return work(arguments)
    if not arguments.minutes > 0:
        parser.error(f"--minutes must be positive, got {arguments.minutes}")
    sets = arguments.sets or instruction_sets(arguments.sanitize)
    arguments.given, arguments.minutes = given, arguments.minutes / len(sets)
    for name in sets:
        if run_set(name, arguments):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
