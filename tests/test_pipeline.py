"""`prune()` from end to end on tiny models: every recipe, every schedule, and what is left after an error."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import logits_of, tokens
from conftest import tiny_model as tiny_random_model
from texts import begun_tokenizer, calibration_make_tokenizer, calibration_prose, sampled_prose
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_adaprune import (
    RECIPES,
    PruningConfig,
    PruningPlan,
    TextSource,
    documents,
    find_sites,
    prune,
    prune_to_disk,
    search_plan,
    stages,
)
from hf_adaprune import pipeline as pipeline_module
from hf_adaprune.errors import BudgetError, CalibrationError, ConfigError, UnsupportedModelError
from hf_adaprune.estimate import estimate
from hf_adaprune.evaluation import perplexity
from hf_adaprune.machine_speed import Speed
from hf_adaprune.selection import selection_blocks
from hf_adaprune.stages import gather_texts

VOCABULARY = 384  # room for the tokens of the tokenizer


def tiny_model(family: str, **changes: object) -> PreTrainedModel:
    return tiny_random_model(family, vocab_size=VOCABULARY, **changes)


@functools.cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return calibration_make_tokenizer(eos_token="</s>")


def passage(seed: int) -> str:
    return calibration_prose(seed, 60)


TEXT = TextSource("words", [passage(seed) for seed in range(1, 60)])
OTHER = TextSource("other", [passage(seed) for seed in range(100, 130)])
SMALL = {"sources": TEXT, "samples": 24, "sequence_length": 16, "gradient_samples": 4}


def config_of(recipe: str = "default", ratio: float = 0.25, **changes: object) -> PruningConfig:
    calibration = {**SMALL, **changes.pop("calibration", {})}  # type: ignore[dict-item]
    repair = changes.pop("repair", {})
    if RECIPES[recipe].repair.method == "least_squares":
        repair = {"min_tokens_per_column": 1.0, "holdout": 0.25, **repair}  # type: ignore[dict-item]
    return PruningConfig.recipe(recipe, pruning_ratio=ratio, calibration=calibration, repair=repair, **changes)


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_every_recipe_meets_its_budget_and_computes(recipe: str) -> None:
    model = tiny_model("llama", num_hidden_layers=12)
    result = prune(model, tiny_tokenizer(), config_of(recipe))
    assert 0.25 <= result.pruning_ratio < 0.25 + 0.1
    assert result.after.total == sum(p.numel() for p in model.parameters())
    assert torch.isfinite(logits_of(model, tokens())).all()
    again = json.loads(json.dumps(result.to_dict()))
    assert PruningPlan.from_dict(again["plan"]) == result.plan


def test_a_config_is_asked_for_by_name_and_by_its_fields(tmp_path: Path) -> None:
    said = config_of("magnitude")
    named = prune(tiny_model("llama"), tiny_tokenizer(), "magnitude", calibration=TEXT)
    assert named.config == PruningConfig.recipe("magnitude", calibration={"sources": TEXT})
    config = said.with_changes(calibration={"sources": "python"}).to_dict()  # texts in memory are in no mapping
    given = prune(tiny_model("llama"), tiny_tokenizer(), config, calibration=TEXT)
    assert given.plan == prune(tiny_model("llama"), tiny_tokenizer(), said).plan
    with pytest.raises(ConfigError, match="should be a PruningConfig, a mapping of its fields or the name of a recipe"):
        prune(tiny_model("llama"), tiny_tokenizer(), 5)  # type: ignore[arg-type]
    for ask in (lambda: prune_to_disk(tiny_model("llama"), tiny_tokenizer(), "flop", tmp_path / "out"),
                lambda: search_plan(tiny_model("llama"), tiny_tokenizer(), "flop")):  # fmt: skip
        with pytest.raises(ConfigError, match="`recipe` should be one of"):
            ask()
    assert not list(tmp_path.iterdir())


def test_default_runs_on_every_family(family: str) -> None:
    model = tiny_model(family)
    dense = sum(p.numel() for p in model.parameters())
    units = ("channel", "expert_channel", "kv_group")
    result = prune(model, tiny_tokenizer(), config_of(units=units))
    assert result.after.total < dense
    assert torch.isfinite(logits_of(model, tokens())).all()


def test_every_domain_has_a_window_with_gradients_or_the_run_is_refused(tmp_path: Path) -> None:
    """Metrics that read gradients would know nothing of the others, and nobody would be told."""
    model, file = tiny_model("llama"), str(tmp_path / "not_there.txt")  # which nobody gets to read
    for calibration in ({"sources": (TEXT, file)}, {"sources": (file,), "clusters": 2}):
        config = config_of(calibration={**calibration, "gradient_samples": 1})
        with pytest.raises(ConfigError, match=r"gradient_samples` should give each of the 2 sources or clusters"):
            prune(model, tiny_tokenizer(), config)
        with pytest.raises(ConfigError, match=r"gradient_samples` should give each of the 2 sources or clusters"):
            estimate(find_sites(model), config, Speed(1e9, 1e9, 1e8))
        assert not list(tmp_path.iterdir())
    both = {"sources": (TEXT, OTHER), "gradient_samples": 1}
    estimate(find_sites(model), config_of(calibration=both, layer_by_layer=True), Speed(1e9, 1e9, 1e8))
    prune(model, tiny_tokenizer(), config_of("flap", calibration=both))  # which reads no gradients


def test_same_seed_same_plan() -> None:
    plans = [prune(tiny_model("llama"), tiny_tokenizer(), config_of()).plan for _ in range(2)]
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"repair": {"schedule": "sequential"}},
        {"repair": {"schedule": "sequential", "target_mix": 0.5}},
        {"repair": {"schedule": "best"}},
        {"repair": {"intercept": True}},
        {"repair": {"method": "bias", "holdout": 0.0}},
        {"repair": {"regional_steps": 2}},
        {"layer_by_layer": True, "importance": {"metrics": {"fisher": 1.0}, "normalization": "none"}},
        {"gram_place": "disk"},
        {"gram_place": "model"},
        {"uniform": True},
        {"calibration": {"domain_weights": (1.0, 3.0), "sources": (TEXT, TextSource("b", [passage(99) * 9]))}},
    ],
    ids=lambda changes: json.dumps(changes, default=str)[:60],
)
def test_every_way_to_repair(changes: dict) -> None:
    model = tiny_model("llama")
    result = prune(model, tiny_tokenizer(), config_of(**changes))
    assert result.pruning_ratio >= 0.25
    assert torch.isfinite(logits_of(model, tokens())).all()


def test_a_repair_brings_the_model_closer_to_the_dense_one() -> None:
    dense = tiny_model("llama", num_hidden_layers=4)
    ids = tokens(8, 24, seed=5)
    wanted = logits_of(dense, ids)
    errors = {}
    for method in ("none", "least_squares"):
        model = tiny_model("llama", num_hidden_layers=4)
        config = config_of(calibration={"samples": 40}, repair={"method": method, "holdout": 0.2})
        prune(model, tiny_tokenizer(), config)
        errors[method] = float((logits_of(model, ids) - wanted).square().mean())
    assert errors["least_squares"] < errors["none"]


def test_a_plan_that_stands_is_carried_out() -> None:
    first = prune(tiny_model("llama"), tiny_tokenizer(), config_of())
    model = tiny_model("llama")
    second = prune(model, tiny_tokenizer(), config_of(), plan=PruningPlan.from_json(first.plan.to_json()))
    assert second.plan == first.plan
    torch.testing.assert_close(logits_of(model, tokens()), logits_of(first.model, tokens()))


def test_a_pruned_model_is_pruned_further() -> None:
    model = tiny_model("llama")
    first = prune(model, tiny_tokenizer(), config_of(repair={"intercept": True}))
    second = prune(model, tiny_tokenizer(), config_of(ratio=0.2))
    assert second.before == first.after
    assert second.pruning_ratio >= 0.2


def test_targets_in_parameters_and_bytes() -> None:
    dense = tiny_model("llama")
    total = sum(p.numel() for p in dense.parameters())
    for name, goal in (("target_parameters", total - 2000), ("target_bytes", 4 * (total - 2000))):
        result = prune(tiny_model("llama"), tiny_tokenizer(), config_of("magnitude", **{name: goal}))
        assert total - 2000 - 4000 <= result.after.total <= total - 2000


def test_report_text_is_measured_before_and_after() -> None:
    report = TextSource("held back", [passage(1000 + seed) for seed in range(8)])
    config = config_of(calibration={"report": report, "evaluation_tokens": 64, "evaluation_length": 16})
    result = prune(tiny_model("llama"), tiny_tokenizer(), config)
    pair = result.evaluation["held back"]
    assert pair["dense"].tokens > 0
    assert pair["dense"].value != pair["pruned"].value


def test_repairs_that_do_not_help_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_adaprune import repairing
    from hf_adaprune.compensation import Repair

    real = repairing.repair_plan

    def spoiled(*args: object, **kwargs: object) -> dict:
        repairs = real(*args, **kwargs)
        name = next(iter(repairs))
        return {**repairs, name: Repair(repairs[name].weight * 50)}

    monkeypatch.setattr(repairing, "repair_plan", spoiled)
    result = prune(tiny_model("llama"), tiny_tokenizer(), config_of())
    dropped = [report.name for report in result.repairs if not report.kept]
    assert dropped
    assert result.repairs[0].name in dropped
    assert result.to_dict()["repair"]["dropped"] == dropped


# -- the model is untouched after an exception at every stop ----------------------------------------------------------


@pytest.mark.parametrize("stop", ["gather_texts", "decide", "choose_repairs"])
def test_the_model_is_untouched_after_an_exception(stop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config.to_dict()

    def fails(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline_module, stop, fails)
    with pytest.raises(KeyboardInterrupt):
        prune(model, tiny_tokenizer(), config_of())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict() == config
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# -- bad input, before any work ---------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_refused_by_name() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.up_proj\.weight contains NaN"):
        prune(model, tiny_tokenizer(), config_of())


def test_a_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        model = type(tiny_model("llama"))(tiny_model("llama").config)
    with pytest.raises(UnsupportedModelError, match="meta device"):
        prune(model, tiny_tokenizer(), config_of())


def test_a_recipe_that_reads_text_asks_for_a_tokenizer() -> None:
    with pytest.raises(CalibrationError, match="no tokenizer came"):
        prune(tiny_model("llama"), None, config_of())
    assert prune(tiny_model("llama"), None, config_of("magnitude")).pruning_ratio >= 0.25


def test_overlapping_texts_are_refused() -> None:
    with pytest.raises(CalibrationError, match=r"overlap|share"):
        prune(tiny_model("llama"), tiny_tokenizer(), config_of(calibration={"report": TEXT}))


def test_too_few_tokens_for_the_repair_are_refused() -> None:
    with pytest.raises(CalibrationError, match="too few to repair"):
        prune(tiny_model("llama"), tiny_tokenizer(), config_of(repair={"min_tokens_per_column": 500.0}))


def test_a_text_with_fewer_windows_than_asked_for_gives_what_it_has(caplog: pytest.LogCaptureFixture) -> None:
    result = prune(tiny_model("llama"), tiny_tokenizer(), config_of(calibration={"samples": 5000}))
    assert 24 < result.calibration["windows"] < 5000
    assert "5000 were asked for" in caplog.text


def test_a_model_of_mixed_widths_cannot_become_uniform() -> None:
    model = tiny_model("llama")
    prune(model, tiny_tokenizer(), config_of())
    with pytest.raises(ConfigError, match="starts from equal layers"):
        prune(model, tiny_tokenizer(), config_of(uniform=True))


def test_rounds_with_moments_on_disk_repair_like_those_in_memory() -> None:
    found = []
    for place in ("cpu", "disk"):
        model = tiny_model("llama")
        prune(model, tiny_tokenizer(), config_of(gram_place=place, allocation={"steps": 2}))
        found.append(logits_of(model, tokens()))
    assert torch.equal(*found)


def test_a_walk_does_not_depend_on_the_training_flag() -> None:
    found = []
    for training in (False, True):
        model = tiny_model("gpt2").train(training)
        prune(model, tiny_tokenizer(), config_of(units=("channel",), repair={"schedule": "sequential"}))
        assert model.training == training
        found.append(logits_of(model.eval(), tokens()))
    assert torch.equal(*found)


def test_regional_repair_of_a_family_that_reads_head_counts_from_its_config() -> None:
    config = config_of(ratio=0.6, repair={"regional_steps": 1}, allocation={"method": "uniform"})
    model = tiny_model("phi3")
    plan = prune(model, tiny_tokenizer(), config).plan
    assert any("attention" in name for name in plan.sites)


def test_an_unreachable_ratio_is_refused_before_text_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_module, "gather_texts", lambda *args: pytest.fail("text was read"))
    with pytest.raises(BudgetError, match="at most"):
        prune(tiny_model("llama"), tiny_tokenizer(), config_of(ratio=0.9, min_channels=40))


def test_whole_parts_that_a_method_ignores_are_refused_before_text_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_module, "gather_texts", lambda *args: pytest.fail("text was read"))
    with pytest.raises(ConfigError, match=r"allocation 'uniform' shares widths, and layer of `units` would never go"):
        prune(tiny_model("llama"), tiny_tokenizer(), config_of("wanda-sp", units=("channel", "layer")))


@pytest.mark.parametrize("shares", [(), (9, 1), (1, 9)], ids=str)
def test_text_of_the_model_itself_has_its_share(shares: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_sample", sampled_prose)
    own = {"sources": ("self", TEXT), "samples": 40, "shares": shares}
    config = config_of(calibration=own, repair={"holdout": 0.0})
    blocks, _, _ = stages.gather_texts(find_sites(tiny_model("llama")), tiny_tokenizer(), config, True)
    assert blocks is not None and blocks.domains == ("self", "words")
    assert torch.bincount(blocks.domain).tolist() == [round(40 * share / 10) for share in shares or (5, 5)]


WINDOWS = {
    "calibration.sequence_length": {"calibration": {"sequence_length": 129}},
    "calibration.evaluation_length": {"calibration": {"report": OTHER, "evaluation_length": 129}},
    "search.sequence_length": {
        "calibration": {"selection": OTHER}, "search": {"trials": 2, "strategy": "random", "sequence_length": 129},
    },
}  # fmt: skip


@pytest.mark.parametrize("field", WINDOWS)
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_windows_longer_than_learned_positions_are_refused_before_any_forward(
    family: str, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family)
    monkeypatch.setattr(stages, "read_source", lambda *args, **options: pytest.fail("text was read"))
    handle = model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(CalibrationError, match=rf"`{field}` asks for windows of 129 tokens.*128 positions. Lower it"):
        prune(model, tiny_tokenizer(), config_of(units=("channel",), **WINDOWS[field]))
    handle.remove()


@pytest.mark.parametrize(("family", "length"), [("gpt2", 128), ("opt", 128), ("gpt_neox", 136), ("llama", 136)])
def test_windows_as_long_as_learned_positions_or_longer_than_others_run(family: str, length: int) -> None:
    own = {"sequence_length": length, "report": OTHER, "evaluation_length": length, "evaluation_tokens": 2 * length}
    result = prune(tiny_model(family), tiny_tokenizer(), config_of("flap", units=("channel",), calibration=own))
    assert result.evaluation["other"]["dense"].value > 0


def test_windows_of_every_role_begin_with_bos_where_the_tokenizer_adds_it() -> None:
    tokenizer, plain = begun_tokenizer(), begun_tokenizer(adds=False)
    more = TextSource("more", [passage(seed) for seed in range(200, 260)])
    search = {"sequence_length": 16, "selection_tokens": 128, "first_tokens": 64, "final_tokens": 64}
    own = {"report": OTHER, "selection": more, "evaluation_length": 24, "evaluation_tokens": 96}
    config = config_of(calibration=own, search=search)
    sites = find_sites(tiny_model("llama"))
    found = []
    for each in (tokenizer, plain):
        blocks, held, reports = gather_texts(sites, each, config, True)
        found.append([blocks, held, reports["other"], selection_blocks(sites, each, config)[0]])
    for begun, bare in zip(*found, strict=True):
        assert begun.input_ids.shape == bare.input_ids.shape and torch.equal(begun.attention_mask, bare.attention_mask)
        assert torch.equal(begun.domain, bare.domain) and begun.tokens == bare.tokens
        assert (begun.input_ids == tokenizer.bos_token_id).sum(1).eq(1).all()
        assert not bare.input_ids.eq(tokenizer.bos_token_id).any()
        assert begun.facts()["begins_with"] == tokenizer.bos_token_id
    model = tiny_model("llama")
    result = prune(model, tokenizer, config.with_changes(search=None))
    assert result.to_dict()["calibration"]["begins_with"] == tokenizer.bos_token_id
    assert result.evaluation["other"]["dense"] == perplexity(tiny_model("llama"), found[0][2])


def test_layer_by_layer_refuses_metrics_that_need_all_moments() -> None:
    only = {"metrics": {"obs": 1.0}, "normalization": "none"}
    with pytest.raises(ConfigError, match="layer_by_layer"):
        prune(tiny_model("llama"), tiny_tokenizer(), config_of(layer_by_layer=True, importance=only))
    result = prune(tiny_model("llama"), tiny_tokenizer(), config_of(layer_by_layer=True))
    assert result.config.importance.metrics == {"fisher": 1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pruning_ratio": 1.0}, r"\[0, 1\)"),
        ({"pruning_ratio": -0.1}, r"\[0, 1\)"),
        ({"pruning_ratio": 20}, r"For 20 percent write 0\.2"),
        ({"units": ("neuron",)}, "units"),
        ({"units": ("kv_group", "query_head")}, "Choose one"),
        ({"uniform": True, "units": ("mlp",)}, "equal layers"),
        ({"nonsense": 1}, "no field"),
        ({"importance": {"metrics": {"fisher": 1, "obs": 1}, "normalization": "none"}}, "without a normalisation"),
        ({"calibration": {"sources": ()}}, "sources"),
        ({"repair": {"damping": -1}}, "damping"),
        ({"target_bytes": 1, "target_parameters": 1}, "one budget"),
        ({"seed": 2**32}, r"seed. should be below 2\*\*32"),
        ({"seed": -1}, "seed"),
    ],
)
def test_a_config_explains_what_is_wrong(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PruningConfig.recipe("default", **changes)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("importance.metrics", lambda value: {"fisher": 1.0, "obs": value}),
        ("calibration.domain_weights", lambda value: (1.0, value)),
        ("allocation.profile", lambda value: (0.0, value)),
        ("allocation.attention_balance", lambda value: value),
    ],
)
def test_numbers_of_a_config_are_finite(field: str, given: Callable[[float], object], value: float) -> None:
    """NaN and infinity compare with nothing: plans that they scale are arbitrary."""
    part, _, name = field.partition(".")
    default = PruningConfig.recipe("default", calibration={"sources": ("a", "b")})
    with pytest.raises(ConfigError, match=rf"`{field}.*should be in \["):
        default.with_changes(**{part: {name: given(value)}})


def test_a_profile_that_no_float_holds_is_refused() -> None:
    """`exp(800)` overflows."""
    for given in ({"profile": (800.0, -800.0)}, {"attention_balance": -800.0}, {"attention_balance": "much"}):
        with pytest.raises(ConfigError, match=r"should be in \[-20, 20\]"):
            PruningConfig.recipe("default", allocation=given)


def test_config_round_trip_and_unknown_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = PruningConfig.recipe("flap", pruning_ratio=0.3, calibration={"sources": ("a.txt", "b.txt")})
    config.save_pretrained(tmp_path)
    assert PruningConfig.from_pretrained(tmp_path) == config
    data = {**config.to_dict(), "from_the_future": 1}
    assert PruningConfig.from_dict(data) == config
    assert "from_the_future" in caplog.text


def test_a_config_with_texts_in_memory_says_so_when_it_is_read_back() -> None:
    with pytest.raises(ConfigError, match="in memory"):
        PruningConfig.from_dict(config_of().to_dict())


def test_the_plan_is_saved_before_the_repair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline_module, "choose_repairs", fails)
    model = tiny_model("llama")
    with pytest.raises(KeyboardInterrupt):
        prune(model, tiny_tokenizer(), config_of(), plan_path=tmp_path / "plan.json")
    find_sites(model).check(PruningPlan.load(tmp_path / "plan.json"))
