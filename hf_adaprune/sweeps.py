"""Which calibration windows run together, in which order, with gradients or without, and by which process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .token_blocks import TokenBlocks
from .workers import Alone

__all__ = ["Sweep", "spread_samples", "sweeps_of"]

FORWARD_TOKENS = 2048  # per batch: large enough for efficient products, small beside the Gram matrices


@dataclass(frozen=True)
class Sweep:
    """A part of the pass after which the processes meet.

    Args:
        own (`list[torch.Tensor]`): indices of windows of one domain each, that this process runs.
        everywhere (`int`): how many such batches all processes have.
        domain (`int`, *optional*): of a backward sweep.
    """

    own: list[torch.Tensor]
    everywhere: int
    domain: int | None = None


def sweeps_of(blocks: TokenBlocks, gradient_index: torch.Tensor, workers: Alone) -> Iterator[Sweep]:
    """A backward sweep over some windows, domain by domain, then a forward sweep over all, without the head.

    Two of them, so that the activations a backward pass keeps and the Gram matrices, which only the forward sweep
    fills, are never in memory together. Of several processes each takes every n-th batch of the whole sweep: a window
    runs in the batch that it has with one process, and so its numbers do not depend on how many there are.

    Args:
        blocks ([`TokenBlocks`]): calibration windows.
        gradient_index (`torch.Tensor` of shape `[windows with gradients]`): indices of those that go backward.
        workers ([`Alone`]): processes that share the windows.

    Returns:
        `Iterator[Sweep]`: with the batches of this process.
    """
    with_gradients = torch.zeros(len(blocks), dtype=torch.bool)
    with_gradients[gradient_index] = True
    turn = 0
    for domain in range(len(blocks.domains)):
        chosen = torch.where((blocks.domain == domain) & with_gradients)[0]
        # One window at a time keeps the logits of a backward pass small, and samples apart for weight gradients.
        batches = chosen.split(1) if len(chosen) else ()
        own = [batch for place, batch in enumerate(batches, turn) if place % workers.count == workers.rank]
        turn += len(batches)
        yield Sweep(own, len(batches), domain)
    size = max(1, FORWARD_TOKENS // blocks.input_ids.shape[1])
    forward: list[torch.Tensor] = []
    for domain in range(len(blocks.domains)):
        chosen = torch.where(blocks.domain == domain)[0]
        forward += chosen.split(size) if len(chosen) else ()
    yield Sweep(forward[workers.rank :: workers.count], len(forward))


def spread_samples(domain: torch.Tensor, count: int) -> torch.Tensor:
    """The first samples of every domain in turn.

    Args:
        domain (`torch.Tensor` of shape `[samples]`): of every sample.
        count (`int`): how many at most.

    Returns:
        `torch.Tensor` of shape `[chosen]`: indices of samples, ascending.
    """
    turns = [(int((domain[:sample] == own).sum()), int(own), sample) for sample, own in enumerate(domain)]
    return torch.tensor(sorted(sample for _, _, sample in sorted(turns)[:count]), dtype=torch.long)
