"""A model that is larger than memory: time and peak memory of `prune_to_disk` on a random Llama, made here on disk.

Weights are random, so perplexities would say nothing; the point is memory, time, and that the result reloads. The
child process that prunes reports its own peak resident size (`ru_maxrss`). With `--compare` the same model is pruned in
memory as well, and plans and weights are compared.

    python benchmarks/scale.py --folder DIR --hidden 3072 --intermediate 6144 --layers 36 --heads 24 --kv-heads 8
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from hf_adaprune.skeleton import bound_skeleton

CHILD = """
import json, resource, sys, time
from hf_adaprune import PruningConfig, prune, prune_to_disk
how, source, output, settings = sys.argv[1:]
from transformers import AutoModelForCausalLM, AutoTokenizer
config = PruningConfig.recipe("flap", **json.loads(settings))
tokenizer = AutoTokenizer.from_pretrained(source)
started, began = time.perf_counter(), time.process_time()
if how == "disk":
    result = prune_to_disk(source, tokenizer, config, output)
    stated = result.expected_peak_bytes
else:
    result = prune(AutoModelForCausalLM.from_pretrained(source, dtype="auto"), tokenizer, config)
    result.save_pretrained(output, check=False)
    stated = None
print(json.dumps({
    "seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - began,
    "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "stated_peak_bytes": stated, "plan": result.plan.digest,
    "pruning_ratio": result.pruning_ratio, "repair": result.repair_schedule, "calibration": dict(result.calibration),
    "before": vars(result.before), "after": vars(result.after), "seconds_by_stop": dict(result.seconds),
}))
"""
RELOAD = """
import json, sys, torch, hf_adaprune
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto", output_loading_info=True)
with torch.no_grad():
    logits = model(torch.arange(64)[None]).logits
print(json.dumps({
    "reloads": not any(info.values()) and bool(torch.isfinite(logits).all()),
    "parameters": sum(p.numel() for p in model.parameters()),
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the models; made here, emptied at the end")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=3072)
    parser.add_argument("--layers", type=int, default=34)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tokens-per-column", type=float, default=2.0, help="RepairConfig.min_tokens_per_column")
    parser.add_argument("--compare", action="store_true", help="prune in memory, too, and compare")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    dense = args.folder / "dense"
    try:
        written = make_model(dense, args)
        found: dict[str, Any] = {"model": written, "threads": torch.get_num_threads(), "machine": platform.machine()}
        found["disk"] = run("disk", dense, args.folder / "disk", args)
        found["disk"]["reload"] = child(RELOAD, str(args.folder / "disk"))
        bound = written["bytes"] / 4 + 2 * 2**30
        found["peak_bound_bytes"] = bound
        found["peak_within_bound"] = found["disk"]["peak_bytes"] <= bound
        found["peak_within_statement"] = found["disk"]["peak_bytes"] <= found["disk"]["stated_peak_bytes"]
        if args.compare:
            found["memory"] = run("memory", dense, args.folder / "memory", args)
            found["same_plan"] = found["memory"]["plan"] == found["disk"]["plan"]
            found["largest_weight_difference"] = difference(args.folder / "memory", args.folder / "disk")
    finally:
        for name in ("dense", "disk", "memory"):
            shutil.rmtree(args.folder / name, ignore_errors=True)
    text = json.dumps(found, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


def make_model(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Write a random Llama and a tokenizer of single bytes, one layer in memory at a time."""
    folder.mkdir()
    dtype = getattr(torch, args.dtype)
    config = LlamaConfig(
        vocab_size=args.vocabulary, hidden_size=args.hidden, intermediate_size=args.intermediate,
        num_hidden_layers=args.layers, num_attention_heads=args.heads, num_key_value_heads=args.kv_heads,
        head_dim=128, max_position_embeddings=4096, architectures=["LlamaForCausalLM"], dtype=dtype,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    config.save_pretrained(folder)
    GenerationConfig(bos_token_id=0, eos_token_id=0).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({"</s>": 0, **{letter: 1 + n for n, letter in enumerate(alphabet)}}, []))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>").save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    sites = bound_skeleton(config, dtype)
    parts = [(f"model.layers.{n}.", layer.state_dict()) for n, layer in enumerate(sites.layers)]
    outside = {name: t for name, t in sites.model.state_dict().items() if not name.startswith("model.layers.")}
    places, size, parameters = {}, 0, 0
    for number, (prefix, shapes) in enumerate([*parts, ("", outside)]):
        tensors = {}
        for name, bare in shapes.items():
            tensor = (
                torch.ones(bare.shape)
                if bare.dim() == 1
                else torch.empty(bare.shape).normal_(0, 0.02, generator=generator)
            )
            tensors[prefix + name] = tensor.to(dtype)
        file = f"model-{number + 1:05d}-of-{len(parts) + 1:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, file))
        size += sum(tensor.nbytes for tensor in tensors.values())
        parameters += sum(tensor.numel() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shape = {name: getattr(args, name) for name in ("hidden", "intermediate", "layers", "heads", "kv_heads")}
    return {**shape, "vocabulary": args.vocabulary, "dtype": args.dtype, "parameters": parameters, "bytes": size}


def run(how: str, dense: Path, output: Path, args: argparse.Namespace) -> dict[str, Any]:
    settings = {
        "pruning_ratio": args.ratio,
        "calibration": {"samples": args.windows, "sequence_length": args.length},
        # Random weights have no loss to lower, so held-out windows could not tell a good repair from a bad one.
        "repair": {
            "method": "least_squares", "schedule": "sequential", "holdout": 0.0,
            "min_tokens_per_column": args.tokens_per_column,
        },
    }  # fmt: skip
    return child(CHILD, how, str(dense), str(output), json.dumps(settings))


def child(code: str, *words: str) -> dict[str, Any]:
    out = subprocess.run([sys.executable, "-c", code, *words], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(out.stdout.splitlines()[-1])


def difference(first: Path, second: Path) -> float:
    """The largest absolute difference of two checkpoints' weights, tensor by tensor."""
    one, other = tensors_of(first), tensors_of(second)
    if one.keys() != other.keys():
        raise SystemExit(f"other names: {sorted(one.keys() ^ other.keys())[:5]}")
    largest = 0.0
    for name in one:
        with safe_open(one[name], "pt") as a, safe_open(other[name], "pt") as b:
            largest = max(largest, float((a.get_tensor(name).float() - b.get_tensor(name).float()).abs().max()))
    return largest


def tensors_of(folder: Path) -> dict[str, Path]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            found.update(dict.fromkeys(shard.keys(), file))
    return found


if __name__ == "__main__":
    started = time.perf_counter()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
    print(f"{time.perf_counter() - started:.0f} s in all", file=sys.stderr)
