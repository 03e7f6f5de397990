"""Torch-Pruning (arXiv 2301.12900), run from its release in our table: the same text, ratio and evaluation.

Its documented way for language models: separate query, key and value projections with their numbers of heads, query
heads and MLP channels removed by group-wise first-order Taylor importance, the same share in every layer. The hidden
width is kept (embedding, head and the matrices that write it are ignored), so that sizes count as ours do. Of the query
heads go as many per group as the asked ratio rounds to (it knows whole heads only); the share of channels that removes
the rest of the asked decoder parameters is found by bisection on copies.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from hf_adaprune.calibration import TokenBlocks
from hf_adaprune.errors import MissingDependencyError, UnsupportedModelError
from hf_adaprune.sites import find_sites

__all__ = ["prune_with_torch_pruning"]

CLOSE = 0.002  # of the decoder's parameters
ROUNDS = 10


def prune_with_torch_pruning(
    model: Any, blocks: TokenBlocks, ratio: float, gradient_samples: int, heads: bool = True
) -> tuple[Any, dict[str, Any]]:
    """A pruned copy of a model, and what a row says of it.

    Args:
        model (`PreTrainedModel`): the dense model; untouched.
        blocks ([`TokenBlocks`]): calibration windows.
        ratio (`float`): share of the decoder layers' parameters to remove.
        gradient_samples (`int`): windows for the gradients.
        heads (`bool`, *optional*, defaults to `True`): query heads go, too; else MLP channels alone.

    Raises:
        MissingDependencyError: torch-pruning is not installed.
        UnsupportedModelError: its release cannot prune this model.
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise MissingDependencyError(
            "the peer's rows need torch-pruning, which the extra `benchmarks` brings: pip install "
            "'hf_adaprune[benchmarks]'."
        ) from error
    started = time.perf_counter()
    gradients = _gradients(model, blocks.select(slice(0, gradient_samples)))
    seconds = {"gradients": round(time.perf_counter() - started, 3)}
    started = time.perf_counter()
    per_group = model.config.num_attention_heads // model.config.num_key_value_heads
    # A little less than the share of whole heads, which it rounds up. Where one query head per group would be left, its
    # release 1.6 takes the layer for one without groups and skips it, so two stay.
    whole = min(round(ratio * per_group), per_group - 2) if heads else 0
    share = max(0.0, (whole - 0.01) / per_group)

    def cut(channels: float) -> Any:
        own = copy.deepcopy(model).train(False)
        for name, parameter in own.named_parameters():
            parameter.grad = gradients[name].clone()
        return _cut(torch_pruning, own, blocks.input_ids[:1, :8], channels, share)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own deprecations
            found, channels = _at_ratio(cut, model, ratio)
            with torch.no_grad():
                found(input_ids=blocks.input_ids[:1, :8], use_cache=False)
    except Exception as error:  # whatever another project's code runs into is the row's result
        raise UnsupportedModelError(
            f"torch-pruning could not prune {type(model).__name__}: {type(error).__name__}: {error}"
        ) from error
    seconds["plan"] = round(time.perf_counter() - started, 3)
    removed = _decoder(model) - _decoder(found)
    return found, {
        "pruning_ratio": removed / _decoder(model),
        "parameters": find_sites(model).total_parameters - removed,
        "channel_ratio": channels,
        "query_heads": found.model.layers[0].self_attn.q_proj.out_features // found.model.layers[0].self_attn.head_dim,
        "repair": "none",
        "seconds": seconds,
    }


def _at_ratio(cut: Callable[[float], Any], model: Any, ratio: float) -> tuple[Any, float]:
    """The cut whose decoder is nearest to the asked size, and its share of channels."""
    low, high, best = 0.0, 1.0, None
    share = ratio
    for _ in range(ROUNDS):
        own = cut(share)
        found = 1 - _decoder(own) / _decoder(model)
        if best is None or abs(found - ratio) < abs(best[2] - ratio):
            best = own, share, found
        if abs(found - ratio) <= CLOSE:
            break
        low, high = (share, high) if found < ratio else (low, share)
        # Removal is nearly linear in the share, so aim by proportion while that stays inside the bracket.
        aimed = share * ratio / found if found > 0 else high
        share = aimed if low < aimed < high else (low + high) / 2
    assert best is not None
    return best[0], best[1]


def _decoder(model: Any) -> int:
    """Parameters of the decoder layers, by our own counting."""
    return sum(parameter.numel() for parameter in _layers(model).parameters())


def _layers(model: Any) -> Any:
    return model.model.layers


def _gradients(model: Any, blocks: TokenBlocks) -> dict[str, torch.Tensor]:
    """Gradients of the mean loss over windows, by parameter name."""
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
