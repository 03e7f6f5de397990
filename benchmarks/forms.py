"""What the uniform form costs against the adaptive one, and how fast pruned models are, aligned and not.

All forms are decided on one pass over the calibration text, by the recipe `default`. Speed is measured in turns, so
that a machine that slows down slows all models; `ideal` is what parameters promise: those of the decoder layers in
prefill (one position goes through the head), with those of the head in decoding.

    python benchmarks/forms.py quality MODEL --folder DIR --calibration a.jsonl b.txt --report c.txt d.jsonl
    python benchmarks/forms.py speed MODEL --folder DIR
    python benchmarks/llama_cpp.py DIR/*
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_adaprune
from hf_adaprune import PruningConfig, apply_plan, find_sites
from hf_adaprune.calibration import report_blocks
from hf_adaprune.compensation import repair_plan
from hf_adaprune.evaluation import perplexity, throughput
from hf_adaprune.recording import collect_statistics
from hf_adaprune.stages import decide, gather_texts, what_to_collect

HERE = Path(__file__).parent
FORMS: dict[str, dict[str, Any]] = {
    "adaptive": {},
    "adaptive_multiple_32": {"channel_multiple": 32},
    "uniform": {"uniform": True},
    "uniform_multiple_32": {"uniform": True, "channel_multiple": 32},
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("quality", "speed"))
    parser.add_argument("model", help="a folder or hub id")
    parser.add_argument("--folder", type=Path, required=True, help="of the models")
    parser.add_argument("--calibration", nargs="+", default=[])
    parser.add_argument("--report", nargs="+", default=[])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.2, 0.4])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=65536, help="report tokens per source")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int)
    return parser.parse_args()


def quality(args: argparse.Namespace) -> dict[str, Any]:
    """Perplexity of every form; the models are kept in the folder."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    config = PruningConfig.recipe("default", calibration={"sources": args.calibration, "samples": args.samples})
    sites = find_sites(model)
    blocks, _, _ = gather_texts(sites, tokenizer, config, True)
    needs = what_to_collect(config, None)
    assert blocks is not None and needs is not None
    statistics = collect_statistics(sites, blocks, needs, gradient_samples=config.calibration.gradient_samples)
    texts = {
        Path(source).stem: report_blocks(source, tokenizer, tokens=args.tokens, sequence_length=1024)
        for source in args.report
    }
    rows = []

    def add(name: str, own: Any) -> None:
        found = {text: perplexity(own, windows).value for text, windows in texts.items()}
        rows.append({"form": name, "decoder_parameters": find_sites(own).decoder_parameters, **found})
        print(json.dumps(rows[-1]), flush=True)
        own.save_pretrained(args.folder / name)
        tokenizer.save_pretrained(args.folder / name)

    add("dense", model)
    for ratio in args.ratios:
        for form, changes in FORMS.items():
            own = config.with_changes(pruning_ratio=ratio, **changes)
            plan, _ = decide(sites, blocks, own, statistics=statistics)
            repairs = repair_plan(sites, plan, statistics, statistics.sample_weights(()), own.repair)
            pruned = copy.deepcopy(model)
            apply_plan(find_sites(pruned), plan, repairs)
            add(f"{form}_{100 * ratio:.0f}", pruned)
    return {
        "model": Path(args.model).name,
        "calibration": ["/".join(Path(source).parts[-2:]) for source in args.calibration],
        "report": ["/".join(Path(source).parts[-2:]) for source in args.report],
        "samples": args.samples,
        "report_tokens": args.tokens,
        "dtype": "bfloat16",
        "hf_adaprune": hf_adaprune.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rows": rows,
    }


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of every model in the folder, against the dense one and against what parameters promise."""
    paths = sorted(path for path in args.folder.iterdir() if (path / "config.json").exists())
    models = {path.name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16) for path in paths}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for _ in range(args.runs):
        for name, model in models.items():
            runs[name].append(throughput(model, repeats=1))
    head = models["dense"].get_input_embeddings().weight.numel()
    sizes = {name: find_sites(model).decoder_parameters for name, model in models.items()}
    rows = []
    for name in models:
        row: dict[str, Any] = {"form": name}
        for kind, beside in (("prefill", 0), ("decode", head)):
            key = f"{kind}_tokens_per_second"
            own, dense = (median(run[key] for run in runs[which]) for which in (name, "dense"))
            ideal = (sizes["dense"] + beside) / (sizes[name] + beside)
            row |= {key: round(own, 1), f"{kind}_gain": round(own / dense, 3), f"{kind}_ideal": round(ideal, 3)}
            if ideal > 1:
                row[f"{kind}_share"] = round((own / dense - 1) / (ideal - 1), 2)
        rows.append(row)
        print(json.dumps(row), flush=True)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return {"machine": machine, "runs": args.runs, "prefill": 512, "new_tokens": 32, "rows": rows}


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    found = {"quality": quality, "speed": speed}[args.command](args)
    (HERE / "results" / f"forms_{args.command}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
