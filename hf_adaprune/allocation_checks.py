"""What an allocation contradicts, told before it is made: whole parts, equal layers, budgets that are shared anyway."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

from .config import PruningConfig
from .errors import ConfigError
from .offers import Offer, protected_layers
from .parts import AllocationConfig
from .sites import ModelSites

__all__ = [
    "can_allocate",
    "check_equal_layers",
    "check_not_all_protected",
    "check_nothing_shared",
    "check_whole_parts",
    "tell_unread_fields",
    "whole_parts",
]

logger = logging.getLogger(__name__)

# By field, whether a method (of a structure) reads it. `steps` and `max_site_ratio` are read by all.
_READ_BY: dict[str, Callable[[AllocationConfig], bool]] = {
    "structure": lambda own: own.method == "flap",
    "attention_ratio": lambda own: own.method == "flap" and own.structure.endswith("MM"),
    "amplitude": lambda own: own.method == "similarity",
    "first_ratio": lambda own: own.method == "logarithmic",
    "profile": lambda own: own.method in ("global", "profile") or (own.method, own.structure) == ("flap", "AL-AM"),
    "attention_balance": lambda own: _READ_BY["profile"](own),
    "ratios": lambda own: own.method == "ratios",
}


def whole_parts(units: Iterable[str]) -> list[str]:
    """Those units that are no width of a site but a part of the model."""
    return [unit for unit in units if unit in ("attention", "mlp", "layer")]


def can_allocate(units: Sequence[str], method: str, structure: str) -> bool:
    """Whether a method has a place for whole parts, where `units` names some; most share widths alone.

    `ratios` says by name what goes; strategies that refine a plan of whole parts and widths give it the widths.

    Args:
        units (sequence of `str`): what may go.
        method (`str`): `allocation.method`.
        structure (`str`): `allocation.structure`, of `flap`.
    """
    whole = whole_parts(units)
    if not whole or method == "global":
        return True
    return len(whole) < len(units) and (method == "ratios" or (method, structure) == ("flap", "AL-AM"))


def check_whole_parts(config: PruningConfig) -> None:
    """Refuse whole parts beside widths where the method would never let one go.

    Args:
        config ([`PruningConfig`]): units and method.

    Raises:
        ConfigError: with the methods that rank both.
    """
    own, whole = config.allocation, whole_parts(config.units)
    if not can_allocate(config.units, own.method, own.structure):
        raise ConfigError(
            f"allocation {own.method!r} shares widths, and {', '.join(whole)} of `units` would never go. Use the "
            "method `global` (or `flap` with the structure AL-AM), which ranks whole parts beside widths, or take "
            f"{', '.join(whole)} out of `units`."
        )


def check_not_all_protected(sites: ModelSites, config: PruningConfig) -> None:
    """Refuse to prune a model of which every layer is protected.

    Args:
        sites ([`ModelSites`]): the model.
        config ([`PruningConfig`]): protected layers.

    Raises:
        ConfigError: with the layers.
    """
    count = len(protected_layers(sites, config))
    if count and count == len(sites.layers):
        raise ConfigError(
            f"`protected_layers` {config.protected_layers} are all {count} layers of this model, so nothing may go. "
            "Protect fewer of them."
        )


def check_nothing_shared(config: PruningConfig, offers: list[Offer]) -> None:
    """Refuse what would share a budget over layers that are to be equal: it did nothing there.

    Args:
        config ([`PruningConfig`]): method, ratios, profile and balance.
        offers (list of [`Offer`]): what every site offers; without any only whole layers go, which share nothing.

    Raises:
        ConfigError: with the field.
    """
    own = config.allocation
    given = {
        "ratios": own.method == "ratios",
        "profile": own.method in ("global", "profile") and any(own.profile),
        "attention_balance": own.method in ("global", "profile") and own.attention_balance != 0,
    }
    named = [name for name, contradicts in given.items() if contradicts]
    if offers and named:
        raise ConfigError(
            f"`uniform=True` means equal layers, which `allocation.{named[0]}` contradicts. Leave out one of them."
        )


def tell_unread_fields(config: PruningConfig) -> None:
    """Warn of fields of `allocation` that are set and that its method does not read.

    A method that a search chooses is left alone: what one does not read another does.

    Args:
        config ([`PruningConfig`]): with or without a search.
    """
    own, space = config.allocation, config.search.space if config.search is not None else {}
    if {"allocation.method", "allocation.structure"} & set(space):
        return
    plain = AllocationConfig()
    unread = [name for name, reads in _READ_BY.items() if getattr(own, name) != getattr(plain, name) and not reads(own)]
    if unread:
        method = f"{own.method!r}" + (f" with the structure {own.structure}" if own.method == "flap" else "")
        logger.warning(
            "the allocation %s does not read `allocation.%s`: what is set there changes nothing.", method,
            "`, `allocation.".join(unread),
        )  # fmt: skip


def check_equal_layers(offers: list[Offer]) -> None:
    """Refuse the uniform form of a model whose layers differ already.

    Args:
        offers (list of [`Offer`]): what every site offers.

    Raises:
        ConfigError: with the kind of unit that they differ in.
    """
    for unit in sorted({offer.unit for offer in offers}):
        shapes = {(offer.site.groups, offer.site.group_size) for offer in offers if offer.unit == unit}
        if len(shapes) > 1:
            raise ConfigError(
                f"`uniform=True` starts from equal layers, and this model's differ in {unit}s. Prune the dense model, "
                "or set uniform=False."
            )
