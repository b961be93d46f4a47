"""A model with replaced attention in files, on devices, in dtypes and copies, for every kind of low-rank state."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from testkit import cores, encoder, low_ranks, rand, swapped_encoder
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


# -------------------- checkpoints of models without this library, into memory that holds nothing yet

BLANK = LOW_RANKS | {"default": ...}


def plain_checkpoint() -> dict[str, Tensor]:
    return encoder(32, 2, nested=False, dim_feedforward=48).state_dict()


def on_meta(low_rank: str, is_swapped_there: bool = True) -> nn.TransformerEncoder:
    with torch.device("meta"):
        model = encoder(32, 2, nested=False, dim_feedforward=48).eval()
    with torch.device("meta" if is_swapped_there else "cpu"):
        sb.replace_attention(model, sb.Routed(16, block_q=8), BLANK[low_rank])
    return model


def spoilt(model: nn.Module) -> None:
    """Memory without content may hold anything; what it happens to hold in a test must not decide it."""
    for tensor in model.state_dict().values():
        tensor.fill_(math.nan if tensor.is_floating_point() else -7)


def check_fresh(model: nn.Module, state: dict[str, Tensor]) -> None:
    own = model.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in state.items())
    assert not any(tensor.is_meta for tensor in (*own.values(), *model.buffers()))
    assert all(tensor.isfinite().all() for tensor in own.values())
    for core in cores(model).values():
        assert not core.is_calibrated and not core.calibration_problem
        if isinstance(core.low_rank, sb.Quadratic) and core.low_rank.statistics in ("ema", "learned"):
            rows = core.query_projection.detach()
            torch.testing.assert_close(rows @ rows.mT, torch.eye(rows.shape[1]).expand(len(rows), -1, -1))
    if any(core.needs_calibration for core in cores(model).values()):
        with sb.calibrate(model), torch.no_grad():
            model(tokens())
    with torch.no_grad():
        assert model.to("cpu")(tokens()).isfinite().all()


@pytest.mark.parametrize("is_swapped_there", [True, False], ids=["swapped on meta", "swapped in memory"])
@pytest.mark.parametrize("is_copied", [False, True])
@pytest.mark.parametrize("low_rank", BLANK)
def test_a_plain_checkpoint_fills_a_model_of_empty_memory(low_rank: str, is_copied: bool, is_swapped_there: bool):
    model, state = on_meta(low_rank, is_swapped_there).to_empty(device="cpu"), plain_checkpoint()
    spoilt(model)
    model = copy.deepcopy(model) if is_copied else model
    model.load_state_dict(state, strict=True)
    check_fresh(model, state)


@pytest.mark.parametrize("low_rank", BLANK)
def test_a_plain_checkpoint_is_assigned_to_a_model_on_meta(low_rank: str):
    model, state = on_meta(low_rank), plain_checkpoint()
    model.load_state_dict(state, strict=True, assign=True)
    check_fresh(model, state)


def test_learned_projections_stay_where_empty_memory_was_filled_before_a_plain_checkpoint():
    trained = swapped("learned")
    for core in cores(trained).values():
        core.query_bias.data.add_(1)
    by_loading, by_hand = on_meta("learned").to_empty(device="cpu"), on_meta("learned").to_empty(device="cpu")
    by_loading.load_state_dict(trained.state_dict())
    for module in by_hand.modules():
        for reset in ("reset_parameters", "_reset_parameters"):
            getattr(module, reset, lambda: None)()
    for core in cores(by_hand).values():
        core.query_bias.data.add_(1)
    for model in (by_loading, by_hand):
        model.load_state_dict(plain_checkpoint(), strict=True)
        assert all(core.query_bias.eq(1).all() for core in cores(model).values())


class WithExtraState(nn.Linear):
    """A linear layer whose entries in a state dict are not tensors alone."""

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"version": 1}


def test_a_plain_checkpoint_may_have_entries_that_are_no_tensors():
    plain = nn.MultiheadAttention(32, 4)
    plain.out_proj.__class__ = WithExtraState
    state = plain.state_dict()
    state.move_to_end("out_proj._extra_state", last=False)
    with torch.device("meta"):
        ours = sb.MultiheadAttention(32, 4, support=sb.Window(8), low_rank=sb.Quadratic(4, "learned"))
    ours.out_proj.__class__ = WithExtraState
    ours.load_state_dict(state, strict=True, assign=True)
    assert not any(tensor.is_meta for tensor in (*ours.parameters(), *ours.buffers()))


def features_on_meta() -> tuple[nn.TransformerEncoder, set[str]]:
    """A model whose kernels compute with modules, all on the meta device, and the names of their tensors."""
    with torch.device("meta"):
        model = encoder(32, 2, nested=False, dim_feedforward=48).eval()
        maps = [nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Softplus()) for _ in range(2)]
        sb.replace_attention(model, sb.Window(8), sb.Features(*maps))
    return model, model.state_dict().keys() - plain_checkpoint().keys()


@pytest.mark.parametrize("is_assigned", [False, True], ids=["empty memory", "assigned"])
def test_modules_of_a_kernel_that_nothing_filled_are_missing_in_a_plain_checkpoint(is_assigned: bool):
    model, names = features_on_meta()
    assert len(names) == 16
    if not is_assigned:
        spoilt(model.to_empty(device="cpu"))
    for _ in range(2):  # loading once tells as little of them
        with pytest.raises(RuntimeError, match=r"Missing key.*attention\.query_features\.0\.weight"):
            model.load_state_dict(plain_checkpoint(), strict=True, assign=is_assigned)
        loaded = model.load_state_dict(plain_checkpoint(), strict=False, assign=is_assigned)
        assert set(loaded.missing_keys) == names and not loaded.unexpected_keys


def filled_by_a_whole_checkpoint(model: nn.Module) -> nn.Module:
    model.load_state_dict({name: torch.ones(t.shape, dtype=t.dtype) for name, t in model.state_dict().items()})
    return model


def filled_by_resets(model: nn.Module) -> nn.Module:
    for core in cores(model).values():
        core.reset_parameters()
    assert all(tensor.isfinite().all() for core in cores(model).values() for tensor in core.state_dict().values())
    return model


def filled_by_others_in_their_place(model: nn.Module) -> nn.Module:
    for core in cores(model).values():
        core.query_features, core.key_features = (nn.Linear(8, 8) for _ in range(2))
    return model


@pytest.mark.parametrize(
    "filled",
    [filled_by_a_whole_checkpoint, filled_by_resets, filled_by_others_in_their_place],
    ids=lambda function: function.__name__,
)
@pytest.mark.parametrize("is_copied", [False, True])
def test_modules_of_a_kernel_stay_where_empty_memory_was_filled_before_a_plain_checkpoint(filled, is_copied: bool):
    model, _ = features_on_meta()
    spoilt(model.to_empty(device="cpu"))
    model = filled(copy.deepcopy(model) if is_copied else model)
    own = {path: {n: t.clone() for n, t in core.state_dict().items()} for path, core in cores(model).items()}
    model.load_state_dict(plain_checkpoint(), strict=True)
    for path, core in cores(model).items():
        assert all(torch.equal(tensor, own[path][name]) for name, tensor in core.state_dict().items())


def test_a_module_of_a_kernel_that_cannot_fill_itself_stays_missing():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8, 8))

    model = encoder(32, 2, nested=False, dim_feedforward=48).eval()
    sb.replace_attention(model, sb.Window(8), sb.Features(Own()))
    model.load_state_dict(plain_checkpoint(), strict=True)
    spoilt(model.to("meta").to_empty(device="cpu"))
    for core in cores(model).values():
        core.reset_parameters()
    with pytest.raises(RuntimeError, match=r"Missing key.*attention\.query_features\.weight"):
        model.load_state_dict(plain_checkpoint(), strict=True)


def test_statistics_are_not_made_where_nothing_can_keep_them():
    model = ready("stored")
    for core in cores(model).values():
        for name in list(core._buffers):
            core._buffers[name] = core._buffers[name].to("meta")
    with pytest.raises(ValueError, match="calibrate: .*layers.0.self_attn.attention.*on the meta device.*load"):
        with sb.calibrate(model):
            raise AssertionError("the block was entered")
    core = cores(swapped("stored").to("meta"))["layers.0.self_attn.attention"]
    core.gathered_scale = 0.25
    with pytest.raises(ValueError, match="is_calibrated = True needs statistics, .*on the meta device"):
        core.is_calibrated = True
    assert not core.is_calibrated
