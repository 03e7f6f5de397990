"""Search the best plan that decodes and reads fast enough on this machine, then check the saved model's speed.

python examples/search_under_latency.py MODEL OUTPUT --decode 40 --prefill 1500 --calibration a.txt --selection b.txt
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_adaprune
from hf_adaprune.throughput import throughput


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--decode", type=float, help="tokens per second at least, written")
    parser.add_argument("--prefill", type=float, help="tokens per second at least, read")
    parser.add_argument("--context", type=int, default=512, help="tokens that are in the cache meanwhile")
    parser.add_argument("--calibration", nargs="+", default=["python"])
    parser.add_argument("--selection", nargs="+", default=["python"])
    parser.add_argument("--trials", type=int, default=60)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    asked = {"decode_tokens_per_second": args.decode, "prefill_tokens_per_second": args.prefill}
    config = hf_adaprune.PruningConfig.recipe(
        "default",
        # All budgets hold together; layers are timed on this machine once, before the search.
        budgets={name: speed for name, speed in asked.items() if speed is not None},
        budget_context=args.context,
        units=("channel", "kv_group", "layer"),  # whole layers buy more speed than narrow ones
        calibration={"sources": args.calibration, "selection": args.selection},
        search={"trials": args.trials},
    )
    result = hf_adaprune.prune(model, tokenizer, config)
    result.save_pretrained(args.output)
    again = AutoModelForCausalLM.from_pretrained(args.output, dtype=torch.bfloat16)
    print(f"{result.pruning_ratio:.1%} of the layers removed")
    for name, speed in throughput(again, prefill=args.context, new_tokens=16).items():
        print(f"{name}: {speed:,.1f}" + (f", asked for {asked[name]:,.1f}" if asked[name] is not None else ""))


if __name__ == "__main__":
    main()
