"""What a model in memory is called: what it can be loaded by, which changes when it is cut.

Others take the name at its word: peft writes it into every adapter, as the base to load the adapter onto.
"""

from __future__ import annotations

from typing import Any

__all__ = ["forget_name", "name_of", "rename"]

_FORMER = "_adaprune_former_name"


def name_of(model: Any) -> str:
    """What a model is loaded by or, where it has changed since, what it was made from; empty for neither.

    Args:
        model (`PreTrainedModel`, *optional*): the model.
    """
    stated = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    return stated or str(getattr(model, "__dict__", {}).get(_FORMER, ""))


def rename(model: Any, name: str) -> None:
    """State by what a model can be loaded, in place.

    Args:
        model (`PreTrainedModel`): the model.
        name (`str`): a folder, or an id on the Hub; empty for a model that cannot be loaded from anywhere.
    """
    # peft reads the model's own attribute for its config, and the config's for its card.
    model.name_or_path = model.config.name_or_path = name


def forget_name(model: Any) -> None:
    """Take the name from a model whose weights are no longer those that the name loads, in place.

    Args:
        model (`PreTrainedModel`): the model; [`name_of`] still says what it was made from.
    """
    former = name_of(model)
    rename(model, "")
    model.__dict__[_FORMER] = former
