"""timm's vision transformers with sparse + low-rank attention, by swap and by attn_layer=."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import testkit
import torch
import torch.nn.functional as F
from testkit import COPIES, randomized
from testkit import assert_close_in_scale as close
from torch import Tensor

timm = pytest.importorskip("timm")
import timm_models as models

import scatterbrain as sb
from scatterbrain.integrations.timm import Attention, attention_layer

SETTINGS: dict[str, Any] = {"support": sb.Window(16), "low_rank": sb.Quadratic(4, "input")}
EVERY_KEY: dict[str, Any] = {"support": sb.Window(4096), "low_rank": None}
DIM, HEADS, TOKENS = 48, 3, 40
pytestmark = pytest.mark.filterwarnings("error::UserWarning")
padding = partial(testkit.padding, TOKENS, (10, 0), (0, 3))


def layer(**arguments: Any) -> timm.layers.Attention:
    module = timm.layers.Attention(DIM, HEADS, qkv_bias=True, norm_layer=torch.nn.LayerNorm, **arguments)
    return randomized(module, 0.3).eval()


def tokens() -> Tensor:
    return torch.randn(2, TOKENS, DIM)


# ------------------------------------------------------------------------------------------------------ pass-through


def check_every_key(model: torch.nn.Module, x: Tensor, *names: str) -> None:
    """Under Full() a model gives its own bits, and its own output where every key is listed; both have its state."""
    with torch.no_grad():
        before, keys = model(x), list(model.state_dict())
        report = sb.replace_attention(model, sb.Full())
        assert report.replaced and torch.equal(model(x), before) and list(model.state_dict()) == keys
        report.restore()
        report = sb.replace_attention(model, **EVERY_KEY)
        assert {entry.now for entry in report.replaced} == {f"scatterbrain.{name}" for name in names}
        assert list(model.state_dict()) == keys
        close(model(x), before)
        report.restore()
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("name", models.FAMILIES)
def test_every_family_gives_its_own_output_where_every_key_is_exact(name: str):
    check_every_key(models.build(name), models.images(name), "Attention")


@pytest.mark.parametrize("name", models.ROTARY)
@pytest.mark.parametrize("fused", [True, False])
def test_attention_with_rotary_positions_gives_its_own_output_where_every_key_is_exact(name: str, fused: bool):
    model = models.build(name)
    for block in model.blocks:
        block.attn.fused_attn = fused
    check_every_key(model, models.images(name), type(model.blocks[0].attn).__name__)


ENCODERS = {  # of vision language models: arguments, size of the image, class of their attention
    "qwen3_vit_88m_enc": ({}, (96, 64), "AttentionRope"),
    "deepseek_vit_412m_enc": ({}, (84, 56), "AttentionRope"),
    "gemma4_vit_167m_enc": ({"head_dim": 16, "intermediate_size": 64}, (96, 48), "Gemma4Attention"),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_with_rotary_positions_in_their_own_order(name: str):
    arguments, size, cls = ENCODERS[name]
    model = randomized(timm.create_model(name, **arguments, embed_dim=48, depth=1, num_heads=3), 0.25).eval()
    x = torch.rand(1, 3, *size)
    check_every_key(model, x, cls)
    report = sb.replace_attention(model, **SETTINGS)
    assert "tokens in their own order" in str(report) and "rotated by position" in str(report)
    assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize("name", ["eva02", "eva02, one projection each", "rope mixed", "fewer key heads"])
def test_attention_with_rotary_positions_is_approximated_trained_and_saved(name: str):
    model, x = models.build(name), models.images(name)
    original = models.build(name)
    sb.replace_attention(model, sb.Window(1, block_q=1), sb.Quadratic(4))
    exact = original(x)
    with sb.calibrate(model), torch.no_grad():
        close(model(x), exact.detach())
    out = model(x)
    assert not torch.allclose(out, exact, rtol=1e-3, atol=1e-3)
    out.square().sum().backward()
    exact.square().sum().backward()
    for (path, parameter), theirs in zip(model.named_parameters(), original.parameters(), strict=True):
        assert (parameter.grad is None) == (theirs.grad is None), path
    again = models.build(name)
    sb.replace_attention(again, sb.Window(1, block_q=1), sb.Quadratic(4))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), out)
    again.load_state_dict(original.state_dict())
    with pytest.raises(ValueError, match="not calibrated"):
        again(x)


@pytest.mark.parametrize("name", ["eva02", "rope mixed", "fewer key heads"])
def test_masks_and_dropout_of_attention_with_rotary_positions(name: str):
    block, x, p = models.build(name, attn_drop_rate=0.5).blocks[0].attn, torch.randn(2, TOKENS, DIM), padding()
    mask = ~p[:, None, None, :]
    rope = torch.randn(TOKENS - block.num_prefix_tokens, 2 * block.head_dim)
    exact, causal = block(x, rope, mask), block(x, rope, is_causal=True)
    other = torch.rand(TOKENS, TOKENS) > 0.3
    exactly = block(x, rope, other)
    sb.replace_attention(block, **EVERY_KEY)
    close(block(x, rope, mask)[~p], exact[~p])
    close(block(x, rope, is_causal=True), causal)
    with pytest.warns(UserWarning, match="attn_mask is more than the padding of tokens"):
        assert torch.equal(block(x, rope, other), exactly)
    block.attention.support = sb.Window(8)
    assert torch.equal(block(x.masked_fill(p[..., None], 1e4), rope, mask)[~p], block(x, rope, mask)[~p])
    with pytest.warns(UserWarning, match=r"attn_drop=0.5 acts .*sb.set_attention_dropout\(model, 0.0\)"):
        block.train()(x, rope)


@pytest.mark.parametrize(
    "arguments", [{}, {"qk_norm": True}, {"scale_norm": True}, {"gated": True}, {"attn_head_dim": 8}, {"dim_out": 20}]
)
@pytest.mark.parametrize("fused", [True, False])
def test_options_of_the_module_stay(arguments: dict[str, Any], fused: bool):
    module, x = layer(**arguments), tokens()
    module.fused_attn = fused
    before = module(x)
    sb.replace_attention(module, **EVERY_KEY)
    close(module(x), before)


def test_gradients_are_those_of_exact_attention_where_every_key_is_exact():
    module, x = layer(), tokens()
    module(x).square().sum().backward()
    before = module.qkv.weight.grad.clone()
    module.qkv.weight.grad = None
    sb.replace_attention(module, **EVERY_KEY)
    module(x).square().sum().backward()
    close(module.qkv.weight.grad, before)


# ------------------------------------------------------------------------------------------------------------- masks


PADDING_MASKS = {  # from padding, True is attended
    "keys": lambda p: ~p[:, None, None, :],
    "keys for every query": lambda p: (~p[:, None, None, :]).expand(-1, 1, TOKENS, -1),
    "both tokens valid": lambda p: ~(p[:, None, None, :] | p[:, None, :, None]),
}


@pytest.mark.parametrize("as_float", [None, float("-inf"), torch.finfo(torch.float32).min])
@pytest.mark.parametrize("kind", PADDING_MASKS)
def test_masks_of_padded_tokens_are_approximated_and_honoured(kind: str, as_float: float | None):
    module, x, p = layer(), tokens(), padding()
    mask = PADDING_MASKS[kind](p)
    if as_float is not None:
        mask = torch.zeros(mask.shape).masked_fill(~mask, as_float)
    before = module(x, attn_mask=mask)
    sb.replace_attention(module, **EVERY_KEY)
    close(module(x, attn_mask=mask)[~p], before[~p])
    module.attention.support = sb.Window(8)
    other = module(x, attn_mask=mask)[~p]
    assert not torch.allclose(other, before[~p], rtol=1e-3, atol=1e-3)
    assert torch.equal(module(x.masked_fill(p[..., None], 1e4), attn_mask=mask)[~p], other)


def test_other_masks_run_exactly_and_say_so_once():
    module, x = layer(), tokens()
    mask = torch.rand(TOKENS, TOKENS) > 0.3
    before = module(x, attn_mask=mask)
    sb.replace_attention(module, **SETTINGS)
    with pytest.warns(UserWarning, match="runs exact attention.*attn_mask is more than the padding"):
        after = module(x, attn_mask=mask)
    assert torch.equal(after, before) and torch.equal(module(x, attn_mask=mask), before)


def test_a_mask_that_changes_in_place_is_read_again():
    module, x = layer(), tokens()
    sb.replace_attention(module, **EVERY_KEY)
    mask = torch.ones(2, 1, 1, TOKENS, dtype=torch.bool)
    first = module(x, attn_mask=mask)
    mask[:, :, :, 20:] = False
    assert not torch.allclose(module(x, attn_mask=mask)[:, :20], first[:, :20])


def test_causal_attention_stays_causal():
    module, x = layer(), tokens()
    before = module(x, is_causal=True)
    sb.replace_attention(module, **EVERY_KEY)
    close(module(x, is_causal=True), before)
    module.attention.support = sb.Window(8)
    changed = x.clone()
    changed[:, 20:] += 1
    assert torch.equal(module(changed, is_causal=True)[:, :20], module(x, is_causal=True)[:, :20])


def test_attention_dropout_in_training_runs_exactly_and_says_so():
    module, x = layer(attn_drop=0.5).train(), tokens()
    torch.manual_seed(1)
    before = module(x)
    (entry,) = sb.replace_attention(module, **SETTINGS).replaced
    assert "exact in training for its attn_drop=0.5" in entry.note
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match=r"attn_drop=0.5 acts .*; call sb.set_attention_dropout\(model"):
        assert torch.equal(module(x), before)
    assert sb.set_attention_dropout(module, 0.0) == [""]
    module(x)


def naflex_batch() -> dict[str, Tensor]:
    """Images of 4 x 6 and 5 x 3 patches."""
    batch = {"patches": torch.randn(2, 24, 16 * 16 * 3), "patch_coord": torch.zeros(2, 24, 2, dtype=torch.long)}
    batch["patch_valid"] = torch.zeros(2, 24, dtype=torch.bool)
    for row, (height, width) in enumerate(((4, 6), (5, 3))):
        grid = torch.cartesian_prod(torch.arange(height), torch.arange(width))
        batch["patch_coord"][row, : len(grid)] = grid
        batch["patch_valid"][row, : len(grid)] = True
    return batch


@pytest.mark.parametrize("key_only", [False, True])
@pytest.mark.parametrize("token_order", [None, "hilbert"])
def test_naflex_batches_of_several_image_sizes(key_only: bool, token_order: str | None):
    model, batch = (
        models.build("naflex", use_key_only_attn_mask=key_only, reg_tokens=1, class_token=True),
        naflex_batch(),
    )
    valid = batch["patch_valid"]
    with torch.no_grad():
        before = model(batch)
        features = model.forward_features(**batch)["patches"][:, 2:][valid]
        middle = model.forward_intermediates(batch, output_fmt="NLC")[1][0][valid]
        sb.replace_attention(model, **EVERY_KEY, token_order=token_order)
        close(model(batch), before)
        close(model.forward_features(**batch)["patches"][:, 2:][valid], features)
        close(model.forward_intermediates(batch, output_fmt="NLC")[1][0][valid], middle)


# --------------------------------------------------------------------------------------------------------- the swap


def test_identity_parameters_hooks_and_mode_stay_and_restore_gives_them_back():
    model = models.build("vit")
    module = model.blocks[0].attn
    parameters, names, x = dict(module.named_parameters()), list(model.state_dict()), models.images("vit")
    seen: list[type] = []
    module.register_forward_hook(lambda module, args, out: seen.append(type(module)))
    before = model(x)
    report = sb.replace_attention(model, **SETTINGS, token_order="natural")
    assert model.blocks[0].attn is module and type(module) is Attention and not module.attention.training
    assert all(parameter is parameters[name] for name, parameter in module.named_parameters())
    assert not torch.equal(model(x), before)
    report.restore()
    assert torch.equal(model(x), before) and list(model.state_dict()) == names
    assert vars(module).keys() == vars(model.blocks[1].attn).keys() == vars(models.build("vit").blocks[0].attn).keys()
    assert seen == [timm.layers.Attention, Attention, timm.layers.Attention]


def test_checkpoints_of_the_original_and_of_calibrated_models_load_strictly():
    original, model, again = (models.build("vit") for _ in range(3))
    x = models.images("vit")
    for swapped in (model, again):
        sb.replace_attention(swapped, sb.Window(8), sb.Quadratic(4))
        swapped.load_state_dict(original.state_dict())
    names = list(model.state_dict())
    with pytest.raises(ValueError, match="not calibrated"):
        model(x)
    with sb.calibrate(model), torch.no_grad():
        model(x)
    assert list(model.state_dict()) == names
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))
    again.load_state_dict(original.state_dict())
    with pytest.raises(ValueError, match="not calibrated"):
        again(x)


@pytest.mark.parametrize("low_rank", [None, sb.Quadratic(4, "input")], ids=str)
def test_with_nothing_to_remember_checkpoints_load_strictly_both_ways(low_rank: sb.Quadratic | None):
    original, model = (models.build("vit") for _ in range(2))
    sb.replace_attention(model, sb.Window(8), low_rank)
    assert list(model.state_dict()) == list(original.state_dict())
    original.load_state_dict(model.state_dict())
    model.load_state_dict(original.state_dict())


@pytest.mark.parametrize("name", ["vit", "distilled", "naflex"])
def test_attn_layer_builds_a_model_with_it(name: str):
    original = models.build(name)
    model = models.build(name, attn_layer=attention_layer(**EVERY_KEY))
    model.load_state_dict(original.state_dict())
    assert {type(block.attn).__mro__[1] for block in model.blocks} == {Attention}
    close(model(models.images(name)), original(models.images(name)))


def test_attn_layer_takes_the_drop_in_preset_by_default_and_its_head_width_is_checked():
    model = models.build("vit", attn_layer=Attention)
    core = model.blocks[0].attn.attention
    assert (core.support, core.low_rank) == sb.presets.drop_in()
    with pytest.raises(ValueError, match="rank must be at most head_dim=16, got 20"):
        models.build("vit", attn_layer=attention_layer(low_rank=sb.Quadratic(20)))
    with pytest.raises((TypeError, ValueError), match="support"):
        attention_layer(support=64)


@pytest.mark.parametrize("how", ["swap", "attn_layer"])
@pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "pickle"])
def test_copies_keep_attention_and_its_state(how: str, copied):
    if how == "swap":
        model = models.build("vit")
        sb.replace_attention(model, sb.Window(8), sb.Quadratic(4), token_order="hilbert")
    else:
        model = models.build("vit", attn_layer=attention_layer(sb.Window(8), sb.Quadratic(4)))
    x = models.images("vit")
    with torch.no_grad(), sb.calibrate(model):
        model(x)
    other = copied(model)
    assert torch.equal(other(x), model(x))
    assert other.blocks[0].attn.attention.support == sb.Window(8) and other.blocks[0].attn.attention.exact_queries == (
        1 if how == "swap" else 0
    )


def test_gradient_checkpointing_gives_the_same_gradients():
    model, x = models.build("vit").train(), models.images("vit")
    sb.replace_attention(model, sb.Window(8), sb.Quadratic(4, "learned"), token_order="hilbert")
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(model.parameters()))
    for first, second in zip(*gradients):
        torch.testing.assert_close(second, first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_precision_models(dtype: torch.dtype):
    model, x = models.build("vit"), models.images("vit")
    exact = model(x)
    sb.replace_attention(model, **EVERY_KEY)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        out = model(x)
    assert F.cosine_similarity(out.float(), exact).min() > 0.99
    out = model.to(dtype)(x.to(dtype))
    assert out.dtype == dtype and F.cosine_similarity(out.float(), exact).min() > 0.99


@pytest.mark.parametrize("token_order", [None, "hilbert"])
def test_torch_compile_without_a_graph_break(token_order: str | None):
    model, x = models.build("dinov2 with registers"), models.images("dinov2 with registers")
    sb.replace_attention(model, **SETTINGS, token_order=token_order)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- the report

REFUSED = {  # model: (class name, part of the reason)
    "beit_base_patch16_224": ("beit.Attention", "a bias for the position"),
    "cait_xxs24_224": ("cait.TalkingHeadAttn", "attention weights of several heads"),
    "swin_tiny_patch4_window7_224": ("swin_transformer.WindowAttention", "small windows"),
    "vit_relpos_small_patch16_224": ("vision_transformer_relpos.RelPosAttention", "a bias for the position"),
    "xcit_nano_12_p16_224": ("xcit.XCA", "over channels"),
    "tnt_s_patch16_224": ("tnt.Attention", "its forward is its own"),
    "volo_d1_224": ("volo.OutlookAttention", "small windows"),
    "mvitv2_tiny": ("mvitv2.MultiScaleAttention", "a bias for the position"),
    "pvt_v2_b0": ("pvt_v2.Attention", "a reduced set of keys"),
    "vit_base_patch16_xp_224": ("vision_transformer.ParallelScalingBlock", "a part of the block's own forward"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_families_are_refused_by_class_and_reason(name: str):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.warns(UserWarning, match="changed nothing"):
        report = sb.replace_attention(model)
    assert not report.replaced
    assert f"timm.models.{REFUSED[name][0]}: " in report.entries[0].note and REFUSED[name][1] in report.entries[0].note


def test_a_forward_on_the_instance_and_a_narrow_head_are_refused():
    model = models.build("vit", attn_layer="attn", num_heads=12)
    model.blocks[0].attn.forward = lambda *args, **kwargs: None
    with pytest.warns(UserWarning, match="changed nothing"):
        report = sb.replace_attention(model, *sb.presets.quadratic())
    assert "its forward is overridden on the instance" in report.entries[0].note
    assert "rank must be at most head_dim=4" in report.entries[1].note
    assert type(model.blocks[1].attn) is timm.layers.Attention


def test_attention_pools_are_listed():
    report = sb.replace_attention(models.build("siglip, attention pool"), **SETTINGS)
    assert [entry.path for entry in report.skipped] == ["attn_pool"]
    assert "only a class token or a few latents attend" in report.skipped[0].note
