"""The search on the command line: its arguments, what is refused before any work, and the files of many plans.

As light as the rest of the command line: torch is imported by what needs it.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import PruningConfig
from .errors import CalibrationError, ConfigError, JournalError
from .search_config import BUDGETS, OBJECTIVES, STRATEGIES, SearchConfig
from .whole_files import check_no_folder, check_writable, whole_folder

if TYPE_CHECKING:
    from .searching import SearchResult
    from .sites import ModelSites

__all__ = [
    "SEARCH_FIELDS",
    "SUFFIXES",
    "add_search_arguments",
    "carry_out",
    "check_request",
    "plans_table",
    "read_budgets",
    "read_space",
    "search_table",
    "write_plans",
]

SUFFIXES = {"k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}
# Options of `search` and the fields of PruningConfig that they set.
SEARCH_FIELDS = {
    name: ("search", name)
    for name in (
        "trials", "strategy", "space", "objective", "tasks", "surrogate", "batch", "pareto", "ratios", "minutes"
    )
}  # fmt: skip
TABLE = "front.json"


def add_search_arguments(search: argparse.ArgumentParser) -> None:
    """Add what `search` has beside the arguments of `prune`."""
    # Defaults are SearchConfig's own: an option that is not given says nothing.
    default = SearchConfig()
    add = search.add_argument
    add("--trials", type=int, metavar="N", help=f"candidates in all, the config itself included ({default.trials})")
    add(
        "--strategy", nargs="+", action="extend", metavar="NAME",
        help=f"who proposes, one after the other: {', '.join(STRATEGIES)}; gp:40 for 40 trials ({default.strategy[0]})",
    )  # fmt: skip
    add("--journal", metavar="FILE", help="where every trial is written (default: OUTPUT.journal.jsonl)")
    add("--resume", action="store_true", help="go on with that journal")
    add("--warm-start", metavar="FILE", help="journal of another search whose best points are tried first")
    measured = ", ".join(name for name in OBJECTIVES if name != "custom")
    add("--objective", metavar="NAME", help=f"minimised on selection text: {measured} ({default.objective})")
    add("--tasks", nargs="+", action="extend", metavar="FILE", help="rows (jsonl) for --objective accuracy")
    add("--space", metavar="JSON", help="changes of what is varied: a file, or the JSON itself")
    add("--surrogate", metavar="NAME", help=f"gp, or saas for wide spaces ({default.surrogate})")
    add("--batch", type=int, metavar="N", help=f"candidates proposed at a time ({default.batch})")
    add("--minutes", type=float, metavar="M", help="no trial starts after so many, those before --resume included")
    many = search.add_mutually_exclusive_group()
    many.add_argument(
        "--pareto", metavar="KIND", help=f"find plans of every size, quality against one of {', '.join(BUDGETS)}"
    )
    many.add_argument("--ratios", nargs="+", type=float, metavar="R", help="find nested plans for these pruning ratios")


def read_budgets(entries: Sequence[str]) -> dict[str, float]:
    """Budgets from texts such as `parameters=110M`.

    Raises:
        ConfigError: no such budget, given twice, or no number.
    """
    found: dict[str, float] = {}
    for entry in entries:
        kind, equals, text = entry.partition("=")
        if not equals or kind not in BUDGETS:
            raise ConfigError(
                f"`--budget` should be KIND=VALUE with KIND one of {', '.join(BUDGETS)}. Found {entry!r}."
            )
        if kind in found:
            raise ConfigError(f"`--budget {kind}` is given twice. Give one value.")
        scale = SUFFIXES.get(text[-1:].lower(), 1)
        try:
            found[kind] = float(text[:-1] if scale > 1 else text) * scale
        except ValueError as error:
            raise ConfigError(
                f"`--budget {kind}` should be a number such as 0.3, 110M or 2.5G. Found {text!r}."
            ) from error
        if not math.isfinite(found[kind]):
            raise ConfigError(f"`--budget {kind}` should be a finite number. Found {text!r}.")
    return found


def read_space(given: str) -> dict[str, Any]:
    """A search space from JSON text, or from the file of that name.

    Raises:
        ConfigError: no such file, or no JSON object.
    """
    text, where = given, "`--space`"
    if not given.lstrip().startswith("{"):
        where = given
        try:
            text = Path(given).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"`--space` should be a JSON file, or JSON itself such as '{{\"repair.damping\": 0.02}}'. Cannot read "
                f"{given}: {error}."
            ) from error
    try:
        space = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON: {error}.") from error
    if not isinstance(space, dict):
        raise ConfigError(f"{where} should hold a JSON object from fields to values or ranges.")
    return space


def check_request(config: PruningConfig, journal: Path, resume: bool, warm_start: str | None) -> None:
    """Refuse what can be told without the model.

    Args:
        config ([`PruningConfig`]): with its search.
        journal (`Path`): where trials will be written.
        resume (`bool`): whether it may be there already.
        warm_start (`str`, *optional*): journal of another search.

    Raises:
        ConfigError, CalibrationError, CheckpointError, JournalError, MissingDependencyError: with what to do.
    """
    search = config.search
    assert search is not None
    if search.objective == "custom":
        raise ConfigError("`--objective custom` needs a function, which no command line can carry. Call prune().")
    if search.objective != "accuracy" and not config.calibration.selection:
        raise CalibrationError(
            "`--selection` is missing: texts that the search chooses on, like those the model will read and other than "
            "the calibration texts, such as --selection my.txt (or python, of which each role reads another third)."
        )
    check_no_folder("--journal", journal)
    check_writable(journal)
    if journal.exists() and not resume and journal.stat().st_size:
        raise JournalError(
            f"there is a journal at {journal}. Go on with it (--resume), or name another file (--journal FILE)."
        )
    from .choices import read_rows
    from .search.journal import Journal
    from .search_checks import check_search, named_space, search_needs
    from .search_journal import warm_points

    check_search(config)
    search_needs(config, config.calibration.domain_count)
    if search.objective == "accuracy":
        for path in search.tasks:
            read_rows(path)
    if resume and journal.exists() and journal.stat().st_size:
        Journal.load(journal)
    if warm_start is not None:
        warm_points(warm_start, named_space(config))


def carry_out(arguments: argparse.Namespace, config: Path, plan: Path, output: str) -> str:
    """The command that prunes by a plan which a search left.

    Args:
        arguments (`argparse.Namespace`): of the search, for how the model is opened.
        config (`Path`): file of the config.
        plan (`Path`): file of the plan.
        output (`str`): folder of the pruned model.
    """
    words = ["hf-adaprune", "prune", arguments.model, "--config", str(config), "--plan", str(plan), "--output", output]
    for option in ("gguf_file", "revision", "device"):
        if getattr(arguments, option):
            words += [f"--{option.replace('_', '-')}", getattr(arguments, option)]
    words += ["--dtype", arguments.dtype] if arguments.dtype != "auto" else []
    words += ["--trust-remote-code"] if arguments.trust_remote_code else []
    return shlex.join(words)


# -- what comes back --------------------------------------------------------------------------------------------------


def write_plans(result: SearchResult, output: Path, sites: ModelSites) -> list[dict[str, Any]]:
    """Write the plans of a front, or of several ratios, into a folder: a plan and its config each, and a table.

    Args:
        result ([`SearchResult`]): with a front or nested plans.
        output (`Path`): the folder.
        sites ([`ModelSites`]): the dense model, on the meta device too, for the sizes of nested plans.

    Returns:
        `list`: the rows of `front.json`: file names, costs, and the objective on fresh selection text.
    """
    from .costs import Costs

    search = result.asked.search
    assert search is not None
    found: list[tuple[Any, PruningConfig, dict[str, float], float | None]] = []
    if result.nested:
        costs = Costs.of(sites, result.config)
        values = _nested_values(result)
        for number, (ratio, plan) in enumerate(result.nested.items()):
            own = result.config.with_changes(pruning_ratio=ratio, target_parameters=None, target_bytes=None)
            sizes = {"asked": ratio, "ratio": costs.ratio(plan), "parameters": costs.parameters(plan)}
            found.append((plan, own, sizes, values[number] if values else None))
    else:
        found = [(point.plan, point.config, dict(point.costs), point.value) for point in result.front]
    rows = []
    with whole_folder(output) as folder:
        for number, (plan, config, sizes, value) in enumerate(found):
            stem = f"{number:02d}-ratio-{sizes['ratio']:.3f}"
            plan.save(folder / f"{stem}.plan.json")
            text = json.dumps({"config": config.to_dict()}, indent=2, sort_keys=True) + "\n"
            (folder / f"{stem}.config.json").write_text(text, encoding="utf-8")
            rows.append({"plan": f"{stem}.plan.json", "config": f"{stem}.config.json", "costs": sizes, "value": value})
        table = {"objective": search.objective, "cost": search.pareto or "ratio", "points": rows}
        (folder / TABLE).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    return rows


def _nested_values(result: SearchResult) -> list[float]:
    """The objective at every ratio, on text that no trial has seen if there is any."""
    rows = next((final.rows for final in result.journal.finals if final.number == result.winner.number), None)
    rows = rows or result.winner.rows
    total = sum(row[0] for row in rows)
    return [sum(row[column] for row in rows) / total for column in range(1, len(rows[0]))]


def plans_table(rows: Sequence[Mapping[str, Any]], objective: str) -> str:
    """The plans of [`write_plans`] for people.

    Args:
        rows (sequence): what it returned.
        objective (`str`): what was minimised.
    """
    from .reporting import text_table

    kinds = [kind for kind in (rows[0]["costs"] if rows else ()) if kind != "asked"]
    cells = [
        (row["plan"], *(_number(kind, row["costs"][kind]) for kind in kinds), f"{row['value']:.4g}") for row in rows
    ]
    said = {"accuracy": "1 - accuracy"}.get(objective, objective)
    return text_table(("plan", *kinds, f"{said} on fresh text"), cells)


def _number(kind: str, value: float) -> str:
    return f"{value:.3f}" if kind == "ratio" else f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def search_table(result: SearchResult, journal: Path) -> str:
    """What a search came to, in three lines; `show` has the rest.

    Args:
        result ([`SearchResult`]): of the search.
        journal (`Path`): its file.
    """
    winner, trials = result.winner, len(result.journal.trials)
    values = result.to_dict()["on_fresh_text"]
    own, first = values.get(str(winner.number)), values.get("0")
    said = "the config itself" if winner.number == 0 else f"trial {winner.number} ({winner.strategy})"
    lines = [f"search: {trials} trials, {said} won"]
    if result.asked.search is not None and result.asked.search.pareto is not None:
        # Plans differ in size, so that none of them has won, and values of two say nothing of each other.
        lines[0] = f"search: {trials} trials, {len(result.front)} plans that no other beats in quality and size"
    elif own is not None and first is not None and winner.number:
        lines[0] += f"; on fresh selection text {own:.4g}, the config itself {first:.4g}"
    lines.append(f"journal: {journal}; to read it: hf-adaprune show {shlex.quote(str(journal))}")
    return "\n".join(lines)
