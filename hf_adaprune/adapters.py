"""Models with peft's LoRA around them: what a cut sees of them, and what a checkpoint of them needs."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .surgery import restore_values
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

    Weights that stay what they are meanwhile come back to the bit. Subtraction alone would not do: in half precision
    adding the factors rounds, and the frozen weights would drift with every cut.

    Args:
        model (`nn.Module`): with adapters or without.
    """
    if not is_peft(model):
        yield
        return
    before = {name: weight.detach().clone() for name, weight in _adapted(model)}
    model.merge_adapter()
    # Whatever holds other values later has another tensor or another version; this one keeps its place taken.
    inside = {name: (weight.detach(), weight._version) for name, weight in _adapted(model)}
    try:
        yield
    finally:
        same = [
            name for name, weight in _adapted(model)
            if name in inside and weight.data_ptr() == inside[name][0].data_ptr()
            and weight.shape == inside[name][0].shape and weight._version == inside[name][1]
        ]  # fmt: skip
        model.unmerge_adapter()
        now = dict(_adapted(model))
        for name in same:
            restore_values(now[name], before[name])


def _adapted(model: Any) -> Iterator[tuple[str, Any]]:
    """Weights that have factors beside them, by name."""
    for name, parameter in model.named_parameters():
        if name.endswith(".base_layer.weight"):
            yield name, parameter


def _base_state(base: Any) -> dict[str, Any]:
    """The weights of a base by the names they have without adapters.

    Of the modules that train whole beside the factors (`modules_to_save`) the adapter has the trained copies, and the
    base what they were copied from. A copy that was cut stands for an original that was not: peft calls the copy alone.
    """
    found = dict(base.state_dict())
    for path, module in base.named_modules():
        if not (hasattr(module, "modules_to_save") and hasattr(module, "original_module")):
            continue
        copies = [copy.state_dict() for copy in module.modules_to_save.values()]
        own = module.original_module.state_dict()
        if copies and _shapes(copies[0]) != _shapes(own):
            own = copies[0]
        found = {name: value for name, value in found.items() if not name.startswith(f"{path}.")}
        found |= {f"{path}.{name}": value for name, value in own.items()}
    return {name_without_adapters(name): value for name, value in found.items() if ".lora_" not in name}


def _shapes(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.shape for name, value in state.items()}


def save_base(model: Any, folder: Path) -> None:
    """Save the cut base model of LoRA factors, so that `from_pretrained` of the folder finds what they fit.

    What peft saves from now on names this base, too: the one that training began with does not fit any more. Factors
    that were initialised from the weights (PiSSA, OLoRA) had a part of them taken out of the base, which the saved one
    lacks already: when they are loaded peft must not take it out again.

    Args:
        model (`PeftModel`): the model.
        folder (`Path`): holds the factors; the base goes into `base` in it.
    """
    place = folder / "base"
    base = model.get_base_model()
    base.save_pretrained(place, state_dict=_base_state(base))
    for tuner in model.peft_config.values():
        tuner.base_model_name_or_path = str(place.absolute())
        if isinstance(getattr(tuner, "init_lora_weights", None), str):
            tuner.init_lora_weights = True
    # The adapter `default` lies in the folder itself, others in folders of their names.
    for path in (folder / name / "adapter_config.json" for name in ("", *model.peft_config)):
        if not path.exists():
            continue
        data = json.loads(path.read_text(encoding="utf-8"))
        data["base_model_name_or_path"] = str(place.absolute())
        if isinstance(data.get("init_lora_weights"), str):
            data["init_lora_weights"] = True
        write_whole(path, json.dumps(data, indent=2, sort_keys=True))
