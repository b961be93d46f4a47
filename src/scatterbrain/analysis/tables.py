"""Comparisons as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scatterbrain.analysis.comparison import Comparison, Figures, LayerComparison
    from scatterbrain.analysis.tuning import Tuning
    from scatterbrain.supports import Support


def comparison_tables(comparison: Comparison) -> str:
    """A table of the layers and one of each configuration."""
    layers, names = comparison.layers, comparison.configurations()
    labels = short_labels([layer.path for layer in layers])
    lines = [
        f"{comparison.model}: {len(layers)} attention calls; statistics fitted on {comparison.fitted_on}",
        "error against exact attention, its times faster beside it; lowest to highest head group in brackets",
        "",
    ]
    rows = [["layer", "tokens", "entropy", *names]]
    for label, layer in zip(labels, layers):
        rows.append([label, tokens_of(layer), spread(layer.entropy, ".1f"), *(result(layer, n) for n in names)])
    rows.append(["all", "", "", *(total(comparison, name) for name in names)])
    lines += aligned(rows)
    lines += [
        "",
        "share of the softmax weights in the lists, and share of the weight that the low-rank part carries",
        "",
    ]
    rows = [["layer", *names]]
    for label, layer in zip(labels, layers):
        rows.append([label, *(shares(layer.figures.get(name)) for name in names)])
    lines += aligned(rows)
    ran = {f"{name} in cross-attention: {f.ran}" for layer in layers for name, f in layer.figures.items() if f.ran}
    lines += [""] * bool(ran) + sorted(ran)
    itself = [layer.path for layer in layers if layer.is_fitted_on_itself]
    if itself and len(itself) < len(layers):
        lines += ["", f"fitted on the measured tokens, since they did not run on the other batch: {', '.join(itself)}"]
    lines += left_out(comparison.left)
    notes = {f"{name}: {f.note}" for layer in layers for name, f in layer.figures.items() if f.note}
    return "\n".join([*lines, *([""] + [f"not measured: {note}" for note in sorted(notes)] if notes else [])])


def tuning_table(tuning: Tuning) -> str:
    """The decisions, layer by layer, and what they come to beside exact attention and the best single pair."""
    chosen = tuning.chosen
    lines = [f"{tuning.model}: {tuning.bound}", ""]
    rows = [["layer", "support", "low-rank part"]]
    for label, (support, low_rank) in zip(short_labels(list(chosen.pairs)), chosen.pairs.values()):
        rows.append(
            [label, "exact" if support.is_full else support_text(support), "" if support.is_full else str(low_rank)]
        )
    lines += [*aligned(rows), *left_out(tuning.left), ""]
    rows = [["", "error", "on held-out batches", "attention, ms", "times faster"]]
    for name, step in (("exact", tuning.steps[0]), ("layer by layer", chosen), ("one pair for all", tuning.uniform)):
        if step is None:
            rows.append([f"{name}: none keeps the bound", "-", "-", "-", "-"])
            continue
        faster = tuning.exact_seconds / step.seconds
        rows.append([name, f"{step.error:.4f}", f"{step.held_out:.4f}", f"{1e3 * step.seconds:.2f}", f"{faster:.2f}"])
    lines += aligned(rows)
    if tuning.uniform is not None:
        pairs = [f"{s}, {k}" if not s.is_full else "exact attention" for s, k in tuning.uniform.pairs.values()]
        lines.append(
            f"the one pair: {', which is '.join(dict.fromkeys(pairs))}{' in cross-attention' * (len(set(pairs)) > 1)}"
        )
        if tuning.uniform is chosen:
            lines.append("it was chosen: of what was measured layer by layer nothing that keeps the bound is faster")
    return "\n".join(lines)


def left_out(left: Mapping[str, str]) -> list[str]:
    """What was not looked at, a line for every reason, behind an empty one; nothing where that is nothing."""
    by_reason: dict[str, list[str]] = {}
    for path, reason in left.items():
        by_reason.setdefault(reason, []).append(path or "the model")
    lines = [f"not looked at: {', '.join(paths)}: {reason}" for reason, paths in by_reason.items()]
    return ["", *lines] if lines else []


def tokens_of(layer: LayerComparison) -> str:
    """Without padding, fewest and most of a batch row where rows differ."""
    kind = "causal" if layer.is_causal else ""
    counts = layer.counted_queries, layer.counted_keys
    queries, keys = (str(low) if low == high else f"{low}-{high}" for low, high in counts)
    count = queries if layer.queries == layer.keys and queries == keys else f"{queries} to {keys}"
    return f"{count} {kind}".strip()


def result(layer: LayerComparison, name: str) -> str:
    figures = layer.figures.get(name)
    if figures is None or figures.note:
        return "-"
    return f"{spread(figures.error, '.3f')} {layer.exact_seconds / figures.seconds:.1f}x"


def support_text(support: Support) -> str:
    """A support in one line; of a number of keys for every head, the range and the mean."""
    keys = getattr(support, "keys", None)
    if not isinstance(keys, tuple):
        return str(support)
    return str(support).replace(str(keys), f"{min(keys)} to {max(keys)} by head, mean {sum(keys) / len(keys):.0f}")


def total(comparison: Comparison, name: str) -> str:
    error = comparison.error(name)
    return "-" if error is None else f"{error:.3f} {comparison.times_faster(name):.1f}x"


def shares(figures: Figures | None) -> str:
    if figures is None or figures.note:
        return "-"
    return f"{spread(figures.in_lists, '.2f')} {spread(figures.low_rank, '.2f')}"


def spread(values: Sequence[float], form: str) -> str:
    """Mean, with lowest and highest where they differ as shown."""
    mean, low, high = (f"{v:{form}}" for v in (sum(values) / len(values), min(values), max(values)))
    return mean if low == high else f"{mean} [{low} {high}]"


def short_labels(paths: Sequence[str]) -> list[str]:
    """Paths without what all of them begin and end with; calls of one layer are numbered."""
    parts = [path.split(".") for path in paths]
    begin = end = 0
    if len(set(paths)) > 1:
        while len({tuple(p[: begin + 1]) for p in parts}) == 1:
            begin += 1
        while len({tuple(p[len(p) - end - 1 :]) for p in parts}) == 1:
            end += 1
    labels = [".".join(p[begin : len(p) - end]) or path for p, path in zip(parts, paths)]
    seen: dict[str, int] = {}
    for i, label in enumerate(labels):
        seen[label] = seen.get(label, 0) + 1
        labels[i] = label if labels.count(label) == 1 and seen[label] == 1 else f"{label} call {seen[label]}"
    return labels


def aligned(rows: list[list[str]]) -> list[str]:
    """Columns as wide as they need; the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]
