"""Plans that keep to several budgets at once, and families of nested plans.

A cost falls as the pruning ratio rises. So the plan within all budgets is that of the smallest ratio at which they hold
together, and few allocations find it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from .allocation import TargetError, allocate
from .config import PruningConfig
from .costs import Costs
from .errors import BudgetError, ConfigError
from .importance import Scores, unit_of
from .plan import PruningPlan
from .search_config import BUDGETS, SPEEDS
from .site import GROUP_UNITS, Site
from .sites import ModelSites

__all__ = [
    "allocate_within",
    "check_budgets",
    "even_cosine",
    "even_scores",
    "gone_first",
    "missed_budgets",
    "nested_plans",
]

logger = logging.getLogger(__name__)

_ALLOCATIONS = 8  # at most, between the ratio that is surely too low and the one that is high enough
_CLOSE = 1 / 2000  # of the decoder's parameters: a bracket this narrow is not narrowed further
_ROUNDING = 1e-9


def allocate_within(
    sites: ModelSites,
    scores: Scores,
    config: PruningConfig,
    costs: Costs,
    cosine: torch.Tensor | None = None,
    start: PruningPlan | None = None,
) -> PruningPlan:
    """The plan of the smallest pruning ratio at which all budgets of a config hold together.

    Without budgets exactly what [`~hf_adaprune.allocation.allocate`] gives. What comes back meets every budget, and the
    next smaller ratio that was tried does not.

    Args:
        sites ([`ModelSites`]): the model.
        scores ([`Scores`]): of its units.
        config ([`PruningConfig`]): budgets, units, rules and method.
        costs ([`Costs`]): of the same model.
        cosine (`torch.Tensor`, *optional*): as for `allocate`.
        start ([`PruningPlan`], *optional*): what an earlier round removed; it stays removed.

    Raises:
        BudgetError: the rules do not let a budget be met; the message says how far they go.
        ConfigError: nothing in the model may go, or the method lacks what it reads.
    """
    if not config.budgets:
        return allocate(sites, scores, config, cosine, start)
    search = _Search(sites, scores, config, costs, cosine, start)
    found = search.plan()
    logger.info("budgets %s: %s", dict(config.budgets), {name: costs.cost(name, found) for name in config.budgets})
    return found


def check_budgets(sites: ModelSites, config: PruningConfig, costs: Costs) -> None:
    """Refuse budgets (or a ratio, or a target) that no allowed plan meets, before any work.

    Speeds are predicted, for which the model is timed once if `costs` has no table yet.

    Args:
        sites ([`ModelSites`]): the model.
        config ([`PruningConfig`]): budgets and rules.
        costs ([`Costs`]): of the same model.

    Raises:
        BudgetError: with the budget, what was asked for, and the range that can be reached.
        ConfigError: nothing in the model may go.
    """
    scores, cosine = even_scores(sites, config), even_cosine(sites)
    if not config.budgets:
        allocate(sites, scores, config, cosine)
        return
    dense = PruningPlan(sites.architecture.model_type, len(sites.layers))
    smallest = _smallest(sites, scores, config, cosine, None)[1]
    _refuse(config, costs, dense, smallest)
    if "ratio" not in config.budgets and not missed_budgets(costs, config.budgets, dense):
        logger.warning("the model keeps to every budget as it is (%s); nothing will be removed.", dict(config.budgets))


def nested_plans(
    sites: ModelSites,
    scores: Scores,
    config: PruningConfig,
    ratios: Sequence[float],
    costs: Costs,
    cosine: torch.Tensor | None = None,
) -> dict[float, PruningPlan]:
    """A plan for each of several pruning ratios; what goes at a lower one goes at every higher one.

    Args:
        sites ([`ModelSites`]): the model.
        scores ([`Scores`]): of its units.
        config ([`PruningConfig`]): rules and method. Its budgets hold for every plan, beside its ratio.
        ratios (sequence of `float`): pruning ratios in [0, 1).
        costs ([`Costs`]): of the same model.
        cosine (`torch.Tensor`, *optional*): as for `allocate`.

    Returns:
        `dict[float, PruningPlan]`: by ratio, ascending.

    Raises:
        BudgetError: the rules do not let enough go for one of the ratios.
        ConfigError: a ratio is out of range, or nothing in the model may go.
    """
    plans: dict[float, PruningPlan] = {}
    previous: PruningPlan | None = None
    for ratio in sorted({float(ratio) for ratio in ratios}):
        own = scores if previous is None else gone_first(sites, scores, previous)
        part = config.with_changes(pruning_ratio=ratio, target_parameters=None, target_bytes=None)
        if config.budgets:
            least = max(ratio, config.budgets.get("ratio", 0.0))
            part = part.with_changes(budgets={**config.budgets, "ratio": least})
        previous = allocate_within(sites, own, part, costs, cosine, previous)
        plans[ratio] = previous
    return plans


def missed_budgets(costs: Costs, budgets: Mapping[str, float], plan: PruningPlan) -> list[str]:
    """Names of the budgets that a plan does not keep to."""
    return [name for name, goal in budgets.items() if not _holds(name, costs.cost(name, plan), goal)]


def even_scores(sites: ModelSites, config: PruningConfig) -> Scores:
    """Scores that are alike everywhere per parameter: their plan is as large as any, to within a unit.

    Args:
        sites ([`ModelSites`]): the model, on the meta device too.
        config ([`PruningConfig`]): its units.
    """
    kinds = {site.name: unit_of(site, config.units) for site in sites}
    units = {site.name: _even(site, kinds[site.name] or _any_unit(site.kind)) for site in sites}
    return Scores(
        units,
        {name: kind or "" for name, kind in kinds.items()},
        {name: float(own.sum()) for name, own in units.items()},
        torch.tensor(sites.layer_parameters, dtype=torch.float64) / 2,
    )


def even_cosine(sites: ModelSites) -> torch.Tensor:
    """Cosines `[layers]` to go with [`even_scores`]."""
    return torch.linspace(0.5, 0.6, len(sites.layers))


def _even(site: Site, unit: str) -> torch.Tensor:
    count = site.units(unit)
    width = count if unit in GROUP_UNITS or site.groups == 1 else site.group_size
    ramp = (torch.arange(width, dtype=torch.float64) + 0.5) / width * site.unit_parameters(unit)
    return ramp.repeat(count // width)


def _any_unit(kind: str) -> str:
    return {"attention": "kv_group", "mlp": "channel", "experts": "expert"}[kind]


def gone_first(sites: ModelSites, scores: Scores, plan: PruningPlan) -> Scores:
    """Scores in which the units that a plan removes go first.

    Args:
        sites ([`ModelSites`]): the model.
        scores ([`Scores`]): of its units.
        plan ([`PruningPlan`]): what earlier rounds removed.
    """
    units = dict(scores.units)
    for name, kept in plan.sites.items():
        own = units[name].clone()
        kind, site = scores.kinds[name], sites.by_name[name]
        stays = set(kept.kept_groups) if site.units(kind) == site.groups and site.group_size > 1 else set(kept.kept)
        gone = [unit for unit in range(len(own)) if unit not in stays]
        own[gone] = own.min() - 1e6 * (own.max() - own.min() + 1)
        units[name] = own
    return replace(scores, units=units)


def _holds(name: str, cost: float, goal: float) -> bool:
    slack = _ROUNDING * max(abs(goal), 1e-3)
    return cost >= goal - slack if name == "ratio" or name in SPEEDS else cost <= goal + slack


def _at_ratio(config: PruningConfig, sites: ModelSites, target: int) -> PruningConfig:
    """The config without budgets, for a number of parameters to remove."""
    # Half a parameter below, so that no rounding of the ratio asks for one more.
    ratio = max(0.0, target - 0.5) / sites.decoder_parameters
    return config.with_changes(budgets={}, pruning_ratio=ratio, target_parameters=None, target_bytes=None)


def _smallest(
    sites: ModelSites,
    scores: Scores,
    config: PruningConfig,
    cosine: torch.Tensor | None,
    start: PruningPlan | None,
) -> tuple[int, PruningPlan]:
    """How many parameters may go at most, and the plan in which they do."""
    target = sites.decoder_parameters - 1
    try:
        return target, allocate(sites, scores, _at_ratio(config, sites, target), cosine, start)
    except TargetError as error:
        target = error.reached
    return target, allocate(sites, scores, _at_ratio(config, sites, target), cosine, start)


def _refuse(config: PruningConfig, costs: Costs, dense: PruningPlan, smallest: PruningPlan) -> None:
    """Raise for budgets that the smallest plan misses."""
    missed = missed_budgets(costs, config.budgets, smallest)
    if not missed:
        return
    parts = []
    for name in missed:
        reach = sorted((costs.cost(name, dense), costs.cost(name, smallest)))
        least = "at least" if name == "ratio" or name in SPEEDS else "at most"
        low, high, goal = (_written(name, value) for value in (*reach, config.budgets[name]))
        parts.append(f"`{name}` should be {least} {goal}, but plans reach {low} to {high}")
    raise BudgetError(
        f"{'; '.join(parts)} (from the dense model to the smallest plan that `units` {config.units}, floors, multiples "
        "and protected layers allow). Ask for something within the range, allow more units, or protect fewer layers."
    )


def _written(name: str, value: float) -> str:
    if name == "ratio":
        return f"{value:.3f}"
    return f"{value:,.1f}" if name in SPEEDS else f"{value:,.0f}"


@dataclass(frozen=True, eq=False)
class _Tried:
    """A target and what its plan costs; every cost as a number that should be at most 0."""

    target: int
    plan: PruningPlan
    excess: Mapping[str, float]

    @property
    def holds(self) -> bool:
        """Whether every budget holds."""
        return all(value <= 0 for value in self.excess.values())


class _Search:
    """The smallest target within all budgets: a bracket, narrowed by interpolation and halving."""

    def __init__(
        self,
        sites: ModelSites,
        scores: Scores,
        config: PruningConfig,
        costs: Costs,
        cosine: torch.Tensor | None,
        start: PruningPlan | None,
    ) -> None:
        unknown = set(config.budgets) - set(BUDGETS)
        if unknown:
            raise ConfigError(f"no budget {', '.join(sorted(unknown))}. Known: {', '.join(BUDGETS)}.")
        self.sites, self.scores, self.config, self.costs = sites, scores, config, costs
        self.cosine, self.start = cosine, start
        self.dense = PruningPlan(sites.architecture.model_type, len(sites.layers))

    def plan(self) -> PruningPlan:
        """The plan of the smallest target that holds."""
        least = self.least()
        try:
            low = self.tried(least)
        except TargetError:
            raise self.unreachable() from None
        if low.holds:
            return low.plan
        high = self.tried_most()
        if not high.holds:
            raise self.unreachable()
        close = max(1, math.floor(self.sites.decoder_parameters * _CLOSE))
        aside, repeated = max(1, close // 3), 0
        for _ in range(_ALLOCATIONS):
            if high.target - low.target <= close:
                break
            # Beside where the budgets should come to hold, so that the bracket closes from one side and then from the
            # other; further beside it when one side moved twice.
            above = repeated <= 0
            root = self.between(low, high) + (aside if above else -aside) * 4 ** max(0, abs(repeated) - 1)
            if abs(repeated) > 2:
                root = (low.target + high.target) // 2
            found = self.tried(min(max(root, low.target + 1), high.target - 1))
            if found.holds:
                high, repeated = found, max(0, repeated) + 1
            else:
                low, repeated = found, min(0, repeated) - 1
        return high.plan

    def least(self) -> int:
        """Parameters that must go at least, by the budgets that are sizes."""
        sites, costs, budgets = self.sites, self.costs, self.config.budgets
        needs = [0]
        if "ratio" in budgets:
            needs.append(math.ceil(budgets["ratio"] * sites.decoder_parameters - 1e-6))
        if "parameters" in budgets:
            needs.append(math.ceil(sites.total_parameters - budgets["parameters"]))
        if "bytes" in budgets:
            widest = max(parameter.element_size() for parameter in sites.model.parameters())
            needs.append(math.ceil((costs.bytes(self.dense) - budgets["bytes"]) / widest))
        if max(needs) >= sites.decoder_parameters:
            raise self.unreachable()
        return max(needs)

    def tried(self, target: int) -> _Tried:
        """Allocate for a target and weigh the plan."""
        config = _at_ratio(self.config, self.sites, target)
        return self.weighed(target, allocate(self.sites, self.scores, config, self.cosine, self.start))

    def tried_most(self) -> _Tried:
        """The largest target that the rules allow."""
        return self.weighed(*_smallest(self.sites, self.scores, self.config, self.cosine, self.start))

    def weighed(self, target: int, plan: PruningPlan) -> _Tried:
        excess = {}
        for name, goal in self.config.budgets.items():
            cost = self.costs.cost(name, plan)
            if _holds(name, cost, goal):
                excess[name] = min(0.0, self.beyond(name, cost, goal))
            else:
                excess[name] = max(1e-300, self.beyond(name, cost, goal))
        return _Tried(target, plan, excess)

    def beyond(self, name: str, cost: float, goal: float) -> float:
        """How far a cost is beyond its budget; linear in what goes, or nearly so."""
        if name in SPEEDS:  # milliseconds add up, tokens per second do not
            return 1 / cost - 1 / goal if goal > 0 else -1.0
        return goal - cost if name == "ratio" else cost - goal

    def between(self, low: _Tried, high: _Tried) -> int:
        """Where the last budget would come to hold if costs were straight lines between the two."""
        shares = [above / (above - high.excess[name]) for name, above in low.excess.items() if above > 0]
        return low.target + round(max(shares) * (high.target - low.target))

    def unreachable(self) -> BudgetError:
        """What to raise where the rules do not let enough go."""
        try:
            _refuse(self.config, self.costs, self.dense, self.tried_most().plan)
        except BudgetError as error:
            return error
        # Each budget can be met, so the rest is rounding at the very edge.
        return BudgetError(
            f"budgets {dict(self.config.budgets)} lie at the very edge of what the rules allow. Give them some room."
        )
