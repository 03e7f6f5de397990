"""Carries out a plan: the only file that assigns parameters. Works on the meta device too.

Tensors are swapped inside their `Parameter` objects, so optimisers, tied weights and hooks keep what they hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .architectures import Architecture
from .layers import SizedConfigView, SkippedAttention, SkippedMlp
from .model_config import PROVENANCE_KEY, drop_config_layers, head_dim_of, update_config
from .plan import PruningPlan, SitePlan
from .sites import Matrix, ModelSites, Site, find_sites, layer_sites

if TYPE_CHECKING:
    from .compensation import Repair

__all__ = ["add_bias", "apply_plan", "assign_layer", "assign_repair", "cast_parameters", "cut_layer", "skip_sublayers"]


def apply_plan(sites: ModelSites, plan: PruningPlan, repairs: Mapping[str, Repair] | None = None) -> ModelSites:
    """Cut a model in place, and regenerate its config.

    Args:
        sites ([`ModelSites`]): the model; its entries are stale afterwards.
        plan ([`PruningPlan`]): which units stay.
        repairs (`dict[str, Repair]`, *optional*): new weights of readers, by site name.

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
    for name, kept in plan.changed():
        site = sites.by_name[name]
        layer = sites.layers[site.layer]
        if kept.is_empty:
            kind = "attention" if site.kind == "attention" else "mlp"
            skip_sublayers(layer, site.layer, [kind], architecture, head_dim)
            biases[site.layer] = [path for path in biases.get(site.layer, []) if path != site.reader.path]
            continue
        _cut_site(site, kept)
        if name in repairs and assign_repair(site, repairs[name]):
            biases.setdefault(site.layer, []).append(site.reader.path)
    if plan.dropped_layers:
        kept_layers = plan.kept_layers()
        _drop_layers(sites.layers, kept_layers)
        drop_config_layers(config, architecture, kept_layers)
        biases = {new: biases[old] for new, old in enumerate(kept_layers) if old in biases}
    cut = find_sites(model, architecture)
    experts = {site.groups for site in cut if site.kind == "experts"}
    if len(experts) == 1:
        _state(model, {"num_experts": experts.pop()})  # the router's loss counts with it
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
        add_bias(site.reader.module, site.reader.outputs)
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
    """Give a projection that has none a zero bias `[outputs]`, in the dtype and on the device of its weight."""
    if getattr(module, "bias", None) is None:
        weight: Any = module.weight
        module.bias = nn.Parameter(torch.zeros(outputs, dtype=weight.dtype, device=weight.device))


def _replace(owner: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    module.train(owner.training)
    setattr(owner.get_submodule(parent), name, module)


def _put(parameter: nn.Parameter, tensor: torch.Tensor) -> None:
    parameter.grad = None  # belongs to the old values, and the next backward would add to its old shape
    parameter.data = tensor


def _assign(matrix: Matrix, weight: torch.Tensor) -> None:
    parameter = matrix.parameter
    stored = weight.T if matrix.transposed else weight
    # A tensor of its own: the repair stays the caller's.
    _put(parameter, stored.to(parameter.device, parameter.dtype, copy=True).contiguous())


def _select(matrix: Matrix, dimension: int, index: torch.Tensor) -> None:
    parameter = matrix.parameter
    index = index.to(parameter.device)
    if matrix.transposed:
        dimension = 1 - dimension
    _put(parameter, parameter.data.index_select(dimension, index).contiguous())


def _cut_site(site: Site, kept: SitePlan) -> None:
    if site.kind == "experts":
        _cut_experts(site, kept)
        return
    _select(site.reader, 1, site.column_index(kept))
    _state_sizes(site.reader)
    for number, writer in enumerate(site.writers):
        rows = site.row_index(number, kept)
        _select(writer, 0, rows)
        bias = writer.bias
        if bias is not None:
            _put(bias, bias.data.index_select(0, rows.to(bias.device)).contiguous())
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


def _cut_experts(site: Site, kept: SitePlan) -> None:
    experts, width = kept.kept_groups, kept.kept_per_group
    channels = torch.tensor(kept.kept).reshape(len(experts), width) % site.group_size
    gate_up, down = site.writers[0].parameter, site.reader.parameter
    rows = torch.cat([channels + copy * site.group_size for copy in range(site.copies)], dim=1)
    _put(gate_up, torch.stack([gate_up.data[e][r.to(gate_up.device)] for e, r in zip(experts, rows, strict=True)]))
    _put(down, torch.stack([down.data[e][:, c.to(down.device)] for e, c in zip(experts, channels, strict=True)]))
    _state(site.reader.module, {"num_experts": len(experts), "intermediate_dim": width})
    if site.router is not None:
        _select(site.router, 0, torch.tensor(experts))
        _state(site.router.module, {"num_experts": len(experts)})
    _state(site.sublayer, {"num_experts": len(experts)})


def _state_sizes(matrix: Matrix) -> None:
    _state(
        matrix.module,
        {"in_features": matrix.inputs, "out_features": matrix.outputs, "nx": matrix.inputs, "nf": matrix.outputs},
    )


def _state(module: nn.Module, sizes: Mapping[str, int]) -> None:
    for name, size in sizes.items():
        if isinstance(module.__dict__.get(name), int):
            setattr(module, name, size)


def _drop_layers(layers: nn.ModuleList, kept: Iterable[int]) -> None:
    kept = set(kept)
    for number in reversed(range(len(layers))):
        if number not in kept:
            del layers[number]
    for number, layer in enumerate(layers):
        for module in layer.modules():
            if isinstance(module.__dict__.get("layer_idx"), int):
                module.layer_idx = number  # type: ignore[assignment]


def _carried_biases(config: Any) -> dict[int, list[str]]:
    provenance = config.__dict__.get(PROVENANCE_KEY) or {}
    return {int(layer): list(paths) for layer, paths in provenance.get("added_biases", {}).items()}
