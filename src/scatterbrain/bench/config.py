"""What to measure: suites, and the settings they unfold into."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from scatterbrain.bench.allocator import ALLOCATORS
from scatterbrain.bench.inputs import entries, tokens_in, width_in
from scatterbrain.bench.methods import parse_method

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
DIRECTIONS = ("F", "F+B")
DEFAULT_SUITE = "quick"


@dataclass(frozen=True)
class Setting:
    """One point of the grid: methods are measured side by side on the same inputs."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    batch: int
    dtype: str
    is_causal: bool

    def group(self) -> str:
        """What the settings of one table share."""
        heads = f"{self.heads} heads" if self.heads > 1 else "1 head"
        shared = f", {self.kv_heads} key/value heads" if self.kv_heads != self.heads else ""
        batch = f", batch {self.batch}" if self.batch > 1 else ""
        kind = "causal" if self.is_causal else "bidirectional"
        return f"{kind}, {self.dtype}, {heads} of {self.head_dim}{shared}{batch}"


@dataclass(frozen=True)
class Suite:
    """Lengths with their number of heads, and methods for either kind of attention (empty: not measured)."""

    summary: str
    lengths: tuple[tuple[int, int], ...]
    bidirectional: tuple[str, ...]
    causal: tuple[str, ...]


BASELINES = ("torch-window-64", "torch-performer-64", "torch-clusters-64")
_STANDARD_LENGTHS = tuple((n, 4) for n in (256, 512, 1024, 2048, 4096))
SUITES = {
    "quick": Suite(
        "three lengths, our supports and the baselines: about two minutes",
        ((256, 4), (1024, 4), (4096, 4)),
        ("sdpa", "drop_in-72", "fast-64", "window-64", "routed-64", "per-query-64", *BASELINES),
        (),
    ),
    "standard": Suite(
        "256 to 4096 tokens, and 16384 with one head; bidirectional and causal: about fifteen minutes",
        (*_STANDARD_LENGTHS, (16384, 1)),
        ("sdpa", "drop_in-72", "fast-64", "quality-128", "routed-64", "window-64", "per-query-64", *BASELINES),
        ("sdpa", "window-64", "per-query-64", *BASELINES[:2]),
    ),
    "short": Suite(
        "16 to 256 tokens, where what a call costs besides computing counts",
        tuple((n, 4) for n in (16, 32, 64, 128, 256)),
        ("sdpa", "window-64", "routed-64", "per-query-64"),
        ("sdpa", "window-64", "per-query-64"),
    ),
    "long": Suite(
        "16384 to 65536 tokens, exact attention not timed (it is computed once, for the errors): is time linear?",
        ((1024, 4), (16384, 4), (65536, 4)),
        ("drop_in-72", "fast-64", "window-64", "routed-64", "per-query-64"),
        ("window-64", "per-query-64"),
    ),
    "kernels": Suite(
        "every low-rank kernel and none, at one length",
        ((2048, 4),),
        (
            "sdpa",
            "window-64+none",
            "window-64",
            "window-64+centroid",
            "window-64+input",
            "window-64+favor",
            "routed-64+none",
            "empty",
        ),
        ("sdpa", "window-64+none", "window-64", "window-64+favor", "empty"),
    ),
}


@dataclass
class BenchConfig:
    """Options of ``scatterbrain bench``; None: what the suite says.

    Raises:
        ValueError: naming the option, what was expected and what came.
    """

    suite: str = DEFAULT_SUITE
    lengths: list[int] | None = None
    methods: list[str] | None = None
    causal: str = "suite"
    dtypes: list[str] = field(default_factory=lambda: ["float32"])
    directions: list[str] = field(default_factory=lambda: list(DIRECTIONS))
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int = 64
    batch: int = 1
    rank: int = 9
    repeats: int = 5
    threads: int = 1
    device: str = "cpu"
    seed: int = 0
    inputs: Path | None = None
    entry: str | None = None
    memory: bool = True
    allocator: str = "keep"
    json: Path | None = None
    png: Path | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        _one_of("suite", self.suite, SUITES)
        _one_of("allocator", self.allocator, ALLOCATORS)
        _one_of("causal", self.causal, ("suite", "no", "yes", "both"))
        for name, allowed in (("dtypes", DTYPES), ("directions", DIRECTIONS)):
            for value in _not_empty(name, getattr(self, name)):
                _one_of(name, value, allowed)
        for name in ("heads", "kv_heads", "head_dim", "batch", "rank", "repeats", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        for value in _not_empty("lengths", self.lengths or [1]):
            if value < 1:
                raise ValueError(f"--lengths must be at least 1, got {value}")
        for name in _not_empty("methods", self.methods or ["sdpa"]):
            parse_method(name)
        self._check_device()
        if self.inputs is not None:
            self._check_inputs()
        if self.rank > self.head_dim:
            raise ValueError(f"--rank must be at most --head_dim {self.head_dim}, got {self.rank}")
        if self.resume and self.json is None:
            raise ValueError("--resume goes on with the results in a file; give it as --json FILE")
        if self.entry is not None and self.inputs is None:
            raise ValueError("--entry names an entry of a file; give the file as --inputs FILE")
        self.settings()

    def _check_device(self) -> None:
        try:
            kind = self.on().type
        except RuntimeError:
            kind = None
        if kind not in ("cpu", "cuda"):
            raise ValueError(f"--device must be cpu, cuda or cuda:<number>, got {self.device!r}")
        if kind == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"--device {self.device}: torch finds no GPU on this machine; use cpu")

    def on(self) -> torch.device:
        """The device that is measured."""
        return torch.device(self.device)

    def _take_width(self, entry: str) -> None:
        """The width of heads of the file; another one that was given is refused."""
        width = width_in(self.inputs, entry)
        if self.head_dim not in (BenchConfig.head_dim, width):
            raise ValueError(f"--head_dim comes from the file of --inputs, which has {width}; leave it out")
        self.head_dim = width

    def _check_inputs(self) -> None:
        for name, plain in (("batch", 1), ("kv_heads", None), ("seed", 0)):
            if getattr(self, name) != plain:
                raise ValueError(f"--{name} comes from the file of --inputs; leave it out")
        found = entries(self.inputs)
        if self.entry is not None and self.entry not in found:
            raise ValueError(f"--entry {self.entry} is not in {self.inputs}; it has {', '.join(found)}")
        entry = self.entry or found[0]
        available, longest = tokens_in(self.inputs, entry), max(setting.tokens for setting, _ in self.settings())
        if longest > available:
            raise ValueError(
                f"{self.inputs}: entry {entry} has {available} tokens, too few for a length of {longest}; choose "
                "shorter --lengths"
            )
        self._take_width(entry)

    def settings(self) -> list[tuple[Setting, list[str]]]:
        """The grid, each point with the methods to measure there."""
        suite = SUITES[self.suite]
        lengths = suite.lengths
        if self.lengths is not None:
            heads_of = dict(suite.lengths)
            lengths = tuple((n, heads_of.get(n, 4)) for n in self.lengths)
        kinds = {"no": [False], "yes": [True], "both": [False, True]}.get(self.causal)
        if kinds is None:
            kinds = [is_causal for is_causal in (False, True) if (suite.causal if is_causal else suite.bidirectional)]
        grid = []
        for dtype in self.dtypes:
            for is_causal in kinds:
                methods = self.methods or (suite.causal if is_causal else suite.bidirectional) or self._fitting(suite)
                for tokens, suite_heads in lengths:
                    heads = self.heads or suite_heads
                    kv_heads = self.kv_heads or heads
                    if heads % kv_heads:
                        raise ValueError(f"--heads must be a multiple of --kv_heads, got {heads} and {kv_heads}")
                    setting = Setting(tokens, heads, kv_heads, self.head_dim, self.batch, dtype, is_causal)
                    grid.append((setting, list(dict.fromkeys(methods))))
        return grid

    @staticmethod
    def _fitting(suite: Suite) -> list[str]:
        """The suite's methods for the other kind of attention, as far as they can be causal."""
        return [name for name in suite.bidirectional + suite.causal if parse_method(name).refusal(True) is None]


def _one_of(name: str, value: str, allowed: object) -> None:
    if value not in allowed:
        raise ValueError(f"--{name} must be one of {', '.join(allowed)}, got {value!r}")


def _not_empty(name: str, values: list) -> list:
    if not values:
        raise ValueError(f"--{name} needs at least one value")
    return values
