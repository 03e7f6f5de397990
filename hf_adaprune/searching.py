"""A search over one model: texts, statistics and trials joined with the loop that knows no model."""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging as transformers_logging

from .budgets import check_budgets
from .calibration import TokenBlocks, report_blocks
from .config import PruningConfig
from .costs import Costs, SpeedTable
from .documents import read_source
from .errors import CalibrationError, ConfigError, JournalError
from .evaluation import read_rows
from .metrics import METRICS
from .plan import PruningPlan
from .search.journal import Journal, Trial, mean_value
from .search.loop import WARM_POINTS, Progress, Slot, View, finalists, front, run_search
from .search.space import Choice, Point, Simplex, Space, default_space
from .search_config import REFINING, SPEEDS
from .sites import ModelSites
from .stages import Clock, text_part, what_to_collect
from .statistics import Needs, Statistics
from .trials import CachedScores, Measure, Trials, custom_measure, row_measure, window_measure
from .workers import Alone

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "FrontPoint",
    "SearchResult",
    "check_journal",
    "check_search",
    "find_best",
    "measure_of",
    "search_needs",
    "selection_blocks",
    "shared_costs",
]

logger = logging.getLogger(__name__)

_STRATEGIES = {
    "gp": ("gaussian_process", "propose_gp"),
    "random": ("baselines", "propose_random"),
    "sobol": ("baselines", "propose_sobol"),
    "tpe": ("baselines", "propose_tpe"),
    "predictor": ("predictor", "propose_predictor"),
    "evolution": ("evolution", "propose_evolution"),
}
# Fields that a trial can change without a new pass over the calibration text.
_SEARCHABLE = ("importance.", "allocation.", "repair.")
_SINGLE = (
    "pruning_ratio", "channel_multiple", "min_channels", "min_groups", "protected_layers",
    "calibration.domain_weights",
)  # fmt: skip
_NOT = ("allocation.steps", "repair.schedule", "repair.regional_steps", "repair.holdout", "repair.target_mix")


@dataclass(frozen=True)
class FrontPoint:
    """A plan on the front of a Pareto search.

    Args:
        plan ([`PruningPlan`]): which units stay.
        config ([`PruningConfig`]): what decided it.
        costs (`dict[str, float]`): `ratio`, `parameters` and the cost of the search.
        value (`float`): the objective on fresh selection text.
    """

    plan: PruningPlan
    config: PruningConfig
    costs: Mapping[str, float]
    value: float


@dataclass(frozen=True, eq=False)
class SearchResult:
    """What a search found.

    Args:
        config ([`PruningConfig`]): of the winner, without its search.
        plan ([`PruningPlan`]): of the winner; of several nested ones that of the config's ratio, or of the highest.
        journal ([`Journal`]): every trial.
        space ([`Space`]): what varied.
        asked ([`PruningConfig`]): where the search started.
        front (`tuple[FrontPoint, ...]`): of a Pareto search, by size.
        nested (`dict[float, PruningPlan]`): by pruning ratio, of a search over several.
    """

    config: PruningConfig
    plan: PruningPlan
    journal: Journal
    space: Space
    asked: PruningConfig
    front: tuple[FrontPoint, ...] = ()
    nested: Mapping[float, PruningPlan] = field(default_factory=dict)

    @property
    def winner(self) -> Trial:
        """The trial that won."""
        winner = self.journal.winner()
        assert winner is not None
        return winner

    def to_dict(self) -> dict[str, Any]:
        """The search in short, as JSON types: what varied, what won, and by how much."""
        winner, search = self.winner, self.asked.search
        values = {final.number: mean_value(final.rows) for final in self.journal.finals}
        return {
            "trials": len(self.journal.trials),
            "strategy": list(search.strategy) if search is not None else [],
            "objective": search.objective if search is not None else "",
            "space": self.space.to_dict(),
            "winner": {"trial": winner.number, "strategy": winner.strategy, "point": dict(winner.point)},
            "on_fresh_text": {str(number): value for number, value in values.items()},
            "seed": self.asked.seed,
        }


def check_search(config: PruningConfig) -> None:
    """Refuse what a search cannot do, before any work.

    Raises:
        ConfigError: with the field that contradicts it.
        MissingDependencyError: a strategy's library is missing.
    """
    search = config.search
    if search is None:
        return
    if config.allocation.steps > 1:
        raise ConfigError("`search` scores once; set `allocation.steps` to 1.")
    if config.layer_by_layer:
        raise ConfigError("`search` reads cached moments of all layers, which `layer_by_layer` avoids. Leave out one.")
    for path in search.space:
        known = path in _SINGLE or (path.startswith(_SEARCHABLE) and path not in _NOT)
        if not known:
            raise ConfigError(
                f"`search.space` names {path!r}, which a trial from cached statistics cannot change. It may vary "
                f"{', '.join(_SINGLE)} and fields of importance, allocation and repair; set others in the config."
            )
    refining = [name for name, _ in search.shares() if name in REFINING]
    if refining and (config.uniform or search.pareto or search.ratios):
        raise ConfigError(
            f"the strategy {refining[0]!r} refines how one budget is shared by the layers, which `uniform`, "
            "`search.pareto` and `search.ratios` leave no room for. Use gp."
        )
    if search.pareto is not None and config.budgets:
        raise ConfigError("`search.pareto` varies the size, which `budgets` would fix. Leave out one of them.")
    if search.objective != "custom" and search.objective != "accuracy" and search.selection_tokens < 4:
        raise ConfigError("`search.selection_tokens` is too small to measure anything.")
    for name, _ in search.shares():
        strategy(name)


def strategy(name: str) -> Callable[[View, int], Sequence[Any]]:
    """A strategy by name; its libraries load on first use.

    Raises:
        MissingDependencyError: the extra that brings its library is not installed.
    """
    module, function = _STRATEGIES[name]
    if name == "tpe":
        from .search.baselines import need_optuna

        need_optuna()
    found: Callable[[View, int], Sequence[Any]] = getattr(
        importlib.import_module(f".search.{module}", __package__), function
    )
    return found


def search_needs(config: PruningConfig, domains: int) -> Needs:
    """What the one pass has to keep for every trial of a search.

    Args:
        config ([`PruningConfig`]): where it starts, with its search.
        domains (`int`): calibration domains.

    Raises:
        ConfigError: an unknown metric, or fewer windows with gradients than weighted domains.
    """
    space = default_space(config, tuple(str(number) for number in range(domains)))
    needs = what_to_collect(space.apply(config, space.default), None) or Needs()
    weighted = False
    for dimension in space.dimensions:
        for value in dimension.values if isinstance(dimension, Choice) else ():
            own = space.apply(config, {**space.default, dimension.path: value})
            needs = needs | (what_to_collect(own, None) or Needs())
        if dimension.path == "importance.metrics" and isinstance(dimension, Simplex):
            for name in dimension.members:
                if name not in METRICS:
                    raise ConfigError(f"no metric {name!r}. Known: {', '.join(sorted(METRICS))}.")
                needs = needs | METRICS[name].needs
        weighted = weighted or dimension.path == "calibration.domain_weights"
    weighted = weighted or bool(config.calibration.domain_weights)
    if weighted and (needs.gradients or needs.elements) and config.calibration.gradient_samples < domains:
        raise ConfigError(
            f"`calibration.gradient_samples` should give each of the {domains} weighted domains a window. Found "
            f"{config.calibration.gradient_samples}."
        )
    return replace(needs, per_domain=needs.per_domain or (weighted and domains > 1))


# -- selection text ---------------------------------------------------------------------------------------------------


def selection_blocks(
    sites: ModelSites, tokenizer: PreTrainedTokenizerBase | None, config: PruningConfig
) -> tuple[TokenBlocks, int]:
    """Windows of selection text, in turns from every source: those of trials, then fresh ones.

    Args:
        sites ([`ModelSites`]): the model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        config ([`PruningConfig`]): `calibration.selection`, and the tokens of `search`.

    Returns:
        `tuple`: the windows, and how many of them are for trials.

    Raises:
        CalibrationError: no tokenizer, no selection source, or too little text.
    """
    search = config.search
    assert search is not None
    if not config.calibration.selection:
        raise CalibrationError(
            "a search chooses on selection text, and none is named. Give calibration.selection (--selection) texts "
            "like those the model will read, other than the calibration texts."
        )
    if tokenizer is None:
        raise CalibrationError("selection text needs a tokenizer. Pass tokenizer=AutoTokenizer.from_pretrained(...).")
    length = search.sequence_length
    wanted = -(-search.selection_tokens // length), -(-search.final_tokens // length)
    sources = config.calibration.selection
    share = -(-sum(wanted) // len(sources))
    per_source = []
    for source in sources:
        documents = read_source(
            source, tokenizer=tokenizer, model=sites.model, seed=config.seed, self_tokens=share * length * 5 // 4,
            part=text_part(source, "selection"),
        )  # fmt: skip
        blocks = report_blocks(documents, tokenizer, tokens=share * length, sequence_length=length)
        whole = blocks.attention_mask.all(1).nonzero().flatten()
        per_source.append(blocks.select(whole if len(whole) else slice(0, 1)))
    names = tuple(name for blocks in per_source for name in blocks.domains)
    order = sorted((window, source) for source, blocks in enumerate(per_source) for window in range(len(blocks)))
    width = max(blocks.input_ids.shape[1] for blocks in per_source)
    if len({blocks.input_ids.shape[1] for blocks in per_source}) > 1:
        raise CalibrationError(f"every selection source should have at least one window of {width} tokens.")
    merged = TokenBlocks(
        torch.stack([per_source[source].input_ids[window] for window, source in order]),
        torch.stack([per_source[source].attention_mask[window] for window, source in order]),
        torch.tensor([source for _, source in order]),
        names,
    )
    windows = wanted[0]
    if len(merged) < sum(wanted):
        # A third stays fresh: a winner chosen on the text it was found on reports its luck.
        windows = max(1, round(len(merged) * wanted[0] / sum(wanted)))
        windows = min(windows, max(1, len(merged) - max(1, len(merged) // 3)))
        logger.warning(
            "the selection text has %d windows of %d tokens, %d were asked for: %d for trials, %d for the finalists.",
            len(merged), length, sum(wanted), windows, len(merged) - windows,
        )  # fmt: skip
    return merged.select(slice(0, sum(wanted))), windows


def measure_of(
    sites: ModelSites,
    tokenizer: PreTrainedTokenizerBase | None,
    config: PruningConfig,
    objective: Callable[[Any], Any] | None = None,
) -> Measure:
    """What a config's search minimises; the dense model's top tokens are read now.

    Args:
        sites ([`ModelSites`]): the dense model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): needed by every objective but `custom`.
        config ([`PruningConfig`]): with its search.
        objective (`Callable`, *optional*): function of the model, instead of the config's objective.

    Raises:
        CalibrationError: no selection text, or no tokenizer.
        ConfigError: the objective is missing or returns something else than numbers.
    """
    search = config.search
    assert search is not None
    if objective is not None or search.objective == "custom":
        if objective is None:
            raise ConfigError("`search.objective='custom'` needs the function: pass objective=.")
        return custom_measure(sites.model, objective)
    share = search.first_tokens / search.selection_tokens
    if search.objective == "accuracy":
        if tokenizer is None:
            raise CalibrationError("multiple-choice rows need a tokenizer. Pass tokenizer=.")
        rows = [row for path in search.tasks for row in read_rows(path)]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed)).tolist()
        windows = max(1, math.ceil(len(rows) * 0.6))
        first = max(1, round(windows * share))
        return row_measure(sites.model, tokenizer, [rows[index] for index in order], first=first, windows=windows)
    blocks, windows = selection_blocks(sites, tokenizer, config)
    first = max(1, round(windows * share))
    return window_measure(sites, blocks, search.objective, first=first, windows=windows)


# -- the search -------------------------------------------------------------------------------------------------------


def find_best(
    sites: ModelSites,
    tokenizer: PreTrainedTokenizerBase | None,
    config: PruningConfig,
    statistics: Statistics,
    *,
    costs: Costs | None = None,
    journal: str | os.PathLike[str] | None = None,
    resume: bool = False,
    warm_start: str | os.PathLike[str] | None = None,
    objective: Callable[[Any], Any] | None = None,
    workers: Alone | None = None,
    clock: Clock | None = None,
    measure: Measure | None = None,
    scores: CachedScores | None = None,
) -> SearchResult:
    """Search on statistics that are collected already; the model is untouched.

    Args:
        sites ([`ModelSites`]): the dense model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): needed by every objective but `custom`.
        config ([`PruningConfig`]): trial 0, and the search.
        statistics ([`Statistics`]): see [`search_needs`].
        costs ([`Costs`], *optional*): of the model; made anew where not given.
        journal (`str`, *optional*): file of the journal; kept in memory where not given.
        resume (`bool`, *optional*, defaults to `False`): go on with the journal if it is there.
        warm_start (`str`, *optional*): journal of another search whose best points are tried first.
        objective (`Callable`, *optional*): function of the model to minimise, instead of the config's objective.
        workers ([`Alone`], *optional*): processes that share the trials; see [`hf_adaprune.parallel`]. All of them
            come back with the same plan and trials.
        clock ([`Clock`], *optional*): counts seconds.
        measure ([`Measure`], *optional*): of an earlier search with the same texts: saves reading the dense model's
            tokens again.
        scores ([`CachedScores`], *optional*): of an earlier search on the same statistics and domain weights.

    Raises:
        BudgetError, ConfigError, CalibrationError, JournalError: before any trial.
    """
    search = config.search
    if search is None:
        raise ConfigError("there is no search in this config. Give search={...}, for example search={'trials': 60}.")
    clock = clock or Clock()
    workers = workers or Alone()
    check_search(config)
    costs = costs or shared_costs(sites, config, workers)
    check_budgets(sites, _highest(config), costs)
    space = default_space(config, statistics.domains, statistics.shares)
    warm = workers.lead(lambda: _warm_points(warm_start, space)) if warm_start is not None else []
    measure = measure or workers.each(lambda: measure_of(sites, tokenizer, config, objective))
    trials = Trials(sites, config, space, statistics, measure, costs, scores)
    book = _journal(sites, config, space, statistics, measure, warm, trials.slots, journal, resume, workers)
    _keep_speeds(trials, book, workers)
    clock.stop("selection text")
    strategies = {name: strategy(name) for name, _ in search.shares()}
    with _Line(search.trials, len(book.trials), workers.rank == 0, measure.logarithmic) as live:
        run_search(trials, space, search, book, strategies, seed=config.seed, workers=workers, live=live, warm=warm)
    clock.stop("search")
    found = workers.lead(lambda: _found(trials, config, book))
    return SearchResult(found.config, found.plan, book, space, config, found.front, found.nested)


@dataclass(frozen=True)
class _Found:
    """What the first process makes of the journal; the others hear of it rather than compute it, bit for bit."""

    config: PruningConfig
    plan: PruningPlan
    front: tuple[FrontPoint, ...]
    nested: Mapping[float, PruningPlan]


def shared_costs(sites: ModelSites, config: PruningConfig, workers: Alone) -> Costs:
    """Costs with which all processes decide alike: speeds differ by device and moment, so the first one measures them.

    Args:
        sites ([`ModelSites`]): the model.
        config ([`PruningConfig`]): budgets and search.
        workers ([`Alone`]): the processes.
    """
    named = {*config.budgets, *([config.search.pareto] if config.search is not None else [])}
    if workers.count == 1 or not named & set(SPEEDS):
        return Costs.of(sites, config)
    return Costs.of(sites, config, workers.lead(lambda: Costs.of(sites, config).speed_table))


def _highest(config: PruningConfig) -> PruningConfig:
    """The config at the highest ratio that its search may ask for."""
    search = config.search
    assert search is not None
    if search.ratios:
        return config.with_changes(pruning_ratio=max(search.ratios), target_parameters=None, target_bytes=None)
    return config


def _found(trials: Trials, config: PruningConfig, book: Journal) -> _Found:
    search = config.search
    assert search is not None
    winner = book.winner()
    assert winner is not None
    own = trials.config_of(winner.point)
    plans = trials.plans(own)
    points: tuple[FrontPoint, ...] = ()
    nested = dict(zip(search.ratios, plans, strict=True)) if search.ratios else {}
    if search.pareto is not None:
        configs = [(trials.config_of(trial.point), trial, value) for trial, value in front(book, search.pareto)]
        points = tuple(FrontPoint(trials.plans(one)[0], one, trial.costs, value) for one, trial, value in configs)
    plan = nested.get(config.pruning_ratio, plans[-1])
    return _Found(own, plan, points, nested)


def _journal(
    sites: ModelSites,
    config: PruningConfig,
    space: Space,
    statistics: Statistics,
    measure: Measure,
    warm: Sequence[Point],
    slots: Sequence[Slot],
    path: str | os.PathLike[str] | None,
    resume: bool,
    workers: Alone,
) -> Journal:
    """The journal on the first process; the others keep theirs in memory, with the same trials."""
    from . import __version__

    header = {
        "version": __version__,
        "config": _asked(config),
        "space": space.to_dict(),
        "model": model_digest(sites),
        "statistics": statistics.digest,
        "selection": measure.digest,
        "windows": [measure.first, measure.windows, measure.fresh],
        "logarithmic": measure.logarithmic,
        # What a reader of the journal needs to tell shares from the widths of trials.
        "sites": {slot.name: slot.units for slot in slots},
        "unit_parameters": {slot.name: slot.cost for slot in slots},
        "warm": hashlib.sha256(json.dumps(list(warm), sort_keys=True).encode()).hexdigest() if warm else "",
    }
    if len(set(workers.gather([(header["statistics"], header["selection"])]))) > 1:
        raise CalibrationError(
            "the processes read different calibration or selection text. Give all of them the same files and versions."
        )
    book = workers.lead(lambda: Journal.start(path, header, resume=resume))
    if workers.rank:
        book.path = None
    return book


def _asked(config: PruningConfig) -> dict[str, Any]:
    """What of a config a journal is bound to: more trials or minutes continue a search, report text is left out."""
    asked = config.to_dict()
    for name in ("trials", "minutes"):
        asked["search"].pop(name)
    asked.pop("version")
    asked["calibration"].pop("report")
    return asked


def check_journal(
    config: PruningConfig,
    journal: str | os.PathLike[str] | None,
    resume: bool,
    warm_start: str | os.PathLike[str] | None = None,
) -> None:
    """Refuse a journal that cannot be gone on with, before any text is read; texts and weights are compared later.

    Args:
        config ([`PruningConfig`]): with its search.
        journal (`str`, *optional*): file of the journal.
        resume (`bool`): whether it may be there.
        warm_start (`str`, *optional*): journal to start from.

    Raises:
        JournalError: it is there and `resume` is not set, it belongs to another config, or a file is no journal.
    """
    if warm_start is not None and not Journal.load(warm_start).measured():
        raise JournalError(f"{warm_start} has no measured trial to start from.")
    if journal is None or not os.path.exists(journal) or not os.path.getsize(journal):
        return
    if not resume:
        raise JournalError(
            f"there is a journal at {journal}. Go on with it (resume=True, --resume), or name another file."
        )
    with open(journal, "rb") as file:
        if not file.readline().endswith(b"\n"):
            return  # torn by a kill at the very start
    there, here = Journal.load(journal).header.get("config", {}), _asked(config)
    different = sorted(name for name in {*there, *here} if there.get(name) != here.get(name))
    if different:
        raise JournalError(
            f"{journal} belongs to another search: {', '.join(different)} of its config differ. Give the same "
            "arguments, or another journal; to start from what it found, pass it as warm start."
        )


def _keep_speeds(trials: Trials, book: Journal, workers: Alone) -> None:
    """Measured speeds go into the journal: a resumed search decides by the same table."""
    if not set(trials.cost_names) & set(SPEEDS):
        return
    event = book.event("speeds")
    if event is None:
        book.add_event("speeds", {"table": trials.costs.speed_table.to_dict()})
    else:
        trials.costs = replace(trials.costs, table=SpeedTable.from_dict(event["table"]))


def model_digest(sites: ModelSites) -> str:
    """A fingerprint of a model: names, shapes, sums and first values of all parameters."""
    digest = hashlib.sha256(sites.architecture.model_type.encode())
    for name, parameter in sites.model.named_parameters():
        flat = parameter.detach().flatten()
        values = [float(flat.double().sum()), *flat[:8].double().tolist()]
        digest.update(json.dumps([name, list(parameter.shape), values]).encode())
    return digest.hexdigest()


def _warm_points(path: str | os.PathLike[str], space: Space) -> list[Point]:
    """The best points of another journal, best first, as far as the space has them.

    Raises:
        JournalError: none of them fits, with the reason.
    """
    other = Journal.load(path)
    if not other.measured():
        raise JournalError(f"{path} has no measured trial to start from.")
    ranked = [trial for trial in finalists(other, 4 * WARM_POINTS) if trial.number > 0]
    fitting = [trial for trial in ranked if space.holds(trial.point)]
    if not fitting:
        there = sorted(other.header.get("space", {}).get("dimensions", {}))
        here = sorted(dimension.path for dimension in space.dimensions)
        raise JournalError(
            f"{path} cannot start this search: its trials vary {', '.join(there) or 'nothing'}, this one varies "
            f"{', '.join(here)}, and weights or control points may differ in number. Search the same space."
        )
    return [dict(trial.point) for trial in fitting[:WARM_POINTS]]


class _Line:
    """The live line: trial, last, best, what was predicted, time left."""

    def __init__(self, trials: int, done: int, enabled: bool, logarithmic: bool = True) -> None:
        self.said = _percent if logarithmic else _plain
        self.bar = (
            transformers_logging.tqdm(total=trials, initial=done, desc="search", unit="trial") if enabled else None
        )

    def __call__(self, progress: Progress) -> None:
        if self.bar is None:
            return
        said = f"best {self.said(progress.best)} (trial {progress.best_number}), last {self.said(progress.value)}"
        if progress.trial.predicted is not None:
            mean, deviation = progress.trial.predicted
            said += f", predicted {self.said(mean)} ± {self.said(deviation).lstrip('+')}"
        minutes, seconds = divmod(round(progress.seconds_left), 60)
        self.bar.set_postfix_str(f"{said}, {minutes}:{seconds:02d} left", refresh=False)
        self.bar.update(1)

    def __enter__(self) -> _Line:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.close()


def _percent(difference: float) -> str:
    return "failed" if math.isnan(difference) else f"{100 * math.expm1(min(difference, 20.0)):+.1f} %"


def _plain(difference: float) -> str:
    return "failed" if math.isnan(difference) else f"{difference:+.4f}"
