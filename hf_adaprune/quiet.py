"""A model and a screen that keep quiet for the time of a `with`, while something larger goes on."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from torch import nn
from transformers.utils import logging as transformers_logging

from .documents import eval_mode

__all__ = ["quiet_bars", "quiet_global_values", "quiet_model"]


@contextlib.contextmanager
def quiet_bars() -> Iterator[None]:
    """No progress bars of single stops for the time of a `with`, because something larger has a line of its own."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def quiet_global_values() -> Iterator[None]:
    """Silence a warning of every global read of a size that differs by layer; its own validation does such reads."""
    logger = logging.getLogger("transformers.integrations.heterogeneity.configuration_utils")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def quiet_model(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no parameter asks for gradients; restored at the end."""
    asks = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with eval_mode(model):
        model.requires_grad_(False)
        try:
            yield
        finally:
            for parameter, ask in asks.items():
                parameter.requires_grad_(ask)
