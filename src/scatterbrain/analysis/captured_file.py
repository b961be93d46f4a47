"""What the self-attention layers of a model compute with, as a file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from scatterbrain.analysis.captured import Batch, calls_of, counterparts
from scatterbrain.analysis.layer_call import LayerCall
from scatterbrain.analysis.output_files import IS_FOLDER, why_not_written


def capture(
    model: nn.Module,
    batch: Batch,
    file: str | os.PathLike[str],
    calibration: Batch | None = None,
    name: str = "model",
) -> list[str]:
    """Runs ``model`` once and writes what its self-attention layers compute with to a safetensors file, for
    ``benchmarks/quality.py``, ``scatterbrain bench --inputs`` and ``scatterbrain analyze --inputs``.

    A layer of a batch row is the float32 tensors ``<name>.N<tokens>.layer<l>.q``, ``.k`` and ``.v``, each (heads,
    tokens, head_dim): valid tokens alone, in the model's own order, key/value heads repeated for their query heads, and
    queries scaled such that attention is softmax(q k^T / sqrt(head_dim)) v. Layers count from 0 in the order of their
    calls. Rows of a batch after the first are named ``<name>_<row>``, causal models ``lm_<name>``; rows without tokens
    are left out. Beside them stand ``<name>.cal.layer<l>.q`` and ``.k``, once for all rows (``lm_`` before them
    likewise): of all rows of the calibration batch, or, without one or where a layer did not run on it, of the same
    tokens. A model whose image patches run in Hilbert order runs in its own order here.

    Args:
        model, batch: as :func:`scatterbrain.compare`.
        file: where to write; folders are made.
        calibration: another batch, to fit statistics on; without one they are fitted on the tokens that are measured,
            which flatters them.
        name: of the model in the file, letters, digits and underscores.

    Returns:
        The names of the layers: what stands before ``.q``, ``.k`` and ``.v``.

    Raises:
        ValueError: a name of other characters; a folder for a file, or one that cannot be written; no attention that is
            known; no self-attention among it.
        ModuleNotFoundError: safetensors is not installed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if not re.fullmatch(r"\w+", name):
        raise ValueError(f"capture: name must be letters, digits and underscores, got {name!r}")
    file = Path(file)
    why = why_not_written(file)
    if why == IS_FOLDER:
        raise ValueError(f"capture: file: expected a file to write, got {file}, which is a folder")
    if why is not None:  # better now than after the model ran
        raise ValueError(_not_written(file, why))
    calls = [call for call in calls_of(model, batch, "natural") if _is_self_attention(call)]
    if not calls:
        raise ValueError(
            "capture: expected self-attention layers, whose queries and keys are the same tokens, got none"
        )
    others: list[LayerCall | None] = list(calls)
    if calibration is not None:
        others = counterparts(calls, calls_of(model, calibration, "natural"))
    tensors: dict[str, Tensor] = {}
    entries = []
    for layer, call in enumerate(calls):
        prefix = f"lm_{name}" if call.is_causal else name
        fitted = dict(zip("qk", (torch.cat(t, 1) for t in zip(*_rows(others[layer] or call)))))
        tensors |= {f"{prefix}.cal.layer{layer}.{part}": t for part, t in fitted.items()}
        for row, parts in enumerate(_rows(call)):
            if parts[0].shape[1] == 0:  # a row without tokens
                continue
            of_row = prefix if row == 0 else f"{prefix}_{row}"
            entries.append(f"{of_row}.N{parts[0].shape[1]}.layer{layer}")
            tensors |= {f"{entries[-1]}.{part}": t for part, t in zip("qkv", parts)}
    if not entries:
        raise ValueError("capture: expected a batch with tokens that are not padding, got none")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: t.contiguous() for key, t in tensors.items()}, file)
    except (OSError, SafetensorError) as error:
        raise ValueError(_not_written(file, " ".join(str(error).split()))) from error
    return entries


def is_capture(file: Path) -> bool:
    """Whether a file is of :func:`capture`, by the names of its tensors, which no model has.

    Raises:
        OSError: a file that cannot be read.
        ModuleNotFoundError: safetensors is not installed.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
    except SafetensorError:
        return False
    return bool(names) and all(
        re.fullmatch(r"\w+\.(N\d+\.layer\d+\.[qkv]|cal\.layer\d+\.[qk])", name) for name in names
    )


def _not_written(file: Path, why: str) -> str:
    return f"capture: file: expected one that can be written, got {file}: {why}; write elsewhere, or make room"


def _is_self_attention(call: LayerCall) -> bool:
    same_count = call.query.shape[2] == call.key.shape[2]
    is_whole = isinstance(call.query_offset, int) and call.query_offset == 0
    return same_count and is_whole and not call.is_query_by_query


def _rows(call: LayerCall) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """By batch row, float32 (heads, tokens, width), of tokens that count as queries and as keys."""
    group = call.query.shape[1] // call.key.shape[1]
    factor = call.scale * call.query.shape[3] ** 0.5
    valid_rows = call.valid_queries()
    if call.key_padding_mask is not None:
        valid_rows = valid_rows & ~call.key_padding_mask
    for row, valid in enumerate(valid_rows):
        q, k, v = (t[row, :, valid].float().cpu() for t in (call.query, call.key, call.value))
        yield q * factor, k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
