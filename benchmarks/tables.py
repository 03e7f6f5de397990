"""Tables in Markdown, made from results alone, and those in README.md and benchmarks/RESULTS.md held to them.

A document carries `<!-- table:NAME -->` before and `<!-- /table -->` after a table. A name is an experiment's,
`headline`, or one of `earlier`, whose results were measured before the experiments were data.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from .earlier import EARLIER
from .experiments import EXPERIMENTS
from .groups import groups_of
from .headline import headline
from .machine import HERE
from .results import PLACE, read_results

__all__ = ["made", "markdown", "show_tables", "stale", "written"]

README = HERE.parent / "README.md"
RESULTS = HERE / "RESULTS.md"
MARKED = re.compile(r"(<!-- table:([\w-]+) -->\n)(.*?)(\n?<!-- /table -->)", re.DOTALL)


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [list(header), ["---"] * len(header), *lines]
    first, rule, *rest = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([first, rule.replace(" ", ""), *rest])


def number(value: float) -> str:
    """A perplexity, or what is like one: two decimals, none from a thousand on."""
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def spread(values: Sequence[float], show: Callable[[float], str] = number) -> str:
    """Mean and standard deviation over seeds."""
    if not values:
        return "-"
    shown = show(mean(values))
    return f"{shown} ± {show(stdev(values))}" if len(values) > 1 and mean(values) < 1e5 else shown


# -- tables of experiments --------------------------------------------------------------------------------------------


def _quality(rows: Sequence[Mapping[str, Any]]) -> str:
    """Labels by text and ratio; perplexity, or accuracy over length where a text is multiple choice."""
    good = [row for row in rows if row["status"] == "done"]
    texts = list(dict.fromkeys(name for row in good for name in row["results"]))
    ratios = sorted({row["ratio"] for row in rows if row["ratio"]})
    labels = list(dict.fromkeys(row["label"] for row in rows if row["ratio"]))
    tables = []
    for text in texts:
        kind = _kind(good, text)
        dense = [row["results"][text][kind]["value"] for row in good if not row["ratio"] and text in row["results"]]
        lines = []
        for label in labels:
            cells = []
            for ratio in ratios:
                own = [row for row in rows if (row["label"], row["ratio"]) == (label, ratio)]
                values = [row["results"][text][kind]["value"] for row in own
                          if row["status"] == "done" and text in row["results"]]  # fmt: skip
                failed = "failed" if own and all(row["status"] == "failed" for row in own) else "-"
                cells.append(spread(values, number if kind == "perplexity" else _share) if values else failed)
            lines.append([label, *cells])
        shown = f", dense {spread(dense, number if kind == 'perplexity' else _share)}" if dense else ""
        tables.append(markdown([f"{text}, {kind}{shown}", *(f"{ratio:.0%}" for ratio in ratios)], lines))
    return "\n\n".join(tables)


def _kind(rows: Sequence[Mapping[str, Any]], text: str) -> str:
    found = next(row["results"][text] for row in rows if text in row["results"])
    return next(kind for kind in ("perplexity", "acc_norm", "acc") if kind in found)


def _share(value: float) -> str:
    return f"{value:.3f}"


def _matrix(rows: Sequence[Mapping[str, Any]]) -> str:
    good = [row for row in rows if row["status"] == "done"]
    texts = list(dict.fromkeys(name for row in good for name in row["results"]))
    labels = list(dict.fromkeys(row["label"] for row in good))
    lines = [
        [label, *(spread([r["results"][text]["perplexity"]["value"] for r in good if r["label"] == label])
                  for text in texts)]
        for label in labels
    ]  # fmt: skip
    return markdown(["calibrated on (20 % removed), perplexity on", *texts], lines)


def _speed(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for row in rows:
        if row["status"] == "done":
            cells = [f"{row['ratio']:.0%}"]
            for kind in ("prefill", "decode"):
                own = row["speed"][kind]
                share = "-" if own["share"] is None else f"{own['share']:.0%}"
                cells += [f"{own['dense']:,.1f} to {own['pruned']:,.1f}", f"{own['gain']:.2f}x", share]
            lines.append([row["label"], *cells])
    names = [f"{kind}{what}" for kind in ("prefill", "decode") for what in (", tokens/s", "", ", share of the ideal")]
    return markdown(["widths", "removed", *names], lines) + "\n\n" + _quality(rows)


def _cost(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for row in rows:
        if row["status"] != "done":
            continue
        seconds, cost = row["seconds"], row["cost"]
        run, said = cost["run"], cost["estimate"]
        repair = sum(seconds.get(name, 0.0) for name in ("plan", "repair", "check repair", "surgery"))
        trial = cost["trial_seconds"]
        lines.append([
            row["label"], f"{row['parameters'] / 1e6:,.0f} M", f"{seconds['statistics']:.1f}",
            "-" if trial is None else f"{trial:.2f}", "-" if trial is None else f"{seconds['search']:.1f}",
            f"{repair:.1f}", f"{seconds['save']:.1f} / {seconds['load']:.1f}",
            f"{run['seconds']:.1f}", f"{run['peak_bytes'] / 2**30:.2f}",
            f"{said['seconds'] / run['seconds']:.2f}", f"{said['peak_bytes'] / run['peak_bytes']:.2f}",
        ])  # fmt: skip
    header = ["run", "parameters", "statistics, s", "a trial, s", "search, s", "plan and repair, s", "save / load, s",
              "in all, s", "peak, GiB", "estimated / measured time", "estimated / measured memory"]  # fmt: skip
    return markdown(header, lines)


def _computed(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for row in rows:
        own = row["computed"]
        cells = (f"{own[name] / 2**30:,.0f} GiB" for name in ("weights_bytes", "gram_bytes", "peak_bytes"))
        lines.append([row["label"], *cells, f"{own['flops'] / 1e15:,.1f} PFLOP"])
    return markdown(["computed, not measured", "weights", "Gram matrices", "peak", "arithmetic"], lines)


RENDER: dict[str, Callable[[Sequence[Mapping[str, Any]]], str]] = {
    "domains": _matrix,
    "speed": _speed,
    "cost": _cost,
    "computed_cost": _computed,
}


def made(name: str, folder: Path, *, strict: bool = False) -> str | None:
    """A table by name; `None` where its results are not there.

    Args:
        name (`str`): of an experiment, `headline`, or of [`benchmarks.earlier`].
        folder (`Path`): of the experiments' results.
        strict (`bool`, *optional*, defaults to `False`): see [`headline`].
    """
    if name in EARLIER:
        return EARLIER[name](HERE / "results")
    if name == "headline":
        return headline(folder, HERE / "results", strict=strict)
    if name not in EXPERIMENTS:
        raise SystemExit(f"there is no table {name!r}. There are: {', '.join(['headline', *EARLIER, *EXPERIMENTS])}.")
    data = read_results(folder / f"{name}.json")
    order = {case.label: number for number, case in reversed(list(enumerate(EXPERIMENTS[name].cases)))}
    parts = []
    for group in groups_of(data):
        rows = sorted(group.rows, key=lambda row: (order.get(row["label"], len(order)), row["ratio"], row["seed"]))
        parts.append(f"{group.title}\n\n{RENDER.get(name, _quality)(rows)}")
    return "\n\n".join(parts) or None


# -- documents --------------------------------------------------------------------------------------------------------


def written(text: str, folder: Path) -> str:
    """A text with its marked tables made anew.

    Args:
        text (`str`): with markers.
        folder (`Path`): of the experiments' results.

    Raises:
        SystemExit: a marker names a table without results.
    """

    def anew(match: re.Match[str]) -> str:
        table = made(match[2], folder, strict=_is_own(folder))
        if table is None:
            raise SystemExit(f"there are no results for the table {match[2]!r}: python -m benchmarks run {match[2]}")
        return match[1] + table + "\n<!-- /table -->"

    return MARKED.sub(anew, text)


def stale(text: str, folder: Path) -> list[str]:
    """Names of the marked tables that are not what the results say."""
    strict = _is_own(folder)
    return [match[2] for match in MARKED.finditer(text) if match[3] != made(match[2], folder, strict=strict)]


def _is_own(folder: Path) -> bool:
    """Whether these are the results that the documents and the files of `earlier` belong to."""
    return folder.resolve() == PLACE.resolve()


def show_tables(names: Sequence[str], folder: Path, *, write: bool = False, check: bool = False) -> int:
    """Print, write or check tables; the exit code is 1 where one is stale."""
    documents = [path for path in (README, RESULTS) if path.exists()]
    texts = {path: path.read_text(encoding="utf-8") for path in documents}
    if check:
        found = [f"{name} is stale in {path.name}: python -m benchmarks table --write"
                 for path, text in texts.items() for name in stale(text, folder)]  # fmt: skip
        print("\n".join(found) or "all up to date")
        return int(bool(found))
    if write:
        # All are made before one is written: a table without results leaves every document as it was.
        anew = {path: written(text, folder) for path, text in texts.items()}
        for path, text in anew.items():
            path.write_text(text, encoding="utf-8")
        return 0
    # Tables of another model's results are of that model alone.
    for name in names or ["headline", *(EARLIER if _is_own(folder) else ()), *EXPERIMENTS]:
        table = made(name, folder)
        if table is not None:
            print(f"{name}\n\n{table}\n")
    return 0
