"""The accuracy predictor (2309.09507) against uniform ratios, with the same inner metric and no repair.

    python benchmarks/predictor.py MODEL --journals DIR --calibration a.jsonl b.txt --selection c.jsonl --report d.txt

Trial 0 is the uniform allocation. The winner is chosen on selection text; report text is read once for both.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from machine import HERE, load, machine_line, short_names, versions  # beside this file

from hf_adaprune import PruningConfig, PruningPlan, find_sites, masked
from hf_adaprune.calibration import report_blocks
from hf_adaprune.documents import distinct_names
from hf_adaprune.evaluation import perplexity
from hf_adaprune.recording import collect_statistics
from hf_adaprune.search.predictor import predictor_quality
from hf_adaprune.search_checks import search_needs
from hf_adaprune.searching import find_best
from hf_adaprune.selection import measure_of
from hf_adaprune.stages import gather_texts
from hf_adaprune.trials import Trials


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or hub id")
    parser.add_argument("--journals", type=Path, default=Path("journals"))
    parser.add_argument("--calibration", nargs="+", default=["python"])
    parser.add_argument("--selection", nargs="+", default=["python"])
    parser.add_argument("--report", nargs="+", default=["python"])
    parser.add_argument("--metric", default="first_order")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--trials", type=int, default=120)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=65536, help="report tokens per source")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--name", default="predictor", help="name of the results file")
    return parser.parse_args()


def config_of(args: argparse.Namespace, ratio: float, seed: int) -> PruningConfig:
    return PruningConfig.recipe(
        "default",
        pruning_ratio=ratio,
        importance={"metrics": {args.metric: 1.0}, "normalization": "none"},
        allocation={"method": "uniform"},
        repair={"method": "none"},
        calibration={"sources": args.calibration, "selection": args.selection, "samples": args.samples},
        search={"strategy": ("predictor",), "trials": args.trials, "finalists": 3},
        seed=seed,
    )


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.journals.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load(args.model)
    sites = find_sites(model)
    first = config_of(args, args.ratios[0], args.seeds[0])
    # The windows of the other benchmarks, which keep some of them back to check repairs.
    blocks, _, _ = gather_texts(sites, tokenizer, first.with_changes(repair={"method": "least_squares"}), True)
    needs = search_needs(first, len(args.calibration))
    statistics = collect_statistics(sites, blocks, needs, gradient_samples=first.calibration.gradient_samples)
    measure = measure_of(sites, tokenizer, first)
    texts = {
        name: report_blocks(source, tokenizer, tokens=args.tokens, sequence_length=1024)
        for name, source in zip(distinct_names(Path(own).stem for own in args.report), args.report, strict=True)
    }

    def read(plan: PruningPlan) -> dict[str, float]:
        with masked(sites, plan, {}, narrow=True):
            return {name: perplexity(model, own, 2).value for name, own in texts.items()}

    rows: list[dict[str, Any]] = []
    for ratio in args.ratios:
        for seed in args.seeds:
            config = config_of(args, ratio, seed)
            journal = args.journals / f"{ratio}_predictor_{args.metric}_{seed}.jsonl"
            found = find_best(sites, tokenizer, config, statistics, journal=journal, resume=True, measure=measure)
            trials = Trials(sites, found.asked, found.space, statistics, measure)
            uniform = trials.plans(trials.config_of(found.space.default))[0]
            row = {
                "ratio": ratio,
                "seed": seed,
                "trial": found.winner.number,
                "held_out_pairs": predictor_quality(found.journal.trials, trials.slots),
                "uniform": read(uniform),
                "predictor": read(found.plan),
                "on_fresh_text": found.to_dict()["on_fresh_text"],
            }
            print(json.dumps(row), flush=True)
            rows.append(row)
    roles = ("calibration", "selection", "report")
    protocol = {
        "model": Path(args.model).name,
        **{role: short_names(getattr(args, role)) for role in roles},
        "metric": args.metric,
        "trials": args.trials,
        "samples": args.samples,
        "report_tokens": args.tokens,
        "dtype": "bfloat16",
        **versions(),
        "machine": machine_line(),
    }
    path = HERE / "results" / f"{args.name}.json"
    path.write_text(json.dumps({"protocol": protocol, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
