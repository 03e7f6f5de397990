"""The config of a pruned model, regenerated from its modules.

transformers' own `per_layer_config` carries sizes that differ by layer; equal layers change the plain fields and leave
no trace. Provenance lies under the key `adaprune` (a key `pruning_config` would be swallowed by `AutoConfig`).
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from .architecture_json import architecture_from_dict, architecture_to_dict, carried_architecture
from .architectures import ARCHITECTURES, Architecture, architecture_for
from .errors import CheckpointError, ConfigError
from .layers import bind_views
from .quiet import quiet_global_values
from .sites import ModelSites
from .whole_files import write_whole

__all__ = [
    "LOADING",
    "MODEL_TAGS",
    "PROVENANCE_KEY",
    "check_configs",
    "drop_config_layers",
    "known_architecture",
    "name_layers",
    "own_architecture",
    "provenance_of",
    "update_config",
]

PROVENANCE_KEY = "adaprune"
# Beside the `per_layer_config` that transformers' error points at: it has no place for a message of ours.
LOADING = "import hf_adaprune before from_pretrained"
MODEL_TAGS = ("hf-adaprune", "pruned")  # of repositories on the Hub


def check_configs(model: Any) -> None:
    """Refuse a model whose configs transformers would not save, before any work is done that a save is to keep.

    What it accepts differs by its version and by whether a config was changed after it was loaded, so it is asked: both
    are saved into a folder that goes.

    Args:
        model (`PreTrainedModel`): dense or pruned; left as it is.

    Raises:
        CheckpointError: with transformers' own reason.
    """
    for name in ("config", "generation_config") if model.can_generate() else ("config",):
        try:
            with tempfile.TemporaryDirectory() as folder, quiet_global_values():
                copy.deepcopy(getattr(model, name)).save_pretrained(folder)
        except OSError:
            return  # no room for temporary files, which is said where it is needed
        except Exception as error:
            raise CheckpointError(
                f"transformers does not save `model.{name}` as it is ({_one_line(error)}), and a pruned model could "
                "not be saved with it. Set what is named there before the model is pruned or saved."
            ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def name_layers(path: Path, count: int) -> None:
    """Let a config file say how many layers there are by the name that all configs share.

    A Trainer that resumes reads the file as a config of no family, which cannot place the sizes of single layers where
    the family has a name of its own for their number (gpt2's `n_layer`).

    Args:
        path (`Path`): of the file; left alone where it is missing, has no sizes of single layers, or says it already.
        count (`int`): of the layers.
    """
    if not path.is_file():
        return
    data = json.loads(path.read_text(encoding="utf-8"))
    if "per_layer_config" not in data or "num_hidden_layers" in data:
        return
    write_whole(path, json.dumps({**data, "num_hidden_layers": count}, indent=2, sort_keys=True) + "\n")


def head_dim_of(config: Any) -> int:
    """Head size of a config, stated or derived."""
    stated = config._getattr_without_heterogeneous_validation("head_dim", None)
    return stated or config.hidden_size // config._getattr_without_heterogeneous_validation("num_attention_heads")


def update_config(sites: ModelSites, added_biases: Mapping[int, Iterable[str]]) -> None:
    """Regenerate a pruned model's config from its modules, in place.

    Equal layers without added biases change the plain fields; everything else goes into `per_layer_config`, relative to
    the global values, which stay what they were (but for a number of experts that all layers share).

    Args:
        sites ([`ModelSites`]): the pruned model, found anew.
        added_biases (`dict[int, list[str]]`): projections, by layer, that have a bias which the family's config cannot
            state.
    """
    config, architecture = sites.model.config, sites.architecture
    rows = [_layer_sizes(sites, number) for number in range(len(sites.layers))]
    biases = {str(number): sorted(paths) for number, paths in added_biases.items() if paths}
    config.per_layer_config = None
    # Left over from an earlier cut, it would let a plain transformers read what it must not read.
    config.__dict__.pop("allow_global_per_layer_attribute_access", None)
    heads = config._getattr_without_heterogeneous_validation(architecture.heads_field, None)
    mixed_heads = any(row.get(architecture.heads_field, heads) != heads for row in rows)
    head_dim = next((site.columns_per_unit for site in sites if site.kind == "attention"), None)
    if head_dim and architecture.explicit_head_dim and mixed_heads:
        config.head_dim = head_dim
    plain = _equal_rows(rows)
    if plain is not None and not biases and _is_allowed(config, plain):
        for name, value in plain.items():
            setattr(config, name, value)
        config.__dict__.pop(PROVENANCE_KEY, None)
    else:
        provenance = {**(config.__dict__.get(PROVENANCE_KEY) or {}), "added_biases": biases, "loading": LOADING}
        if architecture.model_type not in ARCHITECTURES:
            provenance["architecture"] = architecture_to_dict(architecture)
        setattr(config, PROVENANCE_KEY, provenance)
        experts = architecture.experts_field
        counts = {row[experts] for row in rows if experts in row}
        if len(counts) == 1:
            setattr(config, experts, counts.pop())  # the router's loss is one of all layers, and reads it globally
        mixed_experts = bool(experts) and any(
            row.get(experts, getattr(config, experts)) != getattr(config, experts) for row in rows
        )
        heads_read = architecture.heads_must_divide_hidden or architecture.heads_read_globally
        if (mixed_heads and heads_read) or mixed_experts:
            config.allow_global_per_layer_attribute_access = True
        config.per_layer_config = dict(enumerate(rows))
        if not config._heterogeneity_spec.per_layer_overrides:
            config.per_layer_config = None
    bind_views(sites.layers, config)


def _equal_rows(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The sizes that all layers share, `None` where they differ. Dense and sparse layers have fields of their own."""
    shared: dict[str, Any] = {}
    for row in rows:
        if "skip" in row or any(shared.setdefault(name, value) != value for name, value in row.items()):
            return None
    return shared


def _is_allowed(config: Any, plain: Mapping[str, Any]) -> bool:
    # Some config classes refuse head counts that do not divide the hidden size, or rope factors that no longer fit
    # hidden_size / heads, when they save and load. Layer by layer nobody checks.
    trial = copy.copy(config)
    try:
        for name, value in plain.items():
            setattr(trial, name, value)
        trial.validate()
    except StrictDataclassError:
        return False
    return True


def _layer_sizes(sites: ModelSites, number: int) -> dict[str, Any]:
    architecture = sites.architecture
    sizes: dict[str, Any] = {}
    by_name = sites.by_name
    attention = by_name.get(f"layers.{number}.attention")
    if attention is not None and not attention.refusal:
        sizes[architecture.heads_field] = attention.groups * attention.group_size
        if architecture.kv_heads_field:
            sizes[architecture.kv_heads_field] = attention.groups
    mlp = by_name.get(f"layers.{number}.mlp")
    if mlp is not None and architecture.width_field:
        sizes[architecture.width_field] = mlp.columns
    experts = by_name.get(f"layers.{number}.experts")
    if experts is not None:
        sizes[architecture.experts_field] = experts.groups
        sizes[architecture.expert_width_field] = experts.group_size
    skip = skipped_sublayers(sites.layers[number])
    if skip:
        sizes["skip"] = skip
        if "attention" in skip:
            field, value = architecture.removed_attention
            sizes[field] = value
            config = sites.model.config
            if config._getattr_without_heterogeneous_validation(field, None) == value:
                # A value equal to the global one is not stored, and would stop nobody: take another field as well.
                for other in ("attention_dropout", "attn_pdrop"):
                    if config._hasattr_without_heterogeneous_validation(other):
                        sizes[other] = 1.0
        if "mlp" in skip:
            # Which kind of MLP it was is not known any more; a plain transformers reads one of the two.
            for field in filter(None, (architecture.width_field, architecture.expert_width_field)):
                sizes[field] = 1
    return sizes


def drop_config_layers(config: Any, architecture: Architecture, kept: Iterable[int]) -> None:
    """Cut every per-layer entry of a config down to the layers that stay, in place.

    Args:
        config (`PreTrainedConfig`): the model's config.
        architecture ([`Architecture`]): the family.
        kept (iterable of `int`): old numbers of the layers that stay.
    """
    kept = tuple(kept)
    config.per_layer_config = None
    for name in architecture.layer_lists:
        values = getattr(config, name, None)
        if values is not None:
            setattr(config, name, [values[number] for number in kept])
    for name in architecture.layer_index_lists:
        values = getattr(config, name, None)
        if values:
            setattr(config, name, [new for new, old in enumerate(kept) if old in values])
    setattr(config, architecture.layers_field, len(kept))
    if getattr(config, "max_window_layers", None) is not None:
        config.max_window_layers = sum(old < config.max_window_layers for old in kept)


def provenance_of(config: Any) -> dict[str, Any]:
    """What this package wrote into a config; empty for a config without.

    Raises:
        CheckpointError: something else stands there.
    """
    found = config.__dict__.get(PROVENANCE_KEY) or {}
    biases = found.get("added_biases", {}) if isinstance(found, dict) else None
    if not isinstance(biases, dict) or not all(
        number.isdecimal() and isinstance(paths, (list, tuple)) and all(isinstance(path, str) for path in paths)
        for number, paths in biases.items()
    ):
        raise CheckpointError(
            f"`{PROVENANCE_KEY}` in config.json should be what hf_adaprune writes, with lists of matrices by layer in "
            f"`added_biases`. Found {str(found)[:80]!r}. Is the checkpoint whole, and from a source that you trust?"
        )
    return found


def known_architecture(config: Any, own: Architecture | None = None) -> Architecture:
    """The architecture of a config: the caller's, a built-in one, or the one its checkpoint carries."""
    carried = carried_architecture(provenance_of(config), config.model_type)
    return architecture_for(config.model_type, [entry for entry in (own, carried) if entry is not None])


def own_architecture(model: Any, given: Architecture | None) -> Architecture | None:
    """The architecture of a model that is not built in: the caller's, or the one its checkpoint carries.

    Raises:
        ConfigError: the caller's could not be read from a checkpoint again.
    """
    provenance = getattr(getattr(model, "config", None), "__dict__", {}).get(PROVENANCE_KEY) or {}
    if given is not None:
        try:
            architecture_from_dict(architecture_to_dict(given))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"`architecture` could be saved, but not read again: {error}.") from error
    return known_architecture(model.config, given) if given or provenance.get("architecture") else None


def skipped_sublayers(layer: Any) -> list[str]:
    """Which sublayers of a decoder layer were removed, in transformers' words: `attention`, `mlp`."""
    # By attribute: a model that was loaded by its remote code has classes of its own there.
    kinds = (getattr(type(module), "removed_sublayer", None) for module in layer.modules())
    return sorted({kind for kind in kinds if kind})
