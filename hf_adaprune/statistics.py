"""What calibration leaves behind: sums over tokens, per sample where that is small and per domain where it is not.

So a weighting of samples is a matrix-vector product later and never another pass:

- per sample and reader column: sums, sums of squares, and by segments of 64 tokens the signed first-order term
  (activation times its gradient, which summed over a sample equals the gradient-weight product of the reading matrix
  summed over the column);
- per sample and reader output: the squared gradient, which puts errors of different layers into loss units;
- per domain: Gram matrices of the reader's inputs;
- per domain and matrix row: element-wise Taylor terms, where a metric asks for them (they need weight gradients).

Everything is float32, whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .errors import StatisticsError

__all__ = ["SEGMENT", "Needs", "SiteStatistics", "Statistics", "mean_cosine", "spread_weights", "standing_weights"]

SEGMENT = 64  # tokens; first-order terms are summed over segments: more draws of their scatter than whole windows give


@dataclass(frozen=True)
class Needs:
    """What a pass has to keep.

    Args:
        gram (`bool`): Gram matrices.
        gradients (`bool`): first-order terms and squared output gradients, on `gradient_samples` samples spread over
            the domains, which stand for the others of their domain.
        elements (`bool`): element-wise Taylor terms, on the same samples.
        cosine (`bool`): cosine between input and output of every decoder layer.
        per_domain (`bool`): one Gram matrix per domain instead of one in all.
        squares (`bool`): sums of squares per sample.
    """

    gram: bool = False
    gradients: bool = False
    elements: bool = False
    cosine: bool = False
    per_domain: bool = False
    squares: bool = False

    def __or__(self, other: Needs) -> Needs:
        """Both together."""
        return Needs(*(getattr(self, name) or getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True, eq=False)
class SiteStatistics:
    """Statistics of one site. Columns are the reader's, in its own order; for experts those of all experts in a row.

    Args:
        sums (`torch.Tensor`): activations summed over tokens, `[samples, columns]`; for experts weighted by the gate.
        counts (`torch.Tensor`): tokens, `[samples]`; for experts the tokens each expert served, `[samples, experts]`.
        squares (`torch.Tensor`, *optional*): their squares, `[samples, columns]`.
        gram (`torch.Tensor`, *optional*): sums of products, `[domains, columns, columns]`; for experts
            `[domains, experts, channels, channels]`.
        first_order (`torch.Tensor`, *optional*): activation times gradient of the summed loss,
            `[gradient samples, segments, columns]`.
        output_gradients (`torch.Tensor`, *optional*): squared gradient at the reader's outputs,
            `[gradient samples, outputs]`.
        elements (`dict[str, torch.Tensor]`, *optional*): by matrix path, `[domains, 4, rows]` (for the reader:
            columns) of `elements.ELEMENT_TERMS`, of the mean gradient over the domain's samples.
    """

    sums: torch.Tensor
    counts: torch.Tensor
    squares: torch.Tensor | None = None
    gram: torch.Tensor | None = None
    first_order: torch.Tensor | None = None
    output_gradients: torch.Tensor | None = None
    elements: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of a model over a calibration pool.

    Args:
        sites (`dict[str, SiteStatistics]`): by site name.
        tokens (`torch.Tensor`): unpadded tokens per sample, `[samples]`.
        domain (`torch.Tensor`): domain of each sample, `[samples]`.
        domains (`tuple[str, ...]`): their names.
        gram_domains (`tuple[str, ...]`): what the first dimension of Gram matrices counts: the domains, or `("all",)`.
        gradient_index (`torch.Tensor`): samples that had a backward pass, `[gradient samples]`.
        cosine (`torch.Tensor`, *optional*): summed cosine of input and output per decoder layer, `[samples, layers]`.
        digest (`str`): digest of the token blocks.
        storage (*optional*): owns the folder of Gram matrices on disk, where the caller gave none.
    """

    sites: Mapping[str, SiteStatistics]
    tokens: torch.Tensor
    domain: torch.Tensor
    domains: tuple[str, ...]
    gram_domains: tuple[str, ...]
    gradient_index: torch.Tensor
    cosine: torch.Tensor | None
    digest: str
    storage: Any = field(default=None, repr=False)

    @property
    def shares(self) -> tuple[float, ...]:
        """Every domain's share of the windows: the domain weights that leave all windows alike."""
        counts = torch.bincount(self.domain, minlength=len(self.domains))
        return tuple((counts.double() / len(self.domain)).tolist())

    def sample_weights(self, domain_weights: tuple[float, ...] = ()) -> torch.Tensor:
        """One weight per sample, `[samples]`: a domain's weight shared by its samples, with mean 1 over the pool."""
        return spread_weights(self.domain, len(self.domains), domain_weights)


def spread_weights(domain: torch.Tensor, domains: int, domain_weights: tuple[float, ...]) -> torch.Tensor:
    """One weight per sample, `[samples]`, with mean 1: a domain's weight shared by its samples; ones without weights.

    Args:
        domain (`torch.Tensor`): domain of each sample, `[samples]`.
        domains (`int`): how many there are.
        domain_weights (`tuple[float, ...]`): one per domain, or none.

    Raises:
        StatisticsError: another number of weights.
    """
    if not domain_weights:
        return torch.ones(len(domain))
    if len(domain_weights) != domains:
        raise StatisticsError(
            f"there should be one domain weight for each of the {domains} domains of the windows. Found "
            f"{len(domain_weights)}. Set calibration.domain_weights for these windows, or leave it out."
        )
    counts = torch.bincount(domain, minlength=domains).clamp(min=1)
    share = torch.tensor(domain_weights) / sum(domain_weights)
    return (share / counts)[domain] * len(domain)


def standing_weights(weights: torch.Tensor, domain: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Weights of the samples that stand for all, `[some samples]`: a domain weighs as much among them as among all.

    What all samples of a domain weigh is shared by those of them that stand for it, in proportion to their own weights.
    Where every domain has the same share of its samples among them, and where they are of one domain, weights stay as
    they are, to the bit; else their scale does: multiplied by the mean of these shares.

    Args:
        weights (`torch.Tensor`): of all samples, `[samples]`.
        domain (`torch.Tensor`): domain of each sample, `[samples]`.
        index (`torch.Tensor`): which samples stand for all, `[some samples]`.
    """
    own, chosen = domain[index], weights[index]
    if len(own.unique()) < 2:
        return chosen
    # In float64 sums of equal float32 weights are exact, and equal shares are equal to the bit.
    none = torch.zeros(int(domain.max()) + 1, dtype=torch.float64)
    whole = none.index_add(0, domain, weights.double())
    standing = none.index_add(0, own, chosen.double())
    counts = torch.bincount(domain)
    mean = counts[own.unique()].sum().double() / len(index)
    factors = torch.where(standing > 0, whole / standing, 1.0) / mean
    return (chosen.double() * factors[own]).to(weights.dtype)


def mean_cosine(statistics: Statistics, weights: torch.Tensor) -> torch.Tensor:
    """Mean cosine of every layer's input and output over weighted samples, `[layers]`.

    Args:
        statistics ([`Statistics`]): collected with `Needs(cosine=True)`.
        weights (`torch.Tensor`): sample weights, `[samples]`.

    Raises:
        StatisticsError: no window weighs anything, or weights are not finite.
    """
    assert statistics.cosine is not None
    found = (statistics.cosine * weights[:, None]).sum(0) / (statistics.tokens * weights).sum()
    if not torch.isfinite(found).all():
        raise StatisticsError(
            "the mean cosines of the layers' inputs and outputs are not finite: no window weighs anything, or weights "
            "are not finite. Check calibration.domain_weights, and give text of the domains that they weigh."
        )
    return found
