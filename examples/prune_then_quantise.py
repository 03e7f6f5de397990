"""Prune a model, then load the result with int8 weights: a pruned checkpoint quantises as a dense one does.

python examples/prune_then_quantise.py MODEL OUTPUT [TEXT.txt ...]      (needs torchao)
"""

import sys

import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

import hf_adaprune


def main(name: str, output: str, texts: list[str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(name)
    calibration = {"sources": texts} if texts else {}
    config = hf_adaprune.PruningConfig.recipe("default", pruning_ratio=0.2, calibration=calibration)
    result = hf_adaprune.prune(model, tokenizer, config)
    result.save_pretrained(output)
    # In this order: quantised weights are not pruned.
    small = AutoModelForCausalLM.from_pretrained(
        output, dtype=torch.bfloat16, quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
    )
    ids = tokenizer("Pruning and quantising", return_tensors="pt").input_ids
    with torch.no_grad():
        plain, rounded = model(input_ids=ids).logits.float(), small(input_ids=ids).logits.float()
    print(f"{result.before.bytes / 2**20:,.1f} -> {result.after.bytes / 2**20:,.1f} MiB pruned, in {model.dtype}")
    print(f"relative difference of logits by int8: {(rounded - plain).norm() / plain.norm():.4f}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
