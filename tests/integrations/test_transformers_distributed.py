"""transformers' models under DDP and FSDP2, in two processes."""

from __future__ import annotations

import pytest
import torch
from testkit import run_two_ranks

pytest.importorskip("transformers")

PROGRAM = """
import os
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
import hf_models as hf
import scatterbrain as sb
from scatterbrain.integrations.transformers import register

rank, kind, statistics = int(sys.argv[1]), sys.argv[3], sys.argv[4]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
name = register("scatterbrain:wrapped", sb.Window(16, block_q=8), sb.Quadratic(5, statistics))


def model():
    built = hf.FAMILIES["llama"].build(name)
    if statistics == "stored":
        with sb.calibrate(built):
            hf.run(built, input_ids=hf.tokens())
    return built


def gradients(wrapped, ids):
    out = hf.output(wrapped(input_ids=ids))
    out.square().mean().backward()
    full = lambda grad: grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return {key.removeprefix("module."): full(p.grad) for key, p in wrapped.named_parameters() if p.grad is not None}


ids = hf.tokens(48)
alone = gradients(model(), ids)
wrapped = model()
if kind == "ddp":
    wrapped = DistributedDataParallel(wrapped)
else:
    for layer in wrapped.model.layers:
        fully_shard(layer)
    fully_shard(wrapped)
both = gradients(wrapped, ids[rank : rank + 1])
assert both.keys() == alone.keys()
for key, gradient in alone.items():
    torch.testing.assert_close(both[key], gradient, rtol=1e-4, atol=1e-6)
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # gloo's threads may still run when the interpreter ends, which then aborts
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize(("kind", "statistics"), [("ddp", "learned"), ("fsdp2", "stored")])
def test_wrapped_models_have_the_gradients_of_one_process(kind: str, statistics: str, tmp_path):
    run_two_ranks(lambda rank: ("-c", PROGRAM, rank, tmp_path / "rendezvous", kind, statistics), tmp_path, 300)
