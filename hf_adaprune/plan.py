"""The plan: which units of every site stay. Frozen, JSON, hashable; imports no torch.

A site with `groups` groups of `group_size` units numbers them `group * group_size + position`. An MLP is one group of
channels; attention has one group of query heads per KV head; experts have one group of channels per expert. Groups that
stay must keep the same number of units, because one tensor holds them all. A site that keeps nothing is a removed
sublayer.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from .errors import PlanError
from .whole_files import write_whole

__all__ = ["PruningPlan", "SitePlan", "site_name"]

PLAN_FORMAT = 1
KINDS = ("attention", "mlp", "experts")
# Far above any model; a file that claims more is refused before memory is spent on it.
MOST_UNITS, MOST_LAYERS = 2**22, 2**14


def site_name(layer: int, kind: str) -> str:
    """The name of a site: `layers.3.mlp`."""
    return f"layers.{layer}.{kind}"


@dataclass(frozen=True)
class SitePlan:
    """What stays of one site.

    Args:
        groups (`int`): KV heads of an attention, experts of a mixture, 1 for an MLP.
        group_size (`int`): query heads per KV head, channels per expert, channels of an MLP.
        kept (`tuple[int, ...]`): units that stay, ascending.

    Raises:
        PlanError: units out of range, out of order, or unequal numbers of them in the groups that stay.
    """

    groups: int
    group_size: int
    kept: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check range, order and equal groups."""
        if self.groups < 1 or self.group_size < 1:
            raise PlanError(f"a site has at least one group of one unit. Found {self.groups} x {self.group_size}.")
        if self.units > MOST_UNITS:
            raise PlanError(
                f"a site should have at most {MOST_UNITS:,} units. Found {self.groups} x {self.group_size}."
            )
        kept = tuple(int(unit) for unit in self.kept)
        object.__setattr__(self, "kept", kept)
        if any(a >= b for a, b in pairwise(kept)):
            raise PlanError("kept units should be ascending without repeats.")
        if kept and not (kept[0] >= 0 and kept[-1] < self.units):
            raise PlanError(f"kept units should be in [0, {self.units}). Found {kept[0]} to {kept[-1]}.")
        counts: dict[int, int] = {}
        for unit in kept:
            counts[unit // self.group_size] = counts.get(unit // self.group_size, 0) + 1
        if len(set(counts.values())) > 1:
            raise PlanError(
                "every group that stays should keep the same number of units (query heads per KV head, channels per "
                f"expert), or the checkpoint could not be stored. Found {sorted(set(counts.values()))}."
            )

    @classmethod
    def whole(cls, groups: int, group_size: int) -> SitePlan:
        """A site that keeps everything."""
        return cls(groups, group_size, tuple(range(groups * group_size)))

    @property
    def units(self) -> int:
        """Units before pruning."""
        return self.groups * self.group_size

    @property
    def kept_groups(self) -> tuple[int, ...]:
        """Groups that stay, ascending."""
        return tuple(sorted({unit // self.group_size for unit in self.kept}))

    @property
    def kept_per_group(self) -> int:
        """Units that each remaining group keeps."""
        return len(self.kept) // max(1, len(self.kept_groups))

    @property
    def is_whole(self) -> bool:
        """Whether nothing is removed."""
        return len(self.kept) == self.units

    @property
    def is_empty(self) -> bool:
        """Whether the whole sublayer is removed."""
        return not self.kept


@dataclass(frozen=True)
class PruningPlan:
    """Which units of every site of a model stay.

    Args:
        model_type (`str`): the family the plan was made for.
        num_layers (`int`): decoder layers before pruning.
        sites (`dict[str, SitePlan]`): by site name; a site that is not named keeps everything.
        dropped_layers (`tuple[int, ...]`, *optional*): whole layers that go.

    Raises:
        PlanError: names or numbers that do not fit together.
    """

    model_type: str
    num_layers: int
    sites: Mapping[str, SitePlan] = field(default_factory=dict)
    dropped_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check names and layers, and sort the sites so that equal plans have equal digests."""
        if not 1 <= self.num_layers <= MOST_LAYERS:
            raise PlanError(f"a model has 1 to {MOST_LAYERS:,} layers. Found {self.num_layers}.")
        dropped = tuple(sorted({int(layer) for layer in self.dropped_layers}))
        object.__setattr__(self, "dropped_layers", dropped)
        if dropped and not (dropped[0] >= 0 and dropped[-1] < self.num_layers):
            raise PlanError(f"dropped layers should be in [0, {self.num_layers}). Found {list(dropped)}.")
        if len(dropped) >= self.num_layers:
            raise PlanError("a plan should leave at least one layer.")
        for name in self.sites:
            layer, kind = split_site_name(name)
            if layer >= self.num_layers or kind not in KINDS:
                raise PlanError(f"no site {name!r} in a model of {self.num_layers} layers.")
        ordered = sorted(self.sites, key=split_site_name)
        object.__setattr__(self, "sites", {name: self.sites[name] for name in ordered})

    def __eq__(self, other: object) -> bool:
        """Equal are plans that remove the same, whether or not they name what stays whole."""
        return self.to_dict() == other.to_dict() if isinstance(other, PruningPlan) else NotImplemented

    def __hash__(self) -> int:
        """Hash of the digest: equal plans are equal keys."""
        return hash(self.digest)

    @property
    def digest(self) -> str:
        """SHA-256 of the plan's JSON, over what it removes."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def is_whole(self) -> bool:
        """Whether the plan removes nothing."""
        return not self.dropped_layers and all(site.is_whole for site in self.sites.values())

    def site(self, layer: int, kind: str) -> SitePlan | None:
        """What stays of a site; `None` when the plan does not name it."""
        return self.sites.get(site_name(layer, kind))

    def changed(self) -> Iterator[tuple[str, SitePlan]]:
        """Sites that lose units, in layers that stay."""
        for name, site in self.sites.items():
            if not site.is_whole and split_site_name(name)[0] not in self.dropped_layers:
                yield name, site

    def kept_layers(self) -> tuple[int, ...]:
        """Layers that stay, by their old numbers."""
        return tuple(layer for layer in range(self.num_layers) if layer not in self.dropped_layers)

    def then(self, later: PruningPlan) -> PruningPlan:
        """This plan and one for the model that it leads to, as one plan for the model that this one is for.

        Args:
            later ([`PruningPlan`]): its layers and units count what this plan keeps.

        Raises:
            PlanError: the other plan is for another model.
        """
        layers = self.kept_layers()
        if (later.model_type, later.num_layers) != (self.model_type, len(layers)):
            raise PlanError(
                f"the later plan is for {later.num_layers} layers of {later.model_type}, this one leaves {len(layers)} "
                f"of {self.model_type}."
            )
        sites = dict(self.sites)
        for name, kept in later.sites.items():
            number, kind = split_site_name(name)
            first = site_name(layers[number], kind)
            before = sites.get(first, SitePlan.whole(kept.groups, kept.group_size))
            if (len(before.kept_groups), before.kept_per_group) != (kept.groups, kept.group_size):
                raise PlanError(
                    f"the later plan is for {name} with {kept.groups} x {kept.group_size} units, this one leaves "
                    f"{len(before.kept_groups)} x {before.kept_per_group}."
                )
            sites[first] = SitePlan(before.groups, before.group_size, tuple(before.kept[unit] for unit in kept.kept))
        dropped = (*self.dropped_layers, *(layers[number] for number in later.dropped_layers))
        return PruningPlan(self.model_type, self.num_layers, sites, dropped)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON types. Kept units are written as half-open runs `[start, stop]`."""
        return {
            "format": PLAN_FORMAT,
            "model_type": self.model_type,
            "num_layers": self.num_layers,
            "dropped_layers": list(self.dropped_layers),
            "sites": {
                name: {"groups": site.groups, "group_size": site.group_size, "kept": _runs(site.kept)}
                for name, site in self.changed()
            },
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PruningPlan:
        """The plan of a mapping as [`~PruningPlan.to_dict`] writes it.

        Raises:
            PlanError: a missing or wrong entry, or a format this version does not know.
        """
        try:
            if data["format"] != PLAN_FORMAT:
                raise PlanError(
                    f"this plan has format {data['format']!r}; this version reads {PLAN_FORMAT}. Update hf_adaprune."
                )
            sites = {name: _site_from_dict(entry) for name, entry in data["sites"].items()}
            if not isinstance(data["model_type"], str):
                raise PlanError(f"`model_type` of a plan should be a name. Found {data['model_type']!r}.")
            return cls(data["model_type"], int(data["num_layers"]), sites, tuple(data["dropped_layers"]))
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(f"not a pruning plan: {error!r}.") from error

    def to_json(self) -> str:
        """Compact JSON with sorted keys: the text the digest is taken of."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """The plan of a JSON text.

        Raises:
            PlanError: the text is no plan.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"not a pruning plan: {error}.") from error
        if not isinstance(data, Mapping):
            raise PlanError("not a pruning plan: the JSON should be an object.")
        return cls.from_dict(data)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as a JSON file, whole or not at all."""
        write_whole(path, json.dumps(self.to_dict(), sort_keys=True) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PruningPlan:
        """Read a plan from a JSON file.

        Raises:
            PlanError: no such file, or no plan in it.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise PlanError(f"there is no plan at {path}.") from error
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"{path} is no pruning plan: {error}.") from error


def split_site_name(name: str) -> tuple[int, str]:
    """Layer and kind of a site name.

    Raises:
        PlanError: not a site name.
    """
    parts = name.split(".")
    if len(parts) != 3 or not parts[1].isdecimal() or name != site_name(int(parts[1]), parts[2]):
        raise PlanError(f"a site name looks like layers.3.mlp. Found {name!r}.")
    return int(parts[1]), parts[2]


def _site_from_dict(entry: Mapping[str, Any]) -> SitePlan:
    whole = SitePlan(int(entry["groups"]), int(entry["group_size"]), ())
    end = 0
    for start, stop in entry["kept"]:
        # Before the runs are written out: a crafted one could fill the memory.
        if not end <= start <= stop <= whole.units:
            raise PlanError(f"kept units should be in [0, {whole.units}), in ascending runs. Found [{start}, {stop}].")
        end = stop
    kept = tuple(unit for start, stop in entry["kept"] for unit in range(start, stop))
    return SitePlan(whole.groups, whole.group_size, kept)


def _runs(units: Iterable[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for unit in units:
        if runs and runs[-1][1] == unit:
            runs[-1][1] = unit + 1
        else:
            runs.append([unit, unit + 1])
    return runs
