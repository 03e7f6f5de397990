"""What a plan or a checkpoint is, without loading it.

Everything here reads plans, configs and the headers of weight files; no weights, no heavy library.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .architecture_json import carried_architecture
from .architectures import ARCHITECTURES, Architecture
from .config import CONFIG_NAME
from .errors import AdaPruneError, CheckpointError, PlanError
from .plan import MOST_LAYERS, PruningPlan
from .reporting import layer_table, size_text
from .widths import LayerWidths, Pair, layer_widths

__all__ = ["Description", "describe", "describe_checkpoint", "final_measure"]


@dataclass(frozen=True)
class Description:
    """What a plan or a checkpoint is, without loading it.

    Args:
        path (`str`): where it lies.
        kind (`str`): `plan` or `checkpoint`.
        model_type (`str`): the family.
        layers (`tuple[LayerWidths, ...]`): by layer; empty for families that are unknown here.
        parameters, bytes (`int`, *optional*): of the weights in the files.
        dense_parameters (`int`, *optional*): before pruning.
        dtypes (`tuple[str, ...]`): of the weights, the most frequent first.
        provenance (`dict[str, Any]`): recipe, ratio, versions and measurements, as far as they are known.
    """

    path: str
    kind: str
    model_type: str
    layers: tuple[LayerWidths, ...] = ()
    parameters: int | None = None
    bytes: int | None = None
    dense_parameters: int | None = None
    dtypes: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return json.loads(json.dumps(asdict(self)))

    @property
    def title(self) -> str:
        """One line: name, family, ratio and parameters."""
        parts = [f"{Path(self.path).resolve().name} ({self.model_type})"]
        if self.provenance.get("pruning_ratio") is not None:
            parts.append(f"pruning ratio {self.provenance['pruning_ratio']:.3f}")
        if self.parameters is not None:
            dense = "" if self.dense_parameters is None else f" of {_millions(self.dense_parameters)}"
            parts.append(f"{_millions(self.parameters)}{dense} parameters")
        return " · ".join(parts)

    def __str__(self) -> str:
        """The title, the layers and where it came from."""
        facts = [("recipe", "recipe"), ("units", "units"), ("plan", "plan"), ("version", "hf_adaprune")]
        lines = [self.title]
        if self.bytes is not None:
            lines.append(f"{size_text(self.bytes)} in {', '.join(self.dtypes)}")
        lines += [f"{label}: {self.provenance[key]}" for key, label in facts if self.provenance.get(key)]
        for source, pair in self.provenance.get("evaluation", {}).items():
            name, own = final_measure(pair)
            lines.append(f"perplexity on {source}: {pair['dense']['value']:.2f} dense, {own['value']:.2f} {name}")
        return "\n".join([*lines, "", layer_table(self.layers)] if self.layers else lines)


def final_measure(found: Mapping[str, Any]) -> tuple[str, Any]:
    """What a record calls the model that a checkpoint holds, and what was measured of it.

    Args:
        found (mapping): measurements of one text: `dense` and `pruned`, or `dense`, `before` and `recovered`.

    Returns:
        `tuple`: `recovered` or `pruned`, and the measurement.
    """
    name = "recovered" if "before" in found else "pruned"
    # Earlier versions wrote the recovered model's as `pruned`, beside `before`.
    return name, found[name] if name in found else found["pruned"]


def describe(path: str | os.PathLike[str]) -> Description:
    """Describe a plan file or a checkpoint folder.

    Raises:
        PlanError: the file is no plan.
        CheckpointError: the folder is no checkpoint, or nothing is there.
    """
    where = Path(path)
    if where.is_dir():
        return describe_checkpoint(where)
    if not where.is_file():
        raise CheckpointError(f"there is nothing at {where}. Name a plan (a JSON file) or a checkpoint (a folder).")
    try:
        plan = PruningPlan.load(where)
    except (PlanError, UnicodeDecodeError) as error:
        raise PlanError(f"{where} is no plan: {error} Name a plan (JSON) or a checkpoint (a folder).") from error
    return Description(str(where), "plan", plan.model_type, layer_widths(plan), provenance={"plan": plan.digest})


def describe_checkpoint(path: str | os.PathLike[str]) -> Description:
    """Describe a checkpoint from config.json, the headers of its weight files and, if any, pruning_config.json.

    Args:
        path (`str`): a folder with a checkpoint in safetensors.

    Raises:
        CheckpointError: no config.json, or a file that cannot be read.
    """
    try:
        return _describe_checkpoint(Path(path))
    except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError, IndexError) as error:
        if isinstance(error, AdaPruneError):
            raise
        raise CheckpointError(
            f"{path} is no checkpoint that can be described: its config, records or weight headers hold what nobody "
            f"writes there ({error!r}). Is it whole, and from a source that you trust?"
        ) from error


def _describe_checkpoint(folder: Path) -> Description:
    config = _json_object(folder / "config.json")
    tensors: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(_header(file))
    run = _json_object(folder / CONFIG_NAME) if (folder / CONFIG_NAME).is_file() else {}
    plan = PruningPlan.from_dict(run["plan"]) if run.get("plan") else None
    # JSON numbers multiply exactly; a scalar has the empty shape and one element.
    counts = {name: _product(entry["shape"]) for name, entry in tensors.items()}
    dtypes = Counter(entry["dtype"] for entry in tensors.values())
    return Description(
        str(folder),
        "checkpoint",
        str(config.get("model_type", "unknown")),
        _config_widths(config, counts, plan),
        sum(counts.values()) if tensors else None,
        sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in tensors.values()) if tensors else None,
        run.get("before", {}).get("total"),
        tuple(name for name, _ in dtypes.most_common()),
        _provenance(config, run),
    )


def _json_object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} is no checkpoint: it has no {path.name}. Name another folder.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Is the download complete?") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} should hold a JSON object. Found {type(data).__name__}.")
    return data


def _header(file: Path) -> dict[str, dict[str, Any]]:
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > file.stat().st_size:
                raise ValueError("the header is longer than the file")
            header = json.loads(stream.read(length))
        return {name: entry for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} is no safetensors file ({error}). Is the download complete?") from error


def _product(shape: Iterable[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _provenance(config: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    short = dict(config.get("adaprune") or {})
    short.pop("architecture", None)
    asked = run.get("config", {})
    long = {
        "recipe": asked.get("recipe_name"),
        "units": ", ".join(asked.get("units", ())),
        "pruning_ratio": run.get("pruning_ratio"),
        "plan": run.get("plan_digest"),
        "version": asked.get("version"),
        "evaluation": run.get("evaluation"),
    }
    return short | {name: value for name, value in long.items() if value}


def _config_widths(
    config: Mapping[str, Any], counts: Mapping[str, int], plan: PruningPlan | None
) -> tuple[LayerWidths, ...]:
    family = _family(config)
    if family is None or not isinstance(config.get(family.layers_field), int):
        return ()
    count = config[family.layers_field]
    if count > MOST_LAYERS:
        raise CheckpointError(
            f"config.json says {count:,} layers in `{family.layers_field}`, and {MOST_LAYERS:,} are the most that are "
            "pruned. Is the file whole, and from a source that you trust?"
        )
    known = plan is not None and plan.model_type == family.model_type and len(plan.kept_layers()) == count
    by_old = {row.layer: row for row in layer_widths(plan)} if plan is not None and known else {}
    numbers = plan.kept_layers() if plan is not None and known else tuple(range(count))
    prefix = re.compile(rf"(?:^|\.){re.escape(family.layers.rsplit('.', 1)[-1])}\.(\d+)\.(.*)")
    sizes: Counter[int] = Counter()
    sparse: set[int] = set()
    for name, numel in counts.items():
        if found := prefix.search(name):
            sizes[int(found[1])] += numel
            if ".experts." in f".{found[2]}":
                sparse.add(int(found[1]))
    rows = {old: row for old, row in by_old.items() if row.dropped}
    # transformers pads the keys with zeros: "03" in a model of more than ten layers.
    own = {int(number): sizes for number, sizes in (config.get("per_layer_config") or {}).items()}
    for layer, old in enumerate(numbers):
        pairs = _layer_pairs(config, family, own.get(layer, {}), layer in sparse)
        measured = by_old.get(old)
        if measured is not None:  # what a plan says of the dense model is surer than the config's global values
            for name, pair in pairs.items():
                dense = getattr(measured, name)
                pairs[name] = (pair[0], dense[1]) if dense is not None else pair
        rows[old] = replace(LayerWidths(old, after=sizes.get(layer)), **pairs)  # type: ignore[arg-type]
    return tuple(rows[old] for old in sorted(rows))


def _family(config: Mapping[str, Any]) -> Architecture | None:
    model_type = str(config.get("model_type"))
    return carried_architecture(config.get("adaprune"), model_type) or ARCHITECTURES.get(model_type)


def _layer_pairs(
    config: Mapping[str, Any], family: Architecture, own: Mapping[str, Any], sparse: bool
) -> dict[str, Pair]:
    skip = own.get("skip", ())

    def pair(*names: str, gone: bool) -> Pair | None:
        wide = next((config[name] for name in names if isinstance(config.get(name), int)), None)
        kept = 0 if gone else next((own[name] for name in names if name in own), wide)
        return None if wide is None or kept is None else (kept, wide)

    attention, mlp = "attention" in skip, "mlp" in skip
    found = {
        "heads": pair(family.heads_field, gone=attention),
        "groups": pair(*filter(None, (family.kv_heads_field,)), family.heads_field, gone=attention),
    }
    if sparse:
        found["experts"] = pair(family.experts_field, "num_local_experts", "num_experts", gone=mlp)
        found["channels"] = pair(family.expert_width_field, gone=mlp)
    elif family.width_field:
        found["channels"] = pair(family.width_field, gone=mlp)
    return {name: value for name, value in found.items() if value is not None}


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count >= 1e6 else f"{count:,}"
