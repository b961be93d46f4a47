"""How calls are timed on a GPU, with stand-ins for what torch.cuda has."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("jsonargparse")
pytest.importorskip("tqdm")

from scatterbrain.bench import clock, measure, memory, report
from scatterbrain.bench.config import BenchConfig, Setting
from scatterbrain.cli import main

GPU = torch.device("cuda")


class Event:
    """Of a device that a call keeps busy for 2 ms, whatever the host does."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at, self.is_over = None, False

    def record(self) -> None:
        self.at = Event.now

    def synchronize(self) -> None:
        self.is_over = True

    def elapsed_time(self, end: Event) -> float:
        assert end.is_over, "the device was not waited for"
        return end.at - self.at


def busy() -> None:
    Event.now += 2.0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with 4 MB of cache."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=4 << 20))


def test_a_gpu_is_timed_by_events(gpu: None) -> None:
    assert clock.clock_of(GPU).name == "CUDA events"
    assert clock.clock_of(GPU).seconds([busy] * 5) == pytest.approx(0.010)


@pytest.mark.parametrize(("megabytes", "sets"), [(1, 12), (3, 4), (5, 3), (6, 2), (100, 2)])
def test_so_many_sets_of_inputs_that_none_stays_in_the_cache(gpu: None, megabytes: int, sets: int) -> None:
    assert clock.sets_beyond_cache(megabytes << 20, GPU) == sets
    assert clock.sets_beyond_cache(megabytes << 20, torch.device("cpu")) == 1


@pytest.mark.parametrize("calls", [1, 2, 5])
def test_sets_of_inputs_are_taken_in_turn(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    monkeypatch.setattr(measure, "sets_beyond_cache", lambda size, device: 3)
    config = BenchConfig(lengths=[24], methods=["sdpa"], heads=1, head_dim=8, rank=2, repeats=6, directions=["F"])
    measurement = measure.Measurement(config, Setting(24, 1, 1, 8, 1, "float32", False), ["sdpa"])
    assert len({some.query.data_ptr() for some in measurement.sets}) == 3
    used = []
    steps = {("sdpa", "F"): ([lambda i=i: used.append(i) for i in range(3)], calls)}
    monkeypatch.setattr(measurement, "_prepare", lambda *a: steps)
    list(measurement.run())
    assert used == [i % 3 for i in range(6 * calls)]
    assert measurement.rows["sdpa", "F"].repeats == 6


def test_the_memory_of_a_gpu_is_what_its_allocator_counts(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call on 40 tokens allocates 3 MB for a while, 1 MB of it for its result."""
    state = SimpleNamespace(now=5 << 20, peak=90 << 20)

    def step() -> None:
        state.peak = max(state.peak, state.now + (3 << 20))
        state.now += 1 << 20

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: state.now)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: state.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: setattr(state, "peak", state.now))
    assert memory.device_peak(step, GPU) == 3 << 20


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "mps", ""])
def test_another_device_is_refused(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", device]) == 1
    assert f"--device must be cpu, cuda or cuda:<number>, got {device!r}" in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "--device", "cuda"]) == 1
    assert "--device cuda: torch finds no GPU on this machine; use cpu" in capsys.readouterr().err


def test_files_from_before_there_were_devices_are_the_cpus(tmp_path: Path) -> None:
    config, path = BenchConfig(), tmp_path / "out.json"
    report.write_json(path, [], config, is_complete=False)
    content = json.loads(path.read_text())
    del content["options"]["device"]
    path.write_text(json.dumps(content))
    assert report.read_rows(path, config) == []
