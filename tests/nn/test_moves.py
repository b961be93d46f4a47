"""A model with replaced attention in files, on devices, in dtypes and copies, for every kind of low-rank state."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from testkit import low_ranks, rand, swapped_encoder
from torch import Tensor, nn

import scatterbrain as sb

LOW_RANKS = low_ranks()


@pytest.fixture(params=LOW_RANKS)
def low_rank(request: pytest.FixtureRequest) -> str:
    return request.param


def swapped(low_rank: str) -> nn.TransformerEncoder:
    return swapped_encoder(LOW_RANKS[low_rank]).eval()


def tokens() -> Tensor:
    return rand(2, 24, 32)


def calibrate(model: nn.Module, low_rank: str, dtype: torch.dtype = torch.float32) -> None:
    """Where statistics are calibrated from data."""
    if low_rank in ("stored", "ema"):
        with sb.calibrate(model), torch.no_grad():
            model(tokens().to(dtype))


def ready(low_rank: str) -> nn.TransformerEncoder:
    model = swapped(low_rank)
    calibrate(model, low_rank)
    return model


def restored_from_safetensors(model: nn.Module, low_rank: str, path: Path) -> nn.Module:
    files = pytest.importorskip("safetensors.torch")
    files.save_file(model.state_dict(), path)
    other = swapped(low_rank)
    other.load_state_dict(files.load_file(path), strict=True)
    return other


def restored_by_safetensors_model(model: nn.Module, low_rank: str, path: Path) -> nn.Module:
    files = pytest.importorskip("safetensors.torch")
    files.save_model(model, str(path))
    other = swapped(low_rank)
    assert files.load_model(other, str(path)) == (set(), [])
    return other


def restored_by_torch(model: nn.Module, low_rank: str, path: Path, **how: bool) -> nn.Module:
    torch.save(model.state_dict(), path)
    other = swapped(low_rank)
    other.load_state_dict(torch.load(path, weights_only=True, mmap=how.get("mmap", False)), assign=how["assign"])
    return other


def filled_after_meta(model: nn.Module, low_rank: str, path: Path) -> nn.Module:
    with torch.device("meta"):
        other = swapped(low_rank)
    other.load_state_dict(model.state_dict(), strict=True, assign=True)
    return other


WAYS: dict[str, Callable[[nn.Module, str, Path], nn.Module]] = {
    "safetensors": restored_from_safetensors,
    "safetensors model": restored_by_safetensors_model,
    "torch.save": lambda m, low_rank, path: restored_by_torch(m, low_rank, path, assign=False),
    "torch.save, mapped and assigned": lambda m, low_rank, path: restored_by_torch(
        m, low_rank, path, mmap=True, assign=True
    ),
    "meta, assigned": filled_after_meta,
    "deepcopy": lambda m, low_rank, path: copy.deepcopy(m),
    "pickle": lambda m, low_rank, path: pickle.loads(pickle.dumps(m)),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_went_this_way_gives_the_same_output(low_rank: str, way: str, tmp_path: Path):
    model = ready(low_rank)
    other = WAYS[way](model, low_rank, tmp_path / "file")
    assert other is not model and type(other.layers[1].self_attn) is sb.MultiheadAttention
    with torch.no_grad():
        assert torch.equal(other(tokens()), model(tokens()))


def test_random_features_are_drawn_on_the_cpu_and_follow_the_default_device():
    make = lambda: sb.ScatterbrainAttention(2, 8, support=sb.Window(16), low_rank=sb.Favor(16))
    with torch.device("meta"):
        module = make()
    assert module.projection.is_meta
    module.to_empty(device="cpu").reset_parameters()
    assert torch.equal(module.projection, make().projection)


@pytest.mark.parametrize("how", ["device context", "moved"])
def test_a_model_on_meta_is_emptied_and_reset(low_rank: str, how: str):
    if how == "moved":
        model = swapped(low_rank).to("meta")
    else:
        with torch.device("meta"):
            model = swapped(low_rank)
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    model.to_empty(device="cpu")
    for module in model.modules():
        for name in ("reset_parameters", "_reset_parameters"):
            if hasattr(module, name):
                getattr(module, name)()
    calibrate(model, low_rank)
    assert model(tokens()).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_keep_their_precision(low_rank: str, dtype: torch.dtype):
    model = ready(low_rank)
    before = {name: (buffer.clone(), buffer.dtype) for name, buffer in model.named_buffers()}
    converted = copy.deepcopy(model).to(dtype)
    assert {p.dtype for p in converted.parameters()} == {dtype}
    assert all(torch.equal(b, before[n][0]) and b.dtype == before[n][1] for n, b in converted.named_buffers())
    fresh = swapped(low_rank).to(dtype)
    fresh.load_state_dict(converted.state_dict(), strict=True)
    with torch.no_grad():
        out, expected = converted(tokens().to(dtype)), model(tokens())
        assert torch.equal(fresh(tokens().to(dtype)), out)
    assert (out.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_is_not_that_of_statistics(low_rank: str, dtype: torch.dtype):
    expected = {name: b.dtype for name, b in swapped(low_rank).named_buffers()}
    torch.set_default_dtype(dtype)
    model = swapped(low_rank)
    torch.set_default_dtype(torch.float32)
    assert {name: b.dtype for name, b in model.named_buffers()} == expected
    calibrate(model, low_rank, dtype)
    assert model(tokens().to(dtype)).dtype == dtype


def test_a_double_model_computes_in_double(low_rank: str):
    model = ready(low_rank)
    with torch.no_grad():
        expected = model(tokens())
        out = model.double()(tokens().double())
    assert out.dtype == torch.float64
    torch.testing.assert_close(out.float(), expected, rtol=1e-3, atol=1e-3)
