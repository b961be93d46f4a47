"""The Python of the documents runs as it stands, block after block in one namespace."""

from __future__ import annotations

import re

import pytest
from testkit import ROOT

from scatterbrain.low_rank import LOW_RANK_KERNELS
from scatterbrain.supports import SUPPORTS


@pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="needs the source tree, not only the installed package")
@pytest.mark.parametrize(
    ("document", "blocks"),
    [("README.md", 3), ("docs/architecture.md", 1), ("docs/own_parts.md", 4), ("docs/vision.md", 2)],
)
def test_the_code_of_the_documents_runs(document: str, blocks: int) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    found = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(found) == blocks
    known = dict(SUPPORTS), dict(LOW_RANK_KERNELS)
    names: dict[str, object] = {}
    try:
        for block in found:
            exec(compile(block, document, "exec"), names)
    finally:
        for registry, before in zip((SUPPORTS, LOW_RANK_KERNELS), known):
            for kind in registry.keys() - before.keys():
                del registry[kind]
    assert names["out"].isfinite().all()
