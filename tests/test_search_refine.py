"""Laws of the strategies that refine an allocation, on a made-up model whose best allocation is known."""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model

from hf_adaprune.allocation import allocate
from hf_adaprune.config import PruningConfig
from hf_adaprune.errors import BudgetError, ConfigError
from hf_adaprune.importance import Scores
from hf_adaprune.search import predictor
from hf_adaprune.search import shares as sharing_module
from hf_adaprune.search.baselines import propose_random
from hf_adaprune.search.dimensions import Number
from hf_adaprune.search.evolution import propose_evolution
from hf_adaprune.search.journal import Journal, Trial
from hf_adaprune.search.loop import run_search
from hf_adaprune.search.predictor import predictor_quality, propose_predictor
from hf_adaprune.search.problem import Candidate, Proposal, Slot, View
from hf_adaprune.search.shares import Sharing, sharing_of
from hf_adaprune.search.space import Space
from hf_adaprune.search_config import SearchConfig
from hf_adaprune.sites import find_sites

GROUPS, CHANNELS, GROUP_COST, CHANNEL_COST = 3, 96, 512, 32


def slots_of(layers: int, attention: bool = True) -> tuple[Slot, ...]:
    found = []
    for layer in range(layers):
        if attention:
            found.append(Slot(f"layers.{layer}.self_attn", layer, "attention", GROUPS, GROUP_COST))
        found.append(Slot(f"layers.{layer}.mlp", layer, "mlp", CHANNELS, CHANNEL_COST))
    return tuple(found)


class Made:
    """A problem whose objective is a function of the shares that go; the allocation is the package's, in short."""

    first, windows, fresh, logarithmic = 3, 6, 0, False

    def __init__(self, layers: int = 8, ratio: float = 0.25, noise: float = 0.02, function: Any = None) -> None:
        self.slots = slots_of(layers)
        self.sizes = np.array([slot.units * slot.cost for slot in self.slots], dtype=float)
        self.target = ratio * float(self.sizes.sum())
        self.noise, self.function = noise, function or self.price
        self.built: list[float] = []
        # Sites in the middle are cheap to cut, those at both ends dear.
        depth = np.array([slot.layer for slot in self.slots]) / max(1, layers - 1)
        self.dear = 0.5 + 8 * (depth - 0.6) ** 2

    def price(self, shares: np.ndarray) -> float:
        """Quadratic in every share: least, by Lagrange, where a share is in proportion to 1 / dear."""
        return float(self.sizes @ (self.dear * shares**2) / self.sizes.sum())

    @property
    def optimum(self) -> float:
        """Least price if no group had to go as a whole: no candidate lies below."""
        return self.price(self.target / float(self.sizes @ (1 / self.dear)) / self.dear)

    def candidate(self, point: Mapping[str, Any]) -> Candidate:
        ratios = point.get("allocation.ratios")
        if ratios is None:  # another strategy's: even but for a tilt over depth
            ratios = {slot.name: 0.3 + point["tilt"] * (slot.layer / len(self.slots) - 0.25) for slot in self.slots}
        asked = np.array([max(ratios.get(slot.name, 0.0), 1e-6) for slot in self.slots])
        units = np.array([slot.units for slot in self.slots])
        coarse = np.array([slot.kind == "attention" for slot in self.slots])

        def factor(fixed: np.ndarray, movable: np.ndarray) -> float:
            low, high = 0.0, 1 / float(asked.min())
            for _ in range(60):
                middle = (low + high) / 2
                own = np.where(movable, np.minimum(1, middle * asked), fixed)
                low, high = (middle, high) if own @ self.sizes < self.target else (low, middle)
            return high

        nothing = np.zeros(len(units))
        gone = np.minimum(units - 1, np.floor(factor(nothing, coarse | ~coarse) * asked * units + 1e-9)) * coarse
        exact = np.minimum(1, factor(gone / units, ~coarse) * asked) * units * ~coarse
        gone = gone + np.minimum(np.ceil(exact - 1e-6), units - 1) * ~coarse
        if gone / units @ self.sizes < self.target - 1e-6:
            raise BudgetError("not enough may go")
        self.built.append(float(gone / units @ self.sizes))
        kept = {slot.name: int(slot.units - g) for slot, g in zip(self.slots, gone, strict=True) if g}
        key = json.dumps([kept, point.get("damping")])
        ratio = self.built[-1] / float(self.sizes.sum())
        return Candidate(key, {"ratio": ratio}, kept, (gone / units, float(point.get("damping", 0.1)), key))

    def measure(self, candidate: Candidate, start: int, stop: int) -> tuple[tuple[float, ...], ...]:
        shares, damping, key = candidate.payload
        value = self.function(shares) + (damping - 0.1) ** 2
        rows = []
        for window in range(start, stop):
            # What a text adds for all candidates, and a little that depends on the candidate.
            own = np.random.default_rng([window, len(key), sum(key.encode())]).normal()
            rows.append((100.0, 100.0 * (1 + 0.3 * math.sin(window) + value + self.noise * float(own))))
        return tuple(rows)


def random_shares(view: View, count: int) -> list[Proposal]:
    """What the others are to beat: share vectors drawn uniformly."""
    found = []
    for number in range(view.number, view.number + count):
        draws = np.random.default_rng([view.seed, number]).random(len(view.slots))
        ratios = {slot.name: round(float(draw), 6) for slot, draw in zip(view.slots, draws, strict=True)}
        found.append(Proposal({**view.trials[0].point, "allocation.method": "ratios", "allocation.ratios": ratios}))
    return found


SPACE = Space((Number("tilt", -1.0, 1.0, 0.0), Number("damping", 0.0, 0.5, 0.3)), {})
STRATEGIES = {
    "random": propose_random,
    "sobol": random_shares,
    "evolution": propose_evolution,
    "predictor": propose_predictor,
}


def search(problem: Made, strategy: Any, trials: int, journal: Journal | None = None, **settings: Any) -> Journal:
    seed = settings.pop("seed", 0)
    config = SearchConfig(trials=trials, strategy=strategy, **settings)
    return run_search(problem, SPACE, config, journal or Journal(), STRATEGIES, seed=seed)


def true_value(problem: Made, journal: Journal) -> float:
    """Price of the trial that won, without the noise of its measurement."""
    best = journal.winner()
    assert best is not None
    return problem.price(problem.candidate(best.point).payload[0])


def points(journal: Journal) -> list[Any]:
    return [json.loads(json.dumps([t.point, t.predicted, dict(t.widths), t.rows])) for t in journal.trials]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer vectors and steps on the predictor, which change how well it searches and nothing else."""
    for name, value in {"VECTORS": 500, "STEPS": 2, "FOLDS": 3}.items():
        monkeypatch.setattr(predictor, name, value)


@pytest.mark.parametrize(("strategy", "trials", "seeds"), [("evolution", 60, 5), ("predictor", 40, 1)])
def test_better_than_random_shares_at_equal_trials(
    strategy: str, trials: int, seeds: int, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictor, "SAMPLING", 0.9)
    problem = Made(16, noise=0.01)
    gap, blind = (
        np.mean([true_value(problem, search(problem, (name,), trials, seed=seed)) for seed in range(seeds)])
        - problem.optimum
        for name in (strategy, "sobol")
    )
    default = problem.price(problem.candidate(SPACE.default).payload[0]) - problem.optimum
    assert 0 <= gap < 0.75 * blind
    assert gap < 0.75 * default


def test_predicted_allocations_are_better_than_sampled_ones(quick: None) -> None:
    problem = Made(16)
    journal = search(problem, ("predictor",), 36)
    told = [trial for trial in journal.trials if trial.predicted is not None]
    sampled = [journal.estimate(trial).value for trial in journal.trials[1:] if trial.predicted is None]
    assert len(told) == 36 - round(0.7 * 36)
    measured = [journal.estimate(trial).value for trial in told]
    assert np.mean(measured) < np.quantile(sampled, 0.4)
    for trial, value in zip(told, measured, strict=True):
        mean, deviation = trial.predicted
        assert 0 < deviation < 1
        assert abs(value - mean) < 6 * deviation


@pytest.mark.parametrize("strategy", ["evolution", "predictor"])
def test_same_seed_same_trials(strategy: str, quick: None) -> None:
    one, again, other = (points(search(Made(), (strategy,), 16, seed=seed)) for seed in (3, 3, 4))
    assert one == again
    assert one[1:] != other[1:]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("strategy", "kept"), [("evolution", 9), ("predictor", 9), ("predictor", 17)])
def test_resumed_equals_uninterrupted(strategy: str, kept: int, batch: int, tmp_path: Path, quick: None) -> None:
    path, header = tmp_path / "journal.jsonl", {"logarithmic": False}
    # Sampling ends with the 15th of the 20 trials of this strategy.
    names = ("random:4", strategy)
    whole = search(Made(), names, 24, Journal.start(path, header), batch=batch)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: 1 + kept]))
    resumed = search(Made(), names, 24, Journal.start(path, header, resume=True), batch=batch)
    assert len(resumed.trials) == 24
    assert points(resumed) == points(whole)
    assert resumed.winner().number == whole.winner().number


@pytest.mark.parametrize("ratio", [0.1, 0.5])
@pytest.mark.parametrize("strategy", ["evolution", "predictor"])
def test_budget_is_kept(strategy: str, ratio: float, quick: None) -> None:
    problem = Made(ratio=ratio)
    journal = search(problem, (strategy,), 16)
    assert not [trial.error for trial in journal.trials if trial.error]
    step = len(problem.slots) * CHANNEL_COST  # every MLP rounds up
    for removed in problem.built:
        assert problem.target - 1e-6 <= removed <= problem.target + step


@pytest.mark.parametrize("strategy", ["evolution", "predictor"])
def test_no_model_is_tried_twice(strategy: str, quick: None) -> None:
    journal = search(Made(), (strategy,), 24)
    assert len({trial.key for trial in journal.trials}) == 24


@pytest.mark.parametrize("strategy", ["evolution", "predictor"])
def test_candidates_become_what_was_asked_for(strategy: str) -> None:
    """Coarse sites lose the groups that a vector says, although the allocation rounds them down."""
    problem = Made(12)
    trials = tuple(search(problem, ("sobol",), 10).trials)
    lost = 0
    for number in range(10, 30):
        config = SearchConfig(trials=40, strategy=(strategy,))
        view = View(SPACE, trials, config, problem.slots, 0, number, number, 40, False)
        sharing = sharing_of(dataclasses.replace(view, trials=trials))
        point = STRATEGIES[strategy](view, 1)[0].point
        found = sharing.shares(problem.candidate(point).widths)
        asked = np.array([point["allocation.ratios"].get(slot.name, 0.0) for slot in problem.slots])
        groups = np.floor(asked[sharing.coarse] * GROUPS)
        assert (np.rint(found[sharing.coarse] * GROUPS) == groups).all()
        lost += int(groups.sum())
    assert lost > 20


def test_evolution_goes_on_from_the_best_of_another_strategy() -> None:
    problem = Made()
    journal = search(problem, ("random:6", "evolution"), 20)
    before = min(journal.trials[:6], key=lambda trial: (-trial.windows, journal.estimate(trial).value))
    assert before.number != 0
    assert [trial.strategy for trial in journal.trials] == ["default"] + ["random"] * 5 + ["evolution"] * 14
    base = Sharing(problem.slots, before, 6, problem.target)
    for trial in journal.trials[6:]:
        assert trial.point["damping"] == before.point["damping"]
        assert trial.point["tilt"] == before.point["tilt"]
        assert trial.point["allocation.method"] == "ratios"
    first = base.shares(journal.trials[6].widths)
    assert 0 < base.distance(base.shares(before.widths), first) < 0.2
    assert journal.best().number >= 6
    assert journal.estimate(journal.best()).value < journal.estimate(before).value


def test_pairs_of_other_data_are_no_pairs() -> None:
    problem = Made()
    journal = search(problem, ("random:6", "evolution"), 12)
    view = View(SPACE, tuple(journal.trials), SearchConfig(), problem.slots, 0, 12, 6, 10, False)
    sharing = sharing_of(view)
    numbers = [pair.trial.number for pair in sharing_module.pairs_of(view.trials, sharing, False)]
    assert numbers == [sharing.base.number, *range(6, 12)]


def trained_on(function: Any, count: int = 120) -> dict[str, float]:
    problem = Made(noise=0.0, function=function)
    journal = search(problem, ("sobol",), count)
    return predictor_quality(journal.trials, problem.slots, logarithmic=False)


def noise_of(shares: np.ndarray) -> float:
    return float(np.random.default_rng(zlib.crc32(shares.tobytes())).normal())


def test_predictor_learns_what_can_be_learnt_and_nothing_from_noise() -> None:
    learnable = trained_on(Made().price)
    assert learnable["pairs"] == 120
    assert learnable["r2"] > 0.5
    assert learnable["spearman"] > 0.7
    noise = trained_on(noise_of)
    assert noise["r2"] < 0.1
    assert abs(noise["spearman"]) < 0.25


def test_an_objective_of_small_scale_is_learnt_as_well() -> None:
    def quality(problem: Made, trials: list[Trial], scale: float) -> dict[str, float]:
        scaled = [
            dataclasses.replace(trial, rows=tuple((tokens, scale * total) for tokens, total in trial.rows))
            for trial in trials
        ]
        return predictor_quality(scaled, problem.slots, logarithmic=False)

    for function in (None, noise_of):
        problem = Made(noise=0.0, function=function)
        trials = search(problem, ("sobol",), 40).trials
        whole = quality(problem, trials, 1.0)
        for scale in (2.0**-20, 2.0**-60, 2.0**20):
            assert quality(problem, trials, scale) == whole | {"rmse": scale * whole["rmse"]}
        # Other last bits let trees split ties elsewhere.
        assert quality(problem, trials, 1e-6)["r2"] == pytest.approx(whole["r2"], abs=0.05)


def test_quality_of_pairs_that_do_not_differ_is_unknown() -> None:
    for value in (0.0, 0.1):
        quality = trained_on(lambda shares, value=value: value, 20)
        assert quality["pairs"] == 20 and math.isnan(quality["r2"])


def test_a_model_that_was_tried_again_is_one_pair() -> None:
    """Trials answered from the journal, in folds of their own, would be told by their twins: noise would be learnt."""
    problem = Made(noise=0.0, function=noise_of)
    once = search(problem, ("sobol",), 20).trials
    again = [
        dataclasses.replace(trial, number=len(once) + trial.number, answered_by=trial.number)
        for trial in (*once, *once)
    ]
    quality = [predictor_quality(trials, problem.slots, logarithmic=False) for trials in (once, [*once, *again])]
    assert quality[0] == quality[1]
    assert quality[0]["pairs"] == 20 and quality[0]["r2"] < 0.3


def test_quality_of_too_few_pairs_is_unknown() -> None:
    problem = Made()
    journal = search(problem, ("sobol",), 7)
    quality = predictor_quality(journal.trials, problem.slots, logarithmic=False)
    assert quality["pairs"] == 7
    assert math.isnan(quality["r2"])


def test_blocks_of_four_and_fewer_in_shallow_models() -> None:
    def lengths(layers: int) -> set[int]:
        slots = slots_of(layers)
        return {len(block) for block in Sharing(slots, Trial(0, "", {}, ""), 1, 1.0).blocks(4)}

    assert lengths(16) == {4}
    assert lengths(8) == {2}
    assert lengths(3) == {1}


@pytest.mark.parametrize("strategy", [propose_evolution, propose_predictor])
def test_what_cannot_be_shared_says_what_to_do(strategy: Any) -> None:
    problem = Made()
    trials = tuple(search(problem, ("sobol",), 3).trials)
    view = View(SPACE, trials, SearchConfig(), problem.slots, 0, 3, 3, 10, False)
    assert len(strategy(view, 1)) == 1
    with pytest.raises(ConfigError, match="protect fewer layers"):
        strategy(dataclasses.replace(view, slots=problem.slots[:1]), 1)
    whole = tuple(dataclasses.replace(trial, widths={}) for trial in trials)
    with pytest.raises(ConfigError, match="pruning ratio above 0"):
        strategy(dataclasses.replace(view, trials=whole), 1)
    failed = tuple(dataclasses.replace(trial, rows=()) for trial in trials)
    with pytest.raises(ConfigError, match="errors of the trials"):
        strategy(dataclasses.replace(view, trials=failed), 1)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("strategy", ["evolution", "predictor"])
def test_shallow_models_have_few_allocations_and_no_trouble(strategy: str, layers: int, quick: None) -> None:
    journal = search(Made(layers), (strategy,), 14)
    assert len(journal.trials) == 14
    assert not [trial.error for trial in journal.trials if trial.error]


@pytest.mark.parametrize("ratio", [0.2, 0.4])
def test_a_point_gives_back_the_widths_it_was_made_of(ratio: float) -> None:
    """With the package's own allocation on a model, where global ranking chose the widths."""
    sites = find_sites(
        tiny_model("llama", num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4, intermediate_size=96)
    )
    kinds = {site.name: "kv_group" if site.kind == "attention" else "channel" for site in sites}
    generator = torch.Generator().manual_seed(0)
    units = {
        name: torch.rand(sites.by_name[name].units(kind), generator=generator).double()
        * sites.by_name[name].unit_parameters(kind)  # so that groups and channels are equally dear
        for name, kind in kinds.items()
    }
    sums = {name: float(own.sum()) for name, own in units.items()}
    scores = Scores(units, kinds, sums, torch.ones(len(sites.layers), dtype=torch.float64))
    config = PruningConfig(ratio)

    def widths(own: PruningConfig) -> dict[str, int]:
        plan = allocate(sites, scores, own)
        return {
            name: len(kept.kept_groups) if kinds[name] == "kv_group" else len(kept.kept)
            for name, kept in plan.sites.items()
        }

    slots = tuple(
        Slot(site.name, site.layer, site.kind, len(units[site.name]), site.unit_parameters(kinds[site.name]))
        for site in sites
    )
    found = widths(config)
    base = Trial(0, "default", {}, "", ((1.0, 1.0),), {}, found)
    sharing = sharing_of(View(SPACE, (base,), SearchConfig(), slots, 0, 1, 1, 10, True))
    ratios = sharing.point(sharing.settle(sharing.shares(found)[None])[0])["allocation.ratios"]
    again = widths(config.with_changes(allocation={"method": "ratios", "ratios": ratios}))
    assert len(found) > 6
    assert len(set(found.values())) > 1
    for site in sites:
        off = abs(found.get(site.name, 0) - again.get(site.name, 0))
        assert off <= (0 if site.kind == "attention" else 1)
