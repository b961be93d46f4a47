"""Whole training steps against Amdahl's bound: what is left of faster attention when everything else takes its time?

    python benchmarks/training_speed.py              byte language model, 4096 tokens, width 256, 4 heads, one thread

Steps with exact attention and with scatterbrain's take turns in one process, on the same batches. With T the time of a
step with exact attention, A its part in attention, and s how many times faster scatterbrain's attention is by itself
(forward + backward of one layer's query, key and value, the two taking turns too), no step can be faster than

    bound = T / (T - A + A / s).

What a step reaches of it is what attention loses inside a model: to the cache it shares with other layers, to the
gradients of learned projections and of statistics, to Python. A line for each attention also has the largest resident
memory of a process of its own above what it holds before the first step (Linux).
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from scatterbrain.training.attention import build_attention, describe_attention
from scatterbrain.training.attention_timer import TimedAttention
from scatterbrain.training.batch import Batch
from scatterbrain.training.config import AttentionConfig, DataConfig, ModelConfig, TrainConfig
from scatterbrain.training.tasks.language import Language
from scatterbrain.training.train_step import TrainState

OURS, EXACT = "scatterbrain", "exact"


def attention_config(name: str, keys: int) -> AttentionConfig:
    return AttentionConfig(support="full") if name == EXACT else AttentionConfig(keys=keys)


def train_state(name: str, options: argparse.Namespace, train: TrainConfig) -> TrainState:
    task = Language()
    model = ModelConfig(layers=options.layers, width=options.width, heads=options.heads)
    data = task.open(DataConfig(), train)
    attention = partial(build_attention, attention_config(name, options.keys))
    return TrainState(partial(task.build_model, data, model), train, attention)


def median(values: list[float]) -> float:
    return statistics.median(values)


# -------------------- times


def steps_in_turn(states: dict[str, TrainState], batches: list[Batch]) -> dict[str, list[tuple[float, float]]]:
    """Seconds of every step, and of these in attention; the first batch warms up."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in states}
    for number, batch in enumerate(tqdm(batches, desc="steps", disable=None)):
        for name, state in states.items():
            result = state.step([batch], 1e-3)
            if number > 0:
                found[name].append((result.seconds, result.attention_seconds))
    return found


def tokens_of(state: TrainState, batch: Batch) -> tuple[Tensor, ...]:
    """Query, key and value of the last layer."""
    layer = [module for module in state.model.modules() if isinstance(module, TimedAttention)][-1]
    kept: list[tuple[Tensor, ...]] = []
    hook = layer.register_forward_pre_hook(lambda module, arguments: kept.append(arguments[:3]))
    state.evaluate([batch])
    hook.remove()
    return tuple(tensor.detach() for tensor in kept[0])


def attention_in_turn(layers: dict[str, nn.Module], tokens: tuple[Tensor, ...], rounds: int) -> dict[str, list[float]]:
    """Seconds of forward + backward of a layer's attention by itself; the first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in layers}
    gradient = torch.randn_like(tokens[0])
    for number in tqdm(range(rounds + 1), desc="attention by itself", disable=None):
        for name, layer in layers.items():
            leaves = [tensor.clone().requires_grad_() for tensor in tokens]
            started = time.perf_counter()
            layer(*leaves, is_causal=True).backward(gradient)
            if number > 0:
                found[name].append(time.perf_counter() - started)
    return found


# -------------------- memory


def resident(mark: str) -> int:
    """VmRSS (now) or VmHWM (high-water mark) of this process in bytes."""
    return int(re.search(rf"{mark}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024


def print_peak(name: str, options: argparse.Namespace) -> None:
    """Bytes of two steps above what the process holds before them."""
    train = TrainConfig(context=options.tokens, batch=1)
    state, data = train_state(name, options, train), Language().open(DataConfig(), train)
    batch = data.training_batch(0, 0.0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = resident("VmRSS")
    for _ in range(2):
        state.step([batch], 1e-3)
    print(resident("VmHWM") - before)


def peak(name: str) -> str:
    command = [sys.executable, __file__, *sys.argv[1:], "--peak", name]
    try:
        found = subprocess.run(command, check=True, capture_output=True, text=True)
    except (subprocess.CalledProcessError, OSError) as error:
        return f"not measured ({error})"
    return f"{int(found.stdout) / 2**20:,.0f} MiB"


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    if options.peak is not None:
        print_peak(options.peak, options)
        return
    train = TrainConfig(context=options.tokens, batch=1)
    states = {name: train_state(name, options, train) for name in (EXACT, OURS)}
    data = Language().open(DataConfig(), train)
    batches = [data.training_batch(number, 0.0) for number in range(options.steps + 1)]
    steps = steps_in_turn(states, batches)
    tokens = tokens_of(states[OURS], batches[0])
    layers = {
        name: [module for module in state.model.modules() if isinstance(module, TimedAttention)][-1].attention
        for name, state in states.items()
    }
    alone = attention_in_turn(layers, tokens, options.steps)
    whole, inside = ({name: median([step[i] for step in steps[name]]) for name in steps} for i in (0, 1))
    faster = median([exact / ours for exact, ours in zip(alone[EXACT], alone[OURS], strict=True)])
    bound = whole[EXACT] / (whole[EXACT] - inside[EXACT] + inside[EXACT] / faster)
    reached = median([exact[0] / ours[0] for exact, ours in zip(steps[EXACT], steps[OURS], strict=True)])
    print(
        f"{options.layers} layers of width {options.width}, {options.heads} heads, {options.tokens} tokens, "
        f"{options.threads} thread(s); medians of {options.steps} steps"
    )
    print(f"{'':<14}{'ms per step':>14}{'in attention':>14}{'peak memory':>14}")
    for name in states:
        print(f"{name:<14}{1e3 * whole[name]:>14.0f}{1e3 * inside[name]:>14.0f}{peak(name):>14}")
    print(f"{OURS}: {describe_attention(attention_config(OURS, options.keys))}")
    print(f"attention by itself, forward + backward: {faster:.1f} times as fast")
    print(f"a step: {reached:.2f} times as fast, {100 * reached / bound:.0f} % of Amdahl's bound of {bound:.2f}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="context (default 4096)")
    parser.add_argument("--width", type=int, default=256, help="features of a token (default 256)")
    parser.add_argument("--heads", type=int, default=4, help="attention heads (default 4)")
    parser.add_argument("--layers", type=int, default=2, help="blocks (default 2)")
    parser.add_argument("--keys", type=int, default=64, help="listed keys of a query (default 64)")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--peak", choices=(EXACT, OURS), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
