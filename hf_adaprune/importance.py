"""From metrics to scores: every metric of a config is computed, normalised, folded into units, and mixed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers.utils import logging as transformers_logging

from .config import ImportanceConfig
from .errors import ConfigError, StatisticsError
from .metrics import METRICS, Context, Metric, block_influence
from .site import WIDTH_UNITS, Site
from .sites import ModelSites
from .statistics import Needs, Statistics

__all__ = ["Scores", "mix_scores", "needs_of", "raw_scores", "score_units", "scored_kinds", "unit_of"]


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of all units of a model.

    Args:
        units (`dict[str, torch.Tensor]`): by site name, `[units]`, float64.
        kinds (`dict[str, str]`): by site name, the width unit that was scored.
        sublayers (`dict[str, float]`): by site name, the score of the whole sublayer.
        layers (`torch.Tensor`): score of every decoder layer, `[layers]`.
    """

    units: Mapping[str, torch.Tensor]
    kinds: Mapping[str, str]
    sublayers: Mapping[str, float]
    layers: torch.Tensor


def unit_of(site: Site, units: tuple[str, ...]) -> str | None:
    """The width unit that may be removed at a site, `None` where its width stays."""
    if site.refusal:
        return None
    return next((unit for unit in units if WIDTH_UNITS.get(unit) == site.kind), None)


def needs_of(config: ImportanceConfig) -> Needs:
    """What the metrics of a config need from the statistics.

    Raises:
        ConfigError: an unknown metric.
    """
    needs = Needs()
    for name, weight in config.metrics.items():
        if name not in METRICS:
            raise ConfigError(f"no metric {name!r}. Known: {', '.join(sorted(METRICS))}.")
        if weight > 0:
            needs = needs | METRICS[name].needs
    return needs


def score_units(
    sites: ModelSites,
    units: tuple[str, ...],
    config: ImportanceConfig,
    statistics: Statistics,
    *,
    weights: torch.Tensor | None = None,
    seed: int = 0,
) -> Scores:
    """Score every unit of a model by a weighted mixture of metrics.

    Args:
        sites ([`ModelSites`]): the model.
        units (`tuple[str, ...]`): the unit kinds that may go.
        config ([`ImportanceConfig`]): metrics, weights, normalisation.
        statistics ([`Statistics`]): of this model.
        weights (`torch.Tensor`, *optional*): sample weights `[samples]`; ones where not given.
        seed (`int`, *optional*, defaults to 0): of random scores.

    Raises:
        ConfigError: an unknown metric.
        StatisticsError: the statistics lack what a metric reads, or a score is not finite.
    """
    needs_of(config)
    weights = torch.ones(len(statistics.tokens)) if weights is None else weights
    context = Context(statistics, weights, config.reduction, config.damping, config.damping_scale, seed)
    kinds = scored_kinds(sites, units)
    raw = {name: raw_scores(sites, kinds, name, context) for name, weight in config.metrics.items() if weight > 0}
    influence = block_influence(context) if config.metrics.get("block_influence") else None
    return mix_scores(sites, kinds, raw, config, influence)


def scored_kinds(sites: ModelSites, units: tuple[str, ...]) -> dict[str, str]:
    """The width unit that is scored at every site: the one that may go, or the finest where none may."""
    return {site.name: unit_of(site, units) or _finest(site) for site in sites}


def raw_scores(sites: ModelSites, kinds: Mapping[str, str], name: str, context: Context) -> dict[str, torch.Tensor]:
    """One metric's own numbers by site, float64: `[columns]` or `[units]`, as the metric's level says.

    Args:
        sites ([`ModelSites`]): the model.
        kinds (`dict[str, str]`): see [`scored_kinds`].
        name (`str`): of the metric.
        context ([`Context`]): statistics, sample weights, damping.

    Raises:
        StatisticsError: the statistics lack what the metric reads, or a number is not finite.
    """
    metric = METRICS[name]
    bar = transformers_logging.tqdm(sites, desc=f"scores, {name}", unit="site", total=len(sites))
    raw = {}
    for site in bar:
        try:
            raw[site.name] = metric.function(site, kinds[site.name], context).double()
        except torch.linalg.LinAlgError as error:
            raise StatisticsError(
                f"{site.name}: metric {name!r} could not invert the moments ({error}). Raise `importance.damping`, or "
                "give more calibration text."
            ) from error
        if not torch.isfinite(raw[site.name]).all():
            raise StatisticsError(
                f"{site.name}: scores of metric {name!r} are not finite. Weights or activations are too large to be "
                "summed in float32; check the checkpoint, or choose another metric."
            )
    return raw


def mix_scores(
    sites: ModelSites,
    kinds: Mapping[str, str],
    raw: Mapping[str, Mapping[str, torch.Tensor]],
    config: ImportanceConfig,
    influence: torch.Tensor | None = None,
) -> Scores:
    """Normalise the metrics' numbers, fold them into units, and mix them by the config's weights.

    Args:
        sites ([`ModelSites`]): the model.
        kinds (`dict[str, str]`): see [`scored_kinds`].
        raw (`dict[str, dict[str, torch.Tensor]]`): by metric with a positive weight, what [`raw_scores`] gives.
        config ([`ImportanceConfig`]): weights and normalisation.
        influence (`torch.Tensor`, *optional*): block influence `[layers]`, where it is one of the metrics. Layers score
            by it where it is the only one; by the sum of their sites' scores in every mixture.

    Raises:
        StatisticsError: a mixed score is not finite.
    """
    mixed = {name: torch.zeros(sites.by_name[name].units(kind)) for name, kind in kinds.items()}
    layers = torch.zeros(len(sites.layers), dtype=torch.float64)
    total = sum(config.metrics.values())
    # Beside other metrics it counts by its site scores, which are normalised as theirs are.
    alone = set(raw) == {"block_influence"}
    for name, scores in raw.items():
        share = config.metrics[name] / total
        if name == "block_influence" and alone and influence is not None:
            layers += share * influence
        for site_name, own in _normalized(sites, kinds, scores, METRICS[name], config.normalization).items():
            mixed[site_name] = mixed[site_name] + share * own
    if config.normalization == "log":
        mixed = {name: scores.exp() for name, scores in mixed.items()}
    sublayers = {name: float(scores.sum()) for name, scores in mixed.items()}
    if not alone or influence is None:
        for site in sites:
            layers[site.layer] += sublayers[site.name]
    bad = [name for name, scores in mixed.items() if not torch.isfinite(scores).all()]
    if bad or not torch.isfinite(layers).all():
        raise StatisticsError(
            f"{bad[0] if bad else 'layers'}: the mixture of {', '.join(raw)} is not finite, though each of them is. "
            "Choose another `importance.normalization`, or fewer metrics."
        )
    return Scores(mixed, dict(kinds), sublayers, layers)


def _finest(site: Site) -> str:
    return {"attention": "kv_group", "mlp": "channel", "experts": "expert_channel"}[site.kind]


def _normalized(
    sites: ModelSites, kinds: Mapping[str, str], raw: Mapping[str, torch.Tensor], metric: Metric, normalization: str
) -> dict[str, torch.Tensor]:
    if normalization == "zscore":
        # FLAP standardises columns before they are pooled into heads (2312.11983, code).
        standard = {name: _standardized(scores) for name, scores in raw.items()}
        return {name: _folded(sites.by_name[name], kinds[name], own, metric, "mean") for name, own in standard.items()}
    folded = {name: _folded(sites.by_name[name], kinds[name], own, metric, metric.fold) for name, own in raw.items()}
    if normalization == "none":
        return folded
    everything = torch.cat(list(folded.values()))
    if normalization == "mean":
        scale = everything.abs().mean().clamp(min=1e-300)
        return {name: scores / scale for name, scores in folded.items()}
    if normalization == "log":
        floor = everything[everything > 0].min() if bool((everything > 0).any()) else torch.tensor(1e-300)
        return {name: scores.clamp(min=float(floor)).log() for name, scores in folded.items()}
    ranks = torch.empty_like(everything)
    ranks[everything.argsort(stable=True)] = torch.arange(1, len(everything) + 1, dtype=everything.dtype)
    split = torch.split(ranks / len(everything), [len(scores) for scores in folded.values()])
    return dict(zip(folded, split, strict=True))


def _standardized(scores: torch.Tensor) -> torch.Tensor:
    """Scores with mean 0 and standard deviation 1; zeros where they do not differ, as one KV group cannot."""
    centred = scores - scores.mean()
    scale = float(scores.std()) if len(scores) > 1 else 0.0
    return centred / scale if scale > 1e-12 * float(scores.abs().max()) else torch.zeros_like(scores)


def _folded(site: Site, kind: str, scores: torch.Tensor, metric: Metric, how: str) -> torch.Tensor:
    if metric.level == "units":
        return scores
    grouped = site.fold(scores, kind)
    return grouped.sum(-1) if how == "sum" else grouped.mean(-1)
