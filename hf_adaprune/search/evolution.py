"""Evolution of allocations by swaps that keep the budget, in the manner of DarwinLM (2502.07780) and EvoPress.

That candidates see few tokens first and survivors more is the loop's doing, for every strategy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .problem import Proposal, View
from .shares import LARGEST, Pair, Sharing, pairs_of, sharing_of

__all__ = ["propose_evolution"]

PARENTS = 3
ATTEMPTS = 64
# Offspring spend at least this part of the budget elsewhere than any trial: rounding to multiples may undo less.
NEAREST = 0.003
# Sizes stay where they are while one offspring in ten is the best so far. One in five, as for smooth objectives, lets
# noise shrink them too soon (measured on a made-up model of 60 sites).
GROWTH = 1.4
SHRINKS = GROWTH ** (-1 / 9)
LEAST = 0.05


def propose_evolution(view: View, count: int) -> Sequence[Proposal]:
    """Offspring of the best allocations so far, by one to three swaps of parameters between sites.

    Elitist: parents are the best distinct trials that share the base's data, metrics and repair, whoever proposed them;
    each twice as likely as the next. How much a swap moves at most follows the successes so far (one in ten keeps it).
    No offspring is an earlier trial again.

    Args:
        view ([`View`]): what is known.
        count (`int`): how many to propose.

    Raises:
        ConfigError: nothing to share, see [`sharing_of`].
    """
    sharing = sharing_of(view)
    pairs = pairs_of(view.trials, sharing, view.logarithmic)
    parents = _parents(sharing, pairs)
    largest = _largest(sharing, pairs)
    tried = [pair.shares for pair in pairs]
    proposals = []
    for number in range(view.number, view.number + count):
        generator = np.random.default_rng([view.seed, number, 1])
        for attempt in range(ATTEMPTS):
            rank = min(int(generator.geometric(0.5)) - 1, len(parents) - 1)
            child = parents[rank]
            # Coarse sites alone have few neighbours, so later attempts go further.
            for _ in range(1 + attempt // 16):
                child = sharing.swapped(child[None], generator, largest)[0]
            if _is_new(sharing, child, np.array(tried)):
                break
        tried.append(child)
        proposals.append(Proposal(sharing.point(child)))
    return proposals


def _is_new(sharing: Sharing, child: np.ndarray, tried: np.ndarray) -> bool:
    # The allocation may round channels by one otherwise than the vector says, groups never.
    units = np.abs(tried - child) * sharing.units >= np.where(sharing.coarse, 0.5, 1.5)
    return bool((units.any(1) & (sharing.distance(tried, child) >= NEAREST)).all())


def _parents(sharing: Sharing, pairs: Sequence[Pair]) -> list[np.ndarray]:
    """The best distinct vectors, settled on the budget; those that saw all windows first, as among finalists."""
    found: dict[tuple[int, ...], np.ndarray] = {}
    for pair in sorted(pairs, key=lambda p: (p.weight < 1, p.value, p.trial.number)):
        if len(found) < PARENTS:
            found.setdefault(sharing.widths(pair.shares), sharing.settle(pair.shares[None])[0])
    return list(found.values()) or [sharing.settle(sharing.shares(sharing.base.widths)[None])[0]]


def _largest(sharing: Sharing, pairs: Sequence[Pair]) -> float:
    """How much of a place a swap moves at most, after the successes of this strategy's trials."""
    best, size = math.inf, LARGEST
    for pair in sorted(pairs, key=lambda p: p.trial.number):
        success = pair.weight == 1 and pair.value < best
        if pair.trial.number >= sharing.first:
            size = min(LARGEST, max(LEAST, size * (GROWTH if success else SHRINKS)))
        best = pair.value if success else best
    return size
