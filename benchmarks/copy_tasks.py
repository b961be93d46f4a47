"""Copy: can a model trained from scratch learn to look 128 tokens away, with few keys per query?

causal   a sequence is 127 random symbols of 64, a separator, and the same 127 symbols, each predicted from those before
masked   the second half is masked, and every token reads every other (bidirectional attention)

The perplexity of the second half is 1 for a model that has learned to copy and 64 for one that guesses.

    python benchmarks/copy_tasks.py                       causal: training preset, full attention, window; two seeds
    python benchmarks/copy_tasks.py masked --steps 200   those and pairs with the centroid kernel
    python benchmarks/copy_tasks.py --attention train    one of them

train               scatterbrain.presets.train
full                exact attention
window              a window, no low-rank part
drop-in             scatterbrain.presets.drop_in: at 32 keys its lists hold the 32 queries' own keys, and no others
centroid            lists shared by 16 queries, half of them chosen, with the centroid kernel (masked)
per-query-centroid  the training preset's lists, one for each query, with the centroid kernel (masked)
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import torch
from torch import nn

import scatterbrain as sb
from scatterbrain.low_rank import LowRank
from scatterbrain.supports import Support
from scatterbrain.training.config import DataConfig, ModelConfig, TrainConfig
from scatterbrain.training.tasks.copy import Copy
from scatterbrain.training.train_step import TrainState, scheduled_learning_rate

CAUSAL = ("train", "full", "window")

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
    pairs = pairs_of(options.keys)
    for name in options.attention:
        support, low_rank = pairs[name]
        print(f"{name}: {support}" + (f" + {low_rank}" if low_rank is not None else ""))
        for seed in options.seeds:
            started = time.perf_counter()
            perplexity = train_copy(pairs[name], options.task == "causal", options.steps, seed)
            print(f"  seed {seed}: perplexity {perplexity:.4f}, {time.perf_counter() - started:.0f} s", flush=True)


def pairs_of(keys: int) -> dict[str, tuple[Support, LowRank]]:
    per_query, learned = sb.presets.train(keys)
    return {
        "train": (per_query, learned),
        "full": (sb.Full(), None),
        "window": (sb.Window(keys), None),
        "drop-in": sb.presets.drop_in(keys),
        "centroid": (sb.Routed(keys, block_q=16), sb.Centroid(64)),
        "per-query-centroid": (per_query, sb.Centroid(64)),
    }


def train_copy(pair: tuple[Support, LowRank], is_causal: bool, steps: int, seed: int) -> float:
    """Trains on fresh sequences and returns the perplexity of the second half of 32 others."""

    def attention(num_heads: int, num_kv_heads: int, head_dim: int) -> nn.Module:
        return sb.ScatterbrainAttention(num_heads, head_dim, num_kv_heads, support=pair[0], low_rank=pair[1])

    config = TrainConfig(
        steps=steps, batch=8, learning_rate=3e-3, betas=(0.9, 0.98), weight_decay=0.01, warmup=20, seed=seed
    )
    task = Copy(masked=not is_causal)
    data = task.open(DataConfig(), config)
    train_state = TrainState(partial(task.build_model, data, MODEL), config, attention)
    for step in range(steps):
        fraction = step / steps
        train_state.step([data.training_batch(step, fraction)], scheduled_learning_rate(config, step, fraction))
    return Copy.metric.of(train_state.evaluate([data.validation_batch(number) for number in range(4)]))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=("causal", "masked"), default="causal", help="default causal")
    parser.add_argument(
        "--attention", nargs="+", choices=tuple(pairs_of(32)), help="default those that can be run in the task"
    )
    parser.add_argument("--keys", type=int, default=32, help="keys per query (default 32)")
    parser.add_argument("--steps", type=int, default=250, help="training steps (default 250)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="one training each (default 0 1)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    options = parser.parse_args()
    options.attention = options.attention or (CAUSAL if options.task == "causal" else tuple(pairs_of(32)))
    if options.task == "causal" and not set(options.attention) <= set(CAUSAL):
        parser.error(f"--attention: expected any of {', '.join(CAUSAL)} in causal copy, got {options.attention}")
    return options


if __name__ == "__main__":
    main()
