"""The README's headline table: every method at 20 % and 50 %, without training and after a recovery.

From the rows of the experiment `quality` (means over seeds) and from `recovered.json`, which `benchmarks/training.py`
writes with the model, the report tokens and the questions of those rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from .groups import groups_of
from .results import read_results

__all__ = ["headline"]

RATIOS = (0.2, 0.5)
TASKS = "tasks"  # mean of the tasks' acc_norm
MEASURED_ON = ("report", "report_window", "rows")  # of a protocol, beside the weights: names, tokens and digests
TITLES = {"wikitext2_test_raw": "WikiText-2", "c4_report": "C4"}


def headline(experiments: Path, earlier: Path, *, strict: bool = False) -> str | None:
    """The table in Markdown; `None` where `quality` lacks the dense model.

    Args:
        experiments (`Path`): folder of the experiments' results.
        earlier (`Path`): folder of `recovered.json`; where it is of another model, other tokens or other questions than
            the rows of `quality`, the table has no recovered models.
        strict (`bool`, *optional*, defaults to `False`): whether that is an error.

    Raises:
        SystemExit: `strict`, and the recovered models do not belong to the rows of `quality`.
    """
    data = read_results(experiments / "quality.json")
    done = [row for row in data["rows"] if row["status"] == "done"]
    if not any(not row["ratio"] for row in done):
        return None
    # Of the dense model measured last: rows of other models, texts or tokens may lie in the same file.
    last = next(row for row in reversed(done) if not row["ratio"])
    asked = data["protocols"][last["protocol"]]
    # A dense model is of every run of its texts, of which the one that went on last is shown.
    own_groups = [group for group in groups_of(data) if last in group.rows]
    shown = max(own_groups, key=lambda group: data["rows"].index(group.rows[-1]))
    rows = [row for row in shown.rows if row["status"] == "done"]
    dense = _values(last["results"])
    columns = list(dense)
    found: dict[str, dict[float, dict[str, float]]] = {}
    for row in rows:
        if row["ratio"] in RATIOS:
            found.setdefault(row["label"], {})
    for label, own in found.items():
        for ratio in RATIOS:
            own[ratio] = _mean(
                _values(row["results"]) for row in rows if (row["label"], row["ratio"]) == (label, ratio)
            )
    order = sorted(found, key=lambda label: _place(label, found, columns[0]))
    lines = [["dense", *(_shown(name, dense[name]) for _ in RATIOS for name in columns)]]
    lines += _lines([(label, found[label]) for label in order], dense)
    trained = _recovered(earlier / "recovered.json", asked, strict)
    lines += _lines(trained, dense)
    header = ["", *(f"{TITLES.get(name, name)}, {ratio:.0%} removed" for ratio in RATIOS for name in columns)]
    first, *rest = ["| " + " | ".join(line) + " |" for line in [header, *lines]]
    return "\n".join([first, "|---" * len(header) + "|", *rest])


def _place(label: str, found: Mapping[str, Mapping[float, Mapping[str, float]]], column: str) -> tuple[float, bool]:
    """By the first ratio; a method that was not measured there stands behind the best one that it beats at the last."""
    first, last = ({name: own[ratio].get(column) for name, own in found.items()} for ratio in RATIOS)
    value, other = first[label], last[label]
    if value is not None:
        return value, False
    beaten = [
        own for name, own in first.items() if own is not None and None not in (other, last[name]) and other < last[name]
    ]
    return min(beaten, default=float("inf")), True


def _values(results: Mapping[str, Any]) -> dict[str, float]:
    """Perplexity by text, and the mean over tasks."""
    found = {name: own["perplexity"]["value"] for name, own in results.items() if "perplexity" in own}
    tasks = [own["acc_norm"]["value"] for own in results.values() if "acc_norm" in own]
    return {**found, TASKS: mean(tasks)} if tasks else found


def _mean(values: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """By column, over the seeds that have it."""
    given = list(values)
    names = dict.fromkeys(name for own in given for name in own)
    return {name: mean(own[name] for own in given if name in own) for name in names}


def _lines(
    found: Sequence[tuple[str, Mapping[float, Mapping[str, float]]]], dense: Mapping[str, float]
) -> list[list[str]]:
    """One line per method, the best of a column in bold."""
    lines = []
    for label, own in found:
        cells = [label]
        for ratio in RATIOS:
            for name in dense:
                value = own.get(ratio, {}).get(name)
                others = [other[ratio][name] for _, other in found if name in other.get(ratio, {})]
                if value is None:
                    cells.append("-")
                    continue
                best = value == (max(others) if name == TASKS else min(others))
                shown = _shown(name, value)
                times = f" ({value / dense[name]:.2f}x)" if name != TASKS and value < 10 * dense[name] else ""
                cells.append(f"**{shown}**{times}" if best else f"{shown}{times}")
        lines.append(cells)
    return lines


def _shown(name: str, value: float) -> str:
    if name == TASKS:
        return f"{value:.3f}"
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def _recovered(path: Path, asked: Mapping[str, Any], strict: bool) -> list[tuple[str, dict[float, dict[str, float]]]]:
    """Models after training, by how they were cut; none where they are of another model or other texts."""
    if not path.exists():
        return []
    found: dict[str, dict[float, dict[str, float]]] = {}
    said = json.loads(path.read_text())
    wanted = {"weights": asked["model"]["weights"], **{name: asked.get(name) for name in MEASURED_ON}}
    if said["protocol"].get("measured_on") != wanted:
        if not strict:
            return []
        raise SystemExit(
            f"{path.name} was measured on another model, other tokens or other questions than quality.json. Measure it "
            f"anew with benchmarks/training.py --name {path.stem}, or `quality` on what its `measured_on` says. "
            "Results of one's own model belong into a folder of their own (--results)."
        )
    for row in said["rows"]:
        how, ratio, _, _ = row["run"].split(":")
        own = {name: value for name, value in row["after"].items() if not isinstance(value, list)}
        tasks = [value[0] for value in row["after"].values() if isinstance(value, list)]
        title = row.get("title") or {"once": "cut, then recovered", "progressive": "cut while recovering"}[how]
        title += f" ({row['tokens']:,} tokens)"
        found.setdefault(title, {})[float(ratio)] = {**own, TASKS: mean(tasks)} if tasks else own
    return list(found.items())
