"""Carries out a plan: the only file that assigns parameters. Works on the meta device too.

Tensors are swapped inside their `Parameter` objects, so optimisers, tied weights and hooks keep what they hold.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .architectures import Architecture
from .experts import balance_by_layer
from .layers import SizedConfigView, SkippedAttention, SkippedMlp
from .model_config import PROVENANCE_KEY, drop_config_layers, head_dim_of, update_config
from .names import rename
from .plan import PruningPlan, SitePlan
from .site import Matrix, Site
from .sites import ModelSites, find_sites, layer_sites

if TYPE_CHECKING:
    from .compensation import Repair

__all__ = [
    "Follow",
    "add_bias",
    "apply_plan",
    "assign_layer",
    "assign_repair",
    "assign_units",
    "cast_parameters",
    "cut_layer",
    "restore_values",
    "skip_sublayers",
    "take_structure",
]

# Told of every parameter that is about to be cut, with the function that cuts a tensor of its shape.
Follow = Callable[[nn.Parameter, Callable[[torch.Tensor], torch.Tensor]], None]


def apply_plan(
    sites: ModelSites, plan: PruningPlan, repairs: Mapping[str, Repair] | None = None, follow: Follow | None = None
) -> ModelSites:
    """Cut a model in place, and regenerate its config. LoRA factors of peft are cut with the weights they stand beside.

    A model that loses anything is not what its `name_or_path` loads any more, which is empty then: adapters of peft
    that are made for it would name the dense model as their base, and do not fit that. Its config says what it was made
    from.

    Args:
        sites ([`ModelSites`]): the model; its entries are stale afterwards.
        plan ([`PruningPlan`]): which units stay.
        repairs (`dict[str, Repair]`, *optional*): new weights of readers, by site name.
        follow (`Callable`, *optional*): called with every parameter before it is cut and the function that cuts a
            tensor of its shape, so that what belongs to the parameter (moments of an optimizer) can be cut alike.

    Returns:
        [`ModelSites`]: the sites of the cut model.

    Raises:
        PlanError: the plan is for another model, or its result cannot be described by the model's config; nothing has
            been changed then.
    """
    sites.check(plan)
    repairs = repairs or {}
    model, config, architecture = sites.model, sites.model.config, sites.architecture
    head_dim = head_dim_of(config)
    biases = _carried_biases(config)
    if not plan.is_whole:
        rename(model, "")
    for name, kept in plan.changed():
        site = sites.by_name[name]
        layer = sites.layers[site.layer]
        if kept.is_empty:
            kind = "attention" if site.kind == "attention" else "mlp"
            skip_sublayers(layer, site.layer, [kind], architecture, head_dim)
            biases[site.layer] = [path for path in biases.get(site.layer, []) if path != site.reader.path]
            continue
        _cut_site(site, kept, follow)
        if name in repairs and assign_repair(site, repairs[name]):
            biases.setdefault(site.layer, []).append(site.reader.path)
    if plan.dropped_layers:
        kept_layers = plan.kept_layers()
        _drop_layers(sites.layers, kept_layers)
        drop_config_layers(config, architecture, kept_layers)
        biases = {new: biases[old] for new, old in enumerate(kept_layers) if old in biases}
    cut = find_sites(model, architecture)
    _state_experts(cut)
    update_config(cut, biases)
    return cut


def cut_layer(
    layer: nn.Module, number: int, architecture: Architecture, plan: PruningPlan, repairs: Mapping[str, Repair]
) -> None:
    """Cut one decoder layer that belongs to no model (a copy), in place. Sublayers that go whole are replaced.

    Args:
        layer (`nn.Module`): the layer.
        number (`int`): its number in the plan.
        architecture ([`Architecture`]): the family.
        plan ([`PruningPlan`]): which units stay.
        repairs (`dict[str, Repair]`): by site name.
    """
    for site in layer_sites(number, layer, architecture):
        kept = plan.sites.get(site.name)
        if kept is None or kept.is_whole:
            continue
        if kept.is_empty:
            kind = "attention" if site.kind == "attention" else "mlp"
            skip_sublayers(layer, number, [kind], architecture, site.columns_per_unit)
            continue
        _cut_site(site, kept)
        if site.kind == "attention":
            # Phi-3 reads its head counts from the config at every call.
            sizes = {architecture.heads_field: len(kept.kept), architecture.kv_heads_field: len(kept.kept_groups)}
            own: list[Any] = list(site.sublayer.modules())
            for module in own:
                if module.__dict__.get("config") is not None:
                    module.config = SizedConfigView(module.config, {n: v for n, v in sizes.items() if n})
        if site.name in repairs:
            assign_repair(site, repairs[site.name])


def assign_layer(layer: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Put optimised weights into a layer that is already cut, in place.

    Args:
        layer (`nn.Module`): the layer.
        state (`dict[str, torch.Tensor]`): every parameter by name, in the shapes of the layer.
    """
    for name, parameter in layer.named_parameters():
        _put(parameter, state[name].to(parameter.device, parameter.dtype))


def assign_repair(site: Site, repair: Repair) -> bool:
    """Put repaired weights into the reader of a site that is already cut, in place.

    Returns:
        `bool`: whether the reader got a bias that it did not have.
    """
    _assign(site.reader, repair.weight)
    if repair.bias is None:
        return False
    added = site.reader.bias is None
    if added:
        add_bias(getattr(site.reader.module, "base_layer", site.reader.module), site.reader.outputs)
    bias = site.reader.bias
    assert bias is not None
    _put(bias, repair.bias.to(bias.device, bias.dtype))
    return added


def cast_parameters(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
    """Give parameters other dtypes, in place; buffers (rotary frequencies are float32 on purpose) stay what they are.

    Args:
        model (`nn.Module`): whose parameters; tied ones stay tied.
        dtypes (`dict[str, torch.dtype]`): by the parameter's name; those without an entry stay.

    Returns:
        `dict[str, torch.dtype]`: what the changed ones had.
    """
    before = {}
    for name, parameter in model.named_parameters():
        if dtypes.get(name, parameter.dtype) != parameter.dtype:
            before[name] = parameter.dtype
            parameter.grad = None
            _put(parameter, parameter.detach().to(dtypes[name]))
    return before


def skip_sublayers(
    layer: nn.Module, number: int, skip: Iterable[str], architecture: Architecture, head_dim: int
) -> None:
    """Replace sublayers of a decoder layer, in place, by modules that add nothing.

    Args:
        layer (`nn.Module`): the decoder layer.
        number (`int`): its number, for the cache.
        skip (iterable of `str`): `attention` and/or `mlp`, transformers' own words.
        architecture ([`Architecture`]): the family.
        head_dim (`int`): head size, for the cache.
    """
    for kind in skip:
        if kind == "attention":
            _replace(layer, architecture.attention.module, SkippedAttention(number, head_dim))
        elif architecture.mlp.module:
            _replace(layer, architecture.mlp.module, SkippedMlp())
        else:
            # OPT has no MLP module: the writer passes its input through and the reader returns nothing.
            for path in architecture.mlp.up:
                _replace(layer, path, nn.Identity())
            _replace(layer, architecture.mlp.down, SkippedMlp())


def add_bias(module: nn.Module, outputs: int) -> None:
    """Give a projection that has none a zero bias `[outputs]`, in dtype, device and `requires_grad` as its weight."""
    if getattr(module, "bias", None) is None:
        weight: Any = module.weight
        bias = torch.zeros(outputs, dtype=weight.dtype, device=weight.device)
        # Under adapters weights are frozen, and so is what a repair adds to them.
        module.bias = nn.Parameter(bias, requires_grad=weight.requires_grad)


def _replace(owner: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    module.train(owner.training)
    setattr(owner.get_submodule(parent), name, module)


def _put(parameter: nn.Parameter, tensor: torch.Tensor) -> None:
    parameter.grad = None  # belongs to the old values, and the next backward would add to its old shape
    if parameter.shape != tensor.shape:
        # While the graph of an earlier step is alive (torch.compile leaves some to the garbage collector), autograd
        # holds new gradients against the old shape, which it forgets where the dtype changes and not where sizes do.
        other = torch.float16 if parameter.dtype != torch.float16 else torch.float32
        parameter.data = torch.empty(0, dtype=other, device=parameter.device)
    parameter.data = tensor


def restore_values(parameter: nn.Parameter, values: torch.Tensor) -> None:
    """Give a parameter the values back that it had before; it stays the same object, in the same place.

    Args:
        parameter (`nn.Parameter`): whose shape has not changed.
        values (`torch.Tensor`): of its shape and dtype.
    """
    with torch.no_grad():
        parameter.copy_(values)


def _assign(matrix: Matrix, weight: torch.Tensor) -> None:
    parameter = matrix.parameter
    stored = weight.T if matrix.transposed else weight
    # A tensor of its own: the repair stays the caller's.
    _put(parameter, stored.to(parameter.device, parameter.dtype, copy=True).contiguous())


def _select(matrix: Matrix, dimension: int, index: torch.Tensor, follow: Follow | None = None) -> None:
    stored = 1 - dimension if matrix.transposed else dimension
    _cut(matrix.parameter, partial(_take, dimension=stored, index=index), follow)
    for factor in _factors(matrix.module, dimension):
        _cut(factor.weight, partial(_take, dimension=dimension, index=index), follow)
        if dimension == 0 and factor.bias is not None:
            _cut(factor.bias, partial(_take, dimension=0, index=index), follow)
        _state(factor, {("out_features", "in_features")[dimension]: len(index)})


def _take(tensor: torch.Tensor, dimension: int, index: torch.Tensor) -> torch.Tensor:
    return tensor.index_select(dimension, index.to(tensor.device)).contiguous()


def _cut(parameter: nn.Parameter, select: Callable[[torch.Tensor], torch.Tensor], follow: Follow | None = None) -> None:
    if follow is not None:
        follow(parameter, select)
    _put(parameter, select(parameter.data))


def _factors(module: Any, dimension: int) -> list[Any]:
    """LoRA factors that share a matrix's outputs (dimension 0: B) or inputs (1: A), of every adapter of peft."""
    return list(getattr(module, ("lora_B", "lora_A")[dimension], {}).values())


def _cut_site(site: Site, kept: SitePlan, follow: Follow | None = None) -> None:
    if site.kind == "experts":
        _cut_experts(site, kept, follow)
        return
    _select(site.reader, 1, site.column_index(kept), follow)
    _state_sizes(site.reader)
    for number, writer in enumerate(site.writers):
        rows = site.row_index(number, kept)
        _select(writer, 0, rows, follow)
        bias = writer.bias
        if bias is not None:
            _cut(bias, partial(_take, dimension=0, index=rows), follow)
        _state_sizes(writer)
    if site.kind == "attention":
        groups = len(kept.kept_groups)
        sizes = {
            "num_heads": len(kept.kept),
            "num_attention_heads": len(kept.kept),
            "num_key_value_heads": groups,
            "num_key_value_groups": kept.kept_per_group,
        }
    else:
        sizes = {"intermediate_size": len(kept.kept), "ffn_dim": len(kept.kept)}
    _state(site.sublayer, sizes)


def _cut_experts(site: Site, kept: SitePlan, follow: Follow | None = None) -> None:
    experts, width = kept.kept_groups, kept.kept_per_group
    channels = torch.tensor(kept.kept).reshape(len(experts), width) % site.group_size
    rows = torch.cat([channels + copy * site.group_size for copy in range(site.copies)], dim=1)

    def take_rows(tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack([tensor[e][r.to(tensor.device)] for e, r in zip(experts, rows, strict=True)])

    def take_columns(tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack([tensor[e][:, c.to(tensor.device)] for e, c in zip(experts, channels, strict=True)])

    _cut(site.writers[0].parameter, take_rows, follow)
    _cut(site.reader.parameter, take_columns, follow)
    _state(site.reader.module, {"num_experts": len(experts), "intermediate_dim": width})
    if site.router is not None:
        _select(site.router, 0, torch.tensor(experts), follow)
        _state(site.router.module, {"num_experts": len(experts)})
    _state(site.sublayer, {"num_experts": len(experts)})


def _state_sizes(matrix: Matrix) -> None:
    sizes = {"in_features": matrix.inputs, "out_features": matrix.outputs, "nx": matrix.inputs, "nf": matrix.outputs}
    for module in (matrix.module, getattr(matrix.module, "base_layer", None)):
        if module is not None:
            _state(module, sizes)


def _state(module: nn.Module, sizes: Mapping[str, int]) -> None:
    for name, size in sizes.items():
        if isinstance(module.__dict__.get(name), int):
            setattr(module, name, size)


def _state_experts(sites: ModelSites) -> None:
    """The router's loss counts with the model's number of experts."""
    counts = {site.groups for site in sites if site.kind == "experts"}
    if len(counts) == 1:
        _state(sites.model, {"num_experts": counts.pop()})
    elif counts:
        balance_by_layer(sites.model)


def _drop_layers(layers: nn.ModuleList, kept: Iterable[int]) -> None:
    kept = set(kept)
    for number in reversed(range(len(layers))):
        if number not in kept:
            del layers[number]
    for number, layer in enumerate(layers):
        for module in layer.modules():
            if isinstance(module.__dict__.get("layer_idx"), int):
                module.layer_idx = number  # type: ignore[assignment]


def assign_units(site: Site, kept: SitePlan, repair: Repair) -> None:
    """Put a repair into a site that still has all its units, in place: the columns of units that go become zero.

    Args:
        site ([`Site`]): whole.
        kept ([`SitePlan`]): which units the repair is for.
        repair ([`Repair`]): without a bias.
    """
    columns = site.column_index(kept)
    full = torch.zeros(site.outputs, site.columns, dtype=repair.weight.dtype)
    full[:, columns] = repair.weight.cpu()
    parameter = site.reader.parameter
    with torch.no_grad():  # into the tensor that is there: DistributedDataParallel holds it
        parameter.copy_((full.T if site.reader.transposed else full).to(parameter.device, parameter.dtype))


def take_structure(sites: ModelSites, like: ModelSites) -> ModelSites:
    """Give a model the structure of another one of its family, in place; tensors of other shapes hold no values then.

    What loading a checkpoint of other sizes into a live model needs: parameters that stay are the same objects. Its
    `name_or_path` is empty afterwards.

    Args:
        sites ([`ModelSites`]): the model; its entries are stale afterwards.
        like ([`ModelSites`]): the structure, on the meta device or any other.

    Returns:
        [`ModelSites`]: the sites of the changed model.
    """
    layers, config, other = sites.layers, sites.model.config, like.model.config
    rename(sites.model, "")
    device = sites.device
    dtype = next(parameter.dtype for parameter in layers.parameters())
    del layers[len(like.layers) :]
    for number, layer in enumerate(like.layers):
        if number == len(layers):
            layers.append(_materialised(layer, device, dtype))
        _take_modules(layers[number], layer, device, dtype)
    architecture = sites.architecture
    config.per_layer_config = None
    for name in (*architecture.layer_lists, *architecture.layer_index_lists, architecture.layers_field):
        if hasattr(other, name):
            setattr(config, name, copy.deepcopy(getattr(other, name)))
    changed = find_sites(sites.model, architecture)
    _state_experts(changed)
    update_config(changed, _carried_biases(other))
    return changed


def _materialised(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(module).to_empty(device=device).to(dtype)


def _take_modules(module: nn.Module, like: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    own = dict(module.named_children())
    for name, child in like.named_children():
        if type(own.get(name)) is not type(child):
            setattr(module, name, _materialised(child, device, dtype).train(module.training))
        else:
            _take_modules(own[name], child, device, dtype)
    for name, parameter in list(module.named_parameters(recurse=False)):
        if getattr(like, name, None) is None:
            setattr(module, name, None)  # a bias that a repair had added
        elif parameter.shape != getattr(like, name).shape:
            _put(parameter, torch.empty(getattr(like, name).shape, device=parameter.device, dtype=parameter.dtype))
    for name, parameter in like.named_parameters(recurse=False):
        if getattr(module, name, None) is None:
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape, device=device, dtype=dtype)))
    _state(module, {name: value for name, value in vars(like).items() if type(value) is int})


def _carried_biases(config: Any) -> dict[int, list[str]]:
    provenance = config.__dict__.get(PROVENANCE_KEY) or {}
    return {int(layer): list(paths) for layer, paths in provenance.get("added_biases", {}).items()}
