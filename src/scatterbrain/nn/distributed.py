"""One set of statistics, and one start, for all ranks of a data-parallel run."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from scatterbrain.low_rank import StateOwner
from scatterbrain.low_rank.moments import MOMENTS, Moments, moment_shapes


def merge_over_ranks(modules: list[StateOwner], group: dist.ProcessGroup | None) -> None:
    """Replaces what each module gathered on this rank by what it gathered on all ranks of ``group`` together, weighted
    by tokens, as if the ranks' batches had been passed one after another. One all-reduce for all modules; every rank of
    the group must call it with the same modules. Does nothing where torch.distributed is not initialised, on a single
    rank, or without modules.

    Args:
        modules: some may have gathered nothing on this rank.
        group: of the ranks that share their statistics; None is the default group.

    Raises:
        ValueError: ranks whose attention has another scale.
    """
    if not modules or not _is_parallel(group):
        return
    sums = torch.cat([_weighted(module) for module in modules])
    dist.all_reduce(sums, group=group)
    for module in modules:
        size = 2 + sum(map(math.prod, _shapes(module)))
        _take(module, sums[:size])
        sums = sums[size:]


def sum_over_ranks(modules: list[StateOwner], counts: list[int], group: dist.ProcessGroup | None) -> list[int]:
    """Numbers of these modules, added up over the ranks of ``group``. As :func:`merge_over_ranks`, a collective."""
    if not modules or not _is_parallel(group):
        return counts
    sums = torch.tensor(counts, dtype=torch.int64, device=next(modules[0].buffers()).device)
    dist.all_reduce(sums, group=group)
    return sums.tolist()


def is_first_rank(group: dist.ProcessGroup | None) -> bool:
    """Whether this is the rank of ``group`` that speaks for all of them."""
    return not _is_parallel(group) or dist.get_rank(group) == 0


def _is_parallel(group: dist.ProcessGroup | None) -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def fill(target: Tensor, value: Tensor) -> None:
    """Copies ``value`` into ``target``. If ``target`` is sharded (FSDP2) every rank takes its part of rank 0's value,
    and all must call it."""
    if hasattr(target, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(target.device_mesh.device_type), target.device_mesh, target.placements)
    target.copy_(value)


def _shapes(module: StateOwner) -> tuple[tuple[int, ...], ...]:
    return moment_shapes(module.num_kv_heads, module.head_dim)


def _weighted(module: StateOwner) -> Tensor:
    """float64: 1 and the scale, then the tokens and every other moment times the tokens; zeros where nothing was
    gathered."""
    gathered = module.gathered
    if gathered is None:
        size, device = 2 + sum(map(math.prod, _shapes(module))), next(module.buffers()).device
        return torch.zeros(size, dtype=torch.float64, device=device)
    tokens, *moments = (getattr(gathered, name) for name in MOMENTS)
    products = [moment * _along(tokens, moment) for moment in moments]
    # A rank whose tokens are all padding adds nothing, whatever its means are.
    products = [torch.where(_along(tokens, p) > 0, p, 0).flatten() for p in products]
    return torch.cat([tokens.new_tensor([1.0, module.gathered_scale]), tokens, *products])


def _take(module: StateOwner, sums: Tensor) -> None:
    ran, scale = sums[:2].tolist()
    if not ran:
        return
    scale /= ran
    own = module.gathered_scale
    if own is not None and abs(own - scale) > 1e-6 * abs(scale):
        raise ValueError(
            f"statistics of several ranks: expected one scale of attention on all of them, got {own:.6g} here "
            f"and {scale:.6g} on average"
        )
    shapes = _shapes(module)
    tokens, *products = (p.reshape(s) for p, s in zip(sums[2:].split([math.prod(s) for s in shapes]), shapes))
    module.gathered = Moments(tokens, *(p / _along(tokens.clamp(min=1), p) for p in products))
    module.gathered_scale = scale if own is None else own


def _along(tokens: Tensor, moment: Tensor) -> Tensor:
    """``tokens`` (heads,) with the dimensions of ``moment`` (heads, ...)."""
    return tokens.reshape(tokens.shape + (1,) * (moment.dim() - tokens.dim()))
