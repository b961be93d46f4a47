"""Statistics from what passes through a model: calibration, and the moving averages of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import nn

from scatterbrain.nn.attention import ScatterbrainAttention
from scatterbrain.nn.distributed import is_first_rank, merge_over_ranks, sum_over_ranks
from scatterbrain.nn.observed import Observed, fewest_tokens, is_short
from scatterbrain.nn.warn import warn

_inside: WeakSet[ScatterbrainAttention] = WeakSet()  # modules that a block calibrates; copies made there are not


def _cores(model: nn.Module) -> list[ScatterbrainAttention]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module, got {type(model).__name__}")
    return [m for m in model.modules() if isinstance(m, ScatterbrainAttention)]


@contextmanager
def calibrate(model: nn.Module, group: dist.ProcessGroup | None = None) -> Iterator[nn.Module]:
    """Fills the calibration buffers of every :class:`ScatterbrainAttention` in ``model`` that has some, from what
    passes through it. Those are of ``Quadratic``, by default the kernel of causal calls alone.

    Inside the block the calls of these kernels are computed exactly, and moments gathered in float64, weighted by
    tokens over all batches, valid tokens only; leaving it turns the moments into statistics. Calls of kernels without
    statistics, such as the bidirectional ones of modules that have another kernel for causal calls, run as ever. ::

        with sb.calibrate(model), torch.no_grad():
            for batch in batches:
                model(batch)

    Where torch.distributed is initialised, leaving the block is a collective operation: the moments of all ranks are
    merged, so that every rank has the same statistics, of the batches of all. Every rank must enter and leave it.

    Args:
        model: any module.
        group: the ranks that share their statistics; default all. A group of this rank alone calibrates it alone.

    Raises:
        ValueError: no layer that can be calibrated, or none of them was run; buffers on the meta device; a block
            inside another one that calibrates the same module; NaN or infinity in a batch.
        RuntimeError: nn.DataParallel ran copies of the model inside the block; calibrate ``model.module``.

    Warns:
        UserWarning: nothing to calibrate, in a model whose kernels read the tokens of each call, or where all calls in
            the block were those of such kernels; the block then does nothing. Fewer than 256 valid tokens over all
            batches and ranks, or fewer different ones, with their number.
    """
    cores = [m for m in _cores(model) if m.kernel_of_state is not None and m.kernel_of_state.is_calibrated_from_data]
    if not cores:
        fit_themselves = [m.low_rank for m in _cores(model) if m.low_rank is not None and m.low_rank.reads_input]
        if fit_themselves:
            warn(
                f"calibrate: there is nothing to calibrate, since {fit_themselves[0]} takes what it needs from the "
                "tokens of each call; the block may be left out",
                stacklevel=4,
            )
            yield model
            return
        raise ValueError(
            "calibrate: expected at least one ScatterbrainAttention with Quadratic(statistics='stored' "
            "or 'ema') in the model, found none"
        )
    without_memory = [path for path, m in model.named_modules() if m in cores and m.lacks_memory]
    if without_memory:
        raise ValueError(
            f"calibrate: expected buffers that can keep statistics, got those of {without_memory[0] or 'the module'} "
            "on the meta device; load the model first (or call to_empty and reset_parameters), and calibrate before "
            "accelerate offloads it"
        )
    busy = [path for path, m in model.named_modules() if m in _inside]
    if busy:
        raise ValueError(
            f"calibrate: {busy[0] or 'the module'} is being calibrated already by a block around this one; leave that "
            "block first, or calibrate the whole model in one"
        )
    before = [(m, m.gathered_scale, m.gathered) for m in cores]
    for m in cores:
        m.is_collecting, m.gathered, m.gathered_scale = True, None, None
        m.observed, m.bypassed = Observed(), None
    _inside.update(cores)
    try:
        yield from _collected(model, cores, group)
    finally:
        _inside.difference_update(cores)
        for m, scale, gathered in before:
            m.observed = None
            if m.is_collecting:  # it was not run, or the block or the fit of another module failed
                m.is_collecting, m.gathered_scale, m.gathered = False, scale, gathered


def _collected(
    model: nn.Module, cores: list[ScatterbrainAttention], group: dist.ProcessGroup | None
) -> Iterator[nn.Module]:
    """The block of :func:`calibrate`, while ``cores`` collect, and what is made of what they saw."""
    yield model
    merge_over_ranks(cores, group)
    counts = [m.observed.distinct for m in cores] + [m.observed.other_calls for m in cores]
    counts = sum_over_ranks(cores, counts, group)
    distinct, other_calls = counts[: len(cores)], counts[len(cores) :]
    seen = {m: (m.gathered_tokens, n) for m, n in zip(cores, distinct, strict=True) if m.gathered is not None}
    few = {m: counts for m, counts in seen.items() if is_short(*counts)}
    for m in seen:
        m.finish_calibration()
    if not seen and any(other_calls):
        if is_first_rank(group):
            m = next(m for m, calls in zip(cores, other_calls, strict=True) if calls)
            is_causal = m.low_rank == m.kernel_of_state
            ran, others = ("causal", "bidirectional") if is_causal else ("bidirectional", "causal")
            warn(
                f"calibrate: there was nothing to calibrate: every call inside the block was {ran}, and those run with "
                f"{m.low_rank_of(is_causal)}, which has no statistics; calibrate for {others} calls, if the model has "
                "any",
                stacklevel=5,
            )
    elif not seen:
        reasons = list(dict.fromkeys(m.bypassed for m in cores if m.bypassed))
        raise ValueError(
            "calibrate: no ScatterbrainAttention was run inside the block"
            + (
                f", since the layers around them ran exact attention: {'; '.join(reasons)}"
                if reasons
                else "; call the model on at least one batch there"
            )
        )
    if few and is_first_rank(group):
        _warn_of_few_tokens(model, few)


def _warn_of_few_tokens(model: nn.Module, few: dict[ScatterbrainAttention, tuple[int, int]]) -> None:
    paths = {module: path for path, module in model.named_modules()}
    module, (tokens, different) = min(few.items(), key=lambda entry: min(entry[1]))
    where = f"{paths[module] or 'the module'}, the fewest of {len(few)} modules" if len(few) > 1 else paths[module]
    saw = f"{tokens} valid tokens" + (f", of which {different} differ" if different < tokens else "")
    warn(
        f"calibrate: statistics were fitted on {saw}{where and f' ({where})'}, expected at least {fewest_tokens()}; "
        "with fewer the error of the approximation grows: run more, longer or other sequences inside the block",
        stacklevel=6,
    )


# In a compiled training step too: it counts steps and reads buffers, and a graph of that serves a single step.
@torch.compiler.disable(reason="update_statistics reads and writes what a module remembers; call it outside the graph")
def update_statistics(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Tells every :class:`ScatterbrainAttention` that an optimizer step is over: moving averages are committed (the
    first at once, then every 10 steps, momentum 0.8, detached) and random projections redrawn where ``Favor(redraw=n)``
    asks for it. A model without such layers is left alone.

    Where torch.distributed is initialised and the model has moving averages this is a collective operation: what all
    ranks gathered is merged, as that of several forward passes of one step is, so that every rank commits the same.
    Every rank must call it after every step.

    Moving averages need DistributedDataParallel where a model runs on several devices: the copies that nn.DataParallel
    runs raise RuntimeError, since what they gather is gone with them.

    Args:
        model: any module.
        group: the ranks that share their statistics, those of data parallelism; default all.

    Raises:
        TypeError: model is no nn.Module.
        ValueError: queries or keys of the step hold NaN or infinity. Then nothing is committed in any layer, the step
            does not count, and what it gathered is dropped. Skip the call where the loss is not finite: the next
            forward pass takes the place of what such a step gathered. Within a step of accumulated micro-batches that
            is so too: NaN of an earlier forward pass gives way to a later one, without an error.
    """
    with torch.no_grad():
        cores = _cores(model)
        merge_over_ranks([m for m in cores if m.commits_average()], group)
        try:
            for m in cores:
                m.check_step()
        except ValueError:
            for m in cores:
                m.forget_step()
            raise
        for m in cores:
            m.finish_step()
