"""How fast the parts of a model are on this device: tables of milliseconds by width, measured once.

Times are taken on models of a few layers that surgery really cut; the model itself stays as it is.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from .documents import eval_mode, input_device
from .errors import ConfigError, UnsupportedModelError
from .model_config import head_dim_of
from .offers import expert_multiple
from .plan import PruningPlan, SitePlan
from .site import Site
from .sites import ModelSites, find_sites
from .surgery import apply_plan, skip_sublayers
from .throughput import last_logits, seconds_on

__all__ = ["SpeedCurve", "SpeedTable", "measure_speed_table", "shape_of", "window_of"]

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


def shape_of(sites: ModelSites, site: Site, context: int) -> str:
    """What the time of a site depends on beside its width: `attention 3x3x64 of 576`.

    Args:
        sites ([`ModelSites`]): the model.
        site ([`Site`]): one of its sites.
        context (`int`): tokens; a window that is wider makes no difference.
    """
    window = window_of(sites, site.layer) if site.kind == "attention" else None
    sliding = f" window {window}" if window is not None and window < context else ""
    inputs = site.writers[0].inputs
    return f"{site.kind} {site.groups}x{site.group_size}x{site.columns_per_unit} of {inputs}{sliding}"


def window_of(sites: ModelSites, layer: int) -> int | None:
    """Positions that the attention of a layer sees, `None` where all.

    Args:
        sites ([`ModelSites`]): the model.
        layer (`int`): layer number.
    """
    config = sites.model.config
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return None
    return window if types is None or types[layer] == "sliding_attention" else None


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
    size = sum(p.numel() * p.element_size() for p in own[0].owned_parameters())
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
        """A pass over the context and the median of tokens after it, called as `throughput` does."""
        device = input_device(model)
        prompt = self.prompt.to(device)
        last = last_logits(model) if head else {}
        run = model if head else model.base_model
        prefill, decode = 0.0, []
        with eval_mode(model), torch.inference_mode():
            for _ in range(2):  # the first run warms up
                started = seconds_on(device)
                cache = run(input_ids=prompt, use_cache=True, **last).past_key_values
                prefill = seconds_on(device) - started
                for _token in range(_DECODED):
                    started = seconds_on(device)
                    run(input_ids=prompt[:, :1], past_key_values=cache, use_cache=True)
                    decode.append(seconds_on(device) - started)
        return 1000 * prefill, 1000 * median(decode[_DECODED:])


def _copy_of_layers(sites: ModelSites, layers: Iterable[int]) -> Any:
    """A model of its own layers for these numbers; everything else shares the weights of the original."""
    own = {id(parameter) for number in layers for parameter in sites.layers[number].parameters()}
    shared = {id(parameter): parameter for parameter in sites.model.parameters() if id(parameter) not in own}
    return copy.deepcopy(sites.model, dict(shared))
