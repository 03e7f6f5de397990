"""What a run will take and leave, told before any weights are loaded: sizes, memory, arithmetic and time.

Sizes are exact to within one unit, for budgets are met by construction. Memory and time are estimates: they follow from
shapes and one short measurement of this machine, and are meant to tell minutes from hours and 2 GB from 20.
"""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from .config import PruningConfig
from .gram_sums import summing_bytes
from .measures import BATCH_TOKENS
from .pipeline import Sizes
from .plan import PruningPlan
from .repairing import own_repair
from .reporting import text_table
from .run_artefacts import statistics_bytes
from .search_checks import search_needs
from .search_config import SPEEDS
from .sites import ModelSites, Site, find_sites
from .stages import even_plan, what_to_collect
from .statistics import SEGMENT, Needs

__all__ = [
    "Estimate",
    "Speed",
    "activation_bytes",
    "bound_skeleton",
    "disk_by_layer",
    "estimate",
    "measure_speed",
    "peak_by_layer",
]

BASELINE_BYTES = 512 * 2**20  # resident size of Python with torch and transformers imported, and room that malloc keeps
# What a whole model reaches of the speed of a bare matrix product: measured on SmolLM2-135M in bfloat16, on two cores.
MODEL_SHARE = 0.3
# What `gp` takes to propose a trial once it fits a model: 0.5 to 1 s was measured, the more the longer the journal is.
PROPOSAL_SECONDS = 0.75
# Of the trials of `gp` so many see the rest of their selection text: 0.22 to 0.28 was measured in nine searches.
GOES_ON = 0.25
# A window with gradients in forwards, beside what a backward pass multiplies: graphs, casts, sums over positions.
BACKWARD = 1.5
# oneDNN keeps compiled products by shape, and every candidate has widths of its own: measured in bfloat16 on a CPU.
_PRODUCTS, _PRODUCT_BYTES = 1024, 600_000
_UNIT_BYTES = 10  # of a plan on disk, at most: runs of kept units, two numbers and their brackets for two units
_WIDE = 4  # bytes of a float32, which statistics are
_HALF = 2  # bytes of a bfloat16
_TOKEN_BYTES = 9  # of a token that is kept: its id and its place in the mask
_FORWARD_TOKENS = 2048  # of a batch of the instrumented pass


@dataclass(frozen=True)
class Speed:
    """Arithmetic of this machine, in floating-point operations per second.

    Args:
        model (`float`): matrix products in the model's dtype.
        double (`float`): matrix products in float64, which repairs and scores are made of.
    """

    model: float
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


def bound_skeleton(config: Any, dtype: torch.dtype | None = None, **options: Any) -> ModelSites:
    """The sites of a model that has shapes and no weights, from its config alone.

    Args:
        config (`PreTrainedConfig`): the model's config; it is copied.
        dtype (`torch.dtype`, *optional*): of the weights; the config's where not given.
        **options: of `AutoModelForCausalLM.from_config`, such as `trust_remote_code`.

    Raises:
        UnsupportedModelError: the model cannot be pruned.
    """
    from transformers import AutoModelForCausalLM

    own = copy.deepcopy(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(own, dtype=dtype or own.dtype or torch.float32, **options)
    return find_sites(model)


def measure_speed(dtype: torch.dtype, seconds: float = 0.2) -> Speed:
    """Time matrix products on the CPU for a moment.

    Args:
        dtype (`torch.dtype`): the model's.
        seconds (`float`, *optional*, defaults to 0.2): how long, in all.
    """
    return Speed(_product_speed(dtype, seconds / 2), _product_speed(torch.float64, seconds / 2))


def _product_speed(dtype: torch.dtype, seconds: float) -> float:
    size = 512
    left = torch.full((size, size), 0.5).to(dtype)
    left @ left  # the first product of a dtype compiles its kernel
    done, started = 0, time.perf_counter()
    while not done or time.perf_counter() - started < seconds:
        left @ left
        done += 1
    return 2 * size**3 * done / (time.perf_counter() - started)


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
        needs = search_needs(config, _domains(config))
    measures = what_to_collect(config, None) is not None
    speed = measure_speed(dtype) if speed is None else speed
    own = config.calibration
    gram = _gram_bytes(sites, config, needs)
    walks = config.repair.method == "least_squares" and (config.repair.schedule != "cached" or config.layer_by_layer)
    tokens = own.samples * own.sequence_length if measures or walks else 0
    backward = min(own.gradient_samples, own.samples) * own.sequence_length
    backward = backward if needs.gradients or needs.elements else 0
    forward = _forward_flops(sites, own.sequence_length)
    head = 2 * _head_elements(sites)
    # A sweep of its own, in which going back costs what going forward did, and as much again for weight gradients.
    calibration = tokens * (forward + (_gram_elements(sites) * 2 if needs.gram else 0)) * config.allocation.steps
    calibration += backward * BACKWARD * (forward * (3 if needs.elements else 2) + 3 * head)
    walked = 3 * tokens * forward if walks else 0.0
    report = 2 * len(own.report) * own.evaluation_tokens * (_forward_flops(sites, own.evaluation_length) + head)
    share = removed / before.decoder
    solving = _solve_flops(sites, config, needs, share)
    reading, trying = _search_flops(sites, config, needs, head, share)
    reading += calibration if _may_draw(config) else 0.0
    seconds = (calibration + walked + report + reading) / (MODEL_SHARE * speed.model)
    proposing = _proposal_seconds(config)
    seconds += (solving + trying) / (MODEL_SHARE * speed.double) + proposing
    if config.layer_by_layer:
        peak = peak_by_layer(sites, config)
    else:
        held, summed = 0, 0
        if config.gram_place != "disk":
            held = gram
            summed = summing_bytes(sites, _domains(config) if _is_per_domain(config, needs) else 1) * needs.gram
        peak = _peak_bytes(sites, config, needs, before, after, held, summed)
    flops = (float(calibration + walked), float(solving), float(report), float(reading + trying))
    written = sum(disk_by_layer(sites, config)) if config.layer_by_layer else _written_bytes(sites, config, after)
    kept = _run_bytes(sites, config, needs, after) if is_kept else 0
    return Estimate(before, after, config.gram_place, gram, peak, *flops, proposing, seconds, written, kept)


def _written_bytes(sites: ModelSites, config: PruningConfig, after: Sizes) -> int:
    """Of the output: a checkpoint, or at most so much where a search hands back plans."""
    search = config.search
    if search is None or not (search.pareto or search.ratios):
        return after.bytes
    units = sum(site.groups * site.group_size for site in sites)
    return (len(search.ratios) or search.trials) * units * _UNIT_BYTES


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
    tried = plans * (search.trials + finals) * _solve_flops(sites, cached, replace(needs, gram=False), share)
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


def _gram_elements(sites: ModelSites) -> int:
    """Elements of one set of Gram matrices."""
    return sum(s.groups * s.group_size**2 if s.kind == "experts" else s.columns**2 for s in sites)


def _domains(config: PruningConfig) -> int:
    return config.calibration.clusters or len(config.calibration.sources)


def _is_per_domain(config: PruningConfig, needs: Needs) -> bool:
    return needs.per_domain or bool(config.calibration.domain_weights)


def _gram_bytes(sites: ModelSites, config: PruningConfig, needs: Needs) -> int:
    domains = _domains(config) if _is_per_domain(config, needs) else 1
    if config.repair.method == "least_squares" and config.layer_by_layer:
        widest = max((site.columns**2 for site in sites if site.kind != "experts"), default=0)
        return widest * _WIDE * (1 + (config.repair.target_mix > 0))  # of one site, and its cross moments
    return domains * _gram_elements(sites) * _WIDE if needs.gram else 0


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


def _solve_flops(sites: ModelSites, config: PruningConfig, needs: Needs, share: float) -> float:
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
    return flops


def _peak_bytes(
    sites: ModelSites, config: PruningConfig, needs: Needs, before: Sizes, after: Sizes, gram: int, summed: int
) -> int:
    own, size = config.calibration, next(sites.model.parameters()).element_size()
    vocabulary, hidden = sites.model.get_output_embeddings().weight.shape  # type: ignore[operator]
    gradients = min(own.gradient_samples, own.samples) if needs.gradients or needs.elements else 0
    kept = 0
    for site in sites:
        kept += (1 + needs.squares) * own.samples * site.columns
        if needs.gradients:
            kept += gradients * (-(-own.sequence_length // SEGMENT) * site.columns + site.outputs)
    # What a backward pass keeps of every layer, in the model's dtype: its norms' and residuals' inputs, the heads
    # before and after rotation, gate, up and their product.
    states = sum(4 * hidden + 4 * site.columns + (2 * site.groups * site.columns_per_unit) for site in sites)
    window = own.sequence_length * (states + 3 * vocabulary) * size if gradients else 0
    longest = own.evaluation_length if own.report else own.sequence_length
    window = max(window, longest * (2 * vocabulary + 8 * hidden) * size)
    widest = max((site.columns for site in sites if site.kind != "experts"), default=0)
    refits = config.repair.method == "least_squares"
    solving = 6 * widest**2 * 8 if needs.gram or refits else 0
    readers = sum(site.columns * site.outputs for site in sites) * _WIDE if refits else 0
    # Backward windows and Gram matrices are never in memory together.
    pruning = before.bytes + kept * _WIDE + max(window, summed, gram + solving + readers)
    if config.search is not None:
        # A candidate's repairs and its narrow weights, the head's outputs of a batch, and what oneDNN compiled.
        asked = config.search
        batch = max(asked.sequence_length, BATCH_TOKENS) if asked.objective != "accuracy" else longest
        trying = readers + after.decoder * size + batch * (2 * vocabulary + 8 * hidden) * size
        if size == _HALF and sites.model.device.type != "cuda":
            trying += min(_PRODUCTS, 4 * asked.trials * len(sites.layers)) * _PRODUCT_BYTES
        pruning = max(pruning, before.bytes + kept * _WIDE + gram + trying)
    # The round-trip check holds the pruned model twice, when the statistics are gone.
    return BASELINE_BYTES + max(pruning, before.bytes + after.bytes)


def activation_bytes(sites: ModelSites, config: PruningConfig) -> int:
    """Bytes of all hidden states that [`prune_to_disk`] keeps between two layers, in memory or in files, at most.

    Args:
        sites ([`ModelSites`]): the model, on the meta device too.
        config ([`PruningConfig`]): its windows.
    """
    own, repair = config.calibration, config.repair
    measures = what_to_collect(config, None) is not None
    walks = repair.method == "least_squares"
    held = repair.holdout if repair.method != "none" else 0.0
    tokens = own.samples * own.sequence_length
    scoring = tokens * measures
    # The walk's one or two streams, and held-out windows with and without the repair.
    writing = tokens * ((1 + (repair.target_mix > 0)) * walks + 2 * held)
    writing += 3 * len(own.report) * own.evaluation_tokens
    hidden = sites.model.get_input_embeddings().weight.shape[1]
    return int(max(scoring, writing) * hidden * _item_size(sites))


def disk_by_layer(sites: ModelSites, config: PruningConfig) -> tuple[int, int]:
    """Bytes of disk that [`prune_to_disk`] takes at most: of weights, and of activations that do not fit in memory.

    Args:
        sites ([`ModelSites`]): the model, on the meta device too.
        config ([`PruningConfig`]): its windows and memory for activations.
    """
    # What transformers converts (experts) is written once more when the checkpoint is loaded again.
    converts = any(site.kind == "experts" for site in sites)
    spilled = max(0, activation_bytes(sites, config) - config.activation_bytes)
    return Sizes.of(sites).bytes * (1 + converts), spilled


def _run_bytes(sites: ModelSites, config: PruningConfig, needs: Needs, after: Sizes) -> int:
    """What is kept for a restart: windows, what was measured of every site, and repairs of all its columns at most."""
    own, repair = config.calibration, own_repair(config)
    refits = repair.method == "least_squares"
    measures = config.search is not None or what_to_collect(config, None) is not None
    samples = own.samples if measures or refits or repair.regional_steps > 0 else 0
    tokens = samples * own.sequence_length + len(own.report) * own.evaluation_tokens
    kept = tokens * _TOKEN_BYTES
    if config.layer_by_layer:
        # Of every column at most: a score by every metric and one of all, in float64; its mean input, twice.
        metrics = sum(weight > 0 for weight in config.importance.metrics.values())
        numbers = (metrics + 1) * 8 + 2 * _WIDE
        kept += config.allocation.steps * numbers * sum(site.columns for site in sites) * measures
    elif measures:
        needs = replace(needs, per_domain=_is_per_domain(config, needs))
        size = statistics_bytes(sites, samples, own.sequence_length, _domains(config), needs, own.gradient_samples)
        on_disk = config.gram_place == "disk" and needs.gram
        kept += max(size, summing_bytes(sites, _domains(config) if needs.per_domain else 1) if on_disk else 0)
    walks = refits and repair.schedule != "cached"
    cached = repair.method != "none" and repair.schedule != "sequential" and not config.layer_by_layer
    kept += (walks + cached) * _WIDE * sum(site.columns * site.outputs for site in sites)
    return kept + (after.decoder * _WIDE if repair.regional_steps > 0 else 0)


def peak_by_layer(sites: ModelSites, config: PruningConfig, shard_bytes: int = 500_000_000) -> int:
    """Main memory at the peak of [`prune_to_disk`] on the CPU, Python included: stated before the run, and held.

    Args:
        sites ([`ModelSites`]): the model, on the meta device too.
        config ([`PruningConfig`]): windows, metrics, repair and memory for activations.
        shard_bytes (`int`, *optional*, defaults to 500 MB): of a file of weights; so much waits to be written.
    """
    own, size, needs = config.calibration, _item_size(sites), what_to_collect(config, None) or Needs()
    layers = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in sites.layers]
    everything = sum(p.numel() * p.element_size() for p in sites.model.parameters())
    outside = everything - sum(layers)
    vocabulary, hidden = sites.model.get_output_embeddings().weight.shape  # type: ignore[operator]
    walks = config.repair.method == "least_squares"
    checks = config.repair.method == "bias" and config.repair.holdout > 0
    widest = max((site.columns for site in sites if site.kind != "experts"), default=0)
    stacked = max((site.groups * site.group_size**2 for site in sites if site.kind == "experts"), default=0)
    grams = max(sum(site.columns**2 for site in own_sites) for own_sites in _by_layer(sites))
    domains = _domains(config) if _is_per_domain(config, needs) else 1
    # Float64 matrices that exist at once, as bytes per element of the widest Gram matrix: covariance, its second
    # moments, the part that stays and its factor; scores by optimal brain surgery also hold an inverse.
    solving = max(40 * widest**2, (_WIDE + 8) * stacked) if walks or checks else 0
    solving = max(solving, 56 * widest**2 + (_WIDE + 8) * stacked) if needs.gram else solving
    solving += domains * (grams + stacked) * _WIDE if needs.gram or checks else 0
    solving += 2 * 8 * max((s.reader.outputs * s.columns for s in sites if s.kind != "experts"), default=0) * walks
    rows = max(_FORWARD_TOKENS, own.sequence_length)
    # What a layer computes of a batch, and float32 copies of what a reader reads.
    working = rows * (8 * hidden * size + max(site.columns for site in sites) * (4 * size + 3 * _WIDE))
    scored = own.evaluation_length if own.report else own.sequence_length
    head = scored * vocabulary * 2 * size if own.report or walks else 0
    kept = sum((1 + needs.squares) * own.samples * site.columns * _WIDE for site in sites if site.layer == 0)
    activations = min(config.activation_bytes, activation_bytes(sites, config))
    written = min(everything, shard_bytes)
    # A layer and its cut copy while layers are written; the check holds embeddings and head a second time.
    walking = 2 * max(layers) + written + activations + kept + max(working + solving, head)
    return BASELINE_BYTES + outside + max(walking, outside + max(layers))


def _by_layer(sites: ModelSites) -> list[list[Site]]:
    return [
        [site for site in sites if site.layer == number and site.kind != "experts"]
        for number in range(len(sites.layers))
    ]


def _item_size(sites: ModelSites) -> int:
    return int(next(sites.model.parameters()).element_size())
