"""Recoveries that die go on: from the last checkpoint, to the weights of an uninterrupted training."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_model as tiny_random_model
from test_pipeline import tiny_model, tiny_tokenizer
from test_recovery import in_dtype, pruned, short, text, weights
from test_runs import Killed, killed_at_news
from texts import calibration_prose
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_adaprune import (
    AdaPrunerCallback,
    TextSource,
    recover,
    recovery,
    recovery_course,
    recovery_result,
    recovery_training,
)
from hf_adaprune.cli import main
from hf_adaprune.errors import ConfigError, RunError
from hf_adaprune.recovery_course import schedule_shape
from hf_adaprune.run_folder import RunFolder

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

REPORT = TextSource("report", [calibration_prose(61, 600)])


class Counts(TrainerCallback):
    """Counts steps, and may do something after one of them."""

    def __init__(self, at: int = -1, act: Any = None) -> None:
        self.steps, self.at, self.act = 0, at, act

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1
        if state.global_step == self.at:
            self.act()


def die() -> None:
    raise Killed


def recovered(place: Path | None, dtype: torch.dtype = torch.float32, act: Counts | None = None, **changes: Any) -> Any:
    model = in_dtype(pruned().model, dtype)
    own = {"tokens": 1500, "held_out": 4, **changes}
    callbacks = [] if act is None else [act]
    return recover(
        model, tiny_tokenizer(), tiny_model("llama"), short(**own), sources=text(), report=REPORT, callbacks=callbacks,
        run_dir=place, checkpoint_minutes=0,
    )  # fmt: skip


def assert_same(found: Any, wanted: Any) -> None:
    mine, theirs = weights(found.model), weights(wanted.model)
    assert list(mine) == list(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert (found.tokens, found.steps, found.held_out) == (wanted.tokens, wanted.steps, wanted.held_out)
    assert found.evaluation == wanted.evaluation and found.text == wanted.text


WAYS: dict[str, dict[str, Any]] = {
    "all weights": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "adapters": {"lora": {"rank": 2}, "dtype": torch.bfloat16},
    "cached teacher": {"top_k": 8},
    "accumulated, text read again": {"gradient_accumulation": 2, "batch_size": 4, "tokens": 3000},
}


@pytest.mark.parametrize("way", WAYS)
def test_killed_anywhere_and_started_again_equals_uninterrupted(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recovered(None, **WAYS[way])
    run_dir = tmp_path / "run"
    seen: set[str] = set()
    while killed_at_news(monkeypatch, seen, lambda: recovered(run_dir, **WAYS[way])):
        assert len(seen) < 20
    assert {"pool", "training", "trained", "held out before", "held out after"} <= seen
    assert not (run_dir / "training").exists()  # checkpoints go when the training is over
    assert_same(recovered(run_dir, **WAYS[way]), wanted)


@pytest.mark.parametrize("way", ["all weights", "adapters"])
def test_steps_are_not_made_again(way: str, tmp_path: Path) -> None:
    whole, first, second = Counts(), Counts(4, die), Counts()
    wanted = recovered(None, act=whole, **WAYS[way])
    with pytest.raises(Killed):
        recovered(tmp_path / "run", act=first, **WAYS[way])
    # The fourth step died before it was saved.
    assert [path.name for path in (tmp_path / "run" / "training").iterdir()] == ["checkpoint-3"]
    assert_same(recovered(tmp_path / "run", act=second, **WAYS[way]), wanted)
    assert (first.steps, second.steps) == (4, whole.steps - 3)
    third = Counts(1, die)
    assert_same(recovered(tmp_path / "run", act=third, **WAYS[way]), wanted)
    assert third.steps == 0


class Rates(Counts):
    """Learning rates that steps are made with."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seen: list[float] = []

    def on_pre_optimizer_step(self, *args: Any, optimizer: Any, **kwargs: Any) -> None:
        """Before every step."""
        self.seen.append(optimizer.param_groups[0]["lr"])


def test_every_step_has_the_rate_of_its_own_middle(tmp_path: Path) -> None:
    """Also after a kill, and the last one's is the lowest."""
    whole, first, second = Rates(), Rates(4, die), Rates()
    wanted = recovered(None, act=whole)
    shape = schedule_shape(short())
    assert whole.seen == [3e-3 * shape((step + 0.5) / wanted.steps) for step in range(wanted.steps)]
    with pytest.raises(Killed):
        recovered(tmp_path / "run", act=first)
    assert_same(recovered(tmp_path / "run", act=second), wanted)
    assert [*first.seen[:3], *second.seen] == whole.seen


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_damaged_checkpoint_is_not_trusted(file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Killed):
        recovered(tmp_path / "run", act=Counts(3, die))
    harmed = tmp_path / "run" / "training" / "checkpoint-2" / file
    harmed.write_bytes(harmed.read_bytes()[:-1])
    again = Counts()
    assert_same(recovered(tmp_path / "run", act=again), recovered(None))
    assert again.steps == 6 and "is damaged and is made again" in caplog.text


def test_ctrl_c_finishes_the_step_and_saves(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        recover(
            pruned().model, tiny_tokenizer(), tiny_model("llama"), short(tokens=1500, held_out=4), sources=text(),
            report=REPORT, callbacks=[Counts(2, lambda: os.kill(os.getpid(), signal.SIGINT))], run_dir=tmp_path / "run",
        )  # fmt: skip
    assert signal.getsignal(signal.SIGINT) is before
    assert [path.name for path in (tmp_path / "run" / "training").iterdir()] == ["checkpoint-2"]
    again = Counts()
    assert_same(recovered(tmp_path / "run", act=again), recovered(None))
    assert again.steps == 4


def test_minutes_count_over_all_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    fake = SimpleNamespace(perf_counter=lambda: clock.now)
    monkeypatch.setattr(recovery, "time", fake)
    monkeypatch.setattr(recovery_training, "time", fake)
    monkeypatch.setattr(recovery_course, "time", fake)

    class Slow(Counts):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.now += 10
            super().on_step_end(*args, **kwargs)

    wanted = recovered(None, tokens=None, minutes=1.0, act=Slow())
    assert (wanted.steps, wanted.minutes) == (6, 1.0)
    with pytest.raises(Killed):
        recovered(tmp_path / "run", tokens=None, minutes=1.0, act=Slow(4, die))
    clock.now += 1000  # nobody trains meanwhile
    again = Slow()
    found = recovered(tmp_path / "run", tokens=None, minutes=1.0, act=again)
    # The ten seconds of the step that was lost are given again.
    assert (again.steps, found.minutes) == (3, 1.0)
    assert_same(found, wanted)


def test_what_changed_is_named(tmp_path: Path) -> None:
    recovered(tmp_path / "run")
    with pytest.raises(RunError, match=r"learning_rate 0\.003 -> 0\.1"):
        recovered(tmp_path / "run", learning_rate=0.1)
    with pytest.raises(RunError, match=r"else: weights of the student\. Give"):
        recovered(tmp_path / "run", dtype=torch.bfloat16)
    turned = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
    for changes, name in [
        ({"seed": 5}, r"else: weights of the teacher\. Give"),
        (turned, r"else: teacher\.rope_parameters\.rope_theta 10000\.0 -> 100\.0\. Give"),
    ]:
        other = tiny_random_model("llama", vocab_size=384, **changes)
        with pytest.raises(RunError, match=name):
            recover(
                pruned().model, tiny_tokenizer(), other, short(tokens=1500, held_out=4), sources=text(), report=REPORT,
                run_dir=tmp_path / "run",
            )  # fmt: skip


def test_what_cannot_go_on_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_pipeline import config_of

    model, options = pruned().model, {"sources": text(), "run_dir": tmp_path / "run"}
    with pytest.raises(ConfigError, match="shrinks while it learns"):
        recover(
            model, tiny_tokenizer(), tiny_model("llama"), short(), callbacks=[AdaPrunerCallback(config_of())], **options
        )
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process"):
        recover(model, tiny_tokenizer(), tiny_model("llama"), short(), **options)
    assert not (tmp_path / "run").exists()


DEADLY = """
import os, signal, sys, torch
torch.set_num_threads(1)
from hf_adaprune import cli
from hf_adaprune.recovery_course import Checkpoints
real = Checkpoints.__init__
def every_step(own, run, minutes, course):
    real(own, run, 0.0, course)
Checkpoints.__init__ = every_step
saved = Checkpoints.on_save
def on_save(own, args, state, control, **rest):
    if state.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)  # what the trainer wrote has no note yet
    saved(own, args, state, control, **rest)
Checkpoints.on_save = on_save
sys.exit(cli.main(sys.argv[1:]))
"""


def test_sigkill_and_the_same_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    pruned().save_pretrained(tmp_path / "pruned")
    (tmp_path / "text.txt").write_text("\n".join(calibration_prose(seed, 200) for seed in range(1, 30)))
    words = ["recover", str(tmp_path / "pruned"), "--teacher", str(tmp_path / "dense"), "--precision", "fp32"]
    words += ["--calibration", str(tmp_path / "text.txt"), "--tokens", "1500", "--batch-size", "8", "--quiet"]
    words += ["--sequence-length", "32"]
    assert main([*words, "--output", str(tmp_path / "whole")]) == 0
    work = tmp_path / "work"
    words += ["--output", str(work / "out")]
    ran = subprocess.run([sys.executable, "-c", DEADLY, *words], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == -signal.SIGKILL
    there = sorted(path.name for path in (work / "out.run" / "training").iterdir())
    assert there == ["checkpoint-2", "checkpoint-3"] and not (work / "out").exists()
    assert RunFolder(work / "out.run").read("training")[1]["checkpoint"] == "checkpoint-2"  # type: ignore[index]
    assert main([*words, "--seed", "4"]) == 2
    assert "seed 0 -> 4" in capsys.readouterr().err
    assert main(words) == 0
    assert [path.name for path in work.iterdir()] == ["out"]
    own, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in (work / "out", tmp_path / "whole"))
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(own).items())


def test_the_command_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    tiny_model("llama").save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("\n".join(calibration_prose(seed, 200) for seed in range(1, 30)))
    words = ["recover", str(tmp_path / "dense"), "--teacher", str(tmp_path / "dense"), "--tokens", "300", "--quiet"]
    words += ["--calibration", str(tmp_path / "text.txt"), "--output", str(tmp_path / "out"), "--sequence-length", "32"]
    with monkeypatch.context() as patch:
        patch.setattr(recovery_result, "save_pruned", interrupted)
        assert main([*words, "--fresh"]) == 130
    again = shlex.split(capsys.readouterr().err.split("to go on: hf-adaprune ")[1].splitlines()[0])
    assert again == words and (tmp_path / "out.run" / "trained.json").is_file()
    with monkeypatch.context() as patch:
        patch.setattr(recovery_training, "_run", lambda *args: pytest.fail("trained again"))
        assert main(again) == 0
    assert not (tmp_path / "out.run").exists() and (tmp_path / "out" / "config.json").is_file()
