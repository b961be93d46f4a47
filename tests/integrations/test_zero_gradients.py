"""Learned projections get gradients of zero, not none, from every call that leaves the approximation out. Under
DistributedDataParallel the next forward pass would raise otherwise (tests/distributed/test_ddp_paths.py)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from testkit import cores, partial_mask, qkv, rand
from torch import Tensor, nn

import scatterbrain as sb

LEARNED = sb.Quadratic(4, "learned")
WINDOW = sb.Window(8, block_q=8)
E, H, L = 32, 2, 24  # width, heads and tokens of the host modules

Call = tuple[nn.Module, Callable[[], Tensor]]


def attention(support: sb.Window | sb.Full = WINDOW, tokens: int = L, batch: int = 2, **arguments: Any) -> Call:
    module = sb.ScatterbrainAttention(2, 8, 1, WINDOW, LEARNED, **arguments)
    module.support = support  # afterwards: a module made for exact attention has no projections
    inputs = qkv(tokens, batch=batch)
    return module, lambda: module(*inputs)


def collecting() -> Call:
    module, call = attention()
    module.is_collecting = True
    return module, call


def the_lse_of_full() -> Call:
    (module, _), inputs = attention(sb.Full()), qkv(L)
    return module, lambda: module(*inputs, return_lse=True)[1]


def multihead(dropout: float = 0.0, tokens: int = L, weights: bool = False, **arguments: Any) -> Call:
    module = sb.MultiheadAttention(E, H, dropout, batch_first=True, support=WINDOW, low_rank=LEARNED, **arguments)
    x = rand(2, tokens, E)
    mask = partial_mask(L, L) if not (dropout or weights or arguments or tokens != L) else None
    return module, lambda: module(x, x, x, need_weights=weights, attn_mask=mask)[0]


def swapped_decoder() -> Call:
    """Its cross-attention has a mask of its own."""
    layer = nn.TransformerDecoderLayer(E, H, 48, dropout=0.0, batch_first=True)
    sb.replace_attention(layer, WINDOW, LEARNED)
    mask = partial_mask(L, L)
    return layer, lambda: layer(rand(2, L, E), rand(2, L, E, seed=1), mask, mask)


def vision_block(attn_drop: float = 0.0, masked: bool = False) -> Call:
    timm = pytest.importorskip("timm")
    module = nn.ModuleList([timm.layers.Attention(E, H, attn_drop=attn_drop)])
    sb.replace_attention(module, WINDOW, LEARNED)
    x, mask = rand(2, L, E), ~partial_mask(L, L) if masked else None
    return module, lambda: module[0](x, mask)


def rotary_block(masked: bool) -> Call:
    pytest.importorskip("timm")
    from timm.models.eva import EvaAttention

    module = nn.ModuleList([EvaAttention(E, H, norm_layer=nn.LayerNorm, attn_drop=0.0 if masked else 0.1)])
    sb.replace_attention(module, WINDOW, LEARNED)
    x, mask = rand(2, L, E), ~partial_mask(L, L) if masked else None
    return module, lambda: module[0](x, None, mask)


def processor() -> Call:
    layers = pytest.importorskip("diffusers.models.attention_processor")
    module = nn.ModuleList([layers.Attention(E, heads=H, dim_head=E // H)])
    sb.replace_attention(module, WINDOW, LEARNED)
    x, mask = rand(2, L, E), torch.randn(2, 1, L)
    return module, lambda: module[0](x, attention_mask=mask)


def hugging_face(name: str, kind: str = "plain") -> Call:
    hf = pytest.importorskip("hf_models")
    from scatterbrain.integrations import transformers

    implementation = transformers.register("scatterbrain:unused", WINDOW, LEARNED)
    model = hf.FAMILIES[name].build(implementation).train()
    transformers.set_attention_dropout(model, 0.1 if kind == "dropout" else 0.0)
    arguments: dict[str, Any] = {"input_ids": hf.tokens(1 if kind == "one token" else L)}
    if kind == "packed rows":
        arguments |= {"position_ids": torch.arange(L).remainder(L // 2).expand(2, L), "use_cache": False}
    if kind == "sliding window":
        arguments["input_ids"] = hf.tokens(40)
    if kind == "any mask":
        arguments["attention_mask"] = ~partial_mask(2, 1, L, L)
    if kind == "added mask":
        arguments["attention_mask"] = partial_mask(2, 1, L, L, kind=float)
    if kind == "short":
        arguments["input_ids"] = hf.tokens(6)
    return model, lambda: hf.output(model(**arguments))


CALLS: dict[str, Callable[[], Call]] = {
    "core, every key is in the support": lambda: attention(tokens=8),
    "core, full support": lambda: attention(sb.Full()),
    "core, full support, lse": the_lse_of_full,
    "core, one token": lambda: attention(tokens=1),
    "core, no token": lambda: attention(tokens=0),
    "core, empty batch": lambda: attention(batch=0),
    "core, every query is exact": lambda: attention(exact_queries=L),
    "core, collecting": collecting,
    "multi-head, dropout": lambda: multihead(dropout=0.1),
    "multi-head, weights": lambda: multihead(weights=True),
    "multi-head, any mask": multihead,
    "multi-head, added key": lambda: multihead(add_zero_attn=True),
    "multi-head, short": lambda: multihead(tokens=6),
    "decoder layer, any mask": swapped_decoder,
    "timm, dropout": lambda: vision_block(attn_drop=0.1),
    "timm, any mask": lambda: vision_block(masked=True),
    "timm with rotary positions, dropout": lambda: rotary_block(masked=False),
    "timm with rotary positions, any mask": lambda: rotary_block(masked=True),
    "diffusers, any mask": processor,
    "transformers, dropout": lambda: hugging_face("bert", "dropout"),
    "transformers, packed rows": lambda: hugging_face("llama", "packed rows"),
    "transformers, any mask": lambda: hugging_face("llama", "any mask"),
    "transformers, added mask": lambda: hugging_face("bert", "added mask"),
    "transformers, one token": lambda: hugging_face("llama", "one token"),
    "transformers, short": lambda: hugging_face("llama", "short"),
    "transformers, sliding window": lambda: hugging_face("mistral with a window", "sliding window"),
}


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*runs exact attention")
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing")
        yield


def gradients(module: nn.Module, call: Callable[[], Tensor]) -> list[Tensor | None]:
    call().float().square().sum().backward()
    return [parameter.grad for core in cores(module).values() for parameter in core.parameters()]


@pytest.mark.parametrize("name", CALLS)
def test_projections_that_a_call_does_not_use_get_zeros(name: str):
    module, call = CALLS[name]()
    found = gradients(module, call)
    assert found
    for gradient in found:
        assert gradient is not None and not gradient.any()


@pytest.mark.parametrize(
    "name", ["core, every key is in the support", "core, full support", "multi-head, weights", "timm, dropout"]
)
def test_compiled_calls_give_zeros_too(name: str):
    module, _ = CALLS[name]()
    torch._dynamo.reset()
    if "core" in name:
        inputs = qkv(8)
    else:
        inputs = (rand(2, L, E),) * (3 if "multi-head" in name else 1)
    compiled = torch.compile(module[0] if isinstance(module, nn.ModuleList) else module, backend="aot_eager")
    found = gradients(module, lambda: out[0] if isinstance(out := compiled(*inputs), tuple) else out)
    assert found
    for gradient in found:
        assert gradient is not None and not gradient.any()
