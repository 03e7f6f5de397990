"""Recovery: a pruned model comes nearer to the dense one, and what was not to change did not."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import logits_of, tokens
from conftest import tiny_model as tiny_random_model
from test_pipeline import config_of, tiny_model, tiny_tokenizer
from texts import begun_tokenizer, calibration_prose, sampled_prose
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments

from hf_adaprune import (
    AdaPrunerCallback,
    PruningPlan,
    RecoveryConfig,
    TextSource,
    documents,
    prune,
    recover,
    recovery,
    stage_shares,
)
from hf_adaprune.cli import main
from hf_adaprune.errors import (
    AdaPruneError,
    CalibrationError,
    ConfigError,
    MissingDependencyError,
    UnsupportedModelError,
)
from hf_adaprune.recovery_course import schedule_shape
from hf_adaprune.recovery_texts import report_texts, training_texts
from hf_adaprune.surgery import cast_parameters

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@cache
def text(first: int = 1, name: str = "prose") -> TextSource:
    return TextSource(name, [calibration_prose(seed, 200) for seed in range(first, first + 30)])


def pruned(recipe: str = "magnitude", **changes: Any) -> Any:
    model = tiny_model("llama")
    return prune(model, tiny_tokenizer(), config_of(recipe, **changes))


def short(**changes: Any) -> RecoveryConfig:
    own = {"tokens": 6000, "batch_size": 8, "sequence_length": 32, "learning_rate": 3e-3, "precision": "fp32"}
    return RecoveryConfig(**{**own, **changes})


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """As `from_pretrained` loads it: rotary frequencies stay in float32."""
    cast_parameters(model, {name: dtype for name, _ in model.named_parameters()})
    model.config.dtype = dtype
    return model


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("changes", [{}, {"temperature": 2.0}, {"top_k": 64}, {"precision": "bf16"}], ids=str)
def test_held_out_divergence_falls(changes: dict[str, Any]) -> None:
    result = pruned()
    flags = [module.training for module in result.model.modules()]
    cached = result.model.config.use_cache
    found = recover(
        result.model, tiny_tokenizer(), tiny_model("llama"), short(**changes), sources=text(), pruning=result
    )
    assert found.held_out["after"]["kl"].value < 0.97 * found.held_out["before"]["kl"].value
    assert found.tokens == found.steps * 8 * 32 or found.steps == math.ceil(6000 / 256)
    assert found.log[0]["loss"] > 0 and found.text["windows"] == math.ceil(6000 / 32)
    assert [module.training for module in found.model.modules()] == flags
    assert found.model.config.use_cache == cached
    assert "forward" not in found.model.__dict__
    assert {value.dtype for value in found.model.parameters()} == {torch.float32}
    json.dumps(found.to_dict())


def test_same_seed_same_weights_and_weights_stay_narrow() -> None:
    found = []
    for seed in (0, 0, 1):
        model = in_dtype(pruned().model, torch.bfloat16)
        state = torch.random.get_rng_state()
        recover(model, tiny_tokenizer(), tiny_model("llama"), short(tokens=2000, seed=seed), sources=text())
        assert torch.equal(torch.random.get_rng_state(), state)
        assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
        found.append(weights(model))
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())
    assert not all(torch.equal(found[2][name], value) for name, value in found[0].items())


@pytest.mark.parametrize(("recipe", "ratio"), [("magnitude", 0.3), ("shortgpt", 0.5)])
def test_saved_with_plan_and_provenance(recipe: str, ratio: float, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    pruned(recipe, ratio=ratio).save_pretrained(tmp_path / "pruned")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    config = short(tokens=1000, hidden_weight=0.1, hidden_layers="all")
    result = recover(model, tiny_tokenizer(), tmp_path / "dense", config, sources=text())
    folder = result.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits_of(again, tokens()), logits_of(result.model, tokens()))
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert not torch.equal(logits_of(again, tokens()), logits_of(before, tokens()))
    assert PruningPlan.load(folder / "pruning_plan.json") == PruningPlan.load(tmp_path / "pruned/pruning_plan.json")
    data, earlier = (json.loads((own / "pruning_config.json").read_text()) for own in (folder, tmp_path / "pruned"))
    assert {**data, "recovery": None} == {**earlier, "recovery": None}
    assert data["recovery"]["tokens"] == result.tokens and data["recovery"]["config"]["hidden_layers"] == "all"


def test_a_recovered_model_is_not_what_its_old_name_loads(tmp_path: Path) -> None:
    pruned("magnitude").save_pretrained(tmp_path / "pruned")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    result = recover(model, tiny_tokenizer(), tiny_model("llama"), short(tokens=500), sources=text())
    assert model.name_or_path == ""
    again = recover(model, tiny_tokenizer(), tiny_model("llama"), short(tokens=500), sources=text())
    assert again.plan == result.plan is not None  # found by the folder that it came from
    folder = result.save_pretrained(tmp_path / "out")
    assert model.name_or_path == str(folder)


@pytest.mark.parametrize("unit", ["channel", "kv_group"])
def test_a_model_that_was_cut_again_does_not_take_the_record_of_its_first_cut(
    unit: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A later cut shows in the widths that the first plan names, or in those that it does not."""
    first = pruned("magnitude", units=("channel",))
    folder = first.save_pretrained(tmp_path / "pruned")
    teacher, config = tiny_model("llama"), short(tokens=500)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert recover(model, tiny_tokenizer(), teacher, config, sources=text()).plan == first.plan
    assert not caplog.records
    second = prune(model, tiny_tokenizer(), config_of("magnitude", units=(unit,)))
    with caplog.at_level(logging.WARNING):
        result = recover(model, tiny_tokenizer(), teacher, config, sources=text())
    assert result.plan is None and set(result.pruning) == set()
    assert "has been cut since" in caplog.text
    for other in (first, folder):
        with pytest.raises(ConfigError, match="other widths"):
            recover(model, tiny_tokenizer(), teacher, config, sources=text(), pruning=other)
    again = recover(model, tiny_tokenizer(), teacher, config, sources=text(), pruning=second)
    assert again.plan == second.plan and again.pruning["after"]["decoder"] == second.after.decoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_merged(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The merged model is the adapted one, without a trace of peft, and reloads."""
    import peft

    seen: dict[str, Any] = {}
    merge = peft.LoraModel.merge_and_unload

    def watched(self: Any, *args: Any, **options: Any) -> Any:
        seen["logits"] = logits_of(self.model.eval(), tokens()).clone()
        return merge(self, *args, **options)

    monkeypatch.setattr(peft.LoraModel, "merge_and_unload", watched)
    result = pruned()
    model = in_dtype(result.model, dtype)
    before = weights(model)
    found = recover(
        model,
        tiny_tokenizer(),
        tiny_model("llama"),
        short(tokens=3000, lora={"rank": 4}),
        sources=text(),
        pruning=result,
    )
    assert found.model is model and set(weights(model)) == set(before)
    assert {value.dtype for value in model.parameters()} == {dtype}
    assert all(value.requires_grad for value in model.parameters())
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(
        logits_of(model, tokens()).float(), seen["logits"].float(), rtol=tolerance, atol=tolerance
    )
    changed = {name for name, value in weights(model).items() if not torch.equal(before[name], value)}
    assert changed and all("_proj" in name for name in changed)
    found.save_pretrained(tmp_path / "out")


@pytest.mark.parametrize("recipe", ["flap", "magnitude"])
def test_a_dense_model_shrinks_while_it_learns_and_stays_narrow(recipe: str, tmp_path: Path) -> None:
    """Biases of a repair, which a cut adds to weights that are wide for the time, come back as narrow as these."""
    model = in_dtype(tiny_model("llama"), torch.bfloat16)
    config = config_of(recipe, repair={"min_tokens_per_column": 0})
    callback = AdaPrunerCallback(config, at=(0.0, 0.5))
    found = recover(model, tiny_tokenizer(), tiny_model("llama"), short(), sources=text(), callbacks=[callback])
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    assert any(name.endswith("down_proj.bias") for name, _ in model.named_parameters()) == (recipe == "flap")
    assert math.isfinite(found.held_out["after"]["loss"].value)
    assert found.plan == callback.plan and len(callback.done) == 2
    found.save_pretrained(tmp_path / "out")


def test_cuts_while_training_need_a_length_or_a_rhythm() -> None:
    model, before = tiny_model("llama"), weights(tiny_model("llama"))
    clock = RecoveryConfig(minutes=0.01, sequence_length=32, batch_size=2, held_out=0)
    options = {"sources": text()}
    for callback in (AdaPrunerCallback(config_of("magnitude")), AdaPrunerCallback(config_of("magnitude"), at=(0.0,))):
        with pytest.raises(ConfigError, match="`tokens` for `minutes`"):
            recover(model, tiny_tokenizer(), tiny_model("llama"), clock, callbacks=[callback], **options)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    callback = AdaPrunerCallback(config_of("magnitude"), every=1, cuts=1)
    assert recover(model, tiny_tokenizer(), tiny_model("llama"), clock, callbacks=[callback], **options).plan


def test_a_cut_reads_its_sources_with_the_recoverys_tokenizer() -> None:
    config = config_of("wanda-sp", calibration={"sources": text(60, "other")})
    callback = AdaPrunerCallback(config, at=(0.0, 0.5), data="calibration")
    student, dense = tiny_model("llama"), tiny_model("llama")
    found = recover(student, tiny_tokenizer(), dense, short(tokens=2000), sources=text(), callbacks=[callback])
    assert found.plan == callback.plan and len(callback.done) == 2


def test_hidden_states_of_all_layers_need_all_layers() -> None:
    config = config_of("magnitude", units=("layer",), importance={"metrics": {"block_influence": 1.0}},
                       allocation={"method": "global"})  # fmt: skip
    asked = short(hidden_weight=1.0, hidden_layers="all")
    with pytest.raises(ConfigError, match="`hidden_layers='all'` compares layer by layer"):
        recover(tiny_model("llama"), tiny_tokenizer(), tiny_model("llama"), asked, sources=text(),
                callbacks=[AdaPrunerCallback(config, at=(0.0,))])  # fmt: skip


def test_frozen_embeddings_stay() -> None:
    model = pruned().model
    before = weights(model)
    config = short(tokens=1000, train_embeddings=False, held_out=0)
    found = recover(model, tiny_tokenizer(), tiny_model("llama"), config, sources=text())
    assert not found.held_out
    after = weights(model)
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"])
    assert all(value.requires_grad for value in model.parameters())


def test_minutes_are_kept_and_the_rate_comes_down() -> None:
    started = time.perf_counter()
    config = short(tokens=None, minutes=0.06, held_out=4)
    found = recover(pruned().model, tiny_tokenizer(), tiny_model("llama"), config, sources=text())
    assert 0.5 * 3.6 < found.minutes * 60 < 3.6 + 3.0
    assert time.perf_counter() - started < 30
    rates = [row["learning_rate"] for row in found.log if "learning_rate" in row]
    assert found.steps > 10 and rates[-1] < 0.7 * max(rates)


def test_the_schedule_ends_low_and_begins_above_zero() -> None:
    shape = schedule_shape(RecoveryConfig())
    assert [round(shape(share), 2) for share in (0.025, 0.05, 0.5, 0.7, 0.85, 1.0)] == [0.5, 1, 1, 1, 0.5, 0]
    assert schedule_shape(RecoveryConfig(scheduler="cosine", warmup=0.0))(0.5) == pytest.approx(0.5)


def test_text_is_read_again_only_where_it_is_short(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hf_adaprune")
    source = TextSource("little", [calibration_prose(1, 400)])
    recover(pruned().model, tiny_tokenizer(), tiny_model("llama"), short(tokens=4000, held_out=1), sources=source)
    assert "they are read" in caplog.text and "read once after" in caplog.text
    caplog.clear()
    recover(pruned().model, tiny_tokenizer(), tiny_model("llama"), short(tokens=4000, held_out=1), sources=text())
    assert "read" not in caplog.text


def test_tokens_are_those_of_all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Trainer without a launcher reads `batch_size` windows on every GPU that it sees."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda _: 3))
    result = pruned()
    config = short(tokens=6000, batch_size=2)
    found = recover(result.model, tiny_tokenizer(), tiny_model("llama"), config, sources=text())
    assert found.steps == math.ceil(6000 / (3 * 2 * 32))
    assert 0.95 * 6000 < found.tokens <= found.steps * 3 * 2 * 32  # the last batch of a text is shorter


def test_shares_and_held_out_windows() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    sources = [text(), text(100, "more")]
    train, held = training_texts(model, tokenizer, short(tokens=3200, shares=(3, 1)), sources)
    assert torch.bincount(train.domain).tolist() == [75, 25] and torch.bincount(held.domain).tolist() == [12, 4]
    rows = {tuple(row) for row in train.input_ids.tolist()}
    assert not rows & {tuple(row) for row in held.input_ids.tolist()}
    longer, same = training_texts(model, tokenizer, short(tokens=6400, shares=(3, 1)), sources)
    assert same.digest == held.digest and len(longer) == 200
    everything, _ = training_texts(model, tokenizer, short(tokens=None, minutes=1.0, shares=(3, 1)), sources)
    counts = torch.bincount(everything.domain).tolist()
    assert counts[0] > 100 and counts[0] == pytest.approx(3 * counts[1], abs=4)


@pytest.mark.parametrize("top_k", [None, 64])
def test_windows_begin_with_bos_where_the_tokenizer_adds_it(top_k: int | None) -> None:
    tokenizer = begun_tokenizer()
    result = pruned()
    train, held = training_texts(result.model, tokenizer, short(), text())
    assert train.input_ids.shape == (math.ceil(6000 / 32), 32) and held is not None
    for blocks in (train, held, report_texts(result.model, tokenizer, text())["prose"]):
        assert (blocks.input_ids == tokenizer.bos_token_id).sum(1).eq(1).all()
        assert blocks.input_ids[:, 0].eq(tokenizer.bos_token_id).all()
    found = recover(result.model, tokenizer, tiny_model("llama"), short(top_k=top_k), sources=text(), pruning=result)
    assert found.text == train.facts() and found.text["begins_with"] == tokenizer.bos_token_id
    assert found.held_out["after"]["kl"].value < 0.97 * found.held_out["before"]["kl"].value
    assert found.held_out["after"]["loss"].tokens == 31 * len(held)


@pytest.mark.parametrize("shares", [(), (9, 1), (1, 9)], ids=str)
def test_text_of_the_model_itself_has_its_share(shares: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_sample", sampled_prose)
    config = short(tokens=1280, shares=shares, held_out=10)
    train, held = training_texts(tiny_model("llama"), tiny_tokenizer(), config, ["self", text()])
    wanted = shares or (5, 5)
    assert torch.bincount(train.domain).tolist() == [round(40 * share / 10) for share in wanted]
    assert held is not None and torch.bincount(held.domain).tolist() == list(wanted)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_windows_longer_than_learned_positions_are_refused_before_text_is_read(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rotary = tiny_random_model(family, vocab_size=384), tiny_model("llama")
    told = rf"`sequence_length` asks for windows of 129 tokens, and this {family} model has learned 128 positions"
    with pytest.raises(CalibrationError, match=told):  # of the teacher
        recover(rotary, tiny_tokenizer(), model, short(sequence_length=129), sources=text())
    monkeypatch.setattr(recovery, "training_texts", lambda *args, **options: pytest.fail("text was read"))
    with pytest.raises(CalibrationError, match=told):
        recover(model, tiny_tokenizer(), model, short(sequence_length=129), sources=text())


def test_report_windows_are_as_long_as_learned_positions_allow(caplog: pytest.LogCaptureFixture) -> None:
    """No option says how long they are."""
    model = tiny_random_model("gpt2", vocab_size=330)
    found = recover(
        model, tiny_tokenizer(), tiny_random_model("gpt2", vocab_size=330), short(tokens=500, sequence_length=128),
        sources=text(), report=text(100, "report"),
    )  # fmt: skip
    assert "windows of 128 tokens" in caplog.text
    assert found.evaluation["report"]["dense"].samples > 1


def test_texts_that_overlap_are_refused() -> None:
    for role in ("selection", "report"):
        with pytest.raises(CalibrationError, match="overlap"):
            training_texts(tiny_model("llama"), tiny_tokenizer(), short(), text(), **{role: text(10, "other")})
    with pytest.raises(CalibrationError, match="no training text"):
        recover(tiny_model("llama"), tiny_tokenizer(), tiny_model("llama"), short(), sources=[])
    with pytest.raises(CalibrationError, match="too short"):
        recover(tiny_model("llama"), tiny_tokenizer(), tiny_model("llama"), short(), sources=TextSource("a", ["rain"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 100, "minutes": 1.0}, "Give one"),
        ({"minutes": 0}, "above 0"),
        ({"alpha": 2.0}, "alpha"),
        ({"warmup": 0.8, "decay": 0.3}, "at most 1"),
        ({"precision": "int8"}, "precision"),
        ({"top_k": 8, "hidden_weight": 1.0}, "top_k"),
        ({"shares": (-1.0, 1.0)}, "shares"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": 2**32}, r"below 2\*\*32"),
        ({"seed": -1}, "seed"),
        ({"lora": {"rank": 0}}, "lora.rank"),
    ],
    ids=str,
)
def test_configs_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RecoveryConfig(**changes)


def test_what_cannot_work_fails_before_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    before = weights(model)
    cases: list[tuple[type[AdaPruneError], str, Any, dict[str, Any]]] = [
        (ConfigError, "one vocabulary", tiny_random_model("llama", vocab_size=400), {}),
        (UnsupportedModelError, "could not be loaded", str(tmp_path / "nowhere"), {}),
        (ConfigError, "one number per source", model, {"shares": (1, 1)}),
        (
            ConfigError,
            "no plan says",
            tiny_model("llama", num_hidden_layers=2),
            {"hidden_weight": 1.0, "hidden_layers": "all"},
        ),
    ]
    for kind, message, teacher, changes in cases:
        with pytest.raises(kind, match=message):
            recover(model, tokenizer, teacher, short(**changes), sources=text())
    with pytest.raises(ConfigError, match="folder of a pruned checkpoint"):
        recover(model, tokenizer, model, short(), sources=text(), pruning=tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependencyError, match="peft"):
        recover(model, tokenizer, model, short(lora={}), sources=text())
    model.quantization_method = "some"
    with pytest.raises(UnsupportedModelError, match="quantised"):
        recover(model, tokenizer, model, short(), sources=text())
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # peft's own, of its own patterns
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_adapters_of_experts_leave_every_weight_in_its_dtype(family: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = in_dtype(tiny_model(family), torch.bfloat16)
    before = {name: value.dtype for name, value in model.named_parameters()}
    result = recover(model, tiny_tokenizer(), model, short(tokens=500, held_out=0, lora={"rank": 2}), sources=text())
    assert {name: value.dtype for name, value in result.model.named_parameters()} == before
    result.save_pretrained(tmp_path / "out")  # reloads, and compares


def test_adapters_that_are_there_already_are_refused() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UnsupportedModelError, match="merge_and_unload"):
        recover(model, tiny_tokenizer(), tiny_model("llama"), short(), sources=text())


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_an_interrupted_training_leaves_a_whole_model(lora: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = in_dtype(pruned().model, torch.bfloat16)
    names, calls = set(weights(model)), []

    def stop(self: Any, *args: Any, **options: Any) -> None:
        calls.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_adaprune.recovery_course.Course.on_step_end", stop)
    with pytest.raises(KeyboardInterrupt):
        recover(model, tiny_tokenizer(), tiny_model("llama"), short(lora=lora, held_out=0), sources=text())
    assert calls and set(weights(model)) == names
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    assert all(value.requires_grad and value.grad is None for value in model.parameters())
    assert "forward" not in model.__dict__ and not hasattr(model, "peft_config")


def test_stage_shares() -> None:
    assert stage_shares(4) == pytest.approx((0.1, 0.2, 0.3, 0.4))
    assert stage_shares(3, "constant") == pytest.approx((1 / 3,) * 3)
    cosine = stage_shares(5, "cosine")
    assert sum(cosine) == pytest.approx(1) and list(cosine) == sorted(cosine)
    with pytest.raises(ConfigError, match="stages"):
        stage_shares(0)
    with pytest.raises(ConfigError, match="kind"):
        stage_shares(3, "square")


def folders(tmp_path: Path) -> tuple[Path, Path, Path, Path]:
    dense = tiny_model("llama")
    dense.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    pruned().save_pretrained(tmp_path / "pruned")
    train, report = tmp_path / "train.txt", tmp_path / "report.txt"
    train.write_text("\n\n".join(text().texts))
    report.write_text("\n\n".join(text(200).texts))
    return tmp_path / "dense", tmp_path / "pruned", train, report


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, small, train, report = folders(tmp_path)
    words = ["recover", str(small), "--teacher", str(dense), "--calibration", str(train), "--report", str(report)]
    words += ["--tokens", "3k", "--sequence-length", "32", "--batch-size", "8", "--learning-rate", "3e-3", "--quiet"]
    assert main([*words, "--json", "--output", str(tmp_path / "out"), "--lora", "4"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["config"]["lora"]["rank"] == 4 and set(data["evaluation"]["report"]) == {"dense", "before", "recovered"}
    found = {which: entry["value"] for which, entry in data["evaluation"]["report"].items()}
    assert found["recovered"] < found["before"] and "evaluation" in data["pruned"]
    record = json.loads((tmp_path / "out" / "pruning_config.json").read_text())
    assert record["evaluation"] == data["evaluation"]
    shown = f"{found['dense']:.2f} dense, {found['recovered']:.2f} recovered"
    assert main(["show", str(tmp_path / "out")]) == 0 and shown in capsys.readouterr().out
    assert (tmp_path / "out" / "pruning_plan.json").is_file()
    assert main([*words, "--output", str(tmp_path / "again")]) == 0
    assert "held out, kl" in capsys.readouterr().out
    for extra, message in (
        (["--output", str(tmp_path / "out")], "not empty"),
        (["--output", str(tmp_path / "x"), "--alpha", "3"], "alpha"),
        (["--output", str(tmp_path / "x"), "--selection", str(train)], "overlap"),
        (["--output", str(tmp_path / "x"), "--teacher", str(tmp_path / "none")], "could not be loaded"),
    ):
        assert main([*words, *extra]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_the_command_refuses_a_pair_that_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, small, train, _ = folders(tmp_path)
    tiny_random_model("llama", vocab_size=400).save_pretrained(tmp_path / "other")
    words = ["recover", str(small), "--calibration", str(train), "--output", str(tmp_path / "x")]
    assert main([*words, "--teacher", str(tmp_path / "other")]) == 2
    assert "one vocabulary" in capsys.readouterr().err
    config = json.loads((small / "config.json").read_text())
    quantised = {**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (small / "config.json").write_text(json.dumps(quantised))
    assert main([*words, "--teacher", str(dense)]) == 2
    assert "--lora" in capsys.readouterr().err
    (small / "config.json").write_text(json.dumps(config))
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main([*words, "--teacher", str(dense), "--lora"]) == 2
    assert "pip install peft" in capsys.readouterr().err
