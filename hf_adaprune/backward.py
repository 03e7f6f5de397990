"""A backward pass of the next-token loss in little memory."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

__all__ = ["loss_gradient", "narrow_saved_tensors"]

_LOGIT_ROWS = 64  # positions whose float32 logits exist at the same time


def narrow_saved_tensors(dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """In a half-precision model, keep what backward needs of float32 (norms compute in it) in bfloat16.

    Half of the memory of a backward pass goes there; the activations these tensors came from were no wider.

    Args:
        dtype (`torch.dtype`): of the model's weights.

    Returns:
        `AbstractContextManager`: to run the forward pass in.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return contextlib.nullcontext()

    def pack(tensor: torch.Tensor) -> tuple[torch.Tensor, bool]:
        narrow = tensor.dtype == torch.float32 and tensor.dim() > 2
        return (tensor.to(torch.bfloat16) if narrow else tensor), narrow

    def unpack(packed: tuple[torch.Tensor, bool]) -> torch.Tensor:
        return packed[0].float() if packed[1] else packed[0]

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def loss_gradient(logits: torch.Tensor, ids: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """Gradient of the summed next-token loss at the logits, a few positions at a time.

    Args:
        logits (`torch.Tensor` of shape `[batch, tokens, vocabulary]`): of the model, detached.
        ids (`torch.Tensor` of shape `[batch, tokens]`): the windows.
        scored (`torch.Tensor` of shape `[batch, tokens - 1]`): bool; False where the next token is padding.

    Returns:
        `torch.Tensor` of shape `[batch, tokens, vocabulary]`: in the dtype of the logits.
    """
    gradient = torch.empty_like(logits)
    gradient[:, -1] = 0
    everything = bool(scored.all())
    for sample in range(len(ids)):
        for start in range(0, ids.shape[1] - 1, _LOGIT_ROWS):
            stop = min(start + _LOGIT_ROWS, ids.shape[1] - 1)
            part = torch.softmax(logits[sample, start:stop], dim=-1, dtype=torch.float32)
            part[torch.arange(stop - start, device=part.device), ids[sample, start + 1 : stop + 1]] -= 1
            if not everything:
                part *= scored[sample, start:stop, None]
            gradient[sample, start:stop] = part
    return gradient
