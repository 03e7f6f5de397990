"""The parts of a `PruningConfig`: calibration text, importance, allocation and repair, with their defaults."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import ConfigError
from .fields import check_choice, check_number, check_types, check_whole

__all__ = [
    "SCHEDULES",
    "AllocationConfig",
    "CalibrationConfig",
    "ImportanceConfig",
    "RepairConfig",
    "Source",
    "TextSource",
    "sources_of",
]

NORMALIZATIONS = ("none", "mean", "zscore", "rank", "log")
REDUCTIONS = ("sum", "mean", "max", "prod", "first", "last")
ALLOCATIONS = ("uniform", "flap", "similarity", "logarithmic", "global", "profile", "ratios")
STRUCTURES = ("UL-UM", "UL-MM", "AL-MM", "AL-AM")
REPAIRS = ("none", "bias", "least_squares")
SCHEDULES = ("cached", "sequential", "best")
DAMPING_SCALES = ("mean", "column", "median")

WEIGHT = 1e18  # of what is weighted against others: numbers whose sums and products are finite
REACH = 20.0  # of exponents of the profile: two layers may differ by a factor of 2e17


@dataclass(frozen=True, eq=False)
class TextSource:
    """Texts in memory as a calibration, selection or report source.

    Args:
        name (`str`): the domain's name in statistics, journals and cards.
        texts (iterable of `str`): the documents. They stay out of every JSON: only their digest is written.
    """

    name: str
    texts: tuple[str, ...] = field(repr=False)

    def __init__(self, name: str, texts: Iterable[str]) -> None:
        """Take a name and any iterable of strings; a bare string is refused, since it would be cut into letters."""
        if isinstance(texts, str):
            raise ConfigError("`texts` should be a list of documents. Found one string; write [text].")
        documents = tuple(texts)
        if any(not isinstance(document, str) for document in documents):
            raise ConfigError(f"every text of source {name!r} should be a string.")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "texts", documents)

    def __deepcopy__(self, memo: dict[int, Any]) -> TextSource:
        """Return itself: the Auto classes copy every keyword twice per load, and texts never change."""
        return self


Source = str | TextSource


def sources_of(name: str, given: Any) -> tuple[Source, ...]:
    """The sources that a caller gave: one, several, or (as `None`) none; paths become texts.

    Args:
        name (`str`): of the field or argument, for the message.
        given (`Any`): what was passed.

    Raises:
        ConfigError: it is neither a source nor a list of sources.
    """
    several = isinstance(given, Iterable) and not isinstance(given, (str, os.PathLike, TextSource, Mapping))
    sources: list[Source] = []
    for entry in given if several else () if given is None else (given,):
        source = os.fspath(entry) if isinstance(entry, os.PathLike) else entry
        if isinstance(source, Mapping) and "in_memory" in source:
            raise ConfigError(
                f"`{name}` was saved from texts in memory (source {source['in_memory']!r}), which a config file does "
                "not carry. Pass them again: TextSource(name, texts)."
            )
        if not isinstance(source, (str, TextSource)) or not source:
            raise ConfigError(
                f"`{name}` should hold file paths, data set names (`name:config:split`), `python`, `self` or "
                f"TextSource values. Found {source!r}."
            )
        sources.append(source)
    return tuple(sources)


@dataclass(frozen=True)
class CalibrationConfig:
    """The three texts, and how calibration text becomes windows of tokens.

    Args:
        sources (`tuple[str | TextSource, ...]`, *optional*, defaults to `("python",)`):
            where calibration text comes from; each source is one domain. A file (txt, jsonl, parquet), a data set name
            with `:config:split`, `self` (sampled from the model), or `python` (texts that come with CPython, so that a
            first run works on a machine without a hub; bring text like your model's own for a model you keep).
        samples (`int`, *optional*, defaults to 256): windows in all.
        shares (`tuple[float, ...]`, *optional*): of the windows, one per source; equal where not given. A share says
            how much of a source is read, a weight how much what was read counts: the same mixture drawn by shares is
            measured on more text.
        sequence_length (`int`, *optional*, defaults to 512): tokens per window, BOS among them where the
            tokenizer begins a text with it.
        gradient_samples (`int`, *optional*, defaults to 48): windows of these that also get a backward pass, where a
            metric needs gradients: at least one per source (with `clusters`: per cluster) then.
        domain_weights (`tuple[float, ...]`, *optional*): one weight per source (with `clusters`: per cluster); equal
            where not given.
        clusters (`int`, *optional*, defaults to 0): regroup the windows of all sources into so many domains by k-means
            on their mean hidden states in the middle of the model, for weights on kinds of text that nobody has
            named; 0 keeps the sources as domains.
        selection (`tuple[str | TextSource, ...]`, *optional*): what a search minimises.
        report (`tuple[str | TextSource, ...]`, *optional*): what is reported at the end, never chosen on.
        evaluation_tokens (`int`, *optional*, defaults to 16384): tokens of report text per source.
        evaluation_length (`int`, *optional*, defaults to 1024): window length of perplexity.
    """

    sources: tuple[Source, ...] = ("python",)
    samples: int = 256
    shares: tuple[float, ...] = ()
    sequence_length: int = 512
    gradient_samples: int = 48
    domain_weights: tuple[float, ...] = ()
    clusters: int = 0
    selection: tuple[Source, ...] = ()
    report: tuple[Source, ...] = ()
    evaluation_tokens: int = 16384
    evaluation_length: int = 1024

    def __post_init__(self) -> None:
        """Check every field."""
        check_types(self, "calibration.")
        for name in ("sources", "selection", "report"):
            object.__setattr__(self, name, sources_of(f"calibration.{name}", getattr(self, name)))
        for name in ("shares", "domain_weights"):
            object.__setattr__(self, name, tuple(float(weight) for weight in getattr(self, name)))
        if not self.sources:
            raise ConfigError("`calibration.sources` is empty. Name at least one source of text, for example `python`.")
        check_whole("calibration.samples", self.samples, len(self.sources), what="windows, at least one per source")
        check_whole("calibration.sequence_length", self.sequence_length, 8, what="tokens per window")
        check_whole("calibration.gradient_samples", self.gradient_samples, 1, what="windows with a backward pass")
        check_whole("calibration.evaluation_tokens", self.evaluation_tokens, 2, what="tokens per report source")
        check_whole("calibration.evaluation_length", self.evaluation_length, 2, what="tokens per perplexity window")
        check_whole("calibration.clusters", self.clusters, 0, what="domains, or 0 for the sources")
        if self.shares and len(self.shares) != len(self.sources):
            raise ConfigError(
                f"`calibration.shares` should have one per source ({len(self.sources)}). Found {len(self.shares)}."
            )
        if self.shares and not (min(self.shares) > 0 and sum(self.shares) < math.inf):
            raise ConfigError("`calibration.shares` should be positive. Leave out the source whose share is 0.")
        if self.domain_weights:
            if len(self.domain_weights) != self.domain_count:
                raise ConfigError(
                    f"`calibration.domain_weights` should have one weight per source or cluster ({self.domain_count}). "
                    f"Found {len(self.domain_weights)}."
                )
            for weight in self.domain_weights:
                check_number("calibration.domain_weights", weight, 0.0, WEIGHT, what="weights of domains")
            if sum(self.domain_weights) <= 0:
                raise ConfigError("`calibration.domain_weights` should be non-negative with a positive sum.")

    @property
    def domain_count(self) -> int:
        """How many domains the windows are of: one per source, or the clusters."""
        return self.clusters or len(self.sources)


@dataclass(frozen=True)
class ImportanceConfig:
    """Which metrics score the units, and how several become one.

    Args:
        metrics (`dict[str, float]`, *optional*, defaults to `{"obs": 1.0}`): names of `hf_adaprune.METRICS`
            and their weights in the mixture.
        normalization (`str`, *optional*, defaults to `"none"`): what is done to each metric before it is weighted:
            `none`; `mean` (divided by its mean over the model); `zscore` (standardised per site, FLAP); `rank`
            (its rank in the model over the number of units); `log` (the mixture is a weighted geometric mean).
        reduction (`str`, *optional*, defaults to `"sum"`): how the matrices of a coupled group are joined by the
            metrics that score every matrix (magnitude and Taylor): sum, mean, max, prod, first or last (the matrix that
            reads the units).
        damping (`float`, *optional*, defaults to 0.01) and damping_scale (`str`, *optional*, defaults to `"column"`):
            ridge of the metrics that invert moments; see [`RepairConfig`]. By column, because the mean diagonal of a
            layer with a massive activation would drown every other channel's cost.
    """

    metrics: Mapping[str, float] = field(default_factory=lambda: {"obs": 1.0})
    normalization: str = "none"
    reduction: str = "sum"
    damping: float = 0.01
    damping_scale: str = "column"

    def __post_init__(self) -> None:
        """Check every field. Names of metrics are checked where the table is, in `metrics`."""
        check_types(self, "importance.")
        metrics = dict(self.metrics)
        if not metrics:
            raise ConfigError("`importance.metrics` should map metric names to non-negative weights. Found none.")
        for name, weight in metrics.items():
            check_number(f"importance.metrics[{name!r}]", weight, 0.0, WEIGHT, what="a weight in the mixture")
        if sum(metrics.values()) <= 0:
            raise ConfigError("`importance.metrics` should have at least one positive weight.")
        object.__setattr__(self, "metrics", {name: float(weight) for name, weight in metrics.items()})
        check_choice("importance.normalization", self.normalization, NORMALIZATIONS)
        check_choice("importance.reduction", self.reduction, REDUCTIONS)
        check_choice("importance.damping_scale", self.damping_scale, DAMPING_SCALES)
        check_number(
            "importance.damping", self.damping, 0.0, 1e6, what="ridge strength relative to the scale of the inputs"
        )
        if self.normalization == "none" and sum(weight > 0 for weight in metrics.values()) > 1:
            raise ConfigError(
                "`importance.metrics` mixes several metrics without a normalisation, so the one with the largest "
                f"numbers would decide alone. Set `importance.normalization` to one of {', '.join(NORMALIZATIONS[1:])}."
            )


@dataclass(frozen=True)
class AllocationConfig:
    """How the budget is shared by the sites.

    Args:
        method (`str`, *optional*, defaults to `"global"`):
            `uniform` (the same ratio everywhere), `flap` (see `structure`), `similarity` (Adapt-Pruner's map from the
            cosine of a layer's input and output), `logarithmic` (SlimGPT's schedule over depth), `global` (one
            threshold on score per parameter), `profile` (ratios from the control points), `ratios` (from `ratios`).
        structure (`str`, *optional*, defaults to `"AL-AM"`): FLAP's uniform or adaptive layers (UL, AL) and uniform,
            manual or adaptive modules (UM, MM, AM).
        attention_ratio (`float`, *optional*): share of KV groups to remove where the structure is manual.
        amplitude (`float`, *optional*, defaults to 0.02) and steps (`int`, *optional*, defaults to 1): Adapt-Pruner's
            amplitude, and over how many rounds of measuring and cutting the ratio is reached. With one step the
            amplitude is scaled by the number of increments of 0.02 that the published schedule would take.
        first_ratio (`float`, *optional*): ratio of the first layer in the logarithmic schedule; a third of the target
            where not given.
        profile (`tuple[float, ...]`, *optional*): control points over depth, interpolated linearly. In `global` they
            multiply scores by `exp(value)`; in `profile` they raise a layer's log-odds of being cut by `-value`. Higher
            keeps more; from -20 to 20.
        attention_balance (`float`, *optional*, defaults to 0.0): the same for attention against MLP; higher keeps more
            attention.
        ratios (`dict[str, float]`, *optional*): share of its units that each site (`layers.3.mlp`) loses, for the
            method `ratios`. All are scaled by one factor until the budget is met; sites without one lose nothing
            while the named ones have units to give, and no whole part goes.
        max_site_ratio (`float`, *optional*, defaults to 1.0): no site loses more than this share of its units. Whole
            parts that `units` lets go (`attention`, `mlp`, `layer`) are no units of a site: they go below 1, too.
    """

    method: str = "global"
    structure: str = "AL-AM"
    attention_ratio: float | None = None
    amplitude: float = 0.02
    steps: int = 1
    first_ratio: float | None = None
    profile: tuple[float, ...] = ()
    attention_balance: float = 0.0
    ratios: Mapping[str, float] = field(default_factory=dict)
    max_site_ratio: float = 1.0

    def __post_init__(self) -> None:
        """Check every field."""
        check_types(self, "allocation.")
        check_choice("allocation.method", self.method, ALLOCATIONS)
        check_choice("allocation.structure", self.structure, STRUCTURES)
        check_number("allocation.amplitude", self.amplitude, 0.0, 1.0, what="the spread of ratios over layers")
        check_whole("allocation.steps", self.steps, 1, what="rounds of measuring and cutting")
        check_number(
            "allocation.max_site_ratio", self.max_site_ratio, 0.0, 1.0, what="the largest share a site may lose"
        )
        object.__setattr__(self, "profile", tuple(float(value) for value in self.profile))
        for value in self.profile:
            check_number("allocation.profile", value, -REACH, REACH, what="exponents over depth; higher keeps more")
        check_number(
            "allocation.attention_balance", self.attention_balance, -REACH, REACH,
            what="an exponent; higher keeps more attention",
        )  # fmt: skip
        object.__setattr__(self, "ratios", {name: float(value) for name, value in dict(self.ratios).items()})
        for name, value in self.ratios.items():
            check_number(f"allocation.ratios[{name!r}]", value, 0.0, 1.0, what="a share of units")
        if self.method == "ratios" and not any(self.ratios.values()):
            raise ConfigError("`allocation.method='ratios'` needs `allocation.ratios` with a share above 0.")
        for name in ("attention_ratio", "first_ratio"):
            if getattr(self, name) is not None:
                check_number(
                    f"allocation.{name}", getattr(self, name), 0.0, 1.0, what="a share of units", open_high=True
                )
        if self.method == "flap" and self.structure.endswith("MM") and self.attention_ratio is None:
            raise ConfigError(f"`allocation.structure` {self.structure} needs `allocation.attention_ratio`.")


@dataclass(frozen=True)
class RepairConfig:
    """How the matrices that read pruned units are updated.

    Args:
        method (`str`, *optional*, defaults to `"least_squares"`): `none`, `bias` (FLAP: the mean contribution of what
            was removed) or `least_squares` (ridge regression of the dense output on the kept inputs).
        intercept (`bool`, *optional*, defaults to `False`): least squares may also move a bias, and gives one to
            matrices that have none (never in the uniform form). It bought 0.2 % of perplexity in a prototype on
            SmolLM2-135M, within its noise, and costs checkpoints that need this package for the biases alone.
        damping (`float`, *optional*, defaults to 0.01): ridge strength, relative to `damping_scale`.
        damping_scale (`str`, *optional*, defaults to `"mean"`): `mean` of the diagonal (the common choice), `median` of
            the diagonal, or `column` (each column's own variance: a massive activation damps only itself).
        schedule (`str`, *optional*, defaults to `"cached"`): `cached` (moments of the dense model, seconds),
            `sequential` (layer after layer on the pruned model's own activations), or `best` (both, and the one with
            the lower loss on held-out calibration windows stays). The last two are of least squares alone.
        target_mix (`float`, *optional*, defaults to 0.5): sequential only. 0 regresses on what the dense matrix makes
            of the pruned model's inputs, 1 on what brings the residual stream to where the dense model's is (so that
            layers make up for the errors of those before them), values between on the mixture.
        regional_steps (`int`, *optional*, defaults to 0): optimiser steps per block on all its matrices against the
            dense block's output, after the repair. 0 turns it off.
        regional_learning_rate (`float`, *optional*, defaults to 3e-4): Adam's learning rate for these steps.
        holdout (`float`, *optional*, defaults to 0.0625): share of the calibration windows that a repair must improve
            on to be kept; these windows are in no statistic.
        min_tokens_per_column (`float`, *optional*, defaults to 2.0): fewer calibration tokens than this times the
            widest matrix are refused.
    """

    method: str = "least_squares"
    intercept: bool = False
    damping: float = 0.01
    damping_scale: str = "mean"
    schedule: str = "cached"
    target_mix: float = 0.5
    regional_steps: int = 0
    regional_learning_rate: float = 3e-4
    holdout: float = 0.0625
    min_tokens_per_column: float = 2.0

    def __post_init__(self) -> None:
        """Check every field."""
        check_types(self, "repair.")
        check_choice("repair.method", self.method, REPAIRS)
        check_choice("repair.schedule", self.schedule, SCHEDULES)
        check_choice("repair.damping_scale", self.damping_scale, DAMPING_SCALES)
        check_number(
            "repair.damping", self.damping, 0.0, 1e6, what="ridge strength relative to the scale of the inputs"
        )
        check_number("repair.target_mix", self.target_mix, 0.0, 1.0, what="0 the pruned, 1 the dense stream")
        check_number("repair.holdout", self.holdout, 0.0, 0.5, what="share of windows held out")
        check_whole("repair.regional_steps", self.regional_steps, 0, what="optimiser steps per block")
        check_number(
            "repair.regional_learning_rate", self.regional_learning_rate, 0.0, 1.0, what="Adam's learning rate"
        )
        if self.method != "least_squares" and self.schedule != "cached":
            raise ConfigError(
                f"`repair.schedule` {self.schedule!r} is of least squares, and `repair.method` is {self.method!r}. Set "
                "`repair.method` to 'least_squares', or `repair.schedule` to 'cached'."
            )
        if self.schedule == "best" and self.holdout <= 0:
            raise ConfigError("`repair.schedule='best'` compares on held-out windows; set `repair.holdout` above 0.")
        check_number(
            "repair.min_tokens_per_column", self.min_tokens_per_column, 0.0, 1e6, what="tokens per input column"
        )
