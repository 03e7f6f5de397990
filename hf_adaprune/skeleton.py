"""A model of shapes alone: what there is to prune and how large it is, told before any weights are loaded."""

from __future__ import annotations

import copy
from typing import Any

import torch

from .sites import ModelSites, find_sites

__all__ = ["bound_skeleton"]


def bound_skeleton(config: Any, dtype: torch.dtype | None = None, **options: Any) -> ModelSites:
    """The sites of a model that has shapes and no weights, from its config alone.

    Args:
        config (`PreTrainedConfig`): the model's config; it is copied.
        dtype (`torch.dtype`, *optional*): of the weights; the config's where not given.
        **options: of `AutoModelForCausalLM.from_config`, such as `trust_remote_code`.

    Raises:
        UnsupportedModelError: the model cannot be pruned.
    """
    from transformers import AutoModelForCausalLM

    own = copy.deepcopy(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(own, dtype=dtype or own.dtype or torch.float32, **options)
    return find_sites(model)
