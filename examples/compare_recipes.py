"""What would each recipe cut? Plans of several recipes side by side, without changing the model.

python examples/compare_recipes.py MODEL TEXT.txt
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_adaprune import PruningConfig, find_sites, masked
from hf_adaprune.calibration import calibration_blocks
from hf_adaprune.evaluation import perplexity
from hf_adaprune.repairing import cached_repairs, choose_repairs
from hf_adaprune.stages import decide


def main(name: str, text: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(name)
    sites = find_sites(model)
    windows = calibration_blocks([text], tokenizer, samples=32, sequence_length=256, allow_fewer=True)
    blocks, held_out = windows.split(0.25, seed=0)
    for recipe in ("magnitude", "wanda-sp", "flap", "default"):
        config = PruningConfig.recipe(recipe, pruning_ratio=0.2, calibration={"gradient_samples": 8})
        plan, statistics = decide(sites, blocks, config)
        cached = cached_repairs(sites, plan, statistics, config)
        repairs = choose_repairs(sites, plan, cached, blocks, held_out, config)[0]
        with masked(sites, plan, repairs):
            loss = perplexity(model, held_out).value
        widths = [len(plan.sites.get(site.name, site.whole).kept) for site in sites if site.kind == "mlp"]
        print(f"{recipe:12} held-out perplexity {loss:8.2f}   MLP widths {widths}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
