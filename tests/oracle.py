"""What the tests of the operator share: drawn cases, errors by row, and the tolerance of the parity table."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

import scatterbrain as sb
from scatterbrain.padding import padding_info
from scatterbrain.reference import log_kernel, visible


@dataclass
class Case:
    """One drawn call of the operator: everything that shapes it, and the tensors made from its seed."""

    support: object
    low_rank: object
    batch: int = 2
    q_heads: int = 2
    kv_heads: int = 2
    queries: int = 64
    keys: int = 64
    head_dim: int = 16
    value_dim: int = 16
    is_causal: bool = False
    padding: str = "none"
    query_offset: object = 0
    scale: float | None = None
    dtype: torch.dtype = torch.float32
    strided: bool = False
    seed: int = 0
    query: torch.Tensor = field(init=False)
    key: torch.Tensor = field(init=False)
    value: torch.Tensor = field(init=False)
    arguments: dict = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def tokens(heads: int, n: int, width: int) -> torch.Tensor:
            t = torch.randn(self.batch, heads, n, width, generator=generator).to(self.dtype)
            if self.strided:  # (batch, tokens, heads, width) memory, as projections of a model leave it
                t = t.transpose(1, 2).contiguous().transpose(1, 2)
            return t

        self.query, self.key = (
            tokens(self.q_heads, self.queries, self.head_dim),
            tokens(self.kv_heads, self.keys, self.head_dim),
        )
        self.value = tokens(self.kv_heads, self.keys, self.value_dim)
        mask = None
        if self.padding != "none" and self.keys:
            mask = torch.zeros(self.batch, self.keys, dtype=torch.bool)
            edge = max(1, self.keys // 5)
            if self.padding in ("right", "both"):
                mask[-1, -edge:] = True
            if self.padding in ("left", "both"):
                mask[0, :edge] = True
            if self.padding == "holes":
                mask = torch.rand(self.batch, self.keys, generator=generator) < 0.3
            if self.padding == "all":
                mask[0] = True
        statistics = None
        if isinstance(self.low_rank, sb.Quadratic):
            if self.low_rank.statistics == "stored":  # other tokens of the same distribution
                others = [
                    torch.randn(1, h, 200, self.head_dim, generator=generator) for h in (self.q_heads, self.kv_heads)
                ]
                statistics = sb.fit_statistics(*others, self.low_rank.rank, scale=self.scale)
            elif self.low_rank.statistics == "learned":  # near the start of training
                r, d = self.low_rank.rank, self.head_dim
                draw = lambda *shape: torch.randn(*shape, generator=generator) * d**-0.5  # noqa: E731
                statistics = sb.Projections(
                    draw(self.q_heads, r, d),
                    draw(self.q_heads, d),
                    draw(self.q_heads),
                    draw(self.kv_heads, r, d),
                    draw(self.kv_heads, d),
                )
        self.arguments = dict(
            low_rank=self.low_rank,
            key_padding_mask=mask,
            is_causal=self.is_causal,
            scale=self.scale,
            statistics=statistics,
            query_offset=self.query_offset,
        )
        if isinstance(self.support, (sb.Routed, sb.LSH)):  # parity is judged at fixed lists
            self.support = sb.route(self.query, self.key, self.support, **self.arguments)

    def run(self, function, precision: torch.dtype, **extra) -> list[torch.Tensor]:
        """[out, dq, dk, dv and the gradients of learned projections] of ``function`` on copies in ``precision``, for
        one fixed output gradient."""
        leaves = [t.detach().to(precision).requires_grad_() for t in (self.query, self.key, self.value)]
        arguments = dict(self.arguments)
        if isinstance(arguments["statistics"], sb.Projections):
            p = arguments["statistics"]
            accumulate = torch.float64 if precision == torch.float64 else torch.float32
            fields = [
                t.detach().to(accumulate).requires_grad_()
                for t in (p.query_projection, p.query_bias, p.query_log_scale, p.key_projection, p.key_bias)
            ]
            arguments["statistics"] = sb.Projections(*fields)
            leaves += fields
        out = function(*leaves[:3], self.support, **arguments, **extra)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(self.seed + 1), dtype=torch.float64).to(
            self.dtype
        )
        gradients = torch.autograd.grad(out, leaves, grad.to(out.dtype), allow_unused=True, materialize_grads=True)
        return [out.detach(), *gradients]

    def low_rank_share(self) -> float:
        """The largest share that L of all keys a query sees, before the support is subtracted, is of the query's
        normaliser."""
        if self.low_rank is None or not self.queries or not self.keys:
            return 0.0
        q, k, v = (t.double() for t in (self.query, self.key, self.value))
        arguments = {n: a for n, a in self.arguments.items() if n not in ("low_rank", "scale", "statistics")}
        rows = padding_info(q, k, arguments["key_padding_mask"], None, self.query_offset)
        q = q if rows.query_mask is None else q.masked_fill(rows.query_mask[:, None, :, None], 0)
        k = k if rows.key_mask is None else k.masked_fill(rows.key_mask[:, None, :, None], 0)
        scale = self.scale if self.scale is not None else self.head_dim**-0.5
        exponent, factor = log_kernel(
            q, k, self.low_rank, self.arguments["statistics"], scale, rows.key_mask, rows.query_mask
        )
        _, lse = sb.reference.attention(
            self.query.double(), self.key.double(), self.value.double(), self.support, return_lse=True, **self.arguments
        )
        seen = visible(q, k, **arguments)
        weight = torch.where(seen & torch.isfinite(lse)[..., None], torch.exp(exponent - lse[..., None]) * factor, 0)
        return float(weight.sum(-1).max())


def row_error(got: torch.Tensor, want: torch.Tensor, floor: float = 1e-3) -> float:
    """The largest error of a row (last dimension), relative to max(its norm, ``floor`` of the mean row norm). Where the
    gradient is zero but for rounding (a softmax over one key) there is nothing to be relative to, and the error counts
    as it is."""
    if want.numel() == 0:
        return 0.0
    got, want = got.double(), want.double()
    if want.dim() == 1:
        got, want = got[:, None], want[:, None]
    norm = want.norm(dim=-1)
    base = torch.maximum(norm, floor * norm.mean()) if float(norm.mean()) > 1e-10 else torch.ones_like(norm)
    return float(((got - want).norm(dim=-1) / base).max())
