"""What a run will take and leave, told before any weights are loaded: sizes, bytes, arithmetic and time.

Sizes are exact to within one unit, for budgets are met by construction. Time is an estimate: it follows from shapes and
one short measurement of this machine, and is meant to tell minutes from hours. Bytes are those of
[`hf_adaprune.footprint`].
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from .config import PruningConfig
from .footprint import domain_count, footprint
from .gram_sums import STRIP, exact_products, strip_elements
from .layerwise import WINDOWS_PER_STEP
from .pipeline import Sizes
from .plan import PruningPlan
from .repairing import check_parts
from .reporting import text_table
from .search_checks import search_needs
from .search_config import SPEEDS
from .sites import ModelSites, Site
from .stages import even_plan, what_to_collect
from .statistics import Needs

__all__ = ["Estimate", "Speed", "estimate", "layer_sizes", "measure_speed"]

# What factors and inverses in float64 reach of the speed of a bare product.
SOLVER_SHARE = 0.5
# What `gp` takes to propose a trial once it fits a model: 0.5 to 1 s was measured, the more the longer the journal is.
PROPOSAL_SECONDS = 0.75
# Of the trials of `gp` so many see the rest of their selection text: 0.22 to 0.28 was measured in nine searches.
GOES_ON = 0.25
_LENGTH, _WIDEST = 512, 2048  # of what is timed


@dataclass(frozen=True)
class Speed:
    """Arithmetic of this machine, in floating-point operations per second.

    Args:
        model (`float`): a forward pass of the model, all that is not matrix products included.
        gram (`float`): sums of Gram matrices, which are products of float32 numbers.
        double (`float`): matrix products in float64, which repairs and scores are made of.
    """

    model: float
    gram: float
    double: float


@dataclass(frozen=True)
class Estimate:
    """What a run will take and leave.

    Args:
        before, after ([`Sizes`]): of the model.
        gram_place (`str`): where Gram matrices live: `model`, `cpu` or `disk`.
        gram_bytes (`int`): of the Gram matrices there.
        peak_bytes (`int`): main memory at the peak, Python included (with Gram matrices where they are not on disk).
        calibration_flops (`float`): of the calibration pass.
        repair_flops (`float`): of scores and repair.
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


def measure_speed(sites: ModelSites, sequence_length: int, seconds: float = 0.4) -> Speed:
    """Time this machine's CPU for a moment: a forward pass of one decoder layer of the model's widths, and products.

    Machines differ in what attention and norms take beside the products (those of bfloat16 above all), and so do
    widths; so a layer is timed and not a product. It is a Llama's, whatever the model's family, of random weights and
    at most 2,048 wide.

    Args:
        sites ([`ModelSites`]): the model, live or from [`bound_skeleton`](hf_adaprune.skeleton.bound_skeleton).
        sequence_length (`int`): tokens of a window, of which at most 512 are read.
        seconds (`float`, *optional*, defaults to 0.4): how long to measure, about.
    """
    forward = _forward_speed(sites, min(sequence_length, _LENGTH), seconds / 2)
    matrix = torch.full((_LENGTH, _LENGTH), 0.5, dtype=torch.float64)
    double = 2 * _LENGTH**3 / _median_seconds(lambda: matrix @ matrix, seconds / 4)
    return Speed(forward, _gram_speed(sites, seconds / 4), double)


def layer_sizes(sites: ModelSites) -> dict[str, int]:
    """Sizes of a Llama's layer that stands for those of a model, as fields of its config, at most 2,048 wide.

    Args:
        sites ([`ModelSites`]): the model, on the meta device too.
    """
    hidden = sites.model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    shrink = min(1.0, _WIDEST / hidden)
    sizes = {"hidden_size": round(hidden * shrink)}
    for site in sites:
        if site.kind == "attention":
            groups = max(1, round(site.groups * shrink))
            sizes["num_key_value_heads"], sizes["num_attention_heads"] = groups, groups * site.group_size
            # Rotation halves a head.
            sizes["head_dim"] = site.columns_per_unit + site.columns_per_unit % 2
        else:
            width = site.group_size * (sites.top_k(site) or 1) if site.kind == "experts" else site.columns
            sizes["intermediate_size"] = max(1, round(width * shrink))
    return sizes


def _forward_speed(sites: ModelSites, length: int, seconds: float) -> float:
    from transformers import LlamaConfig, LlamaModel

    sizes: dict[str, Any] = {"num_hidden_layers": 1, "vocab_size": 2, **layer_sizes(sites)}
    config = LlamaConfig(pad_token_id=None, **sizes)
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        layer = LlamaModel(config).to(next(sites.model.parameters()).dtype).eval()
        weights = sum(parameter.numel() for parameter in layer.layers.parameters())
        attention = 2 * length * layer.layers[0].self_attn.o_proj.in_features
        ids = torch.zeros(1, length, dtype=torch.long)
        return length * (2 * weights + attention) / _median_seconds(lambda: layer(ids, use_cache=False), seconds)


def _gram_speed(sites: ModelSites, seconds: float) -> float:
    """Of the last strip of the widest matrix, summed as the pass sums it."""
    dtype = next(sites.model.parameters()).dtype
    columns = min(_WIDEST, max(_gram_width(site) for site in sites))
    rows, sums = torch.full((4 * _LENGTH, columns), 0.5), torch.zeros(min(STRIP, columns), columns, dtype=torch.float64)

    def add() -> None:
        with exact_products(dtype):
            sums.add_(rows[:, : len(sums)].T @ rows)

    return 2 * len(rows) * sums.numel() / _median_seconds(add, seconds)


def _median_seconds(call: Callable[[], Any], seconds: float) -> float:
    """Of several calls; the first compiles kernels and does not count."""
    call()
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < seconds:
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def estimate(
    sites: ModelSites, config: PruningConfig, speed: Speed | None = None, *, is_kept: bool = False
) -> Estimate:
    """Estimate what pruning a model takes and leaves.

    Args:
        sites ([`ModelSites`]): the model, live or from [`bound_skeleton`].
        config ([`PruningConfig`]): what to do.
        speed ([`Speed`], *optional*): of the machine; measured for 0.2 s where not given.
        is_kept (`bool`, *optional*, defaults to `False`): whether the run has a folder (`run_dir`).

    Returns:
        [`Estimate`]: of a run on the CPU; sizes hold everywhere. With `layer_by_layer` it is of [`prune_to_disk`].

    Raises:
        BudgetError, ConfigError: the run would be refused.
    """
    plan, before = even_plan(sites, _foreseeable(config)), Sizes.of(sites)
    dtype = next(sites.model.parameters()).dtype
    removed = sites.removed_parameters(plan, _added_biases(sites, plan, config))
    after = Sizes(before.decoder - removed, before.total - removed, before.bytes - removed * dtype.itemsize)
    needs = what_to_collect(config, None) or Needs()
    if config.search is not None:
        needs = search_needs(config, domain_count(config))
    measures = what_to_collect(config, None) is not None
    own, repair = config.calibration, config.repair
    speed = measure_speed(sites, own.sequence_length) if speed is None else speed
    walks = repair.method == "least_squares" and (repair.schedule != "cached" or config.layer_by_layer)
    checks = repair.method != "none" and repair.holdout > 0 and not walks
    held = max(1, round(own.samples * repair.holdout)) * own.sequence_length if checks else 0
    tokens = own.samples * own.sequence_length - held if measures or walks else 0
    backward = min(own.gradient_samples, own.samples) * own.sequence_length
    backward = backward if needs.gradients or needs.elements else 0
    forward = _forward_flops(sites, own.sequence_length)
    head = 2 * _head_elements(sites)
    forwards = tokens * forward * config.allocation.steps
    # A sweep of its own, in which going back costs what going forward did, and as much again for weight gradients.
    forwards += backward * (forward * (3 if needs.elements else 2) + 3 * head)
    summing = tokens * _gram_flops(sites) * config.allocation.steps if needs.gram else 0.0
    walked = 3 * tokens * forward if walks else check_parts(sites) * held * forward
    # Every layer is trained on its own, so that a step of all of them is one of the model.
    walked += repair.regional_steps * WINDOWS_PER_STEP * own.sequence_length * 3 * forward
    report = 2 * len(own.report) * own.evaluation_tokens * (_forward_flops(sites, own.evaluation_length) + head)
    share = removed / before.decoder
    solving = _solve_flops(sites, config, needs, share, checks=checks)
    reading, trying = _search_flops(sites, config, needs, head, share)
    if _may_draw(config):
        reading, summing = reading + forwards, 2 * summing
    proposing = _proposal_seconds(config)
    seconds = (forwards + walked + report + reading) / speed.model + summing / speed.gram + proposing
    seconds += (solving + trying) / (SOLVER_SHARE * speed.double)
    flops = (float(forwards + summing + walked), float(solving), float(report), float(reading + trying))
    taken = footprint(sites, config, needs, before, after, is_kept=is_kept)
    return Estimate(
        before, after, config.gram_place, taken.gram, taken.peak, *flops, proposing, seconds, taken.output, taken.run
    )


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


def _search_flops(
    sites: ModelSites, config: PruningConfig, needs: Needs, head: int, share: float
) -> tuple[float, float]:
    """Of all trials: forwards on selection text, and one repair each; the dense model reads the text once."""
    search = config.search
    if search is None:
        return 0.0, 0.0
    plans = max(1, len(search.ratios))
    finals = min((search.finalists if search.pareto is None else max(2, search.finalists)) + 1, search.trials)
    rest = max(0, search.selection_tokens - search.first_tokens)
    a_trial = min(search.first_tokens, search.selection_tokens) + GOES_ON * rest
    tokens = plans * (search.trials * a_trial + finals * search.final_tokens)
    tokens += search.selection_tokens + search.final_tokens
    tokens = 0 if search.objective == "accuracy" else tokens
    # Scores that invert Gram matrices are computed once, for all trials.
    cached = config.with_changes(repair={"schedule": "cached"})
    solved = _solve_flops(sites, cached, replace(needs, gram=False), share, checks=False)
    tried = plans * (search.trials + finals) * solved
    return tokens * (_forward_flops(sites, search.sequence_length) + head), tried


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


def _gram_width(site: Site) -> int:
    return site.group_size if site.kind == "experts" else site.columns


def _gram_flops(sites: ModelSites) -> float:
    """Per token, which adds to the matrices of its own experts only."""
    return 2.0 * sum((sites.top_k(site) or 1) * strip_elements(_gram_width(site)) for site in sites)


def _solve_flops(sites: ModelSites, config: PruningConfig, needs: Needs, share: float, *, checks: bool) -> float:
    """Inverses for scores that read Gram matrices, and one regression per site and repair of a share of the columns."""
    flops = 0.0
    for site in sites:
        matrices, columns = (site.groups, site.group_size) if site.kind == "experts" else (1, site.columns)
        if needs.gram and any(name.startswith("obs") for name in config.importance.metrics):
            flops += matrices * 2.0 * columns**3
        if config.repair.method == "least_squares":
            rounds = 1 + (config.repair.schedule == "best")
            kept, gone = (1 - share) * columns, share * columns
            flops += rounds * matrices * (kept**3 / 3 + 2 * kept**2 * gone + 2 * gone * kept * site.outputs)
            # Errors on held-out windows, with and without the repair.
            flops += 4.0 * matrices * columns**2 * site.outputs * checks
    return flops
