"""Moments of what readers read, from Gram matrices and weights, and the algebra that inverts them."""

from __future__ import annotations

import torch

from .errors import StatisticsError
from .gram_sums import summing_dtype
from .site import Site
from .statistics import Statistics

__all__ = ["cholesky", "covariance", "damped_inverse", "domain_mixture", "need", "ridge_diagonal", "second_moments"]


def need(value: torch.Tensor | None, what: str, site: Site) -> torch.Tensor:
    """What a pass has kept of a site.

    Raises:
        StatisticsError: it was not asked to keep it.
    """
    if value is None or not value.numel():
        raise StatisticsError(f"{site.name}: the statistics hold no {what}. Collect them with needs_of(config).")
    return value


def domain_mixture(statistics: Statistics, weights: torch.Tensor) -> torch.Tensor:
    """Weights of the Gram matrices `[gram domains]` that sample weights amount to: their mean per domain."""
    if len(statistics.gram_domains) == 1:
        return weights.float().mean()[None]
    counts = torch.bincount(statistics.domain, minlength=len(statistics.domains)).clamp(min=1)
    return torch.zeros(len(counts)).index_add(0, statistics.domain, weights.float()) / counts


def second_moments(
    site: Site, statistics: Statistics, weights: torch.Tensor, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Second moments `[columns, columns]`, mean `[columns]` and token count of the inputs of a reader.

    For experts the moments are `[experts, channels, channels]`, and the mean is zero.

    Args:
        site ([`Site`]): the site.
        statistics ([`Statistics`]): with Gram matrices.
        weights (`torch.Tensor`): sample weights `[samples]`.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float64`): of the moments.

    Raises:
        StatisticsError: no Gram matrices were kept.
    """
    kept = statistics.sites[site.name]
    gram = need(kept.gram, "Gram matrices", site)
    mixture = domain_mixture(statistics, weights)
    per_sample = mixture[statistics.domain if len(mixture) > 1 else torch.zeros_like(statistics.domain)]
    tokens = float((statistics.tokens * per_sample).sum())
    scaled = (mixture / max(tokens, 1.0)).to(gram.device)
    if len(gram) == 1:
        second = _wide(gram[0]).to(dtype) * float(scaled[0])
    else:
        second = _wide(torch.mv(gram.reshape(len(gram), -1).T, scaled).reshape(gram.shape[1:])).to(dtype)
    if site.kind == "experts":
        return second, torch.zeros(site.columns, dtype=dtype), tokens
    mean = (kept.sums * per_sample[:, None]).sum(0).double() / max(tokens, 1.0)
    return second, mean.to(second.device, dtype), tokens


def _wide(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix where the algebra of moments can be: on the CPU, where its own device has no float64."""
    return matrix if summing_dtype(matrix.device) == torch.float64 else matrix.cpu()


def covariance(site: Site, statistics: Statistics, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Centred covariance `[columns, columns]`, mean `[columns]` and token count of the inputs of a reader.

    Float64. For experts the second moments `[experts, channels, channels]`, not centred (they have no bias).

    Raises:
        StatisticsError: no Gram matrices were kept.
    """
    second, mean, tokens = second_moments(site, statistics, weights)
    return (second if site.kind == "experts" else second - torch.outer(mean, mean)), mean, tokens


def ridge_diagonal(matrix: torch.Tensor, damping: float, scale: str) -> torch.Tensor:
    """The ridge of every column, `[..., columns]`: `damping` times the mean, the median or its own diagonal.

    A trace of the mean is always added, so that dead columns stay invertible.
    """
    own = matrix.diagonal(dim1=-2, dim2=-1)
    mean = own.mean(-1, keepdim=True).clamp(min=1e-12)
    chosen = {"column": own, "mean": mean, "median": own.median(-1, keepdim=True).values}[scale]
    return (damping * chosen + 1e-6 * mean).expand_as(own)


def damped_inverse(matrix: torch.Tensor, damping: float, scale: str = "mean") -> torch.Tensor:
    """Inverse `[..., n, n]` of moments after adding a ridge (see [`ridge_diagonal`])."""
    ridge = torch.diag_embed(ridge_diagonal(matrix, damping, scale))
    return torch.cholesky_inverse(cholesky(matrix + ridge))


def cholesky(matrix: torch.Tensor) -> torch.Tensor:
    """Lower factor `[..., n, n]` of moments that rounding may have left a little short of positive definite.

    Sums of products are float32: with hardly any damping and fewer tokens than columns (or a column that is nearly
    constant) an eigenvalue can come out below zero. The diagonal then grows, tenfold each time, until a factor exists.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    scale = matrix.diagonal(dim1=-2, dim2=-1).abs().mean(-1, keepdim=True).clamp(min=1e-12)
    ridge = 1e-6
    while bool(failed.any()):
        factor, failed = torch.linalg.cholesky_ex(matrix + torch.diag_embed((ridge * scale).expand(matrix.shape[:-1])))
        ridge *= 10
        if ridge > 1e3:
            raise StatisticsError("moments of a reader's inputs are not finite. Check the calibration text.")
    return factor
