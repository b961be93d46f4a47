"""What the steps of benchmarks/device.sh leave for each other."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from scatterbrain.json_text import json_text


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(json_text(content))
    os.replace(aside, path)


def read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
