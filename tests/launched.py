"""What `test_parallel` starts as several processes: statistics, a search and its resumption, and failures.

Every process writes what it saw to `FOLDER/rank<N>.pt`; `crash` lets one of them fail without anybody catching it.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from conftest import tiny_model
from texts import calibration_make_tokenizer, calibration_prose, random_blocks

from hf_adaprune import PruningConfig, TextSource, find_sites, measures, parallel, prune, search_plan, sweeps
from hf_adaprune.parallel import Processes, collect_together, processes
from hf_adaprune.recording import collect_statistics
from hf_adaprune.statistics import Needs, Statistics
from hf_adaprune.token_blocks import TokenBlocks
from hf_adaprune.workers import Alone

EVERYTHING = Needs(gram=True, gradients=True, elements=True, cosine=True, squares=True, per_domain=True)
TRIALS = 8
FORWARD_TOKENS = 22  # two windows
BATCH_TOKENS = 32  # one window of a trial, so that processes can share a trial
PROSE = [calibration_prose(seed, 60) for seed in range(60)]


def uneven_blocks() -> TokenBlocks:
    """Windows of three domains, the last with a single one, some of them padded."""
    blocks = random_blocks(9, domains=3, padding=(2, 0, 3))
    domain = torch.tensor([0, 1, 0, 0, 1, 0, 2, 0, 0])
    return TokenBlocks(blocks.input_ids, blocks.attention_mask, domain, blocks.domains)


def statistics_of(workers: Alone, family: str, **options: Any) -> Statistics:
    """Of a tiny model."""
    blocks = options.pop("blocks", None) or uneven_blocks()
    sites = find_sites(tiny_model(family))
    if workers.count == 1:
        return collect_statistics(sites, blocks, EVERYTHING, gradient_samples=5, **options)
    return collect_together(sites, blocks, EVERYTHING, workers, gradient_samples=5, **options)


def tensors_of(statistics: Statistics) -> dict[str, Any]:
    """Everything in statistics, by name."""
    found: dict[str, Any] = {"digest": statistics.digest}
    for name in ("tokens", "domain", "gradient_index", "cosine"):
        found[name] = getattr(statistics, name)
    for site, own in statistics.sites.items():
        for name, value in vars(own).items():
            parts = value.items() if isinstance(value, dict) else [("", value)]
            found.update({f"{site} {name} {part}": tensor for part, tensor in parts})
    return found


def search_config(**search: Any) -> PruningConfig:
    """Of a search that takes a second."""
    calibration = {
        "sources": (TextSource("one", PROSE[:20]), TextSource("two", PROSE[20:40])), "samples": 24,
        "selection": (TextSource("choice", PROSE[40:]),), "sequence_length": 16, "gradient_samples": 4,
    }  # fmt: skip
    fields = {
        "trials": TRIALS, "strategy": ("random:3", "sobol"), "batch": 2, "selection_tokens": 128, "first_tokens": 64,
        "final_tokens": 128, "sequence_length": 32, "finalists": 3, **search,
    }  # fmt: skip
    repair = {"min_tokens_per_column": 1.0, "holdout": 0.25}
    return PruningConfig.recipe("default", pruning_ratio=0.25, calibration=calibration, search=fields, repair=repair)


def weights_digest(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def text_model() -> Any:
    return tiny_model("llama", vocab_size=384)


def error_of(run: Callable[[], Any]) -> tuple[str, str]:
    """What it raises."""
    try:
        run()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def failing(rank: int, on: int, call: int = 3) -> Callable[[Any], float]:
    """An objective that fails on one process, at its so-many-th call."""
    calls = itertools.count(1)

    def objective(model: Any) -> float:
        if rank == on and next(calls) == call:
            raise OSError("the disk under rank 1 is gone")
        return 1.0

    return objective


class Odd(Exception):
    """Cannot be pickled and read back."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__("odd")


def main(folder: Path) -> None:
    sweeps.FORWARD_TOKENS, measures.BATCH_TOKENS = FORWARD_TOKENS, BATCH_TOKENS
    workers = processes()
    assert isinstance(workers, Processes)
    saw: dict[str, Any] = {"count": workers.count}
    saw["talk"] = (workers.share(f"from {workers.rank}"), workers.gather([workers.rank] * (workers.rank + 1)))
    kept = {name: statistics_of(workers, name) for name in ("llama", "mixtral")}
    kept["disk"] = statistics_of(workers, "llama", gram_place="disk", folder=folder / f"disk{workers.rank}")
    kept["few"] = statistics_of(workers, "llama", blocks=random_blocks(1))  # one process has nothing to do
    saw["statistics"] = {name: tensors_of(own) for name, own in kept.items()}

    tokenizer = calibration_make_tokenizer(eos_token="</s>")
    model = text_model()
    paths = {"journal": folder / "whole.jsonl", "plan_path": folder / "plan.json"}
    result = prune(model, tokenizer, search_config(), **paths)
    assert result.search is not None
    saw["whole"] = (result.plan.digest, weights_digest(model), result.search.winner.number)
    saw["trials"] = [replace(trial, seconds=0.0, elapsed=0.0) for trial in result.search.journal.trials]
    if workers.rank == 0:
        lines = (folder / "whole.jsonl").read_bytes().splitlines(keepends=True)
        # Killed in the middle of a round, while writing.
        (folder / "resumed.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:40])
    workers.share(None)
    found = search_plan(text_model(), tokenizer, search_config(), journal=folder / "resumed.jsonl", resume=True)
    saw["resumed"] = (found.plan.digest, [replace(trial, seconds=0.0, elapsed=0.0) for trial in found.journal.trials])

    passes: list[int] = []
    real = parallel.collect_statistics
    parallel.collect_statistics = lambda *args, **options: passes.append(1) or real(*args, **options)
    kept_run = {"journal": folder / "kept.jsonl", "run_dir": folder / "run"}
    plans = [search_plan(text_model(), tokenizer, search_config(), **kept_run).plan.digest for _ in range(2)]
    parallel.collect_statistics = real
    saw["kept run"] = (plans, len(passes))
    other_inputs = search_config().with_changes(pruning_ratio=0.3)
    saw["other run"] = error_of(lambda: search_plan(text_model(), tokenizer, other_inputs, **kept_run))

    custom = search_config(objective="custom")
    fails = failing(workers.rank, on=1)
    saw["failed trial"] = error_of(lambda: search_plan(text_model(), tokenizer, custom, objective=fails))
    there = folder / "whole.jsonl"
    saw["journal there"] = error_of(lambda: search_plan(text_model(), tokenizer, search_config(), journal=there))
    broken = text_model()
    if workers.rank == 1:
        broken.model.embed_tokens.weight.data.fill_(1e38)  # finite, until it is squared
    saw["failed statistics"] = error_of(lambda: search_plan(broken, tokenizer, search_config()))
    other = random_blocks(4, seed=workers.rank)
    saw["other text"] = error_of(lambda: statistics_of(workers, "llama", blocks=other))

    rest = [PROSE[40][:300]] if workers.rank else PROSE[40:]  # fewer windows on one of them
    other = search_config().with_changes(calibration={"selection": (TextSource("choice", rest),)})
    saw["other selection"] = error_of(lambda: search_plan(text_model(), tokenizer, other))

    def odd() -> None:
        if workers.rank == 1:
            raise Odd(1, 2)

    saw["odd"] = error_of(lambda: workers.each(odd))
    saw["still in step"] = workers.gather([workers.rank])
    torch.save(saw, folder / f"rank{workers.rank}.pt")


def crash() -> None:
    workers = processes()
    tokenizer = calibration_make_tokenizer(eos_token="</s>")
    search_plan(text_model(), tokenizer, search_config(objective="custom"), objective=failing(workers.rank, on=1))


if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    try:
        crash() if sys.argv[1] == "crash" else main(Path(sys.argv[1]))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
