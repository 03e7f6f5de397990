"""What a run will take and leave, told before any weights are loaded: sizes, bytes, arithmetic and time.

Sizes are exact to within one unit, for budgets are met by construction. Time is an estimate: it follows from shapes and
one short measurement of this machine, and is meant to tell minutes from hours. Bytes are those of
[`hf_adaprune.footprint`].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from .config import PruningConfig
from .costs import Costs
from .footprint import domain_count, footprint
from .gram_sums import strip_elements
from .importance import unit_of
from .layerwise import WINDOWS_PER_STEP
from .machine_speed import Speed, gram_width, measure_speed
from .pipeline import Sizes
from .plan import PruningPlan
from .reporting import text_table
from .search_checks import check_reach, search_needs
from .search_config import SPEEDS
from .site import Site
from .sites import ModelSites
from .stages import check_gradient_windows, even_plan, what_to_collect
from .statistics import Needs

__all__ = ["Estimate", "estimate"]

# What factors and inverses in float64 reach of the speed of a bare product.
SOLVER_SHARE = 0.5
# What `gp` takes to propose a trial once it fits a model: 0.5 to 1 s was measured, the more the longer the journal is.
PROPOSAL_SECONDS = 0.75
# Of the trials of `gp` so many see the rest of their selection text: 0.22 to 0.28 was measured in nine searches.
GOES_ON = 0.25


@dataclass(frozen=True)
class Estimate:
    """What a run will take and leave.

    Args:
        before, after ([`Sizes`]): of the model.
        gram_place (`str`): where Gram matrices live: `model`, `cpu` or `disk`.
        gram_bytes (`int`): of the Gram matrices there.
        peak_bytes (`int`): main memory at the peak, Python included (with Gram matrices where they are not on disk).
        calibration_flops (`float`): of the calibration pass.
        repair_flops (`float`): of scores and repair, with its check, its walk over the layers and trained layers.
        report_flops (`float`): of perplexity on the report sources, dense and pruned.
        search_flops (`float`): of a search, about: every trial scores, repairs and reads the first selection text,
            promising ones (so many as `gp` finds) the rest, and the winner's windows are drawn anew; the rows of
            `accuracy` are not counted.
        proposal_seconds (`float`): of the proposals of `gp`, from one measurement, not of this machine; those of the
            surrogate `saas` take about ten times as long, those of other strategies hardly any time.
        seconds (`float`): of the whole run, proposals included, loading apart.
        output_bytes (`int`): of disk, at most, while the output is written.
        run_bytes (`int`): of disk, about, that the folder takes which a run goes on from after a kill: windows,
            statistics and repairs. 0 where nothing is kept.
    """

    before: Sizes
    after: Sizes
    gram_place: str
    gram_bytes: int
    peak_bytes: int
    calibration_flops: float
    repair_flops: float
    report_flops: float
    search_flops: float
    proposal_seconds: float
    seconds: float
    output_bytes: int
    run_bytes: int = 0

    @property
    def pruning_ratio(self) -> float:
        """Decoder-layer parameters that go, over those there are."""
        return 1 - self.after.decoder / self.before.decoder

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {**asdict(self), "pruning_ratio": self.pruning_ratio}

    def __str__(self) -> str:
        """A table."""
        flops = self.calibration_flops + self.repair_flops + self.report_flops + self.search_flops
        minutes, seconds = divmod(round(self.seconds), 60)
        rows = [
            ("Gram matrices", f"{self.gram_bytes / 2**20:,.0f} MiB ({self.gram_place})" if self.gram_bytes else "none"),
            ("peak memory, about", f"{self.peak_bytes / 2**20:,.0f} MiB"),
            ("arithmetic, about", f"{flops / 1e12:,.2f} TFLOP"),
            ("time, about", f"{minutes} min {seconds:02d} s"),
        ]
        if self.search_flops:
            rows.insert(-1, ("of it the search, about", f"{self.search_flops / 1e12:,.2f} TFLOP"))
        if self.run_bytes:
            rows.insert(2, ("disk for a restart, about", f"{self.run_bytes / 2**20:,.0f} MiB"))
        if self.proposal_seconds:
            rows.append(("of it proposals, roughly", f"{self.proposal_seconds:,.0f} s"))
        return text_table(("this run will take", ""), rows)


def estimate(
    sites: ModelSites, config: PruningConfig, speed: Speed | None = None, *, is_kept: bool = False
) -> Estimate:
    """Estimate what pruning a model takes and leaves.

    Args:
        sites ([`ModelSites`]): the model, live or from [`bound_skeleton`](hf_adaprune.skeleton.bound_skeleton).
        config ([`PruningConfig`]): what to do.
        speed ([`Speed`], *optional*): of the machine; measured for half a second, about, where not given.
        is_kept (`bool`, *optional*, defaults to `False`): whether the run has a folder (`run_dir`).

    Returns:
        [`Estimate`]: of a run on the CPU; sizes hold everywhere. With `layer_by_layer` it is of [`prune_to_disk`].

    Raises:
        BudgetError, ConfigError: the run would be refused.
    """
    foreseen = _foreseeable(config)
    if config.search is not None:
        check_reach(sites, foreseen, Costs.of(sites, foreseen))
    plan, before = even_plan(sites, foreseen), Sizes.of(sites)
    dtype = next(sites.model.parameters()).dtype
    removed = sites.removed_parameters(plan, _added_biases(sites, plan, config))
    after = Sizes(before.decoder - removed, before.total - removed, before.bytes - removed * dtype.itemsize)
    needs = what_to_collect(config, None) or Needs()
    if not config.layer_by_layer:  # there nothing goes backward
        check_gradient_windows(config, needs)
    if config.search is not None:
        needs = search_needs(config, domain_count(config))
    own, share = config.calibration, removed / before.decoder
    speed = measure_speed(sites, own.sequence_length) if speed is None else speed
    calibration = _calibration_work(sites, config, needs)
    ends_in_plans = config.search is not None and (config.search.pareto is not None or bool(config.search.ratios))
    repair = _Work(double=_score_flops(sites, config, needs))
    if not ends_in_plans:
        repair += _repair_work(sites, config, share)
    a_token = _forward_flops(sites, own.evaluation_length) + 2 * _head_elements(sites)
    report = _Work(2.0 * len(own.report) * own.evaluation_tokens * a_token)
    search = _search_work(sites, config, share)
    if _may_draw(config):
        search += calibration
    proposing = _proposal_seconds(config)
    seconds = (calibration + repair + report + search).seconds(speed) + proposing
    taken = footprint(sites, config, needs, before, after, is_kept=is_kept)
    return Estimate(
        before, after, config.gram_place, taken.gram, taken.peak, calibration.flops, repair.flops,
        report.flops, search.flops, proposing, seconds, taken.output, taken.run,
    )  # fmt: skip


def _foreseeable(config: PruningConfig) -> PruningConfig:
    """The config without budgets on speed, which need the weights on their device to be timed.

    What is left says how large the model may be; a speed may ask for less.
    """
    if not set(config.budgets) & set(SPEEDS):
        return config
    sizes = {name: goal for name, goal in config.budgets.items() if name not in SPEEDS}
    return config.with_changes(budgets=sizes or {"ratio": 0.0})


def _may_draw(config: PruningConfig) -> bool:
    """Whether a search may end with a second calibration pass, see [`hf_adaprune.search_stage`]."""
    search, own = config.search, config.calibration
    if search is None or not search.redraw or search.pareto is not None or search.ratios or own.clusters:
        return False
    return len(own.sources) > 1


@dataclass(frozen=True)
class _Work:
    """Floating-point operations by what they run on, see [`Speed`]."""

    model: float = 0.0
    gram: float = 0.0
    double: float = 0.0

    def __add__(self, other: _Work) -> _Work:
        return _Work(self.model + other.model, self.gram + other.gram, self.double + other.double)

    @property
    def flops(self) -> float:
        return self.model + self.gram + self.double

    def seconds(self, speed: Speed) -> float:
        return self.model / speed.model + self.gram / speed.gram + self.double / (SOLVER_SHARE * speed.double)


def _held_tokens(config: PruningConfig) -> int:
    """Of windows that check repairs, as [`TokenBlocks.split`] holds them out."""
    own, repair = config.calibration, config.repair
    if repair.method == "none" or repair.holdout <= 0:
        return 0
    return min(max(int(repair.holdout * own.samples + 0.5), 1), own.samples - 1) * own.sequence_length


def _calibration_work(sites: ModelSites, config: PruningConfig, needs: Needs) -> _Work:
    own = config.calibration
    if config.search is None and what_to_collect(config, None) is None:
        return _Work()
    tokens = (own.samples * own.sequence_length - _held_tokens(config)) * config.allocation.steps
    forward, model = _forward_flops(sites, own.sequence_length), 0.0
    if needs.gradients or needs.elements:
        # A sweep of its own, in which going back costs what going forward did, and as much again for weight gradients.
        backward = min(own.gradient_samples, own.samples) * own.sequence_length
        model = backward * (forward * (3 if needs.elements else 2) + 3 * 2 * _head_elements(sites))
    return _Work(model + tokens * forward, tokens * _gram_flops(sites) if needs.gram else 0.0)


def _repair_work(sites: ModelSites, config: PruningConfig, share: float) -> _Work:
    """One repair, its check on held-out windows, and layers that are trained."""
    own, repair, held = config.calibration, config.repair, _held_tokens(config)
    tokens, forward = own.samples * own.sequence_length - held, _forward_flops(sites, own.sequence_length)
    work = _Work()
    walks = repair.method == "least_squares" and (repair.schedule != "cached" or config.layer_by_layer)
    if repair.method == "least_squares":
        rounds = 1 + (repair.schedule == "best")
        work += _Work(double=rounds * _refit_flops(sites, share))
    if walks:
        mixes = repair.target_mix > 0
        # Columns that stay meet all others. The pruned stream passes each layer twice, and once more up to what
        # attention's reader reads; the dense one passes it once, where no norm stands behind the readers.
        cut = [site for site in sites if unit_of(site, config.units)]
        heads = [site for site in cut if site.kind == "attention"]
        squares = sum(gram_width(site) ** 2 * (sites.top_k(site) or 1 - share) for site in cut)
        again = 2.0 * sum(s.sublayer_parameters - s.columns * (s.outputs - own.sequence_length) for s in heads)
        # What the target has beside is multiplied in float32: half of what float64 takes.
        lags = sum(s.columns * s.outputs for s in cut if s.kind != "experts") * (1 - share)
        lags += sum(s.columns * s.outputs for s in heads)
        work += _Work(tokens * (forward * (2 + mixes) + again), 2.0 * tokens * squares, tokens * lags * mixes)
    if config.layer_by_layer:
        work += _Work(2.0 * held * forward)
    elif walks:
        work += _Work(2.0 * held * (forward + 2 * _head_elements(sites)))
    elif held:
        # Errors with and without the repair are float32 products, which take half of what float64 ones do.
        products = sum((sites.top_k(site) or 1) * gram_width(site) * site.outputs for site in sites)
        work += _Work(held * forward, double=held * (1 + share) * products)
    if repair.regional_steps:
        # Every layer is trained on its own, so that a step of all of them is one of the model. Dense and pruned
        # activations go through all layers, and every eighth window is compared before and after.
        steps = 3 * repair.regional_steps * WINDOWS_PER_STEP * own.sequence_length
        work += _Work((steps + 2.25 * tokens) * forward)
    return work


def _search_work(sites: ModelSites, config: PruningConfig, share: float) -> _Work:
    """All trials: forwards on selection text, and one repair each; the dense model reads the text once."""
    search = config.search
    if search is None:
        return _Work()
    plans = max(1, len(search.ratios))
    finals = min((search.finalists if search.pareto is None else max(2, search.finalists)) + 1, search.trials)
    rest = max(0, search.selection_tokens - search.first_tokens)
    a_trial = min(search.first_tokens, search.selection_tokens) + GOES_ON * rest
    tokens = plans * (search.trials * a_trial + finals * search.final_tokens)
    tokens += search.selection_tokens + search.final_tokens
    tokens = 0 if search.objective == "accuracy" else tokens
    # Scores that invert Gram matrices are computed once, for all trials.
    refits = config.repair.method == "least_squares"
    solved = plans * (search.trials + finals) * _refit_flops(sites, share) if refits else 0.0
    return _Work(tokens * (_forward_flops(sites, search.sequence_length) + 2 * _head_elements(sites)), double=solved)


def _proposal_seconds(config: PruningConfig) -> float:
    search = config.search
    if search is None:
        return 0.0
    fitted = sum(max(0, share - search.initial) for name, share in search.shares() if name == "gp")
    return fitted * PROPOSAL_SECONDS * (10 if search.surrogate == "saas" else 1)


def _added_biases(sites: ModelSites, plan: PruningPlan, config: PruningConfig) -> list[str]:
    repair = config.repair
    adds = repair.method == "bias" or (repair.method == "least_squares" and repair.intercept)
    if not adds or config.uniform:
        return []
    changed = ((sites.by_name[name], kept) for name, kept in plan.changed())
    return [s.name for s, kept in changed if s.reader.bias is None and s.kind != "experts" and not kept.is_empty]


def _head_elements(sites: ModelSites) -> int:
    head = sites.model.get_output_embeddings().weight  # type: ignore[operator]
    return int(head.numel())


def _forward_flops(sites: ModelSites, length: int) -> float:
    """Per token, head apart: two operations per weight that a token meets, and attention over half the window."""
    flops = 2.0 * sites.decoder_parameters
    for site in sites:
        if site.kind == "experts":
            flops -= 2.0 * site.sublayer_parameters * (1 - sites.top_k(site) / site.groups)
        elif site.kind == "attention":
            flops += 2.0 * length * site.columns
    return flops


def _gram_flops(sites: ModelSites) -> float:
    """Per token, which adds to the matrices of its own experts only."""
    return 2.0 * sum((sites.top_k(site) or 1) * strip_elements(gram_width(site)) for site in sites)


def _matrices(sites: ModelSites) -> Iterator[tuple[Site, int, int]]:
    """Sites with their Gram matrices: how many, and how wide."""
    for site in sites:
        yield site, site.groups if site.kind == "experts" else 1, gram_width(site)


def _score_flops(sites: ModelSites, config: PruningConfig, needs: Needs) -> float:
    """Inverses for scores that read Gram matrices."""
    inverts = needs.gram and any(name.startswith("obs") for name in config.importance.metrics)
    return inverts * sum(2.0 * many * columns**3 for _, many, columns in _matrices(sites))


def _refit_flops(sites: ModelSites, share: float) -> float:
    """One regression per site, of a share of its columns on the others."""
    flops = 0.0
    for site, many, columns in _matrices(sites):
        kept, gone = (1 - share) * columns, share * columns
        flops += many * (kept**3 / 3 + 2 * kept**2 * gone + 2 * gone * kept * site.outputs)
    return flops
