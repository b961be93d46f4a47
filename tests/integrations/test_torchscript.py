"""TorchScript, ONNX and nested tensors: exact attention works as the library's own does, everything else says one
sentence."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from testkit import encoder, qkv, rand
from torch import Tensor, nn

import scatterbrain as sb

LEARNED = sb.Quadratic(3, "learned")
REFUSED = (
    r"TorchScript \(torch.jit.trace, torch.jit.script\) and ONNX cannot hold sparse \+ low-rank attention; use "
    r"torch.export or torch.compile, or choose exact attention before exporting: support=Full\(\), "
    r"attn_implementation='sdpa', or report.restore\(\)"
)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated"),
    pytest.mark.filterwarnings("ignore:.*is not supported in Python 3.14"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*TorchScript-based ONNX export"),
    pytest.mark.filterwarnings("ignore:The feature will be removed"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated"),
]


def vit(support: sb.Full | sb.Window | None, name: str = "vit_tiny_patch16_224", **arguments: object) -> nn.Module:
    """A small vision transformer of timm; as timm made it without a support."""
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 32, "patch_size": 4, "depth": 1, "embed_dim": 16, "num_heads": 2} | arguments
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, **sizes).eval()
    if support is not None:
        sb.replace_attention(model, support, LEARNED)
    return model


def core() -> nn.Module:
    return sb.ScatterbrainAttention(2, 8, 1, sb.Window(8), LEARNED).eval()


def swapped() -> nn.Module:
    model = encoder().eval()
    sb.replace_attention(model, sb.Window(8), LEARNED)
    return model


def bert() -> nn.Module:
    pytest.importorskip("transformers")
    import hf_models as hf

    import scatterbrain.integrations.transformers  # noqa: F401  (names the implementations)

    return hf.FAMILIES["bert"].build("scatterbrain:train", num_hidden_layers=1, return_dict=False)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "ScatterbrainAttention": (core, lambda: tuple(qkv())),
    "nn.TransformerEncoder": (swapped, lambda: (rand(2, 40, 48),)),
    "timm": (lambda: vit(sb.Window(8)), lambda: (rand(1, 3, 32, 32),)),
    "transformers": (bert, lambda: (torch.arange(4, 44)[None],)),
}


@pytest.mark.parametrize("name", MODELS)
def test_an_approximating_model_is_not_scripted_and_not_traced(name: str) -> None:
    build, inputs = MODELS[name]
    model = build()
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.jit.script(model)
    with torch.no_grad(), pytest.raises(RuntimeError, match=REFUSED):
        torch.jit.trace(model, inputs())


@pytest.mark.parametrize("is_new", [False, True])
def test_an_approximating_model_is_not_exported_to_onnx(is_new: bool) -> None:
    pytest.importorskip("onnxscript")
    with pytest.raises(Exception, match=REFUSED):
        torch.onnx.export(core(), tuple(qkv()), io.BytesIO(), dynamo=is_new, verbose=False)


EXACT = {
    "VisionTransformer": {},
    "rotary positions": {"name": "vit_base_patch16_rope_reg1_gap_256"},
}


@pytest.mark.parametrize("arguments", EXACT.values(), ids=EXACT)
def test_an_exact_timm_model_scripts_and_traces_as_that_of_timm(arguments: dict) -> None:
    own, exact, pixels = vit(None, **arguments), vit(sb.Full(), **arguments), rand(1, 3, 32, 32)
    with torch.no_grad():
        for convert in (torch.jit.script, lambda model: torch.jit.trace(model, pixels)):
            file = io.BytesIO()
            torch.jit.save(convert(copy.deepcopy(exact)), file)
            file.seek(0)
            assert torch.equal(torch.jit.load(file)(pixels), convert(own)(pixels))


def test_exact_attention_is_traced() -> None:
    module = sb.ScatterbrainAttention(2, 8, 1, sb.Full(), None).eval()
    traced = torch.jit.trace(module, tuple(qkv()))
    for count in (37, 52):
        assert torch.equal(traced(*qkv(count)), module(*qkv(count)))


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_an_exact_model_of_transformers_is_traced_as_with_sdpa(name: str) -> None:
    hf = pytest.importorskip("hf_models")
    ids, mask = hf.tokens(), hf.keep("right")
    for keep in (None, mask):
        results = []
        for implementation in ("scatterbrain:full", "sdpa"):
            model = hf.FAMILIES[name].build(implementation).eval().requires_grad_(False)
            model.config.use_cache = False
            traced = torch.jit.trace(
                lambda ids, model=model, keep=keep: hf.output(model(ids, attention_mask=keep)), ids
            )
            results.append(traced(ids)[mask.bool()])
        torch.testing.assert_close(*results)


# -------------------- TorchScript inside other models


def scripted() -> nn.Module:
    return torch.jit.script(nn.Sequential(nn.Linear(16, 16), nn.GELU()))


def test_models_that_hold_torchscript_are_swapped() -> None:
    pytest.importorskip("transformers")
    import scatterbrain.integrations.transformers  # noqa: F401  (whose replacer looks at every module's class)

    model = nn.Sequential(encoder(), scripted())
    report = sb.replace_attention(model, sb.Window(8), LEARNED)
    assert len(report.replaced) == 2
    assert sb.integrations.set_attention_dropout(model, 0.5)
    report.restore()


def test_transformers_models_that_hold_torchscript_are_built_and_changed() -> None:
    pytest.importorskip("transformers")
    from transformers import LlamaConfig, PreTrainedModel
    from transformers.models.llama.modeling_llama import LlamaAttention

    import scatterbrain.integrations.transformers  # noqa: F401

    class Model(PreTrainedModel):
        config_class = LlamaConfig
        _supports_sdpa = True

        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.inner = scripted()
            self.attention = LlamaAttention(config, 0)
            self.post_init()

    config = LlamaConfig(hidden_size=32, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=1)
    model = Model._from_config(config, attn_implementation="scatterbrain:train")
    assert isinstance(model.attention.scatterbrain, sb.ScatterbrainAttention)
    model.set_attn_implementation("sdpa")
    assert not hasattr(model.attention, "scatterbrain")


# -------------------- nested tensors


def nested(layout: torch.layout) -> list[Tensor]:
    tensors = [torch.nested.nested_tensor([t[0, :, :20].transpose(0, 1), t[1].transpose(0, 1)], layout=layout)
               for t in qkv()]  # fmt: skip
    return [t.transpose(1, 2) for t in tensors]


CALLS = {
    "attention": lambda q, k, v: sb.attention(q, k, v, sb.Window(8), None),
    "exact attention": lambda q, k, v: sb.attention(q, k, v, sb.Full(), None),
    "route": lambda q, k, v: sb.route(q, k, sb.Routed(16, block_q=8)),
    "fit_statistics": lambda q, k, v: sb.fit_statistics(q, k, 3),
    "ScatterbrainAttention": lambda q, k, v: core()(q, k, v),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_nested_tensors_are_refused(call: str, layout: torch.layout) -> None:
    with pytest.raises(
        ValueError, match="expected padded tensors, got a nested tensor.*key_padding_mask, True = ignore"
    ):
        CALLS[call](*nested(layout))


def test_nested_tokens_of_timm_are_refused() -> None:
    tokens = torch.nested.nested_tensor([rand(30, 16), rand(20, 16)], layout=torch.jagged)
    with pytest.raises(ValueError, match="expected padded tensors, got a nested tensor"):
        vit(sb.Window(8)).blocks[0].attn(tokens)
