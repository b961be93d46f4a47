"""One of two processes that train the same small encoder; test_distributed.py starts both and reads their results.

    python worker.py RANK FOLDER

Writes FOLDER/RANK.pt: the results of this rank by scenario. Rank 0 first trains everything alone, on the batches of
both.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import testkit
import torch
import torch.distributed as dist
from testkit import cores, low_ranks, rand, swapped_encoder
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import scatterbrain as sb

WORLD, E, H, L, ROWS, STEPS = 2, 32, 2, 24, 2, 3  # E is the width of the swapped encoder
LOW_RANKS = {name: kernel for name, kernel in low_ranks().items() if name in ("stored", "ema", "learned")}
LOW_RANKS["favor"] = sb.Favor(8, redraw=2)
Wrap = Callable[[nn.Module], nn.Module]


def swapped(low_rank: str, device: str = "cpu") -> nn.TransformerEncoder:
    """The same model on every rank."""
    torch.manual_seed(0)
    with torch.device(device):
        return swapped_encoder(LOW_RANKS[low_rank])


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Tokens and padding of one rank."""
    return rand(ROWS, L, E, seed=100 * step + rank), testkit.padding(L, (5, 0))


def loss_of(model: nn.Module, tokens: Tensor, padding: Tensor) -> Tensor:
    return model(tokens, src_key_padding_mask=padding).masked_fill(padding[..., None], 0).float().square().mean()


def calibrate(model: nn.Module, ranks: range) -> None:
    with sb.calibrate(model), torch.no_grad():
        for rank in ranks:
            model(*batch(50, rank)[:1], src_key_padding_mask=batch(50, rank)[1])


def train(model: nn.Module, ranks: range, together: bool) -> list[Tensor]:
    """Trains on the batches of ``ranks``, in one forward pass or one each, and returns the gradients of the first
    step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    first: list[Tensor] = []
    for step in range(STEPS):
        batches = [batch(step, rank) for rank in ranks]
        if together:
            batches = [tuple(torch.cat(parts) for parts in zip(*batches))]
        optimizer.zero_grad()
        for tokens, padding in batches:
            (loss_of(model, tokens, padding) / len(batches)).backward()
        first = first or [full(p.grad) for p in model.parameters()]
        optimizer.step()
        sb.update_statistics(model)
    return first


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def state(model: nn.Module) -> dict[str, Tensor]:
    """The whole state, without prefixes of wrappers."""
    return {name.removeprefix("module."): full(t) for name, t in model.state_dict().items()}


def sharded(model: nn.Module, **options: Any) -> nn.Module:
    for layer in model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


# -------------------- scenarios


def trained(wrap: Wrap, low_rank: str, ranks: range, together: bool) -> dict[str, Any]:
    model = swapped(low_rank)
    if low_rank == "stored":
        calibrate(model, ranks)
    model = wrap(model)
    gradients = train(model, ranks, together)
    return {"gradients": gradients, "state": state(model)}


def uneven(rank: int) -> dict[str, Any]:
    """In the first step rank 1 has nothing but padding, in the second it runs no forward pass."""
    model = swapped("ema")
    attention = cores(model).values()
    for step in range(2):
        for core in attention:
            core.is_calibrated = False  # so that the second step commits as well
        tokens, padding = batch(step, rank)
        if not (rank and step):
            loss_of(model, tokens, padding | bool(rank)).backward()
        sb.update_statistics(model)
    return {"buffers": dict(model.named_buffers()), "calibrated": [core.is_calibrated for core in attention]}


def calibrated_alone(rank: int) -> dict[str, Any]:
    groups = [dist.new_group([r]) for r in range(WORLD)]
    model = swapped("stored")
    with sb.calibrate(model, group=groups[rank]), torch.no_grad():
        model(batch(0, rank)[0])
    return {"mean": model.layers[0].self_attn.attention.query_mean}


def counted(rank: int) -> dict[str, Any]:
    """What calibration warns of where every rank sees 100 tokens, and 160."""
    said = {}
    for tokens in (100, 160):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = swapped("stored")
            with sb.calibrate(model), torch.no_grad():
                model(rand(1, tokens, E, seed=rank))
        said[tokens] = [str(w.message) for w in caught if "calibrate" in str(w.message)]
    return said


def broadcast(rank: int, how: str) -> dict[str, Any]:
    """Rank 0 alone is calibrated; rank 1 gets its buffers."""
    groups = [dist.new_group([r]) for r in range(WORLD)]
    model = swapped("stored")
    if rank == 0:
        with sb.calibrate(model, group=groups[0]), torch.no_grad():
            model(batch(0, 0)[0])
    before = [core.is_calibrated for core in cores(model).values()]
    run: nn.Module = model.eval()
    if how == "by collectives":
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    else:
        run = DistributedDataParallel(model)
    return {"before": before, "output": run(batch(9, 0)[0]).detach()}


def two_forwards(rank: int, low_rank: str) -> dict[str, Any]:
    """DDP broadcasts buffers in place before each forward pass; the backward pass of both must survive it."""
    model = DistributedDataParallel(swapped(low_rank))
    a, b = batch(0, rank), batch(1, rank)
    (loss_of(model, *a) + loss_of(model, *b)).backward()
    return {"finite": all(bool(p.grad.isfinite().all()) for p in model.parameters())}


def mixed_precision(rank: int, low_rank: str) -> dict[str, Any]:
    model = swapped(low_rank)
    if low_rank == "stored":
        calibrate(model, range(rank, rank + 1))
    model = sharded(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    out = model(batch(0, rank)[0])
    train(model, range(rank, rank + 1), together=True)
    dtypes = {name: buffer.dtype for name, buffer in model.named_buffers()}
    finite = all(bool(t.isfinite().all()) for t in state(model).values() if t.dim() > 1)
    return {"output": out.dtype, "buffers": dtypes, "finite": finite, "state": state(model)}


def checkpoint(rank: int, low_rank: str) -> dict[str, Any]:
    """FSDP2 to a whole state dict, into a plain model, and into a sharded model that starts without memory."""
    model = swapped(low_rank)
    if low_rank == "stored":
        calibrate(model, range(rank, rank + 1))
    model = sharded(model)
    train(model, range(rank, rank + 1), together=True)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    tokens = batch(9, 0)[0]
    model.eval()
    result = {"output": model(tokens).detach()}
    if rank == 0:
        plain = swapped(low_rank).eval()
        plain.load_state_dict(whole, strict=True)
        result["plain"] = plain(tokens).detach()
    empty = sharded(swapped(low_rank, "meta"))
    empty.to_empty(device="cpu")
    for core in cores(empty).values():
        core.reset_parameters()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(empty, whole if rank == 0 else {}, options=options)
    result["reloaded"] = empty.eval()(tokens).detach()
    return result


def late() -> dict[str, Any]:
    """Attention replaced in models that are parallel already."""
    result = {}
    for name, wrap in (("ddp", DistributedDataParallel), ("fsdp", sharded)):
        model = wrap(nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 48, batch_first=True), 1))
        try:
            sb.replace_attention(model, low_rank=LOW_RANKS["learned"])
        except ValueError as error:
            result[name] = str(error)
        result[f"{name} stored"] = len(sb.replace_attention(model).replaced)
    return result


def reset(rank: int) -> dict[str, Any]:
    """reset_parameters of sharded projections."""
    model = sharded(swapped("learned", "meta"))
    model.to_empty(device="cpu")
    core = model.layers[1].self_attn.attention
    torch.manual_seed(7 + rank)  # ranks need not agree: rank 0 draws for all
    core.reset_parameters()
    return {"projection": full(core.query_projection), "bias": full(core.key_bias)}


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    if rank == 0:
        for name in LOW_RANKS:
            results[f"single {name}"] = trained(lambda m: m, name, range(WORLD), together=name != "ema")
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=90))
    own = range(rank, rank + 1)
    for name in LOW_RANKS:
        results[f"ddp {name}"] = trained(DistributedDataParallel, name, own, together=True)
        results[f"fsdp {name}"] = trained(sharded, name, own, together=True)
    for name in ("stored", "learned"):
        results[f"mixed {name}"] = mixed_precision(rank, name)
        results[f"checkpoint {name}"] = checkpoint(rank, name)
    for name in ("ema", "favor"):
        results[f"two forwards {name}"] = two_forwards(rank, name)
    for how in ("by collectives", "by ddp"):
        results[f"broadcast {how}"] = broadcast(rank, how)
    results["uneven"] = uneven(rank)
    results["alone"] = calibrated_alone(rank)
    results["counted"] = counted(rank)
    results["late"] = late()
    results["reset"] = reset(rank)
    dist.barrier()
    dist.destroy_process_group()
    torch.save(results, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
