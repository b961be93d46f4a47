"""Classes by the name that configuration files give them."""

from __future__ import annotations

from typing import TypeVar

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
