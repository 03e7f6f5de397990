"""What a plan costs: parameters, bytes, multiply-adds, and milliseconds by a table measured once on this device.

Nothing is cut to find out. Sizes and multiply-adds are those of the model really cut; speeds are a prediction, the sum
of what every layer that stays takes at its width.
"""

from __future__ import annotations

import copy
import inspect
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn

from .config import PruningConfig
from .documents import eval_mode, input_device
from .errors import ConfigError, UnsupportedModelError
from .model_config import head_dim_of
from .offers import expert_multiple, repair_adds_bias
from .plan import PruningPlan, SitePlan
from .search_config import BUDGETS
from .sites import ModelSites, Site, find_sites
from .surgery import apply_plan, skip_sublayers

__all__ = ["Costs", "SpeedCurve", "SpeedTable", "measure_speed_table"]

_DECODED = 12  # tokens decoded per timed run
_REPEATS = 6
_WIDTHS = 8
_TIMED_BYTES = 2**26  # of layers timed together, so that their weights come from memory as those of a model do
_MOST_LAYERS = 8


@dataclass(frozen=True)
class SpeedCurve:
    """Milliseconds that a sublayer adds to its layer, by width; linear between the measured widths.

    Args:
        widths (`tuple[int, ...]`): ascending; at width 0 the sublayer is gone and takes nothing.
        prefill, decode (`tuple[float, ...]`): milliseconds per pass over the context, and per decoded token after it.

    Raises:
        ConfigError: widths out of order, or unequal numbers of entries.
    """

    widths: tuple[int, ...]
    prefill: tuple[float, ...]
    decode: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check order and lengths; lists from JSON become tuples."""
        for name in ("widths", "prefill", "decode"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        ascending = all(a < b for a, b in zip(self.widths, self.widths[1:], strict=False))
        if not self.widths or self.widths[0] < 1 or not ascending:
            raise ConfigError(f"widths of a speed curve should ascend from 1 on. Found {self.widths}.")
        if not len(self.widths) == len(self.prefill) == len(self.decode):
            raise ConfigError("a speed curve should have one prefill and one decode time per width. Measure it again.")

    def at(self, width: int) -> tuple[float, float]:
        """Prefill and decode milliseconds at a width."""
        if width == 0:
            return 0.0, 0.0
        right = min(bisect_left(self.widths, width), len(self.widths) - 1)
        if self.widths[right] <= width or right == 0:
            return self.prefill[right], self.decode[right]  # below the narrowest, overhead rules: no extrapolation
        left = right - 1
        share = (width - self.widths[left]) / (self.widths[right] - self.widths[left])
        found = [own[left] + share * (own[right] - own[left]) for own in (self.prefill, self.decode)]
        return found[0], found[1]


@dataclass(frozen=True)
class SpeedTable:
    """How long the parts of one model take on one device, at batch 1 with cache.

    Args:
        device (`str`): where it was measured.
        context (`int`): tokens of the prefill, and of the cache that decoding reads.
        curves (`dict[str, SpeedCurve]`): by the shape of a site, over its groups and over the units of a group.
        layer (`tuple[float, float]`): prefill and decode milliseconds of a layer without its sublayers.
        rest (`tuple[float, float]`): of everything outside of the layers: embedding, head, masks.
    """

    device: str
    context: int
    curves: Mapping[str, SpeedCurve]
    layer: tuple[float, float]
    rest: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        """The table as plain JSON types."""
        return {
            "device": self.device,
            "context": self.context,
            "layer": list(self.layer),
            "rest": list(self.rest),
            "curves": {
                name: {key: list(values) for key, values in vars(curve).items()} for name, curve in self.curves.items()
            },
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SpeedTable:
        """The table of a mapping as [`~SpeedTable.to_dict`] writes it.

        Raises:
            ConfigError: a missing or wrong entry.
        """
        try:
            curves = {str(name): SpeedCurve(**curve) for name, curve in data["curves"].items()}
            layer, rest = ((float(data[name][0]), float(data[name][1])) for name in ("layer", "rest"))
            return cls(str(data["device"]), int(data["context"]), curves, layer, rest)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise ConfigError(f"not a speed table: {error!r}. Measure it again.") from error

    def site(self, shape: str, kept: SitePlan) -> tuple[float, float]:
        """Prefill and decode milliseconds of a site that keeps so much.

        A cut of groups and within groups at once is taken as the product of both savings.

        Raises:
            ConfigError: the table is of another model.
        """
        if kept.is_empty:
            return 0.0, 0.0
        try:
            groups, units = self.curves[f"{shape}, groups"], self.curves[f"{shape}, units"]
        except KeyError as error:
            raise ConfigError(f"the speed table has no {shape}: it is of another model. Measure it again.") from error
        by_groups, by_units = groups.at(len(kept.kept_groups)), units.at(kept.kept_per_group)
        whole = units.at(kept.group_size)
        found = [g * u / full if full > 0 else g for g, u, full in zip(by_groups, by_units, whole, strict=True)]
        return found[0], found[1]


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
        positions = _mean_positions(self.context, _window(self.sites, site.layer))
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


def shape_of(sites: ModelSites, site: Site, context: int) -> str:
    """What the time of a site depends on beside its width: `attention 3x3x64 of 576`."""
    window = _window(sites, site.layer) if site.kind == "attention" else None
    sliding = f" window {window}" if window is not None and window < context else ""
    inputs = site.writers[0].inputs
    return f"{site.kind} {site.groups}x{site.group_size}x{site.columns_per_unit} of {inputs}{sliding}"


def _window(sites: ModelSites, layer: int) -> int | None:
    """Positions that the attention of a layer sees, `None` where all."""
    config = sites.model.config
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return None
    return window if types is None or types[layer] == "sliding_attention" else None


def _mean_positions(context: int, window: int | None) -> float:
    """How many positions a token of the context attends to, itself included, on average."""
    if window is None or window >= context:
        return (context + 1) / 2
    return (window * (window + 1) / 2 + (context - window) * window) / context


def _owners(site: Site) -> Iterator[nn.Parameter]:
    """Parameters that go with the whole sublayer, each once."""
    modules: list[nn.Module] = [site.sublayer, site.reader.module, *(writer.module for writer in site.writers)]
    yield from {id(p): p for module in modules for p in module.parameters()}.values()


def _matrix_elements(site: Site) -> int:
    return sum(p.numel() for p in _owners(site) if p.dim() == 2)


def _removed_of(site: Site, kept: SitePlan) -> Iterator[tuple[nn.Parameter, int]]:
    """Parameters of a site and how many of their elements a plan removes."""
    if kept.is_empty:
        yield from ((parameter, parameter.numel()) for parameter in _owners(site))
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


# -- measuring --------------------------------------------------------------------------------------------------------


def measure_speed_table(
    sites: ModelSites,
    context: int = 512,
    *,
    channel_multiple: int = 1,
    widths: int = _WIDTHS,
    repeats: int = _REPEATS,
    seed: int = 0,
) -> SpeedTable:
    """Time the sublayers of a model at several widths on its device. The model itself stays as it is.

    A few layers of each shape are copied, their other sublayer is taken out, and the one that is left is cut to each
    width by surgery; what is timed are models of these layers alone, without head, at batch 1 with cache. The rest is
    timed on a model of one such layer without sublayers, once with and once without its head.

    Args:
        sites ([`ModelSites`]): the dense model.
        context (`int`, *optional*, defaults to 512): tokens of the prefill and of the cache.
        channel_multiple (`int`, *optional*, defaults to 1): widths of MLPs and experts are multiples of it.
        widths (`int`, *optional*, defaults to 8): widths per shape and direction.
        repeats (`int`, *optional*, defaults to 6): sweeps over all widths. Each runs twice and times the second run;
            the fastest sweep counts.
        seed (`int`, *optional*, defaults to 0): of the random tokens.

    Raises:
        UnsupportedModelError: the model has no weights in memory, or its layers cannot be run alone.
        ConfigError: the context is longer than the model can take.
    """
    if any(parameter.device.type == "meta" for parameter in sites.model.parameters()):
        raise UnsupportedModelError(
            "speeds are measured, and this model holds no weights (meta device, or offloaded to disk). Load it into "
            "memory, or give budgets in parameters, bytes or macs."
        )
    positions = getattr(sites.model.config, "max_position_embeddings", None)
    if positions is not None and context + _DECODED > positions:
        raise ConfigError(
            f"`budget_context` + {_DECODED} decoded tokens should be at most the model's {positions} positions. Found "
            f"{context} + {_DECODED}; lower `budget_context`."
        )
    bench = _Bench(sites, context, repeats, seed)
    _table(bench, widths, channel_multiple)  # asks for every time it will read
    bench.run()
    return _table(bench, widths, channel_multiple)


def _table(bench: _Bench, widths: int, channel_multiple: int) -> SpeedTable:
    """The table, of the times that a bench has."""
    sites, context = bench.sites, bench.context
    shapes: dict[str, list[Site]] = {}
    for site in sites:
        shapes.setdefault(shape_of(sites, site, context), []).append(site)
    chosen = {shape: own[: _how_many(own)] for shape, own in shapes.items()}
    bare, layer, head = bench.bare(max(len(own) for own in chosen.values()))
    curves = {}
    for shape, own in chosen.items():
        for direction in ("groups", "units"):
            grid = _grid(own[0], direction, widths, channel_multiple)
            times = [bench.added(own, _keeps(own[0], direction, width), bare, layer) for width in grid]
            prefill, decode = (tuple(time[which] for time in times) for which in (0, 1))
            curves[f"{shape}, {direction}"] = SpeedCurve(tuple(grid), prefill, decode)
    # Measured by itself, not as what a pass of the dense model takes beyond its layers: on a busy machine that
    # difference would carry the noise of a whole pass.
    rest = (bare[0] + head[0], bare[1] + head[1])
    return SpeedTable(str(sites.device), context, curves, layer, rest)


def _how_many(own: list[Site]) -> int:
    """Layers to time together: one alone would sit in the processor's cache, which a model's layers do not."""
    size = sum(p.numel() * p.element_size() for p in _owners(own[0]))
    return min(len(own), _MOST_LAYERS, max(1, math.ceil(_TIMED_BYTES / max(1, size))))


def _grid(site: Site, direction: str, count: int, multiple: int) -> list[int]:
    """Widths to measure in one direction, ascending to the full one."""
    full = site.groups if direction == "groups" else site.group_size
    if site.refusal or full == 1:
        return [full]
    if site.kind == "attention" or direction == "groups":
        multiple = 1
    elif site.kind == "experts":
        multiple = math.lcm(multiple, expert_multiple(site))
    if full <= count:
        inner = list(range(1, full))
    else:
        # Plans hold any width, so none that is rounder than it must be is measured: kernels prefer round ones.
        steps = [max(1, round(full * number / count / multiple)) for number in range(1, count)]
        inner = [(step if step % 2 or multiple > 1 else step + 1) * multiple for step in steps]
    return [*sorted({width for width in inner if width % multiple == 0 and 0 < width < full}), full]


def _keeps(site: Site, direction: str, width: int) -> SitePlan:
    """The first groups, or the first units of every group."""
    groups = range(width if direction == "groups" else site.groups)
    units = range(site.group_size if direction == "groups" else width)
    kept = tuple(group * site.group_size + unit for group in groups for unit in units)
    return SitePlan(site.groups, site.group_size, kept)


class _Bench:
    """Builds models of a few cut layers and times them."""

    def __init__(self, sites: ModelSites, context: int, repeats: int, seed: int) -> None:
        self.sites, self.context, self.repeats = sites, context, repeats
        generator = torch.Generator().manual_seed(seed)
        vocabulary = sites.model.get_input_embeddings().weight.shape[0]
        self.prompt = torch.randint(vocabulary, (1, context), generator=generator)
        try:
            sites.check_layers_may_go()
            self.drops = len(sites.layers) > 1
        except UnsupportedModelError:
            self.drops = False  # the layers stand there empty, and their norms belong to the rest
        self.asked: dict[tuple[Any, ...], tuple[Mapping[str, SitePlan], set[int], bool]] = {}
        self.known: dict[tuple[Any, ...], tuple[float, float]] = {}

    def bare(self, most: int) -> tuple[tuple[float, float], tuple[float, float], tuple[float, float]]:
        """Milliseconds of a model without layers and head, of a layer without sublayers, and of the head."""
        one, full = self.timed({}, range(1)), self.timed({}, range(1), head=True)
        head = (max(0.0, full[0] - one[0]), max(0.0, full[1] - one[1]))
        if not self.drops or most < 2:
            return one, (0.0, 0.0), head
        many = self.timed({}, range(most))
        layer = tuple(max(0.0, (b - a) / (most - 1)) for a, b in zip(one, many, strict=True))
        return (max(0.0, one[0] - layer[0]), max(0.0, one[1] - layer[1])), (layer[0], layer[1]), head

    def added(
        self, own: list[Site], kept: SitePlan, bare: tuple[float, float], layer: tuple[float, float]
    ) -> tuple[float, float]:
        """Milliseconds that a sublayer adds to its layer at a width."""
        found = self.timed({site.name: kept for site in own}, [site.layer for site in own])
        each = [max(0.0, (f - b) / len(own) - one) for f, b, one in zip(found, bare, layer, strict=True)]
        return each[0], each[1]

    def timed(self, kept: Mapping[str, SitePlan], layers: Iterable[int], head: bool = False) -> tuple[float, float]:
        """Prefill and decode milliseconds of these layers with nothing but the named sublayers; 0 before `run`."""
        stays = set(layers)
        key = (tuple(sorted(kept)), tuple(kept.values())[:1], len(stays), head)
        self.asked.setdefault(key, (kept, stays, head))
        return self.known.get(key, (0.0, 0.0))

    def run(self) -> None:
        """Time everything that was asked for.

        In several sweeps, of which the fastest counts: what else a machine does comes in spells that slow all runs of
        one width down, and never makes one faster.
        """
        for _ in range(self.repeats):
            for key, (kept, stays, head) in self.asked.items():
                try:
                    found = self.time(self.build(kept, stays), head)
                except (RuntimeError, TypeError, AttributeError, LookupError, ValueError) as error:
                    raise UnsupportedModelError(
                        f"layers of this {self.sites.architecture.model_type} model cannot be timed alone ({error!r}). "
                        "Give budgets in parameters, bytes or macs instead of speeds."
                    ) from error
                known = self.known.get(key, found)
                self.known[key] = (min(known[0], found[0]), min(known[1], found[1]))

    def build(self, kept: Mapping[str, SitePlan], stays: set[int]) -> Any:
        """A model of some layers with nothing but the named sublayers."""
        # A model without any site has no config, so a bare one keeps its sites until the config is written.
        stand_in = {} if kept else {site.name: site.whole for site in self.sites if site.layer in stays}
        cuts = {}
        for site in self.sites:
            own = kept.get(site.name) or stand_in.get(site.name)
            cuts[site.name] = SitePlan(site.groups, site.group_size, ()) if own is None else own
        others = tuple(number for number in range(len(self.sites.layers)) if number not in stays)
        plan = PruningPlan(
            self.sites.architecture.model_type, len(self.sites.layers), cuts, others if self.drops else ()
        )
        model = _copy_of_layers(self.sites, stays)
        cut = apply_plan(find_sites(model, self.sites.architecture), plan)
        for site in cut if stand_in else ():
            kind = "attention" if site.kind == "attention" else "mlp"
            head_dim = head_dim_of(model.config)
            skip_sublayers(cut.layers[site.layer], site.layer, [kind], cut.architecture, head_dim)
        return model

    def time(self, model: Any, head: bool) -> tuple[float, float]:
        """A pass over the context and the median of tokens after it, called as `evaluation.throughput` does."""
        device = input_device(model)
        prompt = self.prompt.to(device)
        last: dict[str, Any] = {}
        if head and "logits_to_keep" in inspect.signature(model.forward).parameters:
            last = {"logits_to_keep": 1}
        run = model if head else model.base_model

        def clock() -> float:
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            return perf_counter()

        prefill, decode = 0.0, []
        with eval_mode(model), torch.inference_mode():
            for _ in range(2):  # the first run warms up
                started = clock()
                cache = run(input_ids=prompt, use_cache=True, **last).past_key_values
                prefill = clock() - started
                for _token in range(_DECODED):
                    started = clock()
                    run(input_ids=prompt[:, :1], past_key_values=cache, use_cache=True)
                    decode.append(clock() - started)
        return 1000 * prefill, 1000 * median(decode[_DECODED:])


def _copy_of_layers(sites: ModelSites, layers: Iterable[int]) -> Any:
    """A model of its own layers for these numbers; everything else shares the weights of the original."""
    own = {id(parameter) for number in layers for parameter in sites.layers[number].parameters()}
    shared = {id(parameter): parameter for parameter in sites.model.parameters() if id(parameter) not in own}
    return copy.deepcopy(sites.model, dict(shared))
