"""Queries, keys and values to measure on: random ones with structure, or real ones from a file."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import scatterbrain as sb

TOPICS, STAY, SMOOTH = 16, 0.97, 0.95


@dataclass
class Inputs:
    """query (B, H, N, d), key and value (B, Hkv, N, d), and statistics from other tokens of the same kind."""

    query: Tensor
    key: Tensor
    value: Tensor
    statistics: sb.Statistics
    fitted_on: str

    def to(self, dtype: torch.dtype, device: torch.device) -> Inputs:
        tensors = (t.to(device, dtype) for t in (self.query, self.key, self.value))
        return Inputs(*tensors, self.statistics.to(device), self.fitted_on)

    def clone(self) -> Inputs:
        """The same in other memory."""
        return Inputs(self.query.clone(), self.key.clone(), self.value.clone(), self.statistics, self.fitted_on)

    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.query, self.key, self.value))


def random_inputs(
    batch: int, heads: int, kv_heads: int, tokens: int, head_dim: int, rank: int, seed: int = 0
) -> Inputs:
    """Gaussian tokens with what sparse + low-rank attention lives on: topics that come back, neighbours that resemble
    each other, a spectrum that decays. Statistics are fitted on 2048 other tokens from the same source."""
    source = _Source(heads, kv_heads, head_dim, torch.Generator().manual_seed(seed))
    fitted = sb.fit_statistics(*source.draw(1, 2048)[:2], rank)
    return Inputs(*source.draw(batch, tokens), fitted, "other tokens of the same source")


class _Source:
    def __init__(self, heads: int, kv_heads: int, head_dim: int, generator: torch.Generator) -> None:
        self.kv_heads, self.group, self.generator = kv_heads, heads // kv_heads, generator
        self.head_dim = head_dim
        self._strength: float | None = None
        self.topics = self._normal(kv_heads, TOPICS, head_dim)
        decay = torch.arange(1, head_dim + 1).float() ** -0.5
        self.spectrum = decay / decay.square().mean().sqrt()

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def draw(self, batch: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        shape = (batch, self.kv_heads, tokens)
        jumps = torch.rand(shape, generator=self.generator) > STAY
        jumps[..., 0] = True
        chosen = torch.randint(TOPICS, shape, generator=self.generator)
        last_jump = torch.where(jumps, torch.arange(tokens), 0).cummax(-1).values
        topic = torch.gather(chosen, -1, last_jump)
        heads = torch.arange(self.kv_heads)[None, :, None]
        latent = self.topics[heads, topic] + self._smooth(*shape, self.head_dim)
        key = (latent + 0.5 * self._normal(*latent.shape)) * self.spectrum
        query = latent.repeat_interleave(self.group, 1)
        query = (query + 0.5 * self._normal(*query.shape)) * self.spectrum
        value = latent + self._normal(*latent.shape)
        return query * self.strength(query, key), key * self.strength(query, key), value

    def strength(self, query: Tensor, key: Tensor) -> float:
        """What gives the scores a standard deviation of 2.5, about that of trained models."""
        if self._strength is None:
            some_keys = key[0, :, :2048:8].repeat_interleave(self.group, 0)
            scores = query[0, :, :2048:8] @ some_keys.transpose(-1, -2) * self.head_dim**-0.5
            self._strength = float((2.5 / scores.std()) ** 0.5)
        return self._strength

    def _smooth(self, *shape: int) -> Tensor:
        """A stationary Gaussian walk along the tokens: noise under an exponential kernel, by FFT."""
        noise, tokens = self._normal(*shape), shape[-2]
        kernel = SMOOTH ** torch.arange(tokens).float()
        length = 2 * tokens
        product = torch.fft.rfft(noise, length, dim=-2) * torch.fft.rfft(kernel, length)[:, None]
        return torch.fft.irfft(product, length, dim=-2)[..., :tokens, :] * (1 - SMOOTH**2) ** 0.5


# -------------------- from a file


def file_inputs(path: Path, entry: str | None, tokens: int, heads: int | None, rank: int) -> Inputs:
    """The first ``tokens`` tokens of one entry of a safetensors file.

    An entry is three tensors ``<entry>.q``, ``<entry>.k`` and ``<entry>.v`` of shape (heads, tokens, head_dim) or
    (batch, heads, tokens, head_dim). Statistics come from the entry that :func:`calibration_of` names, where the file
    has its q and k, else from the tokens after the measured ones, if there are 512 or more, else from all tokens.

    Raises:
        ValueError: no such file or entry, or too few tokens.
    """
    found = entries(path)
    entry = entry if entry is not None else found[0]
    if entry not in found:
        raise ValueError(f"{path} has no entry {entry!r}; it has {', '.join(found)}")
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        query, key, value = (read_tokens(file, path, f"{entry}.{part}") for part in "qkv")
        calibration = calibration_of(entry, file.keys())
        others = None
        if calibration is not None:
            others = [read_tokens(file, path, f"{calibration}.{part}") for part in "qk"]
    available = query.shape[2]
    if tokens > available:
        raise ValueError(f"{path}: entry {entry!r} has {available} tokens, too few for a length of {tokens}")
    if heads is not None:
        if heads > query.shape[1] or heads % (query.shape[1] // key.shape[1]):
            raise ValueError(
                f"{path}: entry {entry!r} has {query.shape[1]} query and {key.shape[1]} key heads, got --heads {heads}"
            )
        kv_heads = heads * key.shape[1] // query.shape[1]
        query, key, value = query[:, :heads], key[:, :kv_heads], value[:, :kv_heads]
        others = others and [others[0][:, :heads], others[1][:, :kv_heads]]
    fitted_on = f"entry {calibration}"
    if others is None and available - tokens >= 512:
        others, fitted_on = [query[:, :, tokens:], key[:, :, tokens:]], "the tokens after the measured ones"
    if others is None:
        others, fitted_on = [query, key], "the measured tokens themselves: errors are flattered"
    statistics = sb.fit_statistics(*others, rank)
    query, key, value = (t[:, :, :tokens].contiguous() for t in (query, key, value))
    return Inputs(query, key, value, statistics, fitted_on)


def entries(path: Path) -> list[str]:
    """Names in a safetensors file that have q, k and v.

    Raises:
        ValueError: where the file cannot be read or has none.
    """
    try:
        from safetensors import SafetensorError, safe_open

        with safe_open(path, "pt") as file:
            names = set(file.keys())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {path} as a safetensors file: {error}") from None
    found = sorted(n[:-2] for n in names if n.endswith(".q") and {n[:-2] + ".k", n[:-2] + ".v"} <= names)
    if not found:
        raise ValueError(f"{path}: expected tensors <entry>.q, <entry>.k and <entry>.v, found none")
    return found


def digest_of(path: Path) -> str:
    """What tells a file's content from any other: the beginning of its sha256. A name does not."""
    facts = path.stat()
    return _digest(path.resolve(), facts.st_size, facts.st_mtime_ns, facts.st_ino)


@functools.lru_cache(maxsize=4)
def _digest(path: Path, *_: int) -> str:
    """Kept while the file's facts stay: captured models are large, and every file of results says the digest again."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()[:12]


def tokens_in(path: Path, entry: str) -> int:
    """How many queries an entry has, without reading them."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.get_slice(f"{entry}.q").get_shape()[-2]


def width_in(path: Path, entry: str) -> int:
    """The width of an entry's heads, without reading them."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.get_slice(f"{entry}.q").get_shape()[-1]


def calibration_of(entry: str, names: Collection[str]) -> str | None:
    """The entry whose q and k, among ``names``, statistics of an entry are fitted on: ``.cal`` in place of
    ``.N<tokens>``, of the entry's own model or of the one that it is a further row of (``<model>_<row>``). None without
    one."""
    own = ".".join("cal" if part[:1] == "N" and part[1:].isdigit() else part for part in entry.split("."))
    if own == entry:
        return None
    of_first_row = re.sub(r"_\d+\.cal(?=\.|$)", ".cal", own, count=1)
    return next((name for name in (own, of_first_row) if {f"{name}.q", f"{name}.k"} <= set(names)), None)


def read_tokens(file: Any, path: Path, name: str) -> Tensor:
    """A tensor of an open safetensors file, float32 (batch, heads, tokens, head_dim).

    Raises:
        ValueError: other dimensions, or what is no finite number.
    """
    tokens = file.get_tensor(name)
    if tokens.dim() not in (3, 4):
        raise ValueError(
            f"{path}: {name}: expected a tensor (heads, tokens, head_dim) or (batch, heads, tokens, head_dim), got "
            f"{tuple(tokens.shape)}"
        )
    tokens = (tokens if tokens.dim() == 4 else tokens[None]).float()
    if not bool(tokens.isfinite().all()):
        raise ValueError(f"{path}: {name}: expected finite numbers, got NaN or infinity; capture other inputs")
    return tokens
