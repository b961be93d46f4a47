"""Tokens along a Hilbert curve inside the blocks: outputs stay for every grid, and code that would see the curve is
refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from testkit import assert_close_in_scale as close
from testkit import cores, randomized
from torch import Tensor, nn

import scatterbrain as sb
from scatterbrain.hilbert import hilbert_distance, hilbert_order
from scatterbrain.integrations.permutation import coordinate_order
from scatterbrain.integrations.vision import apply_order
from scatterbrain.integrations.vision_families import ROTARY

timm = pytest.importorskip("timm")
hf = pytest.importorskip("transformers")
import timm_models as models

EVERY_KEY: dict[str, Any] = {"support": sb.Window(4096), "low_rank": None, "token_order": "hilbert"}
ORDERED: dict[str, Any] = {"support": sb.Full(), "token_order": "hilbert"}


class Seen:
    """A hook that keeps the tokens entering the first block, and is allowed inside the ordered part."""

    __module__ = "scatterbrain.tests"

    def __init__(self, block: nn.Module) -> None:
        block.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, args: tuple) -> None:
        self.tokens = args[0]


def check_curve(model: nn.Module, block: nn.Module, x: Tensor, prefix: int, grid: tuple[int, int], **arguments) -> None:
    """The first block of the ordered model gets the original's tokens along the curve, prefix tokens first."""
    seen = Seen(block)
    with torch.no_grad():
        model(x, **arguments)
        before = seen.tokens
        report = sb.replace_attention(model, **ORDERED)
        model(x, **arguments)
        report.restore()
    order = torch.cat([torch.arange(prefix), hilbert_order(*grid) + prefix])
    assert prefix + grid[0] * grid[1] == before.shape[1]
    torch.testing.assert_close(seen.tokens, before[:, order])
    assert not torch.equal(seen.tokens, before)


# ------------------------------------------------------------------------------------------------------------- curves


def test_distances_give_the_order():
    rows, columns = torch.meshgrid(torch.arange(5), torch.arange(11), indexing="ij")
    assert torch.equal(hilbert_distance(rows.flatten(), columns.flatten(), 16).argsort(), hilbert_order(5, 11))
    square = hilbert_distance(rows.flatten(), columns.flatten(), 64).sort().values
    assert square.unique().numel() == 55


def test_coordinates_are_ordered_for_each_image_and_padding_keeps_its_place():
    grids, tokens = [(2, 4), (3, 2)], 9
    coordinates, valid = torch.zeros(2, tokens, 2, dtype=torch.long), torch.zeros(2, tokens, dtype=torch.bool)
    coordinates[0, :8] = torch.cartesian_prod(torch.arange(2), torch.arange(4))
    valid[0, :8] = True
    coordinates[1, [0, 2, 3, 5, 6, 8]] = torch.cartesian_prod(torch.arange(3), torch.arange(2))
    valid[1, [0, 2, 3, 5, 6, 8]] = True
    order = coordinate_order(coordinates, valid, 1)
    assert torch.equal(order.sort(-1).values, torch.arange(tokens + 1).expand(2, -1)) and (order[:, 0] == 0).all()
    for row, (height, width) in enumerate(grids):
        kept = order[row, 1:] - 1
        assert torch.equal(kept[~valid[row]], torch.arange(tokens)[~valid[row]])
        cells = coordinates[row, kept[valid[row]]]
        steps = (cells[1:] - cells[:-1]).abs().sum(-1)
        assert len(cells) == height * width and steps.max() <= 3


# --------------------------------------------------------------------------------------------------------------- timm

PREFIX = {
    "no class token": 0,
    "distilled": 2,
    "residual post norm": 0,
    "siglip, attention pool": 0,
    "dinov2 with registers": 5,
    "naflex": 4,
    "dinov3": 5,
    "dinov3, any size": 5,
    "rope, registers, pooled": 4,
    "fewer key heads": 5,
}
GRIDS = {"dynamic image size": (5, 2), "dynamic padding": (4, 5)}


@pytest.mark.parametrize("name", models.FAMILIES | models.ROTARY)
def test_timm_blocks_see_the_curve(name: str):
    model = models.build(name)
    check_curve(model, model.blocks[0], models.images(name), PREFIX.get(name, 1), GRIDS.get(name, (3, 5)))


@pytest.mark.parametrize("name", models.FAMILIES | models.ROTARY)
@pytest.mark.parametrize("settings", [ORDERED, EVERY_KEY], ids=["full", "every key"])
def test_timm_outputs_stay(name: str, settings: dict[str, Any]):
    model, x = models.build(name), models.images(name)
    as_dict = {} if name in models.ROTARY else {"output_dict": True}  # timm's Eva has no such argument

    def outputs() -> list[Any]:
        return [
            model(x),
            model.forward_features(x),
            model.forward_intermediates(x),
            model.forward_intermediates(x, [0], True, True, True, "NLC", True),
            model.forward_intermediates(x, return_prefix_tokens=True, **as_dict),
        ]

    with torch.no_grad():
        before = outputs()
        report = sb.replace_attention(model, **settings)
        close(outputs(), before)
        report.restore()
        close(outputs(), before)


def test_timm_get_intermediate_layers_and_features_only():
    model, x = models.build("vit"), models.images("vit")
    features = timm.create_model(
        "vit_tiny_patch16_224", img_size=models.SIZE, features_only=True, out_indices=2, **models.TINY
    ).eval()
    randomized(features, 0.3)
    with torch.no_grad():
        before = model.get_intermediate_layers(x, 2, reshape=True, norm=True), features(x)
        for swapped in (model, features):
            sb.replace_attention(swapped, **ORDERED)
        close((model.get_intermediate_layers(x, 2, reshape=True, norm=True), features(x)), before)


def test_one_model_takes_images_of_any_size():
    model = models.build("dynamic image size")
    sizes = [(14, 14), (28, 98), (98, 28), (70, 42)]
    images = [torch.randn(1, 3, *size) for size in sizes]
    with torch.no_grad():
        before = [model.forward_features(x) for x in images]
        sb.replace_attention(model, **ORDERED)
        for x, expected in zip(images, before):
            close(model.forward_features(x), expected)


def test_gradients_stay():
    model, x = models.build("distilled").train(), models.images("distilled").requires_grad_()
    sum(model(x)).square().sum().backward() if isinstance(model(x), tuple) else model(x).square().sum().backward()
    before = x.grad.clone()
    x.grad = None
    sb.replace_attention(model, **ORDERED)
    out = model(x)
    (sum(out) if isinstance(out, tuple) else out).square().sum().backward()
    close(x.grad, before)


@pytest.mark.parametrize("name", ["vit", "dinov3", "rope mixed"])
def test_patch_dropout_in_training_keeps_its_own_order_and_says_so(name: str):
    model, x = models.build(name, patch_drop_rate=0.5), models.images(name)
    exact = copy.deepcopy(model)
    sb.replace_attention(model, **ORDERED)
    close(model(x), exact(x))
    model.train(), exact.train()
    torch.manual_seed(3)
    before = exact(x)
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="token_order has no effect in training with patch dropout"):
        after = model(x)
    torch.testing.assert_close(after, before)


def test_prune_and_reset_of_a_timm_model_keep_its_order():
    model, x = models.build("vit"), models.images("vit")
    exact = copy.deepcopy(model)
    sb.replace_attention(model, **ORDERED)
    for each in (model, exact):
        each.prune_intermediate_layers([0], prune_norm=True)
    with torch.no_grad():
        close(model.forward_intermediates(x, [0]), exact.forward_intermediates(x, [0]))
        close(model.forward_features(x), exact.forward_features(x))


# ------------------------------------------------------------------------------------------------------- transformers

SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 64, "patch_size": 4}
ODD = (20, 36)  # a grid of 5 x 9
ANY = {"interpolate_pos_encoding": True}
DINOV3 = hf.DINOv3ViTConfig(image_size=24, num_register_tokens=2, **SMALL)
HUGGING_FACE = {  # model, configuration, image size, arguments of its forward, prefix
    "vit": (hf.ViTModel, hf.ViTConfig(image_size=ODD, **SMALL), ODD, {}, 1),
    "vit, other size": (hf.ViTModel, hf.ViTConfig(image_size=24, **SMALL), ODD, ANY, 1),
    "vit_msn": (hf.ViTMSNModel, hf.ViTMSNConfig(image_size=ODD, **SMALL), ODD, {}, 1),
    "ijepa": (hf.IJepaModel, hf.IJepaConfig(image_size=ODD, **SMALL), ODD, {}, 0),
    "deit": (hf.DeiTModel, hf.DeiTConfig(image_size=20, **SMALL), (20, 20), {}, 2),
    "dinov2": (hf.Dinov2Model, hf.Dinov2Config(image_size=24, **SMALL), ODD, {}, 1),
    "registers": (hf.Dinov2WithRegistersModel, hf.Dinov2WithRegistersConfig(image_size=24, **SMALL), ODD, {}, 5),
    "backbone": (hf.Dinov2Backbone, hf.Dinov2Config(image_size=24, out_indices=[1, 2], **SMALL), ODD, {}, 1),
    "dinov3": (hf.DINOv3ViTModel, DINOV3, ODD, {}, 3),
    "dinov3 backbone": (hf.DINOv3ViTBackbone, DINOV3, ODD, {}, 3),
    "clip": (hf.CLIPVisionModel, hf.CLIPVisionConfig(image_size=24, **SMALL), ODD, ANY, 1),
    "siglip": (hf.SiglipVisionModel, hf.SiglipVisionConfig(image_size=24, **SMALL), ODD, ANY, 0),
}


def hugging_face(name: str) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    cls, config, size, arguments, _ = HUGGING_FACE[name]
    model = randomized(cls(config), 0.25, vectors=0.7).eval()
    return model, torch.randn(2, 3, *size), arguments


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_transformers_layers_see_the_curve(name: str):
    model, x, arguments = hugging_face(name)
    block = next(m for m in model.modules() if isinstance(m, nn.ModuleList))[0]
    check_curve(model, block, x, HUGGING_FACE[name][4], (x.shape[2] // 4, x.shape[3] // 4), **arguments)


@pytest.mark.filterwarnings("ignore:MultiheadAttention runs exact attention:UserWarning")  # SigLIP's pooling head
@pytest.mark.parametrize("name", HUGGING_FACE)
@pytest.mark.parametrize("settings", [ORDERED, EVERY_KEY], ids=["full", "every key"])
def test_transformers_outputs_and_hidden_states_stay(name: str, settings: dict[str, Any]):
    model, x, arguments = hugging_face(name)
    with torch.no_grad():
        before = model(x, output_hidden_states=True, **arguments)
        report = sb.replace_attention(model, **settings)
        close(dict(model(x, output_hidden_states=True, **arguments)), dict(before))
        as_tuple = model(x, return_dict=False, **arguments)
        assert isinstance(as_tuple, tuple)
        close(as_tuple[0], before[0])
        report.restore()
        close(dict(model(x, output_hidden_states=True, **arguments)), dict(before))


def test_attention_weights_are_put_back():
    model, x, _ = hugging_face("dinov2")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        before = model(x, output_attentions=True).attentions
        apply_order(model)
        close(model(x, output_attentions=True).attentions, before)


def test_padding_masks_of_transformers_are_ordered_with_the_tokens():
    model, x, _ = hugging_face("dinov2")
    mask = torch.ones(2, 1 + 5 * 9, dtype=torch.long)
    mask[:, 20:] = 0
    with torch.no_grad():
        before = model(x, attention_mask=mask).last_hidden_state[:, :20]
        sb.replace_attention(model, **ORDERED)
        close(model(x, attention_mask=mask).last_hidden_state[:, :20], before)
        with pytest.raises(ValueError, match=r"expected attention_mask of shape \(batch, tokens\)"):
            model(x, attention_mask=mask[:, None, None, :])


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # transformers' own name for it
def test_models_around_an_ordered_model_work_and_checkpoint_gradients():
    model = hf.ViTForImageClassification(hf.ViTConfig(image_size=20, **SMALL)).train()
    x = torch.randn(2, 3, 20, 20)
    model(x, labels=torch.tensor([0, 1])).loss.backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    report = sb.replace_attention(model, **EVERY_KEY)
    assert "vit: tokens in Hilbert order" in report.notes
    model.gradient_checkpointing_enable()
    model.zero_grad()
    model(x, labels=torch.tensor([0, 1])).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, before[name], rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------------------------- refused masks


def test_masks_of_a_timm_model_are_refused():
    model, x = models.build("vit"), models.images("vit")
    sb.replace_attention(model, **ORDERED)
    for arguments in ({"attn_mask": torch.ones(16, 16, dtype=torch.bool)}, {"is_causal": True}):
        with pytest.raises(ValueError, match="speaks of tokens in the model's order"):
            model.forward_features(x, **arguments)
        with pytest.raises(ValueError, match="speaks of tokens in the model's order"):
            model.forward_intermediates(x, **arguments)
    close(model(x), models.build("vit")(x))


@pytest.mark.parametrize("where", ["blocks.1", "blocks.0.attn.qkv", "norm"])
def test_hooks_that_would_see_the_curve_are_refused_by_name(where: str):
    model, x = models.build("vit"), models.images("vit")
    sb.replace_attention(model, **ORDERED)
    handle = model.get_submodule(where).register_forward_hook(lambda module, args, out: None)
    with pytest.raises(RuntimeError, match=f"a forward hook on {where} would see tokens in the order"):
        model(x)
    handle.remove()
    model.patch_embed.register_forward_hook(lambda module, args, out: None)
    close(model(x), models.build("vit")(x))


class Shuffling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def with_own_block() -> nn.Module:
    model = models.build("vit")
    model.blocks[1].ls1 = Shuffling()
    return model


def with_convolution() -> nn.Module:
    model = models.build("vit")
    model.blocks[1].ls1 = nn.Conv1d(16, 16, 1)
    return model


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 3)), "expected a model with a vision transformer among timm.VisionTransf"),
        (
            lambda: timm.create_model("vit_relpos_small_patch16_224", depth=1),
            "VisionTransformerRelPos: .*bias for each",
        ),
        (lambda: models.build("naflex", rope_type="axial"), "NaFlexVit: .*rotated by position"),
        (with_own_block, "Shuffling inside blocks may depend on the order"),
        (with_convolution, "Conv1d inside blocks depends on the order"),
    ],
)
def test_models_that_depend_on_the_order_are_refused_before_anything_changes(build, reason: str):
    model = build()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=reason):
        sb.replace_attention(model, **EVERY_KEY)
    assert [type(module) for module in model.modules()] == classes


def test_a_second_order_and_an_unknown_one_are_refused():
    model = models.build("vit")
    sb.replace_attention(model, **ORDERED)
    with pytest.raises(ValueError, match="its tokens are ordered already"):
        sb.replace_attention(model, **ORDERED)
    with pytest.raises(
        ValueError, match=r"token_order must be 'auto', 'hilbert', or 'natural' \(or None\), got 'raster'"
    ):
        sb.replace_attention(model, token_order="raster")


@pytest.mark.parametrize("token_order", ["hilbert", "auto"])
def test_the_report_names_ordered_models_and_others(token_order: str):
    pair = nn.ModuleDict(
        {"vit": models.build("vit"), "naflex": models.build("naflex", rope_type="axial", reg_tokens=0)}
    )
    text = str(sb.replace_attention(pair, **{**EVERY_KEY, "token_order": token_order})).splitlines()
    assert text[-3:] == [
        "vit: tokens in Hilbert order",
        f"naflex: tokens in their own order, NaFlexVit: {ROTARY}",
        "vit: its first token attends to every key exactly",
    ]


# ------------------------------------------------------------------------------------------------- order by default

WINDOW: dict[str, Any] = {"support": sb.Window(4), "low_rank": sb.Quadratic(4, "input")}
LISTS = sb.Blocks(torch.zeros(1, 1, 4, 1, dtype=torch.int32), torch.ones(1, 1, 4, dtype=torch.int32), 4, 4)


def order_notes(report: sb.integrations.Report) -> list[str]:
    return [note for note in report.notes if "order" in note]


@pytest.mark.parametrize(
    ("support", "is_ordered"),
    [
        (sb.Routed(16), True),
        (sb.Routed(32, block_q=1, block_k=8, window=16), True),
        (sb.Window(8), True),
        (sb.Full(), False),
        (sb.Empty(), False),
        (LISTS, False),
    ],
)
def test_patches_are_ordered_by_default_where_the_support_gains_from_it(support: sb.supports.Support, is_ordered: bool):
    model = models.build("vit", depth=1)
    report = sb.replace_attention(model, support, sb.Quadratic(4, "input"))
    assert order_notes(report) == ["the model: tokens in Hilbert order"] * is_ordered
    assert hasattr(model, "_token_order") == is_ordered
    report.restore()
    assert not hasattr(model, "_token_order") and type(model) is timm.models.VisionTransformer


def test_the_default_is_the_hilbert_order_to_the_bit_and_can_be_refused():
    x, out = models.images("vit"), {}
    with torch.no_grad():
        for order in ("default", "hilbert", "natural", None):
            model = models.build("vit")
            sb.replace_attention(model, **WINDOW, **({} if order == "default" else {"token_order": order}))
            out[order] = model(x)
    assert torch.equal(out["default"], out["hilbert"]) and torch.equal(out["natural"], out[None])
    assert not torch.allclose(out["default"], out["natural"], rtol=1e-3, atol=1e-3)


def test_models_and_layers_without_an_approximation_keep_their_order():
    model = models.build("vit")
    with pytest.warns(UserWarning, match="changed nothing"):
        report = sb.replace_attention(model, **WINDOW, where=lambda path: False)
    assert order_notes(report) == [] and not hasattr(model, "_token_order")
    report = sb.replace_attention(nn.TransformerEncoderLayer(16, 2), **WINDOW)
    assert order_notes(report) == []


def test_calls_that_speak_of_the_models_order_run_in_it_and_say_so():
    model, x = models.build("vit"), models.images("vit")
    natural = copy.deepcopy(model)
    sb.replace_attention(model, **WINDOW)
    sb.replace_attention(natural, **WINDOW, token_order="natural")
    ordered = model(x)
    mask, seen = torch.ones(2, 1, 1, x.shape[2] * x.shape[3] // 256 + 1, dtype=torch.bool), []
    mask[..., 5:] = False
    with torch.no_grad():
        with pytest.warns(UserWarning, match="own order: attn_mask speaks of tokens in the model's order"):
            assert torch.equal(model.forward_features(x, attn_mask=mask), natural.forward_features(x, attn_mask=mask))
        handle = model.blocks[1].register_forward_hook(lambda module, args, out: seen.append(out))
        natural.blocks[1].register_forward_hook(lambda module, args, out: seen.append(out))
        with pytest.warns(UserWarning, match="own order: a forward hook on blocks.1 would see"):
            assert torch.equal(model(x), natural(x)) and torch.equal(*seen)
        handle.remove()
        assert torch.equal(model(x), ordered)


def test_a_compiled_model_with_a_hook_inside_shows_it_the_models_order():
    model, x, seen = models.build("vit", depth=1), models.images("vit"), []
    natural = model.blocks[0].norm1(model.norm_pre(model._pos_embed(model.patch_embed(x))))
    sb.replace_attention(model, **WINDOW)
    model.blocks[0].norm1.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad(), pytest.warns(UserWarning, match="a forward hook on blocks.0.norm1"):
        torch.compile(model, backend="aot_eager")(x)
    close(seen[0], natural)


# --------------------------------------------------------------------------------------- order by the configuration


def saved(model: nn.Module, folder: Any) -> str:
    model.save_pretrained(folder)
    return str(folder)


def ordered_paths(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if hasattr(module, "_token_order")]


@pytest.fixture
def dinov2(tmp_path: Any) -> str:
    return saved(hugging_face("dinov2")[0], tmp_path / "dinov2")


@pytest.fixture
def dinov3(tmp_path: Any) -> str:
    return saved(hugging_face("dinov3")[0], tmp_path / "dinov3")


def load(folder: str, cls: Any = hf.AutoModel, **arguments: Any) -> nn.Module:
    import scatterbrain.integrations.transformers as integration

    if "scatterbrain:order_test" not in integration.SETTINGS:
        integration.register("scatterbrain:order_test", *WINDOW.values())
    return cls.from_pretrained(folder, **{"attn_implementation": "scatterbrain:order_test", **arguments})


def test_models_that_choose_the_implementation_are_ordered_as_replace_attention_does_it(dinov2: str):
    model, x = load(dinov2), torch.randn(2, 3, *ODD)
    replaced = hf.AutoModel.from_pretrained(dinov2)
    sb.replace_attention(replaced, **WINDOW, token_order="hilbert")
    natural = load(dinov2, scatterbrain_token_order="natural")
    assert ordered_paths(model) == [""] and ordered_paths(natural) == []
    with torch.no_grad():
        assert torch.equal(model(x).last_hidden_state, replaced(x).last_hidden_state)
        assert not torch.equal(model(x).last_hidden_state, natural(x).last_hidden_state)


def test_from_pretrained_asks_for_an_order_or_refuses_it_and_saves_the_choice(dinov2: str, tmp_path: Any):
    model = load(dinov2, scatterbrain_token_order="natural")
    again = load(saved(model, tmp_path / "natural"))
    assert again.config.scatterbrain_token_order == "natural" and ordered_paths(again) == []
    assert ordered_paths(load(dinov2, scatterbrain_token_order="hilbert")) == [""]
    assert ordered_paths(load(dinov2, attn_implementation="sdpa", scatterbrain_token_order="hilbert")) == []
    assert ordered_paths(load(dinov2, attn_implementation="scatterbrain:full")) == []
    assert ordered_paths(load(dinov2, hf.AutoModelForImageClassification)) == ["dinov2"]
    with pytest.raises(ValueError, match=r"scatterbrain_token_order must be 'auto', 'hilbert', .*got 'raster'"):
        load(dinov2, scatterbrain_token_order="raster")
    assert "scatterbrain_token_order" not in hf.Dinov2Config().to_dict()


def test_a_hilbert_order_asked_for_by_name_raises_where_there_is_none():
    import scatterbrain.integrations.transformers  # noqa: F401  (registers the implementations)

    config = hf.BertConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=3, intermediate_size=8)
    config._attn_implementation, config.scatterbrain_token_order = "scatterbrain", "hilbert"
    with pytest.raises(ValueError, match="scatterbrain_token_order='hilbert' expected a model with a vision tr.*BertM"):
        hf.BertModel(config)
    config.scatterbrain_token_order = "auto"
    assert ordered_paths(hf.BertModel(config)) == []


def test_another_implementation_undoes_the_order(dinov2: str):
    exact, model, x = hf.AutoModel.from_pretrained(dinov2), load(dinov2), torch.randn(2, 3, *ODD)
    model.set_attn_implementation("sdpa")
    assert ordered_paths(model) == [] and type(model) is hf.Dinov2Model
    with torch.no_grad():
        assert torch.equal(model(x).last_hidden_state, exact(x).last_hidden_state)
    model.set_attn_implementation("scatterbrain:order_test")
    assert ordered_paths(model) == [""]
    model.config.scatterbrain_token_order = "natural"
    model.set_attn_implementation("scatterbrain:order_test")
    assert ordered_paths(model) == []
    report = sb.replace_attention(exact, **WINDOW)
    exact.set_attn_implementation("sdpa")
    assert ordered_paths(exact) == []
    report.restore()
    assert type(exact) is hf.Dinov2Model


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_of_an_ordered_model_keep_the_order_and_lose_it_by_themselves(dinov3: str, copied: Any):
    exact, model, x = hf.AutoModel.from_pretrained(dinov3), load(dinov3), torch.randn(1, 3, *ODD)
    again = copied(model)
    with torch.no_grad():
        ordered = model(x).last_hidden_state
        assert torch.equal(again(x).last_hidden_state, ordered)
        again.set_attn_implementation("sdpa")
        assert torch.equal(again(x).last_hidden_state, exact(x).last_hidden_state)
        assert not again.embeddings._forward_hooks and not again.rope_embeddings._forward_hooks
        assert torch.equal(model(x).last_hidden_state, ordered)


def test_of_two_towers_the_images_are_ordered(tmp_path: Any):
    text = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 8}
    tokens = {"eos_token_id": 49, "bos_token_id": 1, "pad_token_id": 2}
    tower = {
        "text_config": {**text, "vocab_size": 50, **tokens},
        "vision_config": {**SMALL, "image_size": 20},
    }
    folder = saved(hf.CLIPModel(hf.CLIPConfig(**tower)), tmp_path)
    exact, model = hf.AutoModel.from_pretrained(folder), load(folder)
    assert ordered_paths(model) == ["vision_model"]
    assert ordered_paths(load(folder, scatterbrain_token_order="natural")) == []
    assert ordered_paths(load(folder, scatterbrain_token_order="hilbert")) == ["vision_model"]
    batch = {"input_ids": torch.tensor([[3, 4, 49]]), "pixel_values": torch.randn(1, 3, 20, 20)}
    every_key = copy.deepcopy(model)
    for core in cores(every_key).values():
        core.support, core.low_rank = sb.Window(4096), None
    with torch.no_grad():
        close(every_key(**batch).image_embeds, exact(**batch).image_embeds)


# ------------------------------------------------------------------------------------------------------- class tokens


@pytest.mark.parametrize("name", ["vit", "distilled", "dinov2 with registers", "no class token"])
def test_tokens_before_the_patches_attend_to_every_key_exactly(name: str):
    model, x = models.build(name), models.images(name)
    attention, inputs = model.blocks[0].attn, []
    attention.register_forward_hook(lambda module, args, out: inputs.append((args[0], out)))
    with torch.no_grad():
        model(x)
        sb.replace_attention(model, sb.Window(1, block_q=1), None, token_order="natural")
        model(x)
    prefix = PREFIX.get(name, 1)
    assert attention.attention.exact_queries == prefix
    assert torch.equal(inputs[1][0], inputs[0][0])
    torch.testing.assert_close(inputs[1][1][:, :prefix], inputs[0][1][:, :prefix])
    assert not torch.allclose(inputs[1][1][:, prefix:], inputs[0][1][:, prefix:], rtol=1e-2, atol=1e-2)


def test_models_of_transformers_that_choose_the_implementation_have_exact_class_tokens_too():
    import scatterbrain.integrations.transformers  # noqa: F401  (registers the implementations)

    config = hf.Dinov2WithRegistersConfig(image_size=24, **SMALL)
    config._attn_implementation = "scatterbrain"
    model = hf.Dinov2WithRegistersModel(config)
    assert [core.exact_queries for core in cores(model).values()] == [5, 5]


def test_an_ordered_model_saves_as_its_own_class(tmp_path):
    model, x, _ = hugging_face("dinov2")
    before = model(x).last_hidden_state
    sb.replace_attention(model, **ORDERED)
    model.save_pretrained(tmp_path)
    again = hf.AutoModel.from_pretrained(tmp_path)
    assert type(again) is hf.Dinov2Model and model.config.architectures == ["Dinov2Model"]
    close(again(x).last_hidden_state, before)


# ------------------------------------------------------------------------------------------------------------ compile


def test_compiled_models_take_images_of_several_sizes():
    model = models.build("dynamic image size", depth=1)
    sb.replace_attention(model, sb.Window(4), sb.Quadratic(4, "input"), token_order="hilbert")
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        for size in ((70, 28), (56, 84), (28, 70)):
            x = torch.randn(1, 3, *size)
            close(compiled(x), model(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["vit", "dinov3"])
def test_ordered_models_can_be_traced(name: str):
    model, x = models.build(name, depth=1), models.images(name)
    sb.replace_attention(model, **ORDERED)
    with torch.no_grad():
        close(torch.jit.trace(model, x, check_trace=False)(x + 1), model(x + 1))


def test_ordered_models_can_be_exported():
    model, x = models.build("vit", depth=1), models.images("vit")
    sb.replace_attention(model, sb.Window(4), sb.Quadratic(4, "input"), token_order="hilbert")
    close(torch.export.export(model, (x,)).module()(x), model(x))
