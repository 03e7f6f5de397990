"""Laws of several processes: statistics, trials and plans are those of one, and nobody waits for the fallen.

The processes are real ones: two, over gloo, started by `accelerate launch` and by `torchrun`; see `launched`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import launched
import pytest
import torch
from texts import calibration_make_tokenizer, random_blocks

from hf_adaprune import measures, search_plan, sweeps
from hf_adaprune.parallel import collect_together, processes
from hf_adaprune.search.journal import Journal
from hf_adaprune.workers import Alone

SECONDS = 120  # a launch takes ten; more is a hang


def run(launcher: list[str], *arguments: str, script: str = launched.__file__) -> tuple[int, str, float]:
    """Start two processes of a script and wait: exit code, what was said, and seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", *launcher, port, str(Path(script)), *arguments]
    none = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE", "PYTHONWARN"))}
    environment = {**none, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "HF_HOME": os.devnull}
    started = time.monotonic()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
    )
    try:
        said, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()  # a launcher ends what it started
        said, _ = process.communicate(timeout=60)
        pytest.fail(f"two processes hang: {said[-4000:]}")
    return process.returncode, said, time.monotonic() - started


ACCELERATE = [
    "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_ip", "127.0.0.1", "--main_process_port",
]  # fmt: skip
TORCHRUN = ["torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    code, said, _ = run(ACCELERATE, str(folder))
    assert code == 0, said[-6000:]
    return folder


@pytest.fixture(scope="module")
def saw(folder: Path) -> list[dict[str, Any]]:
    """What each of the two processes saw."""
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def test_one_process_is_alone_and_initialises_nothing() -> None:
    workers = processes()
    assert type(workers) is Alone and (workers.count, workers.rank) == (1, 0)
    assert not torch.distributed.is_initialized()
    assert workers.share(3) == 3 and workers.gather([1, 2]) == [1, 2] and workers.lead(int) == workers.each(int) == 0


def test_processes_hear_each_other(saw: list[dict[str, Any]]) -> None:
    for own in saw:
        assert own["count"] == 2 and own["talk"] == ("from 0", [0, 1, 1])


@pytest.mark.parametrize("name", ["llama", "mixtral", "disk", "few"])
def test_statistics_are_those_of_one_process(
    saw: list[dict[str, Any]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeps, "FORWARD_TOKENS", launched.FORWARD_TOKENS)
    blocks = random_blocks(1) if name == "few" else None
    family = name if name == "mixtral" else "llama"
    alone = launched.tensors_of(launched.statistics_of(Alone(), family, blocks=blocks))
    summed = 0
    for rank in range(2):
        found = saw[rank]["statistics"][name]
        assert found.keys() == alone.keys()
        for part, value in alone.items():
            if " elements" in part:
                torch.testing.assert_close(found[part], value, rtol=1e-5, atol=1e-5)
                summed += 1
            elif isinstance(value, torch.Tensor):
                assert torch.equal(found[part], value), part
            else:
                assert found[part] == value
            other = saw[0]["statistics"][name][part]
            assert torch.equal(found[part], other) if isinstance(value, torch.Tensor) else found[part] == other
    assert summed >= 12


def test_both_processes_carry_out_the_same_plan(saw: list[dict[str, Any]], folder: Path) -> None:
    assert saw[0]["whole"] == saw[1]["whole"]
    assert json.loads((folder / "plan.json").read_text())


def test_the_journal_is_complete_and_in_order(saw: list[dict[str, Any]], folder: Path) -> None:
    journal = Journal.load(folder / "whole.jsonl")
    assert [trial.number for trial in journal.trials] == list(range(launched.TRIALS))
    assert journal.winner() is not None and len(journal.finals) == 4
    for own in saw:
        assert own["trials"] == [replace(trial, seconds=0.0, elapsed=0.0) for trial in journal.trials]


def test_trials_are_those_of_one_process(saw: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "FORWARD_TOKENS", launched.FORWARD_TOKENS)
    monkeypatch.setattr(measures, "BATCH_TOKENS", launched.BATCH_TOKENS)
    tokenizer = calibration_make_tokenizer(eos_token="</s>")
    alone = search_plan(launched.text_model(), tokenizer, launched.search_config())
    assert [trial.point for trial in alone.journal.trials] == [trial.point for trial in saw[0]["trials"]]
    for one, other in zip(alone.journal.trials, saw[0]["trials"], strict=True):
        assert (one.key, one.windows) == (other.key, other.windows)
        assert other.rows == one.rows
    assert alone.plan.digest == saw[0]["whole"][0]


def test_a_resumed_search_is_the_uninterrupted_one(saw: list[dict[str, Any]], folder: Path) -> None:
    for own in saw:
        assert own["resumed"] == (own["whole"][0], own["trials"])
    whole, resumed = (Journal.load(folder / f"{name}.jsonl") for name in ("whole", "resumed"))
    assert (resumed.finals, resumed.events) == (whole.finals, whole.events)


def test_a_run_that_is_kept_measures_once(saw: list[dict[str, Any]]) -> None:
    for own in saw:
        assert own["kept run"] == ([own["whole"][0]] * 2, 1)


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("other run", "RunError", "pruning_ratio"),
        ("failed trial", "OSError", "the disk under rank 1 is gone"),
        ("journal there", "JournalError", "there is a journal"),
        ("failed statistics", "StatisticsError", "not finite"),
        ("other text", "CalibrationError", "different calibration text"),
        ("other selection", "CalibrationError", "different selection text"),
    ],
)
def test_what_one_process_raises_all_raise(saw: list[dict[str, Any]], what: str, kind: str, message: str) -> None:
    for own in saw:
        assert own[what][0] == kind and message in own[what][1]


def test_an_error_that_cannot_be_sent_is_told(saw: list[dict[str, Any]]) -> None:
    assert [own["odd"] for own in saw] == [("RuntimeError", "Odd: odd"), ("Odd", "odd")]
    assert all(own["still in step"] == [0, 1] for own in saw)


def test_a_crash_of_one_process_ends_all() -> None:
    code, said, seconds = run(TORCHRUN, "crash")
    assert code != 0 and "the disk under rank 1 is gone" in said
    assert seconds < SECONDS / 2


def test_one_process_collects_as_before() -> None:
    sites = launched.find_sites(launched.text_model())
    found = collect_together(sites, random_blocks(2), launched.Needs(gram=True), Alone())
    assert found.digest == random_blocks(2).digest
