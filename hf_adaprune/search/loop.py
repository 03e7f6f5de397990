"""The loop of a search: propose, build, measure, write down; then measure the best again on text no trial has seen.

Everything random hangs on the seed and the trial's number, and every proposal on the journal alone, so that a resumed
search goes on to the trials of an uninterrupted one. With several processes all of them walk this loop; the first one
proposes, each measures its share, all hear of every result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ..errors import ConfigError, JournalError
from ..search_config import SearchConfig
from ..workers import Alone
from .journal import Final, Journal, Trial, mean_value
from .measuring import groups, measure_trials, measure_windows
from .problem import Problem, Proposal, Strategy, View, cost_axis
from .space import Point, Space

__all__ = ["Progress", "finalists", "front", "run_search"]

WARM_POINTS = 5


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
    todo = [
        Trial(number, _name(run, name, number), proposals[number - start].point, "",
              predicted=proposals[number - start].predicted)
        for number in range(max(start, len(run.journal.trials)), stop)
    ]  # fmt: skip
    for group in groups(todo, run.workers):
        # In a Pareto search sizes differ, so there is no single best to be behind of.
        always = run.config.pareto is not None
        _write_down(run, measure_trials(run.problem, group, before, run.workers, always=always))


def _name(run: _Run, strategy: str, number: int) -> str:
    return "default" if number == 0 else "warm" if number <= len(run.warm) else strategy


def _write_down(run: _Run, trials: Sequence[Trial]) -> None:
    elapsed = run.workers.share(run.elapsed)
    trials = [replace(trial, elapsed=elapsed) for trial in trials]

    def write() -> None:
        for trial in trials:
            run.journal.add(trial)
            _tell(run, trial)

    run.workers.each(write)


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


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def front(journal: Journal, cost: str, count: int = SearchConfig.finalists) -> list[tuple[Trial, float]]:
    """The measured front of a Pareto search: finalists that no other beats on fresh text, and their objective there.

    A model whose objective is not finite there is not on it. Where nothing is fresh, as for a function of the
    caller's, they are compared by what they measured as trials.

    Args:
        journal ([`Journal`]): with its finalists measured, if there is something fresh.
        cost (`str`): of the search.
        count (`int`, *optional*, defaults to 4): finalists of the search.
    """
    rows = {final.number: final.rows for final in journal.finals}
    rows = rows or {trial.number: trial.rows for trial in finalists(journal, count, cost)}
    points = {number: (mean_value(own), cost_axis(journal.trials[number], cost)) for number, own in rows.items()}
    points = {number: point for number, point in points.items() if math.isfinite(point[0])}
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
    for group in groups(todo, run.workers):
        finals = measure_windows(run.problem, group, start, stop, run.workers)
        run.workers.each(partial(_write_finals, journal, finals))
    if stop > start:
        scored = [(mean_value(final.rows), final.number) for final in journal.finals]
        value, number = min(scored, key=_finite_first)
    else:
        best = journal.best()
        assert best is not None
        value, number = mean_value(best.rows), best.number
    event = {"number": number, "value": value, "trials": len(journal.trials)}
    run.workers.each(lambda: journal.add_event("winner", event))


def _finite_first(scored: tuple[float, int]) -> tuple[bool, float, int]:
    """NaN sorts nowhere by itself, and -inf would win; where nothing is finite, trial 0 does."""
    value, number = scored
    return (False, value, number) if math.isfinite(value) else (True, 0.0, number)


def _write_finals(journal: Journal, finals: Sequence[Final]) -> None:
    for final in finals:
        journal.add_final(final)
