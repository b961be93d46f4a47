"""Loaders that go around load_state_dict: accelerate's, with layers on disk, and distributed checkpoints, into models
that nothing has calibrated."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_models as hf
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from testkit import cores, low_ranks, rand, swapped_encoder
from torch import Tensor, nn

import scatterbrain as sb
from scatterbrain.integrations.transformers import register

accelerate = pytest.importorskip("accelerate")
files = pytest.importorskip("safetensors.torch")

KERNELS = {name: kernel for name, kernel in low_ranks().items() if name in ("stored", "ema", "learned", "favor")}
ROUTED = register("scatterbrain:loaded", sb.Routed(16, block_q=8), sb.Quadratic(4))
TOKENS = rand(2, 24, 32)


def encoder(kind: str = "stored") -> nn.Module:
    return swapped_encoder(KERNELS[kind]).eval()


def bert() -> nn.Module:
    config = copy.deepcopy(hf.FAMILIES["bert"].build("sdpa").config)
    config._attn_implementation = ROUTED
    return transformers.BertModel(config).eval()


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        if isinstance(model, transformers.BertModel):
            return model(**hf.inputs("bert")[0]).last_hidden_state
        return model(TOKENS)


def ready(model: nn.Module) -> nn.Module:
    """With statistics, where there are any to be fitted."""
    if any(core.low_rank.is_calibrated_from_data for core in cores(model).values()):
        with sb.calibrate(model):
            run(model)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, str], list[str] | None]] = {
    # how it is made, where its parts are where some are on disk, classes that use weights of others
    "encoder": (encoder, {"layers.0": "cpu", "layers.1": "disk"}, ["MultiheadAttention"]),
    "bert": (
        bert,
        {"embeddings": "cpu", "encoder.layer.0": "disk", "encoder.layer.1": "cpu", "pooler": "cpu"},
        None,
    ),
}


def dispatched(name: str, folder: Path, target: Path, include_buffers: bool, **options: Any) -> nn.Module:
    make, _, classes = MODELS[name]
    with accelerate.init_empty_weights(include_buffers=include_buffers):
        model = make()
    return accelerate.load_checkpoint_and_dispatch(
        model, str(folder), offload_folder=str(target), preload_module_classes=classes, **options
    )


def saved(name: str, folder: Path) -> nn.Module:
    model = ready(MODELS[name][0]())
    accelerate.Accelerator().save_model(model, str(folder))
    return model


@pytest.mark.parametrize("disk", [False, True], ids=["in memory", "on disk"])
@pytest.mark.parametrize("name", MODELS)
def test_accelerate_loads_a_calibrated_model_into_one_without_memory(name: str, disk: bool, tmp_path: Path):
    model = saved(name, tmp_path / "saved")
    where = MODELS[name][1] if disk else {"": "cpu"}
    loaded = dispatched(name, tmp_path / "saved", tmp_path, False, device_map=where, offload_buffers=disk)
    assert any(t.is_meta for core in cores(loaded).values() for t in core.buffers()) == disk
    for _ in range(2):
        assert torch.equal(run(loaded), run(model))


def test_accelerate_loads_buffers_that_have_no_memory_either(tmp_path: Path):
    model = saved("encoder", tmp_path / "saved")
    loaded = dispatched("encoder", tmp_path / "saved", tmp_path, True, device_map={"": "cpu"})
    assert torch.equal(run(loaded), run(model))


@pytest.mark.parametrize("missing", ["query_mean", "key_projection", "moment_key_second", "calibration"])
def test_an_entry_that_accelerate_does_not_find_is_refused(missing: str, tmp_path: Path):
    saved("bert", tmp_path / "saved")
    entries = files.load_file(tmp_path / "saved" / "model.safetensors")
    del entries[f"encoder.layer.1.attention.self.scatterbrain.{missing}"]
    files.save_file(entries, tmp_path / "saved" / "model.safetensors")
    loaded = dispatched("bert", tmp_path / "saved", tmp_path, False, device_map={"": "cpu"})
    assert [core.is_calibrated for core in cores(loaded).values()] == [True, False]
    with pytest.raises(ValueError, match="BertSelfAttention is not calibrated, since .* the record beside them"):
        run(loaded)


def test_buffers_that_accelerate_leaves_out_by_default_are_refused_with_the_cure(tmp_path: Path):
    saved("bert", tmp_path / "saved")
    loaded = dispatched("bert", tmp_path / "saved", tmp_path, False, device_map=MODELS["bert"][1])
    with pytest.raises(ValueError, match="not calibrated, since accelerate .* only with offload_buffers=True"):
        run(loaded)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_accelerate_may_cast_whatever_it_loads(dtype: torch.dtype, tmp_path: Path):
    model = saved("encoder", tmp_path / "saved")
    loaded = dispatched("encoder", tmp_path / "saved", tmp_path, False, device_map={"": "cpu"}, dtype=dtype)
    with torch.no_grad():
        out, want = loaded(TOKENS.to(dtype)).float(), run(model)
    assert all(core.is_calibrated for core in cores(loaded).values()) and (out - want).norm() < 0.05 * want.norm()


def test_a_calibrated_model_is_offloaded_and_brought_back():
    model = ready(bert())
    want = run(model)
    accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    assert all(core.buffers().__next__().is_meta for core in cores(model).values())
    assert torch.equal(run(model), want) and torch.equal(run(model), want)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(run(model), want)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("kind", KERNELS)
def test_a_distributed_checkpoint_fills_a_fresh_model_in_place(kind: str, tmp_path: Path):
    model = ready(encoder(kind))
    sb.update_statistics(model)
    dcp.save(model.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    fresh = encoder(kind)
    dcp.load(fresh.state_dict(), checkpoint_id=tmp_path, no_dist=True)  # its tensors, and no load_state_dict after it
    assert torch.equal(run(fresh), run(model))
    for mine, theirs in zip(cores(model).values(), cores(fresh).values()):
        assert (mine.is_calibrated, mine.scale) == (theirs.is_calibrated, theirs.scale)
        assert all(getattr(mine, count) == getattr(theirs, count) for count in mine.low_rank.counts)
