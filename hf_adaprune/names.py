"""What a model in memory is called: what it was loaded by, and what loads it now, which changes when it is cut.

transformers keeps the first in the config (trl takes the tokenizer from there, cards their base model) and the second
on the model itself, where peft reads what base an adapter is loaded onto.
"""

from __future__ import annotations

from typing import Any

__all__ = ["name_of", "rename"]


def name_of(model: Any) -> str:
    """What a model was loaded by, and so made from where it was cut since; empty where it was not loaded.

    Args:
        model (`PreTrainedModel`, *optional*): the model.
    """
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")


def rename(model: Any, name: str) -> None:
    """State by what a model can be loaded, in place; what it was made from stays.

    Args:
        model (`PreTrainedModel`): the model.
        name (`str`): a folder, or an id on the Hub; empty where nothing loads these weights (any more).
    """
    model.name_or_path = name
