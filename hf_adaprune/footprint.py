"""Memory and disk of a run, from shapes: what the Gram matrices, the peak, the output and a restart take.

Bytes that are written follow from shapes; those of main memory are estimates, meant to tell 2 GB from 20.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .config import PruningConfig
from .gram_sums import summing_bytes
from .measures import BATCH_TOKENS
from .pipeline import Sizes
from .repairing import own_repair
from .run_artefacts import statistics_bytes
from .site import Site
from .sites import ModelSites
from .stages import what_to_collect
from .statistics import SEGMENT, Needs

__all__ = [
    "Footprint",
    "activation_bytes",
    "disk_by_layer",
    "domain_count",
    "footprint",
    "is_per_domain",
    "peak_by_layer",
]

BASELINE_BYTES = 512 * 2**20  # resident size of Python with torch and transformers imported, and room that malloc keeps
# oneDNN keeps compiled products by shape, and every candidate has widths of its own: measured in bfloat16 on a CPU.
_PRODUCTS, _PRODUCT_BYTES = 1024, 600_000
_UNIT_BYTES = 10  # of a plan on disk, at most: runs of kept units, two numbers and their brackets for two units
_WIDE = 4  # bytes of a float32, which statistics are
_HALF = 2  # bytes of a bfloat16
_TOKEN_BYTES = 9  # of a token that is kept: its id and its place in the mask
_FORWARD_TOKENS = 2048  # of a batch of the instrumented pass


@dataclass(frozen=True)
class Footprint:
    """Bytes that a run takes.

    Args:
        gram (`int`): of the Gram matrices, in memory or on disk.
        peak (`int`): main memory at the peak, Python included.
        output (`int`): of disk, at most, while the output is written.
        run (`int`): of disk, about, for the folder that a run goes on from; 0 where nothing is kept.
    """

    gram: int
    peak: int
    output: int
    run: int


def footprint(
    sites: ModelSites, config: PruningConfig, needs: Needs, before: Sizes, after: Sizes, *, is_kept: bool = False
) -> Footprint:
    """Bytes that pruning a model takes, on the CPU.

    Args:
        sites ([`ModelSites`]): the model, on the meta device too.
        config ([`PruningConfig`]): what to do.
        needs ([`Needs`]): what its pass keeps.
        before ([`Sizes`]): of the model.
        after ([`Sizes`]): of the pruned one.
        is_kept (`bool`, *optional*, defaults to `False`): whether the run has a folder (`run_dir`).
    """
    gram = _gram_bytes(sites, config, needs)
    if config.layer_by_layer:
        peak, output = peak_by_layer(sites, config), sum(disk_by_layer(sites, config))
    else:
        held, summed = 0, 0
        if config.gram_place != "disk":
            held = gram
            summed = summing_bytes(sites, domain_count(config) if is_per_domain(config, needs) else 1) * needs.gram
        peak = _peak_bytes(sites, config, needs, before, after, held, summed)
        output = _written_bytes(sites, config, after)
    return Footprint(gram, peak, output, _run_bytes(sites, config, needs, after) if is_kept else 0)


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
    domains = domain_count(config) if is_per_domain(config, needs) else 1
    # Float64 matrices that exist at once, as bytes per element of the widest Gram matrix: covariance, its second
    # moments, the part that stays and its factor; scores by optimal brain surgery also hold an inverse.
    solving = max(40 * widest**2, (_WIDE + 8) * stacked) if walks else 0
    solving = max(solving, 56 * widest**2 + (_WIDE + 8) * stacked) if needs.gram else solving
    solving += domains * (grams + stacked) * _WIDE if needs.gram else 0
    largest = max((site.reader.outputs * site.columns for site in sites if site.kind != "experts"), default=0)
    solving += 2 * 8 * largest * walks
    mixes = walks and config.repair.target_mix > 0
    solving += (_WIDE + 8) * largest * mixes  # moments of the stream's lag
    # The check of repairs has float32 copies of one matrix: the whole one, and its columns that go.
    solving += 2 * _WIDE * largest * checks
    rows = max(_FORWARD_TOKENS, own.sequence_length)
    # What a layer computes of a batch, and float32 copies of what a reader reads.
    working = rows * (8 * hidden * size + max(site.columns for site in sites) * (4 * size + 3 * _WIDE))
    working += rows * 3 * hidden * _WIDE * mixes
    scored = own.evaluation_length if own.report else own.sequence_length
    head = scored * vocabulary * 2 * size if own.report or walks else 0
    kept = sum((1 + needs.squares) * own.samples * site.columns * _WIDE for site in sites if site.layer == 0)
    activations = min(config.activation_bytes, activation_bytes(sites, config))
    written = min(everything, shard_bytes)
    # A layer and its cut copy while layers are written; the check holds embeddings and head a second time.
    walking = 2 * max(layers) + written + activations + kept + max(working + solving, head)
    return BASELINE_BYTES + outside + max(walking, outside + max(layers))


def _written_bytes(sites: ModelSites, config: PruningConfig, after: Sizes) -> int:
    """Of the output: a checkpoint, or at most so much where a search hands back plans."""
    search = config.search
    if search is None or not (search.pareto or search.ratios):
        return after.bytes
    units = sum(site.groups * site.group_size for site in sites)
    return (len(search.ratios) or search.trials) * units * _UNIT_BYTES


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
        needs = replace(needs, per_domain=is_per_domain(config, needs))
        size = statistics_bytes(sites, samples, own.sequence_length, domain_count(config), needs, own.gradient_samples)
        on_disk = config.gram_place == "disk" and needs.gram
        kept += max(size, summing_bytes(sites, domain_count(config) if needs.per_domain else 1) if on_disk else 0)
    walks = refits and repair.schedule != "cached"
    cached = repair.method != "none" and repair.schedule != "sequential" and not config.layer_by_layer
    kept += (walks + cached) * _WIDE * sum(site.columns * site.outputs for site in sites)
    return kept + (after.decoder * _WIDE if repair.regional_steps > 0 else 0)


def domain_count(config: PruningConfig) -> int:
    """How many domains the calibration text has."""
    return config.calibration.domain_count


def is_per_domain(config: PruningConfig, needs: Needs) -> bool:
    """Whether statistics of every domain are kept apart."""
    return needs.per_domain or bool(config.calibration.domain_weights)


def _gram_elements(sites: ModelSites) -> int:
    """Elements of one set of Gram matrices."""
    return sum(s.groups * s.group_size**2 if s.kind == "experts" else s.columns**2 for s in sites)


def _gram_bytes(sites: ModelSites, config: PruningConfig, needs: Needs) -> int:
    domains = domain_count(config) if is_per_domain(config, needs) else 1
    if config.repair.method == "least_squares" and config.layer_by_layer:
        # At most: of one site with columns that stay, and of what its target has beside.
        mixes = config.repair.target_mix > 0
        own = [s.columns**2 + mixes * s.outputs * s.columns for s in sites if s.kind != "experts"]
        return max(own, default=0) * _WIDE
    return domains * _gram_elements(sites) * _WIDE if needs.gram else 0


def _by_layer(sites: ModelSites) -> list[list[Site]]:
    return [
        [site for site in sites if site.layer == number and site.kind != "experts"]
        for number in range(len(sites.layers))
    ]


def _item_size(sites: ModelSites) -> int:
    return int(next(sites.model.parameters()).element_size())
