"""An architecture bound to a live model: how its sites are found, what is refused, and what a plan removes in all.

Sizes are always read from the modules, never from the config, so a model that has been pruned before binds like any
other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .architectures import Architecture, architecture_for
from .errors import PlanError, UnsupportedModelError
from .plan import PruningPlan
from .site import Matrix, Site

__all__ = ["ModelSites", "find_sites", "layer_sites", "model_architecture", "uncompiled"]


@dataclass(frozen=True, eq=False)
class ModelSites:
    """All sites of a live model.

    Args:
        architecture ([`Architecture`]): the family.
        model (`PreTrainedModel`): the model.
        layers (`nn.ModuleList`): its decoder layers.
        sites (`tuple[Site, ...]`): in the order of the layers, attention before MLP or experts.
    """

    architecture: Architecture
    model: Any
    layers: nn.ModuleList
    sites: tuple[Site, ...]

    def __iter__(self) -> Iterator[Site]:
        """Iterate over the sites."""
        return iter(self.sites)

    def __len__(self) -> int:
        """Return the number of sites."""
        return len(self.sites)

    @cached_property
    def by_name(self) -> dict[str, Site]:
        """Sites by name."""
        return {site.name: site for site in self.sites}

    @cached_property
    def layer_parameters(self) -> tuple[int, ...]:
        """Parameters of every decoder layer, as they are now; factors of LoRA, which merge, are not counted."""
        return tuple(
            sum(p.numel() for name, p in layer.named_parameters() if "lora_" not in name) for layer in self.layers
        )

    @property
    def decoder_parameters(self) -> int:
        """Parameters of all decoder layers: what a pruning ratio is a ratio of."""
        return sum(self.layer_parameters)

    @cached_property
    def total_parameters(self) -> int:
        """Parameters of the whole model; tied ones count once."""
        return sum(p.numel() for name, p in self.model.named_parameters() if "lora_" not in name)

    @property
    def device(self) -> torch.device:
        """The device that token ids go to."""
        return self.model.get_input_embeddings().weight.device

    def check(self, plan: PruningPlan) -> None:
        """Refuse a plan that was made for another model.

        Raises:
            PlanError: family, layers or sizes differ, or the plan cuts what this family cannot cut.
        """
        if plan.model_type != self.architecture.model_type:
            raise PlanError(
                f"this plan is for model_type {plan.model_type!r}, the model has {self.architecture.model_type!r}."
            )
        if plan.num_layers != len(self.layers):
            raise PlanError(f"this plan is for {plan.num_layers} layers, the model has {len(self.layers)}.")
        for name, kept in plan.sites.items():
            site = self.by_name.get(name)
            if site is None:
                raise PlanError(f"the model has no site {name}. Was its sublayer removed by an earlier run?")
            if (site.groups, site.group_size) != (kept.groups, kept.group_size):
                raise PlanError(
                    f"this plan is for {name} with {kept.groups} x {kept.group_size} units, the model has "
                    f"{site.groups} x {site.group_size}."
                )
            if site.refusal and not kept.is_whole and not kept.is_empty:
                raise PlanError(f"{name}: {site.refusal}.")
            if site.router is not None and 0 < len(kept.kept_groups) < self.top_k(site):
                raise PlanError(
                    f"{name}: {len(kept.kept_groups)} experts would stay, but every token is sent to "
                    f"{self.top_k(site)}. Keep at least that many."
                )
            if site.kind == "experts" and not kept.is_empty and kept.kept_per_group != site.group_size:
                size = site.reader.parameter.element_size()
                if kept.kept_per_group * size % 16:
                    raise PlanError(
                        f"{name}: {kept.kept_per_group} channels per expert of {size} bytes would stay, but grouped "
                        f"matrix products need rows of whole 16 bytes. Keep a multiple of {16 // size} channels."
                    )
        if plan.dropped_layers:
            self.check_layers_may_go()

    def check_layers_may_go(self) -> None:
        """Refuse to drop layers where the layer number is part of the function.

        Raises:
            UnsupportedModelError: with the reason.
        """
        for flag, reason in self.architecture.layer_refusals:
            value = getattr(self.model.config, flag, None)
            if value is True or (value and value != 1):
                raise UnsupportedModelError(f"layers of this model cannot be dropped: {reason}.")

    def top_k(self, site: Site) -> int:
        """Experts per token of a site with a router."""
        return int(site.router.module.top_k) if site.router is not None else 0

    def removed_parameters(self, plan: PruningPlan, added_biases: Iterable[str] = ()) -> int:
        """Parameters that the plan removes, less the biases that a repair adds.

        Args:
            plan ([`PruningPlan`]): what stays.
            added_biases (iterable of `str`, *optional*): names of sites whose reader gets a bias it does not have.
        """
        removed = sum(self.layer_parameters[layer] for layer in plan.dropped_layers)
        for name, kept in plan.changed():
            removed += self.by_name[name].removed_parameters(kept)
        return removed - sum(self.by_name[name].outputs for name in added_biases)


def uncompiled(model: Any) -> Any:
    """The model itself where `torch.compile(model)` wrapped it, whose names of weights no checkpoint has.

    Args:
        model (`PreTrainedModel`): compiled or not.

    Raises:
        UnsupportedModelError: parts of it are wrapped so.
    """
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, nn.Module) and any("_orig_mod" in name.split(".") for name, _ in model.named_modules()):
        raise UnsupportedModelError(
            f"parts of this {type(model).__name__} are compiled with torch.compile, and would be saved under names "
            "that nothing loads. Take the model as it was loaded, and compile the result."
        )
    return model


def model_architecture(model: Any, own: Iterable[Architecture] = ()) -> Architecture:
    """The architecture of a live model.

    Raises:
        UnsupportedModelError: no causal language model, quantised or sharded weights, or an unknown family.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "can_generate"):
        raise UnsupportedModelError(
            f"a transformers causal language model is needed. Found {type(model).__name__}; load one with "
            "AutoModelForCausalLM.from_pretrained."
        )
    known = {architecture.model_type for architecture in own}
    if config.model_type not in known:
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"{type(model).__name__} is an encoder-decoder; only decoder-only causal language models are pruned."
            )
        if not model.can_generate() or model.get_output_embeddings() is None:
            raise UnsupportedModelError(
                f"{type(model).__name__} is no causal language model (an encoder, or a decoder without its head). Load "
                "a decoder with AutoModelForCausalLM.from_pretrained."
            )
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} holds quantised weights. Prune first and quantise the result: load the original "
            "weights, or dequantise (for GGUF files: quantization_config=GgufConfig(dequantize=True))."
        )
    _check_plain(model)
    # transformers' own word for adapters inside of a model, without peft's model around it.
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} holds adapters of `add_adapter` or of an adapter's folder, whose weights would go "
            "without those that they fit. Load the model without them, or put them around it with "
            "peft.get_peft_model; merge_and_unload() of a PeftModel makes them part of the weights."
        )
    return architecture_for(config.model_type, own)


def _check_plain(model: nn.Module) -> None:
    """Refuse tensors that stand for others, as torchao's in-place quantisation leaves them and FSDP's shards are."""
    for name, parameter in model.named_parameters():
        if not is_traceable_wrapper_subclass(parameter):
            continue
        kind = type(parameter.data).__name__
        if kind == "DTensor":
            raise UnsupportedModelError(
                f"{name} is a DTensor, of which each process holds a part (FSDP, tensor parallelism). Prune the whole "
                "model first, and distribute the result."
            )
        raise UnsupportedModelError(
            f"{name} is of type {kind}, which holds weights in another form (torchao's quantize_ makes "
            "such). Prune first and quantise the result: load the original weights."
        )


def find_sites(model: Any, architecture: Architecture | None = None) -> ModelSites:
    """Find the sites of a model.

    Args:
        model (`PreTrainedModel`): a causal language model; on the meta device too.
        architecture ([`Architecture`], *optional*): an architecture of the caller's own.

    Raises:
        UnsupportedModelError: the model cannot be pruned, or does not look as its architecture says.
    """
    found = model_architecture(model, () if architecture is None else (architecture,))
    layers = _submodule(model, found.layers)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of decoder layers at {found.layers!r}, where its architecture says."
        )
    sites = [site for number, layer in enumerate(layers) for site in layer_sites(number, layer, found)]
    if not sites:
        raise UnsupportedModelError(f"nothing to prune in {type(model).__name__}: no attention and no MLP was found.")
    return ModelSites(found, model, layers, tuple(sites))


def layer_sites(number: int, layer: nn.Module, architecture: Architecture) -> list[Site]:
    """The sites of one decoder layer, attention before MLP or experts.

    Raises:
        UnsupportedModelError: the layer does not look as its architecture says.
    """
    attention = _attention_site(number, layer, architecture)
    feed_forward = _experts_site(number, layer, architecture) or _mlp_site(number, layer, architecture)
    return [site for site in (attention, feed_forward) if site is not None]


def _submodule(owner: nn.Module, path: str) -> nn.Module | None:
    for part in path.split(".") if path else ():
        owner = getattr(owner, part, None)  # type: ignore[assignment]
        if owner is None:
            return None
    return owner


def _matrix(layer: nn.Module, path: str) -> Matrix | None:
    module = _submodule(layer, path)
    if module is None or not isinstance(getattr(module, "weight", None), torch.Tensor):
        return None
    from transformers.pytorch_utils import Conv1D

    # A LoRA layer around it shows its weight as it is stored.
    return Matrix(path, module, transposed=isinstance(getattr(module, "base_layer", module), Conv1D))


def _attention_site(number: int, layer: nn.Module, architecture: Architecture) -> Site | None:
    data = architecture.attention
    reader = _matrix(layer, data.output)
    paths = (data.query,) if data.fused else (data.query, data.key, data.value)
    writers = tuple(matrix for path in paths if (matrix := _matrix(layer, path)) is not None)
    if reader is None or len(writers) != len(paths):
        return None
    sublayer = _submodule(layer, data.module)
    head = getattr(sublayer, "head_dim", None) or getattr(sublayer, "head_size", None)
    if head is None or sublayer is None:
        raise UnsupportedModelError(f"layer {number}: {data.module!r} does not state its head size.")
    heads = reader.inputs // head
    groups = (writers[0].outputs // head - heads) // 2 if data.fused else writers[1].outputs // head
    if groups < 1 or heads % groups:
        raise UnsupportedModelError(f"layer {number}: {heads} query heads do not divide into {groups} KV heads.")
    return Site(
        number,
        "attention",
        sublayer,
        reader,
        writers,
        groups,
        heads // groups,
        head,
        fused=data.fused,
        refusal=data.refuse_heads,
    )


def _mlp_site(number: int, layer: nn.Module, architecture: Architecture) -> Site | None:
    data = architecture.mlp
    reader = _matrix(layer, data.down)
    writers = tuple(matrix for path in data.up if (matrix := _matrix(layer, path)) is not None)
    if reader is None or len(writers) != len(data.up):
        return None
    sublayer = _submodule(layer, data.module) if data.module else reader.module
    assert sublayer is not None
    return Site(number, "mlp", sublayer, reader, writers, 1, reader.inputs, 1, copies=data.fused)


def _experts_site(number: int, layer: nn.Module, architecture: Architecture) -> Site | None:
    data = architecture.experts
    experts = _submodule(layer, data.experts) if data is not None else None
    if data is None or experts is None:
        return None
    sublayer, router = _submodule(layer, data.module), _matrix(layer, data.router)
    assert sublayer is not None
    reader = Matrix(f"{data.experts}.{data.down}", experts, data.down)
    writer = Matrix(f"{data.experts}.{data.gate_up}", experts, data.gate_up)
    count, _, width = reader.weight.shape
    return Site(number, "experts", sublayer, reader, (writer,), count, width, 1, copies=2, router=router)
