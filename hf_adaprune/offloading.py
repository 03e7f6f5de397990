"""Weights that accelerate keeps elsewhere: brought into memory for a while, and put back as they were.

A model that was loaded with a `device_map` holds some weights on disk (or on the CPU for a GPU). accelerate brings them
in at every call of a module; work on a whole layer wants them once, for as long as it takes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .errors import UnsupportedModelError
from .sites import ModelSites

__all__ = [
    "check_finite",
    "check_layer",
    "is_offloaded",
    "layer_weights",
    "load_offloaded",
    "offload_map",
    "other_weights",
]


def _hooks(module: nn.Module) -> list[Any]:
    """The hooks of a module that hold its weights elsewhere."""
    hook: Any = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    return [own for own in hooks if getattr(own, "offload", False) and own.weights_map is not None]


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate holds weights of a model elsewhere."""
    return any(_hooks(module) for module in model.modules())


@contextlib.contextmanager
def weights_in_memory(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Hold the offloaded weights of some modules on the device where they compute; nothing to do for others.

    Args:
        modules (iterable of `nn.Module`): each with the parameters that are its own, not those of its children.
    """
    from accelerate.utils import named_module_tensors, set_module_tensor_to_device

    with contextlib.ExitStack() as stack:
        for module in modules:
            for hook in _hooks(module):
                hook.offload = False  # so that a forward pass neither loads nor drops anything
                stack.callback(setattr, hook, "offload", True)
                own = named_module_tensors(
                    module,
                    include_buffers=hook.offload_buffers,
                    recurse=hook.place_submodules,
                    remove_non_persistent=True,
                )
                for name, absent in list(own):
                    # A copy: what comes from a file is a view of its mapped, possibly unaligned pages.
                    value = hook.weights_map[name].to(hook.execution_device, copy=True)
                    stack.callback(_put_back, module, name, absent)
                    set_module_tensor_to_device(module, name, hook.execution_device, value=value)
        yield


def _put_back(module: nn.Module, name: str, absent: torch.Tensor) -> None:
    owner = module.get_submodule(name.rpartition(".")[0])
    if isinstance(absent, nn.Parameter):
        owner.register_parameter(name.rpartition(".")[2], absent)
    else:
        owner.register_buffer(name.rpartition(".")[2], absent)


def layer_weights(sites: ModelSites, number: int) -> contextlib.AbstractContextManager[None]:
    """Hold the weights of one decoder layer in memory while the context is open."""
    return weights_in_memory(sites.layers[number].modules())


def other_weights(sites: ModelSites) -> contextlib.AbstractContextManager[None]:
    """Hold everything outside of the decoder layers in memory while the context is open: embeddings, norms, head."""
    inside = set(sites.layers.modules())
    return weights_in_memory([module for module in sites.model.modules() if module not in inside])


def check_layer(sites: ModelSites, number: int) -> None:
    """Refuse a decoder layer whose weights are not finite."""
    check_finite(sites.layers[number].named_parameters(f"{sites.architecture.layers}.{number}"))


def check_finite(named: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Refuse weights that are not there or not finite.

    Args:
        named (iterable): names and parameters, as `named_parameters()` gives them.

    Raises:
        UnsupportedModelError: with the name of the parameter.
    """
    for name, parameter in named:
        if parameter.device.type == "meta":
            raise UnsupportedModelError(
                f"{name} holds no weights (meta device, or offloaded). Prune a model that does not fit in memory with "
                "prune_to_disk(model, tokenizer, config, output_dir), or load it into memory: without device_map, or "
                "with one that offloads nothing."
            )
        if not torch.isfinite(parameter.detach()).all():
            raise UnsupportedModelError(
                f"{name} contains NaN or infinite weights. Load the checkpoint again, in bfloat16 or float32; where "
                "training made them, go on from an earlier checkpoint with a lower learning rate."
            )


def offload_map(sites: ModelSites, device: str | int = "cpu") -> dict[str, str | int]:
    """A `device_map` that leaves the decoder layers on disk and puts everything else on a device.

    Args:
        sites ([`ModelSites`]): of the model, on the meta device too.
        device (`str`, *optional*, defaults to `"cpu"`): of the rest; layers compute there, too.
    """
    found: dict[str, str | int] = {}

    def visit(module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            own = f"{path}.{name}" if path else name
            if child is sites.layers:
                found.update({f"{own}.{number}": "disk" for number in range(len(sites.layers))})
            elif any(part is sites.layers for part in child.modules()):
                found.update({f"{own}.{key}": device for key, _ in child.named_parameters(recurse=False)})
                visit(child, own)
            else:
                found[own] = device

    visit(sites.model, "")
    return found


def load_offloaded(
    name: str | os.PathLike[str],
    sites: ModelSites,
    folder: str | os.PathLike[str],
    device: str | None = None,
    **options: Any,
) -> Any:
    """Load a causal language model with its decoder layers left on disk.

    Weights stay in the checkpoint's safetensors files where the model uses them as they are stored; what transformers
    converts (experts of most mixtures) is written to the folder.

    Args:
        name (`str`): folder or id on the Hub.
        sites ([`ModelSites`]): of the same model without weights; see [`hf_adaprune.skeleton.bound_skeleton`].
        folder (`str`): for converted weights; it has to stay as long as the model is used.
        device (`str`, *optional*): where to compute; the CPU where not given.
        **options: of `AutoModelForCausalLM.from_pretrained`.
    """
    from transformers import AutoModelForCausalLM

    place = offload_map(sites, device or "cpu")
    return AutoModelForCausalLM.from_pretrained(name, device_map=place, offload_folder=str(folder), **options)
