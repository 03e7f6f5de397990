"""The stops of a run, one function each: texts, statistics and plan, repair. `pipeline` walks them in order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from .allocation import allocate
from .budgets import allocate_within, even_cosine, even_scores, gone_first
from .calibration import calibration_blocks, report_blocks, window_counts
from .clock import Clock
from .clustering import cluster_domains
from .compensation import check_enough_tokens, counted_windows
from .config import PruningConfig, Source
from .costs import Costs
from .documents import Documents, distinct_names, read_source, refuse_overlap
from .errors import CalibrationError, ConfigError
from .importance import Scores, needs_of, score_units, unit_of
from .masking import masked
from .metrics import METRICS
from .offers import target_removal
from .offloading import check_finite
from .plan import PruningPlan
from .positions import check_lengths
from .recording import collect_statistics
from .repairing import is_repaired
from .run_artefacts import kept_scores, kept_statistics
from .run_folder import RunFolder
from .sites import ModelSites
from .statistics import Needs, Statistics, mean_cosine
from .token_blocks import TokenBlocks
from .workers import Alone

__all__ = [
    "Measure",
    "check_gradient_windows",
    "check_weights",
    "decide",
    "decide_by",
    "even_plan",
    "gather_texts",
    "layer_by_layer_config",
    "needs_text",
    "text_part",
    "what_to_collect",
]

logger = logging.getLogger(__name__)

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
    run: RunFolder | None = None,
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
        run ([`RunFolder`], *optional*): keeps what every round measured, and the plan.

    Returns:
        `tuple`: the plan, and the statistics of the dense model; `None` where all that they are needed for was kept.
    """
    clock = clock or Clock()
    needs = what_to_collect(config, plan) if needs is None else needs

    def dense(own: Needs) -> Statistics:
        assert blocks is not None
        return kept_statistics(
            run,
            sites,
            blocks,
            own,
            workers or Alone(),
            lambda place: _collect(sites, blocks, own, config, place, workers),
            gradient_samples=config.calibration.gradient_samples,
            gram_place=config.gram_place,
            folder=folder,
        )

    given = plan
    if plan is None and run is not None and (found := run.read("plan")) is not None:
        plan = PruningPlan.from_dict(found[1])
    if plan is not None:
        if statistics is None and needs is not None and blocks is not None and not is_repaired(run, plan, config):
            statistics = dense(needs)
        clock.stop("statistics")
        return plan, statistics

    def measure(
        own: Needs | None, current: PruningPlan | None
    ) -> tuple[Scores, torch.Tensor | None, Statistics | None]:
        nonlocal statistics
        if current is None:
            if statistics is None and own is not None and blocks is not None:
                statistics = dense(own)
            clock.stop("statistics")
            return (*_measured(sites, config, statistics), statistics)
        statistics = None  # let go of the last round's before the next one's are collected

        def again() -> tuple[Scores, torch.Tensor | None]:
            found = None
            if own is not None and blocks is not None:
                with masked(sites, current):
                    found = _collect(sites, blocks, own, config, folder, workers)
            clock.stop("statistics")
            return _measured(sites, config, found)

        return (*kept_scores(run, f"rounds/{current.digest[:12]}", again), None)

    plan, statistics = decide_by(sites, config, needs, measure, costs or Costs.of(sites, config), clock)
    if run is not None and given is None:
        run.keep("plan", {}, plan.to_dict())
    return plan, statistics


def _measured(
    sites: ModelSites, config: PruningConfig, statistics: Statistics | None
) -> tuple[Scores, torch.Tensor | None]:
    scores = _scores(sites, config, statistics)
    if statistics is None or statistics.cosine is None:
        return scores, None
    return scores, mean_cosine(statistics, statistics.sample_weights(config.calibration.domain_weights))


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


def check_gradient_windows(config: PruningConfig, needs: Needs | None) -> None:
    """Refuse domains without a window that goes backward: metrics that read gradients would not hear of them.

    Args:
        config ([`PruningConfig`]): the calibration text, of which every source or cluster is a domain.
        needs ([`Needs`], *optional*): what its metrics read.

    Raises:
        ConfigError: fewer windows with gradients than domains.
    """
    own = config.calibration
    reads = needs is not None and (needs.gradients or needs.elements)
    if reads and own.gradient_samples < own.domain_count:
        raise ConfigError(
            f"`calibration.gradient_samples` should give each of the {own.domain_count} sources or clusters a window, "
            "or metrics that read gradients know nothing of the others. "
            f"Found {own.gradient_samples}. Raise it, name fewer of them, or score by other metrics."
        )


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
        CalibrationError: no tokenizer, windows longer than the model's learned positions, texts that overlap, or too
            little text.
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
    lengths = {"calibration.sequence_length": own.sequence_length} if measures or walks else {}
    if own.report:
        lengths["calibration.evaluation_length"] = own.evaluation_length
    if config.search is not None and config.search.objective not in ("accuracy", "custom"):
        lengths["search.sequence_length"] = config.search.sequence_length
    check_lengths(sites.model, lengths)
    read: dict[str, list[Documents]] = {}
    counts = window_counts(own.samples, own.shares or (1.0,) * len(own.sources))
    equal = [-(-own.samples // len(own.sources))]
    for role, sources, windows in (
        ("calibration", own.sources, counts),
        ("selection", own.selection, equal * len(own.selection)),
        ("report", own.report, equal * len(own.report)),
    ):
        read[role] = [
            read_source(
                source,
                tokenizer=tokenizer,
                model=sites.model,
                seed=config.seed,
                self_tokens=count * own.sequence_length * 5 // 4,
                part=text_part(source, role),
            )
            for source, count in zip(sources, windows, strict=True)
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
            shares=own.shares,
            seed=config.seed,
            vocab_size=vocabulary,
            allow_fewer=True,
        )
        if own.clusters:
            blocks = cluster_domains(sites, blocks, own.clusters, config.seed)
        if config.repair.method != "none" and config.repair.holdout > 0 and len(blocks) > 1:
            blocks, held_out = blocks.split(config.repair.holdout, config.seed)
        widest = {site.name: site.whole for site in sites if unit_of(site, config.units)}
        counted = counted_windows(blocks, own.domain_weights)
        check_enough_tokens(sites, counted.tokens, config.repair, widest)
    reports = {
        name: report_blocks(documents, tokenizer, tokens=own.evaluation_tokens, sequence_length=own.evaluation_length)
        for name, documents in zip(distinct_names(own.name for own in read["report"]), read["report"], strict=True)
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
