"""The records of a run as TensorBoard reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def check_installed() -> None:
    """
    Raises:
        ModuleNotFoundError: the package tensorboard, which is no part of any extra.
    """
    import torch.utils.tensorboard  # noqa: F401


class Board:
    """Event files with every number of every record, as "train/loss" for one.

    Args:
        folder: of the files; those of a run that is continued stay.
        step: that the run is continued after; what the files have of later ones is not shown.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # which runs without train.tensorboard do not need

        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def add(self, record: dict[str, Any]) -> None:
        """Adds a record of a :class:`RunLog`."""
        for name, value in flat(record).items():
            if name not in ("kind", "step") and not isinstance(value, str):
                self._writer.add_scalar(f"{record['kind']}/{name}", value, record["step"])
        if record["kind"] == "validation":
            self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def flat(record: dict[str, Any]) -> dict[str, Any]:
    """A record whose lists are numbers of their own, as low_rank_shares_1."""
    result = {}
    for name, value in record.items():
        items = enumerate(value, 1) if isinstance(value, list) else [("", value)]
        result |= {f"{name}_{number}" if number else name: one for number, one in items}
    return result
