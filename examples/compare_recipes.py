"""What would each recipe cut? Plans of several recipes side by side, without changing the model.

python examples/compare_recipes.py MODEL TEXT.txt
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_adaprune import PruningConfig, find_sites, masked
from hf_adaprune.evaluation import perplexity
from hf_adaprune.stages import cached_repairs, choose_repairs, decide, gather_texts, what_to_collect


def main(name: str, text: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(name)
    sites = find_sites(model)
    for recipe in ("magnitude", "wanda-sp", "flap", "default"):
        texts = {"sources": text, "samples": 24, "sequence_length": 256, "gradient_samples": 8}
        config = PruningConfig.recipe(recipe, pruning_ratio=0.2, calibration=texts, repair={"holdout": 0.25})
        blocks, held_out, _ = gather_texts(sites, tokenizer, config, what_to_collect(config, None) is not None)
        plan, statistics = decide(sites, blocks, config)
        cached = cached_repairs(sites, plan, statistics, config)
        repairs = choose_repairs(sites, plan, cached, blocks, held_out, config)[0]
        with masked(sites, plan, repairs):
            loss = f"{perplexity(model, held_out).value:8.2f}" if held_out is not None else "       -"
        widths = [len(kept.kept) for name, kept in plan.sites.items() if name.endswith("mlp")]
        print(f"{recipe:12} held-out perplexity {loss}   MLP widths {widths}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
