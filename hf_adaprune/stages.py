"""The stops of a run, one function each: texts, statistics and plan, repair. `pipeline` walks them in order."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from .allocation import allocate
from .budgets import allocate_within, even_cosine, even_scores, gone_first
from .calibration import TokenBlocks, calibration_blocks, report_blocks
from .clustering import cluster_domains
from .compensation import Moments, Repair, check_enough_tokens, output_error, repair_plan
from .config import PruningConfig, RepairConfig, Source
from .costs import Costs
from .documents import Documents, read_source, refuse_overlap
from .errors import CalibrationError, ConfigError
from .evaluation import per_window_loss
from .importance import Scores, needs_of, score_units, unit_of
from .layerwise import regional_weights, sequential_repairs
from .masking import masked
from .metrics import METRICS
from .moments import covariance
from .offers import target_removal
from .offloading import check_finite
from .plan import PruningPlan
from .recording import collect_statistics, quiet_model
from .sites import ModelSites, Site
from .statistics import Needs, Statistics, mean_cosine
from .workers import Alone

__all__ = [
    "Clock",
    "Measure",
    "RepairReport",
    "cached_repairs",
    "check_repairs",
    "check_weights",
    "choose_repairs",
    "decide",
    "decide_by",
    "even_plan",
    "gather_texts",
    "layer_by_layer_config",
    "lowest",
    "needs_text",
    "own_repair",
    "text_part",
    "what_to_collect",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RepairReport:
    """What a repair did to one site (or block) on held-out calibration windows.

    Args:
        name (`str`): site or layer.
        before, after (`float`): squared output error per token without and with the repair.
        kept (`bool`): a repair that does not lower the error is dropped.
    """

    name: str
    before: float
    after: float
    kept: bool


class Clock:
    """Counts the seconds of every stop."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def stop(self, name: str) -> None:
        """Book the time since the last stop under a name."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now


# One round's measurement: what to keep, and the plan so far, give scores, mean cosines `[layers]`, and statistics.
Measure = Callable[[Needs | None, PruningPlan | None], tuple[Scores, torch.Tensor | None, Statistics | None]]


def decide(
    sites: ModelSites,
    blocks: TokenBlocks | None,
    config: PruningConfig,
    *,
    plan: PruningPlan | None = None,
    needs: Needs | None = None,
    statistics: Statistics | None = None,
    folder: str | None = None,
    clock: Clock | None = None,
    costs: Costs | None = None,
    workers: Alone | None = None,
) -> tuple[PruningPlan, Statistics | None]:
    """Collect statistics and decide a plan; the model is not changed.

    Args:
        sites ([`ModelSites`]): the dense model.
        blocks ([`TokenBlocks`], *optional*): calibration windows; `None` where nothing is measured.
        config ([`PruningConfig`]): how.
        plan ([`PruningPlan`], *optional*): a plan that stands already.
        needs ([`Needs`], *optional*): what to collect; from the config where not given.
        statistics ([`Statistics`], *optional*): of the dense model, where they were collected before.
        folder (`str`, *optional*): for Gram matrices on disk.
        clock ([`Clock`], *optional*): counts seconds.
        costs ([`Costs`], *optional*): what the config's budgets are about; made anew where not given.
        workers ([`Alone`], *optional*): processes that share the windows, which have to be the same on all.

    Returns:
        `tuple`: the plan, and the statistics of the dense model.
    """
    clock = clock or Clock()
    needs = what_to_collect(config, plan) if needs is None else needs
    if plan is not None:
        if statistics is None and needs is not None and blocks is not None:
            statistics = _collect(sites, blocks, needs, config, folder, workers)
        clock.stop("statistics")
        return plan, statistics

    def measure(
        own: Needs | None, current: PruningPlan | None
    ) -> tuple[Scores, torch.Tensor | None, Statistics | None]:
        nonlocal statistics
        if (current is not None or statistics is None) and own is not None and blocks is not None:
            statistics = None  # let go of the last round's before the next one's are collected
            with masked(sites, current) if current is not None else nullcontext():
                statistics = _collect(sites, blocks, own, config, folder, workers)
        clock.stop("statistics")
        scores = _scores(sites, config, statistics)
        if statistics is None or statistics.cosine is None:
            return scores, None, statistics
        weights = statistics.sample_weights(config.calibration.domain_weights)
        return scores, mean_cosine(statistics, weights), statistics

    return decide_by(sites, config, needs, measure, costs or Costs.of(sites, config), clock)


def decide_by(
    sites: ModelSites, config: PruningConfig, needs: Needs | None, measure: Measure, costs: Costs, clock: Clock
) -> tuple[PruningPlan, Statistics | None]:
    """Measure and allocate, in as many rounds as the config's allocation has steps.

    Args:
        sites ([`ModelSites`]): the model; its weights are looked at by `measure` alone.
        config ([`PruningConfig`]): how.
        needs ([`Needs`], *optional*): what the first round keeps.
        measure (`Callable`): one round's measurement.
        costs ([`Costs`]): what the config's budgets are about.
        clock ([`Clock`]): counts seconds.

    Returns:
        `tuple`: the plan, and the statistics of the first round.
    """
    steps = config.allocation.steps
    current: PruningPlan | None = None
    cosines: list[torch.Tensor] = []
    dense_statistics: Statistics | None = None
    for step in range(1, steps + 1):
        scores, cosine, statistics = measure(needs if step == 1 else _scoring_needs(config), current)
        dense_statistics = statistics if step == 1 else dense_statistics
        del statistics
        if current is not None:
            scores = gone_first(sites, scores, current)
        if cosine is not None:
            cosines.append(cosine)
        part = _part_of(config, sites, step / steps, costs)
        mean_cosines = torch.stack(cosines) if cosines else None
        if part.budgets:
            current = allocate_within(sites, scores, part, costs, mean_cosines, start=current)
        else:
            current = allocate(sites, scores, part, mean_cosines, start=current)
        clock.stop("plan")
    assert current is not None
    return current, dense_statistics


def needs_text(config: PruningConfig) -> bool:
    """Whether a config reads any text, and so needs a tokenizer."""
    walks = config.repair.method == "least_squares" or config.repair.regional_steps > 0
    reads = walks or bool(config.calibration.report) or config.search is not None
    return reads or what_to_collect(config, None) is not None


def check_weights(sites: ModelSites) -> None:
    """Refuse weights that are not there or not finite, before any work.

    Raises:
        UnsupportedModelError: with the name of the parameter.
    """
    check_finite(sites.model.named_parameters())


# -- before anything is measured --------------------------------------------------------------------------------------


def _scoring_needs(config: PruningConfig) -> Needs | None:
    needs = needs_of(config.importance) | Needs(cosine=config.allocation.method == "similarity")
    # Random and magnitude scores read weights only.
    return None if set(config.importance.metrics) <= {"random", "magnitude"} and needs == Needs() else needs


def what_to_collect(config: PruningConfig, plan: PruningPlan | None) -> Needs | None:
    """What the one pass has to keep; `None` where no text is needed at all."""
    needs = None if plan is not None else _scoring_needs(config)
    repair = config.repair
    walks = repair.schedule == "sequential" or config.layer_by_layer
    if repair.method == "least_squares" and not walks:
        needs = (needs or Needs()) | Needs(gram=True)
    elif repair.method == "bias":
        needs = needs or Needs()
    return needs


def layer_by_layer_config(config: PruningConfig) -> PruningConfig:
    """The config that a run with `layer_by_layer` walks by: metrics that read the moments of all layers are left out.

    Raises:
        ConfigError: no other metric is left.
    """
    if not config.layer_by_layer:
        return config
    needs_of(config.importance)
    metrics = config.importance.metrics
    left = {name: weight for name, weight in metrics.items() if not METRICS[name].needs.gram}
    if not any(left.values()):
        raise ConfigError(
            "`layer_by_layer` holds the moments of one layer at a time, but every metric of `importance.metrics` reads "
            "those of all layers. Use fisher or wifv, or keep the moments on disk with gram_place='disk'."
        )
    if left != metrics:
        logger.warning(
            "layer by layer: scored by %s alone, %s would need all moments.",
            *map(_names, (left, set(metrics) - set(left))),
        )
    return config.with_changes(importance={"metrics": left})


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def even_plan(sites: ModelSites, config: PruningConfig, costs: Costs | None = None) -> PruningPlan:
    """The plan of scores that are alike everywhere per parameter: its size is that of any plan, to within a unit.

    Args:
        sites ([`ModelSites`]): the model, on the meta device too.
        config ([`PruningConfig`]): the budget and its rules.
        costs ([`Costs`], *optional*): of the model; made anew where not given.

    Raises:
        BudgetError: the rules do not let enough go.
        ConfigError: nothing in the model may go.
    """
    costs = costs or Costs.of(sites, config)
    return allocate_within(sites, even_scores(sites, config), config, costs, even_cosine(sites))


def gather_texts(
    sites: ModelSites, tokenizer: Any, config: PruningConfig, measures: bool
) -> tuple[TokenBlocks | None, TokenBlocks | None, dict[str, TokenBlocks]]:
    """Read all texts, refuse overlaps, and cut calibration, held-out and report windows.

    Args:
        sites ([`ModelSites`]): the model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): needed wherever text is read.
        config ([`PruningConfig`]): its part `calibration`.
        measures (`bool`): whether statistics will be collected; a repair that walks the layers needs text too.

    Returns:
        `tuple`: calibration windows, held-out windows (for the check of repairs), and report windows by source.

    Raises:
        CalibrationError: no tokenizer, texts that overlap, or too little text.
    """
    own = config.calibration
    walks = config.repair.method == "least_squares" or config.repair.regional_steps > 0
    if not measures and not walks and not own.report:
        return None, None, {}
    if tokenizer is None:
        raise CalibrationError(
            "text is needed for this config, and no tokenizer came. Pass tokenizer=AutoTokenizer.from_pretrained(...) "
            "or use a recipe that reads only weights (magnitude, random)."
        )
    read: dict[str, list[Documents]] = {}
    for role, sources in (("calibration", own.sources), ("selection", own.selection), ("report", own.report)):
        read[role] = [
            read_source(
                source,
                tokenizer=tokenizer,
                model=sites.model,
                seed=config.seed,
                self_tokens=own.samples * own.sequence_length * 5 // (4 * len(own.sources)),
                part=text_part(source, role),
            )
            for source in sources
        ]
    refuse_overlap(read)
    vocabulary = sites.model.get_input_embeddings().num_embeddings
    blocks = held_out = None
    if measures or walks:
        blocks = calibration_blocks(
            read["calibration"],
            tokenizer,
            samples=own.samples,
            sequence_length=own.sequence_length,
            seed=config.seed,
            vocab_size=vocabulary,
            allow_fewer=True,
        )
        if own.clusters:
            blocks = cluster_domains(sites, blocks, own.clusters, config.seed)
        if config.repair.method != "none" and config.repair.holdout > 0 and len(blocks) > 1:
            blocks, held_out = blocks.split(config.repair.holdout, config.seed)
        widest = {site.name: site.whole for site in sites if unit_of(site, config.units)}
        check_enough_tokens(sites, blocks.tokens, config.repair, widest)
    reports = {
        documents.name: report_blocks(
            documents, tokenizer, tokens=own.evaluation_tokens, sequence_length=own.evaluation_length
        )
        for documents in read["report"]
    }
    return blocks, held_out, reports


def text_part(source: Source, role: str) -> tuple[int, int] | None:
    """Which third of the texts of CPython a role reads, so that `python` can stand in all three; `None` for others."""
    parts = {"calibration": (0, 3), "selection": (1, 3), "report": (2, 3)}
    return parts[role] if isinstance(source, str) and source.split(":")[0] == "python" else None


# -- scores -----------------------------------------------------------------------------------------------------------


def _collect(
    sites: ModelSites,
    blocks: TokenBlocks,
    needs: Needs,
    config: PruningConfig,
    folder: str | None,
    workers: Alone | None,
) -> Statistics:
    weighted = bool(config.calibration.domain_weights)
    return collect_statistics(
        sites,
        blocks,
        replace(needs, per_domain=needs.per_domain or (weighted and len(blocks.domains) > 1)),
        gradient_samples=config.calibration.gradient_samples,
        gram_place=config.gram_place,
        folder=folder,
        workers=workers,
    )


def _scores(sites: ModelSites, config: PruningConfig, statistics: Statistics | None) -> Scores:
    weights = None
    if statistics is None:
        nothing = torch.zeros(1)
        statistics = Statistics({}, nothing, nothing.long(), ("none",), ("all",), nothing[:0].long(), None, "")
    else:
        weights = statistics.sample_weights(config.calibration.domain_weights)
    return score_units(sites, config.units, config.importance, statistics, weights=weights, seed=config.seed)


def _part_of(config: PruningConfig, sites: ModelSites, share: float, costs: Costs) -> PruningConfig:
    """The config of a round: the same, with its share of the whole removal."""
    if share >= 1:
        return config
    # What budgets come to is known to within a unit before there are scores.
    removal = costs.removed(even_plan(sites, config, costs)) if config.budgets else target_removal(sites, config)
    ratio = max(0, removal) / sites.decoder_parameters * share
    return replace(config, pruning_ratio=ratio, target_parameters=None, target_bytes=None, budgets={})


# -- repair -----------------------------------------------------------------------------------------------------------

_Repaired = tuple[dict[str, Repair], str, tuple[RepairReport, ...], dict[int, dict[str, torch.Tensor]]]


def cached_repairs(
    sites: ModelSites, plan: PruningPlan, statistics: Statistics | None, config: PruningConfig
) -> dict[str, Repair]:
    """The repairs that the dense model's moments give, where the config's schedule asks for them.

    A stop of its own, so that the statistics, by far the largest thing in memory, can be let go before the next one.

    Args:
        sites ([`ModelSites`]): the dense model.
        plan ([`PruningPlan`]): which units stay.
        statistics ([`Statistics`], *optional*): of the dense model.
        config ([`PruningConfig`]): how.
    """
    own = own_repair(config)
    if own.method == "none" or own.schedule == "sequential" or statistics is None:
        return {}
    weights = statistics.sample_weights(config.calibration.domain_weights)
    return repair_plan(sites, plan, statistics, weights, own)


def own_repair(config: PruningConfig) -> RepairConfig:
    """The repair that the rest of a config leaves possible."""
    walks = config.layer_by_layer and config.repair.method == "least_squares"
    schedule = "sequential" if walks else "cached" if config.repair.method == "bias" else config.repair.schedule
    return replace(config.repair, intercept=config.repair.intercept and not config.uniform, schedule=schedule)


def choose_repairs(
    sites: ModelSites,
    plan: PruningPlan,
    cached: Mapping[str, Repair],
    blocks: TokenBlocks | None,
    held_out: TokenBlocks | None,
    config: PruningConfig,
    clock: Clock | None = None,
) -> _Repaired:
    """Repair a plan by the config's schedule, and drop repairs that do not help on held-out windows.

    Args:
        sites ([`ModelSites`]): the dense model; untouched.
        plan ([`PruningPlan`]): which units stay.
        cached (`dict[str, Repair]`): the cached repairs.
        blocks ([`TokenBlocks`], *optional*): the calibration windows.
        held_out ([`TokenBlocks`], *optional*): windows that no repair has seen.
        config ([`PruningConfig`]): how.
        clock ([`Clock`], *optional*): counts seconds.

    Returns:
        `tuple`: repairs by site, the schedule they came from, reports, and weights of regionally optimised layers.
    """
    clock = clock or Clock()
    own = own_repair(config)
    if blocks is None:
        return {}, "none", (), {}
    schedule = own.schedule if own.method != "none" else "none"
    repairs = dict(cached)
    if own.method == "least_squares" and schedule in ("sequential", "best"):
        with quiet_model(sites.model):
            walked = sequential_repairs(sites, plan, blocks, own, config.calibration.domain_weights)
        # A walk's repairs build on one another and on the pruned model's inputs, so they stay or go as a whole.
        other = {"cached": repairs} if schedule == "best" else {"none": {}}
        schedule, repairs = _better(sites, plan, {"sequential": walked, **other}, held_out)
        clock.stop("repair")
    reports: tuple[RepairReport, ...] = ()
    if held_out is not None and repairs and schedule == "cached":
        reports = check_repairs(sites, plan, repairs, held_out, config)
        repairs = {report.name: repairs[report.name] for report in reports if report.kept}
        clock.stop("check repair")
    blockwise: dict[int, dict[str, torch.Tensor]] = {}
    if own.regional_steps > 0:
        with quiet_model(sites.model):
            blockwise, found = regional_weights(sites, plan, repairs, blocks, own, config.seed)
        reports += tuple(RepairReport(name, before, after, after < before) for name, before, after in found)
        clock.stop("regional repair")
    return repairs, schedule, reports, blockwise


def _better(
    sites: ModelSites, plan: PruningPlan, candidates: Mapping[str, dict[str, Repair]], held_out: TokenBlocks | None
) -> tuple[str, dict[str, Repair]]:
    """The candidate with the lowest loss on held-out windows; the first one where there are none."""
    losses = dict.fromkeys(candidates, 0.0)
    for name, repairs in candidates.items():
        if held_out is None:
            break
        with masked(sites, plan, repairs):
            sums = per_window_loss(sites.model, held_out).sum(0)
        losses[name] = float(sums[0] / sums[1])
    logger.info("held-out loss: %s", ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
    best = lowest(losses)
    if best == "none":
        logger.warning("the sequential repair was dropped, it did not lower the loss on held-out windows.")
    return best, dict(candidates[best])


def lowest(losses: Mapping[str, float]) -> str:
    """The name of the lowest loss, the first one of equals; one that is not a number is never lower than another."""
    return min(losses, key=lambda name: (math.isnan(losses[name]), losses[name]))


def _parts(sites: list[Site]) -> Iterator[list[Site]]:
    """Sites in runs whose Gram matrices take a quarter of what all take: the check must not set the peak of memory."""
    room = max(2**25, sum(site.columns**2 for site in sites) // 4)
    part: list[Site] = []
    for site in sites:
        if part and sum(other.columns**2 for other in part) + site.columns**2 > room:
            yield part
            part = []
        part.append(site)
    if part:
        yield part


def check_repairs(
    sites: ModelSites, plan: PruningPlan, repairs: Mapping[str, Repair], held_out: TokenBlocks, config: PruningConfig
) -> tuple[RepairReport, ...]:
    """Output errors with and without each repair, on moments of windows that no repair has seen.

    Args:
        sites ([`ModelSites`]): the dense model, or a layer of it.
        plan ([`PruningPlan`]): which units stay.
        repairs (`dict[str, Repair]`): by site.
        held_out ([`TokenBlocks`]): the windows.
        config ([`PruningConfig`]): where moments are held.
    """
    weights = torch.ones(len(held_out))
    reports = []
    for part in _parts([sites.by_name[name] for name in repairs]):
        # A part is small, so its moments need no disk.
        place = "model" if config.gram_place == "model" else "cpu"
        statistics = collect_statistics(
            replace(sites, sites=tuple(part)), held_out, Needs(gram=True), gram_place=place, description="check repair"
        )
        for site in part:
            matrix, mean, _ = covariance(site, statistics, weights)
            moments = Moments(matrix, mean)
            before = output_error(site, plan.sites[site.name], moments, None)
            after = output_error(site, plan.sites[site.name], moments, repairs[site.name])
            reports.append(RepairReport(site.name, before, after, after < before))
    dropped = [report.name for report in reports if not report.kept]
    if dropped:
        logger.warning(
            "repairs of %d of %d sites were dropped, they did not lower the error on held-out windows: %s",
            len(dropped),
            len(reports),
            ", ".join(dropped),
        )
    return tuple(reports)
