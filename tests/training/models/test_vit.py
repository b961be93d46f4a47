"""The vision transformer computes what timm's does, with its names, and takes any attention."""

from __future__ import annotations

import pytest
import torch
from testkit import cores, rand, randomized

import scatterbrain as sb
from scatterbrain.training.models.vit import VisionTransformer

SIZES = {"image_size": 16, "patch_size": 2, "channels": 3, "classes": 5, "width": 24, "depth": 2, "heads": 2}
TIMM = {
    "class": {},
    "mean": {"global_pool": "avg", "class_token": False, "fc_norm": False},
}


@pytest.mark.parametrize("hilbert", [True, False])
@pytest.mark.parametrize("pooling", TIMM)
def test_names_and_logits_are_those_of_timm(pooling: str, hilbert: bool):
    timm = pytest.importorskip("timm")
    names = {"image_size": "img_size", "channels": "in_chans", "classes": "num_classes", "width": "embed_dim"}
    names |= {"heads": "num_heads"}
    sizes = {names.get(name, name): size for name, size in SIZES.items()}
    theirs = randomized(timm.models.vision_transformer.VisionTransformer(**sizes, **TIMM[pooling])).eval()
    mine = VisionTransformer(**SIZES, pooling=pooling, hilbert=hilbert)
    mine.load_state_dict(theirs.state_dict(), strict=True)
    images = rand(3, 3, 16, 16)
    torch.testing.assert_close(mine(images), theirs(images), rtol=1e-4, atol=1e-5)


def factory(support: object, low_rank: object):
    return lambda heads, kv_heads, head_dim: sb.ScatterbrainAttention(heads, head_dim, kv_heads, support, low_rank)


def test_a_class_token_sees_every_key_whatever_the_support():
    model = randomized(
        VisionTransformer(**SIZES | {"depth": 1}, pooling="class", attention=factory(sb.Window(8), None))
    )
    exact = VisionTransformer(**SIZES | {"depth": 1}, pooling="class")
    exact.load_state_dict(model.state_dict(), strict=True)
    images = rand(2, 3, 16, 16)
    torch.testing.assert_close(model(images), exact(images), rtol=1e-4, atol=1e-5)  # one layer, read at the class token
    for core in cores(model).values():
        core.exact_queries = 0
    assert not torch.allclose(model(images), exact(images), atol=1e-3)


def test_a_window_is_a_patch_of_the_image_in_hilbert_order():
    """Positions of keys that a query's window holds, found by which pixels change its token after one block."""
    reach = {}
    for hilbert in (True, False):
        model = VisionTransformer(
            **SIZES | {"depth": 1, "patch_size": 1}, attention=factory(sb.Window(16), None), hilbert=hilbert
        )
        randomized(model)
        tokens: list[torch.Tensor] = []
        hook = model.blocks[0].register_forward_hook(lambda module, inputs, output: tokens.append(output.detach()))
        images = rand(1, 3, 16, 16)
        model(images)
        images[..., 8, 8] += 1
        model(images)
        hook.remove()
        moved = ((tokens[1] - tokens[0]).abs().amax(-1) > 1e-6)[0].nonzero().flatten()
        place = moved if model.order is None else model.order[moved]
        rows, columns = place // 16, place % 16
        reach[hilbert] = max((rows - 8).abs().max().item(), (columns - 8).abs().max().item())
    assert reach[True] <= 4 < reach[False]


@pytest.mark.parametrize("pooling", ["mean", "class"])
def test_every_parameter_trains(pooling: str):
    model = VisionTransformer(**SIZES, pooling=pooling, attention=factory(sb.Routed(16), sb.Quadratic(3, "learned")))
    model(rand(2, 3, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_weights_do_not_depend_on_the_attention():
    models = [
        VisionTransformer(**SIZES, attention=attention, generator=torch.Generator().manual_seed(3))
        for attention in (factory(sb.Window(16), sb.Quadratic(3, "learned")), factory(sb.Full(), None))
    ]
    shared = models[1].state_dict()
    assert len(models[0].state_dict()) > len(shared)
    assert all(torch.equal(models[0].state_dict()[name], value) for name, value in shared.items())


def test_replace_attention_finds_every_block():
    model = randomized(VisionTransformer(**SIZES, pooling="class"))
    images = rand(2, 3, 16, 16)
    before = model(images)
    report = sb.replace_attention(model, sb.Window(8), sb.Centroid(4))
    assert [entry.path for entry in report.replaced] == ["blocks.0.attn", "blocks.1.attn"]
    assert all(core.exact_queries == 1 for core in cores(model).values())
    assert not torch.allclose(model(images), before)
    report.restore()
    assert torch.equal(model(images), before)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"patch_size": 3}, "multiple of patch_size=3, got 16"),
        ({"heads": 5}, "multiple of heads=5, got 24"),
        ({"pooling": "max"}, "'mean' or 'class', got 'max'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict, said: str):
    with pytest.raises(ValueError, match=said):
        VisionTransformer(**SIZES | changes)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"expected images of 16 x 16, got \(2, 3, 32, 32\); set image_size"):
        VisionTransformer(**SIZES)(rand(2, 3, 32, 32))


def test_recomputing_blocks_changes_no_gradient():
    model = VisionTransformer(**SIZES, pooling="class", attention=factory(sb.Routed(16), sb.Quadratic(3, "learned")))
    gradients = []
    for model.recompute in (False, True):
        model.zero_grad()
        model(rand(2, 3, 16, 16)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*gradients, strict=True))
