"""Laws of the Gaussian process: it finds known optima, repeats itself, and says how sure it is."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from hf_adaprune import PruningConfig
from hf_adaprune.search import gaussian_process
from hf_adaprune.search.baselines import propose_random, propose_sobol
from hf_adaprune.search.dimensions import Choice, Number, Simplex, Vector
from hf_adaprune.search.gaussian_process import (
    ROUGHNESS,
    SQUEEZE,
    compress,
    coverage,
    expand,
    fit_surrogate,
    propose_gp,
    widening,
)
from hf_adaprune.search.journal import Journal, Rows, Trial
from hf_adaprune.search.loop import Progress, front, run_search
from hf_adaprune.search.problem import Candidate, View, cost_axis
from hf_adaprune.search.space import Space, default_space
from hf_adaprune.search_config import SearchConfig
from hf_adaprune.searching import _Line

SPACE = Space(
    (
        Simplex("calibration.domain_weights", ("a", "b", "c"), (1.0, 1.0, 1.0)),
        Choice("importance.normalization", ("log", "mean"), "log"),
        Vector("allocation.profile", -1.0, 1.0, (0.0, 0.0), centred=True),
        Number("repair.damping", 1e-3, 1.0, 0.1, log=True),
    ),
    {},
)
STRATEGIES = {"gp": propose_gp, "random": propose_random}


class Bowl:
    """A smooth objective with a known optimum, a ripple by window that all points share, and a little of its own."""

    first, windows, fresh, slots = 4, 8, 4, ()

    def __init__(self, space: Space = SPACE, ripple: float = 0.01, factor: float | None = None) -> None:
        """With a factor the objective is compared as it is, and times this."""
        self.space, self.ripple = space, ripple
        self.factor, self.logarithmic = factor or 1.0, factor is None
        self.optimum = space.encode(
            {
                "calibration.domain_weights": (0.7, 0.3, 0.0),
                "importance.normalization": "mean",
                "allocation.profile": (0.6, -0.6),
                "repair.damping": 0.01,
            }
        )
        low, high = space.bounds()
        self.scale = high - low

    def value(self, point: Mapping[str, Any]) -> float:
        away = (self.space.encode(point) - self.optimum) / self.scale
        return 0.5 + float(away.square().sum())

    def candidate(self, point: Mapping[str, Any]) -> Candidate:
        ratio = float(point.get("pruning_ratio", 0.2))
        return Candidate(repr(sorted(point.items())), {"ratio": ratio}, {}, point)

    def measure(self, candidate: Candidate, start: int, stop: int) -> Rows:
        value, salt = self.value(candidate.payload), float(self.space.encode(candidate.payload).sum())
        size = 10 * self.factor * value
        return tuple(
            (10.0, size * math.exp(0.2 * math.sin(5 * w) + self.ripple * math.sin(9 * w + 70 * salt)))
            for w in range(start, stop)
        )


def searched(strategy: str, trials: int, seed: int = 0, factor: float | None = None, **options: Any) -> Journal:
    config = SearchConfig(trials=trials, strategy=(strategy,), initial=6, **options)
    journal = Journal.start(None, {"logarithmic": factor is None})
    return run_search(Bowl(factor=factor), SPACE, config, journal, STRATEGIES, seed=seed)


def view_of(journal: Journal, number: int, **config: Any) -> View:
    own = SearchConfig(trials=60, initial=6, **config)
    return View(SPACE, tuple(journal.trials[:number]), own, (), 0, number, number, 60, True)


def test_it_finds_a_known_optimum_where_random_draws_do_not() -> None:
    best = math.log(0.5 / Bowl().value(SPACE.default))
    found = {name: min(j.estimate(t).value for t in j.trials) for name in STRATEGIES if (j := searched(name, 26))}
    assert found["gp"] < best + 0.05
    assert found["gp"] < found["random"] - 0.05


def test_the_scale_of_an_objective_changes_no_trial() -> None:
    """Without logarithms: of a thousandth of an objective it learns what it learns of the objective, in its units."""
    plain = searched("gp", 20, factor=1.0)
    for factor in (2.0**-10, 2.0**10):  # which scale every number to the bit
        for one, other in zip(searched("gp", 12, factor=factor).trials, plain.trials, strict=False):
            assert one.point == other.point
            expected = None if other.predicted is None else tuple(factor * number for number in other.predicted)
            assert one.predicted == expected
    thousandth = searched("gp", 20, factor=1e-3)
    lowest = {n: min(j.estimate(t).value for t in j.trials) for n, j in enumerate((plain, thousandth))}
    assert 1e3 * lowest[1] == pytest.approx(lowest[0], abs=0.05)
    assert lowest[0] < 0.7 * (0.5 - Bowl().value(SPACE.default))  # most of the way to the optimum


def test_predictions_of_an_objective_as_it_is_are_in_its_own_units() -> None:
    journal = searched("gp", 30, factor=1e-3)
    held, total = coverage([(t, journal.estimate(t).value) for t in journal.trials], logarithmic=False)
    assert total == 24
    assert 0.6 <= held / total <= 0.95


def test_the_first_candidates_lie_around_trial_0() -> None:
    """Each is nearer to the default than the quasi-random point it comes from, in every dimension without choices."""
    journal = searched("random", 1)
    view = view_of(journal, 1)
    start = SPACE.encode(SPACE.default)
    for near, far in zip(propose_gp(view, 5), propose_sobol(view, 5), strict=True):
        steps, whole = SPACE.encode(near.point) - start, SPACE.encode(far.point) - start
        free = [c for d, span in SPACE.spans() if not isinstance(d, Choice) for c in range(span.start, span.stop)]
        assert bool((steps[free].abs() <= 0.4 * whole[free].abs() + 1e-6).all())
        assert float(steps[free].norm()) > 0.05 * float(whole[free].norm())


def test_the_first_candidates_of_a_pareto_search_spread_over_its_ratios() -> None:
    space = Space((*SPACE.dimensions, Number("pruning_ratio", 0.1, 0.6, 0.2)), {})
    view = View(space, (), SearchConfig(pareto="ratio"), (), 0, 1, 1, 60, True, cost="ratio")
    ratios = [float(proposal.point["pruning_ratio"]) for proposal in propose_gp(view, 8)]
    assert max(ratios) - min(ratios) > 0.3


def test_the_optimum_keeps_the_rules_of_the_space() -> None:
    for trial in searched("gp", 12).trials:
        vector = SPACE.encode(trial.point)
        for index, coefficients, right in SPACE.equalities():
            assert float((vector[index] * coefficients).sum()) == pytest.approx(right, abs=1e-5)
        low, high = SPACE.bounds()
        assert bool(((vector >= low - 1e-6) & (vector <= high + 1e-6)).all())
        assert trial.point["importance.normalization"] in ("log", "mean")


def test_same_seed_same_trials_and_another_seed_others() -> None:
    points = [[trial.point for trial in searched("gp", 10, seed).trials] for seed in (3, 3, 4)]
    assert points[0] == points[1]
    assert points[0] != points[2]


def test_proposals_leave_the_global_generator_alone() -> None:
    journal = searched("random", 8)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    propose_gp(view_of(journal, 8), 1)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


def test_pending_proposals_differ() -> None:
    proposals = propose_gp(view_of(searched("random", 10), 10), 3)
    vectors = torch.stack([SPACE.encode(proposal.point) for proposal in proposals])
    assert float(torch.pdist(vectors).min()) > 0.01


def test_a_noisy_trial_weighs_less() -> None:
    """The same surprising value moves the surrogate less where its standard error is large."""
    space = Space((Number("repair.damping", 0.0, 1.0, 0.5),), {})
    view = View(space, (), SearchConfig(), (), 0, 9, 9, 60, True)
    moved = []
    for error in (0.001, 0.3):
        known = [
            (
                Trial(n, "gp", {"repair.damping": n / 8}, str(n)),
                -0.5 if n == 4 else 0.1 * (n % 2),
                error if n == 4 else 0.001,
            )
            for n in range(9)
        ]
        model = fit_surrogate(view, known)[0]
        with torch.no_grad():
            moved.append(float(model.posterior(torch.tensor([[0.5]], dtype=torch.float64)).mean))
    assert moved[0] > 0.3 > moved[1] + 0.1


def test_intervals_that_miss_widen_the_next_ones() -> None:
    def history(values: list[float]) -> list[tuple[Trial, float, float]]:
        return [(Trial(n, "gp", {}, "", predicted=(0.0, 0.1)), value, 0.0) for n, value in enumerate(values)]

    assert widening([]) == 1
    assert widening(history([0.01] * 5)) < 1 < widening(history([0.14] * 5))
    # In the long run four of five hold: then nothing changes.
    assert widening(history([0.01] * 8 + [0.14] * 2)) == pytest.approx(1.0)


def test_the_outcome_transform_is_smooth_and_increasing() -> None:
    values = torch.linspace(-1, 8, 400, dtype=torch.float64)
    squeezed = torch.tensor([compress(float(value)) for value in values])
    assert bool((squeezed.diff() > 0).all())
    assert [expand(compress(value)) for value in (-0.3, 0.1, 0.2, 1.2)] == pytest.approx([-0.3, 0.1, 0.2, 1.2])
    assert compress(-0.3) == -0.3 and compress(SQUEEZE) == pytest.approx(SQUEEZE)
    assert compress(SQUEEZE + 1e-6) == pytest.approx(SQUEEZE + 1e-6, abs=1e-9)
    assert ROUGHNESS >= 1


def test_coverage_counts_predicted_trials_inside_their_intervals() -> None:
    def trial(number: int, predicted: tuple[float, float] | None, answered: int | None = None) -> Trial:
        return Trial(number, "gp", {}, "", predicted=predicted, answered_by=answered)

    trials = [
        (trial(1, (0.0, 1.0)), 0.1), (trial(2, (0.0, 1.0)), -1.27), (trial(3, (0.0, 1.0)), -1.29),
        (trial(4, None), 0.0), (trial(5, (0.0, 1.0), 2), 0.0),
    ]  # fmt: skip
    assert coverage(trials) == (2, 3)
    assert coverage(trials, level=0.1) == (1, 3)


@pytest.mark.parametrize("value", [-0.1, 0.1, 1.193])
def test_the_live_line_shows_a_prediction_as_it_shows_the_trial_that_it_meets(value: float) -> None:
    """What is predicted is squeezed, what is measured is not."""
    said: list[str] = []
    with _Line(5, 0, True) as line:
        assert line.bar is not None
        line.bar.set_postfix_str = lambda text, refresh: said.append(text)
        trial = Trial(1, "gp", {}, "", predicted=(compress(value), 0.01))
        line(Progress(trial, 5, value, value, 1, 60.0))
    assert said[0].count(f"{100 * math.expm1(value):+.1f} %") == 3  # best, last and predicted
    low, high = (float(end) for end in re.findall(r"\((\S+) % to (\S+) %\)", said[0])[0])
    assert low < 100 * math.expm1(value) < high


def test_predictions_are_honest_on_a_smooth_objective() -> None:
    journal = searched("gp", 30)
    held, total = coverage([(trial, journal.estimate(trial).value) for trial in journal.trials])
    assert total == 24
    assert 0.6 <= held / total <= 0.95


def test_the_fully_bayesian_model_proposes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaussian_process, "NUTS", {"warmup_steps": 8, "num_samples": 8, "thinning": 4})
    journal = searched("random", 10)
    proposal = propose_gp(view_of(journal, 10, surrogate="saas"), 1)[0]
    assert proposal.predicted is not None and proposal.predicted[1] > 0
    assert SPACE.holds(proposal.point)
    again = propose_gp(view_of(journal, 10, surrogate="saas"), 1)[0]
    assert again.point == proposal.point


def test_a_pareto_search_spreads_over_sizes_and_beats_random_draws() -> None:
    space = Space((*SPACE.dimensions, Number("pruning_ratio", 0.05, 0.5, 0.2)), {})

    class Sized(Bowl):
        def value(self, point: Mapping[str, Any]) -> float:
            rest = {path: value for path, value in point.items() if path != "pruning_ratio"}
            away = (SPACE.encode(rest) - self.optimum) / self.scale
            return (0.5 + float(away.square().sum())) * math.exp(4 * float(point["pruning_ratio"]))

        def measure(self, candidate: Candidate, start: int, stop: int) -> Rows:
            value = self.value(candidate.payload)
            return tuple((10.0, 10 * value * math.exp(0.2 * math.sin(5 * w))) for w in range(start, stop))

    def volume(strategy: str) -> float:
        config = SearchConfig(trials=20, strategy=(strategy,), initial=6, pareto="ratio")
        journal = run_search(
            Sized(SPACE), space, config, Journal.start(None, {"logarithmic": True}), STRATEGIES, seed=1
        )
        points = sorted((-cost_axis(trial, "ratio"), math.log(value)) for trial, value in front(journal, "ratio"))
        assert [ratio for ratio, _ in points] == sorted({ratio for ratio, _ in points})
        # Area between the front and a corner that every candidate beats.
        area, last = 0.0, 0.0
        for ratio, value in points:
            area += (ratio - last) * max(0.0, 4.0 - value)
            last = ratio
        return area

    assert volume("gp") > volume("random")


def test_too_little_to_learn_from_falls_back_to_quasi_random_points() -> None:
    view = view_of(searched("random", 2), 2)
    view = View(SPACE, view.trials, view.config, (), 0, 2, 9, 60, True)
    assert propose_gp(view, 1)[0].predicted is None


def test_the_default_space_can_be_searched() -> None:
    config = PruningConfig.recipe("default", calibration={"sources": ("a", "b", "c")}, search={"trials": 12})
    space = default_space(config, ("a", "b", "c"))

    class Flat(Bowl):
        def __init__(self) -> None:
            self.space, self.ripple, self.factor, self.logarithmic = space, 0.02, 1.0, True

        def value(self, point: Mapping[str, Any]) -> float:
            return 1.0 + float(point["repair.damping"])

    assert config.search is not None
    journal = run_search(Flat(), space, config.search, Journal(), STRATEGIES, seed=0)
    assert len(journal.trials) == 12
    assert all(space.apply(config, trial.point) for trial in journal.trials)
