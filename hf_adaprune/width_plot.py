"""Pictures of the widths of layers; needs matplotlib, which is loaded when one is drawn."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import ConfigError, MissingDependencyError
from .widths import LayerWidths, Pair

__all__ = ["picture_file", "plot_widths"]

PLOT_SUFFIXES = (".png", ".svg", ".pdf")
_CROSS = "$\\times$"
_DENSE, _KEPT, _GROUPS, _GONE = "#dfe3e8", "#2f6fa7", "#3d8f6d", "#c0392b"


def picture_file(file: str | os.PathLike[str]) -> Path:
    """The file of a picture, once it is sure that one can be drawn into it.

    Args:
        file (`str`): ends in .png, .svg or .pdf.

    Raises:
        ConfigError: another ending.
        MissingDependencyError: matplotlib is not installed.
    """
    target = Path(file)
    if target.suffix.lower() not in PLOT_SUFFIXES:
        raise ConfigError(f"a picture should end in {', '.join(PLOT_SUFFIXES)}. Found {target.name!r}.")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "pictures need matplotlib, which the extra `report` brings: pip install hf_adaprune[report]"
        ) from error
    return target


def plot_widths(layers: Sequence[LayerWidths], file: str | os.PathLike[str], title: str = "") -> Path:
    """Draw what stays of every layer: MLP widths above, KV heads below, the dense widths as outlines behind.

    Args:
        layers (sequence of [`LayerWidths`]): from [`layer_widths`] or a [`Description`].
        file (`str`): ends in .png, .svg or .pdf.
        title (`str`, *optional*): above the picture.

    Raises:
        ConfigError: another ending, or nothing to draw.
        MissingDependencyError: matplotlib is not installed.
    """
    target = picture_file(file)
    if not layers:
        raise ConfigError("there are no layer widths to draw: the model's family is unknown here.")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.4, min(16.0, 2.2 + 0.26 * len(layers))), 4.8), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1.4])
    mixed = any(row.experts for row in layers)
    wide = {row.layer: _volume(row) for row in layers}
    _bars(upper, layers, wide, _KEPT)
    _bars(lower, layers, {row.layer: row.groups for row in layers}, _GROUPS)
    upper.set_ylabel("channels of all experts" if mixed else "MLP channels")
    lower.set_ylabel("KV heads")
    lower.set_xlabel("decoder layer")
    lower.yaxis.get_major_locator().set_params(integer=True)
    step = 1 if len(layers) <= 40 else 5
    lower.set_xticks([row.layer for row in layers if row.layer % step == 0])
    lower.tick_params(axis="x", labelsize=8)
    lower.set_xlim(layers[0].layer - 0.7, layers[-1].layer + 0.7)
    if title:
        figure.suptitle(title, fontsize=11)
    _legend(figure, layers)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)
    return target


def _volume(row: LayerWidths) -> Pair | None:
    if row.channels is None or row.experts is None:
        return row.channels
    return row.experts[0] * row.channels[0], row.experts[1] * row.channels[1]


def _bars(axes: Any, layers: Sequence[LayerWidths], pairs: Mapping[int, Pair | None], colour: str) -> None:
    drawn = {layer: pair for layer, pair in pairs.items() if pair is not None}
    top = max((pair[1] for pair in drawn.values()), default=1)
    numbers = list(drawn)
    axes.bar(numbers, [drawn[n][1] for n in numbers], 0.82, color=_DENSE, edgecolor="#aab2bd", linewidth=0.7)
    gone = {row.layer for row in layers if row.dropped}
    kept = [0 if n in gone else drawn[n][0] for n in numbers]
    axes.bar(numbers, kept, 0.82, color=colour)
    for row in layers:
        pair = drawn.get(row.layer)
        if row.dropped:
            axes.axvspan(row.layer - 0.5, row.layer + 0.5, color=_GONE, alpha=0.16, linewidth=0)
        if row.dropped or (pair is not None and not pair[0]):
            axes.text(row.layer, top / 2, _CROSS, ha="center", va="center", color=_GONE, fontsize=13, fontweight="bold")
    axes.set_ylim(0, top * 1.04)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _legend(figure: Any, layers: Sequence[LayerWidths]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Patch(facecolor=_KEPT, label="MLP kept"),
        Patch(facecolor=_GROUPS, label="KV heads kept"),
        Patch(facecolor=_DENSE, edgecolor="#aab2bd", label="dense"),
    ]
    if any(not row.dropped and 0 in {pair[0] for pair in (row.groups, row.channels) if pair} for row in layers):
        handles.append(Line2D([], [], marker=_CROSS, color=_GONE, linestyle="none", label="sublayer removed"))
    if any(row.dropped for row in layers):
        handles.append(Patch(facecolor=_GONE, alpha=0.3, label="layer removed"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
