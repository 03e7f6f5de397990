"""Models with peft's LoRA around them: what a cut sees of them, and what a checkpoint of them needs."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .whole_files import write_whole

__all__ = ["base_of", "is_peft", "merged", "name_without_adapters", "save_base"]


def is_peft(model: Any) -> bool:
    """Whether peft is around a model.

    Args:
        model (`nn.Module`): as a Trainer has it.
    """
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def base_of(model: Any) -> Any:
    """The model itself, without what peft puts around it.

    Args:
        model (`nn.Module`): as a Trainer has it.
    """
    return model.get_base_model() if is_peft(model) else model


def name_without_adapters(name: str) -> str:
    """What a parameter of a model with adapters is called without them; experts lie in several wrappers.

    Args:
        name (`str`): of the parameter.
    """
    return re.sub(r"(\.base_layer)+\.", ".", name)


@contextlib.contextmanager
def merged(model: Any) -> Iterator[None]:
    """LoRA lies inside the weights for the time of a `with`: statistics and repairs see what the model computes.

    Args:
        model (`nn.Module`): with adapters or without.
    """
    if not is_peft(model):
        yield
        return
    model.merge_adapter()
    try:
        yield
    finally:
        model.unmerge_adapter()


def save_base(model: Any, folder: Path) -> None:
    """Save the cut base model of LoRA factors, so that `from_pretrained` of the folder finds what they fit.

    What peft saves from now on names this base, too: the one that training began with does not fit any more.

    Args:
        model (`PeftModel`): the model.
        folder (`Path`): holds the factors; the base goes into `base` in it.
    """
    base = model.get_base_model()
    state = {name_without_adapters(name): value for name, value in base.state_dict().items() if ".lora_" not in name}
    place = folder / "base"
    base.save_pretrained(place, state_dict=state)
    for tuner in model.peft_config.values():
        tuner.base_model_name_or_path = str(place.absolute())
    # The adapter `default` lies in the folder itself, others in folders of their names.
    for path in (folder / name / "adapter_config.json" for name in ("", *model.peft_config)):
        if not path.exists():
            continue
        data = json.loads(path.read_text(encoding="utf-8"))
        data["base_model_name_or_path"] = str(place.absolute())
        write_whole(path, json.dumps(data, indent=2, sort_keys=True))
