"""Reads YAML in which every key stands once. Needs PyYAML."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import yaml

_MERGE = "tag:yaml.org,2002:merge"  # of the key <<: every one merges another mapping, and PyYAML drops none


def read_yaml(text: str, origin: str) -> Any:
    """What a text says. PyYAML by itself drops all but the last of the values that a key is given.

    Args:
        text: YAML, or JSON, which is YAML.
        origin: the file, for the error.

    Raises:
        ValueError: a mapping has a key twice.
        yaml.YAMLError: the text is no YAML.
    """
    import yaml

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None:
        _check_keys(root, (), origin, set())
    return yaml.safe_load(text)


def _check_keys(node: yaml.Node, path: tuple[str, ...], origin: str, seen: set[int]) -> None:
    if id(node) in seen:  # an alias, which may be inside of what it stands for
        return
    seen.add(id(node))
    if isinstance(node.value, str):
        return
    if node.id == "sequence":
        for index, item in enumerate(node.value):
            _check_keys(item, (*path, str(index)), origin, seen)
        return
    lines: dict[tuple[str, str], int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        name = (*path, str(key.value))
        if key.id == "scalar" and key.tag != _MERGE:
            same = (key.tag, key.value)
            if same in lines:
                raise ValueError(
                    f"{origin}: expected every key once, got {'.'.join(name)} twice, in lines {lines[same]} and "
                    f"{line}; keep one of them"
                )
            lines[same] = line
        _check_keys(value, name, origin, seen)
