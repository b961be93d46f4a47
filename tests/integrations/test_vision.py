"""Which vision models are ordered, by default or when asked, which are refused, and exact class tokens."""

from __future__ import annotations

import pytest
import torch
from token_orders import EVERY_KEY, ORDERED, WINDOW
from torch import Tensor, nn

import scatterbrain as sb
from scatterbrain.integrations.vision_families import ROTARY

timm = pytest.importorskip("timm")
import timm_models as models

# -------------------- asked for


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


# -------------------- by default


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


# -------------------- class tokens


@pytest.mark.parametrize("name", ["vit", "distilled", "dinov2 with registers", "no class token"])
def test_tokens_before_the_patches_attend_to_every_key_exactly(name: str):
    model, x = models.build(name), models.images(name)
    attention, inputs = model.blocks[0].attn, []
    attention.register_forward_hook(lambda module, args, out: inputs.append((args[0], out)))
    with torch.no_grad():
        model(x)
        sb.replace_attention(model, sb.Window(1, block_q=1), None, token_order="natural")
        model(x)
    prefix = models.PREFIX.get(name, 1)
    assert attention.attention.exact_queries == prefix
    assert torch.equal(inputs[1][0], inputs[0][0])
    torch.testing.assert_close(inputs[1][1][:, :prefix], inputs[0][1][:, :prefix])
    assert not torch.allclose(inputs[1][1][:, prefix:], inputs[0][1][:, prefix:], rtol=1e-2, atol=1e-2)
