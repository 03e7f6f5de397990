"""Search calibration weights, metrics, depth profile and damping, then prune by the winner.

python examples/search_a_plan.py MODEL OUTPUT --calibration a.jsonl b.txt --selection c.jsonl --report d.txt
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_adaprune


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--calibration", nargs="+", default=["python"])
    parser.add_argument("--selection", nargs="+", default=["python"])
    parser.add_argument("--report", nargs="+", default=[])
    parser.add_argument("--trials", type=int, default=60)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    config = hf_adaprune.PruningConfig.recipe(
        "default",
        pruning_ratio=0.2,
        calibration={"sources": args.calibration, "selection": args.selection, "report": args.report},
        # With a dimension that the default space does not have.
        search={"trials": args.trials, "space": {"allocation.max_site_ratio": {"low": 0.5, "high": 1.0}}},
    )
    journal = args.output.rstrip("/") + ".journal.jsonl"
    result = hf_adaprune.prune(model, tokenizer, config, journal=journal, resume=True)
    result.save_pretrained(args.output)
    print(f"trial {result.search.winner.number} of {args.trials} won; hf-adaprune show {journal} --plot search.png")
    for source, pair in result.evaluation.items():
        print(f"{source}: {pair['dense']} dense, {pair['pruned']} pruned")


if __name__ == "__main__":
    main()
