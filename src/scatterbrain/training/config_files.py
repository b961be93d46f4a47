"""YAML files of runs. One may extend others, so that what the runs of a task share is written once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from scatterbrain.yaml_text import read_yaml


def read_config(path: Path) -> dict[str, Any]:
    """The settings of a file with those of the files that it extends.

    The key ``extends`` is a path relative to the file, or a list of paths. Later files win over earlier ones, and the
    file itself over all of them. Mappings are merged key by key, except that one with a "kind" replaces what it does
    not share the kind with.

    Raises:
        ValueError: a file that does not exist, is no mapping or has a key twice, or files that extend one another in a
            circle.
    """
    return _read(path, ())


def _read(path: Path, extending: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in extending:
        circle = " -> ".join(str(one) for one in (*extending, path))
        raise ValueError(f"extends: expected files that end somewhere, got a circle: {circle}")
    try:
        content = read_yaml(path.read_text(encoding="utf-8"), str(path))
    except (FileNotFoundError, IsADirectoryError) as error:
        by = f", named by extends in {extending[-1]}" if extending else ""
        raise ValueError(f"expected a YAML file, got {path}, which does not exist or is a folder{by}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected YAML, got what cannot be read: {' '.join(str(error).split())}") from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping of keys, got {content!r:.60}")
    names = content.pop("extends", [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: extends: expected a path or a list of paths, got {names!r}")
    settings: dict[str, Any] = {}
    for name in names:
        settings = merged(settings, _read(path.parent / name, (*extending, path.resolve())))
    return merged(settings, content)


def merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The settings of both, where both have one those of the second."""
    result = dict(first)
    for key, value in second.items():
        before = result.get(key)
        is_same_kind = isinstance(before, dict) and isinstance(value, dict) and _kinds_agree(before, value)
        result[key] = merged(before, value) if is_same_kind else value
    return result


def _kinds_agree(before: dict[str, Any], value: dict[str, Any]) -> bool:
    return "kind" not in value or value["kind"] == before.get("kind")
