"""Calibrate on text of your own: documents in memory, files and data sets as weighted domains of one pool.

python examples/calibrate_on_your_text.py MODEL OUTPUT NOTES.txt WEB.jsonl REPORT.txt
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_adaprune
from hf_adaprune import TextSource


def main(name: str, output: str, notes: str, web: str, report: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(name)
    # Texts in memory stay there: configs and cards get their name and digest alone.
    own = TextSource("notes", [text for text in Path(notes).read_text().split("\n\n") if text.strip()])
    config = hf_adaprune.PruningConfig.recipe(
        "default",
        pruning_ratio=0.2,
        calibration={
            "sources": (own, web),  # or a data set: "allenai/c4:en:train"
            "domain_weights": (0.8, 0.2),  # what the model will mostly read counts most
            "report": report,  # other text of the same kind; text that overlaps is refused
        },
    )
    result = hf_adaprune.prune(model, tokenizer, config)
    result.save_pretrained(output)
    print(f"calibrated on {result.calibration['tokens']:,} tokens of {', '.join(result.calibration['domains'])}")
    for source, pair in result.evaluation.items():
        print(f"{source}: {pair['dense']} dense, {pair['pruned']} pruned")


if __name__ == "__main__":
    main(*sys.argv[1:])
