"""What a plan costs: parameters, bytes, multiply-adds, and milliseconds by a table of this device.

Nothing is cut to find out. Sizes and multiply-adds are those of the model really cut; speeds are a prediction, the sum
of what every layer that stays takes at its width ([`hf_adaprune.speeds`]).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from .config import PruningConfig
from .errors import ConfigError
from .offers import repair_adds_bias
from .plan import PruningPlan, SitePlan
from .search_config import BUDGETS
from .site import Site
from .sites import ModelSites
from .speeds import SpeedTable, measure_speed_table, shape_of, window_of

__all__ = ["Costs"]


@dataclass(frozen=True, eq=False)
class Costs:
    """What plans for a model cost.

    Args:
        sites ([`ModelSites`]): the dense model.
        context (`int`, *optional*, defaults to 512): tokens behind multiply-adds and speeds.
        biased (`frozenset[str]`, *optional*): names of sites whose reader gets a bias once they are cut.
        table ([`SpeedTable`], *optional*): measured when a speed is first asked for, where not given.
        channel_multiple (`int`, *optional*, defaults to 1): the widths that are measured are multiples of it.

    Raises:
        ConfigError: the table is for another context.
    """

    sites: ModelSites
    context: int = 512
    biased: frozenset[str] = field(default_factory=frozenset)
    table: SpeedTable | None = None
    channel_multiple: int = 1

    def __post_init__(self) -> None:
        """Refuse a table for another context."""
        if self.table is not None and self.table.context != self.context:
            raise ConfigError(
                f"the speed table is for {self.table.context} tokens of context, `budget_context` is {self.context}. "
                "Measure it again, or leave it out."
            )

    @classmethod
    def of(cls, sites: ModelSites, config: PruningConfig, table: SpeedTable | None = None) -> Costs:
        """The costs that a config's budgets are about: its context, and the biases that its repair adds."""
        biased = frozenset(site.name for site in sites if repair_adds_bias(site, config))
        return cls(sites, config.budget_context, biased, table, config.channel_multiple)

    def cost(self, kind: str, plan: PruningPlan) -> float:
        """One cost by the name of its budget.

        Raises:
            ConfigError: no such cost.
        """
        if kind not in BUDGETS:
            raise ConfigError(f"no cost {kind!r}. Known: {', '.join(BUDGETS)}.")
        return float(getattr(self, kind)(plan))

    def removed(self, plan: PruningPlan) -> int:
        """Parameters that go, less the biases that come."""
        return self.sites.removed_parameters(plan, self._added(plan))

    def ratio(self, plan: PruningPlan) -> float:
        """Removed decoder-layer parameters over all."""
        return self.removed(plan) / self.sites.decoder_parameters

    def parameters(self, plan: PruningPlan) -> int:
        """Parameters of the model that is left; tied ones count once."""
        return self.sites.total_parameters - self.removed(plan)

    def bytes(self, plan: PruningPlan) -> int:
        """Bytes of the weights that are left, in their dtypes."""
        removed = sum(self._layer_bytes[layer] for layer in plan.dropped_layers)
        for name, kept in plan.changed():
            site = self.sites.by_name[name]
            removed += sum(count * parameter.element_size() for parameter, count in _removed_of(site, kept))
        for name in self._added(plan):
            site = self.sites.by_name[name]
            removed -= site.outputs * site.reader.parameter.element_size()
        return self._dense_bytes - removed

    def macs(self, plan: PruningPlan) -> float:
        """Multiply-adds per token of a pass over the context: matrices of the layers, attention, and head."""
        kept = [self._layer_macs[layer] for layer in plan.kept_layers()]
        total = sum(kept) + self._head_macs
        for name, own in plan.changed():
            site = self.sites.by_name[name]
            total += self._site_macs(site, own) - self._site_macs(site, site.whole)
        return total

    def prefill_milliseconds(self, plan: PruningPlan) -> float:
        """Predicted time of a pass over the context."""
        return self._milliseconds(plan, 0)

    def decode_milliseconds(self, plan: PruningPlan) -> float:
        """Predicted time of one more token after the context."""
        return self._milliseconds(plan, 1)

    def prefill_tokens_per_second(self, plan: PruningPlan) -> float:
        """Predicted speed of a pass over the context, at batch 1."""
        return 1000 * self.context / self.prefill_milliseconds(plan)

    def decode_tokens_per_second(self, plan: PruningPlan) -> float:
        """Predicted speed of decoding after the context, at batch 1."""
        return 1000 / self.decode_milliseconds(plan)

    @cached_property
    def speed_table(self) -> SpeedTable:
        """The table behind the speeds; measured at the first call where none was given."""
        if self.table is not None:
            return self.table
        return measure_speed_table(self.sites, self.context, channel_multiple=self.channel_multiple)

    def _added(self, plan: PruningPlan) -> list[str]:
        return [name for name, kept in plan.changed() if name in self.biased and not kept.is_empty]

    @cached_property
    def _layer_bytes(self) -> tuple[int, ...]:
        return tuple(sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in self.sites.layers)

    @cached_property
    def _dense_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.sites.model.parameters())

    @cached_property
    def _layer_macs(self) -> tuple[float, ...]:
        """Of every whole layer; matrices that belong to no site count too (they see every token)."""
        totals = [float(sum(p.numel() for p in layer.parameters() if p.dim() == 2)) for layer in self.sites.layers]
        for site in self.sites:
            if site.kind == "attention":
                totals[site.layer] += self._site_macs(site, site.whole) - _matrix_elements(site)
            elif site.kind == "experts":
                router = 0 if site.router is None else site.router.parameter.numel()
                totals[site.layer] += self._site_macs(site, site.whole) - router
        return tuple(totals)

    @cached_property
    def _head_macs(self) -> int:
        head = self.sites.model.get_output_embeddings()
        return 0 if head is None else head.weight.numel()

    def _site_macs(self, site: Site, kept: SitePlan) -> float:
        if kept.is_empty:
            return 0.0
        if site.kind == "experts":
            per_channel = site.unit_parameters("expert_channel")
            router = len(kept.kept_groups) * site.router.inputs if site.router is not None else 0
            active = self.sites.top_k(site) or len(kept.kept_groups)
            return float(active * kept.kept_per_group * per_channel + router)
        elements = _matrix_elements(site) - sum(count for p, count in _removed_of(site, kept) if p.dim() == 2)
        if site.kind == "mlp":
            return float(elements)
        positions = _mean_positions(self.context, window_of(self.sites, site.layer))
        return elements + 2 * len(kept.kept) * site.columns_per_unit * positions

    def _milliseconds(self, plan: PruningPlan, which: int) -> float:
        table = self.speed_table
        total = table.rest[which] + len(plan.kept_layers()) * table.layer[which]
        gone = set(plan.dropped_layers)
        for site in self.sites:
            if site.layer not in gone:
                kept = plan.sites.get(site.name)
                shape = shape_of(self.sites, site, self.context)
                total += table.site(shape, site.whole if kept is None else kept)[which]
        return max(total, 1e-6)


def _mean_positions(context: int, window: int | None) -> float:
    """How many positions a token of the context attends to, itself included, on average."""
    if window is None or window >= context:
        return (context + 1) / 2
    return (window * (window + 1) / 2 + (context - window) * window) / context


def _matrix_elements(site: Site) -> int:
    return sum(p.numel() for p in site.owned_parameters() if p.dim() == 2)


def _removed_of(site: Site, kept: SitePlan) -> Iterator[tuple[nn.Parameter, int]]:
    """Parameters of a site and how many of their elements a plan removes."""
    if kept.is_empty:
        yield from ((parameter, parameter.numel()) for parameter in site.owned_parameters())
        return
    groups, units = site.groups - len(kept.kept_groups), kept.units - len(kept.kept)
    if site.kind == "experts":
        if site.router is not None:
            yield site.router.parameter, groups * site.router.inputs
        for matrix in (site.writers[0], site.reader):
            yield matrix.parameter, matrix.parameter.numel() // kept.units * units
        return
    yield site.reader.parameter, units * site.columns_per_unit * site.reader.outputs
    for number, writer in enumerate(site.writers):
        if site.kind == "mlp":
            rows = site.copies * units
        elif site.fused:
            rows = (units + 2 * groups) * site.columns_per_unit
        else:
            rows = (units if number == 0 else groups) * site.columns_per_unit
        yield writer.parameter, rows * writer.inputs
        if writer.bias is not None:
            yield writer.bias, rows
