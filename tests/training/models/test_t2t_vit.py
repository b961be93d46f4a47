"""T2T-ViT has the published names and shapes, computes what they mean, and takes any attention."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from testkit import cores, rand, randomized
from torch import Tensor

import scatterbrain as sb
from scatterbrain.training.models.t2t_vit import T2TViT

# The state dict of the published T2T-ViT-14 at 224 x 224 pixels: shapes by key.
# 147 = 3 * 7 * 7 features of a first token, 576 = 64 * 3 * 3 of the later ones, 197 = 1 + 14 * 14 tokens.
BACKBONE = {
    "cls_token": (1, 1, 384),
    "pos_embed": (1, 197, 384),
    "tokens_to_token.project.weight": (384, 576),
    "tokens_to_token.project.bias": (384,),
    "norm.weight": (384,),
    "norm.bias": (384,),
    "head.weight": (1000, 384),
    "head.bias": (1000,),
}
BLOCK = {
    "norm1.weight": (384,),
    "norm1.bias": (384,),
    "attn.qkv.weight": (1152, 384),
    "attn.proj.weight": (384, 384),
    "attn.proj.bias": (384,),
    "norm2.weight": (384,),
    "norm2.bias": (384,),
    "mlp.fc1.weight": (1152, 384),
    "mlp.fc1.bias": (1152,),
    "mlp.fc2.weight": (384, 1152),
    "mlp.fc2.bias": (384,),
}
PERFORMER = {  # T2T-ViT-14
    "w": (32, 64),
    "kqv.weight": (192, "in"),
    "kqv.bias": (192,),
    "proj.weight": (64, 64),
    "proj.bias": (64,),
    "norm1.weight": ("in",),
    "norm1.bias": ("in",),
    "norm2.weight": (64,),
    "norm2.bias": (64,),
    "mlp.0.weight": (64, 64),
    "mlp.0.bias": (64,),
    "mlp.2.weight": (64, 64),
    "mlp.2.bias": (64,),
}
TRANSFORMER = {  # T2T-ViT_t-14
    "norm1.weight": ("in",),
    "norm1.bias": ("in",),
    "attn.qkv.weight": (192, "in"),
    "attn.proj.weight": (64, 64),
    "attn.proj.bias": (64,),
    "norm2.weight": (64,),
    "norm2.bias": (64,),
    "mlp.fc1.weight": (64, 64),
    "mlp.fc1.bias": (64,),
    "mlp.fc2.weight": (64, 64),
    "mlp.fc2.bias": (64,),
}
SMALL = {"image_size": 32, "classes": 5, "width": 24, "depth": 2, "heads": 2, "token_width": 8}


def published(token_transformer: dict[str, tuple]) -> dict[str, tuple[int, ...]]:
    keys = dict(BACKBONE)
    for stage, features in ((1, 147), (2, 576)):
        for name, shape in token_transformer.items():
            sizes = tuple(features if size == "in" else size for size in shape)
            keys[f"tokens_to_token.attention{stage}.{name}"] = sizes
    return keys | {f"blocks.{layer}.{name}": shape for layer in range(14) for name, shape in BLOCK.items()}


@pytest.mark.parametrize(("tokens", "table"), [("performer", PERFORMER), ("transformer", TRANSFORMER)])
def test_names_and_shapes_are_those_of_the_published_weights(tokens: str, table: dict[str, tuple]):
    with torch.device("meta"):
        model = T2TViT(tokens=tokens)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == published(table)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert round(total / 1e6, 1) == 21.5  # as the paper states it, table 2


@pytest.mark.parametrize("tokens", ["performer", "transformer"])
def test_published_weights_load_strictly(tokens: str):
    model = T2TViT(
        **SMALL, tokens=tokens, token_attention=lambda *sizes: sb.ScatterbrainAttention(1, 8, support=sb.Full())
    )
    weights = {
        name: torch.full_like(value, 0.25) for name, value in T2TViT(**SMALL, tokens=tokens).state_dict().items()
    }
    model.load_state_dict(weights, strict=True)
    assert all((value == 0.25).all() for value in model.state_dict().values())


def softmax(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return (scale * query @ key.transpose(-1, -2)).softmax(-1) @ value


def norm(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def patches(image: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """(batch, channels, side, side) to (batch, tokens, channels * kernel * kernel), written out."""
    image = F.pad(image, (padding,) * 4)
    starts = range(0, image.shape[-1] - kernel + 1, stride)
    return torch.stack([image[..., r : r + kernel, c : c + kernel].flatten(1) for r in starts for c in starts], 1)


def by_definition(w: dict[str, Tensor], images: Tensor, tokens: str, heads: int, scale: float) -> Tensor:
    """T2T-ViT from the entries of its state dict alone."""
    x = patches(images, 7, 4, 2)
    for stage in (1, 2):
        name, features = f"tokens_to_token.attention{stage}", x.shape[-1]
        h = norm(w, f"{name}.norm1", x)
        if tokens == "transformer":
            query, key, value = linear(w, f"{name}.attn.qkv", h).chunk(3, -1)
            x = value + linear(w, f"{name}.attn.proj", softmax(query, key, value, features**-0.5))
            hidden = ("mlp.fc1", "mlp.fc2")
        else:
            key, query, value = linear(w, f"{name}.kqv", h).chunk(3, -1)
            maps = [(t @ w[f"{name}.w"].T - (t * t).sum(-1, keepdim=True) / 2).exp() for t in (query, key)]
            kernel = maps[0] @ maps[1].transpose(1, 2) / len(w[f"{name}.w"])
            x = value + linear(w, f"{name}.proj", kernel @ value / (kernel.sum(-1, keepdim=True) + 1e-8))
            hidden = ("mlp.0", "mlp.2")
        h = linear(w, f"{name}.{hidden[0]}", norm(w, f"{name}.norm2", x))
        x = x + linear(w, f"{name}.{hidden[1]}", F.gelu(h))
        side = math.isqrt(x.shape[1])
        x = patches(x.transpose(1, 2).reshape(len(x), -1, side, side), 3, 2, 1)
    x = linear(w, "tokens_to_token.project", x)
    x = torch.cat([w["cls_token"].expand(len(x), 1, -1), x], 1) + w["pos_embed"]
    layer = 0
    while f"blocks.{layer}.norm1.weight" in w:
        name = f"blocks.{layer}"
        qkv = linear(w, f"{name}.attn.qkv", norm(w, f"{name}.norm1", x)).chunk(3, -1)
        query, key, value = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv)
        x = x + linear(w, f"{name}.attn.proj", softmax(query, key, value, scale).transpose(1, 2).flatten(2))
        x = x + linear(w, f"{name}.mlp.fc2", F.gelu(linear(w, f"{name}.mlp.fc1", norm(w, f"{name}.norm2", x))))
        layer += 1
    return linear(w, "head", norm(w, "norm", x[:, 0]))


@pytest.mark.parametrize("scale", [None, 0.4])
@pytest.mark.parametrize("tokens", ["performer", "transformer"])
def test_logits_are_those_of_the_definition(tokens: str, scale: float | None):
    model = randomized(T2TViT(**SMALL, tokens=tokens, scale=scale)).double()
    images = rand(2, 3, 32, 32, dtype=torch.float64)
    if tokens == "performer":  # its features are computed in float32
        model, images = model.float(), images.float()
    want = by_definition(
        {name: value.double() for name, value in model.state_dict().items()},
        images.double(),
        tokens,
        2,
        scale or 12**-0.5,
    )
    torch.testing.assert_close(model(images).double(), want, rtol=1e-4, atol=1e-5)


def test_positions_are_sine_and_cosine_in_turn():
    positions = T2TViT(**SMALL).pos_embed[0]
    assert positions.shape == (5, 24) and not T2TViT(**SMALL).pos_embed.requires_grad
    for position, feature in ((0, 0), (0, 1), (3, 6), (4, 7)):
        angle = position / 10000 ** (2 * (feature // 2) / 24)
        want = math.cos(angle) if feature % 2 else math.sin(angle)
        assert positions[position, feature].item() == pytest.approx(want, abs=1e-6)


def test_random_features_are_orthogonal():
    w = T2TViT(**SMALL, tokens="performer").tokens_to_token.attention1.w
    assert not w.requires_grad
    torch.testing.assert_close(w @ w.T, 4 * torch.eye(4))


@pytest.mark.parametrize("tokens", ["performer", "transformer"])
def test_the_order_of_tokens_changes_nothing_under_exact_attention(tokens: str):
    images, model = rand(2, 3, 64, 64), randomized(T2TViT(**SMALL | {"image_size": 64}, tokens=tokens))
    other = T2TViT(**SMALL | {"image_size": 64}, tokens=tokens, hilbert=True)
    other.load_state_dict(model.state_dict(), strict=True)
    assert other.order is not None and other.tokens_to_token.order1.tolist() != sorted(other.tokens_to_token.order1)
    torch.testing.assert_close(other(images), model(images), rtol=1e-4, atol=1e-5)


def test_token_attention_takes_the_place_of_performer_features():
    """The exact kernel exp(q.k) of which the features are an estimate, on the same queries and keys."""
    factory = lambda *sizes: sb.ScatterbrainAttention(*sizes[:1], sizes[2], support=sb.Full())
    model = randomized(T2TViT(**SMALL, tokens="performer", token_attention=factory))
    x = rand(2, 64, 147)
    layer = model.tokens_to_token.attention1
    w = layer.state_dict()
    key, query, value = linear(w, "kqv", norm(w, "norm1", x)).chunk(3, -1)
    h = value + linear(w, "proj", softmax(query, key, value, 1.0))
    want = h + linear(w, "mlp.2", F.gelu(linear(w, "mlp.0", norm(w, "norm2", h))))
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", ["performer", "transformer"])
def test_factories_are_called_with_the_sizes_of_their_layers(tokens: str):
    calls: dict[str, list[tuple[int, ...]]] = {"blocks": [], "tokens": []}

    def factory(name: str):
        def make(*sizes: int) -> sb.ScatterbrainAttention:
            calls[name].append(sizes)
            return sb.ScatterbrainAttention(sizes[0], sizes[2], sizes[1], sb.Window(16), sb.Centroid(4))

        return make

    model = T2TViT(**SMALL, tokens=tokens, attention=factory("blocks"), token_attention=factory("tokens"))
    assert calls == {"blocks": [(2, 2, 12)] * 2, "tokens": [(1, 1, 8)] * 2}
    assert {path: core.exact_queries for path, core in cores(model).items()} == {
        "tokens_to_token.attention1.attention"
        if tokens == "performer"
        else "tokens_to_token.attention1.attn.attention": 0,
        "tokens_to_token.attention2.attention"
        if tokens == "performer"
        else "tokens_to_token.attention2.attn.attention": 0,
        "blocks.0.attn.attention": 1,  # the class token
        "blocks.1.attn.attention": 1,
    }
    model(rand(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("tokens", ["performer", "transformer"])
def test_replace_attention_finds_every_layer_and_restores_it(tokens: str):
    model, images = randomized(T2TViT(**SMALL, tokens=tokens)), rand(2, 3, 32, 32)
    before = model(images)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    report = sb.replace_attention(model, sb.Window(8), sb.Centroid(4))
    assert len(report.replaced) == 4 and len(cores(model)) == 4
    assert model.blocks[0].attn.attention.exact_queries == 1
    assert model.state_dict().keys() == state.keys()  # the centroid kernel remembers nothing
    assert not torch.allclose(model(images), before)
    report.restore()
    assert torch.equal(model(images), before) and not cores(model)


def test_weights_do_not_depend_on_the_attention():
    quadratic = lambda *sizes: sb.ScatterbrainAttention(
        sizes[0], sizes[2], support=sb.Window(16), low_rank=sb.Quadratic(3, "learned")
    )
    models = [
        T2TViT(**SMALL, attention=factory, token_attention=factory, generator=torch.Generator().manual_seed(3))
        for factory in (quadratic, lambda *sizes: sb.ScatterbrainAttention(sizes[0], sizes[2], support=sb.Full()))
    ]
    shared = models[1].state_dict()
    assert len(models[0].state_dict()) > len(shared)
    assert all(torch.equal(models[0].state_dict()[name], value) for name, value in shared.items())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_size": 40}, "multiple of 16, got 40"),
        ({"heads": 5}, "multiple of heads=5, got 24"),
        ({"tokens": "convolution"}, "'transformer' or 'performer', got 'convolution'"),
        ({"splits": ((3, 4), (3, 2), (3, 2))}, "kernel >= stride"),
        ({"splits": ((7, 4), (3, 2))}, "three splits"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict, said: str):
    with pytest.raises(ValueError, match=said):
        T2TViT(**SMALL | changes)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"expected images of 32 x 32, got \(2, 3, 64, 64\); set image_size"):
        T2TViT(**SMALL)(rand(2, 3, 64, 64))


def test_other_splits_leave_a_token_for_every_pixel():
    model = T2TViT(**SMALL, splits=((3, 1), (3, 2), (3, 2)))
    assert model.tokens_to_token.sides == [32, 16, 8]
    assert model(rand(2, 3, 32, 32)).shape == (2, 5)


def test_recomputing_blocks_changes_no_gradient():
    quadratic = lambda *sizes: sb.ScatterbrainAttention(
        sizes[0], sizes[2], support=sb.Window(16), low_rank=sb.Quadratic(3, "learned")
    )
    model = T2TViT(**SMALL, attention=quadratic, token_attention=quadratic)
    gradients = []
    for model.recompute in (False, True):
        model.zero_grad()
        model(rand(2, 3, 32, 32)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*gradients, strict=True))


def test_performer_features_stay_in_float32_under_autocast():
    layer = randomized(T2TViT(**SMALL, tokens="performer")).tokens_to_token.attention1
    query, key, value = (2 * rand(2, 64, 8, seed=seed) for seed in range(3))
    want = layer._linear_attention(query, key, value)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer._linear_attention(query, key, value), want)
        assert T2TViT(**SMALL, tokens="performer")(rand(2, 3, 32, 32)).isfinite().all()
