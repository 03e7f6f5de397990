"""Tables for people: sizes, the layers of a plan, measurements."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from .plan import PruningPlan
from .widths import LayerWidths, Pair, layer_widths

if TYPE_CHECKING:
    from .pipeline import PruningResult, Sizes
    from .sites import ModelSites

__all__ = ["evaluation_table", "layer_table", "plan_table", "size_table", "size_text", "text_table"]


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A plain table: the first column to the left, the others to the right.

    Args:
        header (sequence of `str`): titles of the columns.
        rows (iterable of sequences of `str`): cells.
    """
    cells = [tuple(header), *map(tuple, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for row in cells:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([first.strip().ljust(widths[0]), *others]).rstrip())
    rule = "  ".join("-" * width for width in widths).rstrip()
    return "\n".join([lines[0], rule, *lines[1:]])


def size_table(before: Sizes, after: Sizes) -> str:
    """Parameters and bytes before and after, and the share removed.

    Args:
        before ([`Sizes`]): of the dense model.
        after ([`Sizes`]): of the pruned one.
    """
    rows = [
        ("decoder layers", f"{before.decoder:,}", f"{after.decoder:,}", _share(after.decoder, before.decoder)),
        ("parameters", f"{before.total:,}", f"{after.total:,}", _share(after.total, before.total)),
        ("bytes", size_text(before.bytes), size_text(after.bytes), _share(after.bytes, before.bytes)),
    ]
    return text_table(("", "dense", "pruned", "removed"), rows)


def plan_table(plan: PruningPlan, sites: ModelSites | None = None, after: Sequence[int] | None = None) -> str:
    """What a plan keeps of every layer, as a table; arguments as in [`layer_widths`]."""
    return layer_table(layer_widths(plan, sites, after))


def layer_table(layers: Sequence[LayerWidths]) -> str:
    """What stays of every layer, with parameters as far as they are known.

    Args:
        layers (sequence of [`LayerWidths`]): by layer.
    """
    mixed = any(row.experts for row in layers)
    known = any(row.before is not None for row in layers)
    sizes = known or any(row.after is not None for row in layers)
    header = ["layer", "query heads", "KV heads", *(["experts", "width"] if mixed else ["MLP width"])]
    header += ["dense", "pruned", "removed"] if known else ["parameters"] if sizes else []
    rows = []
    for row in layers:
        pairs = [row.heads, row.groups, *([row.experts, row.channels] if mixed else [row.channels])]
        cells = [str(row.layer), *("-" if row.dropped else _kept(pair) for pair in pairs)]
        after = 0 if row.dropped else row.after
        if sizes:
            cells += [_number(row.before), _number(after), _share(after, row.before)] if known else [_number(after)]
        rows.append([*cells, "layer removed" if row.dropped else ""])
    if sizes:
        # A sum over rows of which some are unknown would pass for the whole.
        before = sum(row.before or 0 for row in layers) if all(row.before is not None for row in layers) else None
        after = sum(row.after or 0 for row in layers if not row.dropped)
        totals = [_number(before), _number(after), _share(after, before)] if known else [_number(after)]
        rows.append(["all", *[""] * (len(header) - 1 - len(totals)), *totals, ""])
    return text_table([*header, ""], rows)


def evaluation_table(result: PruningResult) -> str:
    """Perplexity on every report source, dense and pruned; empty where nothing was measured.

    Args:
        result ([`PruningResult`]): of a run.
    """
    if not result.evaluation:
        return ""
    rows = []
    for source, pair in result.evaluation.items():
        dense, pruned = pair["dense"], pair["pruned"]
        cells = [f"{value.value:.3f} ± {value.standard_error:.3f}" for value in (dense, pruned)]
        rows.append((source, *cells, f"{pruned.value / dense.value:.3f}", f"{dense.tokens:,}"))
    return text_table(("perplexity", "dense", "pruned", "ratio", "tokens"), rows)


def size_text(count: float) -> str:
    """Bytes as people read them: `1,024.0 MiB`.

    Args:
        count (`float`): bytes.
    """
    return f"{count / 2**20:,.1f} MiB"


def _kept(pair: Pair | None) -> str:
    if pair is None:
        return "-"
    return "removed" if not pair[0] else f"{pair[0]}/{pair[1]}"


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _share(after: int | None, before: int | None) -> str:
    return "-" if after is None or not before else f"{100 * (1 - after / before):.1f} %"
