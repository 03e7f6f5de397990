"""What a search varies, as data: named dimensions over fields of `PruningConfig`, and points in them.

A point is a flat mapping from field paths to JSON values, so that a point laid over a config is a config. Strategies
see it as a vector; mixtures are simplices, told to optimisers as linear equalities.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch

from ..config import PruningConfig
from ..errors import ConfigError
from ..fields import check_whole
from ..parts import REACH
from ..search_config import REFINING
from .dimensions import Choice, Dimension, Number, Simplex, Vector

__all__ = ["Point", "Space", "apply_fields", "default_space", "field_of"]

Point = dict[str, Any]
DEFAULT_LIMIT = 20


@dataclass(frozen=True)
class Space:
    """Dimensions in a fixed order, and fields that every point sets alike.

    Args:
        dimensions (`tuple[Dimension, ...]`): what varies.
        fixed (`dict[str, Any]`, *optional*): values by field path that no trial changes, trial 0 included.
    """

    dimensions: tuple[Dimension, ...]
    fixed: Mapping[str, Any]

    @property
    def width(self) -> int:
        """Coordinates of a point."""
        return sum(dimension.width for dimension in self.dimensions)

    @property
    def freedom(self) -> int:
        """Degrees of freedom."""
        return sum(dimension.freedom for dimension in self.dimensions)

    @property
    def default(self) -> Point:
        """The point of trial 0."""
        return {dimension.path: dimension.decode(dimension.encode(dimension.default)) for dimension in self.dimensions}

    def spans(self) -> Iterator[tuple[Dimension, slice]]:
        """Dimensions and where their coordinates lie."""
        start = 0
        for dimension in self.dimensions:
            yield dimension, slice(start, start + dimension.width)
            start += dimension.width

    def names(self) -> list[str]:
        """One name per coordinate, such as `importance.metrics.fisher` or `allocation.profile.2`."""
        found = []
        for dimension in self.dimensions:
            if isinstance(dimension, Number):
                found.append(dimension.path)
            elif isinstance(dimension, Vector):
                found += [f"{dimension.path}.{index}" for index in range(dimension.width)]
            else:
                parts = dimension.members if isinstance(dimension, Simplex) else dimension.values
                found += [f"{dimension.path}.{part}" for part in parts]
        return found

    def bounds(self) -> torch.Tensor:
        """Ranges of the coordinates, `[2, width]`, float64."""
        pairs = [pair for dimension in self.dimensions for pair in dimension.bounds()]
        return torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2).T

    def equalities(self) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
        """Linear equalities `(indices, coefficients, right side)` as BoTorch takes them: simplices, centred vectors."""
        found = []
        for dimension, span in self.spans():
            right = 1.0 if isinstance(dimension, Simplex) else 0.0
            if isinstance(dimension, Simplex) or (isinstance(dimension, Vector) and dimension.centred):
                index = torch.arange(span.start, span.stop)
                found.append((index, torch.ones(len(index), dtype=torch.float64), right))
        return found

    def alternatives(self) -> list[dict[int, float]]:
        """Every combination of the choices as fixed coordinates; one empty one where there are no choices."""
        found: list[dict[int, float]] = [{}]
        for dimension, span in self.spans():
            if isinstance(dimension, Choice):
                one_hot = [
                    {span.start + index: float(index == chosen) for index in range(dimension.width)}
                    for chosen in range(dimension.width)
                ]
                found = [{**before, **own} for before in found for own in one_hot]
        return found

    def holds(self, point: Mapping[str, Any]) -> bool:
        """Whether a point has every dimension in its width; one of another space, as a warm start may be, need not."""
        return all(
            dimension.path in point and len(dimension.encode(point[dimension.path])) == dimension.width
            for dimension in self.dimensions
        )

    def encode(self, point: Mapping[str, Any]) -> torch.Tensor:
        """A point as coordinates `[width]`, float64.

        Raises:
            ConfigError: the point lacks a dimension, or has one of another width.
        """
        if not self.holds(point):
            raise ConfigError(
                f"a point of another search space: it should have {', '.join(d.path for d in self.dimensions)}, each "
                f"as wide as here. Found {dict(point)}."
            )
        parts = [entry for dimension in self.dimensions for entry in dimension.encode(point[dimension.path])]
        return torch.tensor(parts, dtype=torch.float64)

    def decode(self, coordinates: torch.Tensor) -> Point:
        """The point at coordinates; rounded, so that it is the same after a trip through JSON."""
        values = coordinates.tolist()
        return {dimension.path: dimension.decode(values[span]) for dimension, span in self.spans()}

    def from_cube(self, cube: torch.Tensor) -> Point:
        """The point of a draw from the unit cube `[width]`: simplices become uniform (flat Dirichlet)."""
        coordinates: list[float] = []
        draws = cube.double().clamp(1e-9, 1 - 1e-9).tolist()
        for dimension, span in self.spans():
            own = draws[span]
            if isinstance(dimension, Simplex):
                exponentials = [-math.log(draw) for draw in own]
                coordinates += [entry / sum(exponentials) for entry in exponentials]
            elif isinstance(dimension, Choice):
                coordinates += dimension.encode(dimension.values[own.index(max(own))])
            else:
                coordinates += [
                    low + draw * (high - low) for draw, (low, high) in zip(own, dimension.bounds(), strict=True)
                ]
        return self.decode(torch.tensor(coordinates, dtype=torch.float64))

    def apply(self, config: PruningConfig, point: Mapping[str, Any]) -> PruningConfig:
        """The config that a point stands for. Fields that the space does not know, such as ratios, are taken too.

        What is fixed stays, whatever the point says of it.
        """
        return apply_fields(config, {**point, **self.fixed})

    def to_dict(self) -> dict[str, Any]:
        """The space as JSON types."""
        dimensions = {d.path: {"kind": type(d).__name__.lower(), **_plain(vars(d))} for d in self.dimensions}
        return {"dimensions": dimensions, "fixed": _plain(self.fixed)}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items() if key != "path"}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def apply_fields(config: PruningConfig, values: Mapping[str, Any]) -> PruningConfig:
    """A config with fields changed by path (`repair.damping`).

    Raises:
        ConfigError: no such field, or a value out of range.
    """
    changes: dict[str, Any] = {}
    for path, value in values.items():
        value = _frozen(value)
        part, _, name = path.partition(".")
        changes[part] = {**changes.get(part, {}), name: value} if name else value
    repair = changes.get("repair", {})
    if repair.get("method", "least_squares") != "least_squares":
        # The config's schedule is of least squares, and a point without them has none.
        changes["repair"] = {"schedule": "cached", **repair}
    return config.with_changes(**changes)


def field_of(config: PruningConfig, path: str) -> Any:
    """The value of a field by path.

    Raises:
        ConfigError: no such field.
    """
    value: Any = config
    for name in path.split("."):
        if name.startswith("_") or not hasattr(value, name) or name not in getattr(value, "__dataclass_fields__", {}):
            raise ConfigError(
                f"`search.space` names {path!r}, which is no field of PruningConfig. Write part and field, such as "
                "repair.damping."
            )
        value = getattr(value, name)
    if is_dataclass(value) or path.partition(".")[0] == "search":
        raise ConfigError(
            f"`search.space` names {path!r}, which no trial can vary. Write part and field, such as repair.damping."
        )
    return value


# -- the default space ------------------------------------------------------------------------------------------------

# Beside the config's own metrics. All are sums over samples or cheap from them, and positive, so that any mixes.
METRICS = ("fisher", "obs_gradient_greedy", "first_order", "wanda_sp")
PROFILE_POINTS = 5
# A factor of 7 on scores at either end: beyond it whole stretches of layers would stay or go.
PROFILE_REACH, BALANCE_REACH = 2.0, 1.5
DAMPING = (3e-4, 0.3)
PARETO_RATIOS = (0.05, 0.5)
# Of the domain weights. Left free, they went to the sources that selection text is like, and text like the others paid
# (SmolLM2-135M, 40 %: a quarter to a half of its perplexity, for 1 to 4 % on the selection's kind).
KEPT = 0.5


def default_space(config: PruningConfig, domains: Sequence[str], shares: Sequence[float] = ()) -> Space:
    """The space around a config, with its own `search.space` applied.

    Weights over domains (where there are several; each keeps half of its own), over metrics, their normalisation (where
    the config mixes metrics), a depth profile of five control points, the balance of attention against MLPs, and the
    damping of least squares; with `search.pareto` also the pruning ratio. The config itself is the default point.

    Args:
        config ([`PruningConfig`]): where the search starts.
        domains (`Sequence[str]`): calibration domains.
        shares (`Sequence[float]`, *optional*): their shares of the windows, which are the weights of a config that
            names none; equal where not given.

    Raises:
        ConfigError: an unknown field, or a specification that is none; more than 20 dimensions by default.
    """
    if len(domains) > 1 and len(shares) == len(domains) and not config.calibration.domain_weights:
        config = config.with_changes(calibration={"domain_weights": tuple(shares)})
    dimensions: dict[str, Dimension] = {}
    if len(domains) > 1:
        weights = config.calibration.domain_weights or (1.0,) * len(domains)
        dimensions["calibration.domain_weights"] = Simplex(
            "calibration.domain_weights", tuple(domains), weights, kept=KEPT
        )
    own = config.importance
    if own.normalization in ("log", "mean"):
        members = tuple(dict.fromkeys((*own.metrics, *METRICS)))
        weights = tuple(own.metrics.get(name, 0.0) for name in members)
        dimensions["importance.metrics"] = Simplex("importance.metrics", members, weights, named=True)
        dimensions["importance.normalization"] = Choice("importance.normalization", ("log", "mean"), own.normalization)
    if config.allocation.method in ("global", "profile") and not config.uniform:
        points = config.allocation.profile or (0.0,) * PROFILE_POINTS
        # The config itself is trial 0, so the ranges reach to where it stands.
        reach = max([PROFILE_REACH, *(abs(entry - sum(points) / len(points)) for entry in points)])
        if reach > REACH:
            raise ConfigError(
                f"`allocation.profile` is searched around its mean, at most {REACH:g} from it. Found an entry "
                f"{reach:g} away; bring its entries closer together."
            )
        dimensions["allocation.profile"] = Vector("allocation.profile", -reach, reach, points, True)
        if {"channel", "mlp"} & set(config.units) and {"kv_group", "query_head", "attention"} & set(config.units):
            balance = config.allocation.attention_balance
            reach = max(BALANCE_REACH, abs(balance))
            dimensions["allocation.attention_balance"] = Number("allocation.attention_balance", -reach, reach, balance)
    if config.repair.method == "least_squares":
        low, high = DAMPING
        damping = config.repair.damping
        low, high = min(low, damping) or 1e-6, max(high, damping)
        dimensions["repair.damping"] = Number("repair.damping", low, high, damping, log=True)
    search = config.search
    if search is not None and search.pareto is not None:
        low, high = PARETO_RATIOS
        ratio = config.pruning_ratio
        dimensions["pruning_ratio"] = Number("pruning_ratio", min(low, ratio), max(high, ratio), ratio)
    space = Space(tuple(dimensions.values()), {})
    changes = dict(search.space) if search is not None else {}
    for path, given in changes.items():
        space = _changed(space, config, path, given, domains)
    refining = search is not None and all(name in REFINING for name, _ in search.shares())
    if not space.dimensions and not refining:
        raise ConfigError("nothing is left to search: every dimension is fixed. Free one in `search.space`.")
    if space.freedom > DEFAULT_LIMIT and not changes:
        raise ConfigError(
            f"the search space has {space.freedom} dimensions, more than {DEFAULT_LIMIT}. Fix some in `search.space` "
            "(calibration.domain_weights has one per source), or name those to vary there; `search.surrogate='saas'` "
            "copes with many."
        )
    _check(space, config)
    return space


_SHARING = ("allocation.profile", "allocation.attention_balance", "allocation.ratios")
_SPECIFICATION = {"low", "high", "log", "whole", "size", "centred", "choices", "simplex", "kept"}


def _changed(space: Space, config: PruningConfig, path: str, given: Any, domains: Sequence[str]) -> Space:
    current = field_of(config, path)
    others = tuple(dimension for dimension in space.dimensions if dimension.path != path)
    known = next((dimension for dimension in space.dimensions if dimension.path == path), None)
    position = space.dimensions.index(known) if known is not None else len(others)
    if not (isinstance(given, Mapping) and set(given) <= _SPECIFICATION):
        return Space(others, {**space.fixed, path: given})
    dimension = _dimension(path, dict(given), current, known, domains)
    return Space((*others[:position], dimension, *others[position:]), space.fixed)


def _dimension(
    path: str, given: dict[str, Any], current: Any, known: Dimension | None, domains: Sequence[str]
) -> Dimension:
    if "choices" in given:
        return _choice(path, given, current)
    if "simplex" in given or "kept" in given:
        members = known.members if isinstance(known, Simplex) else True
        own = _simplex(path, {"simplex": members, **given}, current, domains)
        # The weights of a config that names none are those of the known dimension.
        return (
            replace(own, default=known.default) if isinstance(known, Simplex) and known.members == own.members else own
        )
    if isinstance(known, (Number, Vector)) and not given.get("size"):
        ranges = ("low", "high", "log", "whole", "centred")
        ranged: dict[str, Any] = {name: value for name, value in vars(known).items() if name in ranges}
        given = {**ranged, **given, "size": known.width if isinstance(known, Vector) else None}
    low: Any = given.get("low")
    high: Any = given.get("high")
    size: Any = given.get("size")
    if not (_is_number(low) and _is_number(high) and -math.inf < low < high < math.inf):
        raise ConfigError(
            f"`search.space[{path!r}]` should be a value (fixes the field), or a mapping with `low` < `high`, "
            f"`choices` or `simplex`. Found {given!r}."
        )
    if given.get("log") and low <= 0:
        raise ConfigError(f"`search.space[{path!r}]` is logarithmic; `low` should be above 0. Found {low:g}.")
    if size is not None:
        check_whole(f"search.space[{path!r}].size", size, 1, what="values of the vector")
        if given.get("log") or given.get("whole"):
            raise ConfigError(f"`search.space[{path!r}]` is a vector, which cannot be `log` or `whole`.")
        if given.get("centred") and not low < 0 < high:
            raise ConfigError(
                f"`search.space[{path!r}]` is centred, so its sum is 0: `low` should be below 0 and `high` above. "
                f"Found {low:g} and {high:g}."
            )
        values = tuple(current) if isinstance(current, (list, tuple)) else ()
        default = values if len(values) == size else (0.0,) * size
        return Vector(path, float(low), float(high), default, bool(given.get("centred")))
    if given.get("centred"):
        raise ConfigError(f"`search.space[{path!r}]` is one number, which cannot be `centred`. Give a `size`.")
    if current is not None and not _is_number(current):
        raise ConfigError(
            f"`search.space[{path!r}]` ranges over numbers, but the field holds {current!r}. Give `choices`, or a "
            "`size` for a list of numbers."
        )
    if known is not None and current is not None:
        current = min(max(current, low), high)  # as near to the config as the range allows
    if current is None or not low <= current <= high:
        current = math.sqrt(low * high) if given.get("log") else (low + high) / 2
    return Number(path, float(low), float(high), current, bool(given.get("log")), bool(given.get("whole")))


def _choice(path: str, given: Mapping[str, Any], current: Any) -> Choice:
    values = tuple(_frozen(value) for value in given["choices"])
    if len(values) < 2 or any(value in values[:index] for index, value in enumerate(values)):
        raise ConfigError(
            f"`search.space[{path!r}]` should name two or more `choices`, each once. Found {list(values)}."
        )
    return Choice(path, values, current if current in values else values[0])


def _simplex(path: str, given: Mapping[str, Any], current: Any, domains: Sequence[str]) -> Simplex:
    named = isinstance(current, Mapping)
    if not named and not isinstance(current, (list, tuple)):
        raise ConfigError(f"`search.space[{path!r}]` is no field of weights, so it cannot be a `simplex`.")
    members = given["simplex"]
    members = (tuple(current) if named else tuple(domains)) if members is True else tuple(members)
    if len(set(members)) < 2 or len(set(members)) < len(members):
        raise ConfigError(
            f"`search.space[{path!r}]` should weight two things or more, each named once. Found {list(members)}."
        )
    if not named and current and len(current) != len(members):
        raise ConfigError(f"`search.space[{path!r}]` names {len(members)} weights, the config has {len(current)}.")
    default = tuple(current.get(member, 0.0) for member in members) if named else tuple(current)
    kept = given.get("kept", 0.0)
    if not (_is_number(kept) and 0 <= kept < 1):
        raise ConfigError(
            f"`search.space[{path!r}].kept` should be a share of the config's own weights in [0, 1). Found {kept!r}."
        )
    return Simplex(path, members, default or (1.0,) * len(members), named, float(kept))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _any(value: Any) -> bool:
    """Whether a fixed value is other than zero, or zeros."""
    return any(value.values() if isinstance(value, Mapping) else value) if hasattr(value, "__iter__") else bool(value)


def _check(space: Space, config: PruningConfig) -> None:
    """Every corner that one dimension alone can reach is a valid config; told before any trial."""
    varied = {dimension.path for dimension in space.dimensions} | {
        name for name, own in space.fixed.items() if _any(own)
    }
    varied &= set(_SHARING)
    if config.uniform and varied and set(config.units) != {"layer"}:
        raise ConfigError(
            f"`uniform=True` means equal layers, which {sorted(varied)[0]!r} of `search.space` contradicts. Leave out "
            "one of them."
        )
    default = space.default
    try:
        space.apply(config, default)
    except TypeError as error:
        raise ConfigError(f"`search.space` gives a field a value of the wrong type: {error}.") from error
    for dimension in space.dimensions:
        ends: list[Any] = []
        if isinstance(dimension, Number):
            ends = [dimension.low, dimension.high]
            ends = [round(end) for end in ends] if dimension.whole else ends
        elif isinstance(dimension, Choice):
            ends = list(dimension.values)
        elif isinstance(dimension, Vector):
            low, high, others = dimension.low, dimension.high, dimension.width - 1
            corners = ((low, low), (high, high), (low, high), (high, low))
            ends = [dimension.decode([first, *[other] * others]) for first, other in corners]
        for end in ends:
            space.apply(config, {**default, dimension.path: end})
