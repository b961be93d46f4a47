"""Supports and low-rank kernels layer by layer: in Python, as a YAML file, and inside a model's configuration."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
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
        return self.in_model([path], is_whole=False)[path]

    def in_model(self, paths: Sequence[str], what: str = "the model", is_whole: bool = True) -> dict[str, Pair | None]:
        """The pair of every layer of a model, None for those that are not named. The model may hold the one of the
        settings, or be a part of it: one and the same beginning is then before all paths of one of them. Where several
        beginnings would do, as of an encoder's settings in a model with two encoders, nothing says which is meant.

        Args:
            paths: of all of the model's attention layers.
            what: names the model in the error.
            is_whole: False leaves layers out that several paths could mean, for parts of a model that is still made.

        Raises:
            ValueError: a path of the settings that ends several of ``paths``, or the other way about.
        """
        targets, own = ({without_wrappers(path): path for path in some} for some in (paths, self._pairs))
        hits = {name: [path for path in targets if _is_inside(name, path)] for name in own}
        hits = {name: found for name, found in hits.items() if found}
        if hits:
            places = _placed(hits)
            if places is None:
                name, found = next((name, found) for name, found in hits.items() if len(found) > 1)
                parts = [path[: -len(name)].strip(".") or "the model itself" for path in found]
                raise ValueError(
                    f"layers: expected paths that end one layer of {what} each, but {name} ends {len(found)}: "
                    f"{_listed(found)}; replace attention in the part that was tuned ({_listed(parts, 'or')}), leave "
                    "the other layers out (where=), or write whole paths"
                )
            # Of two names that end one path the longer says more.
            named = {places[name]: name for name in sorted(places, key=len)}
        else:
            reached = {path: [name for name in own if _is_inside(path, name)] for path in targets}
            reached = {path: found for path, found in reached.items() if found}
            named = _placed(reached)
            if named is None and is_whole:
                path, found = next((path, found) for path, found in reached.items() if len(found) > 1)
                raise ValueError(
                    f"layers: expected settings of {what} or of a model that holds it once, but {path or what} could "
                    f"be any of {_listed(found)}; replace attention in the whole model, or give pairs by the paths of "
                    "this one"
                )
            named = named or {}
        found_pairs = {targets[path]: self._pairs[own[name]] for path, name in named.items()}
        return {path: found_pairs.get(path) for path in paths}

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


# Modules that only hold another one: their names in a path say nothing of the model.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def without_wrappers(path: str) -> str:
    """The path of a layer in the model that was not compiled, sharded or checkpointed."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def _is_inside(name: str, path: str) -> bool:
    """Whether a layer of this name in a part of a model may be the one at ``path``."""
    return path == name or path.endswith(f".{name}")


def _placed(hits: Mapping[str, Sequence[str]]) -> dict[str, str] | None:
    """Of the paths that every name ends, the one that is meant: behind one beginning that is before all of them, the
    empty one first, or else the only one of each. None where that does not tell."""
    beginnings = Counter(path[: len(path) - len(name)] for name, found in hits.items() for path in found)
    whole = [begin for begin, count in beginnings.items() if count == len(hits)]
    if "" in whole or len(whole) == 1:
        begin = "" if "" in whole else whole[0]
        return {name: begin + name for name in hits}
    if any(len(found) > 1 and name not in found for name, found in hits.items()):
        return None
    return {name: name if name in found else found[0] for name, found in hits.items()}


def _listed(names: Sequence[str], last: str = "and") -> str:
    shown_names = list(names[:3]) + [f"{len(names) - 3} more"] * (len(names) > 3)
    return f"{', '.join(shown_names[:-1])} {last} {shown_names[-1]}"


BUDGETS = ("keys", "clusters", "rank", "features")


def _as_data(path: str, part: Any, registry: Registry) -> dict[str, Any]:
    """The budget always, so that a reader of the file need not know the defaults."""
    try:
        return registry.as_data(part, BUDGETS)
    except ValueError as error:
        raise ValueError(f"layers: {path}: {error}") from error
