"""What a model shows on the way: hidden states in its middle, and what a reader reads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .experts import tapped_experts
from .quiet import quiet_model
from .site import Site
from .sites import ModelSites
from .token_blocks import TokenBlocks

__all__ = ["Enough", "mean_hidden_states", "watched_inputs"]

_BATCH_TOKENS = 4096


class Enough(Exception):
    """Stops a forward pass once it has shown what it was run for."""


@torch.no_grad()
def mean_hidden_states(sites: ModelSites, blocks: TokenBlocks) -> torch.Tensor:
    """Mean hidden state of every window before the middle layer, over its tokens that are no padding.

    Half a forward pass per window. `output_hidden_states=True` would run all of it, and leave hooks of transformers in
    the model for good.

    Args:
        sites ([`ModelSites`]): the model.
        blocks ([`TokenBlocks`]): windows.

    Returns:
        `torch.Tensor` of shape `[windows, hidden size]`: float64, on the CPU.
    """
    states: list[torch.Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])
        raise Enough

    means = []
    middle = sites.layers[len(sites.layers) // 2]
    with quiet_model(sites.model), contextlib.ExitStack() as stack:
        stack.callback(middle.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for batch in blocks.batches(max(1, _BATCH_TOKENS // blocks.input_ids.shape[1])):
            mask = batch.attention_mask
            inputs: dict[str, Any] = {"input_ids": batch.input_ids.to(sites.device), "use_cache": False}
            if not mask.all():
                inputs["attention_mask"] = mask.long().to(sites.device)
            with contextlib.suppress(Enough):
                sites.model.base_model(**inputs)
            hidden = states.pop().cpu().double()  # in this order: Apple's GPUs have no float64
            means.append((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1))
    return torch.cat(means)


@contextlib.contextmanager
def watched_inputs(sites: ModelSites, site: Site, sink: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Hand the rows that a reader reads to a sink while the context is open.

    Args:
        sites ([`ModelSites`]): the model.
        site ([`Site`]): whose reader.
        sink (`Callable`): gets the expert's number (0 elsewhere) and rows `[tokens, columns]`; those of experts are
            weighted by the gate.
    """

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        sink(0, args[0].detach().reshape(-1, site.columns))

    def tap(
        expert: int, tokens: torch.Tensor, channels: torch.Tensor, gates: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        sink(expert, channels.detach() * gates.detach()[:, None])
        return channels, None

    if site.kind == "experts":
        with tapped_experts(sites.model.config, {site.reader.module: tap}):
            yield
        return
    handle = site.reader.module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
