"""The loop of a search: propose, build, measure, write down; then measure the best again on text no trial has seen.

Everything random hangs on the seed and the trial's number, and every proposal on the journal alone, so that a resumed
search goes on to the trials of an uninterrupted one. With several processes all of them walk this loop; the first one
proposes, each measures its share, all hear of every result.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar

from ..errors import BudgetError, ConfigError, JournalError
from ..search_config import SearchConfig
from ..workers import Alone
from .journal import Final, Journal, Rows, Trial, compare, mean_value
from .space import Point, Space

__all__ = [
    "Alone",
    "Candidate",
    "Problem",
    "Progress",
    "Proposal",
    "Slot",
    "Strategy",
    "View",
    "cost_axis",
    "finalists",
    "front",
    "run_search",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")

# A candidate sees the rest of the text unless it is behind the best by more than so many standard errors of the paired
# difference on the first windows.
PATIENCE = 1.0
WARM_POINTS = 5


@dataclass(frozen=True, eq=False)
class Candidate:
    """What a problem makes of a point, before anything is measured.

    Args:
        key (`str`): equal for candidates that are the same model.
        costs (`dict[str, float]`): `ratio`, `parameters` ...
        widths (`dict[str, int]`): units kept, by site that loses some; 0 where its whole layer goes.
        payload (`Any`): the problem's own.
    """

    key: str
    costs: Mapping[str, float]
    widths: Mapping[str, int]
    payload: Any = None


@dataclass(frozen=True)
class Slot:
    """A site as the strategies that refine an allocation see it.

    Args:
        name (`str`): of the site.
        layer (`int`): its layer.
        kind (`str`): `attention`, `mlp` or `experts`.
        units (`int`): how many units it has.
        cost (`int`): parameters of one.
    """

    name: str
    layer: int
    kind: str
    units: int
    cost: int


class Problem(Protocol):
    """What is searched: from points to measurements. Windows count from 0; fresh ones follow those of the trials."""

    first: int
    windows: int
    fresh: int
    logarithmic: bool
    slots: tuple[Slot, ...]

    def candidate(self, point: Mapping[str, Any]) -> Candidate:
        """The candidate of a point; raises BudgetError or ConfigError where there is none."""

    def measure(self, candidate: Candidate, start: int, stop: int) -> Rows:
        """Measure windows `[start, stop)`."""


@dataclass(frozen=True)
class Proposal:
    """A point to try.

    Args:
        point (`dict[str, Any]`): fields by path.
        predicted (`tuple[float, float]`, *optional*): mean and standard deviation expected of the difference to trial
            0.
    """

    point: Point
    predicted: tuple[float, float] | None = None


@dataclass(frozen=True)
class View:
    """What a strategy may look at.

    Args:
        space ([`Space`]): what varies.
        trials (`tuple[Trial, ...]`): so far, failed ones too.
        config ([`SearchConfig`]): of the search.
        slots (`tuple[Slot, ...]`): sites, for strategies that refine an allocation.
        seed (`int`): of the search.
        number (`int`): of the next trial.
        done (`int`): trials that this strategy has had.
        share (`int`): trials that it gets in all.
        logarithmic (`bool`): whether objectives are compared by logarithms.
        cost (`str`, *optional*): the cost of the other axis of a Pareto search.
    """

    space: Space
    trials: tuple[Trial, ...]
    config: SearchConfig
    slots: tuple[Slot, ...]
    seed: int
    number: int
    done: int
    share: int
    logarithmic: bool
    cost: str | None = None

    def observations(self) -> list[tuple[Trial, float, float]]:
        """Measured trials with their difference to trial 0 and its standard error."""
        known = [trial for trial in self.trials if trial.rows]
        found = []
        for trial in known:
            estimate = compare(trial.rows, known[0].rows, self.logarithmic)
            found.append((trial, estimate.value, estimate.error))
        return found

    def best(self) -> Trial | None:
        """The best of the trials that saw the most windows."""
        observed = self.observations()
        most = max((trial.windows for trial, _, _ in observed), default=0)
        full = [
            (value, trial.number, trial)
            for trial, value, _ in observed
            if trial.windows == most and not math.isnan(value)
        ]
        return min(full)[2] if full else None


Strategy = Callable[[View, int], Sequence[Proposal]]


@dataclass(frozen=True)
class Progress:
    """For the live line.

    Args:
        trial ([`Trial`]): the last one.
        trials (`int`): in all.
        value (`float`): its difference to trial 0.
        best (`float`): the best difference so far, and `best_number` the trial's.
        seconds_left (`float`): at the pace so far.
    """

    trial: Trial
    trials: int
    value: float
    best: float
    best_number: int
    seconds_left: float


@dataclass(eq=False)
class _Run:
    problem: Problem
    space: Space
    config: SearchConfig
    seed: int
    journal: Journal
    strategies: Mapping[str, Strategy]
    workers: Alone
    live: Callable[[Progress], None] | None
    warm: Sequence[Point]
    started: float  # as if earlier runs of the journal had been right before this one

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started


def run_search(
    problem: Problem,
    space: Space,
    config: SearchConfig,
    journal: Journal,
    strategies: Mapping[str, Strategy],
    *,
    seed: int = 0,
    workers: Alone | None = None,
    live: Callable[[Progress], None] | None = None,
    warm: Sequence[Point] = (),
) -> Journal:
    """Run a search, or what is left of it, and choose its winner.

    Args:
        problem ([`Problem`]): what is searched.
        space ([`Space`]): what varies; its default is trial 0.
        config ([`SearchConfig`]): trials, strategies, windows.
        journal ([`Journal`]): empty, or of the same search.
        strategies (`dict[str, Strategy]`): by name.
        seed (`int`, *optional*, defaults to 0): of everything random.
        workers ([`Alone`], *optional*): processes; one where not given.
        live (`Callable`, *optional*): called after every trial.
        warm (sequence of points, *optional*): the first trials after trial 0.

    Returns:
        [`Journal`]: with its winner.

    Raises:
        BudgetError, ConfigError: trial 0 cannot be built.
    """
    started = time.monotonic() - journal.elapsed
    run = _Run(problem, space, config, seed, journal, strategies, workers or Alone(), live, warm, started)
    first_number = 0
    for name, share in config.shares():
        if name not in strategies:
            raise ConfigError(f"no strategy {name!r}. Known: {', '.join(strategies)}.")
        _run_strategy(run, name, first_number, share)
        first_number += share
    _run_finals(run)
    return journal


def _run_strategy(run: _Run, name: str, first: int, share: int) -> None:
    size = max(run.config.batch, run.workers.count)
    start = first
    while start < first + share:
        stop = start + 1 if start == 0 else min(start + size, first + share)  # all compare with trial 0
        if len(run.journal.trials) < stop:
            if _out_of_time(run):
                return
            _round(run, name, first, share, start, stop)
        start = stop


def _out_of_time(run: _Run) -> bool:
    late = run.config.minutes is not None and run.elapsed > 60 * run.config.minutes
    late = bool(run.workers.share(late))
    return late and len(run.journal.trials) > 0


def _round(run: _Run, name: str, first: int, share: int, start: int, stop: int) -> None:
    """Propose trials `[start, stop)` from those before `start`, and measure the ones that are not journalled yet."""
    before = tuple(run.journal.trials[:start])
    view = View(
        run.space, before, run.config, run.problem.slots, run.seed, start, start - first, share,
        run.problem.logarithmic, run.config.pareto,
    )  # fmt: skip
    proposals = run.workers.lead(lambda: _propose(run, name, view, stop - start))
    todo = list(range(max(start, len(run.journal.trials)), stop))
    for chunk in range(0, len(todo), run.workers.count):
        mine = todo[chunk : chunk + run.workers.count][run.workers.rank : run.workers.rank + 1]
        making = [partial(_trial, run, name, number, proposals[number - start], before) for number in mine]
        _write_down(run, _together(run.workers, making))


def _write_down(run: _Run, trials: Sequence[Trial]) -> None:
    def write() -> None:
        for trial in sorted(trials, key=lambda t: t.number):
            run.journal.add(trial)
            _tell(run, trial)

    run.workers.each(write)


def _together(workers: Alone, making: Sequence[Callable[[], T]]) -> list[T]:
    """What all processes make, on all; where one of them fails, all do."""
    return workers.gather(workers.each(lambda: [make() for make in making]))


def _propose(run: _Run, name: str, view: View, count: int) -> list[Proposal]:
    if view.number == 0:
        return [Proposal(run.space.default)]
    warm = list(run.warm)[view.number - 1 : view.number - 1 + count]
    proposals = [Proposal(point) for point in warm]
    if len(proposals) < count:
        proposals += list(run.strategies[name](view, count - len(proposals)))
    if len(proposals) != count:
        raise ConfigError(f"strategy {name!r} proposed {len(proposals)} candidates, {count} were asked for.")
    return proposals


def _trial(run: _Run, name: str, number: int, proposal: Proposal, before: Sequence[Trial]) -> Trial:
    started = time.monotonic()
    name = "default" if number == 0 else "warm" if number <= len(run.warm) else name
    trial = _measured(run, Trial(number, name, proposal.point, "", predicted=proposal.predicted), before)
    return replace(trial, seconds=time.monotonic() - started, elapsed=run.elapsed)


def _measured(run: _Run, trial: Trial, before: Sequence[Trial]) -> Trial:
    try:
        candidate = run.problem.candidate(trial.point)
    except (BudgetError, ConfigError) as error:
        if trial.number == 0:
            raise
        logger.info("trial %d has no candidate: %s", trial.number, error)
        return replace(trial, error=str(error))
    trial = replace(trial, key=candidate.key, costs=dict(candidate.costs), widths=dict(candidate.widths))
    known = next((other for other in before if other.key == candidate.key and other.rows), None)
    if known is not None:
        return replace(trial, rows=known.rows, answered_by=known.number)
    first, windows = min(run.problem.first, run.problem.windows), run.problem.windows
    rows = run.problem.measure(candidate, 0, first if trial.number else windows)
    if trial.number and first < windows and _promising(run, rows, before):
        rows = (*rows, *run.problem.measure(candidate, first, windows))
    return replace(trial, rows=rows)


def _promising(run: _Run, rows: Rows, before: Sequence[Trial]) -> bool:
    """Whether a candidate could still beat the best on the rest of the text."""
    if run.config.pareto is not None:
        return True  # sizes differ, so there is no single best to be behind of
    full = [trial for trial in before if trial.windows >= run.problem.windows]
    best = min(full, key=lambda t: compare(t.rows, before[0].rows, run.problem.logarithmic).value, default=None)
    if best is None or not math.isfinite(mean_value(rows)):
        return best is None
    behind = compare(rows, best.rows, run.problem.logarithmic)
    return not behind.value > PATIENCE * behind.error  # an unknown error stops nothing


def _tell(run: _Run, trial: Trial) -> None:
    if run.live is None or run.workers.rank:
        return
    best = run.journal.best()
    left = run.config.trials - len(run.journal.trials)
    pace = run.elapsed / len(run.journal.trials)
    value = run.journal.estimate(trial).value if trial.rows else math.nan
    best_value = run.journal.estimate(best).value if best is not None else math.nan
    run.live(Progress(trial, run.config.trials, value, best_value, best.number if best else 0, pace * left))


# -- the end ----------------------------------------------------------------------------------------------------------


def finalists(journal: Journal, count: int, pareto: str | None = None) -> list[Trial]:
    """Trial 0 and the best others, each model once.

    Trials that saw all windows come first: an estimate from a few windows may be luck. Models whose objective is not
    finite are left out.

    Args:
        journal ([`Journal`]): with measured trials.
        count (`int`): how many beside trial 0.
        pareto (`str`, *optional*): of the trials that no other beats in objective and this cost, those that span most
            of the front: its two ends always, then those without which most of its area would be lost.
    """
    known = [t for t in journal.measured() if t.number == 0 or math.isfinite(journal.estimate(t).value)]
    most = max(trial.windows for trial in known)
    ranked = sorted(known, key=lambda t: (t.windows < most, journal.estimate(t).value, t.number))
    if pareto is not None:
        points = [(journal.estimate(t).value, cost_axis(t, pareto)) for t in ranked]
        ranked = [t for t, p in zip(ranked, points, strict=True) if not any(_beats(q, p) for q in points)]
    chosen: dict[str, Trial] = {journal.trials[0].key: journal.trials[0]}
    for trial in ranked:
        chosen.setdefault(trial.key, trial)
    first, *others = chosen.values()
    return [first, *(others[:count] if pareto is None else _spread(journal, first, others, max(2, count), pareto))]


def _spread(journal: Journal, first: Trial, others: Sequence[Trial], count: int, cost: str) -> list[Trial]:
    """The trials of a front without those that add least to its area, one after the other, until `count` are left."""
    # Trial 0 is measured anyway: where it stands between others, or at an end, it takes the place of no other.
    place = {t.number: (cost_axis(t, cost), journal.estimate(t).value) for t in (first, *others)}
    line = sorted((t.number for t in others), key=lambda n: place[n])
    if not any(_beats(place[n], place[first.number]) for n in line):
        line = sorted([first.number, *line], key=lambda n: place[n])
    while len(line) - (first.number in line) > count:

        def area(at: int) -> float:
            before, own, after = (place[line[i]] for i in (at - 1, at, at + 1))
            return (after[0] - own[0]) * (before[1] - own[1])

        inner = [at for at in range(1, len(line) - 1) if line[at] != first.number]
        del line[min(inner, key=area)]
    return [trial for trial in others if trial.number in line]


def cost_axis(trial: Trial, cost: str) -> float:
    """A cost as something to minimise: `ratio` and speeds are better when higher."""
    higher = cost == "ratio" or cost.endswith("_per_second")
    return -trial.costs[cost] if higher else trial.costs[cost]


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def front(journal: Journal, cost: str) -> list[tuple[Trial, float]]:
    """The measured front of a Pareto search: finalists that no other beats on fresh text, and their objective there."""
    rows = {final.number: final.rows for final in journal.finals}
    points = {number: (mean_value(own), cost_axis(journal.trials[number], cost)) for number, own in rows.items()}
    best = [n for n, p in points.items() if not any(_beats(q, p) for q in points.values())]
    return [(journal.trials[n], points[n][0]) for n in sorted(best, key=lambda n: points[n][1])]


def _run_finals(run: _Run) -> None:
    journal = run.journal
    decided = journal.event("winner")
    if decided is not None and decided.get("trials") == len(journal.trials):
        return  # a search that ran out of time and goes on chooses again
    if not journal.measured():
        raise JournalError("no trial was measured, so there is nothing to choose from.")
    chosen = finalists(journal, run.config.finalists, run.config.pareto)
    done = {final.number for final in journal.finals}
    start, stop = run.problem.windows, run.problem.windows + run.problem.fresh
    todo = [trial for trial in chosen if trial.number not in done] if stop > start else []
    for chunk in range(0, len(todo), run.workers.count):
        own = todo[chunk : chunk + run.workers.count][run.workers.rank : run.workers.rank + 1]
        finals = _together(run.workers, [partial(_final, run, trial, start, stop) for trial in own])
        run.workers.each(partial(_write_finals, journal, finals))
    if stop > start:
        scored = [(mean_value(final.rows), final.number) for final in journal.finals]
        value, number = min(scored)
    else:
        best = journal.best()
        assert best is not None
        value, number = mean_value(best.rows), best.number
    event = {"number": number, "value": value, "trials": len(journal.trials)}
    run.workers.each(lambda: journal.add_event("winner", event))


def _write_finals(journal: Journal, finals: Sequence[Final]) -> None:
    for final in sorted(finals, key=lambda f: f.number):
        journal.add_final(final)


def _final(run: _Run, trial: Trial, start: int, stop: int) -> Final:
    return Final(trial.number, run.problem.measure(run.problem.candidate(trial.point), start, stop))
