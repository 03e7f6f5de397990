"""The words of a search: what a problem makes of a point, and what a strategy may look at."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..search_config import SearchConfig
from ..workers import Alone
from .journal import Rows, Trial, compare
from .space import Point, Space

__all__ = ["Candidate", "Problem", "Proposal", "Slot", "Strategy", "View", "cost_axis"]


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
    """What is searched: from points to measurements.

    Attributes:
        first (`int`): windows that every trial sees; they count from 0.
        windows (`int`): windows that a promising one sees.
        fresh (`int`): windows after these, for the last measurement.
        batch (`int`): windows that run together: cut elsewhere, their numbers may differ in the last bit.
        logarithmic (`bool`): whether values are compared by their logarithms.
        slots (`tuple[Slot, ...]`): sites, for strategies that refine an allocation.
    """

    first: int
    windows: int
    fresh: int
    batch: int
    logarithmic: bool
    slots: tuple[Slot, ...]

    def candidate(self, point: Mapping[str, Any]) -> Candidate:
        """The candidate of a point; raises BudgetError or ConfigError where there is none."""

    def measure(self, candidate: Candidate, start: int, stop: int) -> Rows:
        """Measure windows `[start, stop)`."""

    def prepare(self, points: Sequence[Mapping[str, Any]], workers: Alone) -> None:
        """Compute what several candidates need, each process its share; called where there are several processes."""


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
            if trial.windows == most and math.isfinite(value)
        ]
        return min(full)[2] if full else None


Strategy = Callable[[View, int], Sequence[Proposal]]


def cost_axis(trial: Trial, cost: str) -> float:
    """A cost as something to minimise: `ratio` and speeds are better when higher."""
    higher = cost == "ratio" or cost.endswith("_per_second")
    return -trial.costs[cost] if higher else trial.costs[cost]
