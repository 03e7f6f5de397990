"""Quality of every recipe at several ratios on one model: the table of the README.

One pass over the calibration text per recipe; every ratio is allocated and repaired from it and measured masked, which
equals the cut model (a law of the tests). Runs that have a result are not run again.

    python benchmarks/recipes.py MODEL --calibration wikitext2_valid.txt --report wikitext2_test.txt
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch
import transformers
from table import table  # beside this file
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_adaprune
from hf_adaprune import RECIPES, PruningConfig, find_sites, masked
from hf_adaprune.evaluation import perplexity
from hf_adaprune.recording import collect_statistics
from hf_adaprune.stages import cached_repairs, choose_repairs, decide, gather_texts, what_to_collect

HERE = Path(__file__).parent


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or hub id")
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--report", nargs="+", required=True)
    parser.add_argument("--recipes", nargs="+", default=sorted(RECIPES))
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.1, 0.2, 0.3, 0.5])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--gradient-samples", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=65536, help="report tokens per source")
    parser.add_argument("--changes", default="{}", help="JSON: changes of every recipe's config")
    parser.add_argument("--name", default="recipes", help="name of the results file")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--fresh", action="store_true", help="forget the results there are")
    return parser.parse_args()


def facts(args: argparse.Namespace) -> dict[str, object]:
    return {
        "model": Path(args.model).name,
        "calibration": ["/".join(Path(source).parts[-2:]) for source in args.calibration],
        "report": ["/".join(Path(source).parts[-2:]) for source in args.report],
        "changes": json.loads(args.changes),
        "samples": args.samples,
        "sequence_length": args.sequence_length,
        "gradient_samples": args.gradient_samples,
        "report_tokens": args.tokens,
        "report_window": 1024,
        "dtype": "bfloat16",
        "seed": 0,
        "hf_adaprune": hf_adaprune.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    path = HERE / "results" / f"{args.name}.json"
    path.parent.mkdir(exist_ok=True)
    results = {"protocol": facts(args), "rows": []}
    if path.exists() and not args.fresh:
        results = json.loads(path.read_text())
        if results["protocol"] != facts(args):
            raise SystemExit(f"{path} was measured under another protocol. Give another --name, or --fresh.")
    done = {(row["recipe"], row["asked"]) for row in results["rows"]}

    def keep(row: dict[str, object]) -> None:
        results["rows"].append(row)
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps(row), flush=True)

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    sites = find_sites(model)
    texts = {
        "sources": tuple(args.calibration),
        "report": tuple(args.report),
        "samples": args.samples,
        "sequence_length": args.sequence_length,
        "gradient_samples": args.gradient_samples,
        "evaluation_tokens": args.tokens,
    }
    reports = gather_texts(sites, tokenizer, PruningConfig.recipe("random", calibration=texts), False)[2]
    if ("dense", 0.0) not in done:
        measured = {name: perplexity(model, blocks).value for name, blocks in reports.items()}
        keep(
            {
                "recipe": "dense",
                "asked": 0.0,
                "ratio": 0.0,
                "parameters": sites.total_parameters,
                "perplexity": measured,
            }
        )
    for recipe in args.recipes:
        ratios = [ratio for ratio in args.ratios if (recipe, ratio) not in done]
        if not ratios:
            continue
        config = PruningConfig.recipe(recipe, calibration=texts, **json.loads(args.changes))
        needs = what_to_collect(config, None)
        start = time.perf_counter()
        blocks, held_out, _ = gather_texts(sites, tokenizer, config, needs is not None)
        statistics = None
        if needs is not None and config.allocation.steps == 1:
            samples = config.calibration.gradient_samples
            statistics = collect_statistics(sites, blocks, needs, gradient_samples=samples)
        collected = time.perf_counter() - start
        for ratio in ratios:
            start = time.perf_counter()
            own = config.with_changes(pruning_ratio=ratio)
            plan, kept = decide(sites, blocks, own, needs=needs, statistics=statistics)
            cached = cached_repairs(sites, plan, kept, own)
            repairs, schedule, _, _ = choose_repairs(sites, plan, cached, blocks, held_out, own)
            seconds = time.perf_counter() - start
            with masked(sites, plan, repairs):
                measured = {name: perplexity(model, report).value for name, report in reports.items()}
            removed = sites.removed_parameters(plan, [name for name, r in repairs.items() if r.bias is not None])
            keep(
                {
                    "recipe": recipe,
                    "asked": ratio,
                    "ratio": removed / sites.decoder_parameters,
                    "parameters": sites.total_parameters - removed,
                    "perplexity": measured,
                    "kv_groups_removed": sum(
                        site.groups - len(site.kept_groups) for name, site in plan.sites.items() if "attention" in name
                    ),
                    "repair": schedule,
                    "seconds": {"statistics": round(collected, 1), "plan_and_repair": round(seconds, 1)},
                }
            )
        del statistics
    print(table(path))


if __name__ == "__main__":
    main()
