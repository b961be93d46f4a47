"""Supports and low-rank kernels layer by layer: in Python, as a YAML file, and inside a model's configuration."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from scatterbrain.checks import check_pair
from scatterbrain.low_rank import LOW_RANK_KERNELS, LowRank
from scatterbrain.registry import Registry, shown
from scatterbrain.supports import SUPPORTS, Support
from scatterbrain.yaml_text import read_yaml

Pair = tuple[Support, LowRank]


class LayerSettings(Mapping[str, Pair]):
    """A pair of a support and a low-rank kernel for every attention layer of a model, by the layer's path.

    :func:`scatterbrain.tune` makes it. ``sb.replace_attention(model, layers=settings)`` takes it, or the path of its
    file, and so does ``scatterbrain.integrations.transformers.register(name, layers=...)``; for a module of your own
    ``sb.ScatterbrainAttention(heads, head_dim, None, *settings[path])``. In the file a layer is::

        encoder.layer.0.attention.self:
          support: {kind: routed, keys: 64, block_q: 32}
          low_rank: {kind: centroid, clusters: 64}

    Args:
        pairs: by path. ``Full()`` keeps a layer exact.
        about: facts to keep with them, such as the model and what the pairs were chosen for.

    Raises:
        TypeError, ValueError: naming the layer.
    """

    def __init__(self, pairs: Mapping[str, Pair], about: Mapping[str, Any] | None = None) -> None:
        self.about = dict(about or {})
        self._pairs: dict[str, Pair] = {}
        for path, pair in pairs.items():
            if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
                raise TypeError(f"layers: {path}: expected a pair (support, low-rank kernel), got {pair!r}")
            try:
                check_pair(*pair, is_causal=False)
            except (TypeError, ValueError) as error:
                raise type(error)(f"layers: {path}: {error}") from error
            self._pairs[str(path)] = (pair[0], pair[1])

    def __getitem__(self, path: str) -> Pair:
        return self._pairs[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def __repr__(self) -> str:
        return f"LayerSettings({len(self)} layers)"

    def pair_of(self, path: str) -> Pair | None:
        """The pair of a layer, also inside of a larger or a smaller model than that of the paths: the one whose path
        ends as this one does. None where there is none, or more than one."""
        if path in self._pairs:
            return self._pairs[path]
        found = [own for own in self._pairs if path.endswith(f".{own}") or own.endswith(f".{path}")]
        return self._pairs[found[0]] if len(found) == 1 else None

    # -------------------- as data

    def as_dict(self) -> dict[str, Any]:
        """In the types of YAML and JSON."""
        layers = {
            path: {
                "support": _as_data(path, support, SUPPORTS),
                "low_rank": "none" if low_rank is None else _as_data(path, low_rank, LOW_RANK_KERNELS),
            }
            for path, (support, low_rank) in self._pairs.items()
        }
        return {**self.about, "layers": layers}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], origin: str = "layers") -> LayerSettings:
        """
        Raises:
            ValueError: naming the layer and the key.
        """
        if not isinstance(content, Mapping) or not isinstance(content.get("layers"), Mapping):
            raise ValueError(f"{origin}: expected a mapping with the key 'layers', got {shown(content)}")
        pairs = {}
        for path, given in content["layers"].items():
            where = f"{origin}: {path}"
            if not isinstance(given, Mapping) or set(given) != {"support", "low_rank"}:
                raise ValueError(f"{where}: expected the keys support and low_rank, got {shown(given)}")
            try:
                support = SUPPORTS.configurable().made(given["support"], f"{where}.support")
                low_rank = None
                if given["low_rank"] not in (None, "none"):
                    low_rank = LOW_RANK_KERNELS.configurable().made(given["low_rank"], f"{where}.low_rank")
            except TypeError as error:
                raise ValueError(str(error)) from error
            pairs[path] = support, low_rank
        try:
            return cls(pairs, {key: value for key, value in content.items() if key != "layers"})
        except (TypeError, ValueError) as error:
            raise type(error)(f"{origin}: {error}") from error

    def save(self, file: str | os.PathLike[str]) -> None:
        """Writes a YAML file. Needs PyYAML."""
        import yaml

        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(self.as_dict(), sort_keys=False, width=120, default_flow_style=None))

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> LayerSettings:
        """Reads what :meth:`save` wrote. Needs PyYAML.

        Raises:
            ValueError: no such file, or one of another form or with a key twice.
        """
        import yaml

        path = Path(file)
        if not path.is_file():
            raise ValueError(f"layers: expected a YAML file that scatterbrain tune wrote, got {path}, which is no file")
        try:
            content = read_yaml(path.read_text(), f"layers: {path}")
        except yaml.YAMLError as error:
            raise ValueError(f"layers: {path} is no YAML file: {' '.join(str(error).split())}") from error
        return cls.from_dict(content, str(path))

    @classmethod
    def of(cls, given: LayerSettings | Mapping[str, Any] | str | os.PathLike[str]) -> LayerSettings:
        """Settings, pairs by path, their data, or a file of them."""
        if isinstance(given, LayerSettings):
            return given
        if isinstance(given, Mapping):
            return cls.from_dict(given) if "layers" in given else cls(given)
        if isinstance(given, (str, os.PathLike)):
            return cls.load(given)
        raise TypeError(
            "layers must be LayerSettings, a mapping from paths to pairs (support, low-rank kernel), or the YAML file "
            f"of scatterbrain tune, got {type(given).__name__}"
        )


BUDGETS = ("keys", "clusters", "rank", "features")


def _as_data(path: str, part: Any, registry: Registry) -> dict[str, Any]:
    """The budget always, so that a reader of the file need not know the defaults."""
    try:
        return registry.as_data(part, BUDGETS)
    except ValueError as error:
        raise ValueError(f"layers: {path}: {error}") from error
