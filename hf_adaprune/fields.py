"""What the fields of a config may hold: types by their annotations, and ranges; refused with the field's name.

A config may come from a JSON file that somebody wrote by hand, where `"false"` is a string that Python takes for true.
"""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from typing import Any

from .errors import ConfigError

__all__ = ["as_part", "check_choice", "check_number", "check_seed", "check_types", "check_whole"]


def check_types(config: Any, prefix: str = "") -> None:
    """Refuse values of other types than a config's fields are annotated with; called by its `__post_init__`.

    Lists and single values become tuples where a field is one, and mappings become the dataclass that a field is.
    Single numbers are left to [`check_number`] and [`check_whole`], which know their ranges.

    Args:
        config (dataclass): frozen; its fields are set anew.
        prefix (`str`, *optional*): of the fields in messages, such as `repair.`.

    Raises:
        ConfigError: naming the field, what it should be and what was found.
    """
    own: Any = type(config)
    kinds = _annotations(own)
    for field in fields(config):
        value = _typed(f"{prefix}{field.name}", getattr(config, field.name), kinds[field.name])
        object.__setattr__(config, field.name, value)


@functools.cache
def _annotations(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _typed(name: str, value: Any, kind: Any) -> Any:
    """A value as the type of its field; see [`check_types`]."""
    options = typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
    if value is None and type(None) in options:
        return None
    (first, *others) = [option for option in options if option is not type(None)]
    if others:  # a source, which its part checks
        return value
    origin = typing.get_origin(first) or first
    if origin is tuple:
        return _as_tuple(name, value, typing.get_args(first)[0])
    if origin is Mapping:
        return _as_mapping(name, value, typing.get_args(first)[1])
    if is_dataclass(first):
        return as_part(name, value, first)
    if origin in (bool, str) and not isinstance(value, origin):
        raise ConfigError(f"`{name}` should be {'true or false' if origin is bool else 'a text'}. Found {value!r}.")
    return value


def _as_tuple(name: str, value: Any, kind: Any) -> tuple[Any, ...]:
    if kind not in (str, int, float):
        return value  # sources, which their part checks
    what = {str: "texts", int: "whole numbers", float: "numbers"}[kind]
    given = value.tolist() if hasattr(value, "tolist") else value  # of arrays and tensors
    entries = tuple(given) if isinstance(given, Iterable) and not isinstance(given, (str, bytes)) else (given,)
    if isinstance(given, Mapping) or not all(_is_a(entry, kind) for entry in entries):
        raise ConfigError(f"`{name}` should be a list of {what}. Found {value!r}.")
    try:
        return tuple(entry if kind is str else kind(entry) for entry in entries)
    except OverflowError as error:
        raise ConfigError(f"`{name}` should be a list of {what} that a float can hold.") from error


def _as_mapping(name: str, value: Any, kind: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"`{name}` should be a mapping of names. Found {value!r}.")
    for key, entry in value.items():
        if not isinstance(key, str):
            raise ConfigError(f"`{name}` should be a mapping of names. Found the key {key!r}.")
        if kind is float and not _is_a(entry, float):
            raise ConfigError(f"`{name}[{key!r}]` should be a number. Found {entry!r}.")
    return value


def as_part(name: str, value: Any, kind: Any) -> Any:
    """A dataclass of settings as a caller gave it: itself, or a mapping of its fields.

    Args:
        name (`str`): of the field or argument, for the message.
        value (`Any`): what was passed.
        kind (`type`): the dataclass.

    Raises:
        ConfigError: it is neither, or names a field that there is not.
    """
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"`{name}` should be a mapping of fields or a {kind.__name__}. Found {value!r}.")
    known = [field.name for field in fields(kind)]
    unknown = sorted(str(key) for key in value if key not in known)
    if unknown:
        raise ConfigError(f"`{name}` has no field {', '.join(unknown)}. It has: {', '.join(known)}.")
    return kind(**value)


def _is_a(value: Any, kind: type) -> bool:
    """Whether a value is of a type; whole numbers are numbers, `True` and `False` are none."""
    if kind is str:
        return isinstance(value, str)
    return isinstance(value, Real if kind is float else Integral) and not isinstance(value, bool)


def check_choice(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Refuse a value that is none of those allowed.

    Raises:
        ConfigError: naming the field, what is allowed and what was found.
    """
    allowed = tuple(allowed)
    if value not in allowed:
        raise ConfigError(f"`{name}` should be one of {', '.join(allowed)}. Found {value!r}.")


def check_number(name: str, value: Any, low: float, high: float, *, what: str, open_high: bool = False) -> None:
    """Refuse what is no number in `[low, high]`, or in `[low, high)` with `open_high`.

    Args:
        name (`str`): the field.
        value (`Any`): what was given; `True` and `False` are no numbers.
        low (`float`): the least allowed.
        high (`float`): the end of the range.
        what (`str`): what the number means, for the message.
        open_high (`bool`, *optional*, defaults to `False`): `high` itself is not allowed.

    Raises:
        ConfigError: naming the field, its range and what was found.
    """
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    good = good and low <= value and (value < high if open_high else value <= high)
    if not good:
        bracket = ")" if open_high else "]"
        raise ConfigError(f"`{name}` should be in [{low:g}, {high:g}{bracket}: {what}. Found {value!r}.")


def check_whole(name: str, value: Any, low: int, *, what: str) -> None:
    """Refuse what is no whole number of at least `low`; `what` says in the message what it means.

    Raises:
        ConfigError: naming the field, the least allowed and what was found.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ConfigError(f"`{name}` should be a whole number of at least {low}: {what}. Found {value!r}.")


def check_seed(value: Any) -> None:
    """Refuse a seed that not every generator takes: those of NumPy, and so scikit-learn's, have 32 bits.

    Raises:
        ConfigError: no whole number, or none from 0 to 2**32 - 1.
    """
    check_whole("seed", value, 0, what="the seed of everything drawn at random")
    if value >= 2**32:
        raise ConfigError(f"`seed` should be below 2**32, the most that all generators take. Found {value}.")
