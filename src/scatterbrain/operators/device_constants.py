"""Small tensors that depend on numbers alone, kept on the device that reads them: making one again takes a dozen small
operations or, where it is drawn on the CPU, a copy that waits for the device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from scatterbrain.operators.tracing import is_capturing

_MOST = 64  # kept constants; a program with more makes some of them anew
_kept: dict[tuple, dict[Hashable, Tensor]] = {}  # (make, device, *arguments) -> by stream
_read_by_graphs: dict[int, Tensor] = {}  # by id, for good: a CUDA graph knows only their addresses
_lock = threading.Lock()  # of changes; looking up needs none


def kept(make: Callable[..., Tensor], device: torch.device, *arguments: Hashable) -> Tensor:
    """``make(*arguments, device)``, or what it made before. Nobody may write to the result. For untraced calls.

    A stream has its own: another stream might read a constant before it is written, or after its memory is given to
    others. While a CUDA graph is captured any stream's will do, since a capture begins when the device is idle, and is
    never given away.
    """
    key = (make, device, *arguments)
    by_stream = _kept.get(key)
    if device.type != "cpu" and is_capturing(device):
        if not by_stream:
            return make(*arguments, device)
        constant = next(iter(by_stream.values()))
        _read_by_graphs[id(constant)] = constant
        return constant
    stream = _current_stream(device)
    constant = None if by_stream is None else by_stream.get(stream)
    if constant is None:
        with torch.inference_mode(False), torch.no_grad():  # a later call may train with it
            constant = make(*arguments, device)
        with _lock:
            if key not in _kept and len(_kept) >= _MOST:
                del _kept[next(iter(_kept))]
            _kept[key] = {**_kept.get(key, {}), stream: constant}
    return constant


def _current_stream(device: torch.device) -> Hashable:
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return None
    return torch.cuda.current_stream(device).stream_id
