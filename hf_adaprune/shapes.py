"""How much of each layer an allocation wants to remove, up to a common factor: the published formulas, and a profile.

What the factor is, and how widths are rounded so that the budget holds, is `allocation`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from .config import PruningConfig
from .errors import ConfigError
from .offers import Offer, protected_layers
from .sites import ModelSites

__all__ = ["SHAPES", "Shape", "profile_factor"]

# A shape says how much of each offer goes, up to a common factor that the budget decides.
Shape = Callable[[ModelSites, PruningConfig, list[Offer], int, "torch.Tensor | None"], list[float]]


def profile_factor(sites: ModelSites, config: PruningConfig) -> Callable[[int, str], float]:
    """The profile as a factor on scores, by layer and kind of site (`attention`, `mlp`, `experts`, `layer`).

    Args:
        sites ([`ModelSites`]): the model.
        config ([`PruningConfig`]): with `allocation.profile` and `allocation.attention_balance`.
    """
    points = config.allocation.profile

    def factor(layer: int, kind: str) -> float:
        value = _interpolate(points, layer, len(sites.layers)) if points else 0.0
        return math.exp(value + (config.allocation.attention_balance if kind == "attention" else 0.0))

    return factor


def _interpolate(points: Sequence[float], layer: int, layers: int) -> float:
    if len(points) == 1 or layers == 1:
        return points[0]
    position = layer / (layers - 1) * (len(points) - 1)
    left = min(int(position), len(points) - 2)
    return points[left] + (position - left) * (points[left + 1] - points[left])


def _even(sites: ModelSites, config: PruningConfig, offers: list[Offer], target: int, cosine: object) -> list[float]:
    return [1.0] * len(offers)


def _logarithmic(
    sites: ModelSites, config: PruningConfig, offers: list[Offer], target: int, cosine: object
) -> list[float]:
    """SlimGPT's incremental ratio (2412.18110): `r_i = r_0 + (r_last - r_0) ln(i + 1) / ln(L)`."""
    layers = len(sites.layers)
    ratio = target / max(1, sites.decoder_parameters)
    first = config.allocation.first_ratio if config.allocation.first_ratio is not None else ratio / 3
    mean = math.lgamma(layers + 1) / (layers * math.log(layers)) if layers > 1 else 1.0
    last = first + (ratio - first) / mean
    rise = [math.log(layer + 1) / math.log(max(2, layers)) for layer in range(layers)]
    return [max(first + (last - first) * rise[offer.site.layer], 1e-6) for offer in offers]


def _profile(sites: ModelSites, config: PruningConfig, offers: list[Offer], target: int, cosine: object) -> list[float]:
    factor = profile_factor(sites, config)
    ratio = min(max(target / max(1, sites.decoder_parameters), 1e-3), 1 - 1e-3)
    odds = ratio / (1 - ratio)
    shares = []
    for offer in offers:
        own = odds / factor(offer.site.layer, offer.site.kind)
        shares.append(own / (1 + own))
    return shares


def _similarity(
    sites: ModelSites, config: PruningConfig, offers: list[Offer], target: int, cosine: torch.Tensor | None
) -> list[float]:
    """Adapt-Pruner's map (2502.03460): `S_l = S_base - A I_l`, importance = negative cosine, centred, scaled to 1.

    The published schedule adds increments of 0.02 to the base and subtracts A times the importance at each; the same
    layers' importance over all increments amounts to one step with A times their number.
    """
    if cosine is None:
        raise ConfigError("allocation `similarity` needs the layers' cosines; collect them with Needs(cosine=True).")
    protected = protected_layers(sites, config)
    own = [layer for layer in range(len(sites.layers)) if layer not in protected]
    importance = -torch.atleast_2d(cosine).double()
    centred = importance - importance[:, own].mean(1, keepdim=True)
    centred = (centred / centred[:, own].abs().amax(1, keepdim=True).clamp(min=1e-12)).mean(0)
    base = target / max(1, sum(sites.layer_parameters[layer] for layer in own))
    amplitude = config.allocation.amplitude * base / 0.02
    return [max(base - amplitude * float(centred[offer.site.layer]), 1e-6) for offer in offers]


def _given(sites: ModelSites, config: PruningConfig, offers: list[Offer], target: int, cosine: object) -> list[float]:
    """Shares as they are asked for; 0 where none is, which `allocation` leaves alone while the named sites can give."""
    given = config.allocation.ratios
    unknown = sorted(set(given) - {site.name for site in sites})
    if unknown:
        raise ConfigError(f"`allocation.ratios` names sites that the model lacks: {', '.join(unknown[:3])}.")
    return [given.get(offer.site.name, 0.0) for offer in offers]


SHAPES: dict[str, Shape] = {
    "uniform": _even,
    "flap": _even,
    "logarithmic": _logarithmic,
    "profile": _profile,
    "similarity": _similarity,
    "ratios": _given,
}
