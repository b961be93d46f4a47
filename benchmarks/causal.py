"""Which support suits causal models: error, loss and time of candidates inside trained decoders, without retraining.

    python benchmarks/causal.py tensors FILE     queries, keys and values of a causal model (benchmarks/quality.py)
    python benchmarks/causal.py llama TEXT       a byte-level Llama, trained here on the file or folder TEXT with exact
                                                 attention; without TEXT on the standard library's source
    python benchmarks/causal.py whisper          the decoder of Whisper tiny.en on 448 tokens of English prose
                                                 (examples/pretrained_models.py says which package holds it)

Error is ||o - o*|| / ||o*|| against exact attention, the mean over heads and layers, each layer on the queries, keys
and values of the exact model. Loss is that of the model with every causal layer swapped. Statistics are calibrated on
other text. Times are of attention alone on the same tensors, medians over calls taken in turn, relative to the first
row.
"""

from __future__ import annotations

import os
import sys

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, "examples"))

import argparse
import math
import re
import statistics
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

import scatterbrain as sb
from scatterbrain.bench.inputs import calibration_of

LOW_RANK = sb.presets.causal()[1]


def candidates() -> dict[str, sb.supports.Support]:
    """Name and support of every row; the first is what bidirectional models get."""
    pooled, per_query = {"block_q": 16}, {"block_q": 1, "block_k": 8}
    return {
        "routed 64": sb.Routed(64, **pooled),
        "routed 64, 4 sinks": sb.Routed(64, **pooled, sinks=4),
        "window 64": sb.Window(64),
        "window 64, 4 sinks": sb.Window(64, sinks=4),
        "window 96": sb.Window(96),
        "window 96, 4 sinks": sb.Window(96, sinks=4),
        "window 128": sb.Window(128),
        "window 128, 4 sinks": sb.Window(128, sinks=4),
        "window 32 + 32 routed": sb.Routed(64, **pooled, window=32),
        "window 32 + 28 routed, 4 sinks": sb.Routed(64, **pooled, window=32, sinks=4),
        "window 64 + 16 routed": sb.Routed(80, **pooled, window=64),
        "window 64 + 12 routed, 4 sinks": sb.Routed(80, **pooled, window=64, sinks=4),
        "window 64 + 32 routed": sb.Routed(96, **pooled, window=64),
        "window 64 + 28 routed, 4 sinks": sb.Routed(96, **pooled, window=64, sinks=4),
        "window 64 + 32 routed, block_q 8": sb.Routed(96, block_q=8, window=64),
        "per query 64, window 16": sb.Routed(64, **per_query, window=16),
        "per query 64, window 16, 8 sinks": sb.Routed(64, **per_query, window=16, sinks=8),
        "per query 96, window 64": sb.Routed(96, **per_query, window=64),
    }


@dataclass
class Layer:
    """Queries (1, Hq, N, d), keys and values (1, Hkv, N, d) of a layer in the exact model, and its statistics."""

    q: Tensor
    k: Tensor
    v: Tensor
    statistics: sb.Statistics

    def __post_init__(self) -> None:
        group = self.q.shape[1] // self.k.shape[1]
        q, k, v = self.q.double(), *(t.double().repeat_interleave(group, 1) for t in (self.k, self.v))
        scores = q @ k.transpose(-1, -2) * self.statistics.scale
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
        self.exact = torch.softmax(scores, -1) @ v

    def attend(self, support: sb.supports.Support, *tokens: Tensor) -> Tensor:
        tokens = tokens or (self.q, self.k, self.v)
        scale = self.statistics.scale
        return sb.attention(*tokens, support, LOW_RANK, is_causal=True, scale=scale, statistics=self.statistics)

    def error(self, support: sb.supports.Support) -> float:
        difference = (self.attend(support).double() - self.exact).flatten(2).norm(dim=-1)
        return float((difference / self.exact.flatten(2).norm(dim=-1)).mean())


# -------------------- sources of layers


def of_file(path: str) -> list[Layer]:
    """The layers of the causal model "lm" in a file of benchmarks/quality.py."""
    with safe_open(path, "pt") as file:
        names = sorted(m[0][:-2] for m in map(re.compile(r"lm\w*\.N\d+\.layer\d+\.q").fullmatch, file.keys()) if m)
        if not names:
            raise SystemExit(f"{path}: expected tensors named lm.N<tokens>.layer<l>.q, found none")
        layers = []
        for name in names:
            q, k, v = (file.get_tensor(f"{name}.{part}").float()[None] for part in "qkv")
            others = calibration_of(name, file.keys())
            if others is None:
                raise SystemExit(f"{path}: {name}: expected .cal in place of .N<tokens> to calibrate on, found none")
            of_other_text = (file.get_tensor(f"{others}.{part}").float()[None] for part in "qk")
            layers.append(Layer(q, k, v, sb.fit_statistics(*of_other_text, LOW_RANK.rank)))
        return layers


class Decoder:
    """A transformers model whose causal layers run Scatterbrain, calibrated on other text than it is measured on."""

    def __init__(self, model: nn.Module, calibration: list[dict], measured: list[dict]) -> None:
        import scatterbrain.integrations.transformers  # noqa: F401  (registers "scatterbrain")

        self.model, self.measured = model, measured
        self.exact_loss = self._mean_loss()
        sb.replace_attention(model, causal_support=sb.Window(64), where=lambda path: "encoder" not in path)
        with sb.calibrate(model):
            for batch in calibration:
                model(**batch)
        self.cores = [m for m in model.modules() if isinstance(m, sb.ScatterbrainAttention)]

    def _mean_loss(self) -> float:
        losses = [float(self.model(**batch).loss) for batch in self.measured]
        return sum(losses) / len(losses)

    def loss(self, support: sb.supports.Support) -> float:
        for core in self.cores:
            core.causal_support = support
        return self._mean_loss()

    def layers(self) -> list[Layer]:
        """Of the first measured batch, in the exact model."""
        tokens: dict[nn.Module, tuple[Tensor, ...]] = {}

        def keep(core: nn.Module, args: tuple) -> None:
            tokens[core] = tuple(t[:1].clone() for t in args[:3])

        hooks = [core.register_forward_pre_hook(keep) for core in self.cores]
        for core in self.cores:
            core.causal_support = sb.Full()
            core.is_collecting = True  # exact, whatever the rest of the model does
        self.model(**self.measured[0])
        for core, hook in zip(self.cores, hooks):
            hook.remove()
            core.is_collecting, core.gathered = False, None
        return [Layer(*tokens[core], core.coefficients()) for core in self.cores]


# -------------------- a Llama, trained here


def bytes_of(folder: str | None) -> tuple[Tensor, Tensor]:
    """Training and other text. Every tenth file is other text."""
    root = Path(folder or sysconfig.get_path("stdlib"))
    files = [root] if root.is_file() else sorted(root.rglob("*.*" if folder else "*.py"))
    files = [f for f in files if "site-packages" not in f.parts and "test" not in f.parts and f.is_file()]
    if not files:
        raise SystemExit(f"{root}: expected a file or a folder with files, found none")
    if len(files) == 1:
        data = files[0].read_bytes()
        parts = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]
    else:
        parts = tuple(
            b"\n".join(f.read_bytes() for i, f in enumerate(files) if (i % 10 == 9) == o) for o in (False, True)
        )
    return tuple(torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts)


def rows_of(text: Tensor, rows: int, tokens: int, generator: torch.Generator) -> dict[str, Tensor]:
    starts = torch.randint(len(text) - tokens, (rows,), generator=generator).tolist()
    ids = torch.stack([text[s : s + tokens] for s in starts]).long()
    return {"input_ids": ids, "labels": ids}


def llama(options: argparse.Namespace) -> Decoder:
    from transformers import LlamaConfig, LlamaForCausalLM

    training, other = bytes_of(options.text)
    folder = Path(options.out) if options.out else None
    if folder and (folder / "config.json").exists():
        model = LlamaForCausalLM.from_pretrained(folder)
    else:
        torch.manual_seed(options.seed)
        sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}
        config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=256, max_position_embeddings=options.tokens)
        model = train(LlamaForCausalLM(config), training, options)
        if folder:
            model.save_pretrained(folder)
    draw = torch.Generator().manual_seed(options.seed + 1)
    calibration = [rows_of(other, 1, options.tokens, draw) for _ in range(4)]
    measured = [rows_of(other, 1, options.tokens, draw) for _ in range(8)]
    return Decoder(model.eval(), calibration, measured)


@torch.enable_grad()
def train(model: nn.Module, text: Tensor, options: argparse.Namespace) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=options.steps, pct_start=0.1)
    draw = torch.Generator().manual_seed(options.seed)
    progress = tqdm(range(options.steps), desc="training with exact attention")
    for _ in progress:
        loss = model(**rows_of(text, 2, options.tokens, draw)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{float(loss):.3f}")
    return model


# -------------------- Whisper's decoder


def whisper(options: argparse.Namespace) -> Decoder:
    """448 tokens of prose, teacher forced over the encoding of a quiet recording."""
    from pydoc_data.topics import topics

    import pretrained_models
    from tokenizers import Tokenizer
    from transformers.modeling_outputs import BaseModelOutput

    model = pretrained_models.whisper_tiny_en()
    tokenizer = Tokenizer.from_file(str(pretrained_models.whisper_tokenizer_file()))
    silence = torch.full((1, 80, 3000), -1.5)
    encoded = BaseModelOutput(model.model.encoder(silence).last_hidden_state)
    start = [50257, 50362]  # start of transcript, no time stamps
    texts = sorted(topics.values(), key=len, reverse=True)
    ids = [start + tokenizer.encode(text, add_special_tokens=False).ids[:446] for text in texts[:16]]
    rows = [torch.tensor([row]) for row in ids if len(row) == 448]
    batches = [{"encoder_outputs": encoded, "decoder_input_ids": r, "labels": r.roll(-1, 1)} for r in rows]
    return Decoder(model, batches[1::2], batches[::2])


# -------------------- the table


def times(layer: Layer, supports: list[sb.supports.Support], repeats: int) -> Iterator[tuple[float, float]]:
    """Seconds of forward, and of forward and backward, medians over calls taken in turn."""
    leaves = [t.detach().clone().requires_grad_() for t in (layer.q, layer.k, layer.v)]
    gradient = torch.ones_like(layer.q)
    taken: list[tuple[list[float], list[float]]] = [([], []) for _ in supports]
    for repeat in range(repeats + 1):
        for support, (forward, both) in zip(supports, taken):
            start = time.thread_time()
            with torch.no_grad():
                layer.attend(support)
            middle = time.thread_time()
            with torch.enable_grad():
                torch.autograd.grad(layer.attend(support, *leaves), leaves, gradient)
            if repeat:
                forward.append(middle - start)
                both.append(time.thread_time() - middle)
    return ((statistics.median(forward), statistics.median(both)) for forward, both in taken)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", choices=["tensors", "llama", "whisper"])
    parser.add_argument("text", nargs="?", help="FILE of tensors, or the folder or file that the Llama is trained on")
    parser.add_argument("--tokens", type=int, default=2048, help="length of the Llama's rows (default 2048)")
    parser.add_argument("--steps", type=int, default=400, help="training steps of two rows (default 400)")
    parser.add_argument("--out", help="folder for the trained Llama; a second call takes it from there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of each kind; 0 for none (default 15)")
    parser.add_argument("--only", help="regular expression: the rows to measure (default all)")
    options = parser.parse_args()
    if options.source == "tensors" and not options.text:
        parser.error("tensors: expected a FILE")
    torch.set_num_threads(1)
    decoder = None
    if options.source == "tensors":
        layers = of_file(options.text)
    else:
        decoder = llama(options) if options.source == "llama" else whisper(options)
        layers = decoder.layers()
    rows = {name: s for name, s in candidates().items() if re.search(options.only or "", name)}
    measured = times(layers[len(layers) // 2], list(rows.values()), options.repeats) if options.repeats else None
    if decoder is not None:
        print(f"{layers[0].q.shape[2]} tokens, loss with exact attention {decoder.exact_loss:.4f}\n")
    print("| support | error | loss | time, forward | forward and backward |\n| --- | --- | --- | --- | --- |")
    base = None
    for name, support in rows.items():
        error = sum(layer.error(support) for layer in layers) / len(layers)
        loss = "-" if decoder is None else f"{decoder.loss(support):.4f}"
        seconds = next(measured) if measured else (math.nan, math.nan)
        base = base or seconds
        print(
            f"| {name} | {error:.4f} | {loss} | " + " | ".join(f"{s / b:.2f}" for s, b in zip(seconds, base)) + " |",
            flush=True,
        )


if __name__ == "__main__":
    main()
