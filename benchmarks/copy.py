"""Causal copy: can a model trained from scratch learn to look 128 tokens back, with few keys per query?

A sequence is 127 random symbols of 64, a separator, and the same 127 symbols. The perplexity of the copied half is 1
for a model that has learned to copy and 64 for one that guesses.

    python benchmarks/copy.py                      training preset, full attention, window; two seeds each
    python benchmarks/copy.py --attention train    one of them
"""

from __future__ import annotations

import os
import sys

# The folder of a script leads the import path, where this file would hide the standard module copy.
sys.path[:] = [p for p in sys.path if os.path.abspath(p) != os.path.dirname(os.path.abspath(__file__))]

import argparse
import math
import time
from functools import partial

import torch

from scatterbrain.training.attention import build_attention, describe_attention
from scatterbrain.training.config import AttentionConfig, ModelConfig, TrainConfig
from scatterbrain.training.train_step import Batch, TrainState, scheduled_learning_rate

SYMBOLS, HALF = 64, 127
SEPARATOR = SYMBOLS

MODEL = ModelConfig(
    layers=2,
    width=128,
    heads=2,
    mlp="gelu",
    mlp_width=256,
    norm="layer",
    rope_base=1000.0,
    tied=False,
    embedding_std=4.0,
)


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    attentions = {
        "train": AttentionConfig(preset="train", keys=options.keys),
        "full": AttentionConfig(support="full"),
        "window": AttentionConfig(keys=options.keys, support="window", low_rank="none"),
    }
    for name in options.attention:
        print(f"{name}: {describe_attention(attentions[name])}")
        for seed in options.seeds:
            started = time.perf_counter()
            perplexity = train_copy(attentions[name], options.steps, seed)
            print(f"  seed {seed}: perplexity {perplexity:.4f}, {time.perf_counter() - started:.0f} s", flush=True)


def train_copy(attention: AttentionConfig, steps: int, seed: int) -> float:
    """Trains on fresh sequences and returns the perplexity of the copied half of 32 others."""
    config = TrainConfig(steps=steps, learning_rate=3e-3, betas=(0.9, 0.98), weight_decay=0.01, warmup=20, seed=seed)
    train_state = TrainState(MODEL, config, partial(build_attention, attention), vocabulary=SYMBOLS + 1)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        train_state.step([draw_batch(8, generator)], scheduled_learning_rate(config, step, step / steps))
    return math.exp(train_state.evaluate([draw_batch(8, generator) for _ in range(4)]))


def draw_batch(batch: int, generator: torch.Generator) -> Batch:
    """Sequences without their last token, and the next tokens, of which only the copied half is scored."""
    symbols = torch.randint(SYMBOLS, (batch, HALF), generator=generator)
    separator = torch.full((batch, 1), SEPARATOR)
    tokens = torch.cat((symbols, separator, symbols), dim=1)
    targets = tokens[:, 1:].clone()
    targets[:, :HALF] = -100
    return tokens[:, :-1], targets


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--attention", nargs="+", choices=("train", "full", "window"), default=["train", "full", "window"]
    )
    parser.add_argument("--keys", type=int, default=32, help="keys per query of train and window (default 32)")
    parser.add_argument("--steps", type=int, default=250, help="training steps (default 250)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="one training each (default 0 1)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
