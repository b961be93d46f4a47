"""Times of attention that were measured once, kept in a file."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from scatterbrain.analysis.exact import by_torch
from scatterbrain.analysis.layer_call import LayerCall
from scatterbrain.analysis.output_files import IS_FOLDER, why_not_written
from scatterbrain.analysis.trade import EXACT
from scatterbrain.layer_settings import Pair
from scatterbrain.registry import shown
from scatterbrain.version import __version__

GROUP = 32  # pairs timed in turn: fewer than calls that are kept prepared, so that every timed call is one of these
PATIENCE = 5.0  # seconds of waiting for others that write times


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
        self.why_not = why_not_written(self.path, is_replaced=True)
        if self.why_not == IS_FOLDER:
            raise ValueError(f"tune: times must be a JSON file, got the folder {self.path}")
        if not os.path.isfile(self.path):
            self._check_written()
        self.known = self._read()

    def _check_written(self) -> None:
        """Better before minutes of measuring than after."""
        if self.why_not is not None:
            raise ValueError(self._not_written(self.why_not))

    def _read(self) -> dict[str, float]:
        if not self.path.is_file():
            return {}
        try:
            found = json.loads(self.path.read_text())
        except ValueError as error:
            raise ValueError(f"tune: times: {self.path} is not a file of times: {error}; remove it") from None
        if not isinstance(found, dict) or not all(isinstance(seconds, (int, float)) for seconds in found.values()):
            raise ValueError(
                f"tune: times: {self.path} is not a file of times: expected seconds by name, got {shown(found)}; "
                "remove it"
            )
        return found

    def _not_written(self, why: object) -> str:
        return (
            f"tune: times: expected a file that can be written, got {self.path}: {why}; give another one (times=, on a "
            "command line --times)"
        )

    def of(self, call: LayerCall, timed: Mapping[Pair, Callable[[], object]], repeats: int = 5) -> dict[Pair, float]:
        """Of exact attention and every pair on tensors of this shape; what the file lacks is measured and added, in
        groups in which exact attention takes part each time: pairs are compared with it, and a machine that is slower
        for a while is slower for both."""
        keys = {pair: self.key(call, pair) for pair in (EXACT, *timed)}
        missing = [pair for pair in timed if keys[pair] not in self.known and pair != EXACT]
        if not missing and keys[EXACT] in self.known:
            return {pair: self.known[key] for pair, key in keys.items()}
        self._check_written()
        for first in range(0, max(len(missing), 1), GROUP):
            group = {str(pair): timed[pair] for pair in missing[first : first + GROUP]}
            found = self.measure({str(EXACT): by_torch(call)} | group, repeats)
            of_exact = self.known.setdefault(keys[EXACT], found[str(EXACT)])
            self.known |= {
                keys[pair]: found[str(pair)] * of_exact / found[str(EXACT)] for pair in missing[first : first + GROUP]
            }
            self._write(keys[EXACT], [keys[pair] for pair in missing[first : first + GROUP]])
        return {pair: self.known[key] for pair, key in keys.items()}

    def _write(self, of_exact: str, measured: Sequence[str]) -> None:
        """Adds to the file what was measured beside exact attention. What others added meanwhile stays, and where they
        measured the same it counts: of one call all times are in proportion to one time of exact attention."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _alone(self.path):
                there = self._read()
                factor = there.get(of_exact, self.known[of_exact]) / self.known[of_exact]
                self.known |= {key: self.known[key] * factor for key in (of_exact, *measured)}
                self.known |= there
                aside = self.path.with_name(f"{self.path.name}.{os.getpid()}.{threading.get_ident()}")
                try:
                    aside.write_text(json.dumps(self.known, indent=0, sort_keys=True))
                    os.replace(aside, self.path)
                finally:
                    aside.unlink(missing_ok=True)
        except OSError as error:
            raise ValueError(self._not_written(error.strerror or error)) from error

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


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Inside, no other process or thread that asks for this file is in here. After PATIENCE seconds of waiting, and on
    systems without such locks, it goes on all the same: others may be stopped, and what is lost is measured again."""
    path = file.with_name(f"{file.name}.lock")  # its own, since whoever calls may hold the file or its folder
    lock = _locked(path)
    try:
        yield
    finally:
        if lock is not None:
            with suppress(OSError):
                path.unlink()  # while it is held: who waits for it sees that it is gone
            os.close(lock)


def _locked(path: Path) -> int | None:
    """A lock on a file that is there, made for it; None where it cannot be had."""
    try:
        import fcntl
    except ImportError:
        return None
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                return lock
        except FileNotFoundError:  # removed by who held it before
            pass
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:
            os.close(lock)
            return None
        os.close(lock)
    return None
