"""Measurements that anyone can repeat.

    python -m benchmarks list
    python -m benchmarks run all --smoke                     # tiny model, the interpreter's own texts, no network
    python -m benchmarks run quality repair                  # SmolLM2-135M-Instruct and texts from the Hub
    python -m benchmarks run all --model DIR --data TEXTS    # TEXTS/calibration, TEXTS/selection, TEXTS/report
    python -m benchmarks table --write                       # the documents' tables, from the results
    python -m benchmarks plot --output DIR

A run that was stopped goes on with the rows that are missing. The same command in a second shell shares the work, by
calibration set and seed (with `--threads 1` each on two cores); `speed` and `cost` come last, in one process alone.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_adaprune.errors import AdaPruneError

from .experiments import EXPERIMENTS, FULL, SMOKE, Experiment, Shape
from .results import PLACE

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    whole = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = whole.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the experiments")
    run = commands.add_parser("run", help="measure what is missing")
    run.add_argument("names", nargs="+", metavar="NAME", help="experiments, or all")
    run.add_argument("--smoke", action="store_true", help="a tiny random model and little text: does everything run?")
    run.add_argument("--model", default=MODEL, help=f"a folder or hub id (default: {MODEL})")
    run.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16")
    run.add_argument("--data", type=Path, help="a folder with calibration/, selection/ and report/")
    for role in ("calibration", "selection", "report"):
        run.add_argument(f"--{role}", nargs="+", metavar="SOURCE", help=f"{role} text: files or data set names")
    run.add_argument("--rows", nargs="*", metavar="SOURCE", help="multiple choice: FILE.jsonl, or lm-eval's tasks")
    run.add_argument("--samples", type=int, default=FULL.samples, help="calibration windows")
    run.add_argument("--tokens", type=int, default=FULL.report_tokens, help="report tokens per source")
    run.add_argument("--task-rows", type=int, default=FULL.task_rows, help="questions per task")
    run.add_argument("--trials", type=int, default=FULL.trials, help="of every search")
    run.add_argument("--seeds", nargs="+", type=int, help="instead of 0 1 2; tasks are of 0")
    run.add_argument("--threads", type=int)
    run.add_argument("--fresh", action="store_true", help="measure everything again (one process)")
    run.add_argument("--results", type=Path, help="folder of the results (--smoke: a temporary one)")
    table = commands.add_parser("table", help="tables of the results, in Markdown")
    table.add_argument("names", nargs="*", metavar="NAME")
    table.add_argument("--write", action="store_true", help="write those that the documents have markers for")
    table.add_argument("--check", action="store_true", help="fail where a document's tables are stale")
    table.add_argument("--results", type=Path, help="folder of the experiments' results")
    plot = commands.add_parser("plot", help="pictures of quality and speed; needs matplotlib")
    plot.add_argument("--output", type=Path, default=Path("."))
    plot.add_argument("--results", type=Path)
    return whole


def chosen(names: Sequence[str]) -> list[Experiment]:
    """Experiments by name.

    Raises:
        SystemExit: there is none of that name.
    """
    unknown = [name for name in names if name != "all" and name not in EXPERIMENTS]
    if unknown:
        raise SystemExit(f"there is no experiment {unknown[0]!r}. There are: {', '.join(EXPERIMENTS)}, all.")
    return list(EXPERIMENTS.values()) if "all" in names else [EXPERIMENTS[name] for name in dict.fromkeys(names)]


def show_list() -> None:
    """Print the experiments."""
    for one in EXPERIMENTS.values():
        rows = sum(1 if isinstance(case, Shape) else len(case.seeds or one.seeds) for case in one.cases)
        print(f"{one.name:20} {rows:4} rows  {one.varies} ({', '.join(one.measures)})")


def setting_of(arguments: argparse.Namespace) -> Any:
    """Model and texts that a run asks for."""
    from .setting import Setting
    from .smoke import smoke_setting

    if arguments.smoke:
        return smoke_setting()
    import torch
    from transformers.utils import logging

    from .machine import load
    from .texts import HUB, in_folder, read

    logging.disable_progress_bar()
    sources = in_folder(arguments.data) if arguments.data is not None else HUB
    own = {name: tuple(given) for name in ("calibration", "selection", "report", "rows")
           if (given := getattr(arguments, name)) is not None}  # fmt: skip
    model, tokenizer = load(arguments.model, getattr(torch, arguments.dtype))
    texts = read(replace(sources, **own), tokenizer, task_rows=arguments.task_rows)
    scale = replace(
        FULL, samples=arguments.samples, report_tokens=arguments.tokens, task_rows=arguments.task_rows,
        trials=arguments.trials,
    )  # fmt: skip
    return Setting(Path(arguments.model).name, model, tokenizer, texts, scale)


def run_experiments(arguments: argparse.Namespace) -> int:
    """Measure, and return how many rows failed."""
    import torch
    from transformers.utils import logging

    from .results import Book
    from .runner import rows_of, run
    from .smoke import fewer

    experiments = chosen(arguments.names)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    setting, failed = setting_of(arguments), 0
    with contextlib.ExitStack() as stack:
        folder = arguments.results
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) if arguments.smoke else PLACE
        work = [
            (fewer(one) if arguments.smoke else one, Book(folder, one.name, arguments.fresh)) for one in experiments
        ]
        seeds = None if arguments.seeds is None else tuple(arguments.seeds)
        measured = run(work, setting, seeds=seeds, say=lambda line: print(line, flush=True))
        for one, book in work:
            book.reread()
            asked = {row.key for row in rows_of(one, setting, seeds)}
            rows = [row for row in book.data["rows"] if row["key"] in asked]
            lost = sum(row["status"] == "failed" for row in rows)
            failed += lost
            there = len(rows) - measured[one.name]
            print(f"{one.name}: {measured[one.name]} rows measured, {there} were there, {lost} failed")
    assert arguments.smoke or setting.scale != SMOKE
    return failed


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 1 where rows failed or tables are stale."""
    arguments = parser().parse_args(words)
    if arguments.command == "list":
        show_list()
        return 0
    try:
        if arguments.command == "run":
            return int(run_experiments(arguments) > 0)
        if arguments.command == "plot":
            from .plots import plot_all

            for path in plot_all(arguments.results or PLACE, arguments.output):
                print(path)
            return 0
        from .tables import show_tables

        return show_tables(arguments.names, arguments.results or PLACE, write=arguments.write, check=arguments.check)
    except AdaPruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
