"""`PruningConfig` and its parts: everything a run can be told, with every default of the package in one place.

A config is a frozen value that travels as JSON (`pruning_config.json` beside a checkpoint). Recipes are named configs;
a keyword beside the recipe's name changes one thing about it:

```python
PruningConfig.recipe("flap", pruning_ratio=0.3)
```
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from .errors import ConfigError

__all__ = [
    "RECIPES",
    "AllocationConfig",
    "CalibrationConfig",
    "ImportanceConfig",
    "PruningConfig",
    "RepairConfig",
    "TextSource",
]

logger = logging.getLogger(__name__)

CONFIG_NAME = "pruning_config.json"

UNITS = ("channel", "kv_group", "query_head", "expert", "expert_channel", "attention", "mlp", "layer")
NORMALIZATIONS = ("none", "mean", "zscore", "rank", "log")
REDUCTIONS = ("sum", "mean", "max", "prod", "first", "last")
ALLOCATIONS = ("uniform", "flap", "similarity", "logarithmic", "global", "profile")
STRUCTURES = ("UL-UM", "UL-MM", "AL-MM", "AL-AM")
REPAIRS = ("none", "bias", "least_squares")
SCHEDULES = ("cached", "sequential", "best")
DAMPING_SCALES = ("mean", "column", "median")
GRAM_PLACES = ("model", "cpu", "disk")


def _choice(name: str, value: Any, allowed: Iterable[str]) -> None:
    allowed = tuple(allowed)
    if value not in allowed:
        raise ConfigError(f"`{name}` should be one of {', '.join(allowed)}. Found {value!r}.")


def _number(name: str, value: Any, low: float, high: float, *, what: str, open_high: bool = False) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    good = good and low <= value and (value < high if open_high else value <= high)
    if not good:
        bracket = ")" if open_high else "]"
        raise ConfigError(f"`{name}` should be in [{low:g}, {high:g}{bracket}: {what}. Found {value!r}.")


def _whole(name: str, value: Any, low: int, *, what: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ConfigError(f"`{name}` should be a whole number of at least {low}: {what}. Found {value!r}.")


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


def _sources(name: str, value: Any) -> tuple[Source, ...]:
    if isinstance(value, (str, TextSource)):
        value = (value,)
    sources = []
    for source in value:
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
        samples (`int`, *optional*, defaults to 256): windows in all, shared equally by the sources.
        sequence_length (`int`, *optional*, defaults to 512): tokens per window.
        gradient_samples (`int`, *optional*, defaults to 48): windows of these that also get a backward pass, where a
            metric needs gradients.
        domain_weights (`tuple[float, ...]`, *optional*): one weight per source; equal where not given.
        selection (`tuple[str | TextSource, ...]`, *optional*): what a search minimises.
        report (`tuple[str | TextSource, ...]`, *optional*): what is reported at the end, never chosen on.
        evaluation_tokens (`int`, *optional*, defaults to 16384): tokens of report text per source.
        evaluation_length (`int`, *optional*, defaults to 1024): window length of perplexity.
    """

    sources: tuple[Source, ...] = ("python",)
    samples: int = 256
    sequence_length: int = 512
    gradient_samples: int = 48
    domain_weights: tuple[float, ...] = ()
    selection: tuple[Source, ...] = ()
    report: tuple[Source, ...] = ()
    evaluation_tokens: int = 16384
    evaluation_length: int = 1024

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("sources", "selection", "report"):
            object.__setattr__(self, name, _sources(f"calibration.{name}", getattr(self, name)))
        object.__setattr__(self, "domain_weights", tuple(float(weight) for weight in self.domain_weights))
        if not self.sources:
            raise ConfigError("`calibration.sources` is empty. Name at least one source of text, for example `python`.")
        _whole("calibration.samples", self.samples, len(self.sources), what="windows, at least one per source")
        _whole("calibration.sequence_length", self.sequence_length, 8, what="tokens per window")
        _whole("calibration.gradient_samples", self.gradient_samples, 1, what="windows with a backward pass")
        _whole("calibration.evaluation_tokens", self.evaluation_tokens, 2, what="tokens per report source")
        _whole("calibration.evaluation_length", self.evaluation_length, 2, what="tokens per perplexity window")
        if self.domain_weights:
            if len(self.domain_weights) != len(self.sources):
                raise ConfigError(
                    f"`calibration.domain_weights` should have one weight per source ({len(self.sources)}). "
                    f"Found {len(self.domain_weights)}."
                )
            if min(self.domain_weights) < 0 or sum(self.domain_weights) <= 0:
                raise ConfigError("`calibration.domain_weights` should be non-negative with a positive sum.")


@dataclass(frozen=True)
class ImportanceConfig:
    """Which metrics score the units, and how several become one.

    Args:
        metrics (`dict[str, float]`, *optional*, defaults to `{"obs": 1.0}`): names of `hf_adaprune.importance.METRICS`
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
        """Check every field. Names of metrics are checked where the table is, in `importance`."""
        metrics = dict(self.metrics)
        if not metrics or any(not isinstance(w, (int, float)) or w < 0 for w in metrics.values()):
            raise ConfigError("`importance.metrics` should map metric names to non-negative weights.")
        if sum(metrics.values()) <= 0:
            raise ConfigError("`importance.metrics` should have at least one positive weight.")
        object.__setattr__(self, "metrics", {name: float(weight) for name, weight in metrics.items()})
        _choice("importance.normalization", self.normalization, NORMALIZATIONS)
        _choice("importance.reduction", self.reduction, REDUCTIONS)
        _choice("importance.damping_scale", self.damping_scale, DAMPING_SCALES)
        _number("importance.damping", self.damping, 0.0, 1e6, what="ridge strength relative to the scale of the inputs")
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
            threshold on score per parameter), `profile` (ratios from the control points).
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
            keeps more.
        attention_balance (`float`, *optional*, defaults to 0.0): the same for attention against MLP; higher keeps more
            attention.
        max_site_ratio (`float`, *optional*, defaults to 1.0): no site loses more than this share of its units.
    """

    method: str = "global"
    structure: str = "AL-AM"
    attention_ratio: float | None = None
    amplitude: float = 0.02
    steps: int = 1
    first_ratio: float | None = None
    profile: tuple[float, ...] = ()
    attention_balance: float = 0.0
    max_site_ratio: float = 1.0

    def __post_init__(self) -> None:
        """Check every field."""
        _choice("allocation.method", self.method, ALLOCATIONS)
        _choice("allocation.structure", self.structure, STRUCTURES)
        _number("allocation.amplitude", self.amplitude, 0.0, 1.0, what="the spread of ratios over layers")
        _whole("allocation.steps", self.steps, 1, what="rounds of measuring and cutting")
        _number("allocation.max_site_ratio", self.max_site_ratio, 0.0, 1.0, what="the largest share a site may lose")
        object.__setattr__(self, "profile", tuple(float(value) for value in self.profile))
        for name in ("attention_ratio", "first_ratio"):
            if getattr(self, name) is not None:
                _number(f"allocation.{name}", getattr(self, name), 0.0, 1.0, what="a share of units", open_high=True)
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
            the lower loss on held-out calibration windows stays).
        target_mix (`float`, *optional*, defaults to 0.0): sequential only. 0 regresses on what the dense matrix makes
            of the pruned model's inputs, 1 on the dense model's output, values between on the mixture.
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
    target_mix: float = 0.0
    regional_steps: int = 0
    regional_learning_rate: float = 3e-4
    holdout: float = 0.0625
    min_tokens_per_column: float = 2.0

    def __post_init__(self) -> None:
        """Check every field."""
        _choice("repair.method", self.method, REPAIRS)
        _choice("repair.schedule", self.schedule, SCHEDULES)
        _choice("repair.damping_scale", self.damping_scale, DAMPING_SCALES)
        _number("repair.damping", self.damping, 0.0, 1e6, what="ridge strength relative to the scale of the inputs")
        _number("repair.target_mix", self.target_mix, 0.0, 1.0, what="0 the pruned, 1 the dense model's output")
        _number("repair.holdout", self.holdout, 0.0, 0.5, what="share of windows held out")
        _whole("repair.regional_steps", self.regional_steps, 0, what="optimiser steps per block")
        _number("repair.regional_learning_rate", self.regional_learning_rate, 0.0, 1.0, what="Adam's learning rate")
        if self.method == "least_squares" and self.schedule == "best" and self.holdout <= 0:
            raise ConfigError("`repair.schedule='best'` compares on held-out windows; set `repair.holdout` above 0.")
        _number("repair.min_tokens_per_column", self.min_tokens_per_column, 0.0, 1e6, what="tokens per input column")


@dataclass(frozen=True)
class PruningConfig:
    """What to remove from a causal language model, and how.

    Args:
        pruning_ratio (`float`, *optional*, defaults to 0.2): removed decoder-layer parameters over all decoder-layer
            parameters, in [0, 1). Embeddings and head are not counted; biases that a repair adds count as kept.
        target_parameters (`int`, *optional*): total parameters of the model instead of a ratio.
        target_bytes (`int`, *optional*): bytes of the weights, in the model's dtype, instead of a ratio.
        units (`tuple[str, ...]`, *optional*): what may be removed, of `channel` (MLP channels), `kv_group`,
            `query_head` (the same number in every group of a layer), `expert`, `expert_channel` (the same number in
            every expert of a layer), and the sublayers `attention`, `mlp` and whole `layer`s. Kinds that a model does
            not have are ignored as long as one is left.
        protected_layers (`tuple[int, ...]`, *optional*): layers that stay as they are; negative numbers count from the
            end.
        uniform (`bool`, *optional*, defaults to `False`): every layer gets the same widths and no bias is added, so
            that the checkpoint loads in anything that loads the dense model, without this package.
        channel_multiple (`int`, *optional*, defaults to 1): MLP and expert widths are kept multiples of this.
        min_channels (`int`, *optional*, defaults to 1) and min_groups (`int`, *optional*, defaults to 1): floors per
            site. A site loses its last unit only where its sublayer may go.
        calibration, importance, allocation, repair: the parts.
        layer_by_layer (`bool`, *optional*, defaults to `False`): the repair runs one decoder layer at a time on the
            pruned model's own activations, with the moments of one layer in memory.
        gram_place (`str`, *optional*, defaults to `"cpu"`): where Gram matrices live: on the `model`'s device, the
            `cpu` or the `disk` (safetensors files in a temporary folder).
        seed (`int`, *optional*, defaults to 0): of everything drawn at random.
        recipe_name (`str`, *optional*): the recipe this config came from, for cards and tables.

    Raises:
        ConfigError: a field is out of range, or fields contradict each other.

    Example:

    ```python
    >>> from hf_adaprune import PruningConfig
    >>> config = PruningConfig.recipe("default", pruning_ratio=0.3)
    >>> config.pruning_ratio
    0.3
    ```
    """

    pruning_ratio: float = 0.2
    target_parameters: int | None = None
    target_bytes: int | None = None
    units: tuple[str, ...] = ("channel", "kv_group")
    protected_layers: tuple[int, ...] = ()
    uniform: bool = False
    channel_multiple: int = 1
    min_channels: int = 1
    min_groups: int = 1
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    allocation: AllocationConfig = field(default_factory=AllocationConfig)
    repair: RepairConfig = field(default_factory=RepairConfig)
    layer_by_layer: bool = False
    gram_place: str = "cpu"
    seed: int = 0
    recipe_name: str = "custom"

    def __post_init__(self) -> None:
        """Check every field and how they fit together."""
        ratio = self.pruning_ratio
        if not isinstance(ratio, (int, float)) or isinstance(ratio, bool) or not 0.0 <= ratio < 1.0:
            hint = f" For {ratio:g} percent write {ratio / 100:g}." if _looks_like_percent(ratio) else ""
            raise ConfigError(
                "`pruning_ratio` should be in [0, 1): the share of decoder-layer parameters to remove. "
                f"Found {ratio!r}.{hint}"
            )
        if self.target_parameters is not None and self.target_bytes is not None:
            raise ConfigError("`target_parameters` and `target_bytes` are both set; give one budget.")
        for name in ("target_parameters", "target_bytes"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 1, what="the size to reach")
        units = (self.units,) if isinstance(self.units, str) else tuple(self.units)
        object.__setattr__(self, "units", units)
        for unit in units:
            _choice("units", unit, UNITS)
        if not units:
            raise ConfigError(f"`units` is empty. Name at least one of {', '.join(UNITS)}.")
        for pair in (("kv_group", "query_head"), ("expert", "expert_channel")):
            if set(pair) <= set(units):
                raise ConfigError(
                    f"`units` holds both {pair[0]} and {pair[1]}, which cut the same matrices in two ways. Choose one; "
                    "a second run on the pruned model can cut the other."
                )
        if self.uniform and {"attention", "mlp"} & set(units):
            raise ConfigError(
                "`uniform=True` means equal layers, which single removed sublayers contradict. Take `attention` and "
                "`mlp` out of `units`; whole layers may go."
            )
        if self.uniform and "layer" in units and len(units) > 1:
            raise ConfigError(
                "`uniform=True` shares widths or drops layers, one of the two in a run. Give `units` as ('layer',) or "
                "leave `layer` out; a second run on the pruned model can do the other."
            )
        whole = {"attention", "mlp", "layer"} & set(units)
        if whole and self.importance.normalization == "zscore" and set(self.importance.metrics) != {"block_influence"}:
            raise ConfigError(
                "`importance.normalization='zscore'` centres the scores of every site, so whole sublayers and layers "
                f"cannot be compared by them. Take {', '.join(sorted(whole))} out of `units`, or normalise by mean, "
                "rank or log."
            )
        object.__setattr__(self, "protected_layers", tuple(int(layer) for layer in self.protected_layers))
        _whole("channel_multiple", self.channel_multiple, 1, what="kept widths are multiples of it")
        _whole("min_channels", self.min_channels, 1, what="channels that every MLP keeps")
        _whole("min_groups", self.min_groups, 1, what="KV groups that every attention keeps")
        _choice("gram_place", self.gram_place, GRAM_PLACES)
        _whole("seed", self.seed, 0, what="the seed of everything drawn at random")
        if self.uniform and self.repair.method == "bias":
            raise ConfigError(
                "`repair.method='bias'` adds biases, which the uniform form cannot carry. Use `least_squares` or "
                "`none`."
            )

    @classmethod
    def recipe(cls, name: str, **changes: Any) -> PruningConfig:
        """A named recipe, with changes.

        Args:
            name (`str`): one of `hf_adaprune.RECIPES`.
            **changes: fields of [`PruningConfig`]; the value for a part may be a mapping of the fields to change in it.

        Raises:
            ConfigError: no such recipe, or a change that is out of range.
        """
        _choice("recipe", name, RECIPES)
        return RECIPES[name].with_changes(recipe_name=name, **changes)

    def with_changes(self, **changes: Any) -> PruningConfig:
        """A copy with other values; a mapping for a part changes only the fields it names.

        Raises:
            ConfigError: an unknown field, or a value out of range.
        """
        prepared: dict[str, Any] = {}
        for name, value in changes.items():
            if name not in {f.name for f in fields(self)}:
                raise ConfigError(
                    f"PruningConfig has no field {name!r}. It has: {', '.join(f.name for f in fields(self))}."
                )
            current = getattr(self, name)
            if is_dataclass(current) and not isinstance(current, type) and isinstance(value, Mapping):
                unknown = set(value) - {f.name for f in fields(current)}
                if unknown:
                    raise ConfigError(f"`{name}` has no field {', '.join(sorted(unknown))}.")
                value = replace(current, **value)
            prepared[name] = value
        return replace(self, **prepared)

    def to_dict(self) -> dict[str, Any]:
        """The config as plain JSON types; texts in memory become their name and digest."""
        from . import __version__

        data: dict[str, Any] = asdict(self)
        for name in ("sources", "selection", "report"):
            data["calibration"][name] = [_source_json(source) for source in getattr(self.calibration, name)]
        data["version"] = __version__
        return json.loads(json.dumps(data))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PruningConfig:
        """The config of a mapping as [`~PruningConfig.to_dict`] writes it; unknown keys are dropped with a warning.

        Raises:
            ConfigError: a value is out of range, or texts in memory would be needed.
        """
        known = dict(data)
        known.pop("version", None)
        parts = {
            "calibration": CalibrationConfig,
            "importance": ImportanceConfig,
            "allocation": AllocationConfig,
            "repair": RepairConfig,
        }
        for name, kind in parts.items():
            if name in known:
                if not isinstance(known[name], Mapping):
                    raise ConfigError(f"`{name}` should be a mapping of fields. Found {known[name]!r}.")
                known[name] = kind(**_known_fields(kind, known[name]))
        return cls(**_known_fields(cls, known))

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write `pruning_config.json` into a folder, which is made where it is missing."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        (folder / CONFIG_NAME).write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, path_or_repo: str | os.PathLike[str], **hub_kwargs: Any) -> PruningConfig:
        """The config beside a checkpoint: a folder, a JSON file, or a repository on the Hub.

        Args:
            path_or_repo (`str`): where to look.
            **hub_kwargs: `revision`, `token`, `cache_dir`, `subfolder` ... of `huggingface_hub.hf_hub_download`.

        Raises:
            ConfigError: there is no such file, or it is no config.
        """
        path = Path(path_or_repo)
        if path.is_dir():
            path = path / CONFIG_NAME
        elif not path.is_file():
            if path.suffix == ".json" or path.is_absolute():
                raise ConfigError(f"There is no pruning config at {path}.")
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(str(path_or_repo), CONFIG_NAME, **hub_kwargs))
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ConfigError(
                f"There is no {CONFIG_NAME} in {path.parent}. Was the model pruned by this package?"
            ) from error
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is not JSON: {error}.") from error
        if not isinstance(data, Mapping):
            raise ConfigError(f"{path} should hold a JSON object.")
        return cls.from_dict(data.get("config", data))


def _looks_like_percent(ratio: Any) -> bool:
    return isinstance(ratio, (int, float)) and not isinstance(ratio, bool) and 1 <= ratio < 100


def _source_json(source: Source) -> Any:
    if isinstance(source, str):
        return source
    import hashlib

    digest = hashlib.sha256("\0".join(source.texts).encode()).hexdigest()
    return {"in_memory": source.name, "documents": len(source.texts), "sha256": digest}


def _known_fields(kind: type, data: Mapping[str, Any]) -> dict[str, Any]:
    names = {f.name for f in fields(kind)}
    unknown = sorted(set(data) - names)
    if unknown:
        logger.warning("%s: dropped unknown keys %s (written by another version?)", kind.__name__, ", ".join(unknown))
    return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items() if name in names}


def _recipes() -> dict[str, PruningConfig]:
    none = RepairConfig(method="none", holdout=0.0)
    uniform = AllocationConfig(method="uniform")
    return {
        # The geometric mean of two loss estimates that fail in different ways: Fisher sees what the loss does but not
        # what a refit can absorb, greedy OBS the reverse. Both in loss units, so one threshold serves all layers.
        "default": PruningConfig(
            importance=ImportanceConfig({"fisher": 1.0, "obs_gradient_greedy": 1.0}, normalization="log"),
            allocation=AllocationConfig(method="global"),
        ),
        "magnitude": PruningConfig(importance=ImportanceConfig({"magnitude": 1.0}), allocation=uniform, repair=none),
        "random": PruningConfig(importance=ImportanceConfig({"random": 1.0}), allocation=uniform, repair=none),
        "wanda-sp": PruningConfig(importance=ImportanceConfig({"wanda_sp": 1.0}), allocation=uniform, repair=none),
        "flap": PruningConfig(
            importance=ImportanceConfig({"wifv": 1.0}, normalization="zscore"),
            allocation=AllocationConfig(method="flap", structure="AL-AM"),
            repair=RepairConfig(method="bias"),
        ),
        "llm-pruner": PruningConfig(
            importance=ImportanceConfig({"taylor_element_first": 1.0}),
            allocation=uniform,
            protected_layers=(0, 1, 2, 3, -1, -2),
            repair=none,
        ),
        "shortgpt": PruningConfig(units=("layer",), importance=ImportanceConfig({"block_influence": 1.0}), repair=none),
        "adapt-pruner": PruningConfig(
            importance=ImportanceConfig({"taylor_element_first": 1.0}),
            allocation=AllocationConfig(method="similarity", amplitude=0.02),
            repair=none,
        ),
    }


RECIPES: dict[str, PruningConfig] = {name: replace(config, recipe_name=name) for name, config in _recipes().items()}
