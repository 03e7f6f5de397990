"""`prune()`: a `PruningConfig` walks the eight stops, and a `PruningResult` comes back.

Find sites, build the calibration pool, collect statistics once, score, allocate, save the plan, repair and cut, report.
Every recipe is a config on this one way.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .allocation_checks import tell_unread_fields
from .architectures import Architecture
from .clock import Clock
from .config import PruningConfig, Source
from .costs import Costs
from .errors import ConfigError
from .evaluation import Measurement, perplexity
from .model_config import MODEL_TAGS, PROVENANCE_KEY, check_configs, own_architecture
from .parallel import processes
from .parts import sources_of
from .plan import PruningPlan
from .public import base_model_name
from .repairing import RepairReport, cached_repairs, choose_repairs
from .run_artefacts import kept_blocks, repair_name
from .run_folder import RunFolder, once_noted
from .run_start import begin_run, is_resumed, room_for_moments
from .search_checks import check_reach, check_search, named_objective, search_needs
from .search_stage import search_stage
from .searching import SearchResult, shared_costs
from .selection import check_selection
from .sites import ModelSites, find_sites, uncompiled
from .stages import check_gradient_windows, check_weights, decide, gather_texts, layer_by_layer_config, what_to_collect
from .statistics import Needs
from .surgery import Follow, apply_plan, assign_layer
from .token_blocks import TokenBlocks
from .whole_files import check_no_folder, check_writable
from .workers import Alone

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .compensation import Repair

__all__ = [
    "Decision",
    "PruningResult",
    "Sizes",
    "as_sources",
    "carry_out",
    "decide_and_repair",
    "note_provenance",
    "prune",
]


@dataclass(frozen=True)
class Sizes:
    """How large a model is.

    Args:
        decoder (`int`): parameters of the decoder layers.
        total (`int`): parameters of the model; tied ones once.
        bytes (`int`): of the weights, in their dtypes.
    """

    decoder: int
    total: int
    bytes: int

    @classmethod
    def of(cls, sites: ModelSites) -> Sizes:
        """Measure a model."""
        parameters = {id(p): p for p in sites.model.parameters()}.values()
        return cls(
            sites.decoder_parameters,
            sum(p.numel() for p in parameters),
            sum(p.numel() * p.element_size() for p in parameters),
        )


@dataclass(frozen=True, eq=False)
class PruningResult:
    """What came of a run.

    Args:
        model (`PreTrainedModel`): the pruned model: the object that went in, smaller. Where
            anything went, its `name_or_path` is empty until it is saved, and then the folder; its config says what it
            was made from.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): as given.
        config ([`PruningConfig`]): what was asked for.
        plan ([`PruningPlan`]): which units stayed.
        before, after ([`Sizes`]): the model's sizes.
        repairs (`tuple[RepairReport, ...]`): per site, where held-out windows were measured.
        repair_schedule (`str`): `cached`, `sequential` or `none`: what the repair came to.
        evaluation (`dict[str, dict[str, Measurement]]`): per report source, `dense` and `pruned` perplexity.
        calibration (`dict[str, Any]`): tokens, windows, digest and domains of the pool, and the token (BOS) that all
            windows begin with.
        seconds (`dict[str, float]`): time per stop.
        search ([`SearchResult`], *optional*): what a search found; `config` and `plan` are its winner's.
        base_model (`str`, *optional*): the dense model's id on the Hub, or the name of its folder.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase | None
    config: PruningConfig
    plan: PruningPlan
    before: Sizes
    after: Sizes
    repairs: tuple[RepairReport, ...] = ()
    repair_schedule: str = "none"
    evaluation: Mapping[str, Mapping[str, Measurement]] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    search: SearchResult | None = None
    base_model: str = ""

    @property
    def pruning_ratio(self) -> float:
        """Decoder-layer parameters removed, over those there were."""
        return (self.before.decoder - self.after.decoder) / self.before.decoder

    def to_dict(self) -> dict[str, Any]:
        """Everything but model and tokenizer, as JSON types."""
        return {
            "config": self.config.to_dict(),
            "plan": self.plan.to_dict(),
            "plan_digest": self.plan.digest,
            "pruning_ratio": self.pruning_ratio,
            "before": vars(self.before),
            "after": vars(self.after),
            "repair": {
                "schedule": self.repair_schedule,
                "dropped": [report.name for report in self.repairs if not report.kept],
                "sites": [vars(report) for report in self.repairs],
            },
            "evaluation": {
                source: {which: vars(value) for which, value in pair.items()}
                for source, pair in self.evaluation.items()
            },
            "calibration": dict(self.calibration),
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            **({"base_model": self.base_model} if self.base_model else {}),
            **({} if self.search is None else {"search": self.search.to_dict()}),
        }

    def save_pretrained(self, output_dir: str | os.PathLike[str], **options: Any) -> Path:
        """Save checkpoint, plan and provenance, and check that they reload; see [`hf_adaprune.save_pruned`]."""
        from .saving import save_pruned

        return save_pruned(self, output_dir, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> CommitInfo:
        """Publish everything with a model card, in one commit; see [`hf_adaprune.push_to_hub`]."""
        from .hub import push_to_hub

        return push_to_hub(self, repo_id, **options)


def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    config: PruningConfig | Mapping[str, Any] | str | None = None,
    *,
    calibration: Sequence[Source] | Source | None = None,
    plan: PruningPlan | None = None,
    plan_path: str | os.PathLike[str] | None = None,
    architecture: Architecture | None = None,
    journal: str | os.PathLike[str] | None = None,
    resume: bool = False,
    warm_start: str | os.PathLike[str] | None = None,
    objective: Callable[[Any], Any] | None = None,
    run_dir: str | os.PathLike[str] | None = None,
) -> PruningResult:
    """Prune a causal language model, in place; with `config.search`, by the best config and plan that it finds.

    Under `accelerate launch` all processes have to call it: they share the windows and trials of a search, and each
    prunes its own copy of the model by the same plan. Save on one of them, `if PartialState().is_main_process`.

    Args:
        model (`PreTrainedModel`): a decoder-only causal language model with its weights in memory, on any device. For
            one that does not fit there is [`prune_to_disk`].
        tokenizer (`PreTrainedTokenizerBase`, *optional*): needed wherever text is read.
        config ([`PruningConfig`], `dict` or `str`, *optional*): what to do: a config, its fields or the name of a
            recipe; the recipe `default` where not given.
        calibration (`str`, [`TextSource`] or a list of them, *optional*): sources instead of the config's; a list of
            documents in memory is given as `TextSource(name, texts)`.
        plan ([`PruningPlan`], *optional*): carry out this plan instead of deciding one. Only what its repair needs is
            collected then.
        plan_path (`str`, *optional*): the plan is written here as soon as it is decided, so that an interrupted run can
            go on with `plan=PruningPlan.load(plan_path)`.
        architecture ([`Architecture`], *optional*): of a family that is not built in.
        journal (`str`, *optional*): file in which a search writes every trial; see [`hf_adaprune.search_plan`].
        resume (`bool`, *optional*, defaults to `False`): go on with that journal.
        warm_start (`str`, *optional*): journal of another search to start from.
        objective (`Callable`, *optional*): function of the model that a search minimises.
        run_dir (`str`, *optional*): folder in which everything expensive is kept when it is done: windows, statistics,
            plan, repairs, measured perplexities. After a kill the same call with the dense model goes on from there, to
            the same bits, and with the journal of its search. The folder takes as much disk as the statistics take
            memory; remove it when the result is saved.

    Returns:
        [`PruningResult`]

    Raises:
        UnsupportedModelError: the model cannot be pruned.
        ConfigError, BudgetError, CalibrationError, JournalError: before any work is lost; the model is untouched then.
        RunError: `run_dir` is of a run with other inputs (the message says which), or in use by another process.
        CheckpointError: its disk lacks room, or transformers would not save the model's configs as they are.

    Example:

    ```python
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from hf_adaprune import PruningConfig, prune

    model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")
    tokenizer = AutoTokenizer.from_pretrained("HuggingFaceTB/SmolLM2-135M")
    result = prune(model, tokenizer, PruningConfig.recipe("default", pruning_ratio=0.2))
    result.save_pretrained("smollm2-pruned")
    ```
    """
    clock = Clock()
    config = PruningConfig.read("default" if config is None else config)
    if calibration is not None:
        config = config.with_changes(calibration={"sources": as_sources(calibration)})
    config = layer_by_layer_config(named_objective(config, objective))
    model = uncompiled(model)
    sites = find_sites(model, own_architecture(model, architecture))
    check_weights(sites)
    check_configs(model)
    before = Sizes.of(sites)
    needs = what_to_collect(config, plan)
    check_gradient_windows(config, needs)
    # Only a search is shared; a run without one does not wait for other processes.
    workers = processes() if config.search is not None and plan is None else Alone()
    costs = shared_costs(sites, config, workers)
    if plan is not None:
        sites.check(plan)
        config = config.with_changes(search=None)
    else:
        check_search(config)
        tell_unread_fields(config)
        check_reach(sites, config, costs)  # what cannot be met fails before any text is read
    asked = config.search
    if asked is not None:
        if asked.pareto is not None:
            raise ConfigError("`search.pareto` finds many plans. Call search_plan() and prune with the one you choose.")
        if asked.ratios and config.pruning_ratio not in asked.ratios:
            raise ConfigError(
                f"`pruning_ratio` {config.pruning_ratio:g} should be one of `search.ratios` {list(asked.ratios)}: that "
                "plan is carried out."
            )
        needs = search_needs(config, config.calibration.domain_count)
        workers.each(partial(check_selection, config, objective))
    if plan_path is not None:
        check_no_folder("plan_path", plan_path)
        check_writable(plan_path)
        Path(plan_path).absolute().parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        run = begin_run(stack, run_dir, sites, tokenizer, config, plan, workers, journal, resume, warm_start)
        resume = resume or is_resumed(run)
        clock.stop("find sites")

        read = partial(gather_texts, sites, tokenizer, config, needs is not None)
        blocks, held_out, reports = kept_blocks(run, workers, read)
        clock.stop("texts")
        dense = {name: _perplexity(run, "dense", model, report) for name, report in reports.items()}
        clock.stop("report dense")

        made = decide_and_repair(
            sites, tokenizer, config, blocks, held_out, plan=plan, needs=needs, costs=costs, clock=clock,
            workers=workers, plan_path=plan_path, run=run, journal=journal, resume=resume, warm_start=warm_start,
            objective=objective,
        )  # fmt: skip
        config, plan = made.config, made.plan
        cut = carry_out(sites, made)
        clock.stop("surgery")
        note_provenance(cut, config, plan)
        model.add_model_tags(list(MODEL_TAGS))
        after = Sizes.of(cut)
        place = repair_name("report", config, plan)
        pruned = {name: _perplexity(run, place, model, report) for name, report in reports.items()}
        clock.stop("report pruned")
    facts = {} if made.blocks is None else made.blocks.facts()
    evaluation = {name: {"dense": dense[name], "pruned": pruned[name]} for name in reports}
    return PruningResult(
        model,
        tokenizer,
        config,
        plan,
        before,
        after,
        made.reports,
        made.schedule,
        evaluation,
        facts,
        clock.seconds,
        made.search,
        base_model_name(model),
    )


def _perplexity(run: RunFolder | None, which: str, model: Any, blocks: TokenBlocks) -> Measurement:
    place = f"{which}/{blocks.digest[:12]}"
    return Measurement(**once_noted(run, place, lambda: dict(vars(perplexity(model, blocks)))))


@dataclass(frozen=True, eq=False)
class Decision:
    """A plan and how it is repaired, not carried out yet.

    Args:
        config ([`PruningConfig`]): what decided it; a search's winner.
        plan ([`PruningPlan`]): which units stay.
        repairs (`dict[str, Repair]`): by site.
        schedule (`str`): what the repair came to.
        reports (`tuple[RepairReport, ...]`): per site, where held-out windows were measured.
        blockwise (`dict[int, dict[str, torch.Tensor]]`): weights of regionally optimised layers, by old number.
        search ([`SearchResult`], *optional*): what a search found.
        blocks ([`TokenBlocks`], *optional*): the calibration windows that decided.
    """

    config: PruningConfig
    plan: PruningPlan
    repairs: Mapping[str, Repair] = field(default_factory=dict)
    schedule: str = "none"
    reports: tuple[RepairReport, ...] = ()
    blockwise: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    search: SearchResult | None = None
    blocks: TokenBlocks | None = None


def decide_and_repair(
    sites: ModelSites,
    tokenizer: PreTrainedTokenizerBase | None,
    config: PruningConfig,
    blocks: TokenBlocks | None,
    held_out: TokenBlocks | None,
    *,
    plan: PruningPlan | None = None,
    needs: Needs | None = None,
    costs: Costs | None = None,
    clock: Clock | None = None,
    workers: Alone | None = None,
    plan_path: str | os.PathLike[str] | None = None,
    run: RunFolder | None = None,
    **options: Any,
) -> Decision:
    """Statistics, scores or a search, a plan and its repairs; the model is untouched.

    Args:
        sites ([`ModelSites`]): the model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): for the selection text of a search.
        config ([`PruningConfig`]): how, checked.
        blocks ([`TokenBlocks`], *optional*): calibration windows.
        held_out ([`TokenBlocks`], *optional*): windows that no repair may see.
        plan ([`PruningPlan`], *optional*): a plan that stands already.
        needs ([`Needs`], *optional*): what to collect.
        costs ([`Costs`], *optional*): of the model.
        clock ([`Clock`], *optional*): counts seconds.
        workers ([`Alone`], *optional*): processes that share windows and a search; all have to call this, with the same
            windows.
        plan_path (`str`, *optional*): where the plan is written as soon as it is decided.
        run ([`RunFolder`], *optional*): keeps everything for a restart.
        **options: see [`hf_adaprune.search_plan`].

    Returns:
        [`Decision`]
    """
    clock, workers = clock or Clock(), workers or Alone()
    costs = costs or shared_costs(sites, config, workers)
    folder = room_for_moments(config)
    with folder as place:
        found: SearchResult | None = None
        if config.search is not None:
            assert blocks is not None and needs is not None
            searched = search_stage(
                sites, tokenizer, config, blocks, held_out, needs, folder=place, costs=costs, clock=clock,
                workers=workers, run=run, **options,
            )  # fmt: skip
            found, cached, blocks, held_out = searched.found, searched.repairs, searched.blocks, searched.held_out
            config, plan = found.config, found.plan
        else:
            plan, statistics = decide(
                sites, blocks, config, plan=plan, needs=needs, folder=place, clock=clock, costs=costs, workers=workers,
                run=run,
            )  # fmt: skip
            cached = cached_repairs(sites, plan, statistics, config, run)
            del statistics
        if plan_path is not None and workers.rank == 0:
            plan.save(plan_path)
        clock.stop("repair")
        repairs, schedule, reports, blockwise = choose_repairs(
            sites, plan, cached, blocks, held_out, config, clock, run
        )
    return Decision(config, plan, repairs, schedule, reports, blockwise, found, blocks)


def carry_out(sites: ModelSites, made: Decision, follow: Follow | None = None) -> ModelSites:
    """Cut a model in place by a decision.

    Args:
        sites ([`ModelSites`]): the model.
        made ([`Decision`]): for this model.
        follow (`Callable`, *optional*): see [`hf_adaprune.apply_plan`].

    Returns:
        [`ModelSites`]: the sites of the cut model.
    """
    cut = apply_plan(sites, made.plan, made.repairs, follow)
    for number, state in made.blockwise.items():
        assign_layer(cut.layers[made.plan.kept_layers().index(number)], state)
    return cut


def as_sources(given: Any) -> tuple[Source, ...]:
    """The sources that a caller gave: one, several, or (as `None`) none.

    Raises:
        ConfigError: it is neither a source nor a list of sources.
    """
    return sources_of("sources", given)


def note_provenance(sites: ModelSites, config: PruningConfig, plan: PruningPlan) -> None:
    """A line about a run in config.json, unless the model is in the uniform form, which carries no trace.

    Args:
        sites ([`ModelSites`]): the pruned model.
        config ([`PruningConfig`]): what was asked for.
        plan ([`PruningPlan`]): what was carried out.
    """
    from . import __version__

    provenance = sites.model.config.__dict__.get(PROVENANCE_KEY)
    if provenance is None:
        return
    history = [*provenance.get("history", ()), {"recipe": config.recipe_name, "plan": plan.digest}]
    setattr(sites.model.config, PROVENANCE_KEY, {**provenance, "version": __version__, "history": history})
