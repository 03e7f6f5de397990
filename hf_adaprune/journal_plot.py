"""One picture of a search: its trials, what matters, what was chosen, and the front if there is one."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .journal_report import Finalist, JournalSummary, Scale, describe_journal, differences, search_of
from .search.gaussian_process import expand
from .search.journal import Journal, Trial, mean_value
from .width_plot import picture_file

__all__ = ["plot_journal"]

_GREY, _INK, _WINNER = "#c9ced6", "#33383f", "#c0392b"
_Z = 1.2816  # of the central 80 % of a normal distribution
_COLOURS = {
    "default": "#33383f", "warm": "#8e6bb0", "gp": "#2f6fa7", "sobol": "#7f8c99", "random": "#9a8f7a",
    "tpe": "#b0762c", "predictor": "#3d8f6d", "evolution": "#a8558a",
}  # fmt: skip
_BARS = 14  # dimensions drawn at most


def plot_journal(journal: Journal, path: str | os.PathLike[str]) -> Path:
    """Draw a search: its trials, what matters, what was chosen, and the front if there is one.

    Args:
        journal ([`Journal`]): finished or not.
        path (`str`): ends in .png, .svg or .pdf.

    Returns:
        `Path`: the file.

    Raises:
        ConfigError: another ending, or no measured trial.
        MissingDependencyError: matplotlib is not installed.
    """
    target = picture_file(path)
    if not differences(journal):
        raise ConfigError("there is no measured trial to draw yet.")
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    summary = describe_journal(journal)
    panels = [
        draw for draw in (_draw_importance, _draw_mixtures, _draw_depth, _draw_front) if draw(None, journal, summary)
    ]
    rows = -(-len(panels) // 2)
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, hspace=0.06, wspace=0.05)
    figure = Figure(figsize=(12.5, 4.6 + 3.9 * rows), layout=layout)
    grid = figure.add_gridspec(rows + 1, 2, height_ratios=[1.15, *[1.0] * rows])
    _draw_trials(figure, grid[0, :], journal, summary)
    for number, draw in enumerate(panels):
        alone = number == len(panels) - 1 and number % 2 == 0
        draw(
            figure.add_subplot(grid[1 + number // 2, :] if alone else grid[1 + number // 2, number % 2]),
            journal,
            summary,
        )
    figure.suptitle(_title(summary), fontsize=12.5, fontweight="bold", color=_INK)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)
    return target


def _title(summary: JournalSummary) -> str:
    objective = {"kl": "KL to the dense model", "accuracy": "1 - accuracy"}.get(summary.facts["objective"])
    parts = [f"{summary.trials} trials", objective or summary.facts["objective"] or "objective"]
    final = next((f for f in summary.finalists if f.number == summary.winner), None)
    if summary.front:
        parts.append(f"front of {len(summary.front)} plans")
    elif summary.winner == 0:
        parts.append("nothing beat the config itself")
    elif final is not None and final.difference is not None:
        said = summary.scale.said(final.difference)
        parts.append(f"winner: trial {final.number}, {said} on fresh text")
    elif summary.best:
        assert summary.best_difference is not None
        parts.append(f"best so far: trial {summary.best}, {summary.scale.said(summary.best_difference)}")
    else:
        parts.append("nothing better than the config itself so far")
    return "  ·  ".join(parts)


def _plain(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=10.5, loc="left", color=_INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=8.5)


def _interval(trial: Trial, scale: Scale) -> tuple[float, float]:
    """The 80 % prediction interval as it is shown."""
    assert trial.predicted is not None
    mean, deviation = trial.predicted
    ends = [mean - _Z * deviation, mean + _Z * deviation]
    if trial.strategy == "gp" and scale.logarithmic:  # which predicts squeezed differences
        ends = [expand(end) for end in ends]
    return scale.value(ends[0]), scale.value(ends[1])


def _limits(values: Sequence[float], lows: Sequence[float]) -> tuple[float, float]:
    """An axis for most values: a few hopeless candidates must not flatten the others."""
    low, highest = min([0.0, *lows]), max([0.0, *values])
    above = sorted(value for value in values if value > 0)
    usual = 2 * above[len(above) // 8] if above else 0.0
    many = sum(value < 0 for value in values) > 3
    high = min(highest, -4 * low if many else max(-4 * low, usual))
    room = 0.07 * (high - low) or 1.0
    return low - room, high + 1.5 * room


def _draw_trials(figure: Any, place: Any, journal: Journal, summary: JournalSummary) -> None:
    scale, known = summary.scale, differences(journal)
    estimates = {trial.number: entry for trial, entry in known}
    shown = {number: scale.value(entry.value) for number, entry in estimates.items()}
    finals = [] if summary.front else [f for f in summary.finalists if f.difference and math.isfinite(f.value)]
    lows = [shown[number] - _known(scale.error(entry)) for number, entry in estimates.items()]
    lows += [scale.value(f.difference.value) - _known(scale.error(f.difference)) for f in finals if f.difference]
    low, high = _limits(list(shown.values()), lows)
    most = max(trial.windows for trial, _ in known)
    ratios = [7.2, max(1.0, 0.26 * len(finals))]
    inner = place.subgridspec(1, 2, width_ratios=ratios, wspace=0.03) if finals else None
    axes = figure.add_subplot(place if inner is None else inner[0, 0])
    axes.axhline(0, color=_GREY, linewidth=1, zorder=0)
    keys: dict[str, Any] = {}
    for trial in journal.trials:
        colour = _COLOURS.get(trial.strategy, _INK)
        hollow = trial.answered_by is not None
        inside = "white" if hollow else colour
        if trial.number not in shown:
            keys["failed"] = axes.plot(trial.number, 0.03, "x", color=_WINNER, transform=axes.get_xaxis_transform())[0]
            continue
        keys["answered from the journal" if hollow else trial.strategy] = _dot(colour, inside)
        if trial.predicted is not None:
            first, last = (min(end, 3 * high) for end in _interval(trial, scale))
            style = {"color": colour, "alpha": 0.16, "linewidth": 5, "zorder": 1}
            keys["predicted (80 %)"] = axes.vlines(trial.number, first, last, **style)
        if shown[trial.number] > high:
            continue
        error = scale.error(estimates[trial.number])
        style = {"color": colour, "markerfacecolor": inside, "alpha": 0.38 if trial.windows < most else 1.0}
        spread = None if math.isnan(error) else error
        axes.errorbar(trial.number, shown[trial.number], yerr=spread, fmt="o", markersize=5.5, linewidth=1.1, **style)
    if any(trial.windows < most for trial, _ in known):
        keys["few windows"] = _dot(_INK, _INK, 0.38)
    beyond = [number for number, value in shown.items() if value > high]
    if beyond:
        colours = [_COLOURS.get(journal.trials[number].strategy, _INK) for number in beyond]
        said = f"above (up to {f'{max(shown.values()):+,.0f} {scale.unit}'.strip()})"
        style = {"s": 30, "alpha": 0.6, "zorder": 4, "transform": axes.get_xaxis_transform()}
        keys[said] = axes.scatter(beyond, [0.975] * len(beyond), marker="^", c=colours, **style)
    if search_of(journal).get("pareto") is None:  # whose trials differ in size, so that none is the best
        steps = _best_so_far(journal, shown, most)
        style = {"color": _WINNER, "linewidth": 1.4, "alpha": 0.8, "zorder": 2}
        keys["best so far"] = axes.step(*zip(*steps, strict=True), where="post", **style)[0]
        if summary.winner and shown.get(summary.winner, math.inf) <= high:
            ring = {"markersize": 12, "markerfacecolor": "none", "markeredgecolor": _WINNER, "markeredgewidth": 1.6}
            keys["winner"] = axes.plot(summary.winner, shown[summary.winner], "o", zorder=5, **ring)[0]
    axes.set_ylim(low, high + 0.1 * (high - low))
    axes.set_xlim(-0.8, max(1, len(journal.trials) - 1) + 0.8)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("trial", fontsize=9)
    axes.set_ylabel(f"difference to trial 0{f', {scale.unit}' if scale.unit else ''}\n(lower is better)", fontsize=9)
    _plain(axes, "")
    names = [*(name for name in _COLOURS if name in keys), *(name for name in keys if name not in _COLOURS)]
    axes.legend(
        [keys[name] for name in names], names, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=6, frameon=False,
        fontsize=8.5, columnspacing=1.3, handletextpad=0.4, borderaxespad=0.2,
    )  # fmt: skip
    if inner is not None:
        _draw_finals(figure.add_subplot(inner[0, 1], sharey=axes), finals, summary)


def _known(error: float) -> float:
    return 0.0 if math.isnan(error) else error


def _dot(colour: str, inside: str, alpha: float = 1.0) -> Any:
    from matplotlib.lines import Line2D

    style = {"color": colour, "markerfacecolor": inside, "alpha": alpha}
    return Line2D([], [], marker="o", linestyle="none", markersize=5.5, **style)  # type: ignore[arg-type]


def _draw_finals(axes: Any, finals: Sequence[Finalist], summary: JournalSummary) -> None:
    axes.axhline(0, color=_GREY, linewidth=1, zorder=0)
    for place, final in enumerate(finals):
        assert final.difference is not None
        won = final.number == summary.winner
        colour = _WINNER if won else _COLOURS.get(final.strategy, _INK)
        value, error = summary.scale.value(final.difference.value), summary.scale.error(final.difference)
        spread = None if math.isnan(error) else error
        axes.errorbar(place, value, yerr=spread, fmt="D", markersize=7 if won else 5.5, color=colour, linewidth=1.3)
    axes.set_xticks(range(len(finals)), [str(final.number) for final in finals])
    axes.set_xlim(-0.7, len(finals) - 0.3)
    axes.tick_params(axis="y", labelleft=False, length=0)
    axes.set_xlabel("finalist", fontsize=9)
    _plain(axes, "on fresh text")
    axes.spines["left"].set_visible(False)


def _best_so_far(journal: Journal, shown: Mapping[int, float], most: int) -> list[tuple[int, float]]:
    """Steps of the best among the trials that saw the most windows, as the search chooses it."""
    steps: list[tuple[int, float]] = []
    for trial in journal.trials:
        if trial.number in shown and trial.windows == most and (not steps or shown[trial.number] < steps[-1][1]):
            steps.append((trial.number, shown[trial.number]))
    return [*steps, (len(journal.trials) - 1, steps[-1][1])]


def _draw_importance(axes: Any, journal: Journal, summary: JournalSummary) -> bool:
    """Bars of what matters; of single sites where only allocations were refined."""
    found = summary.importance or {name: abs(rho) for name, rho in summary.correlation.items()}
    found = found or summary.layers
    if axes is None or not found:
        return bool(found)
    ranked = sorted(found.items(), key=lambda entry: -entry[1])[:_BARS]
    names = [
        name.replace("calibration.", "").replace("importance.", "").replace("allocation.", "") for name, _ in ranked
    ]
    places = list(range(len(ranked)))[::-1]
    axes.barh(places, [share for _, share in ranked], 0.7, color="#2f6fa7")
    if summary.importance:
        other = axes.twiny()
        rho = [abs(summary.correlation.get(name, 0.0)) for name, _ in ranked]
        other.plot(rho, places, "|", color=_INK, markersize=9, markeredgewidth=1.6)
        other.set_xlim(0, 1)
        other.tick_params(labelsize=8)
        other.set_xlabel("marks: Spearman |rho|", fontsize=8.5)
        other.spines["right"].set_visible(False)
    axes.set_yticks(places, names)
    axes.set_ylim(-0.6, len(ranked) - 0.4)
    said = "share of inverse lengthscales of the Gaussian process" if summary.importance else "Spearman |rho|"
    axes.set_xlabel(said if summary.correlation else "importance in the predictor's trees", fontsize=9)
    _plain(axes, "which dimensions matter" if summary.correlation else "which sites matter")
    return True


def _draw_mixtures(axes: Any, journal: Journal, summary: JournalSummary) -> bool:
    if axes is None or not summary.mixtures:
        return bool(summary.mixtures)
    place, places, names, pairs = 0.0, [], [], []
    titles: list[tuple[float, str]] = []
    for path, members in summary.mixtures.items():
        titles.append((place, {"calibration.domain_weights": "texts", "importance.metrics": "metrics"}.get(path, path)))
        place -= 0.9
        for name, pair in members.items():
            places.append(place)
            names.append(_shortened(name))
            pairs.append(pair)
            place -= 1
        place -= 0.4
    both = bool(summary.chosen)
    axes.barh([p + 0.2 * both for p in places], [old for old, _ in pairs], 0.38, color=_GREY, label="trial 0")
    if both:
        said = f"trial {summary.chosen}"
        axes.barh([p - 0.2 for p in places], [new for _, new in pairs], 0.38, color=_WINNER, label=said)
    axes.set_yticks(places, names)
    for where, title in titles:
        axes.text(0.0, where - 0.1, f" {title}", fontsize=9, fontweight="bold", color=_INK, va="center")
    axes.set_xlim(0, max(max(pair) for pair in pairs) * 1.04)
    axes.set_ylim(place + 0.6, 0.6)
    axes.set_xlabel("weight", fontsize=9)
    _plain(axes, "what was mixed")
    _legend_above(axes)
    return True


def _legend_above(axes: Any) -> None:
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False, fontsize=8.5, borderaxespad=0.2)


def _shortened(name: str) -> str:
    name = name.rsplit("/", 1)[-1]
    return name if len(name) <= 26 else name[:25] + "…"


def _draw_depth(axes: Any, journal: Journal, summary: JournalSummary) -> bool:
    sites: Mapping[str, int] = journal.header.get("sites", {})
    if axes is None or not sites or summary.chosen is None:
        return bool(sites) and summary.chosen is not None
    trials = [(0, "--", 0.45), (summary.chosen, "-", 1.0)] if summary.chosen else [(0, "-", 1.0)]
    kinds = sorted({name.rsplit(".", 1)[-1] for name in sites})
    for kind in kinds:
        own = sorted((int(name.split(".")[1]), name) for name in sites if name.endswith(f".{kind}"))
        colour = {"attention": "#3d8f6d"}.get(kind, "#2f6fa7")
        for number, line, alpha in trials:
            widths = journal.trials[number].widths
            kept = [100 * widths.get(name, sites[name]) / sites[name] for _, name in own]
            said = {"mlp": "MLP"}.get(kind, kind)
            axes.plot([layer for layer, _ in own], kept, line, color=colour, alpha=alpha, drawstyle="steps-mid",
                      linewidth=1.5, label=f"{said}, trial {number}")  # fmt: skip
    low = axes.get_ylim()[0]
    axes.set_ylim(max(0.0, low - 3), 103)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("decoder layer", fontsize=9)
    axes.set_ylabel("units kept, %", fontsize=9)
    _plain(axes, "depth profile")
    _legend_above(axes)
    return True


def _draw_front(axes: Any, journal: Journal, summary: JournalSummary) -> bool:
    cost = search_of(journal).get("pareto")
    known = [trial for trial, _ in differences(journal) if cost in trial.costs]
    if axes is None or cost is None or not known:
        return cost is not None and bool(known)
    axes.plot([t.costs[cost] for t in known], [mean_value(t.rows) for t in known], "o", color=_GREY, markersize=5,
              label="trials")  # fmt: skip
    points = sorted((point["costs"][cost], point["value"]) for point in summary.front)
    if points:
        label = "front (fresh text)" if summary.finalists else "front"
        axes.plot(*zip(*points, strict=True), "D-", color=_WINNER, markersize=5.5, linewidth=1.4, label=label)
    if summary.scale.logarithmic and all(mean_value(t.rows) > 0 for t in known):
        axes.set_yscale("log")
    from matplotlib.ticker import EngFormatter

    if cost != "ratio":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel({"ratio": "pruning ratio"}.get(cost, cost.replace("_", " ")), fontsize=9)
    axes.set_ylabel("objective", fontsize=9)
    _plain(axes, "quality against cost")
    _legend_above(axes)
    return True
