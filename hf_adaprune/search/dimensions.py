"""What one field of a config may vary over: a number, several, weights that add up to 1, or a choice.

A strategy sees coordinates, a config values; every kind says how the one becomes the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Choice", "Dimension", "Number", "Simplex", "Vector"]

# Where spread matters more than precision: 1e-6 of a weight changes no ranking.
_DIGITS = 6
SMALLEST_WEIGHT = 1e-4


@dataclass(frozen=True)
class Number:
    """A number between two others.

    Args:
        path (`str`): field of the config.
        low, high (`float`): its range.
        default (`float`): its value in trial 0.
        log (`bool`): varied by its logarithm.
        whole (`bool`): a whole number.
    """

    path: str
    low: float
    high: float
    default: Any
    log: bool = False
    whole: bool = False

    @property
    def width(self) -> int:
        """Coordinates."""
        return 1

    @property
    def freedom(self) -> int:
        """Degrees of freedom."""
        return 1

    def bounds(self) -> list[tuple[float, float]]:
        """Range of every coordinate."""
        return [(self._scaled(self.low), self._scaled(self.high))]

    def encode(self, value: Any) -> list[float]:
        """Coordinates of a value."""
        return [self._scaled(min(max(float(value), self.low), self.high))]

    def decode(self, coordinates: Sequence[float]) -> Any:
        """The value at coordinates."""
        value = math.exp(coordinates[0]) if self.log else coordinates[0]
        value = min(max(value, self.low), self.high)
        if self.whole:
            return round(value)
        return min(max(float(f"{value:.{_DIGITS}g}"), self.low), self.high)

    def _scaled(self, value: float) -> float:
        return math.log(value) if self.log else float(value)


@dataclass(frozen=True)
class Vector:
    """Several numbers of one range, such as control points.

    Args:
        path (`str`): field of the config.
        low, high (`float`): the range of each.
        default (`tuple[float, ...]`): the values in trial 0.
        centred (`bool`): their sum stays 0, where a common shift would change nothing.
    """

    path: str
    low: float
    high: float
    default: tuple[float, ...]
    centred: bool = False

    @property
    def width(self) -> int:
        """Coordinates."""
        return len(self.default)

    @property
    def freedom(self) -> int:
        """Degrees of freedom."""
        return self.width - self.centred

    def bounds(self) -> list[tuple[float, float]]:
        """Range of every coordinate."""
        return [(float(self.low), float(self.high))] * self.width

    def encode(self, value: Any) -> list[float]:
        """Coordinates of a value; no values are zeros."""
        return self._settled([float(entry) for entry in value] or [0.0] * self.width)

    def decode(self, coordinates: Sequence[float]) -> Any:
        """The value at coordinates."""
        return tuple(round(entry, _DIGITS) for entry in self._settled(coordinates))

    def _settled(self, values: Sequence[float]) -> list[float]:
        """Values brought into the range; of a centred vector by a shift and, where that does not do, by shrinking."""
        if not self.centred:
            return [min(max(entry, self.low), self.high) for entry in values]
        mean = sum(values) / len(values)
        shifted = [entry - mean for entry in values]
        reach = max(entry / (self.high if entry > 0 else self.low) for entry in shifted)
        return [entry / reach for entry in shifted] if reach > 1 + 1e-5 else shifted  # not for a rounded last digit


@dataclass(frozen=True)
class Simplex:
    """Weights that add up to 1.

    Args:
        path (`str`): field of the config.
        members (`tuple[str, ...]`): what is weighted.
        default (`tuple[float, ...]`): the weights in trial 0.
        named (`bool`): the field is a mapping from members to weights; else a list of weights.
        kept (`float`, *optional*, defaults to 0.0): share of the default that every point keeps: no weight falls below
            that share of its default.
    """

    path: str
    members: tuple[str, ...]
    default: tuple[float, ...]
    named: bool = False
    kept: float = 0.0

    @property
    def width(self) -> int:
        """Coordinates."""
        return len(self.members)

    @property
    def freedom(self) -> int:
        """Degrees of freedom."""
        return self.width - 1

    def bounds(self) -> list[tuple[float, float]]:
        """Range of every coordinate."""
        return [(0.0, 1.0)] * self.width

    def encode(self, value: Any) -> list[float]:
        """Coordinates of a value: its weights, as far as they go beyond what is kept."""
        weights = self.weights(value)
        if not self.kept or len(weights) != self.width:
            return weights
        own = zip(weights, _scaled(self.default), strict=True)
        return _scaled([max((weight - self.kept * base) / (1 - self.kept), 0.0) for weight, base in own])

    def weights(self, value: Any) -> list[float]:
        """Weights of a value in the order of the members, scaled to add up to 1; none are equal ones."""
        if isinstance(value, Mapping):
            return _scaled([float(value.get(member, 0.0)) for member in self.members])
        return _scaled([float(weight) for weight in value])

    def decode(self, coordinates: Sequence[float]) -> Any:
        """The value at coordinates."""
        shares = _scaled([max(entry, 0.0) for entry in coordinates])
        # What an optimiser leaves at 1e-9 is zero: a metric at weight zero need not be computed.
        shares = _scaled([share if share > 0.99 * SMALLEST_WEIGHT else 0.0 for share in shares])
        parts = [round(share / sum(shares) * 10**_DIGITS) for share in shares]
        # The largest takes what rounding left, so that weights add up to 1 and come back the same.
        parts[parts.index(max(parts))] += 10**_DIGITS - sum(parts)
        weights = [part / 10**_DIGITS for part in parts]
        if self.kept:
            own = zip(weights, _scaled(self.default), strict=True)
            weights = [self.kept * base + (1 - self.kept) * weight for weight, base in own]
        return dict(zip(self.members, weights, strict=True)) if self.named else tuple(weights)


def _scaled(weights: Sequence[float]) -> list[float]:
    """Weights that add up to 1; equal ones where all are 0."""
    total = sum(weights)
    return [weight / total for weight in weights] if total > 0 else [1 / len(weights)] * len(weights)


@dataclass(frozen=True)
class Choice:
    """One of several values; one coordinate for each, of which one is 1.

    Args:
        path (`str`): field of the config.
        values (`tuple`): to choose from.
        default: the value in trial 0.
    """

    path: str
    values: tuple[Any, ...]
    default: Any

    @property
    def width(self) -> int:
        """Coordinates."""
        return len(self.values)

    @property
    def freedom(self) -> int:
        """Degrees of freedom."""
        return 1

    def bounds(self) -> list[tuple[float, float]]:
        """Range of every coordinate."""
        return [(0.0, 1.0)] * self.width

    def encode(self, value: Any) -> list[float]:
        """Coordinates of a value."""
        return [float(entry == value) for entry in self.values]

    def decode(self, coordinates: Sequence[float]) -> Any:
        """The value at coordinates."""
        return self.values[max(range(self.width), key=lambda index: coordinates[index])]


Dimension = Number | Vector | Simplex | Choice
