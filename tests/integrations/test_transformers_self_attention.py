"""Which attention layers of transformers' models are self-attention, whatever module and class are called."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import types
from pathlib import Path

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
import hf_models as hf

import scatterbrain as sb
from scatterbrain.integrations.transformers.layers import _other_tokens

WINDOW = sb.Window(16, block_q=8)


def decoder(name_of_cache: str) -> nn.Module:
    """Its attention ``layers.0.attn`` says nowhere that it is self-attention, and has this name for its cache."""
    sizes = {**hf.TEXT, "num_hidden_layers": 1, "layer_types": ["full_attention"]}
    torch.manual_seed(0)
    model = transformers.ModernBertDecoderModel(transformers.ModernBertDecoderConfig(**sizes)).eval()
    layer = model.layers[0].attn
    original = inspect.unwrap(type(layer).forward)
    names = tuple(name_of_cache if name == "cache" else name for name in original.__code__.co_varnames)
    renamed = types.FunctionType(original.__code__.replace(co_varnames=names), original.__globals__)

    @functools.wraps(renamed)
    def forward(self: nn.Module, *args: object, cache: object = None, **kwargs: object) -> tuple:
        return renamed(self, *args, **{name_of_cache: cache}, **kwargs)

    layer.__class__ = type(type(layer).__name__, (type(layer),), {"forward": forward})
    return model


@pytest.mark.parametrize("name_of_cache", ["cache", "past_key_values", "shared_kv_states"])
def test_a_causal_layer_with_a_cache_keeps_the_support_that_was_chosen(name_of_cache: str):
    model = decoder(name_of_cache)
    exact = hf.run(model, input_ids=hf.tokens())
    report = sb.replace_attention(model, WINDOW, None)
    assert [(entry.path, entry.note) for entry in report.replaced] == [("layers.0.attn", "")]
    core = model.layers[0].attn.scatterbrain
    assert core.is_self and core.support_of(True) == WINDOW
    out = hf.run(model, input_ids=hf.tokens())
    torch.testing.assert_close(out[:, :16], exact[:, :16])  # the window holds all that these see
    assert not torch.allclose(out, exact, atol=1e-3)


def test_no_causal_layer_of_transformers_is_taken_for_cross_attention_by_its_parameters():
    both = {"lightglue", "gpt_bigcode", "idefics"}  # one class for self- and cross-attention, told apart by other marks
    found, causal = {}, 0
    for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        code = path.read_text(encoding="utf-8")
        if "ALL_ATTENTION_FUNCTIONS" not in code or path.parent.name in both:
            continue
        lines = code.splitlines()
        for cls in (node for node in ast.parse(code).body if isinstance(node, ast.ClassDef)):
            methods = {method.name: method for method in cls.body if isinstance(method, ast.FunctionDef)}
            text = {name: "\n".join(lines[m.lineno - 1 : m.end_lineno]) for name, m in methods.items()}
            says_causal = re.search(r"self\.is_causal = True\b", text.get("__init__", ""))
            if not says_causal or "ALL_ATTENTION_FUNCTIONS" not in text.get("forward", ""):
                continue
            causal += 1
            arguments = methods["forward"].args
            names = [argument.arg for argument in (*arguments.args[1:], *arguments.kwonlyargs)]
            if others := _other_tokens(names, True):
                found[path.parent.name] = others
    assert causal > 100 and not found, "layers.py takes these parameters for other tokens"
