"""A search over one model: statistics and trials joined with the loop that knows no model."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers.utils import logging as transformers_logging

from .clock import Clock
from .config import PruningConfig
from .costs import Costs
from .errors import ConfigError, JournalError
from .measures import Measure
from .plan import PruningPlan
from .search.gaussian_process import expand
from .search.journal import Journal, Trial, mean_value
from .search.loop import Progress, front, run_search
from .search.space import Space, default_space
from .search_checks import check_reach, check_search, named_objective, strategy
from .search_config import REFINING, SPEEDS
from .search_journal import journal_lock, keep_speeds, start_journal, warm_points
from .selection import measure_of
from .sites import ModelSites
from .statistics import Statistics
from .trials import CachedScores, Trials
from .workers import Alone

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["FrontPoint", "SearchResult", "find_best", "shared_costs"]


@dataclass(frozen=True)
class FrontPoint:
    """A plan on the front of a Pareto search.

    Args:
        plan ([`PruningPlan`]): which units stay.
        config ([`PruningConfig`]): what decided it.
        costs (`dict[str, float]`): `ratio`, `parameters` and the cost of the search.
        value (`float`): the objective on fresh selection text; of a function passed as objective, its value.
    """

    plan: PruningPlan
    config: PruningConfig
    costs: Mapping[str, float]
    value: float


@dataclass(frozen=True, eq=False)
class SearchResult:
    """What a search found.

    Args:
        config ([`PruningConfig`]): of the winner, without its search.
        plan ([`PruningPlan`]): of the winner; of several nested ones that of the config's ratio, or of the highest.
        journal ([`Journal`]): every trial.
        space ([`Space`]): what varied.
        asked ([`PruningConfig`]): where the search started.
        front (`tuple[FrontPoint, ...]`): of a Pareto search, by size.
        nested (`dict[float, PruningPlan]`): by pruning ratio, of a search over several.
    """

    config: PruningConfig
    plan: PruningPlan
    journal: Journal
    space: Space
    asked: PruningConfig
    front: tuple[FrontPoint, ...] = ()
    nested: Mapping[float, PruningPlan] = field(default_factory=dict)

    @property
    def winner(self) -> Trial:
        """The trial that won."""
        winner = self.journal.winner()
        assert winner is not None
        return winner

    def to_dict(self) -> dict[str, Any]:
        """The search in short, as JSON types: what varied, what won, and by how much."""
        winner, search = self.winner, self.asked.search
        values = {final.number: mean_value(final.rows) for final in self.journal.finals}
        drawn = self.journal.event("redrawn")
        if drawn is not None:
            drawn = {name: drawn[name] for name in ("shares", "before", "value", "better")}
        return {
            "trials": len(self.journal.trials),
            "strategy": list(search.strategy) if search is not None else [],
            "objective": search.objective if search is not None else "",
            "space": self.space.to_dict(),
            "winner": {"trial": winner.number, "strategy": winner.strategy, "point": dict(winner.point)},
            "on_fresh_text": {str(number): value for number, value in values.items()},
            **({} if drawn is None else {"redrawn": drawn}),
            "seed": self.asked.seed,
        }


def find_best(
    sites: ModelSites,
    tokenizer: PreTrainedTokenizerBase | None,
    config: PruningConfig,
    statistics: Statistics,
    *,
    costs: Costs | None = None,
    journal: str | os.PathLike[str] | None = None,
    resume: bool = False,
    warm_start: str | os.PathLike[str] | None = None,
    objective: Callable[[Any], Any] | None = None,
    workers: Alone | None = None,
    clock: Clock | None = None,
    measure: Measure | None = None,
    scores: CachedScores | None = None,
) -> SearchResult:
    """Search on statistics that are collected already; the model is untouched.

    Args:
        sites ([`ModelSites`]): the dense model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): needed by every objective but `custom`.
        config ([`PruningConfig`]): trial 0, and the search.
        statistics ([`Statistics`]): see [`search_needs`].
        costs ([`Costs`], *optional*): of the model; made anew where not given.
        journal (`str`, *optional*): file of the journal; kept in memory where not given.
        resume (`bool`, *optional*, defaults to `False`): go on with the journal if it is there.
        warm_start (`str`, *optional*): journal of another search whose best points are tried first.
        objective (`Callable`, *optional*): function of the model to minimise, instead of the config's objective.
        workers ([`Alone`], *optional*): processes that share the trials; see [`hf_adaprune.parallel`]. All of them
            come back with the same plan and trials.
        clock ([`Clock`], *optional*): counts seconds.
        measure ([`Measure`], *optional*): of an earlier search with the same texts: saves reading the dense model's
            tokens again.
        scores ([`CachedScores`], *optional*): of an earlier search on the same statistics and domain weights.

    Raises:
        BudgetError, ConfigError, CalibrationError, JournalError: before any trial.
    """
    search = config.search
    if search is None:
        raise ConfigError("there is no search in this config. Give search={...}, for example search={'trials': 60}.")
    clock = clock or Clock()
    workers = workers or Alone()
    config = named_objective(config, objective)
    check_search(config)
    costs = costs or shared_costs(sites, config, workers)
    check_reach(sites, config, costs)
    space = default_space(config, statistics.domains, statistics.shares)
    refined = [site.name for site in sites] if any(name in REFINING for name, _ in search.shares()) else []
    warm = workers.lead(lambda: warm_points(warm_start, space, refined)) if warm_start is not None else []
    measure = measure or measure_of(sites, tokenizer, config, objective, workers)
    trials = Trials(sites, config, space, statistics, measure, costs, scores)
    with ExitStack() as stack:
        if journal is not None:
            workers.lead(lambda: stack.enter_context(journal_lock(journal)))
        book = start_journal(trials, warm, journal, resume, workers)
        keep_speeds(trials, book)
        workers.lead(lambda: _check_model(trials, book.trials[0]) if book.trials else None)
        clock.stop("selection text")
        strategies = {name: strategy(name) for name, _ in search.shares()}
        live = stack.enter_context(_Line(search.trials, len(book.trials), workers.rank == 0, measure.logarithmic))
        run_search(trials, space, search, book, strategies, seed=config.seed, workers=workers, live=live, warm=warm)
    clock.stop("search")
    found = workers.lead(lambda: _found(trials, config, book))
    return SearchResult(found.config, found.plan, book, space, config, found.front, found.nested)


@dataclass(frozen=True)
class _Found:
    """What the first process makes of the journal; the others hear of it rather than compute it, bit for bit."""

    config: PruningConfig
    plan: PruningPlan
    front: tuple[FrontPoint, ...]
    nested: Mapping[float, PruningPlan]


def shared_costs(sites: ModelSites, config: PruningConfig, workers: Alone) -> Costs:
    """Costs with which all processes decide alike: speeds differ by device and moment, so the first one measures them.

    Args:
        sites ([`ModelSites`]): the model.
        config ([`PruningConfig`]): budgets and search.
        workers ([`Alone`]): the processes.
    """
    named = {*config.budgets, *([config.search.pareto] if config.search is not None else [])}
    if workers.count == 1 or not named & set(SPEEDS):
        return Costs.of(sites, config)
    return Costs.of(sites, config, workers.lead(lambda: Costs.of(sites, config).speed_table))


def _check_model(trials: Trials, trial: Trial) -> None:
    """Refuse a journal whose points give other models now: its values would be said of models that nobody measured."""
    if trial.rows and trials.candidate(trial.point).key != trial.key:
        raise JournalError(
            f"trial {trial.number} of the journal gives another model than the one that it measured: scores or plans "
            "are computed in another way by this version of the package. Name a new journal, and search anew."
        )


def _found(trials: Trials, config: PruningConfig, book: Journal) -> _Found:
    search = config.search
    assert search is not None
    winner = book.winner()
    assert winner is not None
    _check_model(trials, winner)
    own = trials.config_of(winner.point)
    plans = trials.plans(own)
    points: tuple[FrontPoint, ...] = ()
    nested = dict(zip(search.ratios, plans, strict=True)) if search.ratios else {}
    if search.pareto is not None:
        measured = front(book, search.pareto, search.finalists)
        configs = [(trials.config_of(trial.point), trial, value) for trial, value in measured]
        points = tuple(FrontPoint(trials.plans(one)[0], one, trial.costs, value) for one, trial, value in configs)
    plan = nested.get(config.pruning_ratio, plans[-1])
    return _Found(own, plan, points, nested)


class _Line:
    """The live line: trial, last, best, what was predicted, time left."""

    def __init__(self, trials: int, done: int, enabled: bool, logarithmic: bool = True) -> None:
        self.said, self.logarithmic = _percent if logarithmic else _plain, logarithmic
        self.bar = (
            transformers_logging.tqdm(total=trials, initial=done, desc="search", unit="trial") if enabled else None
        )

    def __call__(self, progress: Progress) -> None:
        if self.bar is None:
            return
        said = f"best {self.said(progress.best)} (trial {progress.best_number}), last {self.said(progress.value)}"
        if progress.trial.predicted is not None:
            mean, deviation = progress.trial.predicted
            if self.logarithmic and progress.trial.strategy == "gp":  # which predicts squeezed differences
                low, high = (self.said(expand(mean + sign * deviation)) for sign in (-1, 1))
                said += f", predicted {self.said(expand(mean))} ({low} to {high})"
            else:
                said += f", predicted {self.said(mean)} ± {self.said(deviation).lstrip('+')}"
        minutes, seconds = divmod(round(progress.seconds_left), 60)
        self.bar.set_postfix_str(f"{said}, {minutes}:{seconds:02d} left", refresh=False)
        self.bar.update(1)

    def __enter__(self) -> _Line:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.close()


def _percent(difference: float) -> str:
    return "failed" if math.isnan(difference) else f"{100 * math.expm1(min(difference, 20.0)):+.1f} %"


def _plain(difference: float) -> str:
    return "failed" if math.isnan(difference) else f"{difference:+.4f}"
