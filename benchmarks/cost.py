"""What a run costs: statistics against a plain forward pass, the cached repair, and the peak memory of `prune`.

Ratios come from one process, passes taken in turn, medians of `--repeats`; peak memory from a fresh process.

    python benchmarks/cost.py MODEL --text TEXT.txt
"""

from __future__ import annotations

import argparse
import json
import statistics as medians
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hf_adaprune import PruningConfig, find_sites
from hf_adaprune.calibration import calibration_blocks
from hf_adaprune.compensation import repair_plan
from hf_adaprune.recording import collect_statistics
from hf_adaprune.stages import decide
from hf_adaprune.statistics import Needs

PEAK = """
import resource, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from hf_adaprune import PruningConfig, prune
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
prune(model, tokenizer, PruningConfig.recipe("default", calibration={"sources": sys.argv[2]}))
print(loaded / 2**20, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=8, help="windows of 512 tokens per pass")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    sites = find_sites(model)
    blocks = calibration_blocks([args.text], tokenizer, samples=args.windows, sequence_length=512)

    @torch.no_grad()
    def plain() -> None:
        for start in range(0, len(blocks), 4):
            model(input_ids=blocks.input_ids[start : start + 4], use_cache=False)

    passes = {
        "plain forward": plain,
        "forward-only statistics with Gram matrices": lambda: collect_statistics(sites, blocks, Needs(gram=True)),
        "statistics with Gram matrices and gradients": lambda: collect_statistics(
            sites, blocks, Needs(gram=True, gradients=True), gradient_samples=len(blocks)
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for repeat in range(args.repeats + 1):
        for name, run in passes.items():
            start = time.perf_counter()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    own = {name: medians.median(taken) for name, taken in seconds.items()}
    found: dict[str, object] = {
        "model": Path(args.model).name,
        "tokens": blocks.tokens,
        "threads": torch.get_num_threads(),
        "tokens_per_second": {name: round(blocks.tokens / taken, 1) for name, taken in own.items()},
        "ratio_to_plain_forward": {
            name: round(medians.median(a / b for a, b in zip(taken, seconds["plain forward"], strict=True)), 2)
            for name, taken in seconds.items()
        },
    }
    config = PruningConfig.recipe("default", repair={"min_tokens_per_column": 0.0, "holdout": 0.0})
    plan, measured = decide(sites, blocks, config)
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        repair_plan(sites, plan, measured, measured.sample_weights(), config.repair)
        taken.append(time.perf_counter() - start)
    found["cached repair of all layers, seconds"] = round(medians.median(taken), 2)
    out = subprocess.run(
        [sys.executable, "-c", PEAK, args.model, args.text], capture_output=True, text=True, check=True
    )
    loaded, peak = (float(value) for value in out.stdout.split()[-2:])
    found["resident GiB after loading"] = round(loaded, 2)
    found["peak resident GiB of prune"] = round(peak, 2)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
