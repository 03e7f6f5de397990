"""Pruning a model that several processes train: wrapped, it keeps its shapes, so units are masked until the end."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .masking import masked
from .plan import PruningPlan
from .sites import ModelSites, find_sites
from .surgery import apply_plan, assign_units

if TYPE_CHECKING:
    from .compensation import Repair

__all__ = ["UnitMasks", "cut_copy", "take_repairs"]


class UnitMasks:
    """The masks that a model trains with; one plan at a time.

    Attributes:
        on (`bool`): whether there are any.
    """

    def __init__(self) -> None:
        self._hooks, self.on = contextlib.ExitStack(), False

    def put_on(self, sites: ModelSites, plan: PruningPlan) -> None:
        """Mask what a plan removes, and nothing else.

        Args:
            sites ([`ModelSites`]): the model, whole.
            plan ([`PruningPlan`]): for it.
        """
        self.take_off()
        self._hooks, self.on = contextlib.ExitStack(), True
        self._hooks.enter_context(masked(sites, plan))

    def take_off(self) -> None:
        """Let every unit speak again."""
        self._hooks.close()
        self.on = False


def cut_copy(sites: ModelSites, plan: PruningPlan | None) -> Any:
    """A copy of a model, cut by a plan: what a masked model will be, to decide the next cut on.

    Args:
        sites ([`ModelSites`]): the model, whole and without masks.
        plan ([`PruningPlan`], *optional*): what is masked so far.
    """
    model = copy.deepcopy(sites.model)
    model.__dict__.pop("forward", None)  # accelerate's, which runs the model it was made for
    if plan is not None:
        apply_plan(find_sites(model, sites.architecture), plan)
    return model


def take_repairs(sites: ModelSites, plan: PruningPlan, repairs: Mapping[str, Repair]) -> None:
    """Put repairs into a model that keeps its shapes, in place.

    Args:
        sites ([`ModelSites`]): the model, whole.
        plan ([`PruningPlan`]): everything that is masked from now on.
        repairs (`dict[str, Repair]`): by site, for the units that stay.
    """
    for name, repair in repairs.items():
        assign_units(sites.by_name[name], plan.sites[name], repair)
