"""Classes by the name that configuration files give them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

_Class = TypeVar("_Class", bound=type)


class Registry(dict[str, type]):
    """The classes of one room (supports, low-rank kernels) by their ``kind``."""

    def __init__(self, base: type) -> None:
        self.base = base

    def register(self, cls: _Class) -> _Class:
        """Makes a class known by its ``kind``; also a class decorator. A class that is defined again, as in a notebook,
        takes the place of its earlier self.

        Raises:
            TypeError: not a class derived from the room's base class.
            ValueError: another class has the kind.
        """
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            raise TypeError(f"register: expected a class derived from {self.base.__name__}, got {cls!r}")
        known = self.get(cls.kind, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"register: {cls.kind!r} is {known.__name__} already; choose another kind")
        self[cls.kind] = cls
        return cls

    def names(self) -> str:
        """The classes' names, for error messages."""
        return ", ".join(cls.__name__ for cls in self.values())

    # -------------------- as data

    def configurable(self, serves: Callable[[type], bool] = lambda cls: True) -> Registry:
        """Those that numbers and names make, so that a file can, and that serve the purpose."""
        found = Registry(self.base)
        found.update({kind: cls for kind, cls in self.items() if cls.is_configurable and serves(cls)})
        return found

    def class_of(self, given: object, where: str, imports: bool = False) -> type:
        """The class that a kind, or a mapping with one, names.

        Args:
            given: "window" or {"kind": "window", ..}.
            where: what messages begin with, such as the key of a file.
            imports: whether "module:Class" may name a class that is not registered. That runs the module, so never in
                what may come from someone else, as the configuration of a model does.

        Raises:
            TypeError, ValueError: what was expected and what came.
        """
        kind = given.get("kind") if isinstance(given, Mapping) else given
        if imports and isinstance(kind, str) and ":" in kind:
            return self._imported(kind, where)
        if not isinstance(kind, str) or kind not in self:
            error = ValueError if isinstance(kind, str) else TypeError
            advice = "; give the kind too" if isinstance(given, Mapping) and "kind" not in given else ""
            raise error(f"{where}: expected one of {', '.join(self)} (as the kind), got {shown(given)}{advice}")
        return self[kind]

    def fields_of(self, cls: type, given: object, where: str, **defaults: Any) -> dict[str, Any]:
        """The arguments of a class from a kind or a mapping that named it.

        Args:
            defaults: values of fields that are not given, for classes that have them.

        Raises:
            ValueError: naming a field that the class does not have, or one that it needs.
        """
        own = {name: value for name, value in given.items() if name != "kind"} if isinstance(given, Mapping) else {}
        known = {field.name: field for field in fields(cls) if field.init}
        for name in own:
            if name not in known:
                raise ValueError(f"{where}.{name}: {cls.kind} has no such field; it has {', '.join(known) or 'none'}")
        own = {name: value for name, value in defaults.items() if name in known} | own
        for name, field in known.items():
            if name not in own and field.default is MISSING and field.default_factory is MISSING:
                raise ValueError(f"{where}.{name}: {cls.kind} needs this field, which has no default")
        return own

    def made(self, given: object, where: str) -> Any:
        """An instance from data, as YAML and JSON have it: a kind, or a mapping of the kind and fields.

        Raises:
            TypeError, ValueError: naming the field, or in the class's own words.
        """
        cls = self.class_of(given, where)
        own = self.fields_of(cls, given, where)
        try:
            return cls(**own)
        except TypeError as error:
            raise TypeError(f"{where}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def as_data(self, part: Any, always: tuple[str, ...] = ()) -> dict[str, Any]:
        """What :meth:`made` makes an equal instance of: the kind and the fields that are not their defaults, those
        named ``always`` in any case. Tuples become lists, as files have them.

        Raises:
            ValueError: made of tensors or functions, or of a class that is not registered.
        """
        cls = type(part)
        if not part.is_configurable:
            raise ValueError(
                f"expected what numbers and names make, got {cls.__name__}, which is made of tensors or functions; "
                "pass it in Python, or register a class of your own that makes it"
            )
        if self.get(part.kind) is not cls:
            raise ValueError(
                f"expected one of {self.names()}, got {cls.__name__}, which no file could name; register it first "
                f"({self.base.__module__.rpartition('.')[0]}.register({cls.__name__}))"
            )
        own = {field.name: (getattr(part, field.name), field.default) for field in fields(part) if field.init}
        return {"kind": part.kind} | {
            name: list(value) if isinstance(value, tuple) else value
            for name, (value, default) in own.items()
            if name in always or value != default
        }

    def _imported(self, kind: str, where: str) -> type:
        module, _, name = kind.partition(":")
        try:
            cls = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"{where}: cannot import {kind!r}, expected module:Class: {error}") from error
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            raise ValueError(f"{where}: expected a class derived from {self.base.__name__}, got {kind!r}")
        return cls


def shown(value: object) -> str:
    """A value in an error message, of a length that can be read."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
