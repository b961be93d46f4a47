"""Peak memory of one call: on a GPU what torch's allocator counts, on the CPU the high-water mark of a process that
does nothing else (Linux).

``python -m scatterbrain.bench.memory`` reads jobs from its input, a JSON object a line, and answers each with a line.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from scatterbrain.bench.config import BenchConfig, Setting
from scatterbrain.bench.inputs import Inputs
from scatterbrain.bench.measure import Row, describe_failure, make_inputs, steps
from scatterbrain.bench.methods import parse_method

_CLEAR = Path("/proc/self/clear_refs")


class DevicePeakMemory:
    """Of a GPU, in this process."""

    reason: str | None = None

    def __init__(self, config: BenchConfig) -> None:
        self.config = config

    def fill(self, row: Row) -> None:
        """Adds the peak to a row that ran."""
        try:
            inputs = _inputs_of(self.config, row.setting())
            attention = parse_method(row.method).build(inputs.statistics, self.config.rank, row.is_causal)
            _note(row, device_peak(steps(attention, inputs)[row.direction], self.config.on()))
        except RuntimeError as failure:
            row.note = row.note or describe_failure(failure)

    def close(self) -> None:
        _inputs.cache_clear()


def device_peak(step: Callable[[], object], device: torch.device) -> int:
    """Bytes above what is allocated before a call, what it returns included."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def peak_memory(config: BenchConfig) -> PeakMemory | DevicePeakMemory:
    """What measures rows of the device."""
    return DevicePeakMemory(config) if config.on().type == "cuda" else PeakMemory(config)


def _note(row: Row, peak: int) -> None:
    row.peak_bytes = peak
    row.bytes_per_token_and_head = peak / (row.batch * row.tokens * row.heads)


class PeakMemory:
    """A process that measures rows one by one. It is started again where a row has brought it down."""

    def __init__(self, config: BenchConfig) -> None:
        self.config = config
        self.reason = None if _CLEAR.exists() else "memory is measured on Linux only"
        self._process: subprocess.Popen | None = None

    def fill(self, row: Row) -> None:
        """Adds the peak to a row that ran."""
        if self.reason is not None:
            return
        modules = parse_method(row.method).modules()
        if "__main__" in modules:
            row.note = row.note or (
                "memory is measured in another process, which knows the kinds of modules alone; define them in a "
                "module and import it"
            )
            return
        process = self._start()
        job = {
            "config": _plain(self.config) | {"methods": [row.method]},  # the others may be of kinds it does not know
            "modules": modules,
            "path": sys.path,
            "setting": asdict(row.setting()),
            "method": row.method,
            "direction": row.direction,
        }
        try:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.close()
            row.note = row.note or "its process was stopped while memory was measured: out of memory?"
            return
        found = json.loads(answer)
        if "peak" in found:
            _note(row, found["peak"])
        else:
            row.note = row.note or found["failure"]

    def _start(self) -> subprocess.Popen:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "scatterbrain.bench.memory"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C is for the parent, which ends this one
            )
        return self._process

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            with contextlib.suppress(BrokenPipeError):  # a job that it did not live to read
                self._process.stdin.close()
            self._process.stdout.close()
            self._process = None


def resident(mark: str) -> int:
    """VmRSS (now) or VmHWM (high-water mark) of this process in bytes."""
    return int(re.search(rf"{mark}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024


def peak_of(config: BenchConfig, setting: Setting, method: str, direction: str) -> int:
    """Bytes above what is resident with the inputs in place."""

    def run(setting: Setting) -> int:
        inputs = _inputs_of(config, setting)
        attention = parse_method(method).build(inputs.statistics, config.rank, setting.is_causal)
        step = steps(attention, inputs)[direction]
        if parse_method(method).is_compiled:
            step()
        _trim()
        _CLEAR.write_text("5")  # resets the high-water mark
        before = resident("VmRSS")
        step()
        return resident("VmHWM") - before

    if setting.tokens > 512:  # code pages and thread pools are not the method's
        run(Setting(**asdict(setting) | {"tokens": 512}))
    else:
        run(setting)
    return run(setting)


@functools.lru_cache(maxsize=2)  # of a setting and of what goes before it: rows of one setting come one after another
def _inputs(config: str, setting: Setting) -> Inputs:
    return make_inputs(_config(json.loads(config)), setting)


def _inputs_of(config: BenchConfig, setting: Setting) -> Inputs:
    """Those of all methods alike."""
    return _inputs(json.dumps(_plain(config) | {"methods": None}), setting)


def _plain(config: BenchConfig) -> dict[str, object]:
    """The options as JSON has them, without files to write."""
    options = asdict(config) | {"json": None, "png": None, "resume": False}
    return options | {"inputs": None if config.inputs is None else str(config.inputs)}


def _config(options: dict[str, object]) -> BenchConfig:
    return BenchConfig(**options | {"inputs": options["inputs"] and Path(options["inputs"])})


def _trim() -> None:
    """Gives freed memory back, so that the next peak does not hide in it."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        pass  # not glibc: peaks of small rows may read low


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # modules with kinds of one's own may print
    for line in sys.stdin:
        job = json.loads(line)
        try:
            sys.path += [place for place in job["path"] if place not in sys.path]
            for module in job["modules"]:
                importlib.import_module(module)
            config = _config(job["config"])
            torch.set_num_threads(config.threads)
            answer = {"peak": peak_of(config, Setting(**job["setting"]), job["method"], job["direction"])}
        except Exception as failure:  # the parent decides what to do with it
            answer = {"failure": describe_failure(failure)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
