"""JSON that every reader takes."""

from __future__ import annotations

import json
import math
from typing import Any


def json_text(content: Any) -> str:
    """Data as JSON, indented, with a line's end. JSON has no word for what is no finite number: it becomes null."""
    return json.dumps(_without_nan(content), indent=1, allow_nan=False) + "\n"


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _without_nan(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
