"""Long runs that die go on: killed at any artefact and started again, they end as an uninterrupted run does."""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES
from conftest import tiny_model as tiny_random_model
from texts import begun_tokenizer, calibration_make_tokenizer, calibration_prose
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_adaprune import PruningConfig, TextSource, find_sites, pipeline, prune, run_artefacts, run_folder, search_plan
from hf_adaprune.calibration import begin_token
from hf_adaprune.errors import CheckpointError, JournalError, RunError
from hf_adaprune.recording import collect_statistics
from hf_adaprune.run_artefacts import kept_statistics
from hf_adaprune.run_facts import model_bytes_digest, tokenizer_digest
from hf_adaprune.run_folder import RunFolder
from hf_adaprune.stages import gather_texts
from hf_adaprune.statistics import Needs, Statistics
from hf_adaprune.workers import Alone

VOCABULARY = 384


@functools.cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return calibration_make_tokenizer(eos_token="</s>")


def tiny_model(family: str = "llama", **changes: object) -> PreTrainedModel:
    return tiny_random_model(family, vocab_size=VOCABULARY, **changes)


def source(name: str, first: int) -> TextSource:
    return TextSource(name, [calibration_prose(seed, 60) for seed in range(first, first + 30)])


TEXT, OTHER = source("words", 1), source("others", 101)
SELECTION, REPORT = source("selection", 201), source("report", 301)
SMALL = {"sources": TEXT, "samples": 16, "sequence_length": 16, "gradient_samples": 4}
SEARCH = {
    "trials": 3, "strategy": "random", "selection_tokens": 128, "first_tokens": 64, "final_tokens": 64,
    "sequence_length": 16, "initial": 2,
}  # fmt: skip


def config_of(recipe: str = "default", **changes: Any) -> PruningConfig:
    calibration = {**SMALL, "evaluation_length": 16, "evaluation_tokens": 128, **changes.pop("calibration", {})}
    repair = {"min_tokens_per_column": 1.0, "holdout": 0.25, **changes.pop("repair", {})}
    changes = {"pruning_ratio": 0.25, **changes}
    return PruningConfig.recipe(recipe, calibration=calibration, repair=repair, **changes)


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(found: Any, wanted: Any) -> None:
    """Two results, bit by bit, but for seconds."""
    assert found.plan == wanted.plan
    own, other = ({**result.to_dict(), "seconds": 0} for result in (found, wanted))
    assert json.dumps(own) == json.dumps(other)
    mine, theirs = found.model.state_dict(), wanted.model.state_dict()
    assert list(mine) == list(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)


class Killed(BaseException):
    """Stands for a kill."""


def killed_at_news(monkeypatch: pytest.MonkeyPatch, seen: set[str], work: Callable[[], Any]) -> bool:
    """Run until an artefact is kept that none of the runs before came to; whether there was one."""
    real = RunFolder.keep

    def keep(run: RunFolder, name: str, *args: Any) -> None:
        real(run, name, *args)
        if name not in seen:
            seen.add(name)
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "keep", keep)
        try:
            work()
        except Killed:
            return True
    return False


def killed_before(monkeypatch: pytest.MonkeyPatch, number: int, work: Callable[[], Any]) -> None:
    """Run until the n-th artefact is about to be kept."""
    real, kept = RunFolder.keep, []

    def keep(run: RunFolder, name: str, *args: Any) -> None:
        if len(kept) == number:
            raise Killed
        real(run, name, *args)
        kept.append(name)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunFolder, "keep", keep)
        work()


WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "cached": ("llama", {"calibration": {"report": REPORT}}),
    "tied in bfloat16, moments on disk": ("gemma2", {"gram_place": "disk"}),
    "sequential": ("qwen3", {"repair": {"schedule": "sequential", "target_mix": 0.5}}),
    "the better one, with biases": ("mistral", {"repair": {"schedule": "best", "intercept": True}}),
    "regional": ("llama", {"repair": {"regional_steps": 2}}),
    "rounds": ("llama", {"recipe": "adapt-pruner", "allocation": {"steps": 2}}),
    "bias": ("qwen2", {"recipe": "flap"}),
    "experts": ("mixtral", {"units": ("expert_channel", "kv_group")}),
    "whole layers": ("llama", {"recipe": "shortgpt", "pruning_ratio": 0.3}),
    "domains": ("gpt_neox", {"calibration": {"sources": (TEXT, OTHER), "domain_weights": (1.0, 3.0)}}),
    "nothing measured": ("llama", {"recipe": "magnitude"}),
}


@pytest.mark.parametrize("way", WAYS)
def test_killed_anywhere_and_started_again_equals_uninterrupted(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, changes = WAYS[way]
    config = config_of(**changes)
    dtype = torch.bfloat16 if "bfloat16" in way else torch.float32

    def run(place: Path | None) -> Any:
        return prune(tiny_model(family).to(dtype), tiny_tokenizer(), config, run_dir=place)

    wanted = run(None)
    seen: set[str] = set()
    while killed_at_news(monkeypatch, seen, lambda: run(tmp_path / "run")):
        assert len(seen) < 60
    assert len(seen) >= (2 if way == "nothing measured" else 4)
    whole = [path.name for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [name for name in whole if name.endswith(".partial") or name == "lock"]
    assert_same(run(tmp_path / "run"), wanted)
    for number in range(1, len(seen), 4):
        place = tmp_path / f"run{number}"
        killed_before(monkeypatch, number, lambda place=place: run(place))
        assert_same(run(place), wanted)


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(calibration={"report": REPORT})
    passes: list[int] = []

    def run(place: Path | None) -> Any:
        model = tiny_model()
        model.base_model.register_forward_hook(lambda module, args, output: passes.append(1))
        return prune(model, tiny_tokenizer(), config, run_dir=place)

    run(None)
    once = len(passes)
    # Sites of one pass are one artefact to a restart; all others are left alone once they are there.
    seen = {f"statistics/layers.{number}.{part}" for number in range(3) for part in ("attention", "mlp")}
    passes.clear()
    while killed_at_news(monkeypatch, seen, lambda: run(tmp_path / "run")):
        assert len(seen) < 60
    # Each pass over text runs in one of the runs: that which keeps what came of it.
    assert len(passes) == once
    passes.clear()
    monkeypatch.setattr(pipeline, "gather_texts", lambda *args: pytest.fail("text was read again"))
    run(tmp_path / "run")
    assert not passes


@pytest.mark.parametrize("way", ["sequential", "regional"])
def test_a_walk_goes_on_at_its_layer(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_adaprune import layerwise

    owner: Any = {"sequential": layerwise, "regional": layerwise._Block}[way]
    name = {"sequential": "_repairs_of", "regional": "optimise"}[way]
    real, calls = getattr(owner, name), []

    def counted(*args: Any) -> Any:
        if len(calls) == 2:
            raise Killed
        calls.append(1)
        return real(*args)

    config = config_of(**WAYS[way][1])
    wanted = prune(tiny_model(), tiny_tokenizer(), config)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, counted)
        prune(tiny_model(), tiny_tokenizer(), config, run_dir=tmp_path / "run")
    calls.clear()
    monkeypatch.setattr(owner, name, counted)
    assert_same(prune(tiny_model(), tiny_tokenizer(), config, run_dir=tmp_path / "run"), wanted)
    assert len(calls) == 1  # the third of three layers


# -- statistics -------------------------------------------------------------------------------------------------------


def equal(own: Statistics, other: Statistics) -> bool:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor):
            return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        return a == b

    parts = [
        same(getattr(own, f.name), getattr(other, f.name)) for f in fields(own) if f.name not in ("sites", "storage")
    ]
    assert list(own.sites) == list(other.sites)
    for name, site in own.sites.items():
        for field in fields(site):
            a, b = getattr(site, field.name), getattr(other.sites[name], field.name)
            if field.name == "elements":
                parts += [list(a) == list(b), *(same(a[path], b[path]) for path in a)]
            else:
                parts.append(same(a, b))
    return all(parts)


@pytest.mark.parametrize(
    ("family", "place"),
    [*((family, "cpu") for family in sorted(FAMILIES)), *itertools.product(("llama", "mixtral"), ("disk", "model"))],
)
def test_statistics_come_back_bit_by_bit(family: str, place: str, tmp_path: Path) -> None:
    sites = find_sites(tiny_model(family))
    blocks = gather_texts(sites, tiny_tokenizer(), config_of(calibration={"sources": (TEXT, OTHER)}), True)[0]
    assert blocks is not None
    needs = Needs(*(name != "elements" or family == "llama" for name in Needs.__dataclass_fields__))
    passes = []

    def collect(folder: str | None) -> Statistics:
        passes.append(folder)
        return collect_statistics(sites, blocks, needs, gradient_samples=4, gram_place=place, folder=folder)

    def kept() -> Statistics:
        run = RunFolder(tmp_path)
        how: dict[str, Any] = {"gradient_samples": 4, "gram_place": place, "folder": None}
        return kept_statistics(run, sites, blocks, needs, Alone(), collect, **how)

    first, again = kept(), kept()
    assert len(passes) == 1 and equal(first, again)
    assert equal(again, collect_statistics(sites, blocks, needs, gradient_samples=4))
    size = run_artefacts.statistics_bytes(sites, *blocks.input_ids.shape, len(blocks.domains), needs, 4)
    written = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    assert size <= written < 1.5 * size + 100_000
    # What a caller changes stays the caller's.
    next(iter(again.sites.values())).gram.add_(1)  # type: ignore[union-attr]
    assert equal(first, kept())
    # A damaged part makes all of it again: sums of one pass belong together.
    largest = max(tmp_path.rglob("*.safetensors"), key=lambda file: file.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[-3] ^= 4
    largest.write_bytes(bytes(data))
    assert equal(kept(), again) is False and len(passes) == 2  # `again` was changed above
    assert equal(kept(), collect_statistics(sites, blocks, needs, gradient_samples=4)) and len(passes) == 2


def test_moments_on_disk_are_not_copied(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    prune(tiny_model(), tiny_tokenizer(), config_of(gram_place="disk"), run_dir=run_dir)
    notes = [json.loads(file.read_text())["data"] for file in (run_dir / "statistics").rglob("*.json")]
    assert len(notes) == 6 and all((run_dir / note["file"]).is_file() for note in notes)
    sites = find_sites(tiny_model())
    moments = sum(4 * site.columns**2 for site in sites)
    everything = sum(file.stat().st_size for file in run_dir.rglob("moments/**/*.safetensors"))
    assert moments <= everything < moments + 6 * 200


@pytest.mark.parametrize(
    "artefact", ["pool", "plan", "statistics", "statistics/layers.1.mlp", "repairs/*/layers.1.mlp", "repairs/*-check"]
)
def test_a_damaged_artefact_is_made_again(artefact: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of()
    wanted = prune(tiny_model(), tiny_tokenizer(), config, run_dir=tmp_path / "run")
    (note,) = (tmp_path / "run").glob(f"{artefact}.json")
    file = note.with_suffix(".safetensors") if note.with_suffix(".safetensors").is_file() else note
    file.write_bytes(file.read_bytes()[:-8])
    # So that the statistics are asked for.
    (cached,) = (tmp_path / "run").glob("repairs/*/layers.0.mlp.json")
    cached.unlink()
    assert_same(prune(tiny_model(), tiny_tokenizer(), config, run_dir=tmp_path / "run"), wanted)
    assert f"{note.with_suffix('')} of an earlier run is damaged and is made again" in caplog.text
    assert note.is_file()


# -- what changed -----------------------------------------------------------------------------------------------------


def test_a_changed_input_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text(calibration_prose(1, 1200))
    place, text = tmp_path / "run", {"sources": str(tmp_path / "a.txt")}
    changes: dict[str, Any] = {"calibration": text}

    def run(model: PreTrainedModel | None = None, tokenizer: Any = None, plan: Any = None, **more: Any) -> Any:
        config = config_of(**{**changes, **more})
        return prune(model or tiny_model(), tokenizer or tiny_tokenizer(), config, plan=plan, run_dir=place)

    plan = run().plan
    model = tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] += 1e-3
    other = calibration_make_tokenizer(eos_token="<|end|>")
    theta, eager = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}, tiny_model()
    eager.set_attn_implementation("eager")
    for work, name in [
        (lambda: run(pruning_ratio=0.3), r"else: pruning_ratio 0\.25 -> 0\.3\. Give"),
        (lambda: run(calibration={**text, "samples": 9}), r"else: calibration\.samples 16 -> 9\. Give"),
        (lambda: run(model), r"else: weights of the model\. Give"),
        (lambda: run(tiny_model(**theta)), r"else: model\.rope_parameters\.rope_theta 10000\.0 -> 100\.0\. Give"),
        (lambda: run(eager), r'else: model\.attention implementation "sdpa" -> "eager"\. Give'),
        (lambda: run(tokenizer=other), r"else: tokenizer\. Give"),
        (lambda: run(plan=plan), r"else: plan\. Give"),
        (lambda: run(recipe="flap"), r"importance"),
    ]:
        with pytest.raises(RunError, match=name):
            work()
    (tmp_path / "a.txt").write_text(calibration_prose(2, 1200))
    with pytest.raises(RunError, match=r"else: texts\.calibration text .*a\.txt\. Give"):
        run()
    (tmp_path / "a.txt").write_text(calibration_prose(1, 1200))
    with monkeypatch.context() as patch:
        patch.setattr("hf_adaprune.__version__", "9.9")
        with pytest.raises(RunError, match=r'version of hf_adaprune ".*" -> "9\.9"'):
            run()
    model = tiny_model()
    model.config.use_cache, model.config.name_or_path = False, "elsewhere"  # nothing that changes outputs
    assert run(model).plan == plan


def test_a_tokenizer_that_begins_texts_with_bos_is_another_one() -> None:
    """Windows begin with a token that is the tokenizer's BOS; the rules alone do not say which one that is."""
    begun = begun_tokenizer()
    unnamed = PreTrainedTokenizerFast(tokenizer_object=begun.backend_tokenizer, eos_token="<eos>")
    assert begun.backend_tokenizer.to_str() == unnamed.backend_tokenizer.to_str()
    assert begin_token(begun) is not None and begin_token(unnamed) is None
    assert len({tokenizer_digest(own) for own in (begun, unnamed, begun_tokenizer(adds=False))}) == 3


def test_every_byte_of_the_weights_counts() -> None:
    sites = find_sites(tiny_model())
    before = model_bytes_digest(sites)
    weight = sites.sites[-1].reader.parameter
    with torch.no_grad():
        weight[-1, -1] = torch.nextafter(weight[-1, -1], torch.tensor(9.0))
    assert model_bytes_digest(sites) != before == model_bytes_digest(find_sites(tiny_model()))


def test_a_disk_without_room_is_refused_before_the_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    model = tiny_model()
    before = weights_of(model)
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: usage(10**9, 0, 1000))
    monkeypatch.setattr(pipeline, "decide", pipeline.decide)
    with pytest.raises(CheckpointError, match="0 MiB free, the statistics need"):
        prune(model, tiny_tokenizer(), config_of(), run_dir=tmp_path / "run")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# -- searches ---------------------------------------------------------------------------------------------------------


def trials_of(journal: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("seconds", "elapsed")} for row in rows]


@pytest.mark.parametrize("gram_place", ["cpu", "disk"])
def test_a_search_goes_on_by_the_same_call(gram_place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_adaprune import parallel
    from hf_adaprune.search.journal import Journal

    config = config_of(
        calibration={"selection": SELECTION, "sources": (TEXT, OTHER)}, search=SEARCH, gram_place=gram_place
    )

    def run(name: str, **options: Any) -> Any:
        journal = tmp_path / f"{name}.jsonl"
        return prune(tiny_model(), tiny_tokenizer(), config, journal=journal, **options)

    wanted = run("whole")
    real, added = Journal.add, []

    def add(journal: Journal, trial: Any) -> None:
        real(journal, trial)
        added.append(trial)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", add)
        for _ in range(2):
            with pytest.raises(Killed):
                run("parts", run_dir=tmp_path / "run")
    assert len(added) == 2
    with monkeypatch.context() as patch:
        patch.setattr(parallel, "collect_statistics", lambda *args, **options: pytest.fail("measured again"))
        assert_same(run("parts", run_dir=tmp_path / "run"), wanted)
        assert trials_of(tmp_path / "parts.jsonl") == trials_of(tmp_path / "whole.jsonl")
        found = search_plan(
            tiny_model(), tiny_tokenizer(), config, journal=tmp_path / "parts.jsonl", run_dir=tmp_path / "run"
        )
    assert found.plan == wanted.plan
    with pytest.raises(JournalError, match="there is a journal"):
        run("parts", run_dir=tmp_path / "another")
    assert not (tmp_path / "another").exists()
    with pytest.raises(RunError, match=r"journal .*parts\.jsonl.* -> .*new\.jsonl"):
        run("new", run_dir=tmp_path / "run")


# -- real kills -------------------------------------------------------------------------------------------------------

DEADLY = """
import os, signal, sys, torch
torch.set_num_threads(1)
from hf_adaprune import cli
from hf_adaprune.run_folder import RunFolder
real, wanted = RunFolder.keep, sys.argv.pop(1)
def keep(run, name, *args):
    real(run, name, *args)
    if wanted in name:
        os.kill(os.getpid(), signal.SIGKILL)
RunFolder.keep = keep
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("way", [[], ["--layer-by-layer"]])
def test_sigkill_and_the_same_command(way: list[str], tmp_path: Path) -> None:
    from hf_adaprune import cli

    tiny_model().save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "a.txt").write_text(calibration_prose(1, 3000))
    (tmp_path / "b.txt").write_text(calibration_prose(2, 600))
    work = tmp_path / "work"
    text = ["--calibration", str(tmp_path / "a.txt"), "--report", str(tmp_path / "b.txt")]
    words = ["prune", str(tmp_path / "dense"), *text, "--samples", "16", "--sequence-length", "32", "--quiet", *way]
    assert cli.main([*words, "--output", str(tmp_path / "whole")]) == 0
    words += ["--output", str(work / "out")]
    for artefact in ("statistics/layers.1", "repairs/") if not way else ("layers/dense/0001", "repairs/"):
        ran = subprocess.run(
            [sys.executable, "-c", DEADLY, artefact, *words], env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert ran.returncode == -signal.SIGKILL
        assert not (work / "out").exists() and (work / "out.run" / "pool.json").is_file()
    assert cli.main(words) == 0
    assert [path.name for path in work.iterdir()] == ["out"]  # neither run, nor lock, nor what the kills left half done
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (work / "out").iterdir())
    for name in names:
        own, other = ((folder / name).read_bytes() for folder in (work / "out", tmp_path / "whole"))
        if name == "pruning_config.json":
            own, other = ({**json.loads(data), "seconds": 0} for data in (own, other))
        assert own == other, name
