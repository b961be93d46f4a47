"""One of two processes that train replaced models under DistributedDataParallel, without find_unused_parameters;
test_ddp_paths.py starts both and reads what they say.

    python paths_worker.py RANK FOLDER

Writes FOLDER/RANK.pt: for every scenario "", or the error that ended it.
"""

from __future__ import annotations

import copy
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import hf_models as hf
import torch
import torch.distributed as dist
from testkit import partial_mask, rand
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import scatterbrain as sb
from scatterbrain.integrations import transformers

WINDOW, LEARNED = sb.Window(8, block_q=8), sb.Quadratic(4, "learned")
NAME = transformers.register("scatterbrain:paths", WINDOW, LEARNED)
L, STEPS = 24, 2  # the second step raises where a parameter of the first got no gradient


class Encoder(nn.Module):
    """Two encoder layers, each checkpointed if ``reentrant`` is not None."""

    def __init__(self, reentrant: bool | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        layers = (nn.TransformerEncoderLayer(32, 2, 48, dropout, batch_first=True) for _ in range(2))
        self.layers = nn.ModuleList(layers)
        self.reentrant = reentrant
        sb.replace_attention(self, WINDOW, LEARNED)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask) if self.reentrant is None else checkpoint(layer, x, mask, use_reentrant=self.reentrant)
        return x


def tokens(rank: int, count: int = L) -> Tensor:
    return rand(2, count, 32, seed=rank).requires_grad_()  # reentrant checkpointing looks at its inputs


def language_model(family: str, dropout: float = 0.0) -> nn.Module:
    model = hf.FAMILIES[family].build(NAME).train()
    transformers.set_attention_dropout(model, dropout)
    return model


def checkpointed(family: str, reentrant: bool) -> nn.Module:
    model = language_model(family)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


Scenario = tuple[Callable[[], nn.Module], Callable[[int], dict[str, Any]], dict[str, Any]]


def ids(count: int = L, **arguments: Any) -> Callable[[int], dict[str, Any]]:
    return lambda rank: {"input_ids": hf.tokens(count, seed=rank), "use_cache": False, **arguments}


PACKED = {"position_ids": torch.arange(L).remainder(L // 2).expand(2, L)}
# Calls that leave the approximation out
UNUSED: dict[str, Scenario] = {
    "dropout": (lambda: Encoder(dropout=0.1), lambda rank: {"x": tokens(rank)}, {}),
    "any mask": (Encoder, lambda rank: {"x": tokens(rank), "mask": partial_mask(L, L)}, {}),
    "short on one rank": (Encoder, lambda rank: {"x": tokens(rank, L if rank else 6)}, {}),
    "any mask, static graph": (
        Encoder,
        lambda rank: {"x": tokens(rank), "mask": partial_mask(L, L)},
        {"static_graph": True},
    ),
    "any mask, checkpointed": (
        lambda: Encoder(reentrant=False),
        lambda rank: {"x": tokens(rank), "mask": partial_mask(L, L)},
        {},
    ),
    "any mask, checkpointed and reentrant": (
        lambda: Encoder(reentrant=True),
        lambda rank: {"x": tokens(rank), "mask": partial_mask(L, L)},
        {"static_graph": True},
    ),
    "packed rows": (lambda: language_model("llama"), ids(**PACKED), {}),
    "packed rows, checkpointed": (lambda: checkpointed("llama", False), ids(**PACKED), {}),
    "one token": (lambda: language_model("llama"), ids(1), {}),
}
# Calls that approximate
CHECKPOINTED: dict[str, Scenario] = {
    "checkpointed": (lambda: Encoder(reentrant=False), lambda rank: {"x": tokens(rank)}, {}),
    "reentrant": (lambda: Encoder(reentrant=True), lambda rank: {"x": tokens(rank)}, {"static_graph": True}),
    "static graph": (Encoder, lambda rank: {"x": tokens(rank)}, {"static_graph": True}),
    "language model, checkpointed": (lambda: checkpointed("llama", False), ids(), {}),
    "language model, reentrant": (lambda: checkpointed("llama", True), ids(), {"static_graph": True}),
}


def gradients(model: nn.Module, arguments: dict[str, Any]) -> list[Tensor | None]:
    model.zero_grad()
    out = model(**arguments)
    (out if isinstance(out, Tensor) else hf.output(out)).square().mean().backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def run(rank: int, scenario: Scenario) -> None:
    """Trains under DDP and compares: gradients are the mean of those that either rank finds alone."""
    build, inputs, options = scenario
    torch.manual_seed(0)
    model = build()
    alone = copy.deepcopy(model)
    wrapped = DistributedDataParallel(model, **options)
    for _ in range(STEPS):
        torch.manual_seed(1)  # of dropout
        found = gradients(wrapped, inputs(rank))
    expected = []
    for other in range(2):
        torch.manual_seed(1)
        expected.append(gradients(alone, inputs(other)))
    for name, got, *both in zip(dict(model.named_parameters()), found, *expected):
        assert got is not None and None not in both, name
        torch.testing.assert_close(got, (both[0] + both[1]) / 2, rtol=1e-4, atol=1e-6)


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=90))
    results: dict[str, str] = {}
    for name, scenario in (UNUSED | CHECKPOINTED).items():
        try:
            run(rank, scenario)
            results[name] = ""
        except Exception:  # the other scenarios still run
            results[name] = traceback.format_exc()[-1500:]
        dist.barrier()
    torch.save([{name: results[name] for name in group} for group in (UNUSED, CHECKPOINTED)], folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may still run when the interpreter ends, which then aborts
