"""Tiny models with random weights of every family that the transformers integration is tested on, and how they
are run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from testkit import padding
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
import transformers as hf

WIDTH, HEADS, WORDS, PAD = 64, 4, 60, 0
TEXT: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": 80,
    "pad_token_id": PAD,
}
LONG = {"max_position_embeddings": 300}
VISION = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 80}
AUDIO_FRAMES = 120
WHISPER = {
    "vocab_size": WORDS,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 80,
    "num_mel_bins": 8,
    "max_source_positions": AUDIO_FRAMES,
    "max_target_positions": 300,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
BART = {k: v for k, v in WHISPER.items() if k not in ("num_mel_bins", "suppress_tokens", "begin_suppress_tokens")}


@dataclass
class Family:
    """A model class with a configuration and what one forward takes.

    Args:
        kind: "encoder" and "decoder" take tokens and a mask, "vision" pixels, "audio" mel frames and decoder tokens,
            "seq2seq" tokens and decoder tokens, "cross" tokens and another model's states with their mask.
    """

    kind: str
    model: type[nn.Module]
    config: type
    arguments: dict[str, Any]
    extra: dict[str, Any] = field(default_factory=dict)

    def build(self, attn_implementation: str = "sdpa", **arguments: Any) -> nn.Module:
        torch.manual_seed(0)
        config = self.config(**self.arguments | arguments, attn_implementation=attn_implementation)
        model = self.model(config, **self.extra).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():  # attention that is neither uniform nor one-hot
            for key, parameter in model.named_parameters():
                if parameter.dim() > 1 and ".scatterbrain." not in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
        return model


FAMILIES: dict[str, Family] = {
    "bert": Family("encoder", hf.BertModel, hf.BertConfig, TEXT | LONG),
    "roberta": Family("encoder", hf.RobertaModel, hf.RobertaConfig, TEXT | LONG),
    "modernbert": Family(
        "encoder",
        hf.ModernBertModel,
        hf.ModernBertConfig,
        TEXT | {"local_attention": 32, "global_attn_every_n_layers": 2},
    ),
    "vit": Family("vision", hf.ViTModel, hf.ViTConfig, VISION | {"image_size": 32, "patch_size": 4}),
    "dinov2": Family("vision", hf.Dinov2Model, hf.Dinov2Config, VISION | {"image_size": 32, "patch_size": 4}),
    "clip vision": Family(
        "vision", hf.CLIPVisionModel, hf.CLIPVisionConfig, VISION | {"image_size": 32, "patch_size": 4}
    ),
    "clip text": Family("decoder", hf.CLIPTextModel, hf.CLIPTextConfig, TEXT | LONG | {"eos_token_id": 2}),
    "whisper": Family("audio", hf.WhisperModel, hf.WhisperConfig, WHISPER),
    "bart": Family("seq2seq", hf.BartModel, hf.BartConfig, BART | LONG),
    "gpt2": Family(
        "decoder",
        hf.GPT2LMHeadModel,
        hf.GPT2Config,
        {"vocab_size": WORDS, "n_embd": WIDTH, "n_layer": 2, "n_head": HEADS, "n_positions": 300, "pad_token_id": PAD},
    ),
    "llama": Family("decoder", hf.LlamaForCausalLM, hf.LlamaConfig, TEXT | {"num_key_value_heads": 2}),
    "qwen3": Family("decoder", hf.Qwen3ForCausalLM, hf.Qwen3Config, TEXT | {"num_key_value_heads": 2, "head_dim": 16}),
    "opt": Family(
        "decoder",
        hf.OPTForCausalLM,
        hf.OPTConfig,
        TEXT | LONG | {"ffn_dim": 80, "word_embed_proj_dim": WIDTH, "intermediate_size": None},
    ),
    "mistral with a window": Family(
        "decoder", hf.MistralForCausalLM, hf.MistralConfig, TEXT | {"num_key_value_heads": 2, "sliding_window": 24}
    ),
    "bert decoder": Family(
        "cross", hf.BertLMHeadModel, hf.BertConfig, TEXT | LONG | {"is_decoder": True, "add_cross_attention": True}
    ),
    "gpt2 with cross-attention": Family(
        "cross",
        hf.GPT2LMHeadModel,
        hf.GPT2Config,
        {
            "vocab_size": WORDS,
            "n_embd": WIDTH,
            "n_layer": 2,
            "n_head": HEADS,
            "n_positions": 300,
            "add_cross_attention": True,
        },
    ),
}
FAMILIES["opt"].arguments.pop("intermediate_size")
TOKENS = 100


def named(*kinds: str) -> list[str]:
    return [name for name, family in FAMILIES.items() if family.kind in kinds]


def tokens(count: int = TOKENS, seed: int = 0, batch: int = 2) -> Tensor:
    return torch.randint(4, WORDS, (batch, count), generator=torch.Generator().manual_seed(seed))


def keep(side: str, count: int = TOKENS, padded: int = 30) -> Tensor:
    """(2, count), 1 = keep: the second row is padded on ``side``."""
    return (~padding(count, (0, padded * (side == "right")), (0, padded * (side == "left")))).long()


def inputs(name: str, side: str = "none", seed: int = 0) -> tuple[dict[str, Any], Tensor]:
    """Arguments of a forward, and bool (2, tokens): the outputs that count."""
    kind = FAMILIES[name].kind
    generator = torch.Generator().manual_seed(seed)
    if kind == "vision":
        pixels = torch.randn(2, 3, 32, 32, generator=generator)
        return {"pixel_values": pixels}, torch.ones(2, 65, dtype=torch.bool)
    ids, mask = tokens(seed=seed), keep(side)
    counts = mask.bool()
    if kind == "audio":
        mel = torch.randn(2, 8, 2 * AUDIO_FRAMES, generator=generator)
        return {"input_features": mel, "decoder_input_ids": ids, "decoder_attention_mask": mask}, counts
    if kind == "seq2seq":
        decoder = {"decoder_input_ids": tokens(seed=seed + 50), "decoder_attention_mask": mask.flip(0)}
        return {"input_ids": ids, "attention_mask": mask, **decoder}, counts.flip(0)
    if kind == "cross":
        states = torch.randn(2, TOKENS, WIDTH, generator=generator)
        encoder = {"encoder_hidden_states": states, "encoder_attention_mask": keep(side, padded=45).flip(0)}
        return {"input_ids": ids, "attention_mask": mask, **encoder}, counts
    return {"input_ids": ids, "attention_mask": mask}, counts


def output(result: Any) -> Tensor:
    """Logits or hidden states, (batch, tokens, ...)."""
    logits = getattr(result, "logits", None)
    return result.last_hidden_state if logits is None else logits


Run = Callable[..., Tensor]


@torch.no_grad()
def run(model: nn.Module, **arguments: Any) -> Tensor:
    return output(model(**arguments))


def cache(kind: str, model: nn.Module) -> transformers.Cache:
    if kind == "static":
        return transformers.StaticCache(config=model.config, max_cache_len=TOKENS + 28)
    return transformers.DynamicCache(config=model.config)


@torch.no_grad()
def in_pieces(
    model: nn.Module, ids: Tensor, cuts: Sequence[int], mask: Tensor | None = None, kind: str = "dynamic"
) -> Tensor:
    """Logits of the tokens, fed in pieces that end at ``cuts`` with a cache of ``kind``."""
    past, out, start = cache(kind, model), [], 0
    for end in cuts:
        seen = None if mask is None else mask[:, :end]
        out.append(model(input_ids=ids[:, start:end], attention_mask=seen, cache=past, use_cache=True).logits)
        start = end
    return torch.cat(out, 1)
