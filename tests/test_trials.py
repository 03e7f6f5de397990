"""Laws of trials: cached scores are the scores, a trial is the model that prune() makes, and nothing is left behind."""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import logits_of, tokens
from conftest import tiny_model as tiny_random_model
from texts import calibration_make_tokenizer, calibration_prose
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from hf_adaprune import (
    METRICS,
    PruningConfig,
    PruningPlan,
    TextSource,
    find_sites,
    prune,
    result_of,
    search_plan,
    search_stage,
)
from hf_adaprune import metrics as metrics_module
from hf_adaprune.choices import ChoiceRow
from hf_adaprune.config import ImportanceConfig
from hf_adaprune.errors import AdaPruneError, BudgetError, CalibrationError, ConfigError, JournalError
from hf_adaprune.evaluation import per_window_loss
from hf_adaprune.importance import Scores, score_units
from hf_adaprune.journal_report import describe_journal
from hf_adaprune.masking import masked
from hf_adaprune.measures import Measure, custom_measure, row_measure, window_measure
from hf_adaprune.recording import collect_statistics
from hf_adaprune.search.journal import Journal, Trial, mean_value
from hf_adaprune.search.space import METRICS as SEARCHED
from hf_adaprune.search.space import apply_fields, default_space
from hf_adaprune.search_checks import check_search, search_needs
from hf_adaprune.search_journal import model_digest, warm_points
from hf_adaprune.searching import find_best
from hf_adaprune.selection import selection_blocks
from hf_adaprune.sites import ModelSites
from hf_adaprune.stages import gather_texts, needs_text
from hf_adaprune.statistics import Needs, Statistics
from hf_adaprune.trials import CachedScores, Trials

UNITS = ("channel", "kv_group")
WINDOW = 16


def passages(name: str, first: int, count: int) -> TextSource:
    return TextSource(name, [calibration_prose(seed, 60) for seed in range(first, first + count)])


# The second source is short, so that domains differ in size.
SOURCES = (passages("long", 1, 60), passages("short", 100, 1))
SELECTION = passages("selection", 200, 30)


def tiny_model(**changes: object) -> PreTrainedModel:
    return tiny_random_model("llama", vocab_size=384, **changes)


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    return calibration_make_tokenizer(eos_token="</s>")


def config_of(search: Mapping[str, Any] | None = None, recipe: str = "default", **changes: Any) -> PruningConfig:
    calibration = {
        "sources": SOURCES, "selection": (SELECTION,), "samples": 48, "sequence_length": WINDOW, "gradient_samples": 8,
        **changes.pop("calibration", {}),
    }  # fmt: skip
    own = {
        "trials": 5, "strategy": ("random",), "sequence_length": WINDOW, "selection_tokens": 12 * WINDOW,
        "first_tokens": 4 * WINDOW, "final_tokens": 6 * WINDOW, "finalists": 2, **(search or {}),
    }  # fmt: skip
    repair = {"min_tokens_per_column": 1.0, "holdout": 0.0, **changes.pop("repair", {})} if recipe == "default" else {}
    given = {"pruning_ratio": 0.25, "repair": repair, **changes}
    return PruningConfig.recipe(recipe, calibration=calibration, search=own, **given)


def statistics_of(sites: ModelSites, config: PruningConfig) -> Statistics:
    blocks = gather_texts(sites, tokenizer(), config, True)[0]
    assert blocks is not None
    needs = search_needs(config, len(blocks.domains))
    return collect_statistics(sites, blocks, needs, gradient_samples=config.calibration.gradient_samples)


def trials_of(model: PreTrainedModel, config: PruningConfig, measure: Measure | None = None) -> Trials:
    """The problem of a search, as `find_best` puts it together."""
    sites = find_sites(model)
    statistics = statistics_of(sites, config)
    assert config.search is not None
    if measure is None:
        blocks, windows = selection_blocks(sites, tokenizer(), config)
        measure = window_measure(sites, blocks, config.search.objective, first=4, windows=windows)
    return Trials(sites, config, default_space(config, statistics.domains, statistics.shares), statistics, measure)


def points(trials: Trials, count: int) -> list[dict[str, Any]]:
    """The default and random others."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(count - 1, trials.space.width, generator=generator)
    return [trials.space.default, *(trials.space.from_cube(draw) for draw in draws)]


# -- cached scores ----------------------------------------------------------------------------------------------------


@functools.cache
def everything() -> tuple[ModelSites, Statistics]:
    """All statistics of three domains of different sizes."""
    sites = find_sites(tiny_model())
    config = config_of(calibration={"sources": (*SOURCES, passages("third", 300, 2))})
    blocks = gather_texts(sites, tokenizer(), config, True)[0]
    assert blocks is not None and len(set(torch.bincount(blocks.domain).tolist())) == 3
    needs = Needs(gram=True, gradients=True, elements=True, cosine=True, per_domain=True, squares=True)
    return sites, collect_statistics(sites, blocks, needs, gradient_samples=9)


def exact(config: ImportanceConfig, weights: tuple[float, ...]) -> Scores:
    sites, statistics = everything()
    return score_units(sites, UNITS, config, statistics, weights=statistics.sample_weights(weights), seed=3)


def cached(center: tuple[float, ...] = ()) -> CachedScores:
    sites, statistics = everything()
    return CachedScores(sites, UNITS, statistics, center, 3)


def assert_same(found: Scores, expected: Scores, tolerance: float) -> None:
    assert found.kinds == expected.kinds
    for name, own in expected.units.items():
        torch.testing.assert_close(found.units[name], own, rtol=tolerance, atol=1e-12)
    torch.testing.assert_close(found.layers, expected.layers, rtol=tolerance, atol=1e-12)


CORNERS = [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)]
CENTERS = [(), (0.5, 0.3, 0.2), (2.0, 0.0, 6.0)]


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_cached_scores_are_exact_at_the_center_and_for_single_domains(metric: str) -> None:
    config = ImportanceConfig({metric: 1.0})
    for center in CENTERS:
        own = cached(center)
        assert_same(own.scores(config, center), exact(config, center), 1e-9)
        for corner in CORNERS:
            assert_same(own.scores(config, corner), exact(config, corner), 1e-9)


def test_cached_scores_of_a_mixture_are_exact_at_the_center() -> None:
    default = config_of().importance
    many = ImportanceConfig({name: 1.0 + number for number, name in enumerate(SEARCHED)}, "mean")
    for config in (default, many, replace(many, normalization="log"), replace(many, normalization="rank")):
        for center in CENTERS:
            assert_same(cached(center).scores(config, center), exact(config, center), 1e-9)
        assert_same(cached().scores(config, CORNERS[1]), exact(config, CORNERS[1]), 1e-9)


def test_weights_of_six_digits_are_the_center() -> None:
    own, config = cached((1.0, 1.0, 1.0)), ImportanceConfig({"obs": 1.0})
    assert_same(own.scores(config, (0.333334, 0.333333, 0.333333)), exact(config, (1.0, 1.0, 1.0)), 1e-9)
    assert len(own._raw) == 1  # and no single domain was computed for a rounded digit


@pytest.mark.parametrize("metric", [name for name, metric in METRICS.items() if not metric.needs.gram])
def test_metrics_without_moments_are_exact_anywhere(metric: str) -> None:
    draws = torch.rand(6, 3, generator=torch.Generator().manual_seed(1)).tolist()
    config = ImportanceConfig({metric: 1.0})
    for center in CENTERS:
        own = cached(center)
        for weights in draws:
            assert_same(own.scores(config, tuple(weights)), exact(config, tuple(weights)), 1e-5)


def test_between_anchors_the_cost_of_a_removal_is_a_lower_bound() -> None:
    draws = torch.rand(8, 3, generator=torch.Generator().manual_seed(2)).tolist()
    config = ImportanceConfig({"obs": 1.0})
    own = cached()
    gaps = []
    for weights in map(tuple, draws):
        found, expected = own.scores(config, weights), exact(config, weights)
        for name, units in expected.units.items():
            assert (found.units[name] <= units * (1 + 1e-6)).all()
            gaps.append(float((1 - found.units[name] / units).max()))
    assert 1e-4 < max(gaps) < 0.5


def test_metrics_of_weight_0_are_not_computed_and_moments_are_inverted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, int] = {}

    def counting(name: str) -> Any:
        function = METRICS[name].function

        def counted(*args: Any) -> torch.Tensor:
            calls[name] = calls.get(name, 0) + 1
            return function(*args)

        return counted

    for name in list(METRICS):
        monkeypatch.setitem(metrics_module.METRICS, name, replace(METRICS[name], function=counting(name)))
    own = cached()
    config = ImportanceConfig({"fisher": 0.5, "obs": 0.0, "wanda_sp": 0.5, "random": 0.0}, "log")
    own.scores(config)
    sites = len(own.kinds)
    assert calls == {"fisher": sites, "wanda_sp": sites}
    costly = ImportanceConfig({"obs": 1.0})
    for weights in ((), (1.0, 2.0, 3.0), (3.0, 2.0, 1.0), (1.0, 0.0, 0.0)):
        own.scores(costly, weights)
    assert calls["obs"] == 4 * sites  # the center and three domains
    for _ in range(2):
        own.scores(replace(costly, damping=0.5))
        assert calls["obs"] == 5 * sites  # another ridge is another number


# -- trials -----------------------------------------------------------------------------------------------------------


def test_trial_0_is_what_prune_makes_of_the_same_config() -> None:
    for domain_weights in ((), (1.0, 2.0)):
        config = config_of(calibration={"domain_weights": domain_weights})
        model = tiny_model()
        trials = trials_of(model, config)
        assert trials.statistics.shares[0] > 2 * trials.statistics.shares[1]
        candidate = trials.candidate(trials.space.default)
        (repairs,) = trials.repairs(candidate.payload)
        assert repairs
        with masked(trials.sites, candidate.payload.plans[0], repairs, narrow=True):
            found = logits_of(model, tokens())
        pruned = prune(model, tokenizer(), config.with_changes(search=None))
        assert candidate.payload.plans == (pruned.plan,)
        assert candidate.costs["ratio"] == pytest.approx(pruned.pruning_ratio)
        assert candidate.costs["parameters"] == pruned.after.total
        torch.testing.assert_close(found, logits_of(model, tokens()), rtol=1e-3, atol=1e-4)


def test_trial_0_is_exact_in_weights_that_the_space_fixes() -> None:
    weights = (0.9, 0.1)
    space = {"calibration.domain_weights": list(weights)}
    plain = config_of(calibration={"domain_weights": weights}).with_changes(search=None)
    pruned = prune(tiny_model(), tokenizer(), plain)
    trials = trials_of(tiny_model(), config_of({"space": space}))
    assert trials.candidate(trials.space.default).payload.plans == (pruned.plan,)
    # Scores of an earlier search that are exact elsewhere are made anew, others are kept.
    for center, kept in (((), False), (weights, True)):
        own = CachedScores(trials.sites, trials.config.units, trials.statistics, center, 0)
        again = Trials(trials.sites, trials.config, trials.space, trials.statistics, trials.own, scores=own)
        assert again.candidate(trials.space.default).payload.plans == (pruned.plan,)
        assert (again.scores is own) == kept


def test_a_trial_measures_its_candidate() -> None:
    model = tiny_model()
    config = config_of({"objective": "loss"})
    trials = trials_of(model, config)
    blocks, windows = selection_blocks(trials.sites, tokenizer(), config)
    for point in points(trials, 3):
        candidate = trials.candidate(point)
        rows = trials.measure(candidate, 0, 4) + trials.measure(candidate, 4, windows)
        with masked(trials.sites, candidate.payload.plans[0], trials.repairs(candidate.payload)[0]):
            sums = per_window_loss(model, blocks.select(slice(0, windows)))
        found = torch.tensor(rows, dtype=torch.float64)
        torch.testing.assert_close(found, sums[:, [1, 0]], rtol=1e-4, atol=1e-4)


def test_a_trial_collects_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No backward pass, no calibration pass, no reload."""
    model = tiny_model()
    config = config_of()
    sites = find_sites(model)
    statistics = statistics_of(sites, config)
    forwards: list[int] = []
    hook = model.register_forward_pre_hook(lambda module, args: forwards.append(1))

    def fails(*args: object, **kwargs: object) -> None:
        pytest.fail("a trial went back to the calibration text")

    from hf_adaprune import pipeline, recording, searching, selection, stages

    for module in (pipeline, recording, searching, selection, stages):
        for name in ("collect_statistics", "collect_together", "gather_texts", "calibration_blocks"):
            monkeypatch.setattr(module, name, fails, raising=False)
    monkeypatch.setattr(torch.Tensor, "backward", fails)
    monkeypatch.setattr(torch.autograd, "grad", fails)
    monkeypatch.setattr(type(model), "from_pretrained", fails)
    monkeypatch.setattr(type(model), "save_pretrained", fails)
    found = find_best(sites, tokenizer(), config, statistics)
    hook.remove()
    assert len(found.journal.measured()) == 5
    # 18 windows of 16 tokens fit one forward: the dense model's, two at most per trial, and one per finalist.
    measured = [trial for trial in found.journal.trials if trial.answered_by is None]
    assert 1 + len(measured) <= len(forwards) <= 1 + 2 * len(measured) + len(found.journal.finals)


def test_the_model_is_untouched_by_trials_and_after_an_exception() -> None:
    model = tiny_model().train()
    model.lm_head.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config.to_dict()

    def untouched() -> bool:
        return (
            all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
            and model.config.to_dict() == config
            and model.training
            and not model.lm_head.training
            and all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
            and not any(
                module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
                for module in model.modules()
            )
        )

    search_plan(model, tokenizer(), config_of())
    assert untouched()

    def fails(start: int, stop: int) -> list[tuple[float, float]]:
        assert not untouched()  # it does behave as the candidate
        raise KeyboardInterrupt

    trials = trials_of(model, config_of(), Measure(fails, 1, 1, 0, False, ""))
    with pytest.raises(KeyboardInterrupt):
        trials.measure(trials.candidate(trials.space.default), 0, 1)
    assert untouched()


def key(trials: Trials, **changes: Any) -> str:
    given = {path.replace("__", "."): value for path, value in changes.items()}
    return trials.candidate({**trials.space.default, **given}).key


def test_equal_models_have_equal_keys() -> None:
    trials = trials_of(tiny_model(), config_of(pruning_ratio=0.1))
    assert key(trials) == key(trials)
    assert key(trials, repair__damping=0.1) != key(trials, repair__damping=0.2)
    assert key(trials, repair__damping_scale="column") != key(trials)
    assert key(trials, pruning_ratio=0.3) != key(trials)
    # The same plan, repaired from other text, is another model.
    even = trials.candidate({**trials.space.default, "importance.metrics": {"magnitude": 1.0}})
    other = trials.candidate({
        **trials.space.default, "importance.metrics": {"magnitude": 1.0}, "calibration.domain_weights": (0.1, 0.9),
    })  # fmt: skip
    assert even.payload.plans == other.payload.plans and even.key != other.key


@pytest.mark.parametrize("units", [("layer",), ("channel", "layer")])
def test_widths_tell_which_layers_go(units: tuple[str, ...]) -> None:
    trials = trials_of(tiny_model(num_hidden_layers=4), config_of(recipe="shortgpt", units=units))
    candidate = trials.candidate(trials.space.default)
    (plan,) = candidate.payload.plans
    assert plan.dropped_layers
    gone = {site.name for site in trials.sites if site.layer in plan.dropped_layers}
    assert {name for name, kept in candidate.widths.items() if not kept} == gone
    assert set(candidate.widths) == gone | {name for name, _ in plan.changed()}


def test_a_repair_that_is_not_used_is_not_in_the_key() -> None:
    space = {"repair.damping": {"low": 0.01, "high": 1.0}, "importance.metrics": {"magnitude": 1.0}}
    for method, changes in (("none", True), ("bias", False)):
        trials = trials_of(tiny_model(), config_of({"space": space}, repair={"method": method}))
        assert key(trials, repair__damping=0.1) == key(trials, repair__damping=0.9)
        same = key(trials, calibration__domain_weights=(0.5, 0.5)) == key(
            trials, calibration__domain_weights=(0.1, 0.9)
        )
        assert same is changes


def test_plans_for_several_ratios_nest() -> None:
    ratios = (0.3, 0.1, 0.2, 0.2)
    config = config_of({"ratios": ratios}, pruning_ratio=0.2)
    trials = trials_of(tiny_model(), config)
    for point in points(trials, 3):
        candidate = trials.candidate(point)
        plans = candidate.payload.plans
        assert len(plans) == 3
        for smaller, larger in zip(plans[1:], plans, strict=False):
            for site in trials.sites:
                kept = smaller.sites[site.name].kept if site.name in smaller.sites else site.whole.kept
                before = larger.sites[site.name].kept if site.name in larger.sites else site.whole.kept
                assert set(kept) <= set(before)
        rows = trials.measure(candidate, 0, 4)
        assert len(rows) == 4 and all(len(row) == 4 for row in rows)
        assert candidate.costs["ratio"] >= 0.3
    found = prune(tiny_model(), tokenizer(), config)
    assert found.search is not None and sorted(found.search.nested) == [0.1, 0.2, 0.3]
    assert found.plan == found.search.nested[0.2] and 0.2 <= found.pruning_ratio < 0.3


# -- objectives -------------------------------------------------------------------------------------------------------

ROWS = [
    ChoiceRow(
        str(number), "t", calibration_prose(400 + number, 12)[:60], ("the river", "rain and light", "words"), label
    )
    for number, label in enumerate([0, 1, 2, 1, 0, 2, 1, 0, 2, 0])
]


def test_accuracy_on_rows_is_minimised(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**vars(row), "choices": list(row.choices)}) + "\n" for row in ROWS))
    config = config_of({"objective": "accuracy", "tasks": (str(path),)}, calibration={"selection": ()})
    found = search_plan(tiny_model(), tokenizer(), config)
    assert not found.journal.logarithmic
    assert {len(trial.rows) for trial in found.journal.trials} <= {2, 6}
    assert {len(final.rows) for final in found.journal.finals} == {4}
    values = {row[1] for trial in found.journal.trials for row in trial.rows}
    assert values <= {0.0, 1.0}
    model = tiny_model()
    measure = row_measure(model, tokenizer(), ROWS, first=2, windows=6)
    assert (measure.first, measure.windows, measure.fresh) == (2, 6, 4)
    assert measure.rows(0, 3) + measure.rows(3, 10) == measure.rows(0, 10)
    other = row_measure(model, tokenizer(), ROWS[::-1], first=2, windows=6)
    assert measure.digest != other.digest


def test_a_function_of_the_model_is_minimised() -> None:
    ids = tokens(4, 12)
    seen = []

    def loss_by_window(model: PreTrainedModel) -> list[float]:
        assert not torch.is_grad_enabled()
        seen.append(logits_of(model, ids))
        return [float(own.logsumexp(-1).mean()) for own in seen[-1]]

    config = config_of({"objective": "custom", "trials": 4}, calibration={"selection": ()})
    model = tiny_model()
    found = search_plan(model, tokenizer(), config, objective=loss_by_window)
    assert all(len(trial.rows) == 4 for trial in found.journal.measured())
    best = min(found.journal.measured(), key=lambda trial: mean_value(trial.rows))
    assert mean_value(found.winner.rows) == mean_value(best.rows)
    assert not found.journal.finals
    assert not torch.equal(seen[0], logits_of(model, ids))  # it saw the candidate
    with pytest.raises(ConfigError, match="pass objective="):
        search_plan(model, tokenizer(), config)


@pytest.mark.parametrize("value", [None, "low", []])
def test_a_function_that_returns_no_numbers_is_refused(value: object) -> None:
    measure = custom_measure(tiny_model(), lambda model: value)
    with pytest.raises(ConfigError, match="a number or several"):
        measure.rows(0, 1)


def own_loss(model: PreTrainedModel) -> float:
    return float(logits_of(model, tokens(4, 12)).logsumexp(-1).mean())


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_a_function_that_fails_on_a_candidate_loses_that_candidate_alone(odd: float, tmp_path: Path) -> None:
    config = config_of({"trials": 6}, calibration={"selection": ()})
    path, calls = tmp_path / "journal.jsonl", []

    def loss(model: PreTrainedModel) -> float:
        calls.append(model)
        return odd if len(calls) == 3 else own_loss(model)

    found = search_plan(tiny_model(), tokenizer(), config, objective=loss, journal=path)
    values = [mean_value(trial.rows) for trial in found.journal.trials]
    assert [number for number, value in enumerate(values) if not math.isfinite(value)] == [2]
    assert mean_value(found.winner.rows) == min(value for value in values if math.isfinite(value))
    summary = describe_journal(Journal.load(path))
    assert str(summary) and summary.best == found.winner.number
    with pytest.raises(ConfigError, match="objective of trial 0, the config itself, is"):
        search_plan(tiny_model(), tokenizer(), config, objective=lambda model: odd)


def test_a_pareto_search_of_a_function_has_a_front(tmp_path: Path) -> None:
    config = config_of({"pareto": "bytes", "trials": 6}, calibration={"selection": ()})
    path = tmp_path / "journal.jsonl"
    found = search_plan(tiny_model(), tokenizer(), config, objective=own_loss, journal=path)
    assert not found.journal.finals and len(found.front) > 1
    sizes, values = [point.costs["bytes"] for point in found.front], [point.value for point in found.front]
    assert sizes == sorted(sizes) and values == sorted(values, reverse=True)
    measured = {(t.costs["bytes"], mean_value(t.rows)) for t in found.journal.trials}
    assert set(zip(sizes, values, strict=True)) <= measured
    for trial in found.journal.trials:  # the smallest and the best are on it
        assert trial.costs["bytes"] >= min(sizes) and mean_value(trial.rows) >= min(values)
    assert [point["value"] for point in describe_journal(Journal.load(path)).front] == values


def test_records_name_the_function_that_was_minimised(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    given = {"objective": "accuracy", "tasks": ("nowhere.jsonl",), "trials": 2}
    config = config_of(given, calibration={"selection": ()})
    found = prune(tiny_model(), tokenizer(), config, objective=own_loss, journal=path).search
    assert found is not None and found.to_dict()["objective"] == "custom"
    assert describe_journal(Journal.load(path)).facts["objective"] == "custom"
    again = search_plan(tiny_model(), tokenizer(), config, objective=own_loss, journal=path, resume=True)
    assert told(again.journal) == told(found.journal)
    with pytest.raises(JournalError, match="search of its config differ"):
        search_plan(tiny_model(), None, config_of({"trials": 2}), journal=path, resume=True)


# -- selection text ---------------------------------------------------------------------------------------------------


def windows_of(blocks: Any) -> list[tuple[int, ...]]:
    return [tuple(own) for own in blocks.input_ids.tolist()]


def test_selection_text_is_cut_in_windows_for_trials_and_fresh_ones() -> None:
    sites = find_sites(tiny_model())
    blocks, windows = selection_blocks(sites, tokenizer(), config_of())
    assert (len(blocks), windows) == (18, 12)
    cut = windows_of(blocks)
    assert not set(cut[:windows]) & set(cut[windows:])
    other = passages("other", 500, 30)
    both, windows = selection_blocks(sites, tokenizer(), config_of(calibration={"selection": (SELECTION, other)}))
    assert both.domain.tolist() == [0, 1] * 9 and both.domains == ("selection", "other") and windows == 12
    assert windows_of(both)[::2] == cut[:9]


def test_too_little_selection_text_leaves_a_third_fresh(caplog: pytest.LogCaptureFixture) -> None:
    sites = find_sites(tiny_model())
    config = config_of({"selection_tokens": 400 * WINDOW, "first_tokens": WINDOW, "final_tokens": 10 * WINDOW},
                       calibration={"selection": (passages("little", 600, 3),)})  # fmt: skip
    with caplog.at_level(logging.WARNING):
        blocks, windows = selection_blocks(sites, tokenizer(), config)
    assert "windows of 16 tokens, 410 were asked for" in caplog.text
    assert 6 < len(blocks) < 410
    assert len(blocks) - windows == max(1, len(blocks) // 3)
    assert not set(windows_of(blocks)[:windows]) & set(windows_of(blocks)[windows:])
    found = search_plan(tiny_model(), tokenizer(), config)
    assert all(len(final.rows) == len(blocks) - windows for final in found.journal.finals)


def test_a_search_without_selection_text_says_what_to_do() -> None:
    with pytest.raises(CalibrationError, match=r"Give calibration\.selection \(--selection\)"):
        search_plan(tiny_model(), tokenizer(), config_of(calibration={"selection": ()}))
    with pytest.raises(CalibrationError, match=r"overlap|share"):
        search_plan(tiny_model(), tokenizer(), config_of(calibration={"selection": SOURCES[:1]}))


# -- refusals ---------------------------------------------------------------------------------------------------------


METHOD, STRUCTURE = "allocation.method", "allocation.structure"
WIDE = ("channel", "kv_group", "layer")
RANKED = "`global` and `flap` with the structure AL-AM can"


@pytest.mark.parametrize(
    ("units", "space", "cannot", "can"),
    [
        (WIDE, {METHOD: {"choices": ["global", "uniform", "similarity"]}}, "`uniform`, `similarity`", RANKED),
        (("channel", "mlp"), {METHOD: {"choices": ["global", "profile"]}}, "`profile`", RANKED),
        (WIDE, {METHOD: "logarithmic"}, "`logarithmic`", RANKED),
        (
            WIDE,
            {METHOD: {"choices": ["global", "flap"]}, STRUCTURE: "UL-UM"},
            "`flap` with the structure UL-UM",
            RANKED,
        ),
        (("layer",), {METHOD: {"choices": ["global", "flap"]}}, "`flap` with the structure AL-AM", "`global` can"),
    ],
    ids=str,
)
def test_methods_that_whole_parts_have_no_place_in_are_refused_before_any_trial(
    units: tuple[str, ...], space: dict[str, Any], cannot: str, can: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_stage, "gather_texts", lambda *_: pytest.fail("text was read"))
    config = config_of({"space": space}, units=units)
    told = f"lets `allocation.method` be {cannot}, which cannot let go of {units[-1]} of `units`; {can}"
    with pytest.raises(ConfigError, match=told):
        search_plan(tiny_model(), tokenizer(), config)


def test_methods_that_whole_parts_have_a_place_in_are_searched() -> None:
    space = {METHOD: {"choices": ["global", "flap"]}, STRUCTURE: "AL-AM"}
    found = search_plan(tiny_model(), tokenizer(), config_of({"space": space, "trials": 6}, units=WIDE))
    assert {trial.point[METHOD] for trial in found.journal.trials} == {"global", "flap"}
    assert not any(trial.error for trial in found.journal.trials)
    check_search(config_of({"space": {METHOD: {"choices": ["global", "uniform"]}}}))  # widths alone


@pytest.mark.parametrize(
    ("search", "changes", "message"),
    [
        ({}, {"allocation": {"steps": 2}}, r"allocation\.steps"),
        ({}, {"layer_by_layer": True}, "layer_by_layer"),
        ({"space": {"units": {"choices": [["channel"], ["kv_group"]]}}}, {}, "'units', which a trial"),
        ({"space": {"repair.schedule": "sequential"}}, {}, r"'repair\.schedule', which a trial"),
        ({"space": {"calibration.samples": 3}}, {}, r"'calibration\.samples', which a trial"),
        ({"strategy": ("random:2", "evolution")}, {"uniform": True}, "refines how one budget"),
        ({"strategy": "predictor", "pareto": "macs"}, {}, "refines how one budget"),
        ({"strategy": "evolution", "ratios": (0.1, 0.2)}, {}, "refines how one budget"),
        ({"strategy": "evolution", "space": {"allocation.method": "flap"}}, {}, "which `search.space` fixes"),
        ({"strategy": "predictor", "space": {"allocation.ratios": {"layers.0.mlp": 0.1}}}, {}, "`search.space` fixes"),
        ({"pareto": "macs"}, {"budgets": {"ratio": 0.2}}, "would fix"),
        ({"pareto": "bytes"}, {"target_parameters": 9}, "`search.pareto` says.*`target_parameters` would fix"),
        ({"ratios": (0.1, 0.25)}, {"target_bytes": 9}, "`search.ratios` says.*`target_bytes` would fix"),
        ({"space": {"pruning_ratio": {"low": 0.1, "high": 0.3}}}, {"target_bytes": 9}, "'pruning_ratio'.*target_bytes"),
        ({"space": {"pruning_ratio": 0.3}}, {"budgets": {"macs": 9.0}}, "'pruning_ratio'.*`budgets` would fix"),
        ({"space": {"pruning_ratio": 0.3}, "ratios": (0.1, 0.25)}, {}, "`search.ratios` sets"),
        ({"pareto": "bytes", "surrogate": "saas"}, {}, "one objective, and `search.pareto` has two"),
        ({"tasks": ("rows.jsonl",)}, {}, "rows for the objective accuracy.*--objective accuracy"),
        ({"selection_tokens": 2, "first_tokens": 2}, {}, "too small"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_a_search_cannot_do_is_refused(search: dict, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_search(config_of(search, **changes))
    check_search(config_of().with_changes(search=None))
    check_search(config_of())


@pytest.mark.parametrize(
    ("search", "changes", "message"),
    [
        ({"pareto": "bytes"}, {"target_parameters": 10**9}, "would fix"),  # rather than that it is out of reach
        ({"ratios": (0.25, 0.99)}, {}, "at most"),
        ({"ratios": (0.25, 0.99)}, {"budgets": {"parameters": 1e9}}, "ratio"),
    ],
)
def test_sizes_that_cannot_be_are_told_before_any_text_is_read(search: dict, changes: dict, message: str) -> None:
    # Without a tokenizer no text can be read: the size is what is complained of.
    for run in (search_plan, prune):
        with pytest.raises((BudgetError, ConfigError), match=message):
            run(tiny_model(), None, config_of(search, **changes))


ACCURACY = {"objective": "accuracy", "tasks": ("rows.jsonl",)}
QUESTION = '{"id": 1, "task": "t", "context": "a", "choices": ["b", "c"], "label": 2}'


@pytest.mark.parametrize(
    ("search", "rows", "message"),
    [
        (ACCURACY, None, "no file of multiple-choice rows at rows.jsonl"),
        (ACCURACY, QUESTION, r"row 1: `label` should be 0 to 1\. Found 2"),
        ({"objective": "custom"}, None, "needs the function: pass objective="),
        ({}, None, "chooses on selection text, and none is named"),
        ({"space": {"protected_layers": [0, 3]}}, None, r"names layers \[3\], the model has 3"),
        ({"space": {"protected_layers": {"choices": [[0], [-4]]}}}, None, r"names layers \[-4\], the model has 3"),
        ({"space": {"pruning_ratio": 0.99}}, None, "at most"),
        ({"space": {"min_channels": 1000}}, None, "at most"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_no_trial_could_do_is_told_before_any_text_is_read(
    search: dict, rows: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if rows is not None:
        Path("rows.jsonl").write_text(rows + "\n")
    config = config_of(search, calibration={"sources": ("missing.txt",), "selection": ()})
    for run in (search_plan, prune):
        with pytest.raises(AdaPruneError, match=message):
            run(tiny_model(), tokenizer(), config, run_dir="run")
    assert not Path("run").exists()  # which would hold the next call to these inputs


def test_prune_refuses_searches_that_find_no_single_plan() -> None:
    with pytest.raises(ConfigError, match="search_plan"):
        prune(tiny_model(), tokenizer(), config_of({"pareto": "macs"}))
    with pytest.raises(ConfigError, match=r"`search\.ratios` \[0\.1, 0\.2\]"):
        prune(tiny_model(), tokenizer(), config_of({"ratios": (0.1, 0.2)}, pruning_ratio=0.3))


def test_every_weighted_domain_needs_gradients() -> None:
    for space in ({}, {"calibration.domain_weights": [0.5, 0.5]}, {"calibration.domain_weights": []}):
        with pytest.raises(ConfigError, match=r"gradient_samples` should give each of the 2 sources or clusters"):
            search_plan(tiny_model(), tokenizer(), config_of({"space": space}, calibration={"gradient_samples": 1}))
    with pytest.raises(CalibrationError, match="short has no calibration window left"):
        sites, config = find_sites(tiny_model()), config_of()
        statistics = statistics_of(sites, config)
        find_best(sites, tokenizer(), config, replace(statistics, domain=torch.zeros_like(statistics.domain)))


def test_needs_are_those_of_every_trial() -> None:
    """Also of metrics and methods that only the space names."""
    assert search_needs(config_of(), 2) == Needs(gram=True, gradients=True, squares=True, per_domain=True)
    fixed = {"importance.metrics": {"wanda_sp": 1.0}, "importance.normalization": "none"}
    assert search_needs(config_of({"space": fixed}, "magnitude"), 2).squares
    chosen = {"repair.method": {"choices": ["none", "least_squares"]}}
    assert search_needs(config_of({"space": chosen}, "magnitude"), 1).gram
    similar = {"allocation.method": {"choices": ["uniform", "similarity"]}}
    assert search_needs(config_of({"space": similar}, "magnitude"), 1).cosine
    # Trials are compared by cached repairs, whatever repairs the winner.
    walks = config_of({"space": {"importance.metrics": {"fisher": 1.0}}}, repair={"schedule": "sequential"})
    assert search_needs(walks, 1).gram
    assert needs_text(config_of(recipe="magnitude"))
    assert not needs_text(config_of(recipe="magnitude").with_changes(search=None))


def test_the_digest_of_a_model_is_that_of_its_weights() -> None:
    model = tiny_model()
    before = model_digest(find_sites(model))
    assert before == model_digest(find_sites(tiny_model())) and before != model_digest(find_sites(tiny_model(seed=1)))
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[5, 7] += 0.01
    assert model_digest(find_sites(model)) != before


# -- journals ---------------------------------------------------------------------------------------------------------


def test_a_warm_start_tries_another_models_best_first(tmp_path: Path) -> None:
    small = search_plan(tiny_model(num_hidden_layers=2), tokenizer(), config_of(), journal=tmp_path / "small.jsonl")
    best = [t for t in small.journal.measured() if t.number > 0]
    best.sort(key=lambda t: (t.windows < 12, small.journal.estimate(t).value, t.number))
    found = search_plan(tiny_model(), tokenizer(), config_of({"trials": 6}), warm_start=tmp_path / "small.jsonl")
    warm = [trial for trial in found.journal.trials if trial.strategy == "warm"]
    assert warm and [trial.number for trial in warm] == list(range(1, len(warm) + 1))
    assert [trial.point for trial in warm] == [trial.point for trial in best]
    assert [trial.strategy for trial in found.journal.trials] == ["default", *["warm"] * 4, "random"]


def test_a_journal_of_another_space_starts_nothing(tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    search_plan(tiny_model(), tokenizer(), config_of({"space": {"calibration.domain_weights": [1, 1]}}), journal=path)
    for run in (search_plan, prune):  # without a tokenizer, so before any text is read
        with pytest.raises(JournalError, match=r"cannot start this search.*calibration\.domain_weights"):
            run(tiny_model(), None, config_of(), warm_start=path)
    with pytest.raises(JournalError, match="no journal at"):
        search_plan(tiny_model(), tokenizer(), config_of(), warm_start=tmp_path / "none.jsonl")


def journal_of(path: Path, points: Sequence[Mapping[str, Any]]) -> Path:
    """A journal of another search whose trials, the later the better, have these points."""
    journal = Journal.start(path, {"logarithmic": True, "space": {"dimensions": dict.fromkeys(points[-1])}})
    for number, point in enumerate(points):
        journal.add(Trial(number, "t", dict(point), str(number), ((1.0, 1.0 / (1 + number)),)))
    return path


def test_a_warm_start_brings_what_this_search_varies_and_nothing_else(tmp_path: Path) -> None:
    space = {"repair.damping": 0.02, "importance.normalization": "log", "channel_multiple": {"choices": [2, 4]}}
    own = config_of({"space": space})
    varied = default_space(own, ("long", "short")).default
    other = {**varied, "pruning_ratio": 0.1, "repair.damping": 0.3, "min_channels": 9, "channel_multiple": 4}
    shares = {"allocation.method": "ratios", "allocation.ratios": {"layers.0.mlp": 0.5, "layers.2.mlp": 0.2}}
    wide = {**other, "allocation.attention_balance": 9.0, **shares}
    path = journal_of(tmp_path / "other.jsonl", [other, {**other, "channel_multiple": 16}, other, other, wide])

    def tried(**search: Any) -> list[Trial]:
        config = config_of({"space": space, "trials": 4, **search})
        found = search_plan(tiny_model(), tokenizer(), config, warm_start=path).journal.trials
        assert all(trial.costs["ratio"] >= 0.25 for trial in found)  # not the other search's 0.1
        return [trial for trial in found if trial.strategy == "warm"]

    trials = tried()
    # One is the other search's two, and one chose what is no choice here.
    assert [trial.point["allocation.attention_balance"] for trial in trials] == [1.5, 0.0]
    assert all(set(trial.point) == set(varied) and trial.point["channel_multiple"] == 4 for trial in trials)
    assert all(kept % 4 == 0 for trial in trials for name, kept in trial.widths.items() if name.endswith("mlp"))
    # Shares of the budget go along where a strategy shares it, too, and the sites are the same.
    assert tried(strategy=("random:3", "evolution"))[0].point == {**trials[0].point, **shares}
    assert warm_points(path, default_space(own, ("long", "short")), ["layers.0.mlp"])[0].keys() == varied.keys()


@pytest.mark.parametrize("schedule", ["best", "sequential"])
def test_a_trial_without_least_squares_has_no_schedule_of_theirs(schedule: str) -> None:
    config = PruningConfig.recipe("default", repair={"schedule": schedule}, search={})
    assert apply_fields(config, {"repair.method": "bias"}).repair.schedule == "cached"
    assert apply_fields(config, {"repair.method": "least_squares"}).repair.schedule == schedule
    search = {"space": {"repair.method": {"choices": ["least_squares", "bias", "none"]}}}
    assert search_needs(config.with_changes(search=search), 1).gram


def test_what_a_space_fixes_no_point_changes() -> None:
    trials = trials_of(tiny_model(), config_of({"space": {"repair.damping": 0.02}}))
    assert trials.config_of({**trials.space.default, "repair.damping": 0.3}).repair.damping == 0.02


def told(journal: Journal) -> list[tuple]:
    return [(t.number, t.strategy, t.point, t.key, t.rows, t.costs, t.error) for t in journal.trials]


def test_a_search_goes_on_with_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    first = search_plan(tiny_model(), tokenizer(), config_of({"trials": 4}), journal=path)
    assert len(first.journal.trials) == 4
    with pytest.raises(JournalError, match="resume=True"):
        search_plan(tiny_model(), tokenizer(), config_of({"trials": 7}), journal=path)
    others = {
        "pruning_ratio of its config": (tiny_model(), config_of({"trials": 7}, pruning_ratio=0.3)),
        "model: ": (tiny_model(seed=1), config_of({"trials": 7})),
        "calibration of its config": (tiny_model(), config_of(calibration={"samples": 40})),
    }
    for said, (model, config) in others.items():
        with pytest.raises(JournalError, match=f"belongs to another search.*{said}"):
            search_plan(model, tokenizer(), config, journal=path, resume=True)


def test_a_journal_of_another_config_is_refused_before_any_text_is_read(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    search_plan(tiny_model(), tokenizer(), config_of({"trials": 2}), journal=path)
    # Without a tokenizer no text can be read: the journal is what is complained of.
    with pytest.raises(JournalError, match="pruning_ratio of its config"):
        search_plan(tiny_model(), None, config_of({"trials": 2}, pruning_ratio=0.3), journal=path, resume=True)
    with pytest.raises(JournalError, match="resume=True"):
        search_plan(tiny_model(), None, config_of({"trials": 2}), journal=path)
    path.write_text(path.read_text()[:40])  # torn by a kill at the very start: begun anew
    assert (
        len(search_plan(tiny_model(), tokenizer(), config_of({"trials": 2}), journal=path, resume=True).journal.trials)
        == 2
    )


@pytest.mark.parametrize(("changed", "other"), [("statistics", "selection"), ("selection", "statistics")])
def test_texts_that_changed_between_start_and_resume_are_named(changed: str, other: str, tmp_path: Path) -> None:
    config = file_config(tmp_path, trials=2)
    path = tmp_path / "journal.jsonl"
    search_plan(tiny_model(), tokenizer(), config, journal=path)
    kept = path.read_bytes()
    sources = config.calibration.sources if changed == "statistics" else config.calibration.selection
    file = Path(sources[0])
    words = file.read_text(encoding="utf-8").split()
    # The same words in another order: as long as it was, and no other source's text.
    file.write_text(" ".join(reversed(words)), encoding="utf-8")
    with pytest.raises(JournalError, match=f"belongs to another search.*{changed}: ") as refused:
        search_plan(tiny_model(), tokenizer(), config, journal=path, resume=True)
    assert f"{other}: " not in str(refused.value) and "config: " not in str(refused.value)
    assert path.read_bytes() == kept


def test_a_journal_whose_points_give_other_models_now_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    result = search_plan(tiny_model(), tokenizer(), config_of({"trials": 3}), journal=path)
    assert (
        search_plan(tiny_model(), tokenizer(), config_of({"trials": 3}), journal=path, resume=True).plan == result.plan
    )
    key = result.journal.trials[0].key
    path.write_text(path.read_text().replace(key, key[::-1]))
    with pytest.raises(JournalError, match=r"trial 0 .*another model"):
        search_plan(tiny_model(), tokenizer(), config_of({"trials": 3}), journal=path, resume=True)


def test_more_trials_continue_a_search(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    whole = search_plan(tiny_model(), tokenizer(), config_of({"trials": 7}))
    first = search_plan(tiny_model(), tokenizer(), config_of({"trials": 4}), journal=path)
    again = search_plan(tiny_model(), tokenizer(), config_of({"trials": 7}), journal=path, resume=True)
    assert told(again.journal) == told(whole.journal) == told(Journal.load(path))
    assert told(again.journal)[:4] == told(first.journal)


def test_a_search_for_a_sequential_repair_needs_no_metric_of_moments() -> None:
    config = config_of(
        {"space": {"importance.metrics": {"fisher": 1.0}, "importance.normalization": "none"}, "trials": 3},
        repair={"schedule": "sequential"},
    )
    result = prune(tiny_model(), tokenizer(), config)
    assert result.search is not None and not any(trial.error for trial in result.search.journal.trials)
    assert result.repair_schedule == "sequential"


# -- from end to end --------------------------------------------------------------------------------------------------


def text_file(folder: Path, source: TextSource) -> str:
    path = folder / f"{source.name}.txt"
    path.write_text("\n\n".join(source.texts), encoding="utf-8")
    return str(path)


def file_config(folder: Path, **search: Any) -> PruningConfig:
    sources = tuple(text_file(folder, source) for source in SOURCES)
    selection = (text_file(folder, SELECTION),)
    report = (text_file(folder, passages("report", 700, 6)),)
    calibration = {
        "sources": sources, "selection": selection, "report": report, "evaluation_tokens": 64, "evaluation_length": 16
    }  # fmt: skip
    return config_of(search, calibration=calibration, repair={"holdout": 0.1})


def test_prune_walks_the_search_and_saves_it(tmp_path: Path) -> None:
    config = file_config(tmp_path)
    model = tiny_model()
    dense = sum(parameter.numel() for parameter in model.parameters())
    result = prune(model, tokenizer(), config, journal=tmp_path / "journal.jsonl", plan_path=tmp_path / "plan.json")
    found = result.search
    assert found is not None and result.after.total < dense and 0.25 <= result.pruning_ratio < 0.3
    assert result.plan == found.plan == PruningPlan.load(tmp_path / "plan.json")
    assert result.config == found.config and result.config.search is None
    values = {final.number: mean_value(final.rows) for final in found.journal.finals}
    assert 0 in values and values[found.winner.number] == min(values.values()) <= values[0]
    assert 1 < len(values) <= 3
    assert torch.isfinite(logits_of(model, tokens())).all()
    folder = result.save_pretrained(tmp_path / "pruned")
    saved = json.loads((folder / "pruning_config.json").read_text(encoding="utf-8"))
    assert saved["search"] == json.loads(json.dumps(found.to_dict()))
    assert saved["search"]["trials"] == 5 and saved["search"]["winner"]["trial"] == found.winner.number
    assert saved["search"]["on_fresh_text"] == {str(number): value for number, value in values.items()}
    again = PruningConfig.from_pretrained(folder)
    assert again == result.config
    repeated = prune(tiny_model(), tokenizer(), again)
    assert repeated.plan == result.plan or found.winner.number > 0
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits_of(reloaded, tokens()), logits_of(model, tokens()))


def test_the_keyword_of_from_pretrained_searches(tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    tiny_model().save_pretrained(dense)
    tokenizer().save_pretrained(dense)
    config = file_config(tmp_path, trials=3)
    for given in (config, config.to_dict()):
        model = AutoModelForCausalLM.from_pretrained(dense, pruning_config=given)
        result = result_of(model)
        assert result is not None and result.search is not None
        assert len(result.search.journal.trials) == 3
        assert result.after.total == sum(parameter.numel() for parameter in model.parameters()) < result.before.total
    space = {"pruning_ratio": {"low": 0.1, "high": 0.4}}
    own = {"sources": config.calibration.sources, "selection": config.calibration.selection}
    plain = config_of({"trials": 2, "space": space}, "magnitude", calibration=own)
    # Scores that read no text, and yet the search needs a tokenizer.
    assert result_of(AutoModelForCausalLM.from_pretrained(dense, pruning_config=plain)).search is not None


def test_a_search_over_metrics_that_only_its_space_names() -> None:
    space = {"importance.metrics": {"wanda_sp": 1.0}, "importance.normalization": "none",
             "repair.method": {"choices": ["none", "least_squares"]}}  # fmt: skip
    found = search_plan(tiny_model(), tokenizer(), config_of({"space": space, "trials": 4}, "magnitude"))
    assert not any(trial.error for trial in found.journal.trials)
    assert found.config.importance.metrics == {"wanda_sp": 1.0}
