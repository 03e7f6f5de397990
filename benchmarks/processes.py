"""One process against several on one machine: the same statistics, trials and plan, and how much sooner.

    python -m benchmarks.processes --out benchmarks/results/processes.json          # a random Llama, CPython's texts
    python -m benchmarks.processes --model DIR --windows 64 --length 512 --trials 24

Every process has `--threads` threads, so the machine should have processes times threads idle cores; with fewer the
ratio says nothing. Launches take turns, and medians are over them. Times are of the work alone: statistics of all
windows, and the trials of a search with their proposals by its own clock; not of imports and texts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .machine import HERE, commit, processor, versions

__all__ = ["compare"]

PER_SAMPLE = ("sums", "squares", "counts", "first_order", "output_gradients")


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = whole.add_argument
    add("--model", help="folder or id on the Hub; a random Llama where not given")
    add("--dtype", default="float32")
    add("--hidden", type=int, default=512)
    add("--layers", type=int, default=12)
    add("--windows", type=int, default=48)
    add("--gradient-windows", type=int, default=16)
    add("--length", type=int, default=256)
    add("--trials", type=int, default=16)
    add("--selection-tokens", type=int, default=8192)
    add("--strategy", default="random", help="random proposals cost nothing, so the ratio is that of trials")
    add("--batch", type=int, default=8, help="trials that are proposed together, which the processes share")
    add("--processes", type=int, default=2)
    add("--threads", type=int, default=1, help="of every process")
    add("--repeats", type=int, default=3)
    add("--out", type=Path, help="JSON file of the results")
    add("--child", type=Path, help=argparse.SUPPRESS)
    return whole


def main() -> None:
    args = parser().parse_args()
    if args.child is not None:
        _measure(args)
        return
    found = compare(args)
    text = json.dumps(found, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    if not found["identical"]["all"]:
        raise SystemExit("several processes found something else than one")


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Launch one process and several, in turns.

    Args:
        args (`argparse.Namespace`): of [`parser`].

    Returns:
        `dict[str, Any]`: what is identical, medians of seconds, and their ratios.
    """
    alone: list[dict[str, Any]] = []
    together: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.repeats):
            alone.append(_launch(1, args, Path(folder) / f"one{turn}"))
            together.append(_launch(args.processes, args, Path(folder) / f"several{turn}"))
        grams = _gram_difference(Path(folder) / "one0", Path(folder) / "several0")
    one, several = alone[0], together[0]
    same = {name: one[name] == several[name] for name in ("per_sample", "plan", "points", "keys", "winner", "windows")}
    values = [abs(a / b - 1) for a, b in zip(one["values"], several["values"], strict=True)]
    times = {
        what: {
            "one": statistics.median(own[what] for own in alone),
            "several": statistics.median(own[what] for own in together),
        }
        for what in ("statistics_seconds", "trials_seconds")
    }
    return {
        "identical": {
            **same,
            "all": all(same.values()) and grams == 0 and max(values) == 0,
            "gram_largest_relative_difference": grams,
            "trial_values_largest_relative_difference": max(values),
        },
        "seconds": times,
        "throughput_ratio": {what: own["one"] / own["several"] for what, own in times.items()},
        "runs": {"one": [_times(own) for own in alone], "several": [_times(own) for own in together]},
        "asked": {key: value for key, value in vars(args).items() if key not in ("out", "child")},
        "load_before": one["load"],
        "machine": {"commit": commit(), "versions": versions(), "cpu": processor(), "cores": os.cpu_count()},
    }


def _times(own: dict[str, Any]) -> dict[str, float]:
    return {what: own[what] for what in ("statistics_seconds", "trials_seconds", "load")}


def _launch(count: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(count), "--master_addr", "127.0.0.1"]
    start = [*launcher, "--master_port", port] if count > 1 else []
    asked = [
        word
        for key, value in vars(args).items()
        if value is not None and key not in ("out", "child", "processes", "repeats")
        for word in (f"--{key.replace('_', '-')}", str(value))
    ]
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(args.threads), "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    words = [sys.executable, *start, "-m", "benchmarks.processes", *asked, "--child", str(folder)]
    done = subprocess.run(words, cwd=HERE.parent, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{count} processes failed: {done.stderr[-3000:]}")
    return json.loads((folder / "found.json").read_text(encoding="utf-8"))


def _gram_difference(one: Path, other: Path) -> float:
    """The largest difference of Gram matrices, over the largest entry of its matrix."""
    from safetensors import safe_open

    largest = 0.0
    with safe_open(one / "grams.safetensors", "pt") as a, safe_open(other / "grams.safetensors", "pt") as b:
        for name in a.keys():  # noqa: SIM118
            own = a.get_tensor(name)
            largest = max(largest, float((own - b.get_tensor(name)).abs().max() / own.abs().max().clamp(min=1e-30)))
    return largest


# -- in a process of a launch -----------------------------------------------------------------------------------------


def _measure(args: argparse.Namespace) -> None:
    import torch
    from safetensors.torch import save_file

    from hf_adaprune import PruningConfig, find_sites, search_plan
    from hf_adaprune.parallel import collect_together, processes
    from hf_adaprune.search.journal import mean_value
    from hf_adaprune.search_checks import search_needs
    from hf_adaprune.stages import gather_texts

    torch.set_num_threads(args.threads)
    model, tokenizer, text, selection = _setting(args)
    workers = processes()
    config = PruningConfig.recipe(
        "default",
        pruning_ratio=0.2,
        calibration={
            "sources": text, "selection": selection, "samples": args.windows, "sequence_length": args.length,
            "gradient_samples": args.gradient_windows,
        },
        search={
            "trials": args.trials, "strategy": args.strategy, "batch": args.batch,
            "selection_tokens": args.selection_tokens, "first_tokens": args.selection_tokens // 4,
            "final_tokens": args.selection_tokens, "sequence_length": args.length,
        },
        repair={"min_tokens_per_column": 0.0},
    )  # fmt: skip
    sites = find_sites(model)
    needs = search_needs(config, 1)
    blocks, _, _ = gather_texts(sites, tokenizer, config, True)
    assert blocks is not None
    collect_together(sites, blocks.select(slice(0, 2 * workers.count)), needs, workers, gradient_samples=2)  # warm
    workers.gather([0])
    load, started = os.getloadavg()[0], time.perf_counter()
    kept = collect_together(sites, blocks, needs, workers, gradient_samples=args.gradient_windows)
    workers.gather([0])
    seconds = time.perf_counter() - started
    digest = hashlib.sha256()
    for name, own in sorted(kept.sites.items()):
        for part in PER_SAMPLE:
            value = getattr(own, part)
            digest.update(f"{name} {part}".encode() + (b"" if value is None else value.contiguous().numpy().tobytes()))
    found = search_plan(model, tokenizer, config)
    if workers.rank == 0:
        trials = found.journal.trials
        save_file({name: own.gram for name, own in kept.sites.items()}, args.child / "grams.safetensors")
        data = {
            "statistics_seconds": seconds,
            "trials_seconds": found.journal.elapsed,
            "per_sample": digest.hexdigest(),
            "plan": found.plan.digest,
            "points": [{path: repr(value) for path, value in trial.point.items()} for trial in trials],
            "keys": [trial.key for trial in trials],
            "windows": [trial.windows for trial in trials],
            "values": [mean_value(trial.rows) for trial in trials],
            "winner": found.winner.number,
            "load": load,
        }
        (args.child / "found.json").write_text(json.dumps(data), encoding="utf-8")
    if workers.count > 1:
        torch.distributed.destroy_process_group()


def _setting(args: argparse.Namespace) -> tuple[Any, Any, Any, Any]:
    """A model, its tokenizer, and calibration and selection text."""
    import torch

    from .machine import load
    from .smoke import VOCABULARY, python_texts, tokenizer_of

    text, selection, _ = python_texts(2_000_000)
    if args.model:
        return *load(args.model, getattr(torch, args.dtype)), text, selection
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=args.hidden, intermediate_size=args.hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden // 32, num_key_value_heads=args.hidden // 64,
        head_dim=32, max_position_embeddings=2048, eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(getattr(torch, args.dtype)).eval(), tokenizer_of(text), text, selection


if __name__ == "__main__":
    main()
