"""Kills, full disks and folders that cannot be written: nothing is lost or left, and what to do is said."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import dense, prune_words, refused, search_words, work  # noqa: F401
from test_pipeline import config_of, passage, tiny_model, tiny_tokenizer

from hf_adaprune import TextSource, cli, find_sites, prune, prune_to_disk, search_plan, whole_files
from hf_adaprune.activations import Activations, ActivationStore
from hf_adaprune.errors import CheckpointError, ConfigError, JournalError, StatisticsError
from hf_adaprune.recording import collect_statistics
from hf_adaprune.search.journal import Journal
from hf_adaprune.statistics import Needs

ROOT = Path(__file__).parent.parent
SHORT = """
import json, pathlib, sys
from benchmarks import full_disk, kills
folder = pathlib.Path(sys.argv[1])
found = kills.measure(folder, ["save_pretrained"], 4, 0)
disk = full_disk.measure(folder, ["save_pretrained"], 200.0)
(folder / "found.json").write_text(json.dumps([found, disk]))
"""


def test_a_few_kills_and_full_disks(tmp_path: Path) -> None:
    """The whole of it: `python -m benchmarks.kills` and `python -m benchmarks.full_disk`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-W", "ignore", "-c", SHORT, str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    kills, disk = json.loads((tmp_path / "found.json").read_text())
    assert kills["kills"] == 4 and not kills["broken"]
    assert disk["told"] >= 2 and disk["limits"] > disk["told"] and not disk["broken"]


def _full(*args: object, **options: object) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_journal_that_cannot_be_written_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = TextSource("choice", [passage(seed) for seed in range(60, 90)])
    search = {"trials": 4, "strategy": "random", "selection_tokens": 64, "first_tokens": 64, "final_tokens": 64,
              "sequence_length": 16}  # fmt: skip
    config = config_of(search=search, calibration={"selection": choice})
    synced, sync = [], os.fsync

    def fills_up(file: int) -> None:
        synced.append(sync(file))
        if len(synced) == 3:
            _full()

    monkeypatch.setattr("hf_adaprune.search.journal.os.fsync", fills_up)
    file = tmp_path / "journal.jsonl"
    with pytest.raises(JournalError, match=r"No space left .* go on with it"):
        prune(tiny_model("llama"), tiny_tokenizer(), config, journal=file)
    kept = Journal.load(file).trials
    monkeypatch.undo()
    result = prune(tiny_model("llama"), tiny_tokenizer(), config, journal=file, resume=True)
    assert result.search is not None and result.search.journal.trials[: len(kept)] == kept and len(kept) == 2
    assert len(result.search.journal.trials) == 4


@pytest.mark.parametrize("command", ["prune", "search"])
def test_a_folder_that_cannot_be_written_is_refused_before_any_work(
    dense: Path, work: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    """The journal's folder too, which may be another one than the output's."""

    def read_only(dir: Path) -> Any:
        if dir.name == "locked":
            raise OSError(errno.EROFS, "Read-only file system")
        return temporary(dir=dir)

    (work / "locked").mkdir()
    temporary = whole_files.tempfile.TemporaryFile
    monkeypatch.setattr(whole_files.tempfile, "TemporaryFile", read_only)
    monkeypatch.setattr(cli.Loader, "model", lambda self: pytest.fail("the model was loaded"))
    if command == "prune":
        words = prune_words(dense, work, "--output", str(work / "locked" / "out"))
    else:
        words = search_words(dense, work, "--journal", str(work / "locked" / "new" / "journal.jsonl"), "--trials", "3")
    assert "not writable (Read-only file system)" in refused(capsys, *words)
    assert not list((work / "locked").iterdir())


def test_a_disk_without_room_for_moments_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Touching a page that has no room would end the process, without a word."""
    from texts import random_blocks

    sites = find_sites(tiny_model("llama"))
    before = {name: value.clone() for name, value in sites.model.state_dict().items()}
    options = {"gram_place": "disk", "folder": tmp_path}
    found = collect_statistics(sites, random_blocks(2), Needs(gram=True), **options)
    assert all(os.stat(file).st_blocks * 512 >= own.gram.nbytes for own in found.sites.values() for file in
               tmp_path.glob("*/layers.0.mlp.safetensors") if own is found.sites["layers.0.mlp"])  # fmt: skip
    monkeypatch.setattr(os, "posix_fallocate", _full)
    with pytest.raises(StatisticsError, match=r"^layers\.0\.attention: no room .*TMPDIR, or --run-dir"):
        collect_statistics(sites, random_blocks(2), Needs(gram=True), **options)
    assert all(torch.equal(value, before[name]) for name, value in sites.model.state_dict().items())


def test_a_disk_without_room_for_activations_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ActivationStore(0, tmp_path)
    Activations(store).append(torch.ones(2, 3))
    monkeypatch.setattr("hf_adaprune.activations.save_file", _full)
    with pytest.raises(CheckpointError, match="activations could not be written"):
        Activations(store).append(torch.ones(2, 3))
    with pytest.raises(CheckpointError, match="No space left"):
        prune_to_disk(
            tiny_model("llama"), tiny_tokenizer(), config_of("flap", activation_bytes=1), tmp_path / "deep" / "out"
        )
    assert not list((tmp_path / "deep").iterdir())


def test_a_plan_that_cannot_be_written_stops_the_run_before_the_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(Path, "write_text", _full)
    with pytest.raises(CheckpointError, match=r"plan\.json could not be written: .* Free some space"):
        prune(model, None, config_of("magnitude"), plan_path=tmp_path / "plan.json")
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_place_of_a_plan_that_cannot_be_is_told_before_any_text_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    place = {"plan_path": tmp_path / "file" / "plan.json"}
    config = config_of("flap").with_changes(calibration={"sources": str(tmp_path / "missing.txt")})
    with pytest.raises(CheckpointError, match="file"):
        prune(tiny_model("llama"), tiny_tokenizer(), config, **place)
    with pytest.raises(CheckpointError, match="file"):
        prune_to_disk(tiny_model("llama"), tiny_tokenizer(), config, tmp_path / "out", **place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_in_place_of_a_file_is_told_before_any_text_is_read(resume: bool, tmp_path: Path) -> None:
    for name in ("plan", "journal"):
        (tmp_path / name).mkdir()
    missing = {"calibration": {"sources": str(tmp_path / "missing.txt"), "selection": "python"}}
    config = config_of("flap").with_changes(**missing)
    place = {"plan_path": tmp_path / "plan"}
    with pytest.raises(ConfigError, match=r"`plan_path` should be a file. Found the folder '.*plan'; name a file"):
        prune(tiny_model("llama"), tiny_tokenizer(), config, **place)
    with pytest.raises(ConfigError, match="`plan_path` should be a file"):
        prune_to_disk(tiny_model("llama"), tiny_tokenizer(), config, tmp_path / "out", **place)
    searched = config_of("default", search={}).with_changes(**missing)
    for run in (prune, search_plan):
        with pytest.raises(ConfigError, match=r"`journal` should be a file. Found the folder '.*journal'"):
            run(tiny_model("llama"), tiny_tokenizer(), searched, journal=tmp_path / "journal", resume=resume)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["journal", "plan"]


def test_an_error_of_the_disk_anywhere_is_one_line(
    dense: Path, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.setattr(cli.Loader, "model", _full)
    assert "No space left on device. Free some space" in refused(capsys, *prune_words(dense, work))

    def broken(self: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(cli.Loader, "model", broken)
    with pytest.raises(OSError, match="Input/output error"):
        cli.main(prune_words(dense, work))
