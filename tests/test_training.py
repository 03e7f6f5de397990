"""Pruning inside Trainer."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from conftest import MIXTURES, logits_of, tiny_model, tokens
from plans import plan_of_kind
from trainings import LENGTH, Rows, Timed, progressive, pruning_config, training, weights
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_adaprune import AdaPrunerCallback, PruningConfig
from hf_adaprune.adapters import merged
from hf_adaprune.cut_schedule import CutSchedule
from hf_adaprune.errors import (
    AdaPruneError,
    BudgetError,
    CalibrationError,
    CheckpointError,
    ConfigError,
    UnsupportedModelError,
)
from hf_adaprune.plan import PruningPlan
from hf_adaprune.publication import check_checkpoint
from hf_adaprune.sites import find_sites
from hf_adaprune.surgery import apply_plan
from hf_adaprune.training_cuts import Cuts

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*", "ignore:.*gradient_checkpointing.*:FutureWarning")


def cuts_of(trainer: Trainer) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "pruning/ratio" in entry]


def same(one: Any, other: Any) -> None:
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A progressive run that nothing interrupted."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    trainer = training(folder, progressive())
    trainer.train()
    return trainer


def test_cuts_come_at_their_steps_and_reach_the_ratio(finished: Trainer) -> None:
    cuts = cuts_of(finished)
    assert [cut["step"] for cut in cuts] == [0, 3, 6]
    dense = find_sites(tiny_model("llama")).decoder_parameters
    after = find_sites(finished.model)
    assert cuts[-1]["pruning/ratio"] == pytest.approx(0.4, abs=0.02)
    assert 1 - after.decoder_parameters / dense == pytest.approx(cuts[-1]["pruning/ratio"])
    assert after.total_parameters == cuts[-1]["pruning/parameters"]
    ratios = [cut["pruning/ratio"] for cut in cuts]
    assert ratios == sorted(ratios)
    assert all(cut["pruning/loss_before"] > 0 and cut["pruning/loss_after"] > 0 for cut in cuts)


def test_every_checkpoint_opens(finished: Trainer) -> None:
    folders = sorted(Path(finished.args.output_dir).glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    sizes = []
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder)
        sizes.append(find_sites(model).decoder_parameters)
        assert torch.isfinite(logits_of(model, tokens())).all()
        assert PruningPlan.load(folder / "pruning_plan.json").num_layers == 3
    assert len(sizes) == 10
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3
    same(AutoModelForCausalLM.from_pretrained(folders[-1]), finished.model)


def test_the_plan_left_behind_is_of_the_dense_model(finished: Trainer) -> None:
    folder = Path(finished.args.output_dir)
    plan = PruningPlan.load(folder / "pruning_plan.json")
    said = json.loads((folder / "pruning_config.json").read_text())
    assert said["plan_digest"] == plan.digest
    assert len(said["cuts"]) == 3
    sites = find_sites(tiny_model("llama"))
    sites.check(plan)
    after = find_sites(finished.model)
    for site in after:
        kept = plan.sites.get(site.name)
        assert site.groups * site.group_size == (len(kept.kept) if kept else sites.by_name[site.name].whole.units)


def test_the_output_folder_is_a_pruned_checkpoint_with_a_card(finished: Trainer) -> None:
    folder = Path(finished.args.output_dir)
    same(AutoModelForCausalLM.from_pretrained(folder), finished.model)
    description = check_checkpoint(folder)
    assert description.parameters == find_sites(finished.model).total_parameters
    card = (folder / "README.md").read_text()
    assert "cut after training step 6: 40" in card
    assert str(folder) not in card


@pytest.mark.parametrize("step", [1, 3, 4, 6, 9])
def test_resumed_equals_uninterrupted(finished: Trainer, tmp_path: Path, step: int) -> None:
    """Before, at and after cuts; the new process begins with the dense model."""
    again = training(tmp_path, progressive())
    again.train(resume_from_checkpoint=str(Path(finished.args.output_dir) / f"checkpoint-{step}"))
    same(again.model, finished.model)
    assert [cut["step"] for cut in cuts_of(again)] == [0, 3, 6]
    assert again.model.config.to_dict()["per_layer_config"] == finished.model.config.to_dict()["per_layer_config"]


@pytest.mark.parametrize("step", [2, 5])
def test_a_family_with_names_of_its_own_resumes(tmp_path: Path, step: int) -> None:
    """gpt2 says `n_layer`, which a Trainer that reads a checkpoint's config as one of no family does not know."""
    small = pruning_config(pruning_ratio=0.2)
    whole = training(tmp_path, progressive(config=small), tiny_model("gpt2"))
    whole.train()
    again = training(tmp_path, progressive(config=small), tiny_model("gpt2"))
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    same(again.model, whole.model)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}").config.n_layer == 3


@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_mixture_is_not_resumed_and_told_why(mixture: str, tmp_path: Path) -> None:
    config = pruning_config(pruning_ratio=0.1, units=("kv_group",))
    training(tmp_path, progressive(config=config), tiny_model(mixture)).train()
    again = training(tmp_path, progressive(config=config), tiny_model(mixture))
    with pytest.raises(CheckpointError, match=r"calls weights by other names than the model.*Begin a new run from"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


@pytest.mark.parametrize("adapted", [False, True])
def test_what_was_cut_so_far_is_not_asked_for_again(adapted: bool, tmp_path: Path) -> None:
    """After 55 per cent the checkpoint's own model has no 55 per cent left to give."""
    large = pruning_config(pruning_ratio=0.55)
    whole = training(tmp_path, progressive(config=large), lora_model() if adapted else None)
    whole.train()
    checkpoint = tmp_path / "checkpoint-7"
    own = AutoModelForCausalLM.from_pretrained(checkpoint / "base" if adapted else checkpoint)
    if adapted:
        peft = pytest.importorskip("peft")
        own = peft.PeftModel.from_pretrained(own, checkpoint, is_trainable=True)
    again = training(tmp_path, progressive(config=large), own)
    with pytest.raises(BudgetError, match=r"may go .* were asked for"):
        again.train()  # a run of its own
    callback = progressive(config=large)
    again = training(tmp_path, callback, own)
    again.train(resume_from_checkpoint=str(checkpoint))
    same(again.model, whole.model)
    # What one Trainer's model lacked says nothing of the next one's.
    other = training(tmp_path / "other", callback, tiny_model("llama"))
    other.train()
    assert cuts_of(other)[-1]["pruning/ratio"] == pytest.approx(0.55, abs=0.03)


def test_resuming_with_the_checkpoints_own_model_is_the_same(finished: Trainer, tmp_path: Path) -> None:
    checkpoint = Path(finished.args.output_dir) / "checkpoint-7"
    again = training(tmp_path, progressive(), AutoModelForCausalLM.from_pretrained(checkpoint))
    again.train(resume_from_checkpoint=str(checkpoint))
    same(again.model, finished.model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # read by peft
def test_a_cut_model_is_called_by_no_name_of_the_dense_one(finished: Trainer, tmp_path: Path) -> None:
    """Not by a cut, not by a checkpoint whose sizes it takes on; the record says what it was made from."""
    peft = pytest.importorskip("peft")
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    for run, step in (("cut", None), ("resumed", 9)):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
        assert model.name_or_path == str(tmp_path / "dense")
        trainer = training(tmp_path / run, progressive(), model)
        checkpoint = None if step is None else str(Path(finished.args.output_dir) / f"checkpoint-{step}")
        trainer.train(resume_from_checkpoint=checkpoint)
        assert model.name_or_path == "" and model.config.name_or_path == str(tmp_path / "dense")
        if step is None:
            assert json.loads((tmp_path / run / "pruning_config.json").read_text())["base_model"] == "dense"
        tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
        assert not tuned.peft_config["default"].base_model_name_or_path


def test_a_step_without_a_cut_costs_next_to_nothing(tmp_path: Path) -> None:
    """Of the events between the cut before the first step and the one before the last."""
    callback = Timed(pruning_config(), at=(0.0, 0.97))
    training(tmp_path, callback, max_steps=100, save_strategy="no", logging_strategy="no").train()
    assert [cut["step"] for cut in callback.done] == [0, 97]
    steps = callback.seconds["on_step_end"]
    once = {"on_init_end", "on_train_begin", "on_train_end"}
    others = [second for name, own in callback.seconds.items() if name not in {"on_step_end", *once} for second in own]
    assert len(steps) == 100 and steps[96] == max(steps)  # the cut is in what is measured
    per_step = (sum(steps[:96]) + sum(others)) / 96
    assert per_step < 2e-3, f"{1e6 * per_step:.0f} microseconds"


def test_optimizer_and_schedule_go_on(finished: Trainer) -> None:
    optimizer = finished.optimizer
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in finished.model.parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            assert state["exp_avg"].shape == parameter.shape
            assert int(state["step"]) == 10
    rates = [entry["learning_rate"] for entry in finished.state.log_history if "learning_rate" in entry]
    plain = training(Path(finished.args.output_dir) / "plain", None, save_strategy="no")
    plain.train()
    assert rates == [entry["learning_rate"] for entry in plain.state.log_history if "learning_rate" in entry]


@pytest.mark.parametrize("units", [("layer",), ("attention", "mlp"), ("channel", "kv_group")])
def test_layers_and_sublayers_go_in_flight_and_come_back_on_resume(tmp_path: Path, units: tuple[str, ...]) -> None:
    config = pruning_config(
        units=units,
        pruning_ratio=0.3,
        importance={"metrics": {"block_influence": 1.0}} if units[0] != "channel" else {},
        repair={"method": "none", "min_tokens_per_column": 0},
    )
    whole = training(tmp_path / "a", progressive(config=config, at=(0.4,)))
    whole.train()
    again = training(tmp_path / "a", progressive(config=config, at=(0.4,)))
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    same(again.model, whole.model)


def test_shards_are_loaded_one_by_one_and_none_forgets_another(finished: Trainer, tmp_path: Path) -> None:
    """In any folder, so without a plan to look up: a shard must leave alone what it does not hold."""
    from hf_adaprune.restoring import Restorer

    state = weights(AutoModelForCausalLM.from_pretrained(Path(finished.args.output_dir) / "checkpoint-10"))
    names = sorted(state, key=lambda name: hash_of(name))
    model = tiny_model("llama", seed=5)
    Restorer(model, None, lambda: ())
    for start in range(0, len(names), 5):
        model.load_state_dict({name: state[name] for name in names[start : start + 5]}, strict=False)
    found = weights(model)
    assert all(torch.equal(found[name], value) for name, value in state.items())


@pytest.mark.parametrize("kind", ["channel", "kv_group", "query_head", "expert", "expert_channel"])
@pytest.mark.parametrize("family", ["phi3", "gpt2", "qwen3_moe"])
def test_shards_of_other_families(family: str, kind: str) -> None:
    from hf_adaprune.restoring import Restorer

    cut = tiny_model(family)
    plan = plan_of_kind(find_sites(cut), kind)
    if plan is None:
        pytest.skip(f"no {kind} in {family}")
    state = weights(apply_plan(find_sites(cut), plan).model)
    names = sorted(state, key=lambda name: hash_of(name))
    model = tiny_model(family, seed=5)
    Restorer(model, None, lambda: ())
    for start in range(0, len(names), 5):
        model.load_state_dict({name: state[name] for name in names[start : start + 5]}, strict=False)
    assert torch.equal(logits_of(model, tokens()), logits_of(cut, tokens()))


def hash_of(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def test_removed_layers_of_an_unknown_plan_are_refused_not_filled(tmp_path: Path) -> None:
    config = pruning_config(
        units=("mlp",),
        pruning_ratio=0.15,
        importance={"metrics": {"block_influence": 1.0}},
        repair={"method": "none", "min_tokens_per_column": 0},
    )
    training(tmp_path / "a", progressive(config=config, at=(0.4,))).train()
    again = training(tmp_path / "elsewhere", progressive(config=config, at=(0.4,)))
    with pytest.raises(CheckpointError, match="no pruning_plan"):
        again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))


def test_a_repair_with_biases_resumes(tmp_path: Path) -> None:
    config = pruning_config(repair={"method": "bias", "min_tokens_per_column": 0})
    whole = training(tmp_path / "a", progressive(config=config))
    whole.train()
    again = training(tmp_path / "b", progressive(config=config))
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))
    same(again.model, whole.model)


def test_once_and_at_end(tmp_path: Path) -> None:
    once = training(tmp_path / "once", AdaPrunerCallback(pruning_config(), mode="once"), save_strategy="no")
    once.train()
    assert [cut["step"] for cut in cuts_of(once)] == [0]
    end = training(tmp_path / "end", AdaPrunerCallback(pruning_config(), mode="at_end"), save_strategy="no")
    end.train()
    assert [cut["step"] for cut in cuts_of(end)] == [10]
    same(AutoModelForCausalLM.from_pretrained(tmp_path / "end"), end.model)
    assert find_sites(end.model).decoder_parameters == pytest.approx(
        find_sites(once.model).decoder_parameters, rel=0.05
    )


def test_best_model_may_be_denser_where_asked(tmp_path: Path) -> None:
    class Worse(TrainerCallback):
        """Says that every evaluation is worse than the one before."""

    class Told(Trainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            metrics = {"eval_loss": float(self.state.global_step)}
            self.log(dict(metrics))
            return metrics

    def run(name: str, **changes: Any) -> Trainer:
        trainer = training(
            tmp_path / name, progressive(**changes), trainer=Told, eval_strategy="steps", eval_steps=1,
            load_best_model_at_end=True,
        )  # fmt: skip
        trainer.train()
        return trainer

    denser = run("denser", reset_best=False)
    same(denser.model, AutoModelForCausalLM.from_pretrained(tmp_path / "denser" / "checkpoint-1"))
    final = run("final")
    same(final.model, AutoModelForCausalLM.from_pretrained(tmp_path / "final" / "checkpoint-6"))


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 3},
        {"activation_checkpointing": True},
        {"bf16": True},
        {"optim": "adafactor"},
        {"optim": "sgd"},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 3}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_a_trainer_does_beside(tmp_path: Path, changes: dict[str, Any]) -> None:
    trainer = training(tmp_path, progressive(), save_strategy="no", **changes)
    trainer.train()
    assert cuts_of(trainer)[-1]["pruning/ratio"] == pytest.approx(0.4, abs=0.02)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 10
    assert all(loss == loss for loss in losses)


def test_a_second_training_goes_on_with_the_same_trainer(tmp_path: Path) -> None:
    trainer = training(tmp_path, AdaPrunerCallback(pruning_config(pruning_ratio=0.2), mode="once"), save_strategy="no")
    trainer.train()
    first = find_sites(trainer.model).decoder_parameters
    trainer.train()
    assert find_sites(trainer.model).decoder_parameters == pytest.approx(first * 0.8, rel=0.05)


def test_an_exception_leaves_a_usable_model_and_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hf_adaprune.training_cuts as module

    real, calls = module.decide_and_repair, []

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "decide_and_repair", fails)
    trainer = training(tmp_path, progressive())
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert logits_of(trainer.model.eval(), tokens()).shape == logits_of(model, tokens()).shape
    again = training(tmp_path, progressive())
    again.train(resume_from_checkpoint=str(checkpoint))
    assert cuts_of(again)[-1]["pruning/ratio"] == pytest.approx(0.4, abs=0.02)


def test_a_training_that_begins_anew_forgets_the_masks_of_one_that_failed() -> None:
    model = tiny_model("llama")
    sites, logits = find_sites(model), logits_of(model, tokens())
    cuts = Cuts(pruning_config(), CutSchedule("progressive", None, 0.05, None, (), "linear", "geometric"), None, None)
    cuts.workers = SimpleNamespace(count=2)  # type: ignore[assignment]
    cuts.begin(model)
    whole = dict(cuts.first)
    assert whole["decoder"] == sites.decoder_parameters
    cuts.plan = plan_of_kind(sites, "channel")
    cuts.mask(model)
    assert cuts.sizes(model)["decoder"] < whole["decoder"]
    assert not torch.equal(logits_of(model, tokens()), logits)
    cuts.begin(model)
    assert cuts.plan is None and cuts.first == cuts.sizes(model) == whole
    assert torch.equal(logits_of(model, tokens()), logits)


def test_a_checkpoint_without_the_callback_goes_on(tmp_path: Path) -> None:
    plain = training(tmp_path / "plain", None)
    plain.train()
    trainer = training(tmp_path / "pruned", progressive())
    trainer.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-4"))
    assert [cut["step"] for cut in cuts_of(trainer)] == [4, 6]
    assert cuts_of(trainer)[-1]["pruning/ratio"] == pytest.approx(0.4, abs=0.02)


def test_a_run_goes_on_where_other_callbacks_are_restored(finished: Trainer, tmp_path: Path) -> None:
    options = {"restore_callback_states_from_checkpoint": True}
    training(tmp_path, progressive(), **options).train()
    trainer = training(tmp_path, progressive(), **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    same(trainer.model, finished.model)


def test_the_best_model_brings_its_own_plan(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Earlier(Trainer):
        """Every evaluation is worse than the one before."""

        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            return {**super().evaluate(*args, **kwargs), "eval_loss": float(self.state.global_step)}

    callback = progressive(reset_best=False)
    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    trainer = training(tmp_path, callback, trainer=Earlier, **options)
    trainer.train()
    best = tmp_path / "checkpoint-1"
    assert (
        callback.plan
        == PruningPlan.load(best / "pruning_plan.json")
        != PruningPlan.load(tmp_path / "checkpoint-10" / "pruning_plan.json")
    )
    assert [cut["step"] for cut in callback.done] == [0]
    check_checkpoint(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(opened, tokens()), logits_of(trainer.model.eval(), tokens()))


def test_the_output_folder_has_the_tokenizer_that_its_checkpoints_have(tmp_path: Path) -> None:
    from texts import calibration_make_tokenizer
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling

    tokenizer = calibration_make_tokenizer(eos_token="</s>", pad_token="</s>")
    trainer = training(tmp_path, progressive(), tiny_model("llama", vocab_size=330))
    trainer.data_collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer.train()
    for folder in (tmp_path, tmp_path / "checkpoint-10"):
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("best", [False, True])
def test_a_training_that_ends_before_its_cuts_says_so(
    best: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 4

    options = {"save_strategy": "no"}
    if best:
        options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    trainer = training(tmp_path, progressive(), **options)
    trainer.add_callback(Stop())
    with caplog.at_level(logging.WARNING, "hf_adaprune.training"):
        trainer.train()
    assert "after 2 of 3 cuts" in caplog.text and "not 40.0 %" in caplog.text


def test_a_copy_of_the_model_is_no_copy_of_the_trainer(tmp_path: Path) -> None:
    class Alone(Trainer):
        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            raise AssertionError("copied")

    callback = progressive()
    trainer = training(tmp_path, callback, trainer=Alone)
    callback.trainer = trainer
    same(copy.deepcopy(trainer.model), trainer.model)


def test_the_trainers_own_log_gets_the_numbers(tmp_path: Path) -> None:
    callback = progressive()
    seen: list[dict[str, Any]] = []

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    trainer = training(tmp_path, callback, save_strategy="no")
    trainer.add_callback(Reporter())
    callback.trainer = trainer
    trainer.train()
    assert sum("pruning/ratio" in logs for logs in seen) == 3
    assert len(cuts_of(trainer)) == 3


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_samples_longer_than_learned_positions_are_refused_before_any_forward(tmp_path: Path, family: str) -> None:
    model = tiny_model(family, max_position_embeddings=LENGTH - 1)
    config = pruning_config(units=("channel",), calibration={"sequence_length": 512, "samples": 16})
    trainer = training(tmp_path / "long", progressive(config=config), model, save_strategy="no")
    handle = model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    told = rf"up to {LENGTH} tokens, and this {family} model has learned {LENGTH - 1} positions. Truncate the samples"
    with pytest.raises(CalibrationError, match=told):
        trainer.train()
    handle.remove()
    model = tiny_model(family, max_position_embeddings=LENGTH)
    trainer = training(tmp_path / "fits", progressive(config=config), model, save_strategy="no", max_steps=4)
    trainer.train()
    assert len(cuts_of(trainer)) == 3


def test_statistics_from_calibration_sources(tmp_path: Path) -> None:
    from texts import calibration_make_tokenizer, calibration_prose

    (tmp_path / "a.txt").write_text(calibration_prose(1, 3000))
    tokenizer = calibration_make_tokenizer(eos_token="</s>")
    config = pruning_config(
        calibration={"sources": str(tmp_path / "a.txt"), "sequence_length": 16, "samples": 16, "gradient_samples": 4}
    )
    model = tiny_model("llama", vocab_size=330)
    trainer = training(tmp_path / "run", progressive(config=config, data="calibration"), model, save_strategy="no")
    trainer.processing_class = trainer.callback_handler.processing_class = tokenizer
    trainer.train()
    assert len(cuts_of(trainer)) == 3


@pytest.mark.parametrize("calibration", [{"domain_weights": (0.0, 1.0)}, {"domain_weights": (1.0, 3.0), "clusters": 2}])
def test_weights_of_sources_say_nothing_of_the_trainers_data(
    calibration: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plans = []
    for own in ({}, calibration):
        asked = {"sources": ("a.txt", "b.txt"), "sequence_length": 16, "samples": 16, "gradient_samples": 4, **own}
        config = PruningConfig.recipe("adapt-pruner", pruning_ratio=0.3, calibration=asked)
        callback = AdaPrunerCallback(config, at=(0.0, 0.5))
        training(tmp_path, callback, save_strategy="no", max_steps=2).train()
        plans.append(callback.plan)
    assert plans[0] == plans[1] and plans[0] is not None
    assert caplog.text.count("domain_weights and calibration.clusters are not used") == 1


def test_every_source_has_a_window_with_gradients_at_every_cut(tmp_path: Path) -> None:
    """Many cuts have few of them each."""
    model, sources = tiny_model("llama"), tuple(str(tmp_path / f"{number}.txt") for number in range(20))
    asked = pruning_config(calibration={"sources": sources, "samples": 64, "gradient_samples": 19})
    for how in ({"mode": "once"}, {"at": (0.0, 0.5)}):
        callback = AdaPrunerCallback(asked, **how, data="calibration", tokenizer=object())
        with pytest.raises(ConfigError, match=r"gradient_samples` should give each of the 20 sources"):
            training(tmp_path, callback, model, save_strategy="no").train()
    enough = asked.with_changes(calibration={"gradient_samples": 48})
    for data, count in (("calibration", 20), ("train", 16)):
        cuts = Cuts(enough, CutSchedule(), None, None)
        cuts.begin(model)
        cuts._from_sources = data == "calibration"
        assert cuts._config_of(find_sites(model), 0.1, False).calibration.gradient_samples == count


# -- LoRA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("kind", ["biases", "layers"])
def test_an_optimizer_of_the_users_own_resumes_after_cuts_that_change_the_parameters(
    tmp_path: Path, kind: str, grouped: bool
) -> None:
    changes: dict[str, Any] = {
        "biases": {"repair": {"method": "bias", "min_tokens_per_column": 0}},
        "layers": {"units": ("layer",), "allocation": {"method": "global"}, "pruning_ratio": 0.5},
    }[kind]

    def made(folder: Path) -> Trainer:
        model = tiny_model("llama", num_hidden_layers=4)
        groups: Any = list(model.parameters())
        if grouped:
            matrices = [parameter for parameter in groups if parameter.dim() > 1]
            vectors = [parameter for parameter in groups if parameter.dim() <= 1]
            groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)
        callback = progressive(config=pruning_config(**changes))
        args = TrainingArguments(
            str(folder), per_device_train_batch_size=4, max_steps=10, save_steps=1, learning_rate=1e-3, report_to=[],
            use_cpu=True, disable_tqdm=True, seed=3,
        )  # fmt: skip
        return Trainer(model, args, train_dataset=Rows(), callbacks=[callback], optimizers=(optimizer, None))

    whole = made(tmp_path)
    count = len(list(whole.model.parameters()))
    whole.train()
    assert len(list(whole.model.parameters())) != count
    for step in (2, 5, 8):
        again = made(tmp_path)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        same(whole.model, again.model)


def test_a_best_model_of_another_size_comes_back_where_model_init_made_the_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, max_steps=10, save_steps=1, eval_steps=1, eval_strategy="steps",
        learning_rate=1.0, report_to=[], use_cpu=True, disable_tqdm=True, load_best_model_at_end=True,
    )  # fmt: skip
    callback = progressive(at=(0.5,), reset_best=False)
    trainer = Trainer(
        args=args, model_init=lambda: tiny_model("llama"), train_dataset=Rows(), eval_dataset=Rows(),
        callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None and int(best.rpartition("-")[2]) < 5
    assert trainer.model.config.intermediate_size == tiny_model("llama").config.intermediate_size
    assert "cannot resume" in caplog.text


def lora_model() -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(tiny_model("llama"), config)


def test_lora_is_cut_with_its_base(tmp_path: Path) -> None:
    trainer = training(tmp_path, progressive(), lora_model())
    trainer.train()
    assert cuts_of(trainer)[-1]["pruning/ratio"] == pytest.approx(0.4, abs=0.02)
    model = trainer.model.eval()
    expected = logits_of(model, tokens())
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-10")
    assert torch.allclose(logits_of(opened, tokens()), expected, atol=1e-5)
    merged = model.merge_and_unload()
    assert torch.allclose(logits_of(merged, tokens()), expected, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(again, tokens()), logits_of(merged, tokens()))


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_factors_that_are_saved_afterwards_open(strategy: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    trainer = training(tmp_path / "run", progressive(), lora_model(), save_strategy=strategy)
    trainer.train()
    trainer.save_model(str(tmp_path / "mine"))
    opened = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "mine")
    expected = logits_of(trainer.model.eval(), tokens())
    assert torch.equal(logits_of(opened, tokens()), expected)
    if strategy == "no":
        trainer.save_model(str(tmp_path / "run"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run")  # the output folder opens as its checkpoints do
    assert torch.allclose(logits_of(again, tokens()), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("saved", "tied"),
    [(["lm_head"], False), (["embed_tokens", "lm_head"], False), (["embed_tokens"], True), (["input_layernorm"], True)],
    ids=str,
)
def test_modules_that_train_whole_beside_factors_are_in_the_adapter_and_their_originals_in_the_base(
    saved: list[str], tied: bool, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    dense = tiny_model("llama", tie_word_embeddings=tied)
    before = weights(dense)
    tie = {"ensure_weight_tying": True} if tied and "embed_tokens" in saved else {}
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "o_proj", "up_proj"], modules_to_save=saved, task_type="CAUSAL_LM", **tie
    )
    trainer = training(tmp_path, progressive(), peft.get_peft_model(dense, config), save_steps=10, learning_rate=0.05)
    trainer.train()
    assert len(cuts_of(trainer)) == 3
    expected = logits_of(trainer.model.eval(), tokens())
    with trainer.model.disable_adapter():
        without = logits_of(trainer.model, tokens())
    assert not torch.allclose(without, expected, atol=0.1)
    for folder in (tmp_path, tmp_path / "checkpoint-10"):
        base, loading = AutoModelForCausalLM.from_pretrained(folder / "base", output_loading_info=True)
        assert not any(loading.values()), loading
        assert torch.equal(logits_of(base, tokens()), without)
        originals = {name: value for name, value in weights(base).items() if name.split(".")[-2] in saved}
        assert originals and all(torch.equal(value, before[name]) for name, value in originals.items())
        again = peft.PeftModel.from_pretrained(base, folder)
        assert torch.equal(logits_of(again.eval(), tokens()), expected)
        opened = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.allclose(logits_of(opened, tokens()), expected, atol=1e-5)


def test_a_matrix_that_trains_whole_and_is_cut_is_in_the_base_as_it_was_trained(tmp_path: Path) -> None:
    """Its original is not cut, and would fit nothing there."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["mlp"], task_type="CAUSAL_LM")
    trainer = training(tmp_path, progressive(), peft.get_peft_model(tiny_model("llama"), config), save_strategy="no")
    trainer.train()
    trainer.save_model(str(tmp_path))
    base, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not any(loading.values()), loading
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits_of(again.eval(), tokens()), logits_of(trainer.model.eval(), tokens()))


def test_adapters_of_other_names_name_their_base_too(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model("llama"), config, adapter_name="mine")
    training(tmp_path, progressive(), model, save_total_limit=1).train()
    for folder in (tmp_path, tmp_path / "checkpoint-10"):
        said = json.loads((folder / "mine" / "adapter_config.json").read_text())
        assert said["base_model_name_or_path"] == str(folder / "base")


def test_the_best_factors_leave_the_base_as_it_is_cut(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    class Earlier(Trainer):
        """Every evaluation is worse than the one before."""

        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            return {**super().evaluate(*args, **kwargs), "eval_loss": float(self.state.global_step)}

    # Factors that no cut changes the shapes of.
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    callback = progressive(config=pruning_config(units=("channel",), pruning_ratio=0.2), reset_best=False)
    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    trainer = training(tmp_path, callback, model, trainer=Earlier, **options)
    trainer.train()
    assert len(callback.done) == 3
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plan = PruningPlan.load(tmp_path / "pruning_plan.json")
    assert find_sites(base).decoder_parameters == find_sites(trainer.model.get_base_model()).decoder_parameters
    assert find_sites(base).decoder_parameters == apply_plan(find_sites(tiny_model("llama")), plan).decoder_parameters


def test_biases_of_a_repair_are_frozen_as_their_weights_are(tmp_path: Path) -> None:
    config = pruning_config(repair={"method": "bias", "min_tokens_per_column": 0})
    callback = progressive(config=config)
    trainer = training(tmp_path / "run", callback, lora_model())
    trainer.train()
    trained = [name for name, value in trainer.model.named_parameters() if value.requires_grad]
    assert trained and all(".lora_" in name for name in trained)
    peft = pytest.importorskip("peft")
    place = tmp_path / "run" / "checkpoint-7"
    model = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(place / "base"), place, is_trainable=True
    )
    again = training(tmp_path / "run", progressive(config=config), model)
    again.train(resume_from_checkpoint=str(place))
    same(again.model, trainer.model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_frozen_weights_that_no_cut_changes_stay_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "o_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", lora_alpha=64)
    model = peft.get_peft_model(tiny_model("llama").to(dtype), config, autocast_adapter_dtype=False)
    before = {name: value.clone() for name, value in model.state_dict().items() if name.endswith("base_layer.weight")}
    trained = progressive(config=pruning_config(units=("channel",), repair={"method": "none"}))
    training(tmp_path, trained, model, save_strategy="no", learning_rate=0.05, bf16=False).train()
    after = model.state_dict()
    factors = [after[name.replace("base_layer.weight", "lora_B.default.weight")] for name in before]
    assert all(factor.abs().max() > 0.01 for factor in factors)  # so that adding and subtracting them rounds
    whole = [name for name in before if "self_attn" in name]
    assert whole and all(torch.equal(before[name], after[name]) for name in whole)
    assert any(before[name].shape != after[name].shape for name in before)


def test_a_weight_that_is_changed_inside_keeps_its_new_values() -> None:
    model = lora_model()
    modules = [module for _, module in model.named_modules() if hasattr(module, "lora_A")]
    for module in modules:
        torch.nn.init.normal_(module.lora_B["default"].weight)
    before = [module.base_layer.weight.detach().clone() for module in modules]
    with merged(model), torch.no_grad():
        modules[0].base_layer.weight.add_(1.0)
        modules[1].base_layer.weight.data = modules[1].base_layer.weight.data + 2.0
    after = [module.base_layer.weight for module in modules]
    assert torch.allclose(after[0], before[0] + 1.0, atol=1e-5)
    assert torch.allclose(after[1], before[1] + 2.0, atol=1e-5)
    assert all(torch.equal(now, then) for now, then in zip(after[2:], before[2:], strict=True))


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_lora_with_biases_of_layers_without_one_is_refused_at_once(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    for family, refused in (("llama", True), ("qwen2", False)):
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True, task_type="CAUSAL_LM")
        model = peft.get_peft_model(tiny_model(family), config)
        if refused:
            with pytest.raises(UnsupportedModelError, match="lora_bias"):
                training(tmp_path, progressive(), model)
        else:
            training(tmp_path, progressive(), model, save_strategy="no").train()


def test_lora_around_matrices_that_are_stored_transposed(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    trainer = training(tmp_path, progressive(), peft.get_peft_model(tiny_model("gpt2"), config), save_strategy="no")
    trainer.train()
    assert cuts_of(trainer)[-1]["pruning/ratio"] == pytest.approx(0.4, abs=0.02)
    expected = logits_of(trainer.model.eval(), tokens())
    assert torch.allclose(logits_of(trainer.model.merge_and_unload(), tokens()), expected, atol=1e-5)


def test_adapters_without_a_model_around_them_are_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(UnsupportedModelError, match="get_peft_model"):
        training(tmp_path, progressive(), model)
    with pytest.raises(UnsupportedModelError, match="get_peft_model"):
        find_sites(model)


def test_lora_of_experts_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    names = [f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    model = peft.get_peft_model(
        tiny_model("mixtral"), peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=names)
    )
    with pytest.raises(UnsupportedModelError, match="target_parameters"):
        training(tmp_path, progressive(), model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # read by peft
@pytest.mark.parametrize("way", ["pissa", "olora"])
def test_factors_made_of_the_weights_open_as_they_were_trained(way: str, tmp_path: Path) -> None:
    """The base that is saved lacks what they took out of it, and is not to lose it again."""
    peft = pytest.importorskip("peft")
    own = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=way, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model("llama"), own)
    training(tmp_path, progressive(), model).train()
    expected = logits_of(model.eval(), tokens())
    model.save_pretrained(tmp_path / "mine")
    for place in (tmp_path / "checkpoint-10", tmp_path / "mine"):
        again = peft.AutoPeftModelForCausalLM.from_pretrained(place).eval()
        assert torch.allclose(logits_of(again, tokens()), expected, atol=1e-5), place.name


@pytest.mark.parametrize(
    "given",
    [{"trainable_token_indices": [5]}, {"alora_invocation_tokens": [5]}, {"layer_replication": [[0, 2], [1, 3]]}],
    ids=lambda given: next(iter(given)),
)  # fmt: skip
def test_lora_that_cannot_be_merged_or_saved_is_refused(given: dict, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    own = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **given)
    with pytest.raises(UnsupportedModelError, match=next(iter(given))):
        training(tmp_path, progressive(), peft.get_peft_model(tiny_model("qwen2"), own))


def test_lora_of_another_size_is_refused_with_the_way_out(tmp_path: Path) -> None:
    training(tmp_path, progressive(), lora_model()).train()
    again = training(tmp_path, progressive(), lora_model())
    with pytest.raises(CheckpointError, match="base"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "fields", "error", "what"),
    [
        ({"layer_by_layer": True}, {}, ConfigError, "layer_by_layer"),
        ({"search": {}}, {}, ConfigError, "mode='once'"),
        ({}, {"data": "elsewhere"}, ConfigError, "data"),
        *(({}, {"samples": samples}, ConfigError, "`samples`") for samples in (0, -1, 2.5, "x", True)),
        ({"repair": {"regional_steps": 2}}, {}, ConfigError, "regional_steps"),
    ],
)
def test_bad_arguments_are_refused_at_once(config: dict, fields: dict, error: type[Exception], what: str) -> None:
    with pytest.raises(error, match=what):
        progressive(config=pruning_config(**config), **fields)


def test_a_search_for_the_batch_size_would_cut_twice(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="auto_find_batch_size"):
        training(tmp_path, progressive(), auto_find_batch_size=True)
    training(tmp_path, AdaPrunerCallback(pruning_config(), mode="at_end"), auto_find_batch_size=True)


def test_a_callback_keeps_what_it_was_made_with() -> None:
    callback = AdaPrunerCallback(pruning_config(), cuts=3)
    for name, value in {"config": pruning_config(pruning_ratio=0.5), "schedule": None}.items():
        with pytest.raises(AttributeError):  # its cuts would not hear of it
            setattr(callback, name, value)
    assert callback.config == pruning_config() and callback.schedule.cuts == 3


def test_bad_models_and_engines_are_refused_when_the_trainer_is_made(tmp_path: Path) -> None:
    from transformers import BertConfig, BertLMHeadModel

    with pytest.raises(UnsupportedModelError, match="bert"):
        tiny = BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=96,
            is_decoder=True,
        )  # fmt: skip
        training(tmp_path, progressive(), BertLMHeadModel(tiny))
    with pytest.raises(BudgetError):
        training(tmp_path, progressive(config=pruning_config(pruning_ratio=0.99)))
    quantised = tiny_model("llama")
    quantised.is_quantized = True
    with pytest.raises((UnsupportedModelError, ValueError), match="quanti"):
        training(tmp_path, progressive(), quantised)


@pytest.mark.parametrize("engine", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_engines_of_a_launcher_are_refused(
    engine: DistributedType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As `accelerate launch --use_fsdp` sets them, beside the trainer's arguments."""
    trainer, callback = training(tmp_path, None), progressive()
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", engine)
    with pytest.raises(ConfigError, match=r"hf_adaprune\.prune\(\)"):
        callback.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)


def test_bad_runs_are_refused_when_training_begins(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 optimizer steps"):
        training(tmp_path / "a", AdaPrunerCallback(pruning_config(), cuts=3), max_steps=2).train()
    twice = training(tmp_path / "b", progressive())
    twice.add_callback(progressive())
    with pytest.raises(ConfigError, match="twice"):
        twice.train()
    training(tmp_path / "c", progressive()).train()
    other = training(tmp_path / "d", progressive(config=pruning_config(pruning_ratio=0.3)))
    with pytest.raises(CheckpointError, match="pruning_ratio"):
        other.train(resume_from_checkpoint=str(tmp_path / "c" / "checkpoint-5"))

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(Rows()[index] for index in range(48))

    stream = training(tmp_path / "e", progressive())
    stream.train_dataset = Stream()
    with pytest.raises(AdaPruneError, match="stream"):
        stream.train()


# -- trl --------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("packing", [False, True])
def test_sft_trainer(tmp_path: Path, packing: bool) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from texts import calibration_make_tokenizer, calibration_prose

    tokenizer = calibration_make_tokenizer(eos_token="</s>", pad_token="<pad>")
    data = Dataset.from_dict({"text": [calibration_prose(seed, 60) for seed in range(40)]})
    args = trl.SFTConfig(
        str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=6,
        save_steps=3,
        report_to=[],
        use_cpu=True,
        bf16=False,
        max_length=32,
        packing=packing,
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(
        tiny_model("llama", vocab_size=340), args, train_dataset=data, processing_class=tokenizer,
        callbacks=[AdaPrunerCallback(pruning_config(), cuts=2)],
    )  # fmt: skip
    trainer.train()
    assert cuts_of(trainer)[-1]["pruning/ratio"] == pytest.approx(0.4, abs=0.02)
    same(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6"), trainer.model)
