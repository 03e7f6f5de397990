"""Architectures as JSON, in checkpoints of families that are not built in; checked, as a config.json may be anyone's.

What is read here names attributes of modules, fields of configs and a class, and is written into remote code: nothing
but such names, and plain values of the types that [`Architecture`] has, gets through.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from .architectures import ARCHITECTURES, Architecture, Attention, Experts, Mlp
from .errors import CheckpointError

__all__ = ["architecture_from_dict", "architecture_to_dict", "carried_architecture"]

logger = logging.getLogger(__name__)

Reader = Callable[[Any], Any]


def architecture_to_dict(architecture: Architecture) -> dict[str, Any]:
    """An architecture as JSON types, for checkpoints of a family that is not built in."""
    return json.loads(json.dumps(asdict(architecture)))  # tuples become lists, as they do in a checkpoint


def architecture_from_dict(data: Mapping[str, Any]) -> Architecture:
    """The architecture of [`architecture_to_dict`]'s mapping.

    Args:
        data (`dict[str, Any]`): of a checkpoint, whoever wrote it.

    Raises:
        TypeError, ValueError: a field is unknown, missing or of another type; a path is no path of attributes
            (`mlp.up_proj`, `mlp.0`), a name no name.
    """
    return _read(Architecture, _ARCHITECTURE, data)


def carried_architecture(provenance: Any, model_type: str) -> Architecture | None:
    """The architecture that a config brings for its own model type, where none is built in.

    One that a checkpoint of a built-in family brings is none of this package's making, and is not followed.

    Args:
        provenance (`dict[str, Any]`): what stands under `adaprune` in a config.json.
        model_type (`str`): of that config.

    Raises:
        CheckpointError: it describes no architecture.
    """
    carried = provenance.get("architecture") if isinstance(provenance, Mapping) else None
    if not carried:
        return None
    try:
        found = architecture_from_dict(carried)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"`adaprune.architecture` in config.json describes no architecture: {error}. Is the checkpoint whole, and "
            "from a source that you trust?"
        ) from error
    if model_type in ARCHITECTURES:
        if found != ARCHITECTURES[model_type]:
            _tell_ignored(model_type)
        return None
    return found if found.model_type == model_type else None


@functools.cache
def _tell_ignored(model_type: str) -> None:
    logger.warning("a config.json brings an architecture for %s, which is built in: it is not followed.", model_type)


def _read(kind: type, readers: Mapping[str, Reader], data: Any) -> Any:
    if not isinstance(data, Mapping):
        raise TypeError(f"{kind.__name__} should be an object. Found {type(data).__name__}")
    unknown = sorted(set(data) - set(readers))
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {_short(unknown[0])}")
    values = {}
    for name, value in data.items():
        try:
            values[name] = readers[name](value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error
    return kind(**values)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _matching(pattern: str, what: str) -> Reader:
    whole = re.compile(pattern, re.ASCII)

    def read(value: Any) -> str:
        if not isinstance(value, str) or not whole.fullmatch(value):
            raise ValueError(f"{_short(value)} is no {what}")
        return value

    return read


def _several(read: Reader) -> Reader:
    def read_all(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{_short(value)} is no list")
        return tuple(read(entry) for entry in value)

    return read_all


def _pair(first: Reader, second: Reader) -> Reader:
    def read(value: Any) -> tuple[Any, Any]:
        if not isinstance(value, (list, tuple)) or len(value) != 2:
            raise TypeError(f"{_short(value)} is no pair")
        return first(value[0]), second(value[1])

    return read


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{_short(value)} is neither true nor false")
    return value


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 64:
        raise ValueError(f"{_short(value)} is no number from 1 to 64")
    return value


def _plain(value: Any) -> Any:
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise TypeError(f"{_short(value)} is no plain value")
    return value


def _words(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable() or len(value) > 500:
        raise ValueError(f"{_short(value)} is no line of text")
    return value


_PART = r"(?!__)\w+"  # of a path; a number is a place in a list of modules
_path = _matching(rf"({_PART}(\.{_PART})*)?", "path of attributes")
_field = _matching(r"([A-Za-z]\w*)?", "field of a config")

_ATTENTION = {**dict.fromkeys(("module", "query", "key", "value", "output"), _path), "refuse_heads": _words}
_MLP = {"module": _path, "up": _several(_path), "down": _path, "fused": _count}
_EXPERTS = dict.fromkeys(("module", "experts", "gate_up", "down", "router"), _path)
_ARCHITECTURE: dict[str, Reader] = {
    "model_type": _matching(r"(?!_)\w[\w.-]*", "model type"),
    "layer_class": _matching(r"(?!__)[A-Za-z_]\w*", "name of a class"),
    "layers": _matching(rf"{_PART}(\.{_PART})*", "path of attributes"),
    "attention": lambda value: _read(Attention, _ATTENTION, value),
    "mlp": lambda value: _read(Mlp, _MLP, value),
    "experts": lambda value: None if value is None else _read(Experts, _EXPERTS, value),
    **dict.fromkeys(("heads_field", "kv_heads_field", "width_field", "experts_field", "expert_width_field"), _field),
    "layers_field": _matching(r"[A-Za-z]\w*", "field of a config"),
    **dict.fromkeys(("explicit_head_dim", "heads_must_divide_hidden", "heads_read_globally"), _flag),
    "layer_lists": _several(_field),
    "layer_index_lists": _several(_field),
    "removed_attention": _pair(_field, _plain),
    "layer_refusals": _several(_pair(_field, _words)),
}
