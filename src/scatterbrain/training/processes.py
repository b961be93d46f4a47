"""The processes that train one model together, as torchrun starts them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scatterbrain.training.batch import Batch
from scatterbrain.training.config import TrainConfig, require

Value = TypeVar("Value")
TIMEOUT = timedelta(minutes=30)  # how long one process waits for another, that reads data or compiles for example


class FirstProcessFailed(Exception):
    """What the first process could not do, on every other one: the first has said what it was."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among those of a run.

    Every method that says so is a collective: all processes must call it, in the same order.

    Args:
        rank: number of this process, from 0. The first writes all files and prints.
        count: of all processes.
        local_rank: number among those of its machine, which is that of its GPU.
        mode: how they share the model: "ddp", each has all of it, or "fsdp", each has a part of every tensor.
        owns_group: whether the group of processes was made for this run, and ends with it.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    mode: str = "none"
    owns_group: bool = False

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def are_several(self) -> bool:
        return self.count > 1

    # -------------------- what is agreed on

    def first(self, action: Callable[[], Value]) -> Value:
        """What ``action`` returns on the first process, for all of them; it runs there alone. A collective.

        Raises:
            FirstProcessFailed: on the other processes, where it raised an error on the first.
        """
        if not self.are_several:
            return action()
        if not self.is_first:
            (answer,) = self._broadcast([None])
            value, error, exit_code = answer
            if error is not None:
                raise FirstProcessFailed(error, exit_code)
            return value
        try:
            value = action()
        except Exception as error:
            self._broadcast([(None, str(error), getattr(error, "exit_code", 1))])
            raise
        self._broadcast([(value, None, 0)])
        return value

    def require_same(self, what: str, value: Any) -> None:
        """A collective.

        Raises:
            ValueError: a value that is not the first process's.
        """
        expected = self.first(lambda: value)
        differs = self.largest(float(value != expected))[0] > 0
        if value != expected:
            raise ValueError(
                f"{what}: expected the same in all processes, got {value} in process {self.rank} and {expected} in the "
                "first; give every machine the same files and options"
            )
        if differs:
            raise ValueError(
                f"{what}: expected the same in all processes, and that of another one differs from the first's; "
                "give every machine the same files and options"
            )

    def largest(self, *values: float) -> list[float]:
        """The largest of each number over the processes. A collective."""
        return self._reduced(values, dist.ReduceOp.MAX) if self.are_several else list(values)

    def sums(self, *values: float) -> list[float]:
        """The sum of each number over the processes. A collective."""
        return self._reduced(values, dist.ReduceOp.SUM) if self.are_several else list(values)

    def tensors(self, read: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors on the CPU that the first process reads, for all of them. A collective, with the errors of
        :meth:`first`."""
        own: dict[str, Tensor] = {}

        def describe() -> list[tuple[str, torch.Size, torch.dtype]]:
            own.update(read())
            return [(name, tensor.shape, tensor.dtype) for name, tensor in own.items()]

        names = self.first(describe)
        if not self.are_several:
            return own
        result = {}
        for name, shape, dtype in names:
            result[name] = own[name].contiguous() if self.is_first else torch.empty(shape, dtype=dtype)
            dist.broadcast(result[name].flatten().view(torch.uint8), 0)  # bytes, whatever types the backend knows
        return result

    def leave(self) -> None:
        """Ends a group of processes that was made for this run. Nothing else may be called afterwards."""
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()

    def _broadcast(self, values: list[Any]) -> list[Any]:
        dist.broadcast_object_list(values, 0, device=torch.device("cpu"))
        return values

    def _reduced(self, values: tuple[float, ...], how: dist.ReduceOp) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, how)
        return tensor.tolist()

    # -------------------- who does what

    def own_batches(self, accumulate: int) -> range:
        """Which of the ``accumulate`` batches of a step this process works on, alone or with others."""
        if accumulate >= self.count:
            each = accumulate // self.count
            return range(self.rank * each, (self.rank + 1) * each)
        return range(self.rank // (self.count // accumulate), self.rank // (self.count // accumulate) + 1)

    def parts(self, accumulate: int) -> int:
        """How many processes share a batch."""
        return max(self.count // accumulate, 1)

    def own_rows(self, batch: Batch, accumulate: int) -> Batch:
        """The rows of a batch that are this process's."""
        parts = self.parts(accumulate)
        if parts == 1:
            return batch
        part, rows = self.rank % parts, len(batch.targets)
        if rows < parts:
            raise ValueError(
                f"train.batch: expected at least a row for each of {parts} processes, got a batch of {rows}; use "
                "larger batches, fewer processes or a larger train.accumulate"
            )
        return Batch(*(None if tensor is None else tensor.tensor_split(parts)[part] for tensor in batch))

    # -------------------- the model

    def share_model(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The module whose forward pass trains ``model`` together with the other processes. Weights have to be the same
        on all of them. Of a sharded model every block is gathered when it is run."""
        if not self.are_several:
            return model
        if self.mode == "ddp":
            ids = [device.index] if device.type == "cuda" else None
            # update_statistics keeps buffers the same on all processes.
            return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)
        from torch.distributed.fsdp import fully_shard  # a second that runs of one process need not wait

        for stack in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
            for block in stack:
                fully_shard(block)
        return fully_shard(model)

    def device(self, name: str) -> str:
        """``train.device`` of this process."""
        if not self.are_several or torch.device(name).type != "cuda":
            return name
        require(
            torch.device(name).index is None, "train.device", "cuda without a number: processes take one each", name
        )
        return f"cuda:{self.local_rank}"


def join(train: TrainConfig) -> Processes:
    """Meets the other processes, where torchrun has started several; its environment variables say so. A group that
    there is already is used as it is.

    Raises:
        ValueError: naming the key: several processes without ``train.parallel``, batches that they cannot share out, or
            fewer GPUs than processes.
    """
    has_group = dist.is_available() and dist.is_initialized()
    count = dist.get_world_size() if has_group else int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Processes()
    rank = dist.get_rank() if has_group else int(_variable("RANK"))
    require(train.parallel != "none", "train.parallel", f"ddp or fsdp, for {count} processes", train.parallel)
    _check_shares(train, count)
    local_rank = int(os.environ.get("LOCAL_RANK", str(rank)))
    processes = Processes(rank, count, local_rank, train.parallel, owns_group=not has_group)
    device = torch.device(processes.device(train.device))
    if device.type == "cuda" and torch.cuda.is_available():
        number, there = processes.local_rank, torch.cuda.device_count()
        if number >= there:
            raise ValueError(
                f"train.device: expected a GPU for each process of a machine, which has {there}, got {str(device)!r}; "
                f"start {there} processes there at most (torchrun --nproc-per-node {there}), or train on the cpu"
            )
        torch.cuda.set_device(device)
    if not has_group:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
    return processes


def _variable(name: str) -> str:
    if name not in os.environ:
        raise ValueError(f"expected the environment variable {name} beside WORLD_SIZE, as torchrun sets it; got none")
    return os.environ[name]


def _check_shares(train: TrainConfig, count: int) -> None:
    if train.accumulate % count == 0:
        return
    require(
        count % train.accumulate == 0,
        "train.accumulate",
        f"a multiple or a divisor of the {count} processes, which share out the batches of a step",
        train.accumulate,
    )
    parts = count // train.accumulate
    require(
        train.batch % parts == 0,
        "train.batch",
        f"a multiple of {parts}, since {count} processes share {train.accumulate} batches of a step (train.accumulate)",
        train.batch,
    )


def lost_a_process(error: BaseException) -> bool:
    """Whether this is the error of a collective because another process has ended."""
    if not isinstance(error, RuntimeError) or not dist.is_available():
        return False
    return dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error).lower())


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded; for those a collective."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like(tensor: Tensor, own: Tensor) -> Tensor:
    """``tensor``, the same on all processes, sharded as ``own`` is; a collective where that is."""
    if not hasattr(own, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(own.device_mesh.device_type), own.device_mesh, own.placements)
