"""Allocation by an accuracy predictor: boosted trees from shares per site to the objective (2309.09507).

First pairs of an allocation and its objective are measured, then trees learn them, the space is narrowed by what they
find important, and the best of many allocations by their word are really measured, which teaches them more.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .journal import Trial
from .problem import Proposal, Slot, View
from .shares import Pair, Sharing, alike, pairs_of, sharing_of

__all__ = ["predictor_importance", "predictor_quality", "propose_predictor"]

# Part of the trials that only gather pairs, and how few pairs are too few to learn from.
SAMPLING, FEWEST = 0.7, 8
# 400 of the paper's 525 pairs tie four adjacent layers; ratios are 0.1 to 0.5, 0.3 on average.
TIED, UNTIED = 4, 125 / 525
LOW, HIGH = 0.1 / 0.3, 0.5 / 0.3
# Unimportant sites may be cut up to 0.7, section 3.3 there.
WIDENED = 0.7 / 0.3
VECTORS = 10_000
# Few steps: on a made-up model, 25 of them ended where the trees promised much more than was measured.
CLIMBERS, STEPS, NEIGHBOURS = 6, 5, 24
CAUTION = 1.0
# A proposal spends at least this part of the budget elsewhere than any trial: nearer ones, trees cannot tell apart.
APART = 0.02
FOLDS = 5


def propose_predictor(view: View, count: int) -> Sequence[Proposal]:
    """Pairs first, then the best allocations by the word of a predictor that was trained on them.

    Args:
        view ([`View`]): what is known.
        count (`int`): how many to propose.

    Raises:
        ConfigError: nothing to share, see [`sharing_of`].
    """
    sharing = sharing_of(view)
    pairs = pairs_of(view.trials, sharing, view.logarithmic)
    sampling = round(SAMPLING * view.share) if len(pairs) >= FEWEST else view.share
    taken = [pair.shares for pair in pairs]
    ranked: list[tuple[np.ndarray, float]] | None = None
    spread = math.nan
    proposals = []
    for number in range(view.number, view.number + count):
        chosen = None
        if view.done + number - view.number >= sampling:
            if ranked is None:
                ranked, spread = _ranked(view, sharing, pairs)
            chosen = next((entry for entry in ranked if _is_new(sharing, entry[0], taken)), None)
        generator = np.random.default_rng([view.seed, number, 2])
        shares = _sampled(sharing, generator, number % 2 == 0) if chosen is None else chosen[0]
        taken.append(shares)
        proposals.append(Proposal(sharing.point(shares), None if chosen is None else (chosen[1], spread)))
    return proposals


def predictor_quality(
    trials: Sequence[Trial], slots: Sequence[Slot], *, logarithmic: bool = True, seed: int = 0
) -> dict[str, float]:
    """How well the predictor tells pairs that it has not seen: five-fold, on the largest set of comparable trials.

    Args:
        trials (`Sequence[Trial]`): of a journal.
        slots (`Sequence[Slot]`): sites of the model.
        logarithmic (`bool`): whether objectives are compared by logarithms.
        seed (`int`): of the folds and the trees.

    Returns:
        `dict[str, float]`: `pairs`, and on held-out pairs `r2`, `rmse` (of the difference to trial 0) and `spearman`
        (the correlation of ranks); NaN where there are fewer than eight pairs, and the R2 where they do not differ.
        The paper reports an R2 of 0.80.
    """
    sharing, pairs = _comparable(trials, slots, logarithmic)
    if sharing is None or len(pairs) < FEWEST:
        return {"pairs": len(pairs), "r2": math.nan, "rmse": math.nan, "spearman": math.nan}
    values = np.array([pair.value for pair in pairs])
    told, _ = _held_out(sharing, pairs, seed)
    squared, spread = float(np.mean((values - told) ** 2)), float(values.var())
    differ = spread > np.finfo(float).eps * float(np.mean(values**2))  # beyond what rounding makes of equal ones
    return {
        "pairs": len(pairs),
        "r2": 1 - squared / spread if differ else math.nan,
        "rmse": math.sqrt(squared),
        "spearman": _spearman(values, told),
    }


def predictor_importance(
    trials: Sequence[Trial], slots: Sequence[Slot], *, logarithmic: bool = True, seed: int = 0
) -> dict[str, float]:
    """What trees trained on the largest set of comparable trials find important.

    Args:
        trials (`Sequence[Trial]`): of a journal.
        slots (`Sequence[Slot]`): sites of the model.
        logarithmic (`bool`): whether objectives are compared by logarithms.
        seed (`int`): of the trees.

    Returns:
        `dict[str, float]`: by site its share of the importance (the shares add up to 1); empty where there are fewer
        than eight pairs.
    """
    sharing, pairs = _comparable(trials, slots, logarithmic)
    if sharing is None or len(pairs) < FEWEST:
        return {}
    found = _importance(sharing, _fitted(sharing, pairs, seed))
    total = float(found.sum()) or 1.0
    return {slot.name: float(share) / total for slot, share in zip(slots, found, strict=True)}


def _comparable(trials: Sequence[Trial], slots: Sequence[Slot], logarithmic: bool) -> tuple[Sharing | None, list[Pair]]:
    """The largest set of trials that differ in their allocation at most; no sharing where there is nothing to share."""
    known = [trial for trial in trials if trial.rows and trial.widths]
    sets = Counter(alike(trial.point) for trial in known)
    if not sets or len(slots) < 2:
        return None, []
    largest = sets.most_common(1)[0][0]
    base = next(trial for trial in known if alike(trial.point) == largest)
    sharing = Sharing(tuple(slots), base, 0, 1.0)
    return sharing, pairs_of(trials, sharing, logarithmic)


def _spearman(one: np.ndarray, other: np.ndarray) -> float:
    from scipy.stats import rankdata

    one, other = rankdata(one), rankdata(other)
    spread = float(one.std() * other.std())
    return float(np.mean((one - one.mean()) * (other - other.mean()))) / spread if spread else 0.0


# -- pairs ------------------------------------------------------------------------------------------------------------


def _sampled(sharing: Sharing, generator: np.random.Generator, near: bool) -> np.ndarray:
    """A random allocation: around the base's own (`near`), or uniform over the paper's range around the budget."""
    size = 1 if generator.random() < UNTIED else TIED
    mean = sharing.removed / float(sharing.sizes.sum())
    base = sharing.shares(sharing.base.widths)
    wanted = np.empty(len(sharing.slots))
    for block in sharing.blocks(size):
        # One draw for all of a block, so that coarse slots round alike too.
        draw, rounding = generator.normal() if near else generator.uniform(LOW, HIGH), generator.random()
        wanted[block] = (base[block] + 0.1 * mean) * math.exp(0.5 * draw) - 0.1 * mean if near else mean * draw
        own = block[sharing.coarse[block]]
        # Down or up at random: rounded down, three groups at a ratio of 0.2 would never lose one.
        steps = base[own] * sharing.units[own] + 0.6 * draw if near else wanted[own] * sharing.units[own]
        wanted[own] = np.floor(np.maximum(steps, 0.0) + rounding) / sharing.units[own]
    settled: np.ndarray = sharing.settle(wanted[None])[0]
    return settled


def _is_new(sharing: Sharing, shares: np.ndarray, taken: Sequence[np.ndarray]) -> bool:
    return bool((sharing.distance(np.array(taken), shares) >= APART).all())


# -- trees ------------------------------------------------------------------------------------------------------------


def _features(sharing: Sharing, shares: np.ndarray) -> np.ndarray:
    """Shares per slot, means of tied blocks, shares of attention and of the rest, and of all: `[vectors, features]`."""
    blocks = [block for block in sharing.blocks(TIED) if len(block) > 1]
    columns = [shares]
    if blocks:
        columns.append(np.stack([shares[:, block].mean(1) for block in blocks], 1))
    for mask in (sharing.coarse, ~sharing.coarse, np.ones(len(sharing.slots), dtype=bool)):
        columns.append(shares[:, mask] @ sharing.sizes[mask, None] / sharing.sizes.sum())
    return np.concatenate(columns, 1)


@dataclass(frozen=True)
class _Trees:
    """Boosted trees, and the unit in which they count.

    Args:
        model (`GradientBoostingRegressor`): fitted.
        unit (`float`): of its answers.
    """

    model: Any
    unit: float

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Differences to trial 0, `[vectors]`."""
        told: np.ndarray = self.model.predict(features) * self.unit
        return told


def _fitted(sharing: Sharing, pairs: Sequence[Pair], seed: int) -> _Trees:
    from sklearn.ensemble import GradientBoostingRegressor

    model = GradientBoostingRegressor(
        n_estimators=100, learning_rate=0.1, max_depth=3, min_samples_leaf=3, subsample=0.7, max_features=0.4,
        random_state=seed % 2**32,
    )  # fmt: skip
    shares = np.array([pair.shares for pair in pairs])
    weights = np.array([pair.weight for pair in pairs])
    values = np.array([pair.value for pair in pairs])
    # scikit-learn splits no node whose variance is below 2e-16, whatever the scale. A power of two rounds nothing.
    unit = math.ldexp(1.0, math.frexp(float(values.std()))[1])
    return _Trees(model.fit(_features(sharing, shares), values / unit, sample_weight=weights), unit)


def _held_out(sharing: Sharing, pairs: Sequence[Pair], seed: int) -> tuple[np.ndarray, list[_Trees]]:
    """What trees that have not seen a pair tell of it, for every pair; and the trees of all folds."""
    order = np.random.default_rng([seed, 3]).permutation(len(pairs))
    told, models = np.empty(len(pairs)), []
    for fold in range(FOLDS):
        held = order[fold::FOLDS]
        models.append(_fitted(sharing, [pairs[i] for i in np.setdiff1d(order, held)], seed))
        told[held] = models[-1].predict(_features(sharing, np.array([pairs[i].shares for i in held])))
    return told, models


def _told(sharing: Sharing, models: Sequence[_Trees], shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the trees of all folds tell on average, and that raised by where they disagree, `[vectors]` each.

    A search for what one set of trees likes best finds its errors; those of other folds are others.
    """
    features = _features(sharing, shares)
    each = np.stack([model.predict(features) for model in models])
    return each.mean(0), each.mean(0) + CAUTION * each.std(0)


def _importance(sharing: Sharing, trees: _Trees) -> np.ndarray:
    """Importance of every slot, `[slots]`: its own, and its part of its block's."""
    known = trees.model.feature_importances_
    found = known[: len(sharing.slots)].copy()
    blocks = [block for block in sharing.blocks(TIED) if len(block) > 1]
    for number, block in enumerate(blocks):
        found[block] += known[len(sharing.slots) + number] / len(block)
    importance: np.ndarray = found
    return importance


def _narrowed(sharing: Sharing, pairs: Sequence[Pair], importance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest share of every slot worth looking at, `[slots]` each.

    The range of the best quarter of all pairs. The least important third of the slots may be cut harder than any of
    these was, the most important third less hard than most (section 3.3 of the paper does it by hand).
    """
    best = sorted(pairs, key=lambda pair: (pair.value, pair.trial.number))[: max(FEWEST // 2, len(pairs) // 4)]
    shares = np.array([pair.shares for pair in best])
    mean = sharing.removed / float(sharing.sizes.sum())
    low, high = shares.min(0), shares.max(0)
    lower, upper = np.quantile(importance, (1 / 3, 2 / 3))
    high = np.where(importance <= lower, np.maximum(high, WIDENED * mean), high)
    low = np.where(importance >= upper, low / 2, low)
    high = np.where(importance >= upper, np.quantile(shares, 0.75, axis=0), high)
    return low, np.maximum(high, low)


def _ranked(view: View, sharing: Sharing, pairs: Sequence[Pair]) -> tuple[list[tuple[np.ndarray, float]], float]:
    """The best allocations by the predictor's word, best first, and its error on pairs that it has not seen."""
    held_out, models = _held_out(sharing, pairs, view.seed)
    values = np.array([pair.value for pair in pairs])
    spread = math.sqrt(float(np.mean((values - held_out) ** 2)))
    generator = np.random.default_rng([view.seed, view.number, 4])
    importance = np.mean([_importance(sharing, model) for model in models], axis=0)
    vectors = _random_vectors(sharing, generator, *_narrowed(sharing, pairs, importance))
    order = np.argsort(_told(sharing, models, vectors)[1], kind="stable")[: 20 * CLIMBERS]
    measured = sorted(pairs, key=lambda pair: (pair.value, pair.trial.number))[:CLIMBERS]
    starts = [*sharing.settle(np.array([pair.shares for pair in measured])), *vectors[order[:CLIMBERS]]]
    found = np.concatenate([_climbed(sharing, models, generator, np.array(starts)), vectors[order]])
    told, careful = _told(sharing, models, found)
    ranking = np.argsort(careful, kind="stable")
    return [(found[index], float(told[index])) for index in ranking], spread


def _random_vectors(sharing: Sharing, generator: np.random.Generator, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Vectors from the narrowed space, one half with adjacent layers tied, on the budget: `[vectors, slots]`."""
    draws = generator.random((VECTORS, len(sharing.slots)))
    rounding = generator.random((VECTORS, len(sharing.slots)))
    half = VECTORS // 2
    for block in sharing.blocks(TIED):
        draws[:half, block] = draws[:half, block[:1]]
        rounding[:half, block] = rounding[:half, block[:1]]
    wanted = low + draws * (high - low)
    whole = np.floor(wanted * sharing.units + rounding) / sharing.units
    return sharing.settle(np.where(sharing.coarse, whole, wanted))


def _climbed(
    sharing: Sharing, models: Sequence[_Trees], generator: np.random.Generator, starts: np.ndarray
) -> np.ndarray:
    """Hill climbing on the predictor by swaps: all vectors on the ways, `[vectors, slots]`."""
    current, told = starts, _told(sharing, models, starts)[1]
    passed = [current]
    for _ in range(STEPS):
        near = sharing.swapped(np.repeat(current, NEIGHBOURS, axis=0), generator)
        found = _told(sharing, models, near)[1].reshape(len(current), NEIGHBOURS)
        near = near.reshape(len(current), NEIGHBOURS, -1)
        best, rows = found.argmin(1), np.arange(len(current))
        better = found[rows, best] < told
        if not better.any():
            break
        current = np.where(better[:, None], near[rows, best], current)
        told = np.where(better, found[rows, best], told)
        passed.append(current)
    return np.concatenate(passed)
