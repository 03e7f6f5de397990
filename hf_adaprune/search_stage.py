"""A search, on its own or as a stop of a run: statistics, trials, and windows drawn anew in the mixture found.

Trials weight the windows of one pool, of which every source has an equal share: a winner that trusts two of four
sources is measured on half of the pool. Drawn by its weights, as many windows all count.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from .allocation_checks import tell_unread_fields
from .architectures import Architecture
from .clock import Clock
from .compensation import Repair, repair_plan
from .config import PruningConfig
from .costs import Costs
from .masking import masked
from .measures import Measure
from .model_config import own_architecture
from .parallel import collect_together, processes
from .plan import PruningPlan
from .repairing import cached_repairs, own_repair
from .run_artefacts import kept_blocks, kept_statistics
from .run_folder import RunFolder
from .run_start import begin_run, is_resumed, room_for_moments
from .search.journal import Journal, mean_value
from .search_checks import check_reach, check_search, named_objective, search_needs, trial_needs
from .searching import SearchResult, find_best, shared_costs
from .selection import check_selection, measure_of
from .sites import ModelSites, find_sites, uncompiled
from .stages import check_weights, decide, gather_texts
from .statistics import Needs, Statistics
from .token_blocks import TokenBlocks
from .workers import Alone

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Redrawn", "Searched", "mixture_drawn", "redraw", "search_plan", "search_stage"]

# A pool of which nine tenths count as much as equal windows would is left as it is.
EFFECTIVE = 0.9


def search_plan(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    config: PruningConfig | Mapping[str, Any] | str | None = None,
    *,
    journal: str | os.PathLike[str] | None = None,
    resume: bool = False,
    warm_start: str | os.PathLike[str] | None = None,
    objective: Callable[[Any], Any] | None = None,
    architecture: Architecture | None = None,
    run_dir: str | os.PathLike[str] | None = None,
) -> SearchResult:
    """Search for the best way to prune a model, which stays as it is.

    A trial is scored, allocated and repaired from statistics that are collected once, and measured by one forward on
    selection text. Under `accelerate launch` the processes share the calibration windows and the trials: all of them
    have to call it, each with the whole model on its device, and all get the same result. The first one writes the
    journal.

    Args:
        model (`PreTrainedModel`): a decoder-only causal language model with its weights in memory.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): needed wherever text is read.
        config ([`PruningConfig`], `dict` or `str`, *optional*): where the search starts, with its [`SearchConfig`]: a
            config, its fields or the name of a recipe; the recipe `default` and 60 trials where not given. Name
            `calibration.selection` texts.
        journal (`str`, *optional*): file in which every trial is written when it is done; a kill loses at most the
            running one, or what several processes have measured since they last met (four trials each).
        resume (`bool`, *optional*, defaults to `False`): go on with that journal, to the same trials as without a stop.
        warm_start (`str`, *optional*): journal of another search (of a smaller model, or another ratio) over the same
            space; its best points are tried first.
        objective (`Callable`, *optional*): function of the model that returns a number to minimise, or one per sample.
        architecture ([`Architecture`], *optional*): of a family that is not built in.
        run_dir (`str`, *optional*): folder in which windows and statistics are kept for a restart, as by
            [`hf_adaprune.prune`]; with it the journal is gone on with by the same call.

    Returns:
        [`SearchResult`]: carry its plan out with `prune(model, tokenizer, result.config, plan=result.plan)`.

    Raises:
        UnsupportedModelError: the model cannot be pruned.
        ConfigError, BudgetError, CalibrationError, JournalError: before any trial.
        RunError, CheckpointError: `run_dir` is of a run with other inputs or in use, or its disk lacks room.
    """
    clock = Clock()
    config = PruningConfig.read("default" if config is None else config)
    config = config.with_changes(search={}) if config.search is None else config
    model = uncompiled(model)
    sites = find_sites(model, own_architecture(model, architecture))
    check_weights(sites)
    workers = processes()
    config = named_objective(config, objective)
    check_search(config)
    tell_unread_fields(config)
    costs = shared_costs(sites, config, workers)
    check_reach(sites, config, costs)
    workers.each(partial(check_selection, config, objective))
    needs = search_needs(config, config.calibration.domain_count)
    unreported = config.with_changes(calibration={"report": ()})
    with ExitStack() as stack:
        run = begin_run(stack, run_dir, sites, tokenizer, unreported, None, workers, journal, resume, warm_start)
        blocks, _, _ = kept_blocks(run, workers, partial(gather_texts, sites, tokenizer, unreported, True))
        assert blocks is not None
        clock.stop("texts")
        place = stack.enter_context(room_for_moments(config))
        return search_stage(
            sites, tokenizer, config, blocks, None, needs, folder=place, costs=costs, clock=clock, workers=workers,
            run=run, journal=journal, resume=resume or is_resumed(run), warm_start=warm_start, objective=objective,
        ).found  # fmt: skip


@dataclass(frozen=True, eq=False)
class Searched:
    """What a search left behind.

    Args:
        found ([`SearchResult`]): its winner; drawn anew where that was better.
        repairs (`dict[str, Repair]`): of the winner, cached ones, where its schedule asks for them.
        blocks, held_out ([`TokenBlocks`]): the windows that its plan and repairs are made of.
    """

    found: SearchResult
    repairs: Mapping[str, Repair] = field(default_factory=dict)
    blocks: TokenBlocks | None = None
    held_out: TokenBlocks | None = None


def search_stage(
    sites: ModelSites,
    tokenizer: PreTrainedTokenizerBase | None,
    config: PruningConfig,
    blocks: TokenBlocks,
    held_out: TokenBlocks | None,
    needs: Needs,
    *,
    folder: str | None,
    costs: Costs,
    clock: Clock,
    workers: Alone,
    run: RunFolder | None = None,
    objective: Any = None,
    **options: Any,
) -> Searched:
    """Collect statistics, search, and draw the winner's windows anew; the model is untouched.

    Args:
        sites ([`ModelSites`]): the dense model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): for calibration and selection text.
        config ([`PruningConfig`]): with its search, checked.
        blocks ([`TokenBlocks`]): calibration windows.
        held_out ([`TokenBlocks`], *optional*): windows that no repair may see.
        needs ([`Needs`]): of the search.
        folder (`str`, *optional*): for Gram matrices on disk.
        costs ([`Costs`]): what budgets are about.
        clock ([`Clock`]): counts seconds.
        workers ([`Alone`]): processes that share windows and trials; all of them have to call this.
        run ([`RunFolder`], *optional*): keeps statistics and repairs for a restart.
        objective (`Callable`, *optional*): see [`hf_adaprune.search_plan`].
        **options: of [`hf_adaprune.searching.find_best`].
    """
    how: dict[str, Any] = {
        "gradient_samples": config.calibration.gradient_samples, "gram_place": config.gram_place
    }  # fmt: skip

    def collect(place: str | None) -> Statistics:
        return collect_together(sites, blocks, needs, workers, folder=place, **how)

    statistics = kept_statistics(run, sites, blocks, needs, workers, collect, folder=folder, **how)
    clock.stop("statistics")
    measure = measure_of(sites, tokenizer, config, objective, workers)
    clock.stop("selection text")
    found = find_best(
        sites, tokenizer, config, statistics, costs=costs, workers=workers, clock=clock, measure=measure, **options
    )
    repairs = cached_repairs(sites, found.plan, statistics, found.config, run)
    shares = statistics.shares
    del statistics  # before others are collected
    made = _drawn_anew(sites, tokenizer, config, found, shares, measure, folder, costs, clock, workers)
    if made is None:
        return Searched(found, repairs, blocks, held_out)
    return Searched(replace(found, config=made.config, plan=made.plan), made.repairs, made.blocks, made.held_out)


def _drawn_anew(
    sites: ModelSites,
    tokenizer: Any,
    config: PruningConfig,
    found: SearchResult,
    shares: Sequence[float],
    measure: Measure,
    folder: str | None,
    costs: Costs,
    clock: Clock,
    workers: Alone,
) -> Redrawn | None:
    """The winner on windows drawn anew, if it is better there; what came of it goes into the journal."""
    search, journal = config.search, found.journal
    assert search is not None
    drawn = mixture_drawn(found.config, shares)
    before = _fresh_value(journal)
    if drawn is None or before is None or not search.redraw or search.pareto is not None or search.ratios:
        return None
    about = {"number": found.winner.number, "trials": len(journal.trials)}
    known = journal.event("redrawn")
    known = known if known is not None and {name: known.get(name) for name in about} == about else None
    if known is not None and not known["better"]:
        return None
    made = redraw(sites, tokenizer, drawn, measure, folder=folder, costs=costs, clock=clock, workers=workers)
    own = made.config.calibration
    names = [str(source) if isinstance(source, str) else source.name for source in own.sources]
    if known is None:
        said = {"shares": dict(zip(names, own.shares, strict=True)), "value": made.value, "before": before}
        known = {**about, **said, "better": made.value < before}
        workers.each(lambda: journal.add_event("redrawn", known))
    return made if known["better"] else None


def _fresh_value(journal: Journal) -> float | None:
    """The winner's objective on the windows that no trial saw."""
    winner = journal.winner()
    rows = [final.rows for final in journal.finals if winner is not None and final.number == winner.number]
    return mean_value(rows[0]) if rows else None


@dataclass(frozen=True, eq=False)
class Redrawn:
    """A decision on windows drawn anew.

    Args:
        config ([`PruningConfig`]): with `calibration.shares`.
        plan ([`PruningPlan`]): what it decides.
        repairs (`dict[str, Repair]`): cached ones, where the config's schedule asks for them.
        value (`float`): the search's objective on the selection windows that no trial saw.
        blocks, held_out ([`TokenBlocks`]): the windows.
    """

    config: PruningConfig
    plan: PruningPlan
    repairs: Mapping[str, Repair]
    value: float
    blocks: TokenBlocks | None
    held_out: TokenBlocks | None


def mixture_drawn(config: PruningConfig, shares: Sequence[float]) -> PruningConfig | None:
    """A config whose domain weights are shares of the windows too; `None` where nothing is to be gained.

    Args:
        config ([`PruningConfig`]): a winner's.
        shares (sequence of `float`): of the windows that every source has now, positive, adding up to 1.

    Returns:
        [`PruningConfig`]: sources that would give less than half a window are left out. `None` without weights, for
        weights on clusters, and where the weighted windows are worth 90 % of as many equal ones (by Kish's effective
        sample size).
    """
    own = config.calibration
    if not own.domain_weights or own.clusters:
        return None
    total = sum(own.domain_weights)
    weights = [weight / total for weight in own.domain_weights]
    spread = sum(weight**2 / share for weight, share in zip(weights, shares, strict=True) if weight > 0)
    if 1 / spread > EFFECTIVE:
        return None
    kept = [index for index, weight in enumerate(weights) if weight * own.samples >= 0.5]
    drawn = tuple(weights[index] for index in kept)
    sources = tuple(own.sources[index] for index in kept)
    # The weights stay beside the shares: a source too short for its share still counts as much.
    return config.with_changes(calibration={"sources": sources, "shares": drawn, "domain_weights": drawn})


def redraw(
    sites: ModelSites,
    tokenizer: PreTrainedTokenizerBase | None,
    config: PruningConfig,
    measure: Measure,
    *,
    folder: str | None = None,
    costs: Costs | None = None,
    clock: Clock | None = None,
    workers: Alone | None = None,
) -> Redrawn:
    """Draw the windows, decide and repair as the config says, and measure on fresh selection windows.

    Args:
        sites ([`ModelSites`]): the dense model; untouched.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        config ([`PruningConfig`]): from [`mixture_drawn`], without a search.
        measure ([`Measure`]): the search's, with fresh windows.
        folder (`str`, *optional*): for Gram matrices on disk.
        costs ([`Costs`], *optional*): what budgets are about.
        clock ([`Clock`], *optional*): counts seconds.
        workers ([`Alone`], *optional*): processes that share the windows; all of them have to call this.

    Raises:
        CalibrationError: the text is too short for a window of every source.
    """
    workers, clock = workers or Alone(), clock or Clock()
    text = config.with_changes(calibration={"report": (), "selection": ()})  # compared for overlaps before the search
    blocks, held_out, _ = workers.each(partial(gather_texts, sites, tokenizer, text, True))
    plan, statistics = decide(
        sites, blocks, config, needs=trial_needs(config), folder=folder, clock=clock, costs=costs, workers=workers
    )
    repairs: Mapping[str, Repair] = cached_repairs(sites, plan, statistics, config)
    own = own_repair(config)
    compared = repairs
    if not repairs and own.method != "none":  # as trials were compared
        assert statistics is not None
        weights = statistics.sample_weights(config.calibration.domain_weights)
        compared = repair_plan(sites, plan, statistics, weights, own)
    del statistics

    def measured() -> Any:
        with masked(sites, plan, compared, narrow=True):
            return measure.rows(measure.windows, measure.windows + measure.fresh)

    value = mean_value(workers.lead(measured))
    clock.stop("redraw")
    return Redrawn(config, plan, repairs, value, blocks, held_out)
