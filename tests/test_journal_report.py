"""What a journal says: numbers that a hand can check, and pictures of every kind of journal."""

from __future__ import annotations

import json
import math
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_adaprune.config import PruningConfig
from hf_adaprune.errors import ConfigError, MissingDependencyError
from hf_adaprune.journal_plot import plot_journal
from hf_adaprune.journal_report import describe_journal, space_of
from hf_adaprune.search.journal import Final, Journal, Trial
from hf_adaprune.search.space import default_space

DOMAINS = ("code", "prose")
SITES = {f"layers.{layer}.{kind}": units for layer in range(4) for kind, units in (("attention", 2), ("mlp", 48))}


def journal_of(trials: list[Trial], path: Path | None = None, **search: Any) -> Journal:
    """A journal of trials in the default space, without a winner."""
    config = PruningConfig.recipe("default", calibration={"sources": DOMAINS}, search=search)
    header = {
        "version": "0", "config": config.to_dict(), "space": default_space(config, DOMAINS).to_dict(), "model": "m",
        "windows": [1, 2, 1], "logarithmic": config.search.objective != "accuracy",
        "sites": SITES, "unit_parameters": {name: 3 if units == 48 else 72 for name, units in SITES.items()},
    }  # fmt: skip
    journal = Journal.start(path, header)
    for trial in trials:
        journal.add(trial)
    return journal


def default(**search: Any) -> dict[str, Any]:
    config = PruningConfig.recipe("default", calibration={"sources": DOMAINS}, search=search)
    return default_space(config, DOMAINS).default


def trial(number: int, *sums: float, **changes: Any) -> Trial:
    """A trial with the objective's sums per window of 10 tokens."""
    own = {"strategy": "default" if number == 0 else "gp", "point": default(), "key": f"k{number}"}
    return Trial(number, rows=tuple((10.0, value) for value in sums), **{**own, **changes})


def searched(count: int = 16, pareto: str | None = None, strategy: str = "gp", seed: int = 0) -> Journal:
    """A finished search whose objective follows damping alone, so that what matters is known."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    space = default_space(
        PruningConfig.recipe("default", calibration={"sources": DOMAINS}, search={"pareto": pareto}), DOMAINS
    )
    trials = []
    for number in range(count):
        point = space.from_cube(torch.rand(space.width, generator=generator)) if number else space.default
        value = 1 + 0.3 * abs(math.log(point["repair.damping"] / 0.01)) + 0.01 * draw.random()
        widths = {name: units - (units > 2) * (1 + draw.randrange(9)) for name, units in SITES.items()}
        if strategy != "gp" and number:
            point = {**space.default, "allocation.method": "ratios", "allocation.ratios": {"layers.0.mlp": 0.1}}
            value = 1 + (48 - widths["layers.2.mlp"]) / 20
        costs = {"ratio": point.get("pruning_ratio", 0.2), "parameters": 1e5 * (1 + draw.random())}
        sums = [10 * value * (1 + 0.02 * draw.random()) for _ in range(2 if number % 3 == 0 else 1)]
        name = "default" if number == 0 else strategy
        predicted = (math.log(value) - 0.1, 0.3) if number > 5 else None
        trials.append(trial(number, *sums, strategy=name, point=point, widths=widths, costs=costs, predicted=predicted))
    journal = journal_of(trials, pareto=pareto, strategy=(strategy,))
    for number in (0, 3, 6):
        journal.add_final(Final(number, ((10.0, trials[number].rows[0][1]), (10.0, trials[number].rows[0][1] * 1.1))))
    journal.add_event("winner", {"number": 3, "value": 1.0, "trials": count})
    return journal


def test_numbers_are_those_of_a_hand() -> None:
    point = {**default(), "calibration.domain_weights": (0.8, 0.2), "repair.damping": 0.1}
    trials = [
        trial(0, 10.0, 30.0, seconds=50.0),
        trial(1, 8.0, 22.0, seconds=3.0, predicted=(-0.3, 0.1), point=point),
        trial(2, 5.0, seconds=1.0, strategy="sobol"),
        trial(3, 8.0, 22.0, seconds=0.1, answered_by=1, predicted=(5.0, 0.1)),
        trial(4, seconds=0.1, error="no plan"),
        trial(5, 12.0, 28.0, seconds=2.0, predicted=(0.4, 0.1)),
    ]
    journal = journal_of(trials)
    journal.add_final(Final(0, ((10.0, 20.0), (10.0, 40.0))))
    journal.add_final(Final(1, ((10.0, 18.0), (10.0, 30.0))))
    summary = describe_journal(journal)
    assert summary.winner is None and summary.chosen == 1 and "not finished" in summary.text
    journal.add_event("winner", {"number": 1, "value": 2.4, "trials": 6})
    summary = describe_journal(journal)
    assert (summary.trials, summary.answered, summary.failed) == (6, 1, 1)
    assert summary.strategies == {"default": 1, "gp": 4, "sobol": 1}
    assert summary.seconds == 2.5  # of 50, 3, 1 and 2
    assert (summary.best, summary.winner) == (1, 1)  # trial 2 saw one window
    # (8 + 22) against (10 + 30): a quarter less. Paired residuals of the logarithm, by the delta method.
    assert summary.best_difference.value == pytest.approx(math.log(0.75))
    influence = [(8 - 15) / 30 - (10 - 20) / 40, (22 - 15) / 30 - (30 - 20) / 40]
    error = math.sqrt(2 * sum(entry**2 for entry in influence))
    assert summary.best_difference.error == pytest.approx(error)
    assert f"trial 1, -25.00 ± {75 * error:.2f} % against trial 0" in summary.text
    assert [(final.number, final.value) for final in summary.finalists] == [(1, 2.4), (0, 3.0)]
    assert summary.finalists[0].difference.value == pytest.approx(math.log(0.8)) and "-20.00 ±" in summary.text
    assert summary.mixtures["calibration.domain_weights"] == {"code": (0.5, 0.8), "prose": (0.5, 0.2)}
    assert summary.changes["repair.damping"] == (default()["repair.damping"], 0.1)
    assert summary.coverage == (1, 2)  # trial 5 lies at 0, four deviations off; trial 3 was answered
    assert "1 of 2 measured trials (50 %)" in summary.text
    assert not summary.importance  # too few trials
    told = json.loads(json.dumps(summary.to_dict(), allow_nan=False))
    assert told["finalists"][0]["value"] == 2.4 and told["kind"] == "journal" and str(summary) == summary.text


def test_accuracy_is_told_in_points() -> None:
    summary = describe_journal(journal_of([trial(0, 4.0, 4.0), trial(1, 3.0, 4.0)], objective="accuracy", tasks=("t",)))
    assert "trial 1, -5.00 ±" in summary.text and "points against trial 0" in summary.text


def test_the_dimension_that_matters_is_found() -> None:
    journal = searched(26)
    summary = describe_journal(journal)
    assert max(summary.importance, key=summary.importance.__getitem__) == "repair.damping"
    assert sum(summary.importance.values()) == pytest.approx(1)
    space = space_of(journal)
    config = PruningConfig.recipe("default", calibration={"sources": DOMAINS}, search={})
    assert space == default_space(config, DOMAINS)
    values = [journal.estimate(t).value for t in journal.trials]
    damping = [t.point["repair.damping"] for t in journal.trials]
    from scipy.stats import spearmanr

    assert summary.correlation["repair.damping"] == pytest.approx(float(spearmanr(damping, values).statistic))
    assert set(summary.correlation) == set(summary.importance)
    assert {"importance.normalization", "calibration.domain_weights.code"} <= set(summary.importance)


def test_the_site_that_matters_is_found() -> None:
    summary = describe_journal(searched(40, strategy="predictor"))
    assert max(summary.layers, key=summary.layers.__getitem__) == "layers.2.mlp"
    assert summary.predictor["pairs"] == 40 and summary.predictor["r2"] > 0.3 and "held-out pairs" in summary.text
    assert not summary.importance  # allocations are no points of the space


def test_a_front_is_told_by_size() -> None:
    journal = searched(14, pareto="parameters")
    summary = describe_journal(journal)
    costs = [point["costs"]["parameters"] for point in summary.front]
    values = [point["value"] for point in summary.front]
    assert costs == sorted(costs, reverse=True) and values == sorted(values) and summary.front
    first = journal.trials[0].costs["parameters"]
    nearest = min(summary.front, key=lambda point: abs(point["costs"]["parameters"] - first))
    assert summary.chosen == nearest["trial"] and "front, trial" in summary.text


def unusual() -> dict[str, Journal]:
    one = trial(0, 10.0, 30.0)
    bare = journal_of([one, trial(1, 9.0)])
    bare.header = {"logarithmic": True}
    away = trial(2, math.inf, predicted=(0.1, 0.1))
    return {
        "finished": searched(),
        "pareto": searched(14, pareto="ratio", seed=1),
        "allocations": searched(strategy="predictor"),
        "one trial": journal_of([one]),
        "one window": journal_of([trial(0, 10.0), trial(1, 9.0)]),
        "failures": journal_of([one, trial(1, error="none"), away, trial(3, 600.0), replace(one, number=4)]),
        "unfinished": journal_of([one, trial(1, 9.0, predicted=(3.0, 2.0)), trial(2, 9.0, 9.0, answered_by=1)]),
        "unfinished pareto": journal_of([replace(one, costs={"macs": 2e9})], pareto="macs"),
        "without header": bare,
    }


@pytest.mark.parametrize("name", sorted(unusual()))
def test_every_journal_is_told_and_drawn(name: str, tmp_path: Path) -> None:
    journal = unusual()[name]
    summary = describe_journal(journal)
    assert summary.text.startswith(f"journal: {len(journal.trials)} trials")
    json.dumps(summary.to_dict(), allow_nan=False)
    assert plot_journal(journal, tmp_path / "x.png").stat().st_size > 10_000


@pytest.mark.parametrize(("suffix", "start"), [(".svg", b"<?xml"), (".pdf", b"%PDF"), (".png", b"\x89PNG")])
def test_pictures(suffix: str, start: bytes, tmp_path: Path) -> None:
    file = plot_journal(searched(8), tmp_path / "new" / f"x{suffix}")
    assert file.read_bytes().startswith(start)


def test_a_journal_comes_back_from_its_file(tmp_path: Path) -> None:
    journal = journal_of(searched(8).trials, tmp_path / "j.jsonl")
    assert describe_journal(Journal.load(tmp_path / "j.jsonl")) == describe_journal(journal)


def test_nothing_to_draw_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "0 trials" in describe_journal(journal_of([])).text
    with pytest.raises(ConfigError, match="no measured trial"):
        plot_journal(journal_of([]), tmp_path / "x.png")
    with pytest.raises(ConfigError, match=r"should end in \.png"):
        plot_journal(searched(8), tmp_path / "x.gif")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"hf_adaprune\[report\]"):
        plot_journal(searched(8), tmp_path / "x.png")
