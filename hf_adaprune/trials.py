"""Trials from cached statistics: a point becomes scores, a plan, repairs, and one masked forward on selection text.

No backward pass, no calibration pass and no reload: what a trial costs beside its forward is small dense algebra.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .budgets import allocate_within, even_scores, nested_plans
from .compensation import Repair, repair_plan
from .config import ImportanceConfig, PruningConfig
from .costs import Costs
from .errors import BudgetError, CalibrationError, ConfigError
from .importance import Scores, mix_scores, raw_scores, scored_kinds
from .masking import masked
from .measures import Measure
from .metrics import METRICS, Context, block_influence
from .offers import offers_of
from .plan import PruningPlan
from .quiet import quiet_bars
from .search.journal import Rows
from .search.problem import Candidate, Slot
from .search.space import Space
from .sites import ModelSites
from .statistics import Statistics, mean_cosine
from .workers import Alone

__all__ = ["CachedScores", "Trials"]

CLOSE = 1e-4  # weights of a point have six digits, and what they differ by from the center costs no metric anew


class CachedScores:
    """Scores for any weights over calibration domains and metrics, from numbers that are computed once.

    Metrics that are linear in the sample weights are mixed from those of the single domains, which is exact. Metrics
    that invert moments cost seconds, so they are computed for each domain alone and for the `center` (the weights of
    trial 0), and interpolated between these: exact there, and a lower bound on the way, since a removal's error after
    the best refit is concave in the moments. All others are computed anew, which is cheap.

    Args:
        sites ([`ModelSites`]): the dense model.
        units (`tuple[str, ...]`): what may go.
        statistics ([`Statistics`]): with a Gram matrix per domain where several domains are weighted.
        center (`tuple[float, ...]`): domain weights that are exact for every metric; every window alike where empty.
        seed (`int`): of random scores.
    """

    def __init__(
        self, sites: ModelSites, units: tuple[str, ...], statistics: Statistics, center: tuple[float, ...], seed: int
    ) -> None:
        self.sites, self.statistics, self.seed = sites, statistics, seed
        self.kinds = scored_kinds(sites, units)
        self.center = _normalized(center or statistics.shares)
        self._raw: dict[Any, dict[str, torch.Tensor]] = {}

    def scores(self, config: ImportanceConfig, weights: tuple[float, ...] = ()) -> Scores:
        """Scores of all units.

        Args:
            config ([`ImportanceConfig`]): metrics and how they are mixed.
            weights (`tuple[float, ...]`, *optional*): of the domains; every window alike where empty.
        """
        own = _normalized(weights or self.statistics.shares)
        raw = {name: self._metric(name, config, own) for name, weight in config.metrics.items() if weight > 0}
        influence = block_influence(self._context(config, own)) if config.metrics.get("block_influence") else None
        return mix_scores(self.sites, self.kinds, raw, config, influence)

    def prepare(self, asked: Sequence[tuple[ImportanceConfig, tuple[float, ...]]], workers: Alone) -> None:
        """Compute what scores are mixed from and is not there yet, every process for its share of the sites.

        Args:
            asked (sequence of `tuple`): metrics, and weights of the domains.
            workers ([`Alone`]): the processes; all of them call this with the same.
        """
        missing: dict[Any, ImportanceConfig] = {}
        for config, weights in asked:
            anchors = self._anchors(_normalized(weights or self.statistics.shares))
            for name, weight in config.metrics.items():
                if weight > 0 and _interpolated(name):
                    keys = [_key(name, anchor, config) for anchor, _ in anchors]
                    missing.update(dict.fromkeys(keys, config))
        # The first process has computed more where it alone decided something: what one lacks, all compute.
        lacking = set().union(*workers.gather([{key for key in missing if key not in self._raw}]))
        missing = {key: config for key, config in missing.items() if key in lacking}

        def compute() -> list[dict[str, torch.Tensor]]:
            found = []
            for turn, ((name, anchor, _), config) in enumerate(missing.items()):
                own = self.sites.sites[(workers.rank + turn) % workers.count :: workers.count]
                part = replace(self.sites, sites=own)
                found.append(raw_scores(part, self.kinds, name, self._context(config, anchor)))
            return found

        shares = workers.gather([workers.each(compute)])
        for number, key in enumerate(missing):
            together = {site: values for share in shares for site, values in share[number].items()}
            self._raw[key] = {site.name: together[site.name] for site in self.sites}

    def _metric(self, name: str, config: ImportanceConfig, weights: tuple[float, ...]) -> dict[str, torch.Tensor]:
        if not _interpolated(name):
            return raw_scores(self.sites, self.kinds, name, self._context(config, weights))
        mixed: dict[str, torch.Tensor] = {}
        for anchor, share in self._anchors(weights):
            for site, own in self._anchor(name, config, anchor).items():
                mixed[site] = mixed[site] + share * own if site in mixed else share * own
        return mixed

    def _anchors(self, weights: tuple[float, ...]) -> list[tuple[tuple[float, ...], float]]:
        """The weights as a mixture of the center and of single domains, with as much of the center as fits."""
        inside = [(weight / middle) for weight, middle in zip(weights, self.center, strict=True) if middle > 0]
        share = min(inside, default=0.0)
        if share > 1 - CLOSE:
            return [(self.center, 1.0)]
        found = [(self.center, share)] if share > 1e-9 else []
        for domain, (weight, middle) in enumerate(zip(weights, self.center, strict=True)):
            rest = weight - share * middle
            if rest > 1e-9:
                found.append((tuple(float(other == domain) for other in range(len(weights))), rest))
        return found

    def _anchor(self, name: str, config: ImportanceConfig, weights: tuple[float, ...]) -> dict[str, torch.Tensor]:
        key = _key(name, weights, config)
        if key not in self._raw:
            self._raw[key] = raw_scores(self.sites, self.kinds, name, self._context(config, weights))
        return self._raw[key]

    def _context(self, config: ImportanceConfig, weights: tuple[float, ...]) -> Context:
        spread = self.statistics.sample_weights(weights)
        return Context(self.statistics, spread, config.reduction, config.damping, config.damping_scale, self.seed)


def _interpolated(name: str) -> bool:
    return METRICS[name].linear or METRICS[name].needs.gram


def _key(name: str, weights: tuple[float, ...], config: ImportanceConfig) -> tuple[Any, ...]:
    """What numbers of a metric hang on."""
    return name, weights, (config.damping, config.damping_scale) if METRICS[name].needs.gram else ()


@dataclass(eq=False)
class _Payload:
    plans: tuple[PruningPlan, ...]
    config: PruningConfig
    repairs: list[dict[str, Repair]] = field(default_factory=list)


class Trials:
    """The problem of a search over one model (see [`hf_adaprune.search.problem.Problem`]).

    Args:
        sites ([`ModelSites`]): the dense model; untouched after every trial.
        config ([`PruningConfig`]): trial 0.
        space ([`Space`]): what varies.
        statistics ([`Statistics`]): of the dense model.
        measure ([`Measure`]): what is minimised.
        costs ([`Costs`], *optional*): what plans cost; made anew where not given.
        scores ([`CachedScores`], *optional*): of an earlier search on these statistics; made anew where they are exact
            for other domain weights than trial 0's.

    Raises:
        CalibrationError: domains are weighted, and one of them has no window.
    """

    def __init__(
        self,
        sites: ModelSites,
        config: PruningConfig,
        space: Space,
        statistics: Statistics,
        measure: Measure,
        costs: Costs | None = None,
        scores: CachedScores | None = None,
    ) -> None:
        self.sites, self.config, self.space, self.statistics, self.own = sites, config, space, statistics, measure
        self.first, self.windows, self.fresh = measure.first, measure.windows, measure.fresh
        self.batch = measure.batch
        self.logarithmic = measure.logarithmic
        # Trial 0's, exactly: fixed by the space, or the config's.
        center = space.apply(config, {}).calibration.domain_weights
        empty = [name for name, share in zip(statistics.domains, statistics.shares, strict=True) if not share]
        if empty and any(dimension.path == "calibration.domain_weights" for dimension in space.dimensions):
            raise CalibrationError(
                f"{', '.join(empty)} has no calibration window left to weight: the check of repairs holds them out. "
                "Raise calibration.samples, or lower repair.holdout or calibration.clusters."
            )
        if scores is None or scores.center != _normalized(center or statistics.shares):
            scores = CachedScores(sites, config.units, statistics, center, config.seed)
        self.scores = scores
        self.costs = costs or Costs.of(sites, config)
        search = config.search
        self.ratios = search.ratios if search is not None else ()
        wanted = ("ratio", "parameters", *config.budgets, *([search.pareto] if search and search.pareto else []))
        self.cost_names = tuple(dict.fromkeys(wanted))
        self.slots = tuple(
            Slot(
                offer.site.name,
                offer.site.layer,
                offer.site.kind,
                offer.site.units(self.scores.kinds[offer.site.name]),
                offer.site.unit_parameters(self.scores.kinds[offer.site.name]),
            )
            for offer in offers_of(sites, even_scores(sites, config), config)
        )

    def prepare(self, points: Sequence[Mapping[str, Any]], workers: Alone) -> None:
        """Compute the scores that candidates are mixed from, each process those of some sites."""
        asked = []
        for point in points:
            with contextlib.suppress(BudgetError, ConfigError):  # the trial says what is wrong
                asked.append(self.config_of(point))
        with quiet_bars():
            self.scores.prepare([(own.importance, own.calibration.domain_weights) for own in asked], workers)

    def config_of(self, point: Mapping[str, Any]) -> PruningConfig:
        """The config that a point stands for, without its search."""
        return self.space.apply(self.config, point).with_changes(search=None)

    def plans(self, config: PruningConfig) -> tuple[PruningPlan, ...]:
        """The plan of a config, or the nested plans of a search over several ratios, ascending."""
        scores = self.scores.scores(config.importance, config.calibration.domain_weights)
        cosine = None
        if self.statistics.cosine is not None:
            spread = self.statistics.sample_weights(config.calibration.domain_weights)
            cosine = mean_cosine(self.statistics, spread)
        if self.ratios:
            return tuple(nested_plans(self.sites, scores, config, self.ratios, self.costs, cosine).values())
        return (allocate_within(self.sites, scores, config, self.costs, cosine),)

    def candidate(self, point: Mapping[str, Any]) -> Candidate:
        """The candidate of a point.

        Raises:
            BudgetError, ConfigError: the point has no plan.
        """
        config = self.config_of(point)
        with quiet_bars():
            plans = self.plans(config)
        said = json.dumps([[plan.digest for plan in plans], *self._repair_facts(config)], sort_keys=True)
        plan = plans[-1]
        costs = {name: self.costs.cost(name, plan) for name in self.cost_names}
        widths = {name: _units_kept(kept, self.scores.kinds[name]) for name, kept in plan.changed()}
        widths |= {site.name: 0 for site in self.sites if site.layer in plan.dropped_layers}
        return Candidate(hashlib.sha256(said.encode()).hexdigest(), costs, widths, _Payload(plans, config))

    def _repair_facts(self, config: PruningConfig) -> list[Any]:
        """What decides a repair beside its plan."""
        own = config.repair
        if own.method == "none":
            return ["none"]
        weights = list(_normalized(config.calibration.domain_weights or self.statistics.shares))
        if own.method == "bias":
            return ["bias", weights]
        return [own.method, own.damping, own.damping_scale, own.intercept and not self.config.uniform, weights]

    def repairs(self, payload: _Payload) -> list[dict[str, Repair]]:
        """Cached repairs of a candidate's plans; computed once."""
        if not payload.repairs:
            weights = self.statistics.sample_weights(payload.config.calibration.domain_weights)
            repair = replace(
                payload.config.repair, intercept=payload.config.repair.intercept and not self.config.uniform
            )
            payload.repairs.extend(
                repair_plan(self.sites, plan, self.statistics, weights, repair, torch.float32) for plan in payload.plans
            )
        return payload.repairs

    def measure(self, candidate: Candidate, start: int, stop: int) -> Rows:
        """Rows of windows `[start, stop)`: the count, and the objective's sum for every plan."""
        payload: _Payload = candidate.payload
        columns = []
        with quiet_bars():
            for plan, repairs in zip(payload.plans, self.repairs(payload), strict=True):
                with masked(self.sites, plan, repairs, narrow=True):
                    columns.append(self.own.rows(start, stop))
        return tuple((rows[0][0], *(value for _, value in rows)) for rows in zip(*columns, strict=True))


def _normalized(weights: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(weight / sum(weights) for weight in weights)


def _units_kept(kept: Any, kind: str) -> int:
    return len(kept.kept_groups) if kind in ("kv_group", "expert") else len(kept.kept)
