"""How a candidate shares its budget over the sites, as vectors, for the strategies that refine an allocation.

A vector has one entry per slot: the share of its units that goes. KV groups, query heads and experts are coarse, a few
units a site: in a vector they are whole units, and the channels make up the rest of the budget, as the allocation does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import ConfigError
from .journal import Trial, compare
from .problem import Slot, View
from .space import Point

__all__ = ["Pair", "Sharing", "alike", "pairs_of", "sharing_of"]

# Experts come in hundreds at most, their channels in hundreds at least; heads are always few.
MOST_EXPERTS = 256
# Asked for as 1.25 groups of 3, a group goes whatever a hair below 1 the allocation's common factor is.
SLACK = 0.25
# DarwinLM moves levels of a tenth; which size pays is not known before, so it is drawn over a wide range.
SMALLEST, LARGEST = 0.01, 0.25
MOST_SWAPS = 3
# Trials of a Pareto search prune differently much; those this near to trial 0 in the ratio are compared with it.
SAME_RATIO = 0.02


@dataclass(frozen=True)
class Pair:
    """A measured allocation.

    Args:
        trial ([`Trial`]): it.
        shares (`np.ndarray`): share of its units that every slot really lost, `[slots]`.
        value (`float`): difference to trial 0.
        weight (`float`): windows it was measured on, relative to the most that any was.
    """

    trial: Trial
    shares: np.ndarray
    value: float
    weight: float


@dataclass(frozen=True, eq=False)
class Sharing:
    """One budget, and the sites that share it.

    Args:
        slots (`tuple[Slot, ...]`): the sites.
        base ([`Trial`]): whose data, metrics and repair every proposal keeps.
        first (`int`): number of the first trial that refines it.
        removed (`float`): parameters that go, as the base's widths count them.
    """

    slots: tuple[Slot, ...]
    base: Trial
    first: int
    removed: float

    @cached_property
    def units(self) -> np.ndarray:
        """Units of every slot, `[slots]`."""
        return np.array([slot.units for slot in self.slots], dtype=float)

    @cached_property
    def sizes(self) -> np.ndarray:
        """Parameters of every slot, `[slots]`."""
        return np.array([slot.units * slot.cost for slot in self.slots], dtype=float)

    @cached_property
    def coarse(self) -> np.ndarray:
        """Slots that lose whole groups, heads or experts, `[slots]`."""
        return np.array(
            [s.kind == "attention" or (s.kind == "experts" and s.units <= MOST_EXPERTS) for s in self.slots]
        )

    @cached_property
    def most(self) -> np.ndarray:
        """The largest share that leaves a unit in every slot, `[slots]`."""
        return 1 - 1 / self.units

    @cached_property
    def kinds(self) -> list[np.ndarray]:
        """Slots of every kind in the order of their layers."""
        kinds = list(dict.fromkeys(slot.kind for slot in self.slots))
        orders = [sorted((s.layer, i) for i, s in enumerate(self.slots) if s.kind == kind) for kind in kinds]
        return [np.array([index for _, index in order]) for order in orders]

    def blocks(self, size: int) -> list[np.ndarray]:
        """Adjacent layers that share one ratio, attention and MLPs apart; shallow models keep four blocks at least."""
        found = []
        for order in self.kinds:
            own = min(size, max(1, len(order) // 4))
            found += [order[start : start + own] for start in range(0, len(order), own)]
        return found

    def shares(self, widths: Mapping[str, int]) -> np.ndarray:
        """The vector of a candidate's widths; sites not named lose nothing."""
        kept = np.array([widths.get(slot.name, slot.units) for slot in self.slots], dtype=float)
        return 1 - kept / self.units

    def widths(self, shares: np.ndarray) -> tuple[int, ...]:
        """Units kept by slot, as far as a vector says: multiples of channels are the allocation's to keep."""
        return tuple(int(entry) for entry in np.rint(self.units * (1 - shares)))

    def distance(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Which part of the budget two vectors spend elsewhere."""
        return np.abs(one - other) @ self.sizes / (2 * self.removed)

    def settle(self, shares: np.ndarray) -> np.ndarray:
        """Vectors that meet the budget: coarse slots rounded down to whole units, the others scaled by one factor.

        Args:
            shares (`np.ndarray`): wanted, `[vectors, slots]`.
        """
        settled = np.clip(shares, 0.0, self.most)
        settled[:, self.coarse] = np.floor(settled * self.units + 1e-6)[:, self.coarse] / self.units[self.coarse]
        fine = ~self.coarse
        whole = settled[:, self.coarse] @ self.sizes[self.coarse]
        room = float((self.sizes * self.most)[fine].sum())
        for row in np.flatnonzero((whole > self.removed) | (whole + room < self.removed)):
            self._balance(settled[row], room)
        if not fine.any():
            return settled
        own, sizes, most = settled[:, fine], self.sizes[fine], self.most[fine]
        need = self.removed - settled[:, self.coarse] @ self.sizes[self.coarse]
        own[own.sum(1) <= 0] = 1e-3  # nothing to scale, so all alike
        for _ in range(8):
            free = own < most
            rest = need - (own * ~free) @ sizes
            factor = rest / np.maximum((own * free) @ sizes, 1e-9)
            own = np.where(free, np.minimum(own * factor[:, None], most), own)
        settled[:, fine] = own
        return settled

    def _balance(self, shares: np.ndarray, room: float) -> None:
        """Move coarse slots by whole units, in place, until the others, with their `room`, can make up the rest."""
        index = np.flatnonzero(self.coarse)
        unit = self.sizes / self.units
        total = float(shares[index] @ self.sizes[index])
        while total > self.removed and (shares[index] > 0).any():
            highest = index[np.argmax(shares[index])]
            if not room and total - unit[highest] < self.removed:
                return  # no channels: one group too many meets the budget, one too few does not
            shares[highest] = max(0.0, shares[highest] - 1 / self.units[highest])
            total -= unit[highest]
        while total + room < self.removed:
            below = index[shares[index] < self.most[index] - 1e-9]
            if not len(below):
                return
            lowest = below[np.argmin(shares[below])]
            shares[lowest] += 1 / self.units[lowest]
            total += unit[lowest]

    def point(self, shares: np.ndarray) -> Point:
        """The base's point with a vector as its allocation.

        The allocation scales all ratios by the factor that would meet the budget if nothing were rounded, and then
        rounds coarse slots down. So these ask for a quarter of a unit more, the others for as much less in all: the
        factor is 1 and the rounding gives the vector's own units.
        """
        cost = self.sizes / self.units
        gone = self.coarse & (shares > 0)
        channels = float((shares * self.sizes)[~self.coarse].sum())
        extra = SLACK * float(cost[gone].sum())
        slack = SLACK * min(1.0, channels / (2 * extra)) if extra and channels else SLACK
        fine = max(0.0, 1 - slack / SLACK * extra / channels) if channels else 0.0
        asked = np.where(self.coarse, shares + gone * slack / self.units, shares * fine)
        ratios = {slot.name: round(min(1.0, float(a)), 6) for slot, a in zip(self.slots, asked, strict=True)}
        ratios = {name: ratio for name, ratio in ratios.items() if ratio > 0}
        return {**self.base.point, "allocation.method": "ratios", "allocation.ratios": ratios}

    def swapped(self, parents: np.ndarray, generator: np.random.Generator, largest: float = LARGEST) -> np.ndarray:
        """Neighbours: one to three times some parameters of one place go in exchange for as many of another.

        DarwinLM's mutation (2502.07780) with swaps of any size, from 1 % of a site on, since channels have no levels
        here. A place is a site, or neighbouring ones of its kind, up to a quarter of the depth: one site of sixty
        moves the objective by less than its noise.

        Args:
            parents (`np.ndarray`): settled vectors, `[vectors, slots]`; one neighbour of each.
            generator (`np.random.Generator`): where randomness comes from.
            largest (`float`): share of a place that a swap moves at most; coarse places move whole units.
        """
        moved = parents.copy()
        low, high = math.log(SMALLEST), math.log(max(largest, SMALLEST))
        size = max(1, round(math.log2(max(len(order) for order in self.kinds) / 2)))
        for row in moved:
            swaps = int(generator.integers(1, MOST_SWAPS + 1))
            starts = generator.integers(len(self.slots), size=(swaps, 2))
            lengths = 2 ** generator.integers(size, size=(swaps, 2))
            parts = np.exp(generator.uniform(low, high, swaps))
            for (up, down), (rises, falls), part in zip(starts, lengths, parts, strict=True):
                self._exchange(row, self._place(up, rises), self._place(down, falls), float(part))
        return self.settle(moved)

    def _place(self, slot: int, length: int) -> np.ndarray:
        order, start = self._positions[slot]
        return order[start : start + length]

    @cached_property
    def _positions(self) -> dict[int, tuple[np.ndarray, int]]:
        return {int(slot): (order, place) for order in self.kinds for place, slot in enumerate(order)}

    def _exchange(self, shares: np.ndarray, up: np.ndarray, down: np.ndarray, part: float) -> None:
        """Let more of the units in `up` go and fewer of those in `down`, in place; nothing where that cannot be."""
        up = up[shares[up] < self.most[up] - 1e-9]
        down = down[shares[down] > 1e-9]
        if set(up.tolist()) & set(down.tolist()) or not len(up) or not len(down):
            return
        kept = float((self.most - shares)[up] @ self.sizes[up])
        gone = float(shares[down] @ self.sizes[down])
        whole_up, whole_down = bool(self.coarse[up[0]]), bool(self.coarse[down[0]])
        if whole_up or whole_down:
            moving = up if whole_up else down
            amount = float((self.sizes / self.units)[moving].sum())
        else:
            amount = min(part * float(self.sizes[up].sum()), kept, gone)
        # Of two coarse places each moves a unit per site, whatever these cost: settling makes up the difference.
        if (not whole_up and amount > kept + 1e-6) or (not whole_down and amount > gone + 1e-6):
            return
        shares[up] += 1 / self.units[up] if whole_up else (self.most - shares)[up] * amount / kept
        shares[down] -= 1 / self.units[down] if whole_down else shares[down] * amount / gone


def sharing_of(view: View) -> Sharing:
    """The best candidate before a strategy's first own trial, as the base of all it proposes.

    One base for the whole share of a strategy, so that its trials differ in nothing but the allocation.

    Raises:
        ConfigError: fewer than two sites, nothing measured, or a base that removes nothing from them.
    """
    if len(view.slots) < 2:
        raise ConfigError(
            f"the strategies `predictor` and `evolution` share a budget over sites, and {len(view.slots)} may lose "
            "units. Add `channel` or `kv_group` to `units`, protect fewer layers, or use the strategy `gp`."
        )
    first = max(1, view.number - view.done)
    while first < len(view.trials) and view.trials[first].strategy == "warm":
        first += 1
    known = [trial for trial in view.trials[:first] if trial.rows]
    if view.cost is not None and known:
        ratio = known[0].costs.get("ratio", 0.0)
        known = [trial for trial in known if abs(trial.costs.get("ratio", 0.0) - ratio) <= SAME_RATIO]
    most = max((trial.windows for trial in known), default=0)
    rows = view.trials[0].rows if view.trials else ()
    full = [(compare(t.rows, rows, view.logarithmic).value, t.number, t) for t in known if t.windows == most]
    base = min((entry for entry in full if math.isfinite(entry[0])), default=(0.0, 0, None))[2]
    if base is None:
        raise ConfigError(
            "the strategies `predictor` and `evolution` start from a measured candidate, and there is none. Read the "
            "errors of the trials in the journal, or begin with another strategy."
        )
    sharing = Sharing(view.slots, base, first, 1.0)
    removed = float(np.maximum(sharing.shares(base.widths), 0.0) @ sharing.sizes)
    if not removed > 0:
        raise ConfigError(
            f"the strategies `predictor` and `evolution` share out what a candidate removes, and trial {base.number} "
            "removes no units of any site. Set a pruning ratio above 0, or name width units (`channel`, `kv_group`)."
        )
    return Sharing(view.slots, base, first, removed)


def alike(point: Mapping[str, Any]) -> str:
    """A point without its allocation: of points that agree in it, pairs can be compared."""
    rest = {path: value for path, value in point.items() if not path.startswith("allocation.")}
    return json.dumps(rest, sort_keys=True)


def pairs_of(trials: Sequence[Trial], sharing: Sharing, logarithmic: bool) -> list[Pair]:
    """The measured models that differ from the base in their allocation at most, whoever proposed them.

    Each once: a trial that was answered by an earlier one teaches nothing, and would be known to those who hold it out.
    """
    known = [trial for trial in trials if trial.rows]
    own, most = alike(sharing.base.point), max((trial.windows for trial in known), default=0)
    found, seen = [], set[str]()
    for trial in known:
        if trial.widths and trial.key not in seen and alike(trial.point) == own:
            value = compare(trial.rows, known[0].rows, logarithmic).value
            if math.isfinite(value):
                seen.add(trial.key)
                found.append(Pair(trial, sharing.shares(trial.widths), value, trial.windows / most))
    return found
