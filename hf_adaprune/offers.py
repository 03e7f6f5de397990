"""What every site can give: its units in the order in which they would go, at the levels that the rules allow."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass

import torch

from .config import PruningConfig
from .errors import BudgetError, ConfigError
from .importance import Scores, unit_of
from .plan import PruningPlan, SitePlan
from .site import GROUP_UNITS, Site
from .sites import ModelSites

__all__ = ["Offer", "expert_multiple", "offers_of", "protected_layers", "repair_adds_bias", "target_removal"]


@dataclass(frozen=True, eq=False)
class Offer:
    """What one site can give, in the order in which it would.

    Args:
        site ([`Site`]): the site.
        unit (`str`): the width unit.
        order (`torch.Tensor`): units in the order they go; for balanced units `[steps, groups]`, one of every group.
        scores (`torch.Tensor`): score of every step, `[steps]`, ascending.
        cost (`int`): parameters per step.
        levels (`tuple[int, ...]`): allowed numbers of removed steps, ascending, from 0 or from where an earlier round
            has left the site.
        bias (`int`): parameters that a repair adds once anything is removed.
        sublayer_score (`float`, *optional*): score of removing the whole sublayer, where that is allowed.
    """

    site: Site
    unit: str
    order: torch.Tensor
    scores: torch.Tensor
    cost: int
    levels: tuple[int, ...]
    bias: int
    sublayer_score: float | None = None

    @property
    def steps(self) -> int:
        """Steps in all."""
        return len(self.scores)

    @property
    def most(self) -> int:
        """The highest allowed level."""
        return self.levels[-1]

    def level(self, wanted: float) -> int:
        """The highest allowed level that does not exceed a wanted number of steps."""
        return self.levels[max(0, bisect_right(self.levels, wanted + 1e-9) - 1)]

    def nearest(self, wanted: float) -> int:
        """The allowed level that is nearest to a wanted number of steps; the lower one of two."""
        below = self.level(wanted)
        above = self.levels[min(len(self.levels) - 1, self.levels.index(below) + 1)]
        return above if above - wanted < wanted - below - 1e-9 else below

    def before(self, level: int) -> int:
        """The allowed level below another."""
        return self.levels[max(0, bisect_left(self.levels, level) - 1)]

    def removed(self, level: int) -> int:
        """Parameters that a level removes."""
        if level == 0:
            return 0
        return level * self.cost - self.bias

    def kept(self, level: int) -> SitePlan:
        """The site plan of a level."""
        site = self.site
        gone = {int(unit) for unit in self.order[:level].flatten()}
        if self.unit in GROUP_UNITS:
            kept = [u for u in range(site.groups * site.group_size) if u // site.group_size not in gone]
        else:
            kept = [u for u in range(site.groups * site.group_size) if u not in gone]
        return SitePlan(site.groups, site.group_size, tuple(kept))


def target_removal(sites: ModelSites, config: PruningConfig) -> int:
    """Parameters to remove: from the ratio, the total parameters, or the bytes of a config.

    Raises:
        BudgetError: the target lies above the model's size.
    """
    if config.target_parameters is None and config.target_bytes is None:
        return math.ceil(config.pruning_ratio * sites.decoder_parameters - 1e-6)
    size = next(sites.model.parameters()).element_size()
    goal = config.target_parameters if config.target_parameters is not None else (config.target_bytes or 0) // size
    if goal > sites.total_parameters:
        raise BudgetError(
            f"the target of {goal:,} parameters is above the model's {sites.total_parameters:,}; nothing to remove."
        )
    return sites.total_parameters - goal


def protected_layers(sites: ModelSites, config: PruningConfig) -> set[int]:
    """Layers that stay as they are, counted from the start.

    Raises:
        ConfigError: a layer that the model lacks.
    """
    count = len(sites.layers)
    outside = [layer for layer in config.protected_layers if not -count <= layer < count]
    if outside:
        raise ConfigError(f"`protected_layers` names layers {outside}, the model has {count}.")
    return {layer % count for layer in config.protected_layers}


def offers_of(
    sites: ModelSites, scores: Scores, config: PruningConfig, start: PruningPlan | None = None
) -> list[Offer]:
    """The offers of all sites that may lose width.

    Args:
        sites ([`ModelSites`]): the model.
        scores ([`Scores`]): of its units.
        config ([`PruningConfig`]): units, floors, multiples, protected layers.
        start ([`PruningPlan`], *optional*): what an earlier round removed.

    Raises:
        ConfigError: nothing in the model may go.
    """
    protected = protected_layers(sites, config)
    offers = []
    for site in sites:
        unit = unit_of(site, config.units)
        if unit is None or site.layer in protected:
            continue
        order, step_scores, cost = _order(site, unit, scores.units[site.name])
        gone = _steps_gone(site, unit, start)
        levels = (gone, *(level for level in _levels(sites, site, unit, len(step_scores), config) if level > gone))
        if levels == (0,):
            continue
        bias = site.outputs if repair_adds_bias(site, config) else 0
        offers.append(Offer(site, unit, order, step_scores, cost, levels, bias))
    known = {unit for site in sites if (unit := unit_of(site, config.units))}
    if not known and not {"attention", "mlp", "layer"} & set(config.units):
        reasons = sorted({site.refusal for site in sites if site.refusal})
        raise ConfigError(
            f"nothing in this {sites.architecture.model_type} model may go with `units` {config.units}."
            + (f" Heads stay because {reasons[0]}." if reasons else "")
            + " Name other units, for example `channel`."
        )
    return offers


def repair_adds_bias(site: Site, config: PruningConfig) -> bool:
    """Whether the reader of a site gets a bias that it does not have, once anything of it is removed."""
    repair = config.repair
    adds = repair.method == "bias" or (repair.method == "least_squares" and repair.intercept)
    return adds and site.reader.bias is None and site.kind != "experts" and not config.uniform


def _steps_gone(site: Site, unit: str, start: PruningPlan | None) -> int:
    """Steps that an earlier round took; none where it removed the sublayer, of which nothing is left to go."""
    kept = start.sites.get(site.name) if start is not None else None
    if kept is None or kept.is_empty:
        return 0
    if unit in GROUP_UNITS:
        return site.groups - len(kept.kept_groups)
    return site.group_size - kept.kept_per_group


def _order(site: Site, unit: str, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    cost = site.unit_parameters(unit)
    if unit in GROUP_UNITS or site.groups == 1:
        values, order = scores.sort(stable=True)
        return order, values, cost
    # One unit of every group leaves at a time, the lowest of each: groups must stay equally wide.
    values, order = scores.reshape(site.groups, site.group_size).sort(dim=1, stable=True)
    offsets = torch.arange(site.groups)[:, None] * site.group_size
    return (order + offsets).T, values.sum(0), cost * site.groups


def _levels(sites: ModelSites, site: Site, unit: str, steps: int, config: PruningConfig) -> tuple[int, ...]:
    most = math.floor(config.allocation.max_site_ratio * steps + 1e-9)
    if unit in ("channel", "expert_channel"):
        multiple = config.channel_multiple
        if unit == "expert_channel":
            multiple = math.lcm(multiple, expert_multiple(site))
        floor = max(config.min_channels, multiple)
        kept = range(multiple * math.ceil(floor / multiple), steps, multiple)
        levels = [steps - width for width in reversed(kept)]
    else:
        floor = {"kv_group": config.min_groups, "expert": max(1, sites.top_k(site))}.get(unit, 1)
        levels = list(range(1, steps - floor + 1))
    if config.uniform and site.kind == "attention" and sites.architecture.heads_must_divide_hidden:
        hidden, others = sites.model.config.hidden_size, site.groups * site.group_size // steps
        levels = [level for level in levels if hidden % ((steps - level) * others) == 0]
    return (0, *(level for level in levels if level <= most))


def expert_multiple(site: Site) -> int:
    """Widths of fused experts are multiples of this: grouped products want rows of whole 16 bytes.

    Of two bytes a number at most: what is pruned in float32 is run in bfloat16.
    """
    return 16 // min(2, site.reader.parameter.element_size())
