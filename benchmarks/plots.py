"""Pictures of results: perplexity against pruning ratio per method, speed against ratio. Needs matplotlib."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from math import nan
from pathlib import Path
from statistics import mean
from typing import Any

from hf_adaprune.errors import MissingDependencyError

from .groups import Row, groups_of
from .results import PLACE, read_results

__all__ = ["plot_all"]

MARKERS = "osD^v<>PX*hd"
HIGHEST = 50  # times the dense perplexity


def plot_all(results: Path, output: Path) -> list[Path]:
    """Draw what there are results for: per group of rows that were measured alike, one per text and one of speed.

    Args:
        results (`Path`): folder of the experiments' results.
        output (`Path`): folder of the pictures, which is made where it is missing.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "pictures need matplotlib, which the extra `report` brings: pip install 'hf_adaprune[report]'."
        ) from error
    output.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    if results == PLACE:  # what was measured by benchmarks/training.py is beside the experiments' results
        written.append(
            _training(results.parent / "training.json", Figure(figsize=(9, 4), layout="constrained"), output)
        )
    groups = groups_of(read_results(results / "quality.json"))
    for group in groups:
        for text in group.protocol["report"]:
            curves = _curves(group.rows, text)
            if not curves:  # nothing is cut yet
                continue
            figure = Figure(figsize=(7, 4.5), layout="constrained")
            axes = figure.subplots()
            # Ten colours do not do, so markers differ too.
            ratios, lines = _lines(curves)
            for (label, values), marker in zip(lines.items(), itertools.cycle(MARKERS), strict=False):
                axes.plot(ratios, values, marker=marker, label=label)
            axes.set(xlabel="decoder parameters removed", ylabel=f"perplexity, {text}", yscale="log")
            dense = min(value for points in curves.values() for value in points.values())
            axes.set_ylim(0.9 * dense, HIGHEST * dense)  # what is worse speaks no language any more
            axes.legend(fontsize="small")
            if len(groups) > 1:
                axes.set_title(group.title, fontsize="x-small", wrap=True)
            written.append(_free(output, f"quality_{group.protocol['model']['name']}_{text}", written))
            figure.savefig(written[-1], dpi=150)
    groups = groups_of(read_results(results / "speed.json"))
    for group in groups:
        rows = [row for row in group.rows if row["status"] == "done"]
        if not rows:
            continue
        figure = Figure(figsize=(9, 4), layout="constrained")
        for axes, kind in zip(figure.subplots(1, 2), ("prefill", "decode"), strict=True):
            for label in dict.fromkeys(row["label"] for row in rows):
                own = sorted((row["ratio"], row["speed"][kind]["gain"]) for row in rows if row["label"] == label)
                axes.plot(*zip((0.0, 1.0), *own, strict=True), marker="o", label=label)
            ideal = sorted((row["pruning_ratio"], row["speed"][kind]["ideal"]) for row in rows)
            axes.plot(*zip((0.0, 1.0), *ideal, strict=True), "k:", label="ideal")
            axes.set(xlabel="decoder parameters removed", ylabel=f"{kind}, times the dense model")
        axes.legend(fontsize="small")
        if len(groups) > 1:
            figure.suptitle(group.title, fontsize="x-small", wrap=True)
        written.append(_free(output, "speed", written))
        figure.savefig(written[-1], dpi=150)
    return written


def _free(output: Path, name: str, written: Sequence[Path]) -> Path:
    """A picture's file, numbered where another group has the name."""
    name = name.replace(" ", "_")
    numbered = (output / f"{name}_{number}.png" for number in itertools.count(2))
    return next(path for path in itertools.chain([output / f"{name}.png"], numbered) if path not in written)


def _training(file: Path, figure: Any, output: Path) -> Path:
    """Loss while training, by tokens; cuts are grey lines."""
    rows = json.loads(file.read_text())["rows"]
    names = {"once": "one cut, then training", "progressive": "cuts while training"}
    for axes, text in zip(figure.subplots(1, 2), rows[0]["curves"], strict=True):
        for row in rows:
            how, ratio, *_ = row["run"].split(":")
            steps, losses = zip(*row["curves"][text], strict=True)
            share = row["tokens"] / steps[-1] / 1000
            axes.plot([step * share for step in steps], losses, marker="o", label=f"{names[how]}, {float(ratio):.0%}")
            for cut in row.get("cuts", ()):
                axes.axvline(cut["step"] * share, color="0.8", linewidth=0.8, zorder=0)
        axes.set(xlabel="thousand training tokens", ylabel=f"loss on selection text, {text}")
    axes.legend(fontsize="small")
    path = output / "training.png"
    figure.savefig(path, dpi=110)
    return path


def _lines(curves: dict[str, dict[float, float]]) -> tuple[list[float], dict[str, list[float]]]:
    """All ratios, and every curve's values at them, the best at its largest ratio first.

    Where a curve lacks a ratio that others have, its line breaks: it would state what nobody measured.
    """
    ratios = sorted({ratio for points in curves.values() for ratio in points})
    best = sorted(curves, key=lambda label: curves[label][max(curves[label])])
    return ratios, {label: [curves[label].get(ratio, nan) for ratio in ratios] for label in best}


def _curves(rows: Sequence[Row], text: str) -> dict[str, dict[float, float]]:
    """Mean perplexity over seeds, by label and measured ratio; the dense one begins every curve."""
    values: dict[str, dict[float, list[float]]] = {}
    for row in (row for row in rows if row["status"] == "done"):
        own = values.setdefault(row["label"], {})
        own.setdefault(row["ratio"], []).append(row["results"][text]["perplexity"]["value"])
    dense = values.pop("dense", {})
    return {label: {ratio: mean(own) for ratio, own in {**dense, **points}.items()} for label, points in values.items()}
