"""Compares two builds of the package bit by bit: python tests/compare_builds.py OLD NEW [--calls 260]

OLD and NEW are folders from which ``import scatterbrain`` finds a build (a checkout's ``src``, or what ``pip install
--target`` made). Every drawn call runs in both, once for each instruction set that the processor has, and outputs, log
weights and all gradients must be the same bits. Ends with 1 and the calls that differ if they are not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys

SETS = ("avx512_bf16", "avx512", "avx2", "baseline")
SUPPORTS = (
    ("Window", dict(keys=64)),
    ("Window", dict(keys=40, block_q=8)),
    ("Window", dict(keys=8)),
    ("Routed", dict(keys=64)),
    ("Routed", dict(keys=32, block_q=8)),
    ("Routed", dict(keys=96, block_q=32)),
    ("Routed", dict(keys=64, block_q=1, block_k=8, window=16)),
    ("LSH", dict(keys=32)),
    ("Empty", {}),
    ("Full", {}),
)
LOW_RANKS = ("stored", "stored", "learned", "input", "favor", "hyperbolic", "none")
MODES = ("plain", "plain", "twice", "module", "watched", "autocast")


# -------------------- the calls


def draw(number: int) -> dict:
    """The settings of one call. A call that the package refuses is drawn again."""
    for attempt in range(1000):
        chance = random.Random(1000 * number + attempt)
        support, fields = chance.choice(SUPPORTS)
        low_rank, is_causal, heads = chance.choice(LOW_RANKS), chance.random() < 0.4, chance.choice((1, 2, 4))
        queries = chance.choice((1, 16, 33, 64, 100, 130, 257, 300, 520, 640))
        call = dict(
            support=support,
            fields=fields,
            low_rank=low_rank,
            is_causal=is_causal,
            batch=chance.choice((1, 2)),
            heads=heads,
            kv_heads=chance.choice([h for h in (1, 2, 4) if heads % h == 0]),
            queries=queries,
            keys=queries if chance.random() < 0.7 else chance.choice((0, 1, 40, 150, 600)),
            head_dim=chance.choice((8, 16, 32, 64, 72)),
            value_dim=chance.choice((16, 32, 64)),
            dtype=chance.choice(("float32", "float32", "bfloat16", "float16", "float64")),
            padding=chance.choice(("none", "none", "right", "left", "holes", "all")),
            offset=chance.choice((0, 0, 5, "rows")) if is_causal else 0,
            scale=chance.choice((None, None, 0.2, -0.3)),
            strided=chance.random() < 0.5,
            lse=chance.random() < 0.4,
            mode=chance.choice(MODES),
            seed=number,
        )
        if is_allowed(call):
            return call
    raise RuntimeError(f"call {number}: nothing that is allowed was drawn")


def is_allowed(call: dict) -> bool:
    if call["is_causal"] and (call["support"] == "LSH" or call["low_rank"] == "input"):
        return False
    if call["support"] == "Empty" and call["low_rank"] == "none":
        return False
    if call["mode"] == "module" and call["low_rank"] not in ("stored", "learned", "favor"):
        return False
    return not (call["mode"] == "module" and (call["scale"] or call["keys"] == 0 or call["padding"] == "all"))


def run(call: dict) -> str:
    """A digest of everything that the call returns and of every gradient."""
    import torch

    import scatterbrain as sb

    torch.manual_seed(call["seed"])
    dtype = getattr(torch, call["dtype"])
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    batch, heads, kv_heads, d = call["batch"], call["heads"], call["kv_heads"], call["head_dim"]

    def tokens(h: int, n: int, width: int) -> torch.Tensor:
        if call["strided"]:
            return torch.randn(batch, n, h, width).to(dtype).transpose(1, 2).detach().requires_grad_()
        return torch.randn(batch, h, n, width).to(dtype).requires_grad_()

    query, key = tokens(heads, call["queries"], d), tokens(kv_heads, call["keys"], d)
    value = tokens(kv_heads, call["keys"], call["value_dim"])
    mask = None
    if call["padding"] != "none" and call["keys"]:
        edge, mask = max(1, call["keys"] // 5), torch.zeros(batch, call["keys"], dtype=torch.bool)
        if call["padding"] == "right":
            mask[-1, -edge:] = True
        elif call["padding"] == "left":
            mask[0, :edge] = True
        elif call["padding"] == "holes":
            mask = torch.rand(batch, call["keys"]) < 0.3
        else:
            mask[0] = True
    rank = min(9, d)
    low_rank, statistics, leaves = None, None, [query, key, value]
    if call["low_rank"] in ("stored", "learned", "input"):
        low_rank = sb.Quadratic(rank, call["low_rank"])
    elif call["low_rank"] != "none":
        low_rank = sb.Favor(32, hyperbolic=call["low_rank"] == "hyperbolic")
    if call["low_rank"] == "stored":
        others = torch.randn(1, heads, 200, d), torch.randn(1, kv_heads, 200, d)
        statistics = sb.fit_statistics(*others, rank, scale=call["scale"])
    if call["low_rank"] == "learned":
        shapes = ((heads, rank, d), (heads, d), (heads,), (kv_heads, rank, d), (kv_heads, d))
        fields = [(torch.randn(s, dtype=accumulate) * d**-0.5).requires_grad_() for s in shapes]
        statistics, leaves = sb.Projections(*fields), leaves + fields
    support = getattr(sb, call["support"])(**call["fields"])
    if call["support"] == "Full":
        statistics = None
        leaves = leaves[:3]
    offset = torch.arange(batch) * 7 if call["offset"] == "rows" else call["offset"]
    masks = dict(key_padding_mask=mask, is_causal=call["is_causal"], query_offset=offset, return_lse=call["lse"])
    mode = call["mode"]

    def compute() -> object:
        if mode != "module":
            return sb.attention(
                query, key, value, support, low_rank, scale=call["scale"], statistics=statistics, **masks
            )
        torch.manual_seed(call["seed"])
        module = sb.ScatterbrainAttention(heads, d, kv_heads, support, low_rank)
        if call["low_rank"] == "stored":
            with sb.calibrate(module), torch.no_grad():
                module(query, key, value, key_padding_mask=mask, is_causal=call["is_causal"])
        leaves[3:] = list(module.parameters())
        return module(query, key, value, **masks)

    if mode == "twice":
        compute()
    if mode == "watched":
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False):
            results = compute()
    elif mode == "autocast" and dtype != torch.float64:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results = compute()
    else:
        results = compute()
    results = list(results) if isinstance(results, tuple) else [results]
    weights = [torch.randn(r.shape, dtype=torch.float64).to(r.dtype) for r in results]
    if len(results) == 2:  # rows without weight have a log of -inf, whose gradient is nothing
        weights[1] = torch.where(torch.isfinite(results[1]), weights[1], 0)
    gradients = torch.autograd.grad(results, leaves, weights, allow_unused=True, materialize_grads=True)
    digest = hashlib.sha256()
    for tensor in (*results, *gradients):
        digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        flat = tensor.detach().clone(memory_format=torch.contiguous_format).flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# -------------------- two builds


def work(calls: int) -> None:
    """What runs in a process of its own: the digest of every call, a line each."""
    import torch

    torch.set_num_threads(1)
    for number in range(calls):
        call = draw(number)
        try:
            digest = run(call)
        except (RuntimeError, TypeError, ValueError) as error:  # refused alike by both builds, or a difference
            digest = f"{type(error).__name__}: {error}"
        print(json.dumps([digest, call]), flush=True)


def digests(folder: str, instruction_set: str, calls: int) -> list:
    environment = {**os.environ, "PYTHONPATH": folder, "SCATTERBRAIN_ISA": instruction_set, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, os.path.abspath(__file__), "--work", str(calls)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{folder} with {instruction_set}:\n{done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def available_sets(folder: str) -> list[str]:
    def runs(name: str) -> bool:
        environment = {**os.environ, "PYTHONPATH": folder, "SCATTERBRAIN_ISA": name, "PYTHONSAFEPATH": "1"}
        return subprocess.run([sys.executable, "-c", "import scatterbrain"], env=environment, capture_output=True,
                              check=False).returncode == 0  # fmt: skip

    return [name for name in SETS if runs(name)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", nargs="?", help="folder of the build before")
    parser.add_argument("new", nargs="?", help="folder of the build to judge")
    parser.add_argument("--calls", type=int, default=260, help="drawn calls, the same every time (default 260)")
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work is not None:
        work(arguments.work)
        return 0
    if arguments.old is None or arguments.new is None:
        parser.error("expected two folders, OLD and NEW")
    failures = 0
    for instruction_set in available_sets(arguments.old):
        old, new = (digests(folder, instruction_set, arguments.calls) for folder in (arguments.old, arguments.new))
        refused = sum(":" in digest for digest, _ in old)
        different = [(a, b, call) for (a, call), (b, _) in zip(old, new, strict=True) if a != b]
        failures += len(different)
        print(f"{instruction_set}: {len(old) - len(different)} of {len(old)} calls equal, {refused} refused by both")
        for a, b, call in different[:5]:
            print(f"  {call}\n    old {a}\n    new {b}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
