"""diffusers' models with the attention processor, set by hand and by sb.replace_attention."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from testkit import COPIES, padding, rand, randomized
from testkit import assert_close_in_scale as close
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, JointAttnProcessor2_0

import scatterbrain as sb
from scatterbrain.integrations.diffusers import ScatterbrainAttnProcessor, processors

SETTINGS: dict[str, Any] = {"support": sb.Window(6), "low_rank": sb.Quadratic(4, "input")}
EVERY_KEY: dict[str, Any] = {"support": sb.Window(4096), "low_rank": None}
WIDTH, HEADS, TEXT = 32, 2, 24
pytestmark = pytest.mark.filterwarnings("error::UserWarning")


def randomised(model: nn.Module) -> nn.Module:
    return randomized(model, vectors=0.5).eval()


def unet() -> nn.Module:
    return randomised(
        diffusers.UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(WIDTH, 2 * WIDTH),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=HEADS,
            norm_num_groups=8,
        )
    )


def dit() -> nn.Module:
    return randomised(
        diffusers.DiTTransformer2DModel(
            num_attention_heads=HEADS,
            attention_head_dim=16,
            in_channels=4,
            num_layers=2,
            sample_size=8,
            norm_num_groups=8,
        )
    )


def pixart() -> nn.Module:
    return randomised(
        diffusers.PixArtTransformer2DModel(
            num_attention_heads=HEADS,
            attention_head_dim=16,
            in_channels=4,
            num_layers=2,
            sample_size=8,
            cross_attention_dim=32,
            caption_channels=WIDTH,
            norm_num_groups=8,
            use_additional_conditions=False,
        )
    )


def vae() -> nn.Module:
    return randomised(
        diffusers.AutoencoderKL(
            block_out_channels=(WIDTH,),
            down_block_types=("DownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",),
            norm_num_groups=8,
        )
    )


latents = partial(rand, 2, 4, 8, 8, seed=1)
text = partial(rand, 2, TEXT, WIDTH, seed=2)


def text_mask() -> Tensor:
    return 1.0 - padding(TEXT, (0, 9)).float()


STEPS = torch.tensor([3, 500])
RUNS = {  # how each model is called
    "unet": (unet, lambda m: m(latents(), STEPS, text()).sample),
    "unet, text mask": (unet, lambda m: m(latents(), STEPS, text(), encoder_attention_mask=text_mask()).sample),
    "dit": (dit, lambda m: m(latents(), timestep=STEPS, class_labels=torch.tensor([1, 2])).sample),
    "pixart": (
        pixart,
        lambda m: (
            m(
                latents(),
                text(),
                timestep=STEPS,
                encoder_attention_mask=text_mask(),
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            ).sample
        ),
    ),
    "vae": (vae, lambda m: m(rand(1, 3, 8, 8, seed=1)).sample),
}


def layer(**arguments: Any) -> Attention:
    return randomised(Attention(WIDTH, heads=HEADS, dim_head=16, **arguments))


# ------------------------------------------------------------------------------------------------------ pass-through


@pytest.mark.parametrize("name", RUNS)
def test_every_model_gives_its_own_output_where_every_key_is_exact(name: str):
    build, run = RUNS[name]
    model = build()
    with torch.no_grad():
        before = run(model)
        report = sb.replace_attention(model, sb.Full())
        assert not report.skipped and torch.equal(run(model), before)
        report.restore()
        assert not sb.replace_attention(model, **EVERY_KEY).skipped
        close(run(model), before)


@pytest.mark.parametrize(
    ("arguments", "context"),
    [
        ({"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 2.0}, None),
        ({"qk_norm": "layer_norm"}, None),
        ({"qk_norm": "rms_norm", "cross_attention_dim": 20}, 20),
        ({"cross_attention_dim": 20, "cross_attention_norm": "layer_norm"}, 20),
        ({"cross_attention_dim": 20, "cross_attention_norm": "group_norm", "cross_attention_norm_num_groups": 4}, 20),
        ({"bias": True, "out_bias": False}, None),
    ],
)
@pytest.mark.parametrize("as_map", [False, True])
def test_options_of_the_layer_stay(arguments: dict[str, Any], context: int | None, as_map: bool):
    attention = layer(**arguments)
    x = torch.randn(2, WIDTH, 5, 7) if as_map else torch.randn(2, 35, WIDTH)
    other = None if context is None else torch.randn(2, TEXT, context)
    before = attention(x, other)
    sb.replace_attention(attention, **EVERY_KEY)
    close(attention(x, other), before)


# ------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("shape", [(2, TEXT), (2, 1, TEXT)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_of_keys_are_approximated_and_honoured(shape: tuple[int, ...], dtype: torch.dtype):
    attention, x = layer(cross_attention_dim=WIDTH).to(dtype), torch.randn(2, 35, WIDTH, dtype=dtype)
    mask = ((1 - text_mask()) * -10000.0).to(dtype).reshape(shape)
    before = attention(x, text().to(dtype), mask)
    sb.replace_attention(attention, **EVERY_KEY)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(attention(x, text().to(dtype), mask), before, rtol=tolerance, atol=tolerance)
    changed = text().masked_fill(text_mask()[..., None] == 0, 1e3).to(dtype)
    attention.processor.attention.support = sb.Window(8)
    assert torch.equal(attention(x, changed, mask), attention(x, text().to(dtype), mask))


@pytest.mark.parametrize("mask", [torch.rand(2 * HEADS, 35, 35), torch.rand(2, 1, 35)], ids=["square", "bias of keys"])
def test_other_masks_run_exactly_and_say_so_once(mask: Tensor):
    attention, x = layer(), torch.randn(2, 35, WIDTH)
    before = attention(x, attention_mask=mask)
    sb.replace_attention(attention, **SETTINGS)
    with pytest.warns(UserWarning, match="runs exact attention.*attention_mask is more than the padding"):
        assert torch.equal(attention(x, attention_mask=mask), before)
    assert torch.equal(attention(x, attention_mask=mask), before)


# ------------------------------------------------------------------------------------------------------------- state


def test_calibrated_statistics_are_in_the_models_state_dict():
    model, again, original = unet(), unet(), unet()
    run = RUNS["unet"][1]
    sb.replace_attention(model, sb.Window(16), sb.Quadratic(4))
    names = list(model.state_dict())
    with torch.no_grad():
        with pytest.raises(ValueError, match="not calibrated"):
            run(model)
        exact = run(original)
        model.load_state_dict(original.state_dict())
        with sb.calibrate(model):
            close(run(model), exact)
        out = run(model)
        assert not torch.equal(out, exact) and list(model.state_dict()) == names
        again.set_attn_processor(processors(again, sb.Window(16), sb.Quadratic(4)))
        again.load_state_dict(model.state_dict())
        assert torch.equal(run(again), out)
        again.load_state_dict(original.state_dict())
        with pytest.raises(ValueError, match="not calibrated"):
            run(again)


@pytest.mark.parametrize("swap", ["replace_attention", "processors"])
@pytest.mark.parametrize("device", ["cpu", "meta"])  # the meta device stands for any other than the CPU
def test_a_plain_checkpoint_brings_its_device_along(device: str, swap: str):
    state = {name: tensor.to(device) for name, tensor in unet().state_dict().items()}
    with torch.device("meta"):
        model = unet()
        if swap == "processors":
            model.set_attn_processor(processors(model, sb.Window(16), sb.Quadratic(4, "learned")))
        else:
            sb.replace_attention(model, sb.Window(16), sb.Quadratic(4, "learned"))
    model.load_state_dict(state, strict=True, assign=True)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {device}


@pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "pickle"])
def test_copies_own_their_processors(copied):
    model = dit()
    run = RUNS["dit"][1]
    sb.replace_attention(model, **SETTINGS)
    out = run(model)
    other = copied(model)
    assert torch.equal(run(other), out)
    mine, theirs = (m.transformer_blocks[0].attn1.processor for m in (model, other))
    assert theirs is not mine and theirs._layer[0] is other.transformer_blocks[0].attn1


def test_a_text_that_is_hidden_whole_is_seen_whole():
    mask = torch.zeros(2, 1, TEXT)
    mask[0], mask[1, :, 9:] = -10000.0, -10000.0  # a UNet makes these of encoder_attention_mask
    exact = layer(cross_attention_dim=WIDTH)
    mine = copy.deepcopy(exact)
    sb.replace_attention(mine, **EVERY_KEY)
    arguments = rand(2, 40, WIDTH, seed=1), text()
    out = mine(*arguments, attention_mask=mask)
    close(out[0], exact(*arguments)[0])  # -10000 in all of float32's scores would round them
    close(out[1], exact(*arguments, attention_mask=mask)[1])


@pytest.mark.parametrize("hidden", [False, -torch.inf], ids=["bool", "inf"])
def test_a_text_of_which_nothing_can_be_seen_gives_zeros(hidden: float):
    keep = torch.ones(2, 1, TEXT, dtype=torch.bool)
    keep[0], keep[1, :, 9:] = False, False
    mask = keep if hidden is False else torch.zeros(2, 1, TEXT).masked_fill(~keep, hidden)
    exact = layer(cross_attention_dim=WIDTH)
    mine = copy.deepcopy(exact)
    sb.replace_attention(mine, **EVERY_KEY)
    arguments = rand(2, 40, WIDTH, seed=1), text()
    expected = exact(*arguments, attention_mask=mask)
    close(expected[0], exact.to_out[0].bias.expand_as(expected[0]))
    close(mine(*arguments, attention_mask=mask), expected)


def test_keys_that_a_finite_number_hides_are_seen_where_infinity_hides_the_others():
    mask = torch.full((2, 1, TEXT), -torch.inf)
    mask[0, :, :5], mask[1, :, :9] = -10000.0, 0.0
    exact = layer(cross_attention_dim=WIDTH)
    mine = copy.deepcopy(exact)
    sb.replace_attention(mine, **EVERY_KEY)
    arguments = rand(2, 40, WIDTH, seed=1), text()
    out, expected = (each(*arguments, attention_mask=mask) for each in (mine, exact))
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)  # float32 rounds scores beside -10000


def test_learned_projections_are_trained():
    model = dit().train()
    sb.replace_attention(model, sb.Window(4), sb.Quadratic(4, "learned"))
    RUNS["dit"][1](model).square().sum().backward()
    gradient = model.transformer_blocks[0].attn1.processor.attention.query_projection.grad
    assert gradient.abs().sum() > 0


def test_one_processor_for_two_layers_is_refused():
    model = pixart()
    model.set_attn_processor(ScatterbrainAttnProcessor(HEADS, 16, **SETTINGS))
    with pytest.raises(ValueError, match="statistics of one layer, got a second layer"):
        RUNS["pixart"][1](model)


def test_autocast_and_compile():
    model, run = dit(), RUNS["dit"][1]
    with torch.no_grad():
        exact = run(model)
        sb.replace_attention(model, **EVERY_KEY)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.nn.functional.cosine_similarity(run(model).float().flatten(), exact.flatten(), 0) > 0.99
        attention, x = layer(), torch.randn(2, 35, WIDTH)
        expected = attention(x)
        sb.replace_attention(attention, **EVERY_KEY)
        close(torch.compile(attention, backend="aot_eager")(x), expected)


# ------------------------------------------------------------------------------------------------------------ report


def test_restore_gives_the_processors_back():
    model, run = unet(), RUNS["unet"][1]
    names, before = list(model.state_dict()), dict(model.attn_processors)
    report = sb.replace_attention(model, **SETTINGS)
    assert len(report.replaced) == 8 and all(entry.note.startswith("cross") for entry in report.replaced[1::2])
    report.restore()
    assert dict(model.attn_processors) == before and list(model.state_dict()) == names
    assert vars(model.mid_block.attentions[0].transformer_blocks[0].attn1).keys() == vars(layer()).keys()
    close(run(model), run(unet_like(model)))


def unet_like(model: nn.Module) -> nn.Module:
    other = unet()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: layer(processor=AttnProcessor()), "its processor is AttnProcessor, not AttnProcessor2_0"),
        (
            lambda: layer(added_kv_proj_dim=WIDTH, context_pre_only=False, processor=JointAttnProcessor2_0()),
            "JointAttnProcessor2_0, not AttnProcessor2_0: it attends over two joined streams",
        ),
        (lambda: layer(added_kv_proj_dim=WIDTH, processor=AttnProcessor2_0()), "added key and value projections"),
        (lambda: layer(kv_heads=1), "keys have fewer heads than its queries"),
    ],
)
def test_layers_that_compute_something_else_are_refused(build, reason: str):
    with pytest.warns(UserWarning, match="changed nothing"):
        report = sb.replace_attention(build(), **SETTINGS)
    assert reason in report.entries[0].note


def test_models_with_their_own_attention_classes_are_refused_by_name():
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(
            in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
        )  # fmt: skip
    with pytest.warns(UserWarning, match="changed nothing"):
        report = sb.replace_attention(model, **SETTINGS)
    assert {entry.note for entry in report.entries} == {
        "FluxAttention runs FluxAttnProcessor; only diffusers' Attention with AttnProcessor2_0 is handled"
    }
