"""Trials are measured: one after the other here, and by several processes in shares that take about as long.

Between two meetings every process begins its share of a few candidates on the first windows. Those that are still
promising then see the rest of the text, divided anew: candidate by candidate as far as they go round, and what is left
window by window, where that is sooner. Numbers are those of one process, because windows that run together stay
together.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TypeVar

from ..errors import BudgetError, ConfigError
from ..workers import Alone
from .journal import Final, Rows, Trial, compare, mean_value
from .problem import Candidate, Problem

__all__ = ["groups", "measure_trials", "measure_windows"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

# A candidate sees the rest of the text unless it is behind the best by more than so many standard errors of the paired
# difference on the first windows.
PATIENCE = 1.0
# Trials of a process between two meetings: more even out better, are lost when the run is killed, and have their
# repairs in memory together while they are promising. One process writes down every trial.
TOGETHER = 4

Piece = tuple[int, int, int]  # which of the candidates, and its windows `[start, stop)`


def groups(trials: Sequence[Trial], workers: Alone) -> Iterator[Sequence[Trial]]:
    """Trials that are measured between two meetings of the processes, and written down together.

    Args:
        trials (sequence of [`Trial`]): in their order.
        workers ([`Alone`]): the processes.
    """
    size = 1 if workers.count == 1 else TOGETHER * workers.count
    for start in range(0, len(trials), size):
        yield trials[start : start + size]


def measure_trials(
    problem: Problem, trials: Sequence[Trial], before: Sequence[Trial], workers: Alone, *, always: bool = False
) -> list[Trial]:
    """Build and measure candidates.

    Args:
        problem ([`Problem`]): what is searched.
        trials (sequence of [`Trial`]): with their points; trial 0 sees all windows.
        before (sequence of [`Trial`]): measured ones, by which a candidate is promising or not, or known already.
        workers ([`Alone`]): the processes; all of them call this.
        always (`bool`, *optional*, defaults to `False`): every candidate sees all windows.

    Returns:
        `list[Trial]`: in the same order, on all processes.

    Raises:
        BudgetError, ConfigError: trial 0 has no candidate, or its objective is not finite. Any other says so in its
            `error`, or never wins.
    """
    if workers.count > 1:
        problem.prepare([trial.point for trial in trials], workers)
    built: dict[int, Candidate] = {}
    mine = range(workers.rank, len(trials), workers.count)
    begun = _together(
        workers, [partial(_begin, problem, trials[index], before, always, built, index) for index in mine]
    )
    ordered = [begun[index] for index in _places(len(trials), workers.count)]
    going = [index for index, trial in enumerate(ordered) if _goes_on(problem, trial, before, always)]
    starts = {index: _first(problem) if trials[index].number else 0 for index in going}
    rest = _measured(problem, trials, built, starts, problem.windows, workers)
    found = []
    for index, trial in enumerate(ordered):
        rows, seconds = rest.get(index, ((), 0.0))
        found.append(replace(trial, rows=(*trial.rows, *rows), seconds=trial.seconds + seconds))
    for trial in found:
        if trial.number == 0 and not math.isfinite(value := mean_value(trial.rows)):
            raise ConfigError(
                f"the objective of trial 0, the config itself, is {value:g}, and no other can be compared with it. See "
                "that the objective is finite for the dense model, prune less, or load the model in a wider dtype."
            )
    return found


def measure_windows(problem: Problem, trials: Sequence[Trial], start: int, stop: int, workers: Alone) -> list[Final]:
    """Measure candidates again, on windows `[start, stop)`.

    Args:
        problem ([`Problem`]): what is searched.
        trials (sequence of [`Trial`]): with their points.
        start (`int`): the first window.
        stop (`int`): the window after the last.
        workers ([`Alone`]): the processes; all of them call this.
    """
    if workers.count > 1:
        problem.prepare([trial.point for trial in trials], workers)
    rest = _measured(problem, trials, {}, dict.fromkeys(range(len(trials)), start), stop, workers)
    return [Final(trial.number, rest[index][0]) for index, trial in enumerate(trials)]


def _measured(
    problem: Problem,
    trials: Sequence[Trial],
    built: dict[int, Candidate],
    starts: dict[int, int],
    stop: int,
    workers: Alone,
) -> dict[int, tuple[Rows, float]]:
    """Rows of windows `[start, stop)` of some of the trials, and seconds, on all processes."""
    pieces = divide(starts, stop, problem, workers.count)
    found = _together(workers, [partial(_measure, problem, trials, built, piece) for piece in pieces[workers.rank]])
    whole: dict[int, tuple[Rows, float]] = {}
    for (index, *_), rows, seconds in sorted(found, key=lambda own: own[0]):
        before, spent = whole.get(index, ((), 0.0))
        whole[index] = ((*before, *rows), spent + seconds)
    return whole


def divide(starts: dict[int, int], stop: int, problem: Problem, count: int) -> list[list[Piece]]:
    """Shares of the processes: as many whole candidates each as go round, and equal parts of those that are left.

    These are given out whole as well where a process would have no less to do with parts: whoever has a part of a
    candidate makes its plan and repairs anew.

    Args:
        starts (`dict[int, int]`): of the candidates, their first window. One process has begun every `count`-th.
        stop (`int`): the window after the last.
        problem ([`Problem`]): which windows run together.
        count (`int`): processes.
    """
    going = sorted(starts)
    round_trips = len(going) // count
    shares: list[list[Piece]] = [[] for _ in range(count)]
    homeless = []
    for index in going[: round_trips * count]:
        home = shares[index % count]  # who began it has its plan and repairs at hand
        if len(home) < round_trips:
            home.append((index, starts[index], stop))
        else:
            homeless.append(index)
    for index in homeless:
        min(shares, key=len).append((index, starts[index], stop))
    left = going[round_trips * count :]
    for number, index in enumerate(left):
        start = starts[index]
        batches = math.ceil((stop - start) / problem.batch)
        if len(left) * math.ceil(batches / count) >= batches:
            min(shares, key=len).append((index, start, stop))
            continue
        edges = [min(stop, start + problem.batch * round(batches * rank / count)) for rank in range(count + 1)]
        for rank, (own, other) in enumerate(pairwise(edges)):
            if other > own:
                shares[(rank + number) % count].append((index, own, other))
    return shares


def _begin(
    problem: Problem, trial: Trial, before: Sequence[Trial], always: bool, built: dict[int, Candidate], index: int
) -> Trial:
    started = time.monotonic()
    try:
        candidate = problem.candidate(trial.point)
    except (BudgetError, ConfigError) as error:
        if trial.number == 0:
            raise
        logger.info("trial %d has no candidate: %s", trial.number, error)
        return replace(trial, error=str(error), seconds=time.monotonic() - started)
    trial = replace(trial, key=candidate.key, costs=dict(candidate.costs), widths=dict(candidate.widths))
    known = next((other for other in before if other.key == candidate.key and other.rows), None)
    if known is not None:
        trial = replace(trial, rows=known.rows, answered_by=known.number)
    else:
        if trial.number:
            trial = replace(trial, rows=problem.measure(candidate, 0, _first(problem)))
        if _goes_on(problem, trial, before, always):
            built[index] = candidate  # with its repairs, which are large
    return replace(trial, seconds=time.monotonic() - started)


def _measure(
    problem: Problem, trials: Sequence[Trial], built: dict[int, Candidate], piece: Piece
) -> tuple[Piece, Rows, float]:
    started = time.monotonic()
    index, start, stop = piece
    candidate = built.get(index) or problem.candidate(trials[index].point)
    return piece, problem.measure(candidate, start, stop), time.monotonic() - started


def _first(problem: Problem) -> int:
    return min(problem.first, problem.windows)


def _goes_on(problem: Problem, trial: Trial, before: Sequence[Trial], always: bool) -> bool:
    """Whether a candidate that was begun sees the rest of the text."""
    if trial.error or trial.answered_by is not None:
        return False
    if trial.number == 0:
        return True
    return _first(problem) < problem.windows and (always or _promising(problem, trial.rows, before))


def _promising(problem: Problem, rows: Rows, before: Sequence[Trial]) -> bool:
    """Whether a candidate could still beat the best on the rest of the text."""
    seen = [trial for trial in before if trial.windows >= problem.windows]
    values = [compare(trial.rows, before[0].rows, problem.logarithmic).value for trial in seen]
    full = [(value, number) for number, value in enumerate(values) if math.isfinite(value)]
    best = seen[min(full)[1]] if full else None
    if best is None or not math.isfinite(mean_value(rows)):
        return best is None
    behind = compare(rows, best.rows, problem.logarithmic)
    return not behind.value > PATIENCE * behind.error  # an unknown error stops nothing


def _together(workers: Alone, making: Sequence[Callable[[], T]]) -> list[T]:
    """What all processes make, on all; where one of them fails, all do."""
    return workers.gather(workers.each(lambda: [make() for make in making]))


def _places(items: int, count: int) -> list[int]:
    """Where items are among those of all processes, one process after the other, of which each had every n-th."""
    order = [index for rank in range(count) for index in range(rank, items, count)]
    return sorted(range(items), key=order.__getitem__)
