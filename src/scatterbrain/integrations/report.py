"""What :func:`scatterbrain.replace_attention` did to a model, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Entry:
    """One attention module of the model.

    Args:
        path: name of the module in the model; "" is the model itself.
        was: its class before.
        now: its class now; None if it was left as it was.
        note: why it was left, or what to know about the replacement; "" for nothing.
    """

    path: str
    was: str
    now: str | None
    note: str = ""


@dataclass
class Report:
    """What :func:`replace_attention` did; ``print(report)`` shows it as a table.

    Args:
        settings: the support and the low-rank kernel of the modules that were replaced.
        entries: every module that looks like attention, in the model's order.
        notes: other changes to the model, a line each: class tokens that attend exactly, token order.
    """

    settings: str
    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    @property
    def replaced(self) -> list[Entry]:
        """The modules that were replaced."""
        return [entry for entry in self.entries if entry.now is not None]

    @property
    def skipped(self) -> list[Entry]:
        """The modules that were left as they were."""
        return [entry for entry in self.entries if entry.now is None]

    def _add(self, notes: list[str], undo: list[Callable[[], None]]) -> None:
        """Lines about a change to the model, and the functions that undo it."""
        self.notes += notes
        self._undo += undo

    def restore(self) -> None:
        """Gives every replaced module its own class and settings back. Weights keep their present values, trained or
        not; calibration and learned projections are dropped. A second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __str__(self) -> str:
        total = len(self.entries)
        summary = f"{len(self.replaced)} of {total} attention module{'' if total == 1 else 's'} replaced"
        if self.replaced:
            summary += f" with {self.settings}"
        summary = "\n".join([summary, *self.notes])
        if not self.entries:
            return summary
        header = ("module", "was", "now", "note")
        rows = [(e.path or "(the model)", e.was, e.now or "unchanged", e.note) for e in self.entries]
        widths = [max(map(len, column)) for column in zip(header, *rows)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (header, *rows)]
        return "\n".join([*lines, summary])
