"""Two processes train one pruned model: masked while they train, cut when they are done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import launched_training
import pytest
import torch
from conftest import logits_of, tokens
from test_parallel import TORCHRUN, run
from test_recovery import pruned, short, text, tiny_model, tiny_tokenizer
from trainings import pruning_config, regional_config, training, weights
from transformers import AutoModelForCausalLM

from hf_adaprune import AdaPrunerCallback, PruningPlan, apply_plan, find_sites, recover, sweeps


def both(folder: Path, suffix: str = "") -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}{suffix}.pt", weights_only=False) for rank in range(2)]


def started(*arguments: str) -> tuple[int, str]:
    code, said, _ = run(TORCHRUN, *arguments, script=launched_training.__file__)
    return code, said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    code, said = started(str(folder), "progressive")
    assert code == 0, said[-6000:]
    return folder


def test_both_end_with_one_plan_and_equal_weights(folder: Path) -> None:
    one, other = both(folder)
    assert one["processes"] == 2
    assert one["plan"] == other["plan"]
    assert one["ratio"] == pytest.approx(0.4, abs=0.02)
    for name, value in one["weights"].items():
        assert torch.equal(value, other["weights"][name]), name


def test_they_share_the_calibration_windows(folder: Path) -> None:
    one, other = both(folder)
    windows = list(range(one["windows"]))
    cuts = 2
    for own in (one, other):
        assert 0 < sum(map(len, own["ran"])) < cuts * len(windows)
    assert sorted(window for own in (one, other) for batch in own["ran"] for window in batch) == sorted(windows * cuts)


def test_the_plan_is_that_of_one_process(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first cut: after it the two train on rounding of their own."""
    monkeypatch.setattr(sweeps, "FORWARD_TOKENS", launched_training.FORWARD_TOKENS)
    alone = AdaPrunerCallback(pruning_config(), at=(0.0, 0.5))
    training(tmp_path, alone, max_steps=4, save_strategy="no").train()
    assert [own["first"] for own in both(folder)] == [alone.done[0]["plan"]] * 2


def test_a_last_cut_is_that_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, said = started(str(tmp_path), "untrained")
    assert code == 0, said[-6000:]
    monkeypatch.setattr(sweeps, "FORWARD_TOKENS", launched_training.FORWARD_TOKENS)
    alone = AdaPrunerCallback(regional_config(), mode="at_end")
    trainer = training(tmp_path / "alone", alone, learning_rate=0.0, save_strategy="no")
    trainer.train()
    for own in both(tmp_path):
        assert own["plan"] == alone.plan.digest
        for name, value in weights(trainer.model).items():
            torch.testing.assert_close(own["weights"][name], value, rtol=1e-4, atol=1e-5)


def test_the_cut_model_equals_the_masked_one(folder: Path) -> None:
    one, _ = both(folder)
    assert torch.allclose(one["masked"], one["cut"], atol=1e-5)
    model = AutoModelForCausalLM.from_pretrained(folder / "run")
    assert torch.equal(logits_of(model, tokens()), one["cut"])


def test_a_checkpoint_in_between_is_cut_by_its_plan(folder: Path) -> None:
    """It holds the whole model, for training to go on with."""
    checkpoint = folder / "run" / "checkpoint-10"  # after the last step
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    plan = PruningPlan.load(checkpoint / "pruning_plan.json")
    assert find_sites(model).total_parameters > both(folder)[0]["parameters"]
    cut = apply_plan(find_sites(model), plan)
    assert cut.total_parameters == both(folder)[0]["parameters"]
    assert torch.equal(logits_of(model, tokens()), both(folder)[0]["cut"])


def test_resumed_equals_uninterrupted(folder: Path) -> None:
    code, said = started(str(folder), "progressive", str(folder / "run" / "checkpoint-6"))
    assert code == 0, said[-6000:]
    one, again = both(folder)[0], both(folder, "_resumed")[0]
    assert one["plan"] == again["plan"]
    for name, value in one["weights"].items():
        assert torch.equal(value, again["weights"][name]), name


def test_at_end_is_one_plan_as_well(tmp_path: Path) -> None:
    code, said = started(str(tmp_path), "at_end")
    assert code == 0, said[-6000:]
    one, other = both(tmp_path)
    assert one["plan"] == other["plan"]
    assert all(torch.equal(value, other["weights"][name]) for name, value in one["weights"].items())


def test_what_cannot_be_masked_is_refused(tmp_path: Path) -> None:
    code, said = started(str(tmp_path), "refused")
    assert code != 0
    assert "this repair adds biases" in said


def test_a_recovery_of_two_is_that_of_one_with_batches_twice_as_large(tmp_path: Path) -> None:
    code, said = started(str(tmp_path), "recover")
    assert code == 0, said[-6000:]
    one, other = both(tmp_path)
    config = short(tokens=launched_training.RECOVERY_TOKENS, batch_size=8)
    alone = recover(pruned().model, tiny_tokenizer(), tiny_model("llama"), config, sources=text())
    start = weights(pruned().model)
    for own in (one, other):
        assert (own["tokens"], own["steps"]) == (alone.tokens, alone.steps) == (launched_training.RECOVERY_TOKENS, 6)
        for when, measured in alone.held_out.items():
            assert own["held_out"][when]["kl"].value == pytest.approx(measured["kl"].value, rel=1e-3)
    for name, value in weights(alone.model).items():
        assert torch.equal(one["weights"][name], other["weights"][name]), name
        moved = (value - start[name]).abs().max()
        assert (one["weights"][name] - value).abs().max() <= 0.02 * moved + 1e-7, name


def test_the_clock_of_the_first_process_is_that_of_all(tmp_path: Path) -> None:
    code, said = started(str(tmp_path), "minutes")
    assert code == 0, said[-6000:]
    one, other = both(tmp_path)
    assert one["steps"] == other["steps"] > 1
    rates = [[row["learning_rate"] for row in own["log"] if "learning_rate" in row] for own in (one, other)]
    assert rates[0] and rates[0] == rates[1]
    for name, value in one["weights"].items():
        assert torch.equal(value, other["weights"][name]), name
