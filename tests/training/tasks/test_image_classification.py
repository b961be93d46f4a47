"""Images are classified by either model, with any attention, and what does not fit is named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from testkit import cores

np = pytest.importorskip("numpy")
import scatterbrain as sb
from scatterbrain.training.config import DataConfig, ModelConfig, TrainConfig, WrongType
from scatterbrain.training.models.t2t_vit import T2TViT
from scatterbrain.training.models.vit import VisionTransformer
from scatterbrain.training.tasks.image_classification import ImageClassification

CONFIG = ModelConfig(layers=2, width=16, heads=2, mlp="gelu", norm="layer", positions="learned")
FIXED = ModelConfig(layers=2, width=16, heads=2, mlp="gelu", norm="layer", positions="none", mlp_width=24)
VIT = ImageClassification(image_size=8)
T2T = ImageClassification(model="t2t_vit", image_size=32, token_width=8)


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """20 images of 8 x 8 pixels, of 5 classes."""
    draw = np.random.default_rng(0)
    pixels = {f"x_{part}": draw.integers(0, 256, (20, 8, 8, 3), np.uint8) for part in ("train", "test")}
    np.savez(tmp_path / "images.npz", **pixels, **{f"y_{part}": np.arange(20) % 5 for part in ("train", "test")})
    return DataConfig(path=str(tmp_path / "images.npz"))


def window(heads: int, kv_heads: int, head_dim: int) -> torch.nn.Module:
    return sb.ScatterbrainAttention(heads, head_dim, kv_heads, sb.Window(16), sb.Centroid(4))


@pytest.mark.parametrize(
    ("task", "config", "length", "replaced"),
    [
        (VIT, CONFIG, 64, 2),
        (ImageClassification(image_size=16, patch_size=4, pooling="class"), CONFIG, 17, 2),
        (T2T, FIXED, 64, 2),
        (
            ImageClassification(model="t2t_vit", image_size=8, first_kernel=3, first_stride=1, attend="all"),
            FIXED,
            64,
            4,
        ),
        (ImageClassification(model="t2t_vit", image_size=32, tokens="performer"), FIXED, 64, 2),
    ],
)
def test_each_model_maps_a_batch_to_a_logit_for_each_class(
    data: DataConfig, task: ImageClassification, config: ModelConfig, length: int, replaced: int
):
    opened = task.open(data, TrainConfig(batch=4))
    model = task.build_model(opened, config, window, torch.Generator().manual_seed(0))
    batch = opened.training_batch(0, 0.0)
    assert batch.inputs.shape == (4, 3, task.image_size, task.image_size) and batch.mask is None
    logits = model(batch.inputs, batch.mask)
    assert logits.shape == (4, 5) and batch.targets.shape == (4,)
    assert opened.tokens == length and (opened.input_size, opened.classes) == (3, 5)
    assert len(cores(model)) == replaced
    logits.sum().backward()


def test_sizes_of_the_configuration_reach_the_models(data: DataConfig):
    opened = VIT.open(data, TrainConfig(batch=4))
    vit = VIT.build_model(opened, CONFIG, window, torch.Generator())
    t2t = T2T.build_model(opened, FIXED, window, torch.Generator())
    assert isinstance(vit, VisionTransformer) and isinstance(t2t, T2TViT)
    assert (len(vit.blocks), vit.head.in_features, vit.blocks[0].attn.num_heads) == (2, 16, 2)
    assert (len(t2t.blocks), t2t.head.in_features, t2t.blocks[0].attn.num_heads) == (2, 16, 2)
    assert (vit.blocks[0].mlp.fc1.out_features, t2t.blocks[0].mlp.fc1.out_features) == (64, 24)
    assert vit.order is not None and t2t.tokens_to_token.order1 is not None
    raster = ImageClassification(image_size=8, hilbert=False)
    assert raster.build_model(opened, CONFIG, window, torch.Generator()).order is None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model": "resnet"}, "task.model: expected 'vit' or 't2t_vit', got 'resnet'"),
        ({"image_size": 0}, "task.image_size: expected positive, got 0"),
        ({"image_size": 10, "patch_size": 4}, "task.image_size: expected a multiple of 4, got 10"),
        ({"model": "t2t_vit", "image_size": 40}, "task.image_size: expected a multiple of 16, got 40"),
        ({"model": "t2t_vit", "first_kernel": 3}, "task.first_kernel: expected task.first_stride = 4 or more, got 3"),
        ({"shift": -1}, "task.shift: expected 0 or more, got -1"),
    ],
)
def test_fields_that_do_not_fit_are_named(fields: dict, said: str):
    with pytest.raises(ValueError, match=said):
        ImageClassification(**fields)
    with pytest.raises(WrongType, match="task.mirror: expected true or false, got 1"):
        ImageClassification(mirror=1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mlp": "swiglu"}, "model.mlp: expected 'gelu', the one form of vit, got 'swiglu'"),
        ({"norm": "rms"}, "model.norm: expected 'layer'"),
        ({"positions": "rotary"}, "model.positions: expected 'learned'"),
        ({"convolution": 2}, "model.convolution: expected 1"),
        ({"kv_heads": 1}, "model.kv_heads: expected null"),
    ],
)
def test_a_form_that_the_models_do_not_have_is_refused(data: DataConfig, changes: dict, said: str):
    config = ModelConfig(**{**vars(CONFIG), **changes})
    with pytest.raises(ValueError, match=said):
        VIT.build_model(VIT.open(data, TrainConfig()), config, window, torch.Generator())


def test_data_that_are_missing_or_not_square_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match="data.path: expected a .npz file.*'stdlib'.*does not exist"):
        VIT.open(DataConfig(), TrainConfig())
    pixels = {f"x_{part}": np.zeros((2, 8, 6, 3), np.uint8) for part in ("train", "test")}
    np.savez(tmp_path / "images.npz", **pixels, y_train=[0, 1], y_test=[0, 1])
    with pytest.raises(ValueError, match="data.path: expected square images, got '8 x 6 pixels'"):
        VIT.open(DataConfig(path=str(tmp_path / "images.npz")), TrainConfig())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"first_kernel": 8}, "task.first_kernel: expected the default 7, as vit has no use for it, got 8"),
        ({"token_width": 32}, "task.token_width: expected the default 64, as vit"),
        ({"tokens": "performer"}, "task.tokens: expected the default 'transformer', as vit"),
        ({"attend": "all"}, "task.attend: expected the default 'tokens', as vit"),
        ({"model": "t2t_vit", "patch_size": 4}, "task.patch_size: expected the default 1, as t2t_vit"),
        ({"model": "t2t_vit", "pooling": "class"}, "task.pooling: expected the default 'mean', as t2t_vit"),
    ],
)
def test_a_field_of_the_other_model_is_not_dropped_silently(data, fields: dict, said: str):
    task = ImageClassification(**fields)
    with pytest.raises(ValueError, match=f"{said}.*; leave it out, or set it to "):
        task.check_unused(task.open(data, TrainConfig()), CONFIG)


@pytest.mark.parametrize("task", [VIT, T2T], ids=lambda task: task.model)
@pytest.mark.parametrize("changes", [{"rope_base": 500.0}, {"tied": False}, {"embedding_std": 2.0}], ids=str)
def test_a_setting_of_the_model_that_images_have_no_use_for_is_not_dropped_silently(data, task, changes: dict):
    opened = task.open(data, TrainConfig())
    config = dataclasses.replace(FIXED if task is T2T else CONFIG, **changes)
    with pytest.raises(ValueError, match=f"model.{next(iter(changes))}: expected the default .* no use for it, got"):
        task.check_unused(opened, config)
