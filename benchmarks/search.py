"""Search strategies against each other, and their winners on report text.

Every (ratio, strategy, seed) is one journal; a run that was stopped goes on where it was, and nothing is run twice. All
runs of a process share one pass over the calibration text.

    python benchmarks/search.py run MODEL --journals DIR --calibration a.jsonl b.txt --selection c.jsonl \
        --ratios 0.2 --strategies gp random sobol tpe --seeds 0 1 2
    python benchmarks/search.py report MODEL --journals DIR --calibration ... --selection ... --report d.txt \
        --rows e.jsonl
    python benchmarks/search.py table --journals DIR
    python benchmarks/search.py cost MODEL --calibration ... --selection ...
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from machine import HERE, load, machine_line, short_names, versions  # beside this file

from hf_adaprune import PruningConfig, PruningPlan, find_sites, masked
from hf_adaprune.calibration import report_blocks
from hf_adaprune.choices import multiple_choice, read_rows
from hf_adaprune.compensation import repair_plan
from hf_adaprune.documents import distinct_names
from hf_adaprune.evaluation import perplexity
from hf_adaprune.measures import Measure
from hf_adaprune.recording import collect_statistics
from hf_adaprune.search.gaussian_process import coverage
from hf_adaprune.search.journal import Journal
from hf_adaprune.search_checks import search_needs
from hf_adaprune.searching import SearchResult, find_best
from hf_adaprune.selection import measure_of
from hf_adaprune.stages import gather_texts
from hf_adaprune.trials import CachedScores, Trials

KEPT = 0.5


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report", "table", "cost"))
    parser.add_argument("model", nargs="?", help="a folder or hub id")
    parser.add_argument("--journals", type=Path, default=Path("journals"))
    parser.add_argument("--calibration", nargs="+", default=[])
    parser.add_argument("--selection", nargs="+", default=[])
    parser.add_argument("--report", nargs="+", default=[])
    parser.add_argument("--rows", nargs="+", default=[])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.2])
    parser.add_argument("--strategies", nargs="+", default=["gp", "random", "sobol", "tpe"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=65536, help="report tokens per source")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--name", default="search", help="name of the results file")
    return parser.parse_args()


def config_of(args: argparse.Namespace, ratio: float, strategy: str, seed: int) -> PruningConfig:
    """The config of a run: baselines are compared on the trials' own text, so that they need few finalists.

    Strategies chain by `+` (`gp+evolution`); with `-kept` behind them no source falls below half of its weight.
    """
    names, kept = tuple(strategy.removesuffix("-kept").split("+")), strategy.endswith("-kept")
    calibration = {"sources": args.calibration, "selection": args.selection, "samples": args.samples}
    return PruningConfig.recipe(
        "default",
        pruning_ratio=ratio,
        calibration=calibration,
        search={
            "trials": args.trials,
            "strategy": names,
            "finalists": 4 if names[0] == "gp" else 1,
            "space": {"calibration.domain_weights": {"kept": KEPT if kept else 0.0}},
        },
        seed=seed,
    )


def facts(args: argparse.Namespace) -> dict[str, Any]:
    roles = ("calibration", "selection", "report", "rows")
    return {
        "model": Path(args.model).name,
        **{role: short_names(getattr(args, role)) for role in roles},
        "samples": args.samples,
        "report_tokens": args.tokens,
        "dtype": "bfloat16",
        **versions(),
        "machine": machine_line(),
    }


class Setting:
    """A model and the statistics that all runs share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model, self.tokenizer = load(args.model)
        self.sites = find_sites(self.model)
        config = config_of(args, 0.2, "gp", 0)
        blocks, _, _ = gather_texts(self.sites, self.tokenizer, config, True)
        started = time.perf_counter()
        self.statistics = collect_statistics(
            self.sites,
            blocks,
            search_needs(config, len(args.calibration)),
            gradient_samples=config.calibration.gradient_samples,
        )
        self.seconds = time.perf_counter() - started
        self.measure: Measure | None = None
        self.scores = CachedScores(self.sites, config.units, self.statistics, (), 0)

    def find(self, ratio: float, strategy: str, seed: int) -> SearchResult:
        """Run a search, or what is left of it; all runs share the dense model's tokens and what scores are made of."""
        config = config_of(self.args, ratio, strategy, seed)
        if self.measure is None:
            self.measure = measure_of(self.sites, self.tokenizer, config)
        return find_best(
            self.sites,
            self.tokenizer,
            config,
            self.statistics,
            journal=self.journal(ratio, strategy, seed),
            resume=True,
            measure=self.measure,
            scores=self.scores,
        )

    def journal(self, ratio: float, strategy: str, seed: int) -> Path:
        """Where a run is written."""
        return self.args.journals / f"{ratio}_{strategy}_{seed}.jsonl"


def run(args: argparse.Namespace) -> None:
    setting = Setting(args)
    for seed in args.seeds:
        for ratio in args.ratios:
            for strategy in args.strategies:
                started = time.perf_counter()
                path = setting.journal(ratio, strategy, seed)
                found = setting.find(ratio, strategy, seed)
                said = {"seconds": round(time.perf_counter() - started), **found.to_dict()["on_fresh_text"]}
                print(path.name, json.dumps(said), flush=True)


def report(args: argparse.Namespace) -> None:
    """Perplexity and accuracy of trial 0 and of every winner, each computed once."""
    path = HERE / "results" / f"{args.name}.json"
    results = json.loads(path.read_text()) if path.exists() else {"protocol": facts(args), "rows": []}
    done = {row["journal"] for row in results["rows"]}
    setting = Setting(args)
    # Texts and questions are keys of one row, and files of one stem are several of them.
    names = distinct_names(Path(source).stem for source in (*args.report, *args.rows))
    texts = {
        name: report_blocks(source, setting.tokenizer, tokens=args.tokens, sequence_length=1024)
        for name, source in zip(names, args.report, strict=False)
    }
    rows = {name: read_rows(source) for name, source in zip(names[len(texts) :], args.rows, strict=True)}

    def measure(plan: PruningPlan, config: PruningConfig) -> dict[str, Any]:
        weights = setting.statistics.sample_weights(config.calibration.domain_weights)
        repairs = repair_plan(setting.sites, plan, setting.statistics, weights, config.repair)
        with masked(setting.sites, plan, repairs, narrow=True):
            found: dict[str, Any] = {name: perplexity(setting.model, own, 2).value for name, own in texts.items()}
            for name, questions in rows.items():
                own = multiple_choice(setting.model, setting.tokenizer, questions)["acc_norm"]
                found[name] = [own.value, own.standard_error]
        return found

    def keep(row: dict[str, Any]) -> None:
        results["rows"].append(row)
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps(row), flush=True)

    for ratio in args.ratios:
        for strategy in args.strategies:
            for seed in args.seeds:
                journal = setting.journal(ratio, strategy, seed)
                if not journal.exists() or journal.stem in done:
                    continue
                found = setting.find(ratio, strategy, seed)
                if f"{ratio}_default" not in done:
                    trials = Trials(setting.sites, found.asked, found.space, setting.statistics, measure_of_nothing())
                    zero = trials.config_of(found.space.default)
                    keep({"journal": f"{ratio}_default", **measure(trials.plans(zero)[0], zero)})
                    done.add(f"{ratio}_default")
                keep({"journal": journal.stem, "trial": found.winner.number, **measure(found.plan, found.config)})


def measure_of_nothing() -> Any:
    return Measure(lambda start, stop: [], 1, 1, 0, True, "")


def table(args: argparse.Namespace) -> None:
    """Best so far on the trials' own selection text, by number of trials, and how honest the predictions were."""
    marks = [n for n in (10, 15, 20, 30, 45, 60) if n <= args.trials]
    curves: dict[str, dict[str, list[float]]] = {}
    inside = total = 0
    for path in sorted(args.journals.glob("*.jsonl")):
        journal = Journal.load(path)
        if len(journal.trials) < args.trials:
            continue
        ratio, strategy, seed = path.stem.split("_")
        best, curve = 0.0, []
        full = max(trial.windows for trial in journal.trials)
        for trial in journal.trials[: args.trials]:
            if trial.windows == full:
                best = min(best, journal.estimate(trial).value)
            curve.append(best)
        curves.setdefault(f"{ratio} {strategy}", {})[seed] = curve
        if strategy in ("gp", "gp-kept"):
            held, of = coverage([(t, journal.estimate(t).value) for t in journal.measured()])
            inside, total = inside + held, total + of
    result: dict[str, Any] = {"curves": curves, "coverage_80": [inside, total]}
    print(f"| ratio, strategy | seeds | {' | '.join(f'{n} trials' for n in marks)} |")
    print("|---" * (len(marks) + 2) + "|")
    for name, runs in curves.items():
        cells = []
        for mark in marks:
            values = [100 * math.expm1(curve[mark - 1]) for curve in runs.values()]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):+.1f}{spread}")
        print(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    for name, runs in curves.items():
        ratio, strategy = name.split()
        if strategy in ("gp", "gp-kept"):
            continue
        for seed, curve in runs.items():
            gp = curves.get(f"{ratio} gp", {}).get(seed)
            if gp is not None:
                reached = next((n + 1 for n, value in enumerate(gp) if value <= curve[-1]), None)
                print(f"gp reaches the final value of {name}, seed {seed}, at trial {reached}")
    print(f"80 % intervals held {inside} of {total} trials that the process had not seen")
    (HERE / "results" / f"{args.name}_curves.json").write_text(json.dumps(result) + "\n")


def cost(args: argparse.Namespace) -> None:
    """Seconds of a trial, of its forward alone, and of the published procedure's trial."""
    setting = Setting(args)
    config = config_of(args, args.ratios[0], "gp", 0)
    started = time.perf_counter()
    measure = measure_of(setting.sites, setting.tokenizer, config)
    dense = time.perf_counter() - started
    from hf_adaprune.search.space import default_space

    space = default_space(config, setting.statistics.domains)
    trials = Trials(setting.sites, config, space, setting.statistics, measure)
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    draws = [space.from_cube(torch.rand(space.width, generator=generator)) for _ in range(7)]
    trials.candidate(draws.pop())  # numbers that are computed once
    first = time.perf_counter() - started
    rows = []
    for windows in (measure.first, measure.windows):
        for point in draws[:5]:
            started = time.perf_counter()
            candidate = trials.candidate(point)
            trials.measure(candidate, 0, windows)
            own = time.perf_counter() - started
            rows.append((windows, own, plain_forward(trials, candidate, measure, windows)))
    blocks, _, _ = gather_texts(setting.sites, setting.tokenizer, config, True)
    result = {
        "protocol": facts(args),
        "statistics_seconds": setting.seconds,
        "statistics_tokens": blocks.tokens,
        "dense_selection_seconds": dense,
        "first_scores_seconds": first,
        "trial": {
            str(windows): {
                "seconds": statistics.median(own for w, own, _ in rows if w == windows),
                "over_plain_forward": statistics.median(own / plain for w, own, plain in rows if w == windows),
            }
            for windows in (measure.first, measure.windows)
        },
    }
    trial = result["trial"][str(measure.windows)]["seconds"]
    # The published procedure measures importance anew for the calibration set of every trial.
    result["published_over_trial"] = (setting.seconds + trial) / trial
    (HERE / "results" / f"{args.name}_cost.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def plain_forward(trials: Trials, candidate: Any, measure: Any, windows: int) -> float:
    """Seconds of a forward of the pruned model on the same windows, nothing else."""
    blocks = measure.blocks.select(slice(0, windows))
    repairs = trials.repairs(candidate.payload)[0]
    with masked(trials.sites, candidate.payload.plans[0], repairs, narrow=True), torch.inference_mode():
        started = time.perf_counter()
        for batch in blocks.batches(4):
            trials.sites.model(input_ids=batch.input_ids, use_cache=False)
        return time.perf_counter() - started


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.journals.mkdir(parents=True, exist_ok=True)
    {"run": run, "report": report, "table": table, "cost": cost}[args.command](args)


if __name__ == "__main__":
    main()
