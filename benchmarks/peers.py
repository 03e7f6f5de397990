"""Torch-Pruning (arXiv 2301.12900), run from its release in our table: the same text, ratio and evaluation.

Its documented way for language models: separate query, key and value projections with their numbers of heads, query
heads and MLP channels removed by group-wise first-order Taylor importance, the same share in every layer. The hidden
width is kept (embedding, head and the matrices that write it are ignored), so that sizes count as ours do. Of the query
heads go as many per group as the asked ratio rounds to (it knows whole heads only); its ratio of channels is the one
that removes the rest of the asked decoder parameters, by our own counting.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from hf_adaprune.errors import MissingDependencyError, UnsupportedModelError
from hf_adaprune.sites import find_sites
from hf_adaprune.token_blocks import TokenBlocks

__all__ = ["load_torch_pruning", "loss_gradients", "prune_with_torch_pruning"]


def load_torch_pruning() -> Any:
    """The library.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise MissingDependencyError(
            "the peer's rows need torch-pruning, which the extra `benchmarks` brings: pip install "
            "'hf_adaprune[benchmarks]'."
        ) from error
    return torch_pruning


def prune_with_torch_pruning(
    model: Any, ids: torch.Tensor, ratio: float, gradients: Mapping[str, torch.Tensor], heads: bool = True
) -> tuple[Any, dict[str, Any]]:
    """A pruned copy of a model, and what a row says of it.

    Args:
        model (`PreTrainedModel`): the dense model; untouched.
        ids (`torch.Tensor` of shape `[1, tokens]`): a few tokens, to trace the model with.
        ratio (`float`): share of the decoder layers' parameters to remove.
        gradients (`dict[str, torch.Tensor]`): by parameter, see [`loss_gradients`].
        heads (`bool`, *optional*, defaults to `True`): query heads go, too; else MLP channels alone.

    Raises:
        MissingDependencyError: torch-pruning is not installed.
        UnsupportedModelError: its release cannot prune this model.
    """
    torch_pruning = load_torch_pruning()
    started = time.perf_counter()
    try:
        channels, head_share = _shares(model, ratio, heads)
        found = copy.deepcopy(model).train(False)
        for name, parameter in found.named_parameters():
            parameter.grad = gradients[name].clone()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own deprecations
            _cut(torch_pruning, found, ids, channels, head_share)
        with torch.no_grad():
            found(input_ids=ids.to(found.device), use_cache=False)
    except Exception as error:  # whatever another project's code runs into is the row's result
        raise UnsupportedModelError(
            f"torch-pruning could not prune {type(model).__name__}: {type(error).__name__}: {error}"
        ) from error
    seconds = {"plan": round(time.perf_counter() - started, 3)}
    removed = _decoder(model) - _decoder(found)
    return found, {
        "pruning_ratio": removed / _decoder(model),
        "parameters": find_sites(model).total_parameters - removed,
        "channel_ratio": channels,
        "query_heads": found.model.layers[0].self_attn.q_proj.out_features // found.model.layers[0].self_attn.head_dim,
        "repair": "none",
        "seconds": seconds,
    }


def _shares(model: Any, ratio: float, heads: bool) -> tuple[float, float]:
    """Shares of channels and of query heads, the same in every layer, that remove the asked decoder parameters."""
    sites = find_sites(model)
    attention, mlp = ([site for site in sites if site.kind == kind] for kind in ("attention", "mlp"))
    per_group, width = attention[0].group_size, mlp[0].group_size * mlp[0].groups
    # Where one query head per group would be left, its release 1.6 takes the layer for one without groups and skips it.
    whole = min(round(ratio * per_group), per_group - 2) if heads else 0
    left = ratio * sites.decoder_parameters
    left -= max(0, whole) * sum(site.groups * site.unit_parameters("query_head") for site in attention)
    channels = max(0, round(left / sum(site.unit_parameters("channel") for site in mlp)))
    if channels >= width:
        raise UnsupportedModelError(f"all {width} channels of every MLP would go at a ratio of {ratio:g}.")
    # It rounds both up, so each is a little less than the share of whole ones.
    return max(0.0, (channels - 0.5) / width), max(0.0, (whole - 0.01) / per_group)


def _decoder(model: Any) -> int:
    """Parameters of the decoder layers, by our own counting."""
    return sum(parameter.numel() for parameter in _layers(model).parameters())


def _layers(model: Any) -> Any:
    return model.model.layers


def loss_gradients(model: Any, blocks: TokenBlocks) -> dict[str, torch.Tensor]:
    """Gradients of the mean loss over windows, by parameter name; they serve every ratio.

    Args:
        model (`PreTrainedModel`): the dense model; untouched.
        blocks ([`TokenBlocks`]): calibration windows.
    """
    own = copy.deepcopy(model).train(False)
    own.requires_grad_(True)
    device = own.get_input_embeddings().weight.device
    for batch in blocks.batches(1):
        ids = batch.input_ids.to(device)
        (own(input_ids=ids, labels=ids, use_cache=False).loss / len(blocks)).backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in own.named_parameters()
    }


def _cut(torch_pruning: Any, model: Any, ids: torch.Tensor, channels: float, head_share: float) -> Any:
    """Prune a copy that holds gradients, as the project's example for language models does."""
    model.requires_grad_(True)
    attention_kind = model.config._attn_implementation
    # Its graph sees which query heads share a key head only where keys are repeated, which fused kernels need not do.
    model.set_attn_implementation("eager")
    config, kept, heads = model.config, [model.get_input_embeddings(), model.get_output_embeddings()], {}
    for layer in _layers(model):
        attention, mlp = layer.self_attn, layer.mlp
        heads[attention.q_proj] = config.num_attention_heads
        heads[attention.k_proj] = heads[attention.v_proj] = config.num_key_value_heads
        kept += [attention.o_proj, mlp.down_proj]
    pruner = torch_pruning.pruner.BasePruner(
        model,
        example_inputs=ids.to(kept[0].weight.device),
        forward_fn=lambda own, given: own(input_ids=given, use_cache=False).logits,
        importance=torch_pruning.importance.GroupTaylorImportance(),
        global_pruning=False,
        pruning_ratio=channels,
        ignored_layers=kept,
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=head_share,
    )
    for group in pruner.step(interactive=True):
        group.prune()
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    for layer in _layers(model):
        attention = layer.self_attn
        queries = attention.q_proj.out_features // attention.head_dim
        attention.num_key_value_groups = queries // (attention.k_proj.out_features // attention.head_dim)
    model.set_attn_implementation(attention_kind)
    return model
