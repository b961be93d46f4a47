"""Times of methods side by side: one call of each in turn, medians over the turns."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from scatterbrain.bench.clock import calls_of_a_sample, clock_of, sets_beyond_cache
from scatterbrain.bench.config import DTYPES, BenchConfig, Setting
from scatterbrain.bench.inputs import Inputs, file_inputs, random_inputs
from scatterbrain.bench.methods import Attention, Method, exact_attention, parse_method

FAILURES = (RuntimeError, ValueError, TypeError, MemoryError)  # of a method that cannot run, which the table notes


@dataclass
class Row:
    """One method at one setting in one direction. Times in seconds; None where ``note`` says why not."""

    method: str
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    batch: int
    dtype: str
    is_causal: bool
    direction: str
    seconds: float | None = None  # median of the repeats
    fastest: float | None = None
    repeats: int = 0
    times_faster: float | None = None  # than sdpa, measured in turn with it
    tokens_per_second: float | None = None
    error: float | None = None  # relative Frobenius norm against exact attention on the same inputs
    peak_bytes: int | None = None  # above query, key and value
    bytes_per_token_and_head: float | None = None
    note: str = ""

    def setting(self) -> Setting:
        return Setting(self.tokens, self.heads, self.kv_heads, self.head_dim, self.batch, self.dtype, self.is_causal)


def relative_error(lost: float, whole: float) -> float:
    """A norm of a difference over that of what was to be met, which may be zero: zeros that are met are no error."""
    if lost == 0:
        return 0.0
    return lost / whole if whole else math.nan if math.isnan(lost) else math.inf


def make_inputs(config: BenchConfig, setting: Setting) -> Inputs:
    """Inputs of a setting: the same in every process."""
    if config.inputs is not None:
        inputs = file_inputs(config.inputs, config.entry, setting.tokens, config.heads, config.rank)
    else:
        inputs = random_inputs(
            setting.batch, setting.heads, setting.kv_heads, setting.tokens, setting.head_dim, config.rank, config.seed
        )
    return inputs.to(DTYPES[setting.dtype], config.on())


def steps(attention: Attention, inputs: Inputs) -> dict[str, Callable[[], object]]:
    """By direction, what is timed."""
    plain = (inputs.query, inputs.key, inputs.value)
    leaves = [t.detach().requires_grad_() for t in plain]
    gradient = torch.ones_like(inputs.query[..., :1]).expand(*inputs.query.shape[:3], inputs.value.shape[3])
    gradient = gradient.contiguous()

    def forward() -> Tensor:
        with torch.no_grad():
            return attention(*plain)

    def forward_backward() -> object:
        return torch.autograd.grad(attention(*leaves), leaves, gradient)

    return {"F": forward, "F+B": forward_backward}


def describe_failure(error: Exception) -> str:
    """A short reason for the table."""
    text = str(error)
    if isinstance(error, MemoryError) or "not enough memory" in text or "out of memory" in text:
        return "out of memory"
    return f"{type(error).__name__}: {text.strip().splitlines()[0][:120] if text.strip() else ''}"


def available_memory(device: torch.device) -> int | None:
    """Bytes that can be used without swapping; None where the system does not say (other than Linux)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def refusal(method: Method, setting: Setting, device: torch.device) -> str | None:
    """Why a method is not run at a setting; None if it is."""
    reason = method.refusal(setting.is_causal)
    if reason is None:
        needed = method.bytes_needed(setting.batch, setting.heads, setting.tokens, setting.head_dim, setting.is_causal)
        available = available_memory(device)
        if available is not None and needed > 0.8 * available:
            reason = f"needs about {needed / 2**30:.0f} GiB of memory, {available / 2**30:.0f} are available"
    return reason


class Measurement:
    """Times and errors of the methods of one setting. Rows are filled as it goes, so that an interruption leaves what
    was measured."""

    def __init__(self, config: BenchConfig, setting: Setting, methods: list[str]) -> None:
        self.config, self.clock = config, clock_of(config.on(), config.threads)
        inputs = make_inputs(config, setting)
        self.fitted_on = inputs.fitted_on
        self.setting = setting = Setting(
            setting.tokens,
            inputs.query.shape[1],
            inputs.key.shape[1],
            inputs.query.shape[3],
            inputs.query.shape[0],
            setting.dtype,
            setting.is_causal,
        )
        self.rows = {
            (name, direction): Row(name, **asdict(setting), direction=direction)
            for name in methods
            for direction in config.directions
        }
        copies = sets_beyond_cache(inputs.bytes(), config.on()) - 1
        self.inputs, self.sets = inputs, [inputs, *(inputs.clone() for _ in range(copies))]
        self.samples: dict[tuple[str, str], list[float]] = {}

    def run(self) -> Iterator[str]:
        """Measures, and says before every step what comes next."""
        yield "exact attention"
        exact = exact_attention(self.inputs.query, self.inputs.key, self.inputs.value, self.setting.is_causal)
        norm = float(exact.double().norm())
        ready: dict[tuple[str, str], tuple[list[Callable[[], object]], int]] = {}
        for name in dict.fromkeys(method for method, _ in self.rows):
            yield f"{name}: error, first call"
            for key, step in self._prepare(name, exact, norm).items():
                ready[key] = step
        for repeat in range(self.config.repeats):
            # In another order each time: what follows exact attention finds the caches full of its scores.
            for key in random.Random(repeat).sample(list(ready), len(ready)):
                on_sets, calls = ready[key]
                yield f"{key[0]} {key[1]}"
                in_turn = [on_sets[i % len(on_sets)] for i in range(repeat * calls, (repeat + 1) * calls)]
                self.samples.setdefault(key, []).append(self.clock.seconds(in_turn) / calls)
                self._fill(key)

    def _prepare(self, name: str, exact: Tensor, norm: float) -> dict[tuple[str, str], tuple[list[Callable], int]]:
        """Error and first calls of one method; none of its steps, which are on one set of inputs each, in a direction
        in which it cannot run: what has no backward pass still has a forward pass."""
        method, config, inputs = parse_method(name), self.config, self.inputs
        reason = refusal(method, self.setting, config.on())
        if reason is None:
            try:
                attention = method.build(inputs.statistics, config.rank, self.setting.is_causal)
                runs = [steps(attention, some) for some in self.sets]
                lost = float((runs[0]["F"]().double() - exact.double()).norm())
                error = relative_error(lost, norm)
            except FAILURES as failure:
                reason = describe_failure(failure)
        found = {}
        for direction in config.directions:
            row = self.rows[name, direction]
            row.note = reason or ""
            if reason is None:
                try:
                    if method.is_compiled:
                        runs[0][direction]()
                    on_sets = [run[direction] for run in runs]
                    found[name, direction] = on_sets, calls_of_a_sample(self.clock, on_sets[0])
                    row.error = error
                except FAILURES as failure:
                    row.note = describe_failure(failure)
        return found

    def _fill(self, key: tuple[str, str]) -> None:
        row, samples = self.rows[key], self.samples[key]
        row.seconds, row.fastest, row.repeats = statistics.median(samples), min(samples), len(samples)
        row.tokens_per_second = self.setting.batch * self.setting.tokens / row.seconds
        exact = self.rows.get(("sdpa", key[1]))
        for other in self.rows.values():
            if exact is not None and exact.seconds and other.direction == key[1] and other.seconds:
                other.times_faster = exact.seconds / other.seconds
