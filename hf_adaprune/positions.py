"""Windows against the positions that a model has learned embeddings for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from .errors import CalibrationError
from .token_blocks import TokenBlocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["check_lengths", "check_windows", "learned_positions"]


def learned_positions(model: PreTrainedModel) -> int | None:
    """For how many positions a model has learned embeddings; `None` for rotary positions, which have no end."""
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # OPT's first rows are for padding.
    rows = {
        module.num_embeddings - int(getattr(module, "offset", 0))
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding) and module is not model.get_input_embeddings()
    }
    return stated if stated in rows else None


def check_lengths(model: PreTrainedModel, lengths: Mapping[str, int]) -> None:
    """Refuse to cut windows that learned position embeddings have no rows for.

    Args:
        model (`PreTrainedModel`): what will read them, on the meta device too.
        lengths (`dict[str, int]`): tokens per window, by the field that says so.

    Raises:
        CalibrationError: with the field and the limit.
    """
    positions = learned_positions(model)
    for name, length in lengths.items():
        if positions is not None and length > positions:
            raise CalibrationError(
                f"`{name}` asks for windows of {length:,} tokens, and this {model.config.model_type} model has "
                f"learned {positions:,} positions. Lower it to at most {positions}."
            )


def check_windows(model: PreTrainedModel, blocks: TokenBlocks, advice: str = "Cut them shorter") -> None:
    """Refuse windows that learned position embeddings have no rows for, before the model fails on them.

    Args:
        model (`PreTrainedModel`): what will read them.
        blocks ([`TokenBlocks`]): the windows.
        advice (`str`, *optional*): what to do, up to the number of tokens that fit.

    Raises:
        CalibrationError: with the limit.
    """
    longest = int(blocks.attention_mask.sum(dim=1).max()) if len(blocks) else 0
    if longest <= (getattr(model.config.get_text_config(), "max_position_embeddings", None) or longest):
        return  # without a look at every module
    positions = learned_positions(model)
    if positions is not None:
        raise CalibrationError(
            f"windows hold up to {longest:,} tokens, and this {model.config.model_type} model has learned "
            f"{positions:,} positions. {advice}, to at most {positions} tokens."
        )
