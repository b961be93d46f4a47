"""A run may start from the weights of another: all but those of a low-rank kernel that the other did not have."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from testkit import cores, rand, randomized
from torch import Tensor

pytest.importorskip("safetensors")
import safetensors.torch

import scatterbrain as sb
from scatterbrain.training.config import AttentionConfig, CompareConfig, RunConfig
from scatterbrain.training.files import UnusableRun
from scatterbrain.training.initial_weights import initialize_from
from scatterbrain.training.models.vit import VisionTransformer
from scatterbrain.training.trainer import Trainer

EXACT = (sb.Full(), None)
LEARNED = (sb.Window(16), sb.Quadratic(3, "learned"))
CENTROID = (sb.Window(16), sb.Centroid(4))


def model(support: object, low_rank: object, **changes: int) -> VisionTransformer:
    sizes = {
        "image_size": 8,
        "patch_size": 1,
        "channels": 3,
        "classes": 5,
        "width": 16,
        "depth": 2,
        "heads": 2,
    } | changes
    return VisionTransformer(
        **sizes,
        attention=lambda heads, kv_heads, head_dim: sb.ScatterbrainAttention(
            heads, head_dim, kv_heads, support, low_rank
        ),
    )


def saved(folder: Path, weights: dict[str, Tensor]) -> Path:
    """As a checkpoint has them, beside an optimizer."""
    tensors = {f"model/{name}": value.contiguous() for name, value in weights.items()}
    safetensors.torch.save_file(tensors | {"optimizer/0/step": torch.tensor(1.0)}, folder / "checkpoint.safetensors")
    return folder / "checkpoint.safetensors"


@pytest.mark.parametrize("pair", [EXACT, CENTROID, LEARNED], ids=["exact", "centroid", "learned"])
def test_weights_of_an_exact_run_start_any_attention(tmp_path: Path, pair: tuple):
    before = randomized(model(*EXACT))
    after = model(*pair)
    fresh = {name: value.clone() for name, value in after.state_dict().items() if ".attention." in name}
    line = initialize_from(saved(tmp_path, before.state_dict()), after)
    state = after.state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.state_dict().items())
    assert all(torch.equal(state[name], value) for name, value in fresh.items())
    assert line.startswith(f"initial weights from {tmp_path / 'checkpoint.safetensors'}")
    assert ("new: blocks.0.attn.attention.key_bias" in line) == (pair is LEARNED)
    for core in cores(after).values():
        core.support, core.low_rank = EXACT
    torch.testing.assert_close(after(rand(2, 3, 8, 8)), before(rand(2, 3, 8, 8)), rtol=1e-4, atol=1e-5)


def test_the_state_of_the_same_kernel_is_taken(tmp_path: Path):
    before, after = randomized(model(*LEARNED)), model(*LEARNED)
    line = initialize_from(saved(tmp_path, before.state_dict()), after)
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in after.state_dict().items())
    assert "new" not in line and "left out" not in line


def test_the_state_of_another_kernel_is_left_out_and_named(tmp_path: Path):
    before, after = randomized(model(*LEARNED)), model(*CENTROID)
    line = initialize_from(saved(tmp_path, before.state_dict()), after)
    assert torch.equal(after.head.weight, before.head.weight)
    assert "left out: blocks.0.attn.attention.key_bias" in line and "new" not in line
    other = model(sb.Window(16), sb.Quadratic(4, "learned"))  # of another rank
    fresh = other.blocks[0].attn.attention.query_projection.clone()
    line = initialize_from(saved(tmp_path, before.state_dict()), other)
    assert torch.equal(other.blocks[0].attn.attention.query_projection, fresh)
    assert "new: " in line and "left out: " in line


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"depth": 1}, r"lacks nothing and has blocks\.1\..* and 6 more besides"),
        ({"depth": 3}, r"lacks blocks\.2\..* and 6 more and has nothing besides"),
        ({"classes": 7}, r"expected head\.bias of float32, shape \(7,\), got float32, shape \(5,\)"),
        ({"width": 32}, r"expected blocks\.0\.attn\.proj\.bias of float32, shape \(32,\)"),
    ],
)
def test_weights_of_another_model_are_refused_and_nothing_is_loaded(tmp_path: Path, changes: dict, said: str):
    path, after = saved(tmp_path, randomized(model(*EXACT)).state_dict()), model(*LEARNED, **changes)
    before = {name: value.clone() for name, value in after.state_dict().items()}
    with pytest.raises(ValueError, match=rf"train\.initialize_from: .*{said}.*; use the sections task and model"):
        initialize_from(path, after)
    assert all(torch.equal(value, before[name]) for name, value in after.state_dict().items())


def test_weights_that_are_not_finite_are_refused(tmp_path: Path):
    weights = model(*EXACT).state_dict()
    weights["head.weight"][0, 0] = torch.nan
    with pytest.raises(
        ValueError, match=r"train\.initialize_from: expected finite weights, got NaN .* in head\.weight"
    ):
        initialize_from(saved(tmp_path, weights), model(*EXACT))


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path):
    path = tmp_path / "checkpoint.safetensors"
    expected = r"train\.initialize_from: expected .*checkpoint.* of .*scatterbrain train, got .*"
    with pytest.raises(ValueError, match=expected):
        initialize_from(path, model(*EXACT))
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=expected):
        initialize_from(path, model(*EXACT))
    safetensors.torch.save_file({"weight": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=expected + "whose tensors have no names that begin with model/"):
        initialize_from(path, model(*EXACT))


# -------------------- as a key of a run


def test_a_run_starts_from_the_weights_of_another_and_goes_on_without_its_file(
    tiny: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
):
    first = Trainer(tiny(output="exact"))
    first.run()
    source = first.folder.checkpoint
    settings = {"attention": AttentionConfig(keys=16), "output": "tuned", "initialize_from": str(source)}
    second = Trainer(tiny(**settings, steps=4))
    state = second.train_state.model.state_dict()
    shared = first.train_state.model.state_dict()
    assert len(state) > len(shared) and all(torch.equal(state[name], value) for name, value in shared.items())
    assert "initial weights from" in capsys.readouterr().out
    second.run()
    tuned = second.train_state.model.state_dict()
    source.unlink()
    third = Trainer(tiny(**settings, steps=5, resume=True))
    assert all(torch.equal(third.train_state.model.state_dict()[name], value) for name, value in tuned.items())
    assert "initial weights from" not in capsys.readouterr().out
    third.run()


def test_the_exact_run_beside_it_starts_from_the_same_weights(tiny: Callable[..., RunConfig]):
    first = Trainer(tiny(output="exact"))
    first.run()
    settings = {"output": "tuned", "initialize_from": str(first.folder.checkpoint), "steps": 2, "learning_rate": 1e-9}
    config = tiny(attention=AttentionConfig(keys=16), **settings)
    second = Trainer(dataclasses.replace(config, compare=CompareConfig(steps=1)))
    second.run()
    before = first.train_state.evaluate(second.validation_batches()).loss
    records = [json.loads(line) for line in second.folder.exact_metrics.read_text().splitlines()]
    after = next(record["loss"] for record in records if record["kind"] == "validation")
    assert after == pytest.approx(before, rel=1e-5)


def test_a_file_that_does_not_fit_leaves_the_run_that_is_there(tiny: Callable[..., RunConfig], tmp_path: Path):
    first = Trainer(tiny(output="run"))
    first.run()
    before = first.folder.checkpoint.read_bytes()
    with pytest.raises(ValueError, match=r"train\.initialize_from: expected .* got '.*nothing\.safetensors'"):
        config = tiny(output="run", initialize_from=str(tmp_path / "nothing.safetensors"))
        Trainer(dataclasses.replace(config, overwrite=True))
    assert first.folder.checkpoint.read_bytes() == before


def test_weights_of_the_run_that_is_overwritten_are_refused_before_they_are_lost(tiny: Callable[..., RunConfig]):
    first = Trainer(tiny(output="run"))
    first.run()
    before = first.folder.checkpoint.read_bytes()
    config = tiny(output="run", initialize_from=str(first.folder.checkpoint))
    with pytest.raises(UnusableRun, match=r"train\.initialize_from: expected a file that outlives .*another --output"):
        Trainer(dataclasses.replace(config, overwrite=True))
    assert first.folder.checkpoint.read_bytes() == before
