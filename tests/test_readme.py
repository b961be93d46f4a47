"""The README's Python runs as it stands, block after block in one namespace."""

from __future__ import annotations

import re

import pytest
from testkit import ROOT

README = ROOT / "README.md"


@pytest.mark.skipif(not README.is_file(), reason="needs the source tree, not only the installed package")
def test_the_code_of_the_readme_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert names["out"].isfinite().all()
