"""Tables of documents that a script writes, between two comments."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

END = "<!-- end of the table -->"


class Marked(NamedTuple):
    """The table ``name`` of a document."""

    document: Path
    name: str

    def read(self) -> list[str]:
        return self._parts()[1].strip().splitlines()

    def write(self, lines: list[str]) -> None:
        before, _, after = self._parts()
        table = "\n".join(lines)
        self.document.write_text(f"{before}<!-- {self.name} -->\n\n{table}\n\n{END}{after}")

    def _parts(self) -> tuple[str, str, str]:
        """The document before the table, the table, and behind it."""
        before, found, rest = self.document.read_text().partition(f"<!-- {self.name} -->")
        assert found, f"{self.document} has no comment <!-- {self.name} -->"
        table, _, after = rest.partition(END)
        return before, table, after
