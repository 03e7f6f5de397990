"""How fast this machine is at what a run does: a layer's forward pass, sums of Gram matrices, float64 products."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .gram_sums import STRIP, exact_products
from .site import Site
from .sites import ModelSites

__all__ = ["Speed", "gram_width", "layer_sizes", "measure_speed"]

_LENGTH, _WIDEST, _HEAD = 512, 1024, 64  # of what is timed


@dataclass(frozen=True)
class Speed:
    """Arithmetic of this machine, in floating-point operations per second.

    Args:
        model (`float`): a forward pass of the model, all that is not matrix products included.
        gram (`float`): sums of Gram matrices, which are products of float32 numbers.
        double (`float`): matrix products in float64, which repairs and scores are made of.
    """

    model: float
    gram: float
    double: float


def measure_speed(sites: ModelSites, sequence_length: int, seconds: float = 0.4) -> Speed:
    """Time this machine's CPU for a moment: a forward pass of one decoder layer of the model's widths, and products.

    Machines differ in what attention and norms take beside the products (those of bfloat16 above all), and so do
    widths; so a layer is timed and not a product. It is a Llama's, whatever the model's family, of random weights and
    at most 1,024 wide.

    Args:
        sites ([`ModelSites`]): the model, live or from [`bound_skeleton`](hf_adaprune.skeleton.bound_skeleton).
        sequence_length (`int`): tokens of a window, of which at most 512 are read.
        seconds (`float`, *optional*, defaults to 0.4): how long to measure, beside four calls of everything.
    """
    with torch.device("cpu"):
        forward = _forward_speed(sites, min(sequence_length, _LENGTH), seconds / 2)
        matrix = torch.full((_LENGTH, _LENGTH), 0.5, dtype=torch.float64)
        double = 2 * _LENGTH**3 / _median_seconds(lambda: matrix @ matrix, seconds / 4)
        return Speed(forward, _gram_speed(sites, seconds / 4), double)


def layer_sizes(sites: ModelSites) -> dict[str, int]:
    """Sizes of a Llama's layer that stands for the widest of a model's, as fields of its config, at most 1,024 wide.

    Args:
        sites ([`ModelSites`]): the model, on the meta device too.
    """
    hidden = max(site.outputs for site in sites)
    shrink = min(1.0, _WIDEST / hidden)
    attention = [site for site in sites if site.kind == "attention"]
    widest = max(attention, key=lambda site: site.columns, default=None)
    # Rotation halves a head.
    head = _HEAD if widest is None else widest.columns_per_unit + widest.columns_per_unit % 2
    groups = round((hidden / head if widest is None else widest.groups) * shrink) or 1
    heads = groups * (1 if widest is None else widest.group_size)
    others = (
        site.group_size * (sites.top_k(site) or 1) if site.kind == "experts" else site.columns
        for site in sites
        if site.kind != "attention"
    )
    return {
        # A Llama's heads divide its hidden size.
        "hidden_size": (round(hidden * shrink / heads) or 1) * heads,
        "intermediate_size": round(max(others, default=hidden) * shrink) or 1,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head,
    }


def _forward_speed(sites: ModelSites, length: int, seconds: float) -> float:
    from transformers import LlamaConfig, LlamaModel

    sizes: dict[str, Any] = {"num_hidden_layers": 1, "vocab_size": 2, **layer_sizes(sites)}
    config = LlamaConfig(pad_token_id=None, bos_token_id=None, eos_token_id=None, **sizes)
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        layer = LlamaModel(config).to(next(sites.model.parameters()).dtype).eval()
        weights = sum(parameter.numel() for parameter in layer.layers.parameters())
        attention = 2 * length * sizes["num_attention_heads"] * sizes["head_dim"]
        # Short windows are read many at a time.
        ids = torch.zeros(max(1, _LENGTH // length), length, dtype=torch.long)
        return ids.numel() * (2 * weights + attention) / _median_seconds(lambda: layer(ids, use_cache=False), seconds)


def _gram_speed(sites: ModelSites, seconds: float) -> float:
    """Of the last strip of the widest matrix, summed as the pass sums it."""
    widest = max(sites, key=gram_width)
    dtype = torch.float32 if widest.kind == "experts" else next(sites.model.parameters()).dtype
    columns = min(2 * _WIDEST, gram_width(widest))
    rows = torch.full((4 * _LENGTH, columns), 0.5, dtype=torch.float32)
    sums = torch.zeros(min(STRIP, columns), columns, dtype=torch.float64)

    def add() -> None:
        with exact_products(dtype):
            sums.add_(rows[:, : len(sums)].T @ rows)

    return 2 * len(rows) * sums.numel() / _median_seconds(add, seconds)


def _median_seconds(call: Callable[[], Any], seconds: float) -> float:
    """Of several calls; the first compiles kernels and does not count."""
    call()
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < seconds:
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def gram_width(site: Site) -> int:
    """Columns of a site's Gram matrix, or of each of its experts'."""
    return site.group_size if site.kind == "experts" else site.columns
