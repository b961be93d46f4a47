"""timm's families with tokens along a Hilbert curve: blocks see the curve, and outputs stay."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from testkit import assert_close_in_scale as close
from testkit import randomized
from token_orders import EVERY_KEY, ORDERED, check_curve

import scatterbrain as sb

timm = pytest.importorskip("timm")
import timm_models as models


@pytest.mark.parametrize("name", models.FAMILIES | models.ROTARY)
def test_timm_blocks_see_the_curve(name: str):
    model = models.build(name)
    check_curve(model, model.blocks[0], models.images(name), models.PREFIX.get(name, 1), models.GRIDS.get(name, (3, 5)))


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
