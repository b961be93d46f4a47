"""BigGAN-deep's attention block: the published names and formula, and any support and kernel in its place."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from testkit import PASSING, cores, rand, under_fake_mode
from torch import Tensor

import scatterbrain as sb
from scatterbrain.training.models.biggan_attention import BigGANAttention

CHANNELS = 32


def block(
    support: object = None, low_rank: object = None, dtype: torch.dtype = torch.float64, **arguments
) -> BigGANAttention:
    """With drawn weights and a gamma that is not zero; with torch's attention unless there is a support."""
    if support is not None:
        arguments["attention"] = lambda heads, kv_heads, head_dim: sb.ScatterbrainAttention(
            heads, head_dim, kv_heads, support, low_rank
        )
    layer = BigGANAttention(CHANNELS, generator=torch.Generator().manual_seed(1), **arguments)
    torch.nn.init.constant_(layer.gamma, 0.7)
    return layer.to(dtype)


def projected(layer: BigGANAttention, x: Tensor) -> tuple[Tensor, ...]:
    """theta (B, N, ch / 8), pooled phi (B, N / 4, ch / 8), pooled g (B, N / 4, ch / 2) and the matrix of o, for a layer
    in evaluation mode; spectral norms from one step of the power iteration."""

    def matrix(convolution: torch.nn.Conv2d) -> Tensor:
        w = convolution.weight.flatten(1)
        if not hasattr(convolution, "u0"):
            return w
        right = F.normalize(convolution.u0 @ w, dim=1)
        left = F.normalize(right @ w.T, dim=1)
        return w / (left.detach() @ w @ right.detach().T)

    def pooled(convolution: torch.nn.Conv2d) -> Tensor:
        maps = torch.einsum("oc,bchw->bohw", matrix(convolution), x)
        corners = [maps[..., down::2, right::2] for down in (0, 1) for right in (0, 1)]
        return torch.stack(corners).amax(0).flatten(2).transpose(1, 2)

    theta = torch.einsum("oc,bcn->bno", matrix(layer.theta), x.flatten(2))
    return theta, pooled(layer.phi), pooled(layer.g), matrix(layer.o)


def by_definition(layer: BigGANAttention, x: Tensor) -> Tensor:
    theta, phi, g, o = projected(layer, x)
    out = (theta @ phi.transpose(1, 2)).softmax(-1) @ g
    return x + layer.gamma * (out @ o.T).transpose(1, 2).reshape(x.shape)


def gradients(function, layer: BigGANAttention, x: Tensor) -> list[Tensor]:
    """out, and the gradients of x and every parameter, for a drawn gradient of out."""
    x = x.clone().requires_grad_()
    out = function(x)
    return [out.detach(), *torch.autograd.grad(out, [x, *layer.parameters()], rand(*out.shape, seed=9).to(out.dtype))]


@pytest.mark.parametrize("spectral_norm", [True, False])
def test_names_and_shapes_are_those_of_the_published_weights(spectral_norm: bool):
    convolutions = {"theta": (8, 64), "phi": (8, 64), "g": (32, 64), "o": (64, 32)}
    want: dict[str, tuple[int, ...]] = {"gamma": ()}
    for name, (rows, columns) in convolutions.items():
        want[f"{name}.weight"] = (rows, columns, 1, 1)
        if spectral_norm:
            want |= {f"{name}.u0": (1, rows), f"{name}.sv0": (1,)}
    state = BigGANAttention(64, spectral_norm=spectral_norm).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == want


@pytest.mark.parametrize("hilbert", [True, False])
@pytest.mark.parametrize("spectral_norm", [True, False])
@pytest.mark.parametrize("support", [None, sb.Full(), sb.Window(48)], ids=["torch", "full", "window of all keys"])
def test_full_attention_is_the_dense_formula(support: object, spectral_norm: bool, hilbert: bool):
    layer = block(support, spectral_norm=spectral_norm, hilbert=hilbert).eval()
    x = rand(2, CHANNELS, 8, 24, dtype=torch.float64)
    got = gradients(layer, layer, x)
    for mine, theirs in zip(got, gradients(lambda x: by_definition(layer, x), layer, x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


PAIRS = {
    "window + favor": (sb.Window(32), sb.Favor(128)),
    "lsh + favor": (sb.LSH(32), sb.Favor(128)),
    "routed + centroid": (sb.Routed(32), sb.Centroid(16)),
    "routed": (sb.Routed(16, block_q=1, block_k=8, window=8), None),
    "favor": (sb.Empty(), sb.Favor(128)),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_any_pair_is_its_dense_definition(pair: tuple):
    """256 queries, 64 keys, width 4 and values of 16; raster order, which is that of the definition here."""
    layer = block(*pair, hilbert=False).eval()
    x = rand(2, CHANNELS, 16, 16, dtype=torch.float64)
    core = layer.attention

    def reference(x: Tensor) -> Tensor:
        theta, phi, g, o = projected(layer, x)
        statistics = core.coefficients()
        out = sb.reference.attention(
            theta[:, None], phi[:, None], g[:, None], core.support, core.low_rank, scale=1.0, statistics=statistics
        )
        return x + layer.gamma * (out[:, 0] @ o.T).transpose(1, 2).reshape(x.shape)

    for mine, theirs in zip(gradients(layer, layer, x), gradients(reference, layer, x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_it_trains_with_any_pair(pair: tuple):
    layer = block(*pair, dtype=torch.float32)
    x = rand(2, CHANNELS, 32, 32)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        loss = (layer(x) - 2 * x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in layer.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


def test_the_window_holds_the_keys_around_its_queries_in_the_image():
    """A key that is large in one place alone is seen exactly by the queries of its own cell, and by no far ones."""
    layer = block(sb.Window(16, block_q=4), None)
    with torch.no_grad():
        for convolution in (layer.theta, layer.phi, layer.g, layer.o):
            convolution.weight.fill_(0.1)
    layer.eval()
    for row, column in ((0, 0), (7, 12), (31, 31), (16, 15)):
        x = torch.ones(1, CHANNELS, 32, 32, dtype=torch.float64)
        plain = layer(x)
        x[..., row, column] += 1
        moved = (layer(x) - plain).abs().sum(1)[0] > 1e-9
        rows, columns = moved.nonzero().T
        assert moved[row, column]
        assert (rows - row).abs().max() <= 16 and (columns - column).abs().max() <= 16
        assert moved.sum() <= 4 * 32


def test_spectral_norm_finds_the_largest_singular_value_in_training_alone():
    layer, x = block(), rand(1, CHANNELS, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        layer.g.weight.copy_(rand(*layer.g.weight.shape, seed=4))
    layer.eval()(x)
    assert layer.g.sv0.item() == 1
    layer.train()
    for _ in range(500):
        layer(x)
    want = torch.linalg.matrix_norm(layer.g.weight.flatten(1), 2)
    assert layer.g.sv0.item() == pytest.approx(want.item(), rel=1e-6)


def test_the_singular_value_is_the_same_under_autocast():
    layer, other = block(dtype=torch.float32), block(dtype=torch.float32)
    x = rand(1, CHANNELS, 4, 4)
    layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert other(x).isfinite().all()
    assert torch.equal(layer.g.u0, other.g.u0) and torch.equal(layer.g.sv0, other.g.sv0)


def test_it_starts_as_the_identity():
    x = rand(1, CHANNELS, 4, 6)
    assert torch.equal(BigGANAttention(CHANNELS)(x), x)


def test_replace_attention_finds_it():
    layer, x = block(dtype=torch.float32).eval(), rand(2, CHANNELS, 16, 16)
    before = layer(x)
    report = sb.replace_attention(layer, sb.Window(16), sb.Centroid(8))
    assert [entry.path for entry in report.replaced] == [""] and list(cores(layer)) == ["attention"]
    assert not torch.allclose(layer(x), before, atol=1e-6)
    report.restore()
    assert torch.equal(layer(x), before)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="multiple of 8, got 20"):
        BigGANAttention(20)
    with pytest.raises(ValueError, match="even height and width, got 5 x 4; pad the image"):
        BigGANAttention(CHANNELS)(rand(1, CHANNELS, 5, 4))


@pytest.mark.parametrize("passing", [passing for passing in PASSING if passing is not under_fake_mode])
def test_an_image_size_that_was_first_seen_elsewhere_can_be_trained_on(passing):
    size = (6 + 2 * PASSING.index(passing), 22)  # sizes that no other test has
    layer, x = block(hilbert=True).eval(), rand(1, CHANNELS, *size, dtype=torch.float64)
    passing(lambda: layer(x))
    mine, exact = (gradients(b, b, x) for b in (block(hilbert=True), block(hilbert=False)))
    torch.testing.assert_close(mine, exact)
