"""Scores, budget and profile become a plan. The budget holds by construction.

Every site offers its units in the order in which they would go; an allocation decides how far down each list to go, in
steps that keep every rule (multiples, floors, protected layers, equal groups). What is removed is at least the target.
It overshoots by less than the largest step (in the uniform form: than one step of every layer), unless a set share of
attention (FLAP's MM structures) alone exceeds the target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch

from .allocation_checks import check_equal_layers, check_not_all_protected, check_nothing_shared, check_whole_parts
from .config import PruningConfig
from .errors import BudgetError, ConfigError
from .importance import Scores
from .offers import Offer, offers_of, protected_layers, target_removal
from .plan import PruningPlan, SitePlan
from .shapes import SHAPES, profile_factor
from .sites import ModelSites

__all__ = ["TargetError", "allocate"]

_FINE = ("channel", "expert_channel")


class TargetError(BudgetError):
    """The rules do not let the target go; `reached` is how many parameters they do, at most."""

    reached: int = 0


class _Step(NamedTuple):
    """One thing that may go in a global ranking, after everything that stands before it in its list."""

    value: float
    offer: int | None = None
    level: int = 0
    layer: int | None = None
    sublayer: str | None = None


def allocate(
    sites: ModelSites,
    scores: Scores,
    config: PruningConfig,
    cosine: torch.Tensor | None = None,
    start: PruningPlan | None = None,
) -> PruningPlan:
    """Decide which units of every site stay.

    Args:
        sites ([`ModelSites`]): the model.
        scores ([`Scores`]): of its units.
        config ([`PruningConfig`]): budget, units, rules and method.
        cosine (`torch.Tensor`, *optional*): mean cosine of every layer's input and output, `[layers]` or
            `[rounds so far, layers]`, for `similarity`.
        start ([`PruningPlan`], *optional*): what an earlier round removed; no site gets any of it back. Its units
            should have the lowest scores.

    Raises:
        BudgetError: the rules do not let enough go; the message says how much they do.
        ConfigError: nothing in the model may go, or the method lacks what it reads.
    """
    target = target_removal(sites, config)
    check_not_all_protected(sites, config)
    offers = offers_of(sites, scores, config, start)
    if config.uniform and offers and config.protected_layers:
        raise ConfigError(
            "`uniform=True` means equal layers, which `protected_layers` contradicts. Leave out one of them."
        )
    if config.uniform:
        check_nothing_shared(config, offers)
        check_equal_layers(offers)
    if config.allocation.method == "global":
        return _global(sites, scores, config, offers, target, start)
    if not offers:
        raise ConfigError(
            f"allocation {config.allocation.method!r} shares widths, but `units` {config.units} leaves none to share. "
            "Add channel or kv_group, or use the method `global`."
        )
    check_whole_parts(config)
    if config.uniform:
        # Equal widths leave a method nothing to share out but the units within a layer.
        return _shaped(sites, config, offers, target, [1.0] * len(offers))
    if config.allocation.method == "flap" and config.allocation.structure == "AL-AM":
        return _global(sites, scores, config, offers, target, start, per_parameter=False)
    if config.allocation.method == "flap" and config.allocation.structure.startswith("AL"):
        return _manual_adaptive(sites, config, offers, target)
    shape = SHAPES[config.allocation.method](sites, config, offers, target, cosine)
    if config.allocation.method == "ratios":
        return _named_first(sites, config, offers, target, shape)
    return _shaped(sites, config, offers, target, shape)


# -- one ranking over the model ---------------------------------------------------------------------------------------


def _weighted(value: float, factor: float) -> float:
    """A score times the profile's factor. Standardised scores may be negative: a factor above 1 raises these too."""
    return value * factor if value > 0 else value / factor


def _global(
    sites: ModelSites,
    scores: Scores,
    config: PruningConfig,
    offers: list[Offer],
    target: int,
    start: PruningPlan | None = None,
    per_parameter: bool = True,
) -> PruningPlan:
    if config.uniform and offers:
        return _shaped(sites, config, offers, target, [1.0] * len(offers))
    factor = profile_factor(sites, config)
    whole = list(_whole_steps(sites, scores, config, factor, per_parameter))
    if not whole and not any(len(offer.levels) > 1 for offer in offers):
        raise ConfigError(f"`units` {config.units} and `protected_layers` leave nothing that may go.")
    scales = {number: factor(offer.site.layer, offer.site.kind) for number, offer in enumerate(offers)}
    return _take(sites, config, _State(sites, offers, start), _ranked(offers, scales, per_parameter, whole), target)


def _ranked(
    offers: list[Offer], scales: Mapping[int, float], per_parameter: bool, whole: Sequence[_Step] = ()
) -> Iterator[_Step]:
    """Steps of the offers named in `scales`, and whole parts, the cheapest first; of equal ones whole parts first.

    Few of the tens of thousands of steps are taken, so a step becomes an object only when its turn comes.
    """
    values = [torch.tensor([step.value for step in whole], dtype=torch.float64)]
    values.extend(_offer_values(offers[number], scale, per_parameter) for number, scale in scales.items())
    order = torch.cat(values).sort(stable=True)
    owners = torch.repeat_interleave(torch.tensor([len(own) for own in values]))
    firsts = torch.tensor([0, *(len(own) for own in values)]).cumsum(0)[:-1]
    positions = order.indices - firsts[owners[order.indices]]
    numbers = [-1, *scales]
    listed = (order.values.tolist(), owners[order.indices].tolist(), positions.tolist())
    for value, owner, position in zip(*listed, strict=True):
        if owner == 0:
            yield whole[position]
        else:
            number = numbers[owner]
            yield _Step(value, offer=number, level=offers[number].levels[position + 1])


def _offer_values(offer: Offer, scale: float, per_parameter: bool) -> torch.Tensor:
    """Price of every step from one level of an offer to the next, `[levels - 1]`, float64."""
    # Only over what can still go: units of earlier rounds carry huge negative scores, which would round the rest away.
    first = offer.levels[0]
    cumulative = torch.cat([torch.zeros(1, dtype=torch.float64), offer.scores[first:].double().cumsum(0)])
    levels = torch.tensor(offer.levels) - first
    counts = levels.diff()
    if not len(counts):
        return torch.zeros(0, dtype=torch.float64)
    value = cumulative[levels[1:]] - cumulative[levels[:-1]]
    value = value / (counts * offer.cost).clamp(min=1) if per_parameter else value / counts
    # A step can only follow the ones before it, so its price is never below theirs.
    return torch.where(value > 0, value * scale, value / scale).cummax(0).values


def _whole_steps(
    sites: ModelSites, scores: Scores, config: PruningConfig, factor: Callable[[int, str], float], per_parameter: bool
) -> Iterator[_Step]:
    protected = protected_layers(sites, config)
    for site in sites:
        kind = "attention" if site.kind == "attention" else "mlp"
        if kind in config.units and site.layer not in protected:
            removes = site.sublayer_parameters
            value = _weighted(scores.sublayers[site.name], factor(site.layer, site.kind))
            yield _Step(value / removes if per_parameter else value, sublayer=site.name)
    if "layer" in config.units:
        sites.check_layers_may_go()
        for layer, removes in enumerate(sites.layer_parameters):
            if layer not in protected:
                value = _weighted(float(scores.layers[layer]), factor(layer, "layer"))
                yield _Step(value / removes if per_parameter else value, layer=layer)


def _take(sites: ModelSites, config: PruningConfig, state: _State, steps: Iterable[_Step], target: int) -> PruningPlan:
    """Take steps, which come cheapest first, until the target is met, then give back what was not needed."""
    taken: list[_Step] = []
    for step in steps:
        if state.removed >= target:
            break
        if state.take(step):
            taken.append(step)
    if state.removed < target:
        raise _unreachable(sites, config, state.removed, target)
    # The last step may overshoot by a whole KV group or layer; steps that became superfluous stay in the model.
    # Backwards, so that of two steps of one list the later one is given back first.
    for step in reversed(taken):
        state.give_back(step, target)
    return state.plan(sites)


class _State:
    """How far down each list an allocation has gone, and how many parameters that removes."""

    def __init__(self, sites: ModelSites, offers: list[Offer], start: PruningPlan | None = None) -> None:
        self.sites, self.offers = sites, offers
        self.levels = [offer.levels[0] for offer in offers]
        self.layers = set(start.dropped_layers) if start is not None else set()
        self.sublayers = {name for name, kept in start.sites.items() if kept.is_empty} if start is not None else set()
        self.removed = self.count()

    def count(self) -> int:
        """Parameters removed, counted anew."""
        total = sum(self.sites.layer_parameters[layer] for layer in self.layers)
        for name in self.sublayers:
            site = self.sites.by_name[name]
            if site.layer not in self.layers:
                total += site.sublayer_parameters
        for offer, level in zip(self.offers, self.levels, strict=True):
            if not self.is_gone(offer):
                total += offer.removed(level)
        return total

    def is_gone(self, offer: Offer) -> bool:
        """Whether the site of an offer is removed as a whole."""
        return offer.site.layer in self.layers or offer.site.name in self.sublayers

    def set_levels(self, levels: Sequence[int]) -> None:
        """Move all lists."""
        self.levels = list(levels)
        self.removed = self.count()

    def set_level(self, number: int, level: int) -> None:
        """Move one list; in time that does not depend on how many there are."""
        offer = self.offers[number]
        if not self.is_gone(offer):
            self.removed += offer.removed(level) - offer.removed(self.levels[number])
        self.levels[number] = level

    def take(self, step: _Step) -> bool:
        """Take a step; False where it would leave no layer or was taken before."""
        if step.offer is not None:
            self.set_level(step.offer, max(self.levels[step.offer], step.level))
            return True
        if step.layer is not None:
            if step.layer in self.layers or len(self.layers) + 1 >= len(self.sites.layers):
                return False
            self.layers.add(step.layer)
        elif step.sublayer is not None:
            if step.sublayer in self.sublayers:
                return False
            self.sublayers.add(step.sublayer)
        self.removed = self.count()
        return True

    def give_back(self, step: _Step, target: int) -> None:
        """Undo a step if the target is met without it."""
        if step.offer is not None:
            level = self.levels[step.offer]
            if level == step.level:
                self.set_level(step.offer, self.offers[step.offer].before(level))
                if self.removed < target:
                    self.set_level(step.offer, level)
            return
        undone: set[Any] = self.layers if step.layer is not None else self.sublayers
        name = step.layer if step.layer is not None else step.sublayer
        undone.discard(name)
        self.removed = self.count()
        if self.removed < target:
            undone.add(name)
            self.removed = self.count()

    def plan(self, sites: ModelSites) -> PruningPlan:
        levels = zip(self.offers, self.levels, strict=True)
        found = {offer.site.name: offer.kept(level) for offer, level in levels if level}
        for name in self.sublayers:
            site = sites.by_name[name]
            found[name] = SitePlan(site.groups, site.group_size, ())
        found = {name: site for name, site in found.items() if sites.by_name[name].layer not in self.layers}
        return PruningPlan(sites.architecture.model_type, len(sites.layers), found, tuple(self.layers))


# -- ratios per layer -------------------------------------------------------------------------------------------------


def _named_first(
    sites: ModelSites, config: PruningConfig, offers: list[Offer], target: int, shape: Sequence[float]
) -> PruningPlan:
    """Offers with a share above 0 in proportion to it; only when these are at their most the others, all alike."""
    named = [number for number, share in enumerate(shape) if share > 0]
    others = [number for number, share in enumerate(shape) if not share > 0]
    if named:
        try:
            return _shaped(sites, config, offers, target, shape, named, nearest=True)
        except TargetError:
            if not others:
                raise
    levels = [offer.most if shape[number] > 0 else offer.levels[0] for number, offer in enumerate(offers)]
    return _shaped(sites, config, offers, target, [1.0] * len(offers), others, levels)


def _shaped(
    sites: ModelSites,
    config: PruningConfig,
    offers: list[Offer],
    target: int,
    shape: Sequence[float],
    movable: Sequence[int] | None = None,
    fixed: list[int] | None = None,
    nearest: bool = False,
) -> PruningPlan:
    """Scale a shape until the target is met, rounding every offer to its levels.

    Heads, groups and experts are coarse: they go by the ratio that would meet the target if nothing were rounded,
    rounded down, and the channels make up the rest (as Wanda-sp's `int(0.2 * 3) = 0` groups ask for). The last channels
    to move do so one by one where layers may differ.

    Offers that are not in `movable` (all are, by default) stay at `fixed`, or where they start. With `nearest`, coarse
    ones round to the nearest level, as shares that were asked for by name want; those that were rounded up go back as
    far as the target is met without them.
    """
    movable = range(len(offers)) if movable is None else movable
    fixed = [offer.levels[0] for offer in offers] if fixed is None else fixed
    fine = [number for number in movable if offers[number].unit in _FINE]
    if len(fine) in (0, len(movable)):
        return _scaled(sites, config, offers, target, shape, movable, fixed, nearest).plan(sites)
    coarse = [number for number in movable if number not in fine]
    manual = config.allocation.method == "flap" and config.allocation.structure == "UL-MM"
    still = set(range(len(offers))) - set(movable)
    rest = target - sum(offers[number].removed(fixed[number]) for number in still)
    own = [offers[number] for number in movable]
    factor = config.allocation.attention_ratio or 0.0
    if not manual:
        factor = _continuous_factor(own, [shape[number] for number in movable], rest)
    attempts = 1 if manual else 64
    for attempt in range(attempts):
        levels, raised = list(fixed), dict[int, float]()
        for number in coarse:
            # Every attempt lets more of the coarse units go, the last one all that may.
            share = min(1.0, factor * (1.0 if manual else shape[number]))
            share += (1 - share) * attempt / max(1, attempts - 1)
            wanted = share * offers[number].steps
            levels[number] = offers[number].level(wanted)
            if nearest and offers[number].nearest(wanted) > levels[number]:
                levels[number] = offers[number].nearest(wanted)
                raised[number] = levels[number] - wanted
        if raised:
            state = _State(sites, offers)
            state.set_levels(levels)
            for number in sorted(raised, key=lambda n: (-raised[n], n)):
                state.give_back(_Step(0.0, offer=number, level=levels[number]), target)
            levels = state.levels
        try:
            return _scaled(sites, config, offers, target, shape, fine, levels).plan(sites)
        except BudgetError:
            # The channels alone cannot make up the rest; the last error says how much can go at all.
            if attempt == attempts - 1:
                raise
    raise AssertionError("unreachable: the last attempt returns or raises")


def _continuous_factor(offers: list[Offer], shape: Sequence[float], target: int) -> float:
    low, high = 0.0, max(1.0 / share for share in shape)
    for _ in range(60):
        middle = (low + high) / 2
        removed = sum(
            min(1.0, middle * share) * offer.steps * offer.cost for offer, share in zip(offers, shape, strict=True)
        )
        low, high = (middle, high) if removed < target else (low, middle)
    return high


def _scaled(
    sites: ModelSites,
    config: PruningConfig,
    offers: list[Offer],
    target: int,
    shape: Sequence[float],
    movable: Sequence[int],
    fixed: list[int],
    nearest: bool = False,
) -> _State:
    """Move the offers named in `movable` by one common factor until the target is met; the others stay at `fixed`."""
    state = _State(sites, offers)

    def levels(factor: float) -> list[int]:
        found = list(fixed)
        for number in movable:
            offer = offers[number]
            wanted = min(1.0, factor * shape[number]) * offer.steps
            found[number] = offer.nearest(wanted) if nearest and offer.unit not in _FINE else offer.level(wanted)
        return found

    high = max(1.0 / shape[number] for number in movable)
    state.set_levels(levels(high))
    if state.removed < target:
        raise _unreachable(sites, config, state.removed, target)
    low = 0.0
    for _ in range(80):
        middle = (low + high) / 2
        state.set_levels(levels(middle))
        low, high = (middle, high) if state.removed < target else (low, middle)
    enough = levels(high)
    state.set_levels(enough)
    if config.uniform:
        return state
    # Between the two factors some offers move at the same moment; move them one by one, the cheapest first.
    state.set_levels(levels(low))
    moving = [number for number in movable if enough[number] > state.levels[number]]
    prices = {number: _price(offers[number], state.levels[number], enough[number]) for number in moving}
    for number in sorted(moving, key=lambda n: (prices[n], n)):
        if state.removed >= target:
            break
        state.set_level(number, enough[number])
    return state


def _price(offer: Offer, low: int, high: int) -> float:
    return float(offer.scores[low:high].double().sum()) / max(1, (high - low) * offer.cost)


def _manual_adaptive(sites: ModelSites, config: PruningConfig, offers: list[Offer], target: int) -> PruningPlan:
    """FLAP AL-MM: a set share of all KV groups by one ranking, channels by another for the rest of the budget."""
    attention = [number for number, offer in enumerate(offers) if offer.site.kind == "attention"]
    state = _State(sites, offers)
    wanted = round((config.allocation.attention_ratio or 0.0) * sum(offers[number].steps for number in attention))
    wanted = max(0, wanted - sum(state.levels[number] for number in attention))
    for step in islice(_ranked(offers, dict.fromkeys(attention, 1.0), per_parameter=False), wanted):
        state.take(step)
    rest = {number: 1.0 for number in range(len(offers)) if number not in attention}
    for step in _ranked(offers, rest, per_parameter=False):
        if state.removed >= target:
            break
        state.take(step)
    if state.removed < target:
        raise _unreachable(sites, config, state.removed, target)
    return state.plan(sites)


def _unreachable(sites: ModelSites, config: PruningConfig, reached: int, target: int) -> TargetError:
    total = sites.decoder_parameters
    ratio = max(0.0, reached / total - 5e-4)
    error = TargetError(
        f"at most {reached:,} of {total:,} decoder-layer parameters ({reached / total:.1%}) may go with `units` "
        f"{config.units}, floors, multiples and protected layers as they are; {target:,} ({target / total:.1%}) were "
        f"asked for. Allow more units, protect fewer layers, or lower the ratio to at most {ratio:.3f}."
    )
    error.reached = reached
    return error
