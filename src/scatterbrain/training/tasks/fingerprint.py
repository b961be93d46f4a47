"""What tells the data of two runs apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from torch import Tensor


def fingerprint_of(parts: Iterable[bytes | Tensor]) -> str:
    """The SHA-256 of bytes and of tensors' elements, one after the other, each with its length."""
    digest = hashlib.sha256()
    for part in parts:
        content = part if isinstance(part, bytes) else memoryview(part.contiguous().numpy()).cast("B")
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()
