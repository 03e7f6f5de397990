"""Prune a model by a fifth, save it, and load it with transformers.

python examples/prune_in_ten_lines.py MODEL OUTPUT [TEXT.txt ...]
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_adaprune


def main(name: str, output: str, texts: list[str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(name)
    calibration = {"sources": texts} if texts else {}
    config = hf_adaprune.PruningConfig.recipe("default", pruning_ratio=0.2, calibration=calibration)
    result = hf_adaprune.prune(model, tokenizer, config)
    result.save_pretrained(output)
    again = AutoModelForCausalLM.from_pretrained(output)
    print(
        f"{result.before.total:,} -> {again.num_parameters():,} parameters ({result.pruning_ratio:.1%} of the layers)"
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
