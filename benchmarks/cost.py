"""What a run costs, stop by stop: a Llama of random weights in a process of its own, against what `--dry-run` says.

Called as `python -m benchmarks.cost '{...}'` by `measure_cost`; prints one JSON object.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_adaprune.errors import AdaPruneError

from .experiments import Shape
from .machine import HERE, forget_peak, peak_bytes, resident_bytes

__all__ = ["measure_cost"]

WINDOW = 512
# A search reads so much selection text per promising trial here.
SELECTION = {"selection_tokens": 6144, "first_tokens": 2048, "final_tokens": 4096}


def measure_cost(shape: Shape, divisor: int, dtype: str) -> dict[str, Any]:
    """Seconds and peak memory of every stop of a run, and the estimate made before it.

    Args:
        shape ([`Shape`]): the model and the work.
        divisor (`int`): sizes are divided by it, for a trial run of the measurement itself.
        dtype (`str`): of the weights.

    Raises:
        AdaPruneError: the process failed.
    """
    import torch

    asked = {"shape": asdict(shape), "divisor": divisor, "dtype": dtype, "threads": torch.get_num_threads()}
    words = [sys.executable, "-m", "benchmarks.cost", json.dumps(asked)]
    done = subprocess.run(words, cwd=HERE.parent, capture_output=True, text=True)
    if done.returncode:
        raise AdaPruneError(f"the cost of {shape.label!r} could not be measured: {done.stderr[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def cost_of(shape: Shape, divisor: int, dtype: str) -> dict[str, Any]:
    """Walk a run in this process, stop by stop."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from hf_adaprune import PruningConfig, find_sites
    from hf_adaprune.estimate import estimate
    from hf_adaprune.pipeline import Sizes, carry_out, decide_and_repair
    from hf_adaprune.search_checks import search_needs
    from hf_adaprune.stages import Clock, gather_texts, what_to_collect

    from .smoke import VOCABULARY, python_texts, tokenizer_of

    class PeakClock(Clock):
        """Counts the peak of memory of every stop, too."""

        peaks: dict[str, int]

        def stop(self, name: str) -> None:
            """Book time and memory since the last stop under a name."""
            super().stop(name)
            self.peaks[name] = max(self.peaks.get(name, 0), peak_bytes())
            forget_peak()

    def smaller(size: int, least: int) -> int:
        return max(least, size // divisor)

    heads = 64 if divisor == 1 else 8
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=heads * shape.heads, intermediate_size=smaller(shape.channels, 16),
        num_hidden_layers=smaller(shape.layers, 2), num_attention_heads=shape.heads, num_key_value_heads=shape.groups,
        head_dim=heads, vocab_size=max(VOCABULARY, smaller(shape.vocabulary, 1)), max_position_embeddings=2048,
        tie_word_embeddings=True,
    )  # fmt: skip
    length = smaller(WINDOW, 32)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    tokenizer = tokenizer_of(python_texts()[0])
    calibration, selection, _ = python_texts()
    sources = {
        "sources": (calibration,), "samples": smaller(shape.samples, 4), "sequence_length": length,
        "gradient_samples": smaller(shape.gradient_samples, 2),
    }  # fmt: skip
    own = PruningConfig.recipe("default", calibration=sources, repair={"min_tokens_per_column": 0.0})
    if shape.trials:
        tokens = {name: smaller(count, 2 * length) for name, count in SELECTION.items()}
        search = {"trials": smaller(shape.trials, 2), "sequence_length": length, **tokens}
        own = own.with_changes(calibration={"selection": (selection,)}, search=search)
    sites = find_sites(model)
    expected = estimate(sites, own)
    forget_peak()
    loaded = resident_bytes()
    clock = PeakClock()
    clock.peaks = {}
    needs = search_needs(own, 1) if own.search is not None else what_to_collect(own, None)
    blocks, held_out, _ = gather_texts(sites, tokenizer, own, True)
    clock.stop("texts")
    made = decide_and_repair(sites, tokenizer, own, blocks, held_out, needs=needs, clock=clock)
    cut = carry_out(sites, made)
    clock.stop("surgery")
    pruning = sum(clock.seconds.values())
    peak = max(clock.peaks.values())
    _save_and_load(model, clock)
    trials = len(made.search.journal.trials) if made.search is not None else 0
    return {
        "pruning_ratio": 1 - Sizes.of(cut).decoder / expected.before.decoder,
        "parameters": expected.before.total,
        "peak_bytes": peak,
        "seconds": {name: round(value, 3) for name, value in clock.seconds.items()},
        "cost": {
            "loaded_bytes": loaded,
            "peaks": clock.peaks,
            "trials": trials,
            "trial_seconds": clock.seconds["search"] / trials if trials else None,
            "run": {"seconds": pruning, "peak_bytes": peak},
            "estimate": {"seconds": expected.seconds, "peak_bytes": expected.peak_bytes},
        },
    }  # fmt: skip


def _save_and_load(model: Any, clock: Any) -> None:
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory(prefix="hf_adaprune_cost_") as place:
        folder = Path(place)
        model.save_pretrained(folder)
        clock.stop("save")
        AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        clock.stop("load")


def main() -> None:
    """Measure what the one argument asks for."""
    import torch
    from transformers.utils import logging

    asked = json.loads(sys.argv[1])
    logging.disable_progress_bar()
    torch.set_num_threads(asked["threads"])
    started = time.perf_counter()
    found = cost_of(Shape(**asked["shape"]), asked["divisor"], asked["dtype"])
    found["seconds"]["process"] = round(time.perf_counter() - started, 3)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
