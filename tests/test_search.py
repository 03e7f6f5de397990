"""Laws of the search: its config, space, journal and loop, on a synthetic problem without a model."""

from __future__ import annotations

import json
import math
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaprune.config import CalibrationConfig, ImportanceConfig, PruningConfig, SearchConfig
from hf_adaprune.errors import BudgetError, ConfigError, JournalError, MissingDependencyError
from hf_adaprune.search import loop
from hf_adaprune.search.baselines import propose_random, propose_sobol, propose_tpe
from hf_adaprune.search.dimensions import Choice, Number, Simplex, Vector
from hf_adaprune.search.journal import Final, Journal, Trial, compare, mean_value
from hf_adaprune.search.loop import Progress, finalists, front, run_search
from hf_adaprune.search.measuring import divide
from hf_adaprune.search.problem import Candidate, Proposal, View, cost_axis
from hf_adaprune.search.space import Space, apply_fields, default_space, field_of
from hf_adaprune.workers import Alone

DOMAINS = ("code", "prose", "chat", "maths")


def recipe(space: Mapping[str, Any] | None = None, domains: int = 4, **changes: Any) -> PruningConfig:
    calibration = changes.pop("calibration", CalibrationConfig(sources=DOMAINS[:domains]))
    search = {"space": space or {}, **changes.pop("search", {})}
    return PruningConfig.recipe("default", calibration=calibration, search=search, **changes)


def space_of(space: Mapping[str, Any] | None = None, domains: int = 4, **changes: Any) -> Space:
    return default_space(recipe(space, domains, **changes), DOMAINS[:domains])


# -- config -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"strategy": ("annealing",)}, "annealing"),
        ({"strategy": ()}, "empty"),
        ({"strategy": ("gp:many",)}, "gp:40"),
        ({"strategy": ("gp:0",)}, "gp:40"),
        ({"strategy": ("gp:",)}, "gp:40"),
        ({"strategy": (("gp", 40),)}, "list of texts"),
        ({"strategy": ("gp:40", "random:30")}, "fit together"),
        ({"strategy": ("gp:40", "random:10")}, "fit together"),
        ({"strategy": ("gp:60", "random")}, "fit together"),
        ({"trials": 0}, "trials"),
        ({"trials": 2.5}, "trials"),
        ({"objective": "beauty"}, "objective"),
        ({"objective": "accuracy"}, "tasks"),
        ({"selection_tokens": 1}, "selection_tokens"),
        ({"first_tokens": 25000}, "first_tokens"),
        ({"finalists": 0}, "finalists"),
        ({"initial": 0}, "initial"),
        ({"surrogate": "forest"}, "surrogate"),
        ({"batch": 0}, "batch"),
        ({"pareto": "beauty"}, "pareto"),
        ({"ratios": (0.2, 1.0)}, "ratios"),
        ({"ratios": (0.2,), "pareto": "ratio"}, "one or the other"),
        ({"minutes": -1}, "minutes"),
        ({"sequence_length": 1}, "sequence_length"),
        ({"space": ["repair.damping"]}, "space"),
        ({"space": {"repair.damping": torch.tensor(1.0)}}, "space"),
    ],
)
def test_a_search_config_checks_every_field(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        SearchConfig(**fields)


@pytest.mark.parametrize(
    ("trials", "strategy", "shares"),
    [
        (60, "gp", (("gp", 60),)),
        (60, ("gp:40", "predictor"), (("gp", 40), ("predictor", 20))),
        (11, ("random", "gp:4", "sobol", "tpe"), (("random", 3), ("gp", 4), ("sobol", 2), ("tpe", 2))),
        (5, ("random:2", "random:3"), (("random", 2), ("random", 3))),
    ],
)
def test_strategies_share_the_trials(trials: int, strategy: Any, shares: tuple) -> None:
    assert SearchConfig(trials, strategy).shares() == shares


@given(st.integers(1, 40), st.lists(st.tuples(st.sampled_from(["gp", "sobol"]), st.integers(0, 9)), min_size=1))
@settings(deadline=None, max_examples=60)
def test_shares_add_up_or_are_refused(trials: int, named: list[tuple[str, int]]) -> None:
    try:
        shares = SearchConfig(trials, tuple(f"{name}:{count}" if count else name for name, count in named)).shares()
    except ConfigError:
        free = sum(not count for _, count in named)
        left = trials - sum(count for _, count in named)
        assert left < free or (left and not free)
        return
    assert sum(count for _, count in shares) == trials
    assert all(count >= 1 and count == (wanted or count) for (_, count), (_, wanted) in zip(shares, named, strict=True))


def test_a_config_with_a_search_survives_json() -> None:
    search = SearchConfig(
        20, ("gp:12", "random"), {"repair.damping": {"low": 0.01, "high": 0.1}, "allocation.profile": (0.0, 1.0)},
        ratios=(0.3, 0.2), minutes=3.5, initial=4,
    )  # fmt: skip
    config = PruningConfig.recipe("default", search=search, budgets={"ratio": 0.2, "macs": 1e9})
    back = PruningConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert back == config
    assert back.search is not None and back.search.ratios == (0.2, 0.3) and back.budgets == {"ratio": 0.2, "macs": 1e9}
    assert PruningConfig.from_dict(PruningConfig().to_dict()).search is None


def test_a_mapping_makes_a_search_of_a_recipe() -> None:
    config = PruningConfig.recipe("default", search={"trials": 5})
    assert config.search == SearchConfig(trials=5)
    assert config.with_changes(search={"batch": 2}).search == SearchConfig(trials=5, batch=2)
    with pytest.raises(ConfigError, match="trails"):
        PruningConfig.recipe("default", search={"trails": 5})


# -- space ------------------------------------------------------------------------------------------------------------

SPACE = Space(
    (
        Simplex("calibration.domain_weights", DOMAINS, (1.0, 1.0, 1.0, 1.0)),
        Simplex("importance.metrics", ("fisher", "wanda_sp", "first_order"), (1.0, 1.0, 0.0), named=True),
        Choice("importance.normalization", ("log", "mean", "rank"), "log"),
        Vector("allocation.profile", -1.5, 1.5, (0.0,) * 5, centred=True),
        Vector("protected_layers", -2.0, 1.0, (0.0, 0.0)),
        Number("repair.damping", 1e-3, 0.3, 0.01, log=True),
        Number("allocation.attention_balance", -1 / 3, 2 / 3, 0.0),
        Number("channel_multiple", 1, 8, 1, whole=True),
    ),
    {},
)


def as_journalled(point: Mapping[str, Any]) -> dict[str, Any]:
    plain = json.loads(json.dumps(point))
    return {path: tuple(value) if isinstance(value, list) else value for path, value in plain.items()}


def cubes(width: int) -> st.SearchStrategy[torch.Tensor]:
    draw = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0, 0.5]))
    return st.lists(draw, min_size=width, max_size=width).map(lambda values: torch.tensor(values, dtype=torch.float64))


def assert_in_space(space: Space, point: Mapping[str, Any]) -> None:
    low, high = space.bounds()
    vector = space.encode(point)
    assert bool((vector >= low - 1e-4).all() and (vector <= high + 1e-4).all())
    for index, coefficients, right in space.equalities():
        assert float(vector[index] @ coefficients) == pytest.approx(right, abs=1e-9)
    for dimension in space.dimensions:
        value = point[dimension.path]
        if isinstance(dimension, Simplex):
            weights = list(value.values()) if dimension.named else list(value)
            assert min(weights) >= 0 and sum(weights) == pytest.approx(1, abs=1e-12)
        elif isinstance(dimension, Vector):
            assert all(dimension.low - 1e-4 <= entry <= dimension.high + 1e-4 for entry in value)
            assert not dimension.centred or sum(value) == pytest.approx(0, abs=1e-5)
        elif isinstance(dimension, Number):
            assert dimension.low <= value <= dimension.high
            assert not dimension.whole or isinstance(value, int)
        else:
            assert value in dimension.values


@given(cubes(SPACE.width))
@settings(deadline=None, max_examples=150)
def test_a_point_comes_back_from_coordinates_and_from_json(cube: torch.Tensor) -> None:
    point = SPACE.from_cube(cube)
    assert_in_space(SPACE, point)
    assert SPACE.decode(SPACE.encode(point)) == point
    assert as_journalled(point) == point
    assert torch.equal(SPACE.encode(as_journalled(point)), SPACE.encode(point))


@given(st.lists(st.floats(-4, 4), min_size=SPACE.width, max_size=SPACE.width))
@settings(deadline=None, max_examples=100)
def test_any_coordinates_decode_into_the_space(values: list[float]) -> None:
    """Optimisers leave bounds by rounding, and TPE knows no equalities."""
    point = SPACE.decode(torch.tensor(values, dtype=torch.float64))
    assert_in_space(SPACE, point)
    assert SPACE.decode(SPACE.encode(point)) == point


KEPT = Space(
    (
        Simplex("calibration.domain_weights", DOMAINS, (4.0, 3.0, 2.0, 1.0), kept=0.5),
        Simplex("importance.metrics", ("fisher", "wanda_sp", "first_order"), (1.0, 1.0, 0.0), named=True, kept=0.25),
    ),
    {},
)


@given(st.lists(st.floats(-4, 4), min_size=KEPT.width, max_size=KEPT.width))
@settings(deadline=None, max_examples=150)
def test_no_weight_falls_below_what_is_kept(values: list[float]) -> None:
    point = KEPT.decode(torch.tensor(values, dtype=torch.float64))
    assert_in_space(KEPT, point)
    weights = point["calibration.domain_weights"]
    assert all(own >= 0.5 * base - 1e-12 for own, base in zip(weights, (0.4, 0.3, 0.2, 0.1), strict=True))
    assert min(point["importance.metrics"][name] for name in ("fisher", "wanda_sp")) >= 0.125 - 1e-12
    assert KEPT.decode(KEPT.encode(point)) == point == as_journalled(point)
    assert KEPT.default["calibration.domain_weights"] == pytest.approx((0.4, 0.3, 0.2, 0.1))


def test_a_mixture_that_is_kept_is_asked_for_by_its_share() -> None:
    space = space_of(space={"calibration.domain_weights": {"kept": 0.5}, "importance.metrics": {"kept": 0.25}})
    kept = {d.path: d.kept for d in space.dimensions if isinstance(d, Simplex)}
    assert kept == {"calibration.domain_weights": 0.5, "importance.metrics": 0.25}
    plain = {d.path: d for d in space_of().dimensions if isinstance(d, Simplex)}
    for dimension in space.dimensions:
        if isinstance(dimension, Simplex):
            assert (dimension.members, dimension.default) == (
                plain[dimension.path].members,
                plain[dimension.path].default,
            )
    for wrong in (1.0, -0.1, "half", True):
        with pytest.raises(ConfigError, match=r"kept.*\[0, 1\)"):
            space_of(space={"calibration.domain_weights": {"kept": wrong}})


@given(cubes(space_of().width))
@settings(deadline=None, max_examples=60)
def test_every_draw_is_a_valid_config(cube: torch.Tensor) -> None:
    config, space = recipe(), space_of()
    point = space.from_cube(cube)
    changed = space.apply(config, point)
    for path, value in point.items():
        assert field_of(changed, path) == value
    assert changed.with_changes(**{part: getattr(config, part) for part in parts_of(space)}) == config


def parts_of(space: Space) -> set[str]:
    return {dimension.path.partition(".")[0] for dimension in space.dimensions}


def test_trial_0_is_the_config_itself() -> None:
    config = recipe(domains=3)
    tried = space_of(domains=3).apply(config, space_of(domains=3).default)
    assert tried.calibration.domain_weights == pytest.approx((1 / 3,) * 3, abs=2e-6)
    assert {n: w for n, w in tried.importance.metrics.items() if w} == {"fisher": 0.5, "obs_gradient_greedy": 0.5}
    assert tried.importance.normalization == "log"
    assert set(tried.allocation.profile) == {0.0} and tried.allocation.attention_balance == 0.0
    assert tried.repair == config.repair


def test_trial_0_is_the_config_itself_where_it_stands_outside_the_usual_ranges() -> None:
    config = recipe(
        importance={"metrics": {"fisher": 3.0, "wanda_sp": 1.0}, "normalization": "mean"},
        allocation={"profile": (4.0, -2.0, -2.0), "attention_balance": -2.5},
        repair={"damping": 2.0},
        calibration={"sources": DOMAINS, "domain_weights": (2, 0, 1, 1)},
        search={"pareto": "ratio"},
        pruning_ratio=0.6,
    )
    space = default_space(config, DOMAINS)
    tried = space.apply(config, space.default)
    assert tried.calibration.domain_weights == (0.5, 0.0, 0.25, 0.25)
    assert {n: w for n, w in tried.importance.metrics.items() if w} == {"fisher": 0.75, "wanda_sp": 0.25}
    assert tried.importance.normalization == "mean"
    assert tried.allocation == config.allocation
    assert tried.repair == config.repair and tried.pruning_ratio == 0.6
    assert_in_space(space, space.default)


def test_the_default_space_is_small() -> None:
    space = space_of()
    assert [dimension.path for dimension in space.dimensions] == [
        "calibration.domain_weights", "importance.metrics", "importance.normalization", "allocation.profile",
        "allocation.attention_balance", "repair.damping",
    ]  # fmt: skip
    assert space.freedom <= 20
    assert len(space.names()) == len(set(space.names())) == space.width == space.bounds().shape[1]
    assert not any(dimension.path == "calibration.domain_weights" for dimension in space_of(domains=1).dimensions)
    many = tuple(f"source {number}" for number in range(15))
    config = recipe(calibration=CalibrationConfig(sources=many))
    with pytest.raises(ConfigError, match="more than 20"):
        default_space(config, many)
    assert default_space(recipe({"seed": 3}, calibration=CalibrationConfig(sources=many)), many).freedom > 20


def test_a_value_fixes_a_field() -> None:
    space = space_of({"repair.damping": 0.02, "importance.normalization": "mean", "allocation.profile": [1, 0]})
    assert not {"repair.damping", "importance.normalization", "allocation.profile"} & set(space.default)
    tried = space.apply(recipe(), space.default)
    assert tried.repair.damping == 0.02 and tried.importance.normalization == "mean"
    assert tried.allocation.profile == (1.0, 0.0)


def test_a_mapping_widens_or_narrows_a_dimension() -> None:
    given = {"repair.damping": {"low": 0.05}, "allocation.profile": {"low": -3, "high": 3}}
    space = space_of(given)
    assert [d.path for d in space.dimensions] == [d.path for d in space_of().dimensions]
    damping = next(d for d in space.dimensions if d.path == "repair.damping")
    assert isinstance(damping, Number) and (damping.low, damping.high, damping.log) == (0.05, 0.3, True)
    assert space.default["repair.damping"] == 0.05  # as near to the config's 0.01 as it may be
    profile = next(d for d in space.dimensions if d.path == "allocation.profile")
    assert isinstance(profile, Vector) and (profile.low, profile.high, profile.centred) == (-3, 3, True)
    assert profile.width == 5


def test_a_mapping_adds_a_dimension() -> None:
    given = {
        "repair.target_mix": {"low": 0.0, "high": 1.0},
        "channel_multiple": {"low": 1, "high": 8, "log": True, "whole": True},
        "allocation.max_site_ratio": {"low": 0.3, "high": 0.9},
        "repair.schedule": {"choices": ["cached", "sequential"]},
        "protected_layers": {"choices": [[0], [0, -1]]},
        "importance.metrics": {"simplex": ["fisher", "wanda_sp"]},
        "allocation.profile": {"low": -1, "high": 1, "size": 3},
        "importance.normalization": {"choices": ["mean", "log", "rank"]},
        "calibration.domain_weights": {"simplex": True},
    }
    space, config = space_of(given), recipe(given)
    assert_in_space(space, space.default)
    assert space.default["importance.normalization"] == "log"
    assert space.default["allocation.max_site_ratio"] == pytest.approx(0.6)  # 1.0 lies outside
    assert space.default["importance.metrics"] == {"fisher": 1.0, "wanda_sp": 0.0}
    assert len(space.default["allocation.profile"]) == 3
    for number in range(20):
        point = space.from_cube(torch.rand(space.width, generator=torch.Generator().manual_seed(number)))
        assert_in_space(space, point)
        assert space.decode(space.encode(as_journalled(point))) == point
        assert isinstance(space.apply(config, point).channel_multiple, int)
        assert space.apply(config, point).protected_layers in ((0,), (0, -1))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"repair.dampening": 0.1}, "no field of PruningConfig"),
        ({"damping": 0.1}, "no field of PruningConfig"),
        ({"repair.__class__": 0.1}, "no field of PruningConfig"),
        ({"repair": {"method": "none"}}, "no trial can vary"),
        ({"search.trials": {"low": 1, "high": 9, "whole": True}}, "no trial can vary"),
        ({"repair.damping": -1.0}, "repair.damping"),
        ({"repair.damping": "strong"}, "repair.damping"),
        ({"allocation.profile": "steep"}, "list of numbers"),
        ({"repair.damping": {"low": 0.2, "high": 0.1}}, "low.*high"),
        ({"repair.damping": {"low": "a", "high": "b"}}, "low.*high"),
        ({"repair.damping": {"low": 0.0}}, "logarithmic"),
        ({"repair.damping": {"low": 0.1, "hihg": 0.2}}, "repair.damping"),
        ({"repair.damping": {"centred": True}}, "centred"),
        ({"repair.target_mix": {"low": 0.0}}, "low.*high"),
        ({"repair.target_mix": {"low": 0.0, "high": 2.0}}, "target_mix"),
        ({"channel_multiple": {"low": 1, "high": 8}}, "whole number"),
        ({"repair.schedule": {"choices": ["cached", "later"]}}, "repair.schedule"),
        ({"repair.schedule": {"choices": ["cached"]}}, "two or more"),
        ({"repair.schedule": {"choices": ["cached", "best", "cached"]}}, "two or more"),
        ({"repair.schedule": {"low": 0, "high": 1}}, "choices"),
        ({"repair.schedule": {"simplex": ["a", "b"]}}, "no field of weights"),
        ({"importance.metrics": {"simplex": ["fisher"]}}, "two things"),
        ({"calibration.domain_weights": {"simplex": ["a", "b"]}}, "one weight per source"),
        ({"allocation.profile": {"low": -1, "high": float("inf")}}, "`low` < `high`"),
        ({"allocation.profile": {"low": 0.5, "high": 1.0}}, "centred"),
        ({"allocation.profile": {"log": True}}, "logarithmic|vector"),
        ({"allocation.profile": {"low": -1, "high": 1, "size": 2.5}}, "size"),
        ({"allocation.profile": {"low": -30, "high": 30, "size": 5}}, r"in \[-20, 20\]"),
        ({"importance.normalization": "none"}, "mixes several metrics"),
    ],
)
def test_a_space_that_cannot_be_is_refused_before_any_trial(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        space_of(given)


def test_a_space_of_equal_layers_shares_nothing_over_them() -> None:
    given = {"allocation.attention_balance": {"low": -1.0, "high": 1.0}}
    with pytest.raises(ConfigError, match=r"equal layers, which 'allocation.attention_balance' of `search.space`"):
        space_of(given, uniform=True)
    assert space_of(given, uniform=True, units=("layer",)).dimensions


def test_a_space_without_dimensions_is_refused() -> None:
    fixed = {d.path: d.decode(d.encode(d.default)) for d in space_of(domains=1).dimensions}
    with pytest.raises(ConfigError, match="nothing is left"):
        space_of(fixed, domains=1)


def test_laying_a_point_over_a_config_changes_neither() -> None:
    values: dict[str, Any] = {"repair": {"method": "none"}, "repair.damping": 0.5}
    config = recipe()
    changed = apply_fields(config, values)
    assert (changed.repair.method, changed.repair.damping) == ("none", 0.5)
    assert values == {"repair": {"method": "none"}, "repair.damping": 0.5} and config == recipe()


def test_alternatives_name_every_combination_of_the_choices() -> None:
    assert space_of({"importance.normalization": "log"}).alternatives() == [{}]
    space = space_of({"repair.schedule": {"choices": ["cached", "sequential", "best"]}})
    found = space.alternatives()
    assert len(found) == 2 * 3 == len({tuple(sorted(one.items())) for one in found})
    choices = [span for dimension, span in space.spans() if isinstance(dimension, Choice)]
    for one in found:
        assert sorted(one) == [index for span in choices for index in range(span.start, span.stop)]
        assert all(sum(one[index] for index in range(span.start, span.stop)) == 1 for span in choices)


def test_a_point_of_another_space_is_told_apart() -> None:
    space = space_of()
    assert space.holds(space.default)
    lacking = {path: value for path, value in space.default.items() if path != "repair.damping"}
    wider = {**space.default, "allocation.profile": (0.0,) * 7}
    for point in (lacking, wider):
        assert not space.holds(point)
        with pytest.raises(ConfigError, match="another search space"):
            space.encode(point)


def test_a_space_is_json() -> None:
    data = space_of({"seed": 3}).to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["fixed"] == {"seed": 3} and data["dimensions"]["repair.damping"]["kind"] == "number"


# -- journal ----------------------------------------------------------------------------------------------------------

HEADER = {"seed": 3, "space": {"x": [1, 2]}, "logarithmic": True}


def a_trial(number: int, **changes: Any) -> Trial:
    rows = tuple((10.0 + window, 3.0 + 0.1 * number + window) for window in range(3))
    point = {"a": (0.1, 0.2), "b": {"x": 1.0}, "c": "log", "d": number / 7}
    return replace(
        Trial(number, "gp", point, f"key {number}", rows, {"ratio": 0.2}, {"layers.0.mlp": 7}, 1.5, 2.5), **changes
    )


def write_journal(path: Path) -> Journal:
    journal = Journal.start(path, HEADER)
    journal.add(a_trial(0))
    journal.add(a_trial(1, predicted=(-0.1, 0.2)))
    journal.add(a_trial(2, rows=(), error="too small \u2013 by far", key=""))
    journal.add(a_trial(3, answered_by=1, rows=((1.0, math.inf), (2.0, 1e-300))))
    journal.add_final(Final(1, ((5.0, 2.5),)))
    journal.add_event("winner", {"number": 1, "value": 0.5})
    return journal


def contents(journal: Journal) -> tuple:
    return journal.header, journal.trials, journal.finals, journal.events


def test_a_journal_comes_back_as_it_was(tmp_path: Path) -> None:
    journal = write_journal(tmp_path / "new" / "journal.jsonl")
    before = (tmp_path / "new" / "journal.jsonl").read_bytes()
    for back in (
        Journal.load(tmp_path / "new" / "journal.jsonl"),
        Journal.start(tmp_path / "new" / "journal.jsonl", HEADER, resume=True),
    ):
        assert contents(back) == contents(journal)
        winner = back.winner()
        assert winner is not None and winner.number == 1
        assert [trial.number for trial in back.measured()] == [0, 1, 3]
    assert (tmp_path / "new" / "journal.jsonl").read_bytes() == before


def test_a_journal_in_memory_holds_the_same() -> None:
    journal = Journal.start(None, HEADER)
    journal.add(a_trial(0))
    assert journal.trials == [a_trial(0)] and journal.header == {"format": 1, **HEADER}


def test_a_torn_line_loses_only_itself(tmp_path: Path) -> None:
    """Cut at every byte of the last line, be it a trial's or the header."""
    path = tmp_path / "journal.jsonl"
    journal = Journal.start(path, HEADER)
    start = path.stat().st_size
    journal.add(a_trial(0))
    whole = path.stat().st_size
    data = path.read_bytes()
    for size in range(start, whole):
        path.write_bytes(data[:size])
        assert Journal.load(path).trials == []
        assert path.stat().st_size == size  # loading changes nothing
        resumed = Journal.start(path, HEADER, resume=True)
        assert resumed.trials == [] and path.read_bytes() == data[:start]
        if size % 40 == 0:
            resumed.add(a_trial(0))
            assert path.read_bytes() == data
    for size in range(start):
        path.write_bytes(data[:size])
        resumed = Journal.start(path, HEADER, resume=True)
        assert path.read_bytes() == data[:start] and resumed.header == journal.header
        with pytest.raises(JournalError, match="no journal"):
            path.write_bytes(data[:size])
            Journal.load(path)


def test_a_journal_goes_on_only_with_the_same_search(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write_journal(path)
    before = path.read_bytes()
    with pytest.raises(JournalError, match="seed: 3 there, 4 here"):
        Journal.start(path, {**HEADER, "seed": 4}, resume=True)
    with pytest.raises(JournalError, match="text: null there"):
        Journal.start(path, {**HEADER, "text": "x" * 200}, resume=True)
    with pytest.raises(JournalError, match="--resume"):
        Journal.start(path, HEADER)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "text", ["", "my notes", "my notes\n", '"text"\n', "3\n", "[1]\n", '{"kind":"trial"}\n', '{"a":1}\n', "\x00\xff\n"]
)
def test_what_is_no_journal_is_refused_and_kept(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.txt"
    with pytest.raises(JournalError, match="no journal at"):
        Journal.load(path)
    path.write_text(text)
    with pytest.raises(JournalError, match="no journal of a search"):
        Journal.load(path)
    if text:
        with pytest.raises(JournalError):
            Journal.start(path, HEADER, resume=True)
        assert path.read_text() == text


@pytest.mark.parametrize("line", ["nonsense", "3", "[]", '{"kind":"trial","number":1}', '{"number":1}'])
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "journal.jsonl"
    Journal.start(path, HEADER)
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(JournalError, match="line 2 is no event"):
        Journal.load(path)


def test_trials_stand_in_order_and_other_formats_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal.start(path, HEADER).add(a_trial(1))
    with pytest.raises(JournalError, match=r"^\S+journal.jsonl: trial 1 stands where 0 should"):
        Journal.load(path)
    path.write_text('{"kind":"search","format":99}\n')
    with pytest.raises(JournalError, match=r"^\S+journal.jsonl has format 99"):
        Journal.load(path)


# -- the paired difference --------------------------------------------------------------------------------------------

tables = st.integers(2, 8).flatmap(
    lambda windows: st.lists(
        st.tuples(st.integers(1, 500), *[st.floats(0.1, 10)] * 4), min_size=windows, max_size=windows
    )
)


@given(tables, st.booleans())
@settings(deadline=None, max_examples=60)
def test_a_comparison_is_the_formula(table: list[tuple], logarithmic: bool) -> None:
    """Against the mean of the objective in numbers, and the delta method by numerical derivatives."""
    rows = [(count, count * a, count * b) for count, a, b, _, _ in table]
    reference = [(count, count * c, count * d) for count, _, _, c, d in table]

    def difference(weights: Sequence[float]) -> float:
        total = sum(w * row[0] for w, row in zip(weights, rows, strict=True))
        value = 0.0
        for column in (1, 2):
            for sign, part in ((1, rows), (-1, reference)):
                mean = sum(w * row[column] for w, row in zip(weights, part, strict=True)) / total
                value += sign * (math.log(mean) if logarithmic else mean) / 2
        return value

    windows = len(rows)
    found = compare(rows, reference, logarithmic)
    assert found.value == pytest.approx(difference([1.0] * windows), abs=1e-9)
    if logarithmic:
        assert found.value == pytest.approx(math.log(mean_value(rows) / mean_value(reference)), abs=1e-9)
    step, influence = 1e-5, []
    for window in range(windows):
        up, down = ([1.0 + sign * step * (w == window) for w in range(windows)] for sign in (1, -1))
        influence.append((difference(up) - difference(down)) / (2 * step))
    expected = math.sqrt(windows / (windows - 1) * sum(entry**2 for entry in influence))
    assert found.error == pytest.approx(expected, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("logarithmic", [True, False])
def test_the_standard_error_is_how_far_other_text_would_move_it(logarithmic: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    windows, draws = 24, 400
    hard = torch.rand(draws, windows, generator=generator) * 4 + 1  # what makes a text hard, in both alike
    own = hard * (0.9 + 0.1 * torch.randn(draws, windows, generator=generator))
    counts = torch.randint(50, 200, (draws, windows), generator=generator)
    estimates = [
        compare(
            torch.stack([c, c * o], 1).tolist(), torch.stack([c, c * h], 1).tolist(), logarithmic
        )
        for c, o, h in zip(counts.double(), own.double(), hard.double(), strict=True)
    ]  # fmt: skip
    values = torch.tensor([estimate.value for estimate in estimates])
    errors = torch.tensor([estimate.error for estimate in estimates])
    assert float(errors.square().mean().sqrt()) == pytest.approx(float(values.std()), rel=0.12)
    unpaired = float((own.mean(1).log() if logarithmic else own.mean(1)).std())
    assert float(values.std()) < 0.6 * unpaired  # what the pairing is for


def test_a_comparison_takes_the_windows_that_both_have_seen() -> None:
    long, short = [(2.0, 4.0), (2.0, 6.0), (2.0, 99.0)], [(2.0, 2.0), (2.0, 2.0)]
    assert compare(long, short, False) == compare(long[:2], short, False)
    assert compare(long, short, False).value == pytest.approx(1.5)
    one = compare(long[:1], short, False)
    assert one.value == 1.0 and math.isnan(one.error)
    assert compare(long, long, True).value == 0.0 and compare(long, long, True).error == 0.0
    with pytest.raises(JournalError, match="nothing to compare"):
        compare([], long, True)
    assert mean_value([]) == math.inf


def test_the_best_is_not_chosen_by_luck_on_few_windows() -> None:
    journal = Journal.start(None, HEADER)
    journal.add(a_trial(0))
    journal.add(a_trial(1))
    journal.add(a_trial(2, rows=((10.0, 0.1),)))
    journal.add(a_trial(3, rows=((10.0, math.nan),) * 3))
    view = View(SPACE, tuple(journal.trials), SearchConfig(), (), 0, 4, 4, 60, True)
    for best in (journal.best(), view.best()):
        assert best is not None and best.number == 0


# -- loop -------------------------------------------------------------------------------------------------------------

LOOP_SPACE = Space(
    (
        Number("repair.damping", 1e-3, 1.0, 0.02, log=True),
        Number("allocation.attention_balance", -1.5, 1.5, 1.0),
        Vector("allocation.profile", -1.0, 1.0, (0.5, -0.5, 0.0), centred=True),
    ),
    {},
)


class Bowl:
    """A quadratic over the space, with noise per window that hangs on the model alone; its lowest value is 1."""

    first, windows, fresh, batch, logarithmic, slots = 4, 12, 8, 3, True, ()

    def __init__(self, grid: float = 0.0, broken: Callable[[Mapping[str, Any]], bool] = lambda point: False) -> None:
        self.grid, self.broken = grid, broken
        self.calls: list[tuple[str, int, int]] = []

    def candidate(self, point: Mapping[str, Any]) -> Candidate:
        if self.broken(point):
            raise BudgetError("no plan meets the budget.")
        key = point
        if self.grid:
            key = {"balance": round(point["allocation.attention_balance"] / self.grid)}
        size = 1000 + 100 * point["allocation.attention_balance"]
        return Candidate(
            json.dumps(key, sort_keys=True), {"parameters": size, "ratio": 0.2}, {"layers.0.mlp": 3}, point
        )

    def value(self, point: Mapping[str, Any]) -> float:
        away = (math.log(point["repair.damping"]) + 3) ** 2 + point["allocation.attention_balance"] ** 2
        return 1 + away + sum(entry**2 for entry in point["allocation.profile"])

    def measure(self, candidate: Candidate, start: int, stop: int) -> tuple[tuple[float, ...], ...]:
        self.calls.append((candidate.key, start, stop))
        rows = []
        for window in range(start, stop):
            hard = random.Random(window).uniform(0.8, 1.2)
            noise = random.Random(f"{window} {candidate.key}").gauss(0, 0.02)
            rows.append((100.0, 100.0 * hard * self.value(candidate.payload) * math.exp(noise)))
        return tuple(rows)

    def prepare(self, points: Sequence[Mapping[str, Any]], workers: Alone) -> None:
        workers.gather([len(points)])


class Threads(Alone):
    """One of several processes, as far as the loop can tell."""

    def __init__(self, rank: int, said: list[Any], meeting: threading.Barrier) -> None:
        self.rank, self.count, self.said, self.meeting = rank, len(said), said, meeting

    def gather(self, values: list[Any]) -> list[Any]:
        self.said[self.rank] = list(values)
        self.meeting.wait()
        found = [value for own in self.said for value in own]
        self.meeting.wait()
        return found

    def share(self, value: Any) -> Any:
        return self.gather([value])[0]

    def lead(self, make: Callable[[], Any]) -> Any:
        return self.share(make() if self.rank == 0 else None)

    def each(self, make: Callable[[], Any]) -> Any:
        made = make()
        self.meeting.wait()
        return made


def step_down(view: View, count: int) -> list[Proposal]:
    """A strategy that looks at what was measured: a step from the best so far."""
    best = view.best()
    assert best is not None
    centre = view.space.encode(best.point)
    low, high = view.space.bounds()
    found = []
    for number in range(view.number, view.number + count):
        generator = torch.Generator().manual_seed(view.seed * 7919 + number)
        moved = centre + 0.1 * (high - low) * torch.randn(len(centre), generator=generator, dtype=torch.float64)
        found.append(Proposal(view.space.decode(moved), (0.0, 1.0)))
    return found


STRATEGIES = {"random": propose_random, "sobol": propose_sobol, "gp": step_down}


def search(
    journal: Journal | None = None, problem: Bowl | None = None, seed: int = 0, *, warm: Sequence[Any] = (),
    live: Callable[[Progress], None] | None = None, space: Space = LOOP_SPACE, workers: Alone | None = None,
    **fields: Any,
) -> Journal:  # fmt: skip
    config = SearchConfig(**{"trials": 14, "strategy": ("sobol:5", "gp"), "finalists": 3, **fields})
    journal = Journal.start(None, HEADER) if journal is None else journal
    return run_search(
        problem or Bowl(), space, config, journal, STRATEGIES, seed=seed, warm=warm, live=live, workers=workers
    )


def apart_from_seconds(journal: Journal) -> tuple:
    trials = [replace(trial, seconds=0.0, elapsed=0.0) for trial in journal.trials]
    return trials, journal.finals, journal.events


def test_same_seed_same_trials() -> None:
    assert apart_from_seconds(search(seed=1)) == apart_from_seconds(search(seed=1))
    assert [t.point for t in search(seed=1).trials[1:]] != [t.point for t in search(seed=2).trials[1:]]


class Killed(Exception):
    """Stands for a kill between two lines of the journal."""


class Mortal(Bowl):
    """Is killed at its n-th measurement."""

    def __init__(self, life: int) -> None:
        super().__init__()
        self.life = life

    def measure(self, candidate: Candidate, start: int, stop: int) -> tuple[tuple[float, ...], ...]:
        self.life -= 1
        if self.life < 0:
            raise Killed
        return super().measure(candidate, start, stop)


@pytest.mark.parametrize("batch", [1, 3])
def test_resumed_equals_uninterrupted(tmp_path: Path, batch: int) -> None:
    """After a stop at any measurement: between trials, in the middle of a batch, and in the finals."""
    whole = search(Journal.start(tmp_path / "whole.jsonl", HEADER), batch=batch)
    reached = set()
    for life in range(40):
        path = tmp_path / f"{life}.jsonl"
        try:
            search(Journal.start(path, HEADER), Mortal(life), batch=batch)
        except Killed:
            stopped = Journal.load(path)
            reached.add((len(stopped.trials), len(stopped.finals)))
        else:
            break
        resumed = search(Journal.start(path, HEADER, resume=True), batch=batch)
        assert apart_from_seconds(resumed) == apart_from_seconds(whole)
        assert apart_from_seconds(Journal.load(path)) == apart_from_seconds(whole)
    assert {trials for trials, _ in reached} == set(range(15))
    assert {finals for trials, finals in reached if trials == 14} == {0, 1, 2, 3}


def test_a_finished_search_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    search(Journal.start(path, HEADER))
    before = path.read_bytes()
    problem = Bowl()
    search(Journal.start(path, HEADER, resume=True), problem)
    assert path.read_bytes() == before and not problem.calls


def test_trial_0_is_the_default_and_the_winner_is_never_worse() -> None:
    for seed in range(5):
        problem = Bowl()
        journal = search(None, problem, seed)
        assert journal.trials[0].point == LOOP_SPACE.default and journal.trials[0].strategy == "default"
        finals = {final.number: mean_value(final.rows) for final in journal.finals}
        winner = journal.winner()
        assert winner is not None and 0 in finals
        assert finals[winner.number] == min(finals.values()) == journal.events[-1]["value"]
        assert len(finals) == 4
        assert {call[1:] for call in problem.calls[-4:]} == {(12, 20)}
        assert {final.rows for final in journal.finals}.isdisjoint({trial.rows for trial in journal.trials})


def test_the_default_wins_where_nothing_beats_it() -> None:
    best = Space(
        tuple(
            replace(d, default=v) for d, v in zip(LOOP_SPACE.dimensions, (math.exp(-3), 0.0, (0.0,) * 3), strict=True)
        ),
        {},
    )
    journal = search(space=best, strategy=("random",), trials=8)
    assert journal.events[-1]["number"] == 0


def test_without_fresh_windows_the_best_trial_wins() -> None:
    problem = Bowl()
    problem.fresh = 0  # type: ignore[misc]
    journal = search(None, problem)
    best = journal.best()
    assert best is not None and not journal.finals
    assert journal.events[-1]["number"] == best.number and best.number > 0


def test_a_duplicate_is_answered_from_the_journal() -> None:
    problem = Bowl(grid=1.0)  # four or so models in all
    journal = search(None, problem, strategy=("random",), trials=12)
    answered = [trial for trial in journal.trials if trial.answered_by is not None]
    assert len(answered) >= 6 and all(trial.answered_by < trial.number for trial in answered)
    for trial in answered:
        assert trial.key == journal.trials[trial.answered_by].key
        assert trial.rows == journal.trials[trial.answered_by].rows
    assert len(set(problem.calls)) == len(problem.calls)  # nothing was measured twice
    assert len({journal.trials[final.number].key for final in journal.finals}) == len(journal.finals)


def test_a_bad_candidate_sees_only_the_first_windows() -> None:
    default = LOOP_SPACE.default
    bad = {**default, "repair.damping": 1.0}
    good = {**default, "allocation.attention_balance": 0.0}
    journal = search(warm=[bad, good], trials=3, strategy="gp")
    assert [trial.windows for trial in journal.trials] == [12, 4, 12]
    assert journal.trials[1].rows == Bowl().measure(Bowl().candidate(bad), 0, 4)
    assert journal.trials[2].rows == Bowl().measure(Bowl().candidate(good), 0, 12)
    assert [trial.number for trial in finalists(journal, 2)] == [0, 2, 1]


def test_warm_points_come_right_after_trial_0() -> None:
    warm = [LOOP_SPACE.from_cube(torch.full((5,), share)) for share in (0.1, 0.4, 0.7)]
    for batch in (1, 2, 5):
        journal = search(warm=warm, batch=batch)
        assert [trial.point for trial in journal.trials[1:4]] == warm
        assert [trial.strategy for trial in journal.trials] == ["default", *["warm"] * 3, "sobol", *["gp"] * 9]
        assert len({json.dumps(trial.point) for trial in journal.trials}) == 14


@pytest.mark.parametrize("batch", [1, 4])
def test_a_chain_of_strategies_gets_its_shares(batch: int) -> None:
    asked: list[tuple[str, int, int, int, int]] = []

    def noted(name: str) -> Callable[[View, int], Sequence[Proposal]]:
        def propose(view: View, count: int) -> Sequence[Proposal]:
            assert len(view.trials) == view.number
            asked.append((name, view.number, view.done, view.share, count))
            return STRATEGIES[name](view, count)

        return propose

    config = SearchConfig(14, ("random:6", "gp:3", "sobol"), batch=batch)
    journal = run_search(
        Bowl(), LOOP_SPACE, config, Journal.start(None, HEADER), {name: noted(name) for name in STRATEGIES}
    )
    assert [t.strategy for t in journal.trials] == ["default", *["random"] * 5, *["gp"] * 3, *["sobol"] * 5]
    first = {"random": 0, "gp": 6, "sobol": 9}
    share = {"random": 6, "gp": 3, "sobol": 5}
    assert all(number - done == first[name] and given == share[name] for name, number, done, given, _ in asked)
    assert max(count for *_, count in asked) <= batch and sum(count for *_, count in asked) == 13
    assert {trial.predicted for trial in journal.trials if trial.strategy == "gp"} == {(0.0, 1.0)}


def test_an_unknown_strategy_is_refused() -> None:
    with pytest.raises(ConfigError, match="no strategy 'tpe'"):
        search(strategy=("tpe",))
    with pytest.raises(ConfigError, match="proposed 0 candidates"):
        run_search(
            Bowl(), LOOP_SPACE, SearchConfig(3, "gp"), Journal.start(None, HEADER), {"gp": lambda view, count: []}
        )


def test_a_failing_candidate_is_written_down_and_the_search_goes_on() -> None:
    problem = Bowl(broken=lambda point: point["allocation.attention_balance"] < 0)
    journal = search(None, problem, strategy=("random:6", "gp"))
    failed = [trial for trial in journal.trials if trial.error]
    assert failed and len(journal.trials) == 14
    assert all(trial.error == "no plan meets the budget." and not trial.rows and not trial.key for trial in failed)
    assert journal.winner() in journal.measured()


def test_a_failing_trial_0_is_the_callers() -> None:
    journal = Journal.start(None, HEADER)
    with pytest.raises(BudgetError, match="no plan"):
        search(journal, Bowl(broken=lambda point: True))
    assert not journal.trials


class Cliff(Bowl):
    """Not a number where the balance is negative, and infinite where damping is high."""

    def value(self, point: Mapping[str, Any]) -> float:
        if point["allocation.attention_balance"] < 0:
            return math.nan
        return math.inf if point["repair.damping"] > 0.05 else super().value(point)


@pytest.mark.parametrize("pareto", [None, "parameters"])
@pytest.mark.parametrize("first", [4, 12])
def test_a_model_whose_objective_is_not_finite_never_wins(tmp_path: Path, first: int, pareto: str | None) -> None:
    for seed in range(3):
        problem = Cliff()
        problem.first = first  # type: ignore[misc]
        path = tmp_path / f"{seed}.jsonl"
        journal = search(Journal.start(path, HEADER), problem, seed, strategy=("random:12", "gp"), pareto=pareto)
        values = [mean_value(trial.rows) for trial in journal.trials]
        assert any(math.isnan(value) for value in values) and any(math.isinf(value) for value in values)
        assert all(math.isfinite(mean_value(final.rows)) for final in journal.finals)
        best, winner = journal.best(), journal.winner()
        assert best is not None and mean_value(best.rows) == min(v for v in values if math.isfinite(v))
        assert winner is not None and math.isfinite(mean_value(winner.rows))
        assert repr(Journal.load(path).trials) == repr(journal.trials)


class LateCliff(Bowl):
    """On fresh text alone, not a number or an infinity for some candidates."""

    def __init__(self, bad: float, which: Callable[[Mapping[str, Any]], bool]) -> None:
        super().__init__()
        self.bad, self.which = bad, which

    def measure(self, candidate: Candidate, start: int, stop: int) -> tuple[tuple[float, ...], ...]:
        rows = super().measure(candidate, start, stop)
        return tuple((row[0], self.bad) for row in rows) if start >= 12 and self.which(candidate.payload) else rows


@pytest.mark.parametrize("pareto", [None, "parameters"])
@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
@pytest.mark.parametrize("default", [True, False])
def test_a_model_that_is_not_finite_on_fresh_text_never_wins(bad: float, pareto: str | None, default: bool) -> None:
    """Neither where it is trial 0, which is measured first, nor where every other one is."""
    problem = LateCliff(bad, lambda point: (point == LOOP_SPACE.default) is default)
    journal = search(problem=problem, pareto=pareto)
    finals = {final.number: mean_value(final.rows) for final in journal.finals}
    assert len(finals) > 2 and (0 in [n for n, v in finals.items() if not math.isfinite(v)]) is default
    value, number = min((v, n) for n, v in finals.items() if math.isfinite(v))
    assert journal.event("winner") == {"kind": "winner", "number": number, "value": value, "trials": 14}
    if pareto is not None:
        points = front(journal, pareto)
        assert points and all(math.isfinite(value) for _, value in points)


def test_where_nothing_is_finite_on_fresh_text_trial_0_stays() -> None:
    journal = search(problem=LateCliff(math.nan, lambda point: True), pareto="parameters")
    winner = journal.winner()
    assert winner is not None and winner.number == 0
    assert not front(journal, "parameters")


def test_no_candidate_is_behind_one_whose_objective_is_not_finite() -> None:
    """Minus infinity on the rest of the text leaves the others the windows that NaN there leaves them."""

    class Deep(LateCliff):
        def measure(self, candidate: Candidate, start: int, stop: int) -> tuple[tuple[float, ...], ...]:
            rows = Bowl.measure(self, candidate, start, stop)
            if not self.which(candidate.payload):
                return rows
            return tuple((row[0], self.bad if start >= 4 else 0.1 * row[1]) for row in rows)  # good at first

    seen = []
    for bad in (math.nan, -math.inf):
        problem = Deep(bad, lambda point: 0 < point["allocation.attention_balance"] < 0.9)
        problem.logarithmic = False  # type: ignore[misc]
        journal = search(Journal.start(None, {"logarithmic": False}), problem, strategy="random", trials=20)
        assert any(not math.isfinite(mean_value(trial.rows)) for trial in journal.trials)
        seen.append([trial.windows for trial in journal.trials])
    assert seen[0] == seen[1]


def test_no_trial_starts_after_the_minutes(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = search(Journal.start(path, HEADER), minutes=0)
    assert len(journal.trials) == 1 and journal.events[-1]["number"] == 0
    assert len(search(minutes=60).trials) == 14
    # Given more time it goes on, and what it finds may win.
    resumed = search(Journal.start(path, HEADER, resume=True), minutes=60)
    whole = search()
    assert apart_from_seconds(resumed)[0] == apart_from_seconds(whole)[0]
    assert resumed.winner().number == whole.winner().number
    assert resumed.winner().number > 0


def test_minutes_count_over_all_runs_of_a_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    class Slow(Bowl):  # half a minute per measurement, and another to propose
        def measure(self, candidate: Candidate, start: int, stop: int) -> tuple[tuple[float, ...], ...]:
            clock[0] += 30
            return super().measure(candidate, start, stop)

    def thoughtful(view: View, count: int) -> Sequence[Proposal]:
        clock[0] += 30
        return propose_random(view, count)

    def run(minutes: float) -> Journal:
        config = SearchConfig(trials=30, strategy=("random",), minutes=minutes)
        book = Journal.start(path, HEADER, resume=True)
        return run_search(Slow(), LOOP_SPACE, config, book, {"random": thoughtful})

    path = tmp_path / "journal.jsonl"
    first = run(5.0)
    spent = [trial.elapsed for trial in first.trials]
    assert spent == sorted(spent) and 5 <= first.elapsed / 60 <= 6.5 and 2 < len(spent) < 8
    assert sum(trial.seconds for trial in first.trials) < first.elapsed  # proposals count too
    clock[0] = 5.0  # another day, another process
    assert run(5.0).trials == first.trials
    longer = run(8.0)
    assert longer.trials[: len(spent)] == first.trials and 8 <= longer.elapsed / 60 <= 9.5
    assert len(spent) < len(longer.trials) < 12


@pytest.mark.parametrize("pareto", [None, "parameters"])
@pytest.mark.parametrize("grid", [0.0, 1.0])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_any_number_of_processes_find_the_trials_of_one(count: int, grid: float, pareto: str | None) -> None:
    """Where as many are proposed at a time, since a proposal knows the trials before its round."""

    def problem() -> Bowl:
        return Bowl(grid, lambda point: point["repair.damping"] > 0.5)

    asked: dict[str, Any] = {"trials": 23, "batch": 7, "pareto": pareto}
    alone = problem()
    one = search(problem=alone, **asked)
    own = [problem() for _ in range(count)]
    said, meeting = [None] * count, threading.Barrier(count, timeout=60)
    journals: dict[int, Journal] = {}

    def walk(rank: int) -> None:
        try:
            journals[rank] = search(problem=own[rank], workers=Threads(rank, said, meeting), **asked)
        except BaseException:
            meeting.abort()
            raise

    threads = [threading.Thread(target=walk, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(count):
        assert apart_from_seconds(journals[rank]) == apart_from_seconds(one)

    def windows(problem: Bowl) -> set[tuple[str, int]]:
        return {(key, window) for key, start, stop in problem.calls for window in range(start, stop)}

    measured = [sum(stop - start for _, start, stop in problem.calls) for problem in own]
    assert sum(measured) == sum(stop - start for _, start, stop in alone.calls), "measured twice, or not at all"
    assert set().union(*map(windows, own)) == windows(alone)
    if count < 5:  # seven candidates do not go round five processes
        assert max(measured) < 1.5 * sum(measured) / count, "one of them waits for the others"


@given(
    going=st.sets(st.integers(0, 30)), start=st.integers(0, 9), length=st.integers(1, 40), batch=st.integers(1, 9),
    count=st.integers(1, 9),
)  # fmt: skip
def test_every_window_has_one_process_and_batches_stay_whole(
    going: set[int], start: int, length: int, batch: int, count: int
) -> None:
    problem = Bowl()
    problem.batch = batch  # type: ignore[misc]
    stop = start + length
    shares = divide(dict.fromkeys(going, start), stop, problem, count)
    pieces = sorted(piece for share in shares for piece in share)
    assert len(shares) == count
    assert [(index, window) for index, a, b in pieces for window in range(a, b)] == [
        (index, window) for index in sorted(going) for window in range(start, stop)
    ]
    assert all((own - start) % batch == 0 and own < end for _, own, end in pieces)
    work = [sum(end - own for _, own, end in share) for share in shares]
    assert max(work) <= math.ceil(len(going) / count) * length, "a candidate each would have been sooner"
    left, batches = len(going) % count, math.ceil(length / batch)
    spread = batch * (left * math.ceil(batches / count) + 1)
    assert max(work) - min(work) <= (min(spread, length) if left else 0)


def test_the_live_line_hears_of_every_trial() -> None:
    heard: list[Progress] = []
    journal = search(live=heard.append, problem=Bowl(broken=lambda point: point["repair.damping"] > 0.5))
    assert [progress.trial for progress in heard] == journal.trials
    assert all(later.best <= earlier.best for earlier, later in pairwise(heard))
    best = journal.best()
    assert best is not None and heard[-1].best_number == best.number and heard[-1].seconds_left == 0
    assert [math.isnan(progress.value) for progress in heard] == [bool(trial.error) for trial in journal.trials]


@pytest.mark.parametrize("cost", ["parameters", "ratio"])
def test_pareto_finalists_beat_each_other_nowhere(cost: str) -> None:
    """`parameters` are better when lower; `ratio`, one for all here, leaves the best alone."""
    journal = search(pareto=cost, strategy=("random",), trials=20, finalists=20)
    assert all(trial.windows == 12 for trial in journal.trials)  # nobody is dropped for the size it has
    chosen = finalists(journal, 20, cost)
    assert {final.number for final in journal.finals} == {trial.number for trial in chosen}

    def both(trial: Trial) -> tuple[float, float]:
        return journal.estimate(trial).value, trial.costs[cost] * (-1 if cost == "ratio" else 1)

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return one != other and one[0] <= other[0] and one[1] <= other[1]

    for trial in journal.trials[1:]:
        assert (trial in chosen) == (not any(beats(both(other), both(trial)) for other in journal.trials))
    found = front(journal, cost)
    assert len(found) > 1 if cost == "parameters" else len(found) == 1
    assert [trial.costs[cost] for trial, _ in found] == sorted(trial.costs[cost] for trial, _ in found)
    fresh = {final.number: mean_value(final.rows) for final in journal.finals}
    assert all(value == fresh[trial.number] for trial, value in found)
    values = [value for _, value in found]
    assert values == sorted(values, reverse=True)  # larger is better: else the larger would be beaten


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("cost", ["parameters", "prefill_tokens_per_second"])
def test_few_pareto_finalists_span_the_front(cost: str, seed: int) -> None:
    draw = random.Random(seed)
    trials = []
    for number in range(40):  # a front in the shape of a quarter circle, most of it crowded at one end
        angle = math.pi / 2 * (draw.random() if number % 4 == 0 else 1 - 0.05 * draw.random())
        objective, size = 3 - math.sin(angle), 3 - math.cos(angle)
        rows = ((1.0, objective), (1.0, objective))
        trials.append(a_trial(number, rows=rows, costs={cost: size if cost == "parameters" else 1 / size}))
    journal = Journal.start(None, {"logarithmic": False})
    for trial in trials:
        journal.add(trial)
    whole = [trial.number for trial in finalists(journal, 40, cost)]
    assert sorted(whole) == list(range(40))
    by_size = sorted(trials, key=lambda trial: cost_axis(trial, cost))
    ends = {by_size[0].number, by_size[-1].number}

    def area(chosen: list[Trial]) -> float:
        """What the chosen dominate of the square between the worst of both axes."""
        found, height = 0.0, 3.0
        worst = max(cost_axis(trial, cost) for trial in trials)
        for trial in sorted(chosen, key=lambda trial: cost_axis(trial, cost)):
            value = mean_value(trial.rows)
            found, height = found + (height - value) * (worst - cost_axis(trial, cost)), value
        return found

    for count in (1, 2, 3, 5, 8):
        chosen = finalists(journal, count, cost)
        assert chosen[0].number == 0 and len({trial.number for trial in chosen}) == len(chosen)
        assert ends <= {trial.number for trial in chosen} and len(chosen) == 1 + max(2, count)
        if count > 2:
            inner = [trial for trial in trials[1:] if trial.number not in ends]
            luck = [draw.sample(inner, count - 2) for _ in range(50)]
            rest = [trials[0], *(trials[number] for number in ends)]
            assert area(chosen) >= sorted(area([*rest, *others]) for others in luck)[40]


# -- a kill -----------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}]
import test_search

class Slow(test_search.Bowl):
    def measure(self, candidate, start, stop):
        time.sleep({sleep})
        return super().measure(candidate, start, stop)

test_search.search(test_search.Journal.start(sys.argv[1], test_search.HEADER, resume=True), Slow(), batch=2, trials=30)
"""


def test_a_kill_loses_nothing_that_was_written(tmp_path: Path) -> None:
    script, path = tmp_path / "script.py", tmp_path / "journal.jsonl"
    tests = Path(__file__).parent
    script.write_text(SCRIPT.format(root=str(tests.parent), tests=str(tests), sleep=0.05))
    moments, written = random.Random(0), b""
    for _ in range(3):
        process = subprocess.Popen([sys.executable, str(script), str(path)], stderr=subprocess.PIPE)
        size, patience = len(written), time.monotonic() + 60
        while (not path.exists() or path.stat().st_size <= size) and process.poll() is None:
            assert time.monotonic() < patience
            time.sleep(0.01)
        time.sleep(moments.uniform(0.0, 0.25))
        process.send_signal(signal.SIGKILL)
        _, said = process.communicate()
        assert process.returncode == -signal.SIGKILL, said.decode()
        found = path.read_bytes()
        whole = written[: written.rfind(b"\n") + 1]
        assert found.startswith(whole) and len(found) > len(whole)
        written = found
    assert len(Journal.load(path).trials) < 30
    search(Journal.start(path, HEADER, resume=True), batch=2, trials=30)
    assert path.read_bytes().startswith(written[: written.rfind(b"\n") + 1])
    assert apart_from_seconds(Journal.load(path)) == apart_from_seconds(search(batch=2, trials=30))


# -- baselines --------------------------------------------------------------------------------------------------------


def view_of(number: int, seed: int = 0, done: int | None = None, trials: Sequence[Trial] = ()) -> View:
    done = number if done is None else done
    return View(SPACE, tuple(trials), SearchConfig(), (), seed, number, done, 60, True)


@pytest.mark.parametrize("propose", [propose_random, propose_sobol])
def test_draws_hang_on_seed_and_number_alone(propose: Callable[[View, int], Sequence[Proposal]]) -> None:
    at_once = [proposal.point for proposal in propose(view_of(1), 12)]
    one_by_one = [propose(view_of(number), 1)[0].point for number in range(1, 13)]
    assert at_once == one_by_one
    assert len({json.dumps(point) for point in at_once}) == 12
    assert [proposal.point for proposal in propose(view_of(1, seed=1), 12)] != at_once
    for point in at_once:
        assert_in_space(SPACE, point)


def test_sobol_starts_where_its_share_does() -> None:
    first = [proposal.point for proposal in propose_sobol(view_of(20, done=0), 4)]
    assert first == [proposal.point for proposal in propose_sobol(view_of(0), 4)]


def test_sobol_spreads_more_evenly_than_chance() -> None:
    damping = [math.log(proposal.point["repair.damping"]) for proposal in propose_sobol(view_of(0), 64)]
    low, high = math.log(1e-3), math.log(0.3)
    counts = torch.histc(torch.tensor(damping), 8, low, high)
    assert bool(((counts - 8).abs() <= 1).all())


def test_a_simplex_is_drawn_evenly() -> None:
    """Flat over the simplex: every weight has the mean 1/n and the variance (n-1)/(n^2 (n+1))."""
    draws = torch.tensor([p.point["calibration.domain_weights"] for p in propose_random(view_of(0), 1500)])
    torch.testing.assert_close(draws.mean(0), torch.full((4,), 0.25), atol=0.02, rtol=0)
    torch.testing.assert_close(draws.var(0), torch.full((4,), 3 / (16 * 5)), atol=0.005, rtol=0)


def observed(count: int) -> list[Trial]:
    """Trials whose loss is lowest at a damping of 0.1; one failed, one of another space, one without a number."""
    trials = []
    points = [SPACE.default, *(proposal.point for proposal in propose_random(view_of(1), count))]
    for number, point in enumerate(points):
        loss = 1 + (math.log(point["repair.damping"]) - math.log(0.1)) ** 2
        trials.append(Trial(number, "random", point, str(number), ((10.0, 10 * loss), (10.0, 11 * loss))))
    trials[3] = replace(trials[3], rows=(), error="no plan")
    trials[4] = replace(trials[4], point={"allocation.ratios": {"layers.0.mlp": 0.1}})
    trials[5] = replace(trials[5], rows=((10.0, math.nan),))
    trials[6] = replace(trials[6], point={**trials[6].point, "protected_layers": (0.0, 0.0, 0.0)})
    return trials


def test_tpe_learns_silently(capfd: pytest.CaptureFixture[str]) -> None:
    optuna = pytest.importorskip("optuna")
    verbosity = optuna.logging.get_verbosity()
    trials = observed(40)
    view = view_of(len(trials), trials=trials)
    points = [proposal.point for proposal in propose_tpe(view, 6)]
    assert points == [proposal.point for proposal in propose_tpe(view, 6)]
    assert points != [proposal.point for proposal in propose_tpe(replace(view, seed=1), 6)]
    assert len({json.dumps(point) for point in points}) == 6
    for point in points:
        assert_in_space(SPACE, point)
    near = [abs(math.log(point["repair.damping"] / 0.1)) for point in points]
    chance = [abs(math.log(trial.point["repair.damping"] / 0.1)) for trial in trials if "repair.damping" in trial.point]
    assert sum(near) / len(near) < 0.5 * sum(chance) / len(chance)
    assert capfd.readouterr() == ("", "") and optuna.logging.get_verbosity() == verbosity


def test_tpe_runs_in_the_loop_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    config = SearchConfig(13, "tpe", batch=2)

    def run(journal: Journal, trials: int = 13) -> Journal:
        return run_search(Bowl(), LOOP_SPACE, replace(config, trials=trials), journal, {"tpe": propose_tpe})

    whole = run(Journal.start(tmp_path / "whole.jsonl", HEADER))
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "part.jsonl").write_text("".join(lines[:7]))
    resumed = run(Journal.start(tmp_path / "part.jsonl", HEADER, resume=True))
    assert apart_from_seconds(resumed) == apart_from_seconds(whole)


def test_tpe_says_which_extra_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingDependencyError, match=r"hf_adaprune\[tpe\]"):
        propose_tpe(view_of(1), 1)


def test_importance_mixtures_do_not_hang_on_the_scale_of_their_weights() -> None:
    """What makes trial 0 the config itself: the space scales weights to add up to 1."""
    space = space_of()
    doubled = recipe(importance=ImportanceConfig({"fisher": 2.0, "obs_gradient_greedy": 2.0}, normalization="log"))
    assert default_space(doubled, DOMAINS).default == space.default
