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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .fields import check_choice, check_number, check_seed, check_types, check_whole
from .parts import (
    AllocationConfig,
    CalibrationConfig,
    ImportanceConfig,
    RepairConfig,
    Source,
    TextSource,
)
from .search_config import BUDGETS, SearchConfig

__all__ = [
    "RECIPES",
    "AllocationConfig",
    "CalibrationConfig",
    "ImportanceConfig",
    "PruningConfig",
    "RepairConfig",
    "SearchConfig",
    "Source",
    "TextSource",
]

logger = logging.getLogger(__name__)

CONFIG_NAME = "pruning_config.json"

UNITS = ("channel", "kv_group", "query_head", "expert", "expert_channel", "attention", "mlp", "layer")
GRAM_PLACES = ("model", "cpu", "disk")


@dataclass(frozen=True)
class PruningConfig:
    """What to remove from a causal language model, and how.

    Args:
        pruning_ratio (`float`, *optional*, defaults to 0.2): removed decoder-layer parameters over all decoder-layer
            parameters, in [0, 1). Embeddings and head are not counted; biases that a repair adds count as kept.
        target_parameters (`int`, *optional*): total parameters of the model instead of a ratio.
        target_bytes (`int`, *optional*): bytes of the weights, in the model's dtype, instead of a ratio.
        units (`tuple[str, ...]`, *optional*, defaults to `("channel", "kv_group")`): what may be removed, of `channel`
            (MLP channels), `kv_group`, `query_head` (the same number in every group of a layer), `expert`,
            `expert_channel` (the same number in every expert of a layer), and the sublayers `attention`, `mlp` and
            whole `layer`s. Kinds that a model does not have are ignored as long as one is left.
        protected_layers (`tuple[int, ...]`, *optional*): layers that stay as they are; negative numbers count from the
            end.
        uniform (`bool`, *optional*, defaults to `False`): every layer gets the same widths and no bias is added, so
            that the checkpoint loads in anything that loads the dense model, without this package.
        channel_multiple (`int`, *optional*, defaults to 1): MLP and expert widths that are cut end at multiples of
            this; a site that loses nothing keeps its width, whatever it is.
        min_channels (`int`, *optional*, defaults to 1) and min_groups (`int`, *optional*, defaults to 1): floors per
            site. A site loses its last unit only where its sublayer may go.
        budgets (`dict[str, float]`, *optional*): budgets that all hold together, instead of a ratio: `ratio`,
            `parameters`, `bytes`, `macs` (multiply-adds per token with `budget_context` tokens of context),
            `prefill_tokens_per_second` and `decode_tokens_per_second` (at least this fast, on this device).
        budget_context (`int`, *optional*, defaults to 512): tokens of context behind multiply-adds and speeds.
        calibration, importance, allocation, repair: the parts.
        search ([`SearchConfig`], *optional*): look for a better config and plan first; none where not given.
        layer_by_layer (`bool`, *optional*, defaults to `False`): the repair runs one decoder layer at a time on the
            pruned model's own activations, with the moments of one layer in memory. [`prune_to_disk`] always works so,
            and holds the weights of one layer, too.
        activation_bytes (`int`, *optional*, defaults to 512 MiB): memory that [`prune_to_disk`] takes for activations
            between layers; what does not fit goes to files beside the output.
        gram_place (`str`, *optional*, defaults to `"cpu"`): where Gram matrices live: on the `model`'s device, the
            `cpu` or the `disk` (safetensors files in a temporary folder).
        seed (`int`, *optional*, defaults to 0): of everything drawn at random; below 2**32.
        recipe_name (`str`, *optional*, defaults to `"custom"`): the recipe this config came from, for cards and tables.

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
    budgets: Mapping[str, float] = field(default_factory=dict)
    budget_context: int = 512
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    allocation: AllocationConfig = field(default_factory=AllocationConfig)
    repair: RepairConfig = field(default_factory=RepairConfig)
    search: SearchConfig | None = None
    layer_by_layer: bool = False
    activation_bytes: int = 2**29
    gram_place: str = "cpu"
    seed: int = 0
    recipe_name: str = "custom"

    def __post_init__(self) -> None:
        """Check every field and how they fit together."""
        check_types(self)
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
                check_whole(name, getattr(self, name), 1, what="the size to reach")
        object.__setattr__(self, "budgets", {name: float(goal) for name, goal in dict(self.budgets).items()})
        for name, goal in self.budgets.items():
            check_choice("budgets", name, BUDGETS)
            check_number(f"budgets[{name!r}]", goal, 0.0, 1e18, what="a size, or a least speed")
        if self.budgets and (self.target_parameters is not None or self.target_bytes is not None):
            raise ConfigError("`budgets` and a target are both set; write the target as a budget, too.")
        check_whole("budget_context", self.budget_context, 2, what="tokens of context")
        units = self.units
        for unit in units:
            check_choice("units", unit, UNITS)
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
        check_whole("channel_multiple", self.channel_multiple, 1, what="kept widths are multiples of it")
        check_whole("min_channels", self.min_channels, 1, what="channels that every MLP keeps")
        check_whole("min_groups", self.min_groups, 1, what="KV groups that every attention keeps")
        check_whole("activation_bytes", self.activation_bytes, 0, what="bytes of memory for activations")
        check_choice("gram_place", self.gram_place, GRAM_PLACES)
        check_seed(self.seed)
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
        check_choice("recipe", name, RECIPES)
        return RECIPES[name].with_changes(recipe_name=name, **changes)

    def with_changes(self, **changes: Any) -> PruningConfig:
        """A copy with other values; a mapping for a part changes only the fields it names.

        Raises:
            ConfigError: an unknown field, or a value out of range.
        """
        with _wrong_types("PruningConfig"):
            return self._changed(changes)

    def _changed(self, changes: Mapping[str, Any]) -> PruningConfig:
        prepared: dict[str, Any] = {}
        for name, value in changes.items():
            if name not in {f.name for f in fields(self)}:
                raise ConfigError(
                    f"PruningConfig has no field {name!r}. It has: {', '.join(f.name for f in fields(self))}."
                )
            current = getattr(self, name)
            if name == "search" and current is None and isinstance(value, Mapping):
                current = SearchConfig()
            if is_dataclass(current) and not isinstance(current, type) and isinstance(value, Mapping):
                unknown = set(value) - {f.name for f in fields(current)}
                if unknown:
                    raise ConfigError(f"`{name}` has no field {', '.join(sorted(unknown))}.")
                value = replace(current, **value)
            prepared[name] = value
        return replace(self, **prepared)

    @classmethod
    def read(cls, given: Any, field: str = "config") -> PruningConfig:
        """The config that a caller means: a config, its fields, or the name of a recipe.

        Args:
            given ([`PruningConfig`], `dict` or `str`): what was passed.
            field (`str`, *optional*, defaults to `"config"`): the argument's name, for the message.

        Raises:
            ConfigError: it is something else, or a field is out of range.
        """
        if isinstance(given, cls):
            return given
        if isinstance(given, str):
            return cls.recipe(given)
        if isinstance(given, Mapping):
            return cls.from_dict(given)
        raise ConfigError(
            f"`{field}` should be a PruningConfig, a mapping of its fields or the name of a recipe. Found {given!r}."
        )

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
        if not isinstance(data, Mapping):
            raise ConfigError(f"a config should be a mapping of fields. Found {data!r}.")
        known = dict(data)
        known.pop("version", None)
        parts = {
            "calibration": CalibrationConfig,
            "importance": ImportanceConfig,
            "allocation": AllocationConfig,
            "repair": RepairConfig,
            "search": SearchConfig,
        }
        for name, kind in parts.items():
            if name in known and not (name == "search" and known[name] is None):
                if not isinstance(known[name], Mapping):
                    raise ConfigError(f"`{name}` should be a mapping of fields. Found {known[name]!r}.")
                with _wrong_types(name):
                    known[name] = kind(**_known_fields(kind, known[name]))
        with _wrong_types("PruningConfig"):
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
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is not JSON: {error}.") from error
        if not isinstance(data, Mapping):
            raise ConfigError(f"{path} should hold a JSON object.")
        return cls.from_dict(data.get("config", data))


@contextmanager
def _wrong_types(name: str) -> Iterator[None]:
    """What a field of a wrong type runs into is an error of the config."""
    try:
        yield
    except ConfigError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as error:
        raise ConfigError(
            f"a field of {name} has a value of a wrong type: {error}. Compare with its docstring."
        ) from error


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
