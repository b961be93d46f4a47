"""Kernels as stages of scatterbrain.profile: csrc/cuda/kernel_time.cpp on a CUDA runtime of a few lines, whose device
has a clock of its own."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from emulated import COMPILER, CSRC

pytestmark = pytest.mark.skipif(
    not CSRC.is_dir() or shutil.which(COMPILER[0]) is None, reason="needs the source tree and a C++ compiler"
)

RUNTIME = """
#pragma once
typedef struct Event { double at = -1; bool is_over = false; }* cudaEvent_t;
typedef struct Stream* cudaStream_t;
enum cudaError_t { cudaSuccess, cudaErrorNotReady, cudaErrorInvalidValue };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
inline double device_ms = 0;
inline int events = 0, waits = 0;
inline bool is_captured = false, is_behind = false;
inline cudaError_t last = cudaSuccess;
inline cudaError_t cudaGetLastError() { const cudaError_t error = last; last = cudaSuccess; return error; }
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = is_captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaEventCreate(cudaEvent_t* event) { ++events; *event = new Event; return cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) { event->at = device_ms; return cudaSuccess; }
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) { ++waits; event->is_over = true; return cudaSuccess; }
inline cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (is_behind) return last = cudaErrorNotReady;
  event->is_over = true;
  return cudaSuccess;
}
inline cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
  if (!end->is_over) return cudaErrorNotReady;
  *ms = float(end->at - start->at);
  return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) { --events; delete event; return cudaSuccess; }
"""
PROGRAM = r"""
#include <cstdio>
#include "cuda/kernel_time.h"
#include "cuda_runtime_api.h"
#include "profile.h"

static void kernel(const char* name, double ms) {
  const sb::cuda::KernelTime time(name, {nullptr});
  device_ms += ms;
}

int main() {
  kernel("before", 1);
  sb::record_stages(true);
  kernel("rows", 0.5), kernel("forward", 2), kernel("forward", 4);
  device_ms += 100;
  is_captured = true;
  kernel("captured", 8);
  is_captured = false;
  std::printf("waits %d\n", waits);
  std::printf("%s", sb::record_stages(false).c_str());
  kernel("after", 16);
  std::printf("rest %zu, events %d\n", sb::record_stages(false).size(), events);
  sb::record_stages(true);
  for (int i = 0; i < 10000; ++i) kernel("many", 0.001);
  std::printf("few are kept %d\n", events <= 2 * 4096);
  is_behind = true;
  for (int i = 0; i < 3; ++i) kernel("many", 0.001);
  std::printf("last error %d\n", int(last));
  std::printf("%s", sb::record_stages(false).c_str());
  std::printf("events %d\n", events);
}
"""


def test_kernels_are_timed_by_events_that_are_read_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "cuda_runtime_api.h").write_text(RUNTIME)
    (tmp_path / "main.cpp").write_text(PROGRAM)
    sources = [tmp_path / "main.cpp", CSRC / "cuda" / "kernel_time.cpp", CSRC / "profile.cpp"]
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", f"-I{tmp_path}", f"-I{CSRC}", "-o", str(tmp_path / "main")]
    built = subprocess.run([*COMPILER, *map(str, sources), *flags], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    lines = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[0] == "waits 0"
    assert lines[1:3] == ["rows\t1\t500000", "forward\t2\t6000000"]
    assert lines[3:6] == ["rest 0, events 0", "few are kept 1", "last error 0"]
    name, calls, nanoseconds = lines[6].split("\t")
    assert (name, calls) == ("many", "10003") and abs(int(nanoseconds) - 10_003_000) < 100_000
    assert lines[7:] == ["events 0"]
