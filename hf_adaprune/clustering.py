"""Kinds of calibration text that nobody has named: clusters of windows in activation space become the domains."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from .errors import CalibrationError
from .sites import ModelSites
from .token_blocks import TokenBlocks
from .tracing import mean_hidden_states

if TYPE_CHECKING:
    import numpy as np

__all__ = ["cluster_domains"]

logger = logging.getLogger(__name__)

STARTS = 10  # of k-means; the best counts


def cluster_domains(sites: ModelSites, blocks: TokenBlocks, clusters: int, seed: int) -> TokenBlocks:
    """The same windows, with clusters as their domains.

    K-means on every window's mean hidden state in the middle of the model, each dimension standardised (a massive
    activation would decide alone otherwise).

    Args:
        sites ([`ModelSites`]): the dense model; left as it was.
        blocks ([`TokenBlocks`]): calibration windows.
        clusters (`int`): how many domains; every one gets at least one window.
        seed (`int`): of the starts of k-means.

    Returns:
        [`TokenBlocks`]: the windows in their order; domains by size, the largest first, each named after the source
            that most of its windows are from.

    Raises:
        CalibrationError: there are not more windows than clusters, or fewer different ones; hidden states are not
            finite.
    """
    if clusters >= len(blocks):
        raise CalibrationError(
            f"{len(blocks)} calibration windows cannot form {clusters} clusters: there should be more windows than "
            "clusters. Lower calibration.clusters, raise calibration.samples, or give more text."
        )
    features = _standardized(mean_hidden_states(sites, blocks))
    if not torch.isfinite(features).all():
        raise CalibrationError("hidden states of the calibration text are not finite. Load the model in float32.")
    different = len(features.unique(dim=0))
    if different < clusters:
        raise CalibrationError(
            f"{clusters} clusters were asked for, and only {different} of {len(blocks)} calibration windows differ. "
            "Lower calibration.clusters, or give other text."
        )
    labels = torch.from_numpy(_k_means(features.numpy(), clusters, seed)).long()
    sizes = torch.bincount(labels, minlength=clusters)
    first = [int((labels == label).nonzero()[0]) for label in range(clusters)]
    order = sorted(range(clusters), key=lambda label: (-int(sizes[label]), first[label]))
    rank = torch.tensor([order.index(label) for label in range(clusters)])
    domain = rank[labels]
    names = tuple(_name(number, blocks, domain) for number in range(clusters))
    logger.info("calibration windows by cluster: %s", dict(zip(names, sizes[order].tolist(), strict=True)))
    return TokenBlocks(blocks.input_ids, blocks.attention_mask, domain, names)


def _standardized(features: torch.Tensor) -> torch.Tensor:
    centred = features - features.mean(0)
    scale = centred.square().mean(0).sqrt()
    # What does not vary but by rounding must not be blown up to noise.
    constant = scale <= 1e-6 * features.abs().amax(0)
    return torch.where(~constant, centred / scale.clamp(min=1e-300), 0.0)


def _k_means(features: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans

    labels: np.ndarray = KMeans(n_clusters=clusters, n_init=STARTS, random_state=seed).fit_predict(features)
    return labels


def _name(number: int, blocks: TokenBlocks, domain: torch.Tensor) -> str:
    sources = torch.bincount(blocks.domain[domain == number], minlength=len(blocks.domains))
    share = float(sources.max() / sources.sum())
    return f"cluster {number + 1} ({blocks.domains[int(sources.argmax())]} {100 * share:.0f} %)"
