"""Times of attention that were measured once, kept in a file."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from scatterbrain.analysis.exact import by_torch
from scatterbrain.analysis.layer_call import LayerCall
from scatterbrain.analysis.trade import EXACT
from scatterbrain.layer_settings import Pair
from scatterbrain.registry import shown
from scatterbrain.version import __version__

GROUP = 32  # pairs timed in turn: fewer than calls that are kept prepared, so that every timed call is one of these


class Times:
    """Measured seconds, kept in a file: times that are measured twice differ, and decisions would with them."""

    def __init__(
        self,
        file: str | os.PathLike[str] | None,
        measure: Callable[[Mapping[str, Callable[[], object]], int], dict[str, float]],
    ) -> None:
        """``measure``: seconds of each, over so many repeats."""
        self.measure = measure
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.path = folder / "scatterbrain" / "times.json" if file is None else Path(file)
        self.known: dict[str, float] = {}
        if self.path.is_dir():
            raise ValueError(f"tune: times must be a JSON file, got the folder {self.path}")
        if self.path.is_file():
            try:
                self.known = json.loads(self.path.read_text())
            except ValueError as error:
                raise ValueError(f"tune: times: {self.path} is not a file of times: {error}; remove it") from None
            if not isinstance(self.known, dict) or not all(isinstance(s, (int, float)) for s in self.known.values()):
                raise ValueError(
                    f"tune: times: {self.path} is not a file of times: expected seconds by name, got "
                    f"{shown(self.known)}; remove it"
                )

    def of(self, call: LayerCall, timed: Mapping[Pair, Callable[[], object]], repeats: int = 5) -> dict[Pair, float]:
        """Of exact attention and every pair on tensors of this shape; what the file lacks is measured and added, in
        groups in which exact attention takes part each time: pairs are compared with it, and a machine that is slower
        for a while is slower for both."""
        keys = {pair: self.key(call, pair) for pair in (EXACT, *timed)}
        missing = [pair for pair in timed if keys[pair] not in self.known and pair != EXACT]
        if not missing and keys[EXACT] in self.known:
            return {pair: self.known[key] for pair, key in keys.items()}
        for first in range(0, max(len(missing), 1), GROUP):
            group = {str(pair): timed[pair] for pair in missing[first : first + GROUP]}
            found = self.measure({str(EXACT): by_torch(call)} | group, repeats)
            of_exact = self.known.setdefault(keys[EXACT], found[str(EXACT)])
            self.known |= {
                keys[pair]: found[str(pair)] * of_exact / found[str(EXACT)] for pair in missing[first : first + GROUP]
            }
            self._write()
        return {pair: self.known[key] for pair, key in keys.items()}

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        aside.write_text(json.dumps(self.known, indent=0, sort_keys=True))
        os.replace(aside, self.path)

    def key(self, call: LayerCall, pair: Pair) -> str:
        """What a time depends on."""
        tensors = call.query, call.key, call.value
        machine = platform.node(), platform.processor() or platform.machine(), torch.ops.scatterbrain.instruction_set()
        facts = (
            __version__,
            torch.__version__,
            *machine,
            torch.get_num_threads(),
            [(tuple(t.shape), str(t.dtype), str(t.device)) for t in tensors],
            call.is_causal,
            call.key_padding_mask is not None,
            call.exact_queries,
            repr(pair),
        )
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:24] + " " + repr(pair)
