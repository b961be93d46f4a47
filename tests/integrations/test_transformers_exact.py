"""transformers' models give the outputs of their own sdpa where no key is approximated, whatever the mask."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
import hf_models as hf

import scatterbrain as sb
from scatterbrain.integrations.transformers import register
from scatterbrain.integrations.transformers.masks import READ_MASKS, SILENT

# One runs torch's attention, the other the library's kernels with lists that hold every key.
NAMES = ("scatterbrain:full", register("scatterbrain:every-key", sb.Window(4096), None))
pytestmark = pytest.mark.filterwarnings("ignore:.*runs exact attention")


def check(name: str, mine: Tensor, exact: Tensor, counts: Tensor) -> None:
    assert exact[counts].std() > 0.01
    torch.testing.assert_close(mine[counts], exact[counts], rtol=2e-5, atol=2e-5, msg=lambda text: f"{name}: {text}")


def both(name: str, implementation: str, **arguments) -> tuple[nn.Module, nn.Module]:
    return hf.FAMILIES[name].build(implementation, **arguments), hf.FAMILIES[name].build("sdpa", **arguments)


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize(
    ("name", "side"),
    [(name, "none") for name in hf.FAMILIES]
    + [(name, side) for name in hf.FAMILIES if hf.FAMILIES[name].kind != "vision" for side in ("right", "left")],
)
def test_every_family_with_padding(name: str, side: str, implementation: str):
    arguments, counts = hf.inputs(name, side)
    mine, exact = both(name, implementation)
    check(name, hf.run(mine, **arguments), hf.run(exact, **arguments), counts)


def doge(implementation: str) -> nn.Module:
    """A model that makes a mask of its own from that of transformers."""
    torch.manual_seed(0)
    settings = {"intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": hf.WORDS}
    config = transformers.DogeConfig(hidden_size=hf.WIDTH, initializer_range=0.2, **settings)
    return transformers.DogeForCausalLM._from_config(config, attn_implementation=implementation).eval()


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("implementation", NAMES)
def test_a_model_that_makes_a_mask_of_its_own_stays_causal(implementation: str, side: str):
    arguments = {"input_ids": hf.tokens(), "attention_mask": hf.keep(side)}
    check("doge", hf.run(doge(implementation), **arguments), hf.run(doge("sdpa"), **arguments), hf.keep(side).bool())


def test_a_compiled_model_that_makes_a_mask_of_its_own_stays_causal():
    torch._dynamo.reset()
    model = torch.compile(doge(NAMES[1]), backend="aot_eager")
    arguments = {"input_ids": hf.tokens(), "use_cache": False}
    check("doge", hf.run(model, **arguments), hf.run(doge("sdpa"), **arguments), hf.keep("none").bool())


def test_the_families_that_make_masks_of_their_own_are_known():
    folder = Path(transformers.__file__).parent / "models"
    found = {
        path.parent.name
        for path in folder.glob("*/modeling_*.py")
        if re.search(r"allow_is_causal_skip\"?(=|: )(?!True)", path.read_text(encoding="utf-8"))
    }
    assert found <= set(READ_MASKS), "add them to masks.READ_MASKS"


def silent(family: str, implementation: str) -> nn.Module:
    if family == "aimv2":
        sizes = {k: v for k, v in hf.TEXT.items() if k != "pad_token_id"}
        config = transformers.Aimv2TextConfig(**sizes | hf.LONG, eos_token_id=2, attn_implementation=implementation)
        model = transformers.Aimv2TextModel
    else:
        model, config = {
            "pegasus_x": (transformers.PegasusXModel, transformers.PegasusXConfig),
            "bigbird_pegasus": (transformers.BigBirdPegasusModel, transformers.BigBirdPegasusConfig),
        }[family]
        config = config(**hf.BART | hf.LONG, attn_implementation=implementation)
    torch.manual_seed(0)
    return model(config).eval()


@pytest.mark.filterwarnings("ignore:calibrate. statistics were fitted")
@pytest.mark.parametrize("implementation", ["scatterbrain", "scatterbrain:quadratic", *NAMES])
@pytest.mark.parametrize("family", ["aimv2", "pegasus_x", "bigbird_pegasus"])
def test_a_decoder_whose_layers_do_not_say_that_they_are_causal_stays_so(family: str, implementation: str):
    model, later = silent(family, implementation), "input_ids" if family == "aimv2" else "decoder_input_ids"
    arguments = {"input_ids": hf.tokens(), "attention_mask": hf.keep("none"), later: hf.tokens(seed=50)}
    changed = arguments | {later: torch.cat([arguments[later][:, :60], hf.tokens(40, seed=3)], 1)}
    if implementation not in NAMES:
        with sb.calibrate(model):
            hf.run(model, **arguments)
    else:
        check(family, hf.run(model, **arguments), hf.run(silent(family, "eager"), **arguments), torch.ones(2, 100) > 0)
    out, other = hf.run(model, **arguments), hf.run(model, **changed)
    assert torch.equal(other[:, :60], out[:, :60]) and not torch.equal(other, out)


def test_the_families_whose_layers_do_not_say_that_they_are_causal_are_known():
    others = {"git", "nemotron3_5_transcribe"}  # their encoders say that they are not; decoders are by default
    found = set()
    for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        code = path.read_text(encoding="utf-8")
        values = {v.strip() for v in re.findall(r"is_causal\b[^=,\n()]*=(?!=)\s*([^,\n)#]+)", code)}
        if "create_causal_mask(" in code and "ALL_ATTENTION_FUNCTIONS" in code and values:
            found |= {path.parent.name} if values <= {"False", "is_causal", "self.is_causal"} else set()
    assert found - others <= set(SILENT), "add them to masks.SILENT"


def causal_4d(side: str) -> Tensor:
    square = torch.ones(hf.TOKENS, hf.TOKENS, dtype=torch.bool).tril()
    return square & hf.keep(side).bool()[:, None, None, :]


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "llama", "qwen3", "opt", "clip text"])
def test_masks_of_queries_times_keys(name: str, kind: str, implementation: str):
    mask = causal_4d("right") | torch.eye(hf.TOKENS, dtype=torch.bool)
    mask[0, 0, 50:, 10:30] = False
    if kind == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min) + 0.3
    arguments = {"input_ids": hf.tokens(), "attention_mask": mask}
    if name == "opt":
        arguments["position_ids"] = torch.arange(hf.TOKENS)[None].expand(2, -1)
    mine, exact = both(name, implementation)
    check(name, hf.run(mine, **arguments), hf.run(exact, **arguments), hf.keep("right").bool())


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_packed_sequences(name: str):
    positions = torch.cat([torch.arange(40), torch.arange(60)])[None].expand(2, -1)
    arguments = {"input_ids": hf.tokens(), "position_ids": positions, "use_cache": False}
    mine, exact = both(name, NAMES[1])
    check(name, hf.run(mine, **arguments), hf.run(exact, **arguments), hf.keep("none").bool())


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("cuts", [[96, 97, 98, 100], [32, 80, 81, 100]], ids=["tokens one by one", "chunks"])
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt", "mistral with a window"])
def test_caches(name: str, kind: str, side: str | None, cuts: list[int], implementation: str):
    mask = None if side is None else hf.keep(side)
    mine, exact = both(name, implementation)
    pieces = [hf.in_pieces(model, hf.tokens(), cuts, mask, kind) for model in (mine, exact)]
    check(name, *pieces, hf.keep(side or "none").bool())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
def test_half_precision_models(name: str, dtype: torch.dtype):
    arguments, counts = hf.inputs(name, "right")
    if "pixel_values" in arguments:
        arguments["pixel_values"] = arguments["pixel_values"].to(dtype)
    mine, exact = (model.to(dtype) for model in both(name, NAMES[1]))
    truth = hf.run(
        hf.FAMILIES[name].build(), **{k: v.float() if v.is_floating_point() else v for k, v in arguments.items()}
    )
    error, floor = ((hf.run(model, **arguments).float() - truth)[counts].norm() for model in (mine, exact))
    assert hf.run(mine, **arguments).dtype == dtype and error <= 2 * floor


def test_scaling_of_the_model_is_honoured():
    mine, exact = both("llama", NAMES[1])
    for model in (mine, exact):
        for layer in model.model.layers:
            layer.self_attn.scaling = 0.7
    arguments, counts = hf.inputs("llama")
    check("llama", hf.run(mine, **arguments), hf.run(exact, **arguments), counts)


def test_equal_lengths_of_decoder_and_encoder_are_still_cross_attention():
    """A padded key of the encoder is no padded query of the decoder, though there are as many."""
    arguments, _ = hf.inputs("bart", "right")
    arguments["decoder_attention_mask"] = torch.ones_like(arguments["decoder_attention_mask"])
    mine, exact = both("bart", NAMES[1])
    check("bart", hf.run(mine, **arguments), hf.run(exact, **arguments), hf.keep("none").bool())
