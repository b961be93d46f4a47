"""Options of ``scatterbrain analyze``, and the methods of equal cost that they mean."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path

from scatterbrain.analysis.cost import SIZES, Shape, cost, feature_count, with_keys_for, with_size_for
from scatterbrain.analysis.regimes.inputs import Clustered, Head, captured_heads
from scatterbrain.bench.inputs import entries
from scatterbrain.checks import check_pair
from scatterbrain.low_rank import LOW_RANK_KERNELS, LowRank, LowRankKernel
from scatterbrain.supports import SUPPORTS, Empty, Support

CAUSAL = ", causal"  # how the inputs of causal rows end
ERRORS = ("matrix", "output")
TOKEN_ORDERS = ("natural", "hilbert")
MOST_TOKENS = 8192
TEMPERATURES = (0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 4.0, 5.0, 7.0, 10.0, 15.0, 20.0)
ROUTED = {"block_q": 8, "pools": 2}  # lists that few queries share: where scores are sharp every query has its own keys


@dataclass(frozen=True)
class Method:
    """A support with a kernel, and the multiply-adds per query that it takes; the oracle has its budgets alone."""

    name: str
    settings: str
    support: Support | None = None
    low_rank: LowRank = None
    multiply_adds: float | None = None


@dataclass
class AnalyzeConfig:
    """What to look at and with which methods.

    Raises:
        ValueError: naming the option, what was expected and what came.
    """

    inputs: Path | None = None
    entries: list[str] | None = None
    heads: int | None = None
    token_order: str = "natural"
    tokens: int | None = None
    head_dim: int = 64
    clusters: int = 32
    spread: float = 0.5
    scale: float = 1.0
    run: int = 16
    draws: int = 3
    seed: int = 0
    temperatures: list[float] = field(default_factory=lambda: list(TEMPERATURES))
    causal: bool = False
    support: str = "routed"
    keys: int = 128
    block_q: int | None = None
    pools: int | None = None
    low_rank: str = "centroid"
    size: int | None = None
    oracle: bool = True
    error: str = "matrix"
    enough: float = 0.1
    csv: Path | None = Path("analyze.csv")
    png: Path | None = Path("analyze.png")
    resume: bool = False

    def __post_init__(self) -> None:
        configurable = [kind for kind, cls in SUPPORTS.items() if cls.is_configurable and "keys" in _names(cls)]
        for name, allowed in (
            ("support", configurable),
            ("low_rank", [kind for kind, cls in LOW_RANK_KERNELS.items() if _is_made_of_defaults(cls)]),
            ("error", ERRORS),
            ("token_order", TOKEN_ORDERS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"--{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("heads", "tokens", "head_dim", "clusters", "run", "draws", "keys", "block_q", "pools", "size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        for name in ("scale", "enough"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"--{name} must be positive and finite, got {getattr(self, name)}")
        if not 0 <= self.spread < float("inf"):
            raise ValueError(f"--spread must be at least 0 and finite, got {self.spread}")
        if not self.temperatures or not all(0 < t < float("inf") for t in self.temperatures):
            raise ValueError(f"--temperatures must be one or more positive numbers, got {self.temperatures}")
        self.temperatures = sorted(set(map(float, self.temperatures)))
        if self.resume and self.csv is None:
            raise ValueError("--resume goes on with the rows in a file; give it as --csv FILE")
        if self.inputs is None:
            for name in ("entries", "heads"):
                if getattr(self, name) is not None:
                    raise ValueError(f"--{name} chooses from a file; give the file as --inputs FILE")
            if self.token_order != "natural":
                raise ValueError("--token_order is for images in a file; give the file as --inputs FILE")
        else:
            self._refuse_options_of_drawn_inputs()
            if self.entries is not None:
                self.entries = self._named_entries()
        self._check_methods()

    def _refuse_options_of_drawn_inputs(self) -> None:
        for name in ("head_dim", "clusters", "spread", "scale", "run", "draws", "seed"):
            if getattr(self, name) != getattr(AnalyzeConfig, name):
                raise ValueError(f"--{name} is of inputs that are drawn, not of those of --inputs; leave it out")

    def _named_entries(self) -> list[str]:
        """Entries by their names, or by the parts with which names begin."""
        found, chosen = entries(self.inputs), []
        for name in self.entries:
            some = [entry for entry in found if entry == name or entry.startswith(f"{name}.")]
            if not some:
                raise ValueError(f"--entries: {name} is not in {self.inputs}; it has {', '.join(found)}")
            chosen += some
        return list(dict.fromkeys(chosen))

    def _check_methods(self) -> None:
        check_pair(self._support(), self._kernel(), self.causal)
        if self.inputs is None:
            self.methods(Shape(*[self.tokens or 1024] * 2, self.head_dim, self.head_dim))

    def all_heads(self) -> Iterator[Head]:
        """What is measured. Heads of causal attention say so: their rows are other ones."""
        for head in self._heads():
            yield replace(head, source=head.source + CAUSAL) if self.causal else head

    def _heads(self) -> Iterator[Head]:
        if self.inputs is not None:
            yield from captured_heads(self.inputs, self.entries, self.tokens, self.heads, self.token_order)
            return
        drawn = Clustered(self.tokens or 1024, self.head_dim, self.clusters, self.spread, self.scale, self.run)
        for seed in range(self.seed, self.seed + self.draws):
            yield drawn.head(seed)

    # -------------------- methods

    def methods(self, shape: Shape) -> list[Method]:
        """Both parts together, each alone in the size that the same multiply-adds pay for, and the oracle's budgets.

        Raises:
            ValueError: there are none for heads of this shape.
        """
        if max(shape.queries, shape.keys) > MOST_TOKENS:
            raise ValueError(
                f"whole matrices are compared, expected at most {MOST_TOKENS} tokens, got {shape.keys}; choose fewer "
                "with --tokens"
            )
        support, low_rank = self._support(), self._kernel()
        try:
            low_rank.check_head_dim(shape.head_dim)
            budget = cost(support, low_rank, shape).total
            more_keys = with_keys_for(budget, support, None, shape)
            more_features = with_size_for(budget, low_rank, shape) or low_rank
            rank = min(feature_count(low_rank), shape.keys)
        except TypeError as error:  # own parts without a registered cost
            raise ValueError(str(error)) from None
        lists = (support, more_keys)
        if any(of is None or of.covers_every_key(shape.queries, shape.keys, self.causal) for of in lists):
            raise ValueError(
                f"{support} + {low_rank} cost as much as all {shape.keys} keys do, so that sparse "
                "attention alone is exact; choose fewer --keys, a smaller --size or more --tokens"
            )
        found = [
            self._method("sparse", more_keys, None, shape),
            self._method("low-rank", Empty(), more_features, shape),
            self._method("combined", support, low_rank, shape),
        ]
        if self.oracle:
            found.append(
                Method(
                    "oracle",
                    f"{self.oracle_keys(shape)} entries a row and rank {rank}, chosen from all of the exact matrix",
                )
            )
        return found

    def methods_say_causal(self, shape: Shape) -> bool:
        """Whether the same options without --causal mean other methods, or none."""
        try:
            others = replace(self, causal=False, resume=False).methods(shape)
        except ValueError:
            return True
        return not {method.settings for method in self.methods(shape)} <= {method.settings for method in others}

    def _method(self, name: str, support: Support, low_rank: LowRank, shape: Shape) -> Method:
        parts = [part for part in (support, low_rank) if part not in (None, Empty())]
        return Method(name, " + ".join(map(str, parts)), support, low_rank, cost(support, low_rank, shape).total)

    def oracle_keys(self, shape: Shape) -> int:
        """Entries of a row of the matrix, of which it has no more than keys."""
        return min(self.keys, shape.keys)

    def oracle_rank(self, shape: Shape) -> int:
        return min(feature_count(self._kernel()), shape.queries, shape.keys)

    def _support(self) -> Support:
        cls, settings = SUPPORTS[self.support], {"keys": self.keys}
        if self.support == "routed":
            settings |= ROUTED if self.block_q != 1 and not self.causal else {}
        for name in ("block_q", "pools"):
            value = getattr(self, name)
            if value is not None and name not in _names(cls):
                raise ValueError(f"--{name}: {self.support} has none; leave it out")
            if value is not None:
                settings[name] = value
        if self.support == "routed" and self.block_q == 1:
            settings |= {"block_k": 8}
        return cls(**settings)

    def _kernel(self) -> LowRankKernel:
        cls = LOW_RANK_KERNELS[self.low_rank]
        size = next((name for name in SIZES if name in _names(cls)), None)
        if size is None and self.size is not None:
            raise ValueError(f"--size: {self.low_rank} has none; leave it out")
        settings = {} if self.size is None else {size: self.size}
        if self.low_rank == "quadratic" and not self.causal:
            settings["statistics"] = "input"
        return cls(**settings)


def _is_made_of_defaults(cls: type) -> bool:
    """Kernels of functions, which no option names, are not."""
    return all(field.default is not MISSING or field.default_factory is not MISSING for field in fields(cls))


def _names(cls: type) -> set[str]:
    return {field.name for field in fields(cls)}
