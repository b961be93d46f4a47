"""What is said of devices before any kernel runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import scatterbrain as sb
from scatterbrain.operators import devices
from scatterbrain.operators.devices import check_device, runs_on


def on_gpu(width: int = 32) -> Tensor:
    """A tensor that says it is on a GPU."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return torch.empty(1, 2, 40, width, device="cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A build for the default architectures, and a GPU that it runs on."""
    monkeypatch.setattr(devices, "COMPILED", ("8.0", "9.0+PTX"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    devices._problem_of_gpu.cache_clear()
    yield monkeypatch
    devices._problem_of_gpu.cache_clear()


@pytest.mark.skipif(bool(devices.COMPILED), reason="this build has CUDA kernels")
@pytest.mark.parametrize(
    "call",
    [
        lambda t: sb.attention(t, t, t, sb.Window(16), sb.Centroid(8)),
        lambda t: sb.attention(t, t, t, sb.Window(16), None, is_causal=True),
        lambda t: sb.route(t, t, sb.Routed(24), None),
        lambda t: sb.cluster(t, t, 8),
        lambda t: sb.ScatterbrainAttention(2, 32, support=sb.Window(16), low_rank=None)(t, t, t),
    ],
)
def test_a_build_without_cuda_names_the_cure(call) -> None:
    with pytest.raises(RuntimeError, match=r"expected a build .* with CUDA kernels .*FORCE_CUDA=1 pip install"):
        call(on_gpu())


@pytest.mark.skipif(bool(devices.COMPILED), reason="this build has CUDA kernels")
def test_operators_of_a_build_without_cuda_name_the_cure() -> None:
    sizes = torch.float32, 1, 2, 40, 32, 2, 40, 32, 0, 0, 16, 16, False
    with pytest.raises(RuntimeError, match=r"got CUDA; .* install a build with kernels for CUDA \(FORCE_CUDA=1"):
        torch.ops.scatterbrain.saved_sizes("cuda", *sizes)


def test_old_gpus_are_refused_by_their_compute_capability(gpu: pytest.MonkeyPatch) -> None:
    check_device(on_gpu(), on_gpu())
    devices._problem_of_gpu.cache_clear()
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(RuntimeError, match=r"need compute capability 8\.0 or newer .*cuda:0, a card, has 7\.5"):
        check_device(on_gpu(), on_gpu())


def test_a_gpu_that_nothing_was_compiled_for_is_refused(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(devices, "COMPILED", ("9.0",))
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(RuntimeError, match=r"kernels for 9\.0, .* TORCH_CUDA_ARCH_LIST=8\.6"):
        check_device(on_gpu(), on_gpu())


def test_tokens_too_wide_for_a_gpu_are_refused_by_name(gpu: pytest.MonkeyPatch) -> None:
    check_device(on_gpu(256), on_gpu(256))
    with pytest.raises(ValueError, match="query must be at most 256 wide on a CUDA device, got 257"):
        check_device(on_gpu(257), on_gpu())
    with pytest.raises(ValueError, match="value must be at most 256 wide on a CUDA device, got 512"):
        check_device(on_gpu(), on_gpu(512))


@pytest.mark.parametrize(
    ("architecture", "capability", "runs"),
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 9), True),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("9.0", (10, 0), False),
        ("9.0+PTX", (10, 0), True),
        ("9.0+PTX", (8, 0), False),
        ("9.0a", (9, 0), True),
        ("9.0a", (10, 0), False),
        ("12.0+PTX", (12, 1), True),
        ("Ampere", (8, 0), True),
    ],
)
def test_machine_code_runs_on_its_major_version_and_ptx_on_newer_ones(
    architecture: str, capability: tuple[int, int], runs: bool
) -> None:
    assert runs_on(architecture, capability) == runs
